"""A benchmark from building the networks to the report."""

from __future__ import annotations

import json as json_module
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from aad1.atomic import replace_file
from aad1.bench import report
from aad1.bench.config import BenchConfig
from aad1.bench.measure import decode_errors, measure, measure_merged
from aad1.bench.subject import SIZES, Subject, folder_subject, random_subject, with_tiny_decoder
from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.fast.config import FastConfig, default_config, usable
from aad1.fast.rollout import admits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure, print the table and write the file; returns what the file holds.

    UserError for settings that cannot be, before anything is built.
    """
    device, dtype = _device(config), _dtype(config)
    size = _size(config)
    if config.chunks < 1:
        raise UserError(f"chunks must be at least 1, got {config.chunks}")
    if config.profile and device.type != "cuda":
        raise UserError(f"--profile looks at a GPU's kernels, the device is {device.type}")
    _switches(config, device, 0)  # unknown names, before anything is built
    if config.threads:
        torch.set_num_threads(config.threads)
    subject = _subject(config, size, device, dtype)
    if config.decoder and not config.no_decode:
        subject = with_tiny_decoder(subject, config.decoder, config.seed)
    fast = _switches(config, device, subject.model.config.width)
    if not admits(subject.geometry):
        raise UserError(f"the fast path needs relative positions, got {subject.geometry}")
    with _one_line_warnings():
        sizes = subject.model.config.width, subject.model.config.ffn_dim
        fast = usable(fast, device, subject.geometry, *sizes)
    variants: dict[str, FastConfig | None] = {"fast": fast}
    if config.baseline:
        variants = {"baseline": None, **variants}
    if config.ablate:
        idle = set()  # parts that this subject has no use for
        if config.no_decode or subject.fast_vae is None:
            idle |= {"decoder", "compile_decoder"}
        if subject.tiny_decoder is not None:
            idle.add("decoder")
        if config.no_decode or subject.half_decoder is None:
            idle.add("half_decoder")
        names = [f.name for f in fields(FastConfig) if f.name not in idle]
        variants |= {f"without {n}": fast.without(n) for n in names if getattr(fast, n)}
    results: dict[str, Any] = {}
    clips = {}
    order = sorted(variants, key=lambda name: variants[name] is not None)  # the plain path first:
    for name in order:  # it must not profit from weights that the fast one has joined
        results[name], clips[name] = measure(
            subject, variants[name], chunks=config.chunks, seed=config.seed,
            decode=not config.no_decode, profile=config.profile and name == "fast",
        )  # fmt: skip
    if config.merged:
        results["merged"], clips["merged"] = measure_merged(
            subject, fast, chunks=config.chunks, seed=config.seed
        )
    reference = "baseline" if config.baseline else "fast"
    for name, clip in clips.items():
        error = (clip - clips[reference]).norm() / clips[reference].norm()
        results[name]["difference"] = float(error)
    out = {
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "geometry": asdict(subject.geometry),
        "sigmas": subject.sigmas,
        "size": subject.size,
        "frames_per_chunk": subject.geometry.chunk * subject.temporal_stride,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": machine(device),
        "date": date.today().isoformat(),
        "notes": list(subject.notes),
        "difference_to": reference,
        "results": results,
    }
    own = subject.fast_vae is not None and subject.tiny_decoder is None
    if not config.no_decode and own and dtype != torch.float32:
        out["decode_error"] = decode_errors(subject, fast, config.seed)
    report.show(out)
    if config.json is not None:
        with replace_file(config.json) as temporary:
            temporary.write_text(json_module.dumps(out, indent=2) + "\n", encoding="utf-8")
    return out


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        facts["memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30)
    else:
        facts["device"] = f"{platform.machine()} CPU"
        facts["threads"] = torch.get_num_threads()
    return facts


def _subject(
    config: BenchConfig, size: tuple[int, int] | None, device: torch.device, dtype: torch.dtype
) -> Subject:
    name = config.model.lower()
    if name not in SIZES:
        return folder_subject(config.model, size, device, dtype)
    # Imported here: a model folder has levels of its own.
    from aad1.wan_folder import few_step_sigmas

    geometry = ChunkGeometry(chunk=config.chunk, sink=config.sink, window=config.window)
    default = (64, 48) if name == "tiny" else (832, 480)
    return random_subject(
        name, geometry, few_step_sigmas(config.steps), size or default, device, dtype, config.seed
    )


def _switches(config: BenchConfig, device: torch.device, width: int) -> FastConfig:
    fast = default_config(device, width)
    added = [name for name in config.add.split(",") if name] + ["fp8"] * config.fp8
    fast.without(*added)  # complains about unknown names
    return replace(fast, **dict.fromkeys(added, True)).without(
        *[name for name in config.without.split(",") if name]
    )


def _device(config: BenchConfig) -> torch.device:
    if config.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device must be auto, cpu or cuda, got {config.device!r}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but no CUDA device is available")
    cuda = config.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def _dtype(config: BenchConfig) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if _device(config).type == "cuda" else torch.float32
    if config.dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(f"dtype must be auto or one of {known}, got {config.dtype!r}")
    return DTYPES[config.dtype]


def _size(config: BenchConfig) -> tuple[int, int] | None:
    if not config.size:
        return None
    parts = config.size.lower().split("x")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise UserError(f"size must be WIDTHxHEIGHT such as 832x480, got {config.size!r}")
    return int(parts[0]), int(parts[1])


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"aad1: {message}\n"  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = before
