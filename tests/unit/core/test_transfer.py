"""What is brought to a device is what it was."""

from __future__ import annotations

import pytest
import torch

from aad1.core.transfer import upload


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_values_type_and_device(device: str) -> None:
    for tensor in (torch.arange(5), torch.randn(3, 2), torch.zeros(0, 4)):
        moved = upload(tensor, device)
        assert moved.device.type == device and moved.dtype == tensor.dtype
        assert torch.equal(moved.cpu(), tensor)
        assert torch.equal(
            upload(tensor, torch.device(device), torch.bfloat16).cpu(), tensor.bfloat16()
        )
