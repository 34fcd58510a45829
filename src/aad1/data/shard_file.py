"""One shard's tensor, read with plain reads.

A memory map is no faster for whole clips, and a file that another program cuts short while it is
mapped ends the process by a signal (SIGBUS), without a word. A read can say what happened.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aad1.errors import UserError

if TYPE_CHECKING:
    import torch


class ShardFile:
    """Rows of one tensor in a safetensors file.

    No file is held open: a folder may have thousands of shards, and threads may read side by side.

    shape: of the whole tensor, [clips, ...]; metadata: strings of the file's header.

    Raises OSError, SafetensorError or ValueError if it cannot be read or has no such tensor.
    """

    def __init__(self, path: Path, tensor: str) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="np") as file:  # checks the header, and the file's size
            self.shape: list[int] = list(file.get_slice(tensor).get_shape())
            self.metadata: dict[str, str] = dict(file.metadata() or {})
        self.path, self._size = path, path.stat().st_size
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            entry: dict[str, Any] = json.loads(raw.read(length))[tensor]
        self._kind = str(entry["dtype"])
        if self._kind not in _KINDS:
            raise ValueError(f"{tensor} is of type {self._kind}, not {', '.join(_KINDS)}")
        begin, end = entry["data_offsets"]
        self._begin = 8 + length + int(begin)
        self._row = (int(end) - int(begin)) // max(1, self.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        import torch

        kind: torch.dtype = getattr(torch, _KINDS[self._kind])
        return kind

    def read(self, rows: torch.Tensor, first: int) -> None:
        """Fill rows [n, ...], contiguous and of the stored dtype, with rows first .. first + n - 1.

        UserError if the file is no longer as long as it was when it was opened; OSError as the
        system says it.
        """
        import torch

        numbers: Any = rows.view(-1).view(torch.uint8).numpy()
        into = memoryview(numbers)
        with self.path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(self._begin + first * self._row)
            while size == self._size and len(into):
                count = file.readinto(into)  # 2 GiB at most, on Linux
                if not count:
                    size = os.fstat(file.fileno()).st_size
                    break
                into = into[count:]
        if len(into):
            raise UserError(
                f"shard {self.path} has {size} bytes, it had {self._size} when the run began: "
                "another program has changed it"
            )


_KINDS = {"U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32"}
