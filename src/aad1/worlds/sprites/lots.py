"""Drawing lots: every number is a hash, so nothing depends on the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix(value: Tensor) -> Tensor:
    """A 32-bit integer hash (two multiply-xorshift rounds) on int64 tensors."""
    value = value & _MASK
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK
    value = ((value ^ (value >> 15)) * 0x6C8E9CF5) & _MASK
    return value ^ (value >> 16)


def clip_keys(seed: int, start: int, count: int) -> Tensor:
    """int64 [count, 2]: two 32-bit keys per clip, so that 64 bits of seed and index matter."""
    index = torch.arange(start, start + count, dtype=torch.int64)
    words = [seed & _MASK, (seed >> 32) & _MASK]
    keys = []
    for salt in (0x3C6EF372, 0x1B873593):
        key = mix(torch.full_like(index, salt))
        for word in words:
            key = mix(key + word)
        key = mix(mix(key + (index & _MASK)) + (index >> 32))
        keys.append(key)
    return torch.stack(keys, dim=1)


class Lots:
    """Uniform numbers of each clip, one stream per clip; float64 [B, ...]."""

    def __init__(self, keys: Tensor) -> None:
        self._keys = keys
        self._drawn = 0

    def uniform(self, *shape: int) -> Tensor:
        """[B, *shape] in [0, 1)."""
        number = math.prod(shape)
        counter = torch.arange(self._drawn, self._drawn + number, dtype=torch.int64)
        self._drawn += number
        bits = mix(mix(self._keys[:, :1] + counter * 0x61C88647) + self._keys[:, 1:])
        return (bits.double() / 2**32).view(-1, *shape)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """[B, *shape] in [low, high)."""
        return low + (high - low) * self.uniform(*shape)

    def integer(self, below: int, *shape: int) -> Tensor:
        """int64 [B, *shape] from 0 to below - 1."""
        return (self.uniform(*shape) * below).long()
