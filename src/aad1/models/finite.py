"""Weights must be numbers: NaN and infinity are refused when they are read.

One sum per tensor tells: it is finite only if every number is, costs one pass over memory that was
touched just now, and on a GPU is not waited for before all tensors are there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from aad1.errors import UserError


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum, on the tensor's device, float32 [].

    Added up in the tensor's own dtype, which on a CPU is 30 times as fast as `sum(dtype=...)`.
    """
    wide = values if values.dtype.itemsize > 1 else values.float()  # float8 cannot be added up
    return wide.detach().sum().float()


def check_finite(
    tensors: Mapping[str, torch.Tensor], totals: Mapping[str, torch.Tensor], source: str
) -> None:
    """UserError that names the first tensor with NaN or infinity in it.

    totals: `total` of those of the tensors that are to be checked, all on one device.
    """
    if not totals or bool(torch.stack(list(totals.values())).isfinite().all()):
        return
    # Finite numbers may add up to infinity, so the tensors in question are looked at themselves.
    suspects = [name for name, value in totals.items() if not bool(value.isfinite())]
    bad = [name for name in suspects if not finite(tensors[name])]
    if bad:
        others = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise UserError(f"{source} is damaged: {bad[0]}{others} holds NaN or infinity")


def finite(values: torch.Tensor) -> bool:
    """Whether every number is; waits for the device."""
    return bool(total(values).isfinite()) or bool(values.float().isfinite().all())
