"""Files of named tensors, read when asked for: safetensors, and PyTorch's own .pt / .pth / .bin.

Opening a file reads names, shapes and dtypes. The numbers are mapped from disk and read tensor by
tensor, so that whoever copies them holds one file at most beside the copy. PyTorch's files are
pickles; they are read with `weights_only=True`, which admits tensors and plain containers and runs
no code from the file.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from aad1.errors import UserError

SAFETENSORS = (".safetensors", ".sft")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
CONFIG_KEY = "config"
"""Where `aad1 convert` notes what shapes do not tell: safetensors metadata, or a key of a .pt."""
WEIGHTS_ORDER = ("generator_ema", "generator", "model_ema", "ema", "model", "state_dict",
                 "generator_lora")  # fmt: skip
"""State dicts that a .pt may hold side by side (as Self-Forcing names them), best first."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of the numbers."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class TensorFile:
    """An opened file; `read` opens it again for the numbers."""

    path: Path
    specs: Mapping[str, Spec]
    """By the names in the file; those of a .pt within the chosen state dict."""
    config: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""
    """Which state dict of a .pt was chosen; "" if the file is one."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of a safetensors file."""

    def read(
        self, names: Iterable[str], rows: Mapping[str, slice] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) one after the other. Tensors are views of the mapped file: copy them.

        rows: by name, the rows of the first dimension that are wanted; no others are read.
        """
        rows = rows or {}
        if self.path.suffix in SAFETENSORS:
            with _safetensors(self.path) as file:
                for name in names:
                    wanted = rows.get(name)
                    if wanted is None:
                        yield name, file.get_tensor(name)
                    elif wanted.start < wanted.stop:
                        yield name, file.get_slice(name)[wanted]
            return
        tensors = _flat(_unpickle(self.path), self.weights)
        for name in names:
            wanted = rows.get(name)
            if wanted is None or wanted.start < wanted.stop:
                yield name, tensors[name] if wanted is None else tensors[name][wanted]


def open_tensors(path: Path, weights: str = "") -> TensorFile:
    """Open a file of tensors.

    weights: which state dict of a .pt that holds several ("generator_ema", "critic", ...); "" takes
        the first of `WEIGHTS_ORDER`.

    UserError if the file is missing, damaged, needs code to be run, or has no such state dict.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    _refuse_pointer(path)
    if path.suffix in SAFETENSORS:
        return _open_safetensors(path)
    if path.suffix not in PICKLES:
        known = ", ".join((*SAFETENSORS, *PICKLES))
        extra = "; quantised GGUF files are not supported" if path.suffix == ".gguf" else ""
        raise UserError(f"{path} is no file of weights that can be read ({known}){extra}")
    raw = _unpickle(path)
    chosen = _choose(raw, weights, path)
    tensors = _flat(raw, chosen)
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    config = raw.get(CONFIG_KEY)
    specs = {name: Spec(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    return TensorFile(path, specs, config if isinstance(config, Mapping) else {}, chosen)


def _refuse_pointer(path: Path) -> None:
    """UserError for what git leaves in a file's place where Git LFS is not installed."""
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise UserError(
                f"{path} only says where the weights are (Git LFS): fetch them with `git lfs pull`"
            )


def refuse_distributed(folder: Path) -> None:
    """UserError if a folder is a checkpoint of torch.distributed, which names the way out.

    Its index is a pickle that `weights_only` does not admit, so it is not opened here.
    """
    if any(folder.glob("*.distcp")):
        if (folder.parent / "meta.json").is_file():
            raise UserError(f"{folder} is what a run trains on from: give the run's final/ folder")
        raise UserError(
            f"{folder} is a checkpoint of torch.distributed (.distcp), which is not read; if you "
            "trust it, make one file of it: python -m torch.distributed.checkpoint.format_utils "
            f"dcp_to_torch {folder} weights.pt"
        )


def _safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file: {error}") from None


def _open_safetensors(path: Path) -> TensorFile:
    specs = {}
    with _safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_slice(name)
            dtype = tensor.get_dtype()
            if dtype not in _DTYPES:
                raise UserError(f"{path}: {name} is of type {dtype}, which cannot be read")
            specs[name] = Spec(tuple(tensor.get_shape()), _DTYPES[dtype])
        metadata = file.metadata() or {}
    if not specs:
        raise UserError(f"{path} holds no tensors")
    try:
        config = json.loads(metadata.get(CONFIG_KEY, "{}"))
    except json.JSONDecodeError:  # somebody else's use of the name
        config = {}
    own = config if isinstance(config, dict) else {}
    return TensorFile(path, specs, own, metadata=metadata)


def _unpickle(path: Path) -> Mapping[str, Any]:
    """The dict that a .pt holds; tensors of a file in the zip format are mapped, not read."""
    try:
        with path.open("rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"  # files from before PyTorch 1.6 are no zip
        with warnings.catch_warnings():  # of protocols that are refused anyhow
            warnings.simplefilter("ignore")
            raw = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise UserError(f"{path} is truncated or not a PyTorch file") from None
        raise UserError(
            f"{path} holds a Python object ({found[1]}), and reading it could run any code, so it "
            "is refused; ask for the weights as safetensors, or save the state dict alone "
            "(torch.save of tensors) where the file was made, then use it or `aad1 convert` it"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        line = str(error).split("\n")[0].split(". ")[0]
        raise UserError(f"{path} is truncated or not a PyTorch file: {line}") from None
    if not isinstance(raw, Mapping):
        raise UserError(f"{path} must hold a dict of tensors, got {type(raw).__name__}")
    return raw


def _choose(raw: Mapping[str, Any], weights: str, path: Path) -> str:
    """The top-level dict to read, or "" if the file itself is the state dict."""
    nested = [k for k, v in raw.items() if isinstance(v, Mapping) and _flat(v)]
    if weights:
        if weights in nested:
            return weights
        raise UserError(f"{path} has no weights {weights!r}; it has {', '.join(nested) or 'one'}")
    if not nested or any(isinstance(v, torch.Tensor) for v in raw.values()):
        return ""
    for name in (*WEIGHTS_ORDER, *(nested if len(nested) == 1 else ())):
        if name in nested:
            return name
    raise UserError(f"{path} holds {', '.join(nested)}: say which one is meant")


def _flat(raw: Mapping[str, Any], chosen: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a (nested) dict under dotted names."""
    out: dict[str, torch.Tensor] = {}
    for key, value in (raw[chosen] if chosen else raw).items():
        if isinstance(value, torch.Tensor):
            out[str(key)] = value
        elif isinstance(value, Mapping):
            out |= {f"{key}.{name}": tensor for name, tensor in _flat(value).items()}
    return out


@dataclass(frozen=True)
class Source:
    """The tensors of one network, in the names the network has here, spread over files."""

    where: Path
    """Folder or file, for messages."""
    places: Mapping[str, tuple[TensorFile, str]]
    """Name -> the file, and the name in it."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What a config.json beside the files, or the files themselves, say."""
    beside: tuple[str, ...] = ()
    """Why files in the same folder could not be read: what is missing here may be in them."""

    @property
    def reasons(self) -> str:
        """`beside` as the end of a message on what is missing; "" if there is nothing."""
        return f" ({'; '.join(self.beside)})" if self.beside else ""

    @property
    def fingerprint(self) -> str:
        """32 hex digits that tell these weights from others.

        Made of every file's size, which state dict of it counts, and 64 KiB at 64 places spread
        over it: reading all of a large model would take longer than what this is asked for saves.
        """
        digest = hashlib.sha256()
        block, places = 1 << 16, 64
        files = {file.path: file for file, _ in self.places.values()}
        for path, file in sorted(files.items()):
            size = path.stat().st_size
            digest.update(f"{path.name}/{size}/{file.weights}".encode())
            with path.open("rb") as opened:
                for place in range(places if size > block else 1):
                    opened.seek(max(0, size - block) * place // (places - 1))
                    digest.update(opened.read(block))
        return digest.hexdigest()[:32]

    @property
    def specs(self) -> dict[str, Spec]:
        """Shape and dtype by name."""
        return {name: file.specs[key] for name, (file, key) in self.places.items()}

    def read(
        self, names: Iterable[str] | None = None, rows: Mapping[str, slice] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) file by file; the tensors are views of mapped files: copy them.

        rows: as `TensorFile.read` takes them.
        """
        wanted: dict[Path, tuple[TensorFile, dict[str, str]]] = {}
        for name in self.places if names is None else names:
            file, key = self.places[name]
            wanted.setdefault(file.path, (file, {}))[1][key] = name
        for file, keys in wanted.values():
            own = {key: rows[name] for key, name in keys.items() if rows and name in rows}
            for key, tensor in file.read(keys, own):
                yield keys[key], tensor
