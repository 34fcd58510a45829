"""Where a chunk's time goes on a GPU: its kernels by kind, and the gaps between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "attention": ("sdpa", "flash", "fmha"),
    "convolutions": ("conv", "fprop", "implicit"),
    "matrix products": ("gemm", "nvjet", "cutlass", "gemv", "splitk"),
}
"""Parts of kernels' names, in the order in which they are looked for."""
REST = "everything else"
TOP = 12


def kind_of(name: str) -> str:
    """What a kernel does, by its name. The compiler names its elementwise ones after all that they
    stand between."""
    name = name.lower()
    if name.startswith(("triton_poi", "triton_red", "triton_per")):
        return REST
    return next((k for k, parts in KINDS.items() if any(p in name for p in parts)), REST)


def summed(kernels: Iterable[tuple[str, float, float]]) -> dict[str, Any]:
    """Milliseconds by kind of (name, begin, end in microseconds), of the whole, and of gaps.

    top: [name, milliseconds, count] of those that take most.
    """
    kinds = dict.fromkeys([*KINDS, REST], 0.0)
    names: dict[str, list[float]] = {}
    spans = []
    for name, begin, end in kernels:
        kinds[kind_of(name)] += (end - begin) / 1000
        entry = names.setdefault(name, [0.0, 0])
        entry[0] += (end - begin) / 1000
        entry[1] += 1
        spans.append((begin, end))
    busy, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    whole = until - min(spans)[0] if spans else 0.0
    top = sorted(((n[:120], ms, int(k)) for n, (ms, k) in names.items()), key=lambda x: -x[1])
    return {
        "kinds": kinds, "whole": whole / 1000, "gaps": (whole - busy) / 1000,
        "kernels": len(spans), "top": [list(one) for one in top[:TOP]],
    }  # fmt: skip


def profiled(call: Callable[[], object]) -> dict[str, Any]:
    """`summed` of what a call runs on the GPU, copies included."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return summed(
        (e.name, e.time_range.start, e.time_range.end)
        for e in profiler.events()
        if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
    )
