"""Flags that several commands share, as text or files -> values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aad1.errors import UserError


def parse_size(text: str | None) -> tuple[int, int] | None:
    """ "1280x720" -> (1280, 720); UserError for anything else."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise UserError(f"--size must be WIDTHxHEIGHT such as 832x480, got {text!r}")
    return int(parts[0]), int(parts[1])


def check_size(size: tuple[int, int], units: tuple[int, int]) -> None:
    """UserError that names the nearest sizes unless (width, height) are multiples of `units`."""
    width, height = size
    for name, value, unit in (("width", width, units[0]), ("height", height, units[1])):
        if value < unit or value % unit:
            low = max(unit, value // unit * unit)
            near = f"{low} or {low + unit}" if value > unit else f"{unit}"
            raise UserError(
                f"size {width}x{height}: {name} {value} is not divisible by {unit} (nearest {near})"
            )


def pair_loras(files: Sequence[Path], scales: Sequence[float]) -> list[tuple[Path, float]]:
    """Each LoRA with its scale, 1 if none are given; UserError unless there are as many."""
    if scales and len(scales) != len(files):
        raise UserError(
            f"--lora-scale must have one number per LoRA ({len(files)}), got {len(scales)}"
        )
    return list(zip(files, scales or [1.0] * len(files), strict=True))
