"""Small tensors made on the CPU, brought to where the computation is."""

from __future__ import annotations

import torch


def upload(
    tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A tensor from the CPU on a device. To CUDA from page-locked memory: from other memory the
    host would wait until the device has done all that was asked of it before."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, dtype, non_blocking=True)
    return tensor.to(device, dtype)
