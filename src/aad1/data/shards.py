"""Clips on disk: a folder of safetensors shards and one manifest.

    folder/
        manifest.json        {"format", "world", "split", "seed", "config", "tensor",
                              "shards": [{"file", "clips"}, ...]}
        shard-00000.safetensors
        ...

A shard holds one tensor whose first dimension counts clips - `video` (uint8 [N, T, H, W, 3]),
`latents` (float16 [N, C, F, h, w]) or `states` (float16 [N, levels + 1, C, F, h, w], a teacher's
trajectories from noise to the clean clip) - and, in the safetensors metadata, the captions as JSON:
one list per clip with one caption per chunk, the last one holding for all chunks after it. A clip
is read when it is asked for, so a folder may be far larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aad1.atomic import replace_file
from aad1.data.shard_file import ShardFile
from aad1.errors import UserError

# torch takes seconds to import and the recording workers, which only write shards, do not need it.
if TYPE_CHECKING:
    import torch

    from aad1.data.batch import Clips

FORMAT = "aad1.shards.1"
MANIFEST = "manifest.json"


def shard_name(index: int) -> str:
    """File name of shard number `index`."""
    return f"shard-{index:05d}.safetensors"


def write_shard(
    path: Path,
    array: np.ndarray[Any, Any],
    captions: Sequence[Sequence[str]],
    *,
    tensor: str = "video",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write N clips to `path`, atomically.

    array: [N, ...], uint8 [N, T, H, W, 3] under the name "video", float16 [N, C, F, h, w] under
        the name "latents" or float16 [N, levels + 1, C, F, h, w] under the name "states".
    captions: N lists of captions, one per chunk.
    metadata: further strings for the file's header ("captions" is taken).

    Raises ValueError if captions and clips differ in number.
    """
    from safetensors.numpy import save_file

    if len(captions) != len(array):
        raise ValueError(f"{len(captions)} captions for {len(array)} clips")
    header = dict(metadata or {})
    header["format"] = FORMAT
    header["captions"] = json.dumps([list(c) for c in captions])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        save_file({tensor: np.ascontiguousarray(array)}, temporary, metadata=header)


def read_header(path: Path) -> dict[str, str] | None:
    """The metadata of a complete shard, or None if the file is absent, cut short or foreign."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            header: dict[str, str] = dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return None
    return header if header.get("format") == FORMAT else None


def write_manifest(
    folder: Path,
    *,
    world: str,
    split: str,
    seed: int,
    config: Mapping[str, Any],
    shards: Iterable[tuple[str, int]],
    tensor: str = "video",
) -> None:
    """Write folder/manifest.json, atomically; `shards` are pairs (file name, number of clips)."""
    content = {
        "format": FORMAT,
        "world": world,
        "split": split,
        "seed": seed,
        "config": dict(config),
        "tensor": tensor,
        "shards": [{"file": name, "clips": clips} for name, clips in shards],
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replace_file(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards.

    Raises UserError if there is none, or it is not one of ours.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no {MANIFEST}: give a folder that 'aad1 data' has finished writing"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a manifest of format {FORMAT}")
    return content


class ClipShards:
    """Random access to the clips of a folder of shards.

    The headers of all shards are checked on opening; tensor data is read when asked for.

    manifest: the parsed manifest.json.
    tensor: name of the tensor in the shards, "video", "latents" or "states".

    Raises UserError that names the file if a shard is missing, cut short or does not hold what
    the manifest says.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.tensor: str = self.manifest["tensor"]
        self._files: list[ShardFile] = []
        self._starts: list[int] = [0]
        self._captions: list[list[str]] = []
        shape: list[int] | None = None
        for entry in self.manifest["shards"]:
            path = self.folder / entry["file"]
            file, captions, found = self._open(path, int(entry["clips"]))
            if shape is not None and found != shape:
                raise UserError(f"{path} holds clips of shape {found}, others of {shape}")
            if self._files and file.dtype != self._files[0].dtype:
                raise UserError(
                    f"{path} holds numbers of {file.dtype}, others of {self._files[0].dtype}"
                )
            shape = found
            self._files.append(file)
            self._starts.append(self._starts[-1] + len(captions))
            self._captions.extend(captions)
        if shape is None:
            raise UserError(f"{self.folder / MANIFEST} lists no shards")
        self.clip_shape: tuple[int, ...] = tuple(shape)

    def _open(self, path: Path, clips: int) -> tuple[ShardFile, list[list[str]], list[int]]:
        from safetensors import SafetensorError

        try:
            file = ShardFile(path, self.tensor)
            captions = json.loads(file.metadata["captions"])
        except FileNotFoundError:
            raise UserError(f"shard {path} is missing") from None
        except KeyError:
            raise UserError(f"shard {path} has no captions") from None
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"shard {path} is cut short or not readable: {error}") from None
        if file.shape[0] != clips or len(captions) != clips:
            raise UserError(
                f"shard {path} holds {file.shape[0]} clips and {len(captions)} captions, "
                f"its manifest says {clips}"
            )
        return file, captions, file.shape[1:]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def captions(self) -> list[list[str]]:
        """Captions of every clip, one per chunk."""
        return self._captions

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - self._starts[shard]

    def tensors(self, indices: Sequence[int]) -> torch.Tensor:
        """The stored tensor of these clips, [len(indices), ...] in the stored dtype.

        UserError names the shard that could not be read.
        """
        if not len(indices):
            raise ValueError("no indices given")
        out = self._empty(len(indices))
        for row, index in enumerate(indices):
            shard, offset = self._locate(int(index))
            self._read(shard, out[row : row + 1], offset, f"clip {index}")
        return out

    def _empty(self, count: int) -> torch.Tensor:
        import torch

        return torch.empty((count, *self.clip_shape), dtype=self._files[0].dtype)

    def _read(self, shard: int, rows: torch.Tensor, first: int, what: str) -> None:
        file = self._files[shard]
        try:
            file.read(rows, first)
        except OSError as error:
            raise UserError(f"{what} in {file.path}: {error}") from None

    def batch(self, indices: Sequence[int]) -> Clips:
        """The video clips of these indices.

        Raises ValueError if the folder holds latents (use `tensors`).
        """
        from aad1.data.batch import Clips

        if self.tensor != "video":
            raise ValueError(f"{self.folder} holds {self.tensor}, not video: use tensors()")
        return Clips(
            video=self.tensors(indices), captions=[list(self._captions[int(i)]) for i in indices]
        )

    def __getitem__(self, index: int) -> Clips:
        """One clip, as a batch of one."""
        return self.batch([index])

    def read_tensors(self) -> torch.Tensor:
        """The stored tensor of all clips, [len(self), ...]."""
        out = self._empty(len(self))
        for shard, (first, stop) in enumerate(pairwise(self._starts)):
            self._read(shard, out[first:stop], 0, "clips")
        return out

    def read_all(self) -> Clips:
        """All video clips, in memory."""
        from aad1.data.batch import Clips

        if self.tensor != "video":
            raise ValueError(f"{self.folder} holds {self.tensor}, not video: use read_tensors()")
        return Clips(video=self.read_tensors(), captions=[list(c) for c in self._captions])


def _caption_line(captions: Sequence[str]) -> str:
    """'a' when all chunks agree, else 'a | b from chunk k | ...'."""
    line = captions[0] if captions else ""
    for k in range(1, len(captions)):
        if captions[k] != captions[k - 1]:
            line += f"  |  from chunk {k}: {captions[k]}"
    return line


def preview_sheet(clips: Clips, path: Path, *, columns: int = 8) -> None:
    """Draw a PNG: one row per clip, `columns` evenly spaced frames, the caption above the row."""
    from PIL import Image, ImageDraw

    video = clips.video.cpu().numpy()
    count, frames, height, width, _ = video.shape
    # Small frames are doubled, with hard edges, so that one can see what a model would.
    scale = max(1, 128 // width)
    width, height, gap, line = width * scale, height * scale, 4, 14
    picks = np.linspace(0, frames - 1, min(columns, frames)).round().astype(int)
    sheet = Image.new(
        "RGB", (gap + len(picks) * (width + gap), count * (height + line + gap)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for row in range(count):
        top = row * (height + line + gap)
        draw.text((gap, top + 1), _caption_line(clips.captions[row]), fill="black")
        for column, frame in enumerate(picks):
            image = Image.fromarray(video[row, frame])
            if scale > 1:
                image = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (gap + column * (width + gap), top + line))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        sheet.save(temporary, format="PNG")
