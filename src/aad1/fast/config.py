"""The switches of the fast path, and what becomes of those that a machine cannot honour."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from dataclasses import dataclass, fields, replace

import torch

from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FastConfig:
    """Parts of the fast path, each of which can be turned off by itself.

    What is not a switch (cache slots written in place, the cache pass that ends at the last
    layer's K and V, no wait for the device within a chunk) costs nothing anywhere.
    """

    precompute: bool = True
    """Modulation per noise level and text K/V per prompt are computed once, not in every pass."""
    compile: bool = True
    """torch.compile of what lies before and after attention: one graph for all layers, the same
    for every fill level of the cache."""
    triton: bool = False
    """This package's own fused kernels (residual + norm + modulate, q/k norm + RoPE + cache write,
    GELU + float8 rows; in Wan's decoder all between two convolutions) instead of what PyTorch or
    its compiler makes of the same formulas."""
    cudnn: bool = True
    """cuDNN's attention is preferred; flash attention and the others follow."""
    graph: bool = False
    """Each pass as one CUDA graph, where the window holds one past chunk."""
    image_graph: bool = True
    """The image's cache pass as one CUDA graph: one frame is too short to hide its launches."""
    fp8: bool = False
    """The blocks' linears in float8 with a scale per row; conditioning and head stay as they
    are. The only switch that changes what is computed."""
    decoder: bool = True
    """Wan's decoder by this package: channels last, caches of fixed size."""
    compile_decoder: bool = True
    """torch.compile of that decoder."""
    half_decoder: bool = False
    """The light codec decodes in bfloat16, where the CPU multiplies it: frames differ by a level
    or two of 255."""
    early: bool = True
    """The cache pass is launched before the frames are waited for, and they are copied to
    pinned memory."""

    def without(self, *names: str) -> FastConfig:
        """The same with those parts off. UserError for a name that is none."""
        known = [f.name for f in fields(self)]
        for name in names:
            if name not in known:
                raise UserError(f"no part {name!r} of the fast path; known: {', '.join(known)}")
        return replace(self, **dict.fromkeys(names, False))


OFF = FastConfig(
    precompute=False, compile=False, triton=False, cudnn=False, graph=False, image_graph=False,
    fp8=False, decoder=False, compile_decoder=False, half_decoder=False, early=False,
)  # fmt: skip


SMALL = 1024
"""Below this width a network is not compiled unasked: the wait would outlast most videos."""


def default_config(device: torch.device, width: int) -> FastConfig:
    """What pays on that kind of device, for a transformer of that width.

    All of it exact to rounding, but `half_decoder` on a CPU: its error is that of 8-bit frames.
    """
    if device.type == "cuda":
        return FastConfig(compile=width >= SMALL, triton=True)
    half = device.type == "cpu" and multiplies_bfloat16()
    return FastConfig(
        compile=False,
        compile_decoder=False,
        cudnn=False,
        image_graph=False,
        early=False,
        half_decoder=half,
    )


def asked_config(
    device: torch.device, width: int, *, plain: bool, fp8: bool, without: str
) -> FastConfig | None:
    """What the flags --plain, --fp8 and --without (names with commas) ask for; None: no fast path.

    UserError for a name that is none, or for --plain beside parts of what it leaves out.
    """
    if plain and (fp8 or without):
        raise UserError("--plain leaves the fast path out; --fp8 and --without are parts of it")
    config = replace(default_config(device, width), fp8=fp8)
    config = config.without(*[name for name in without.split(",") if name])
    if config.fp8 and device.type != "cuda":
        warnings.warn(
            f"float8 gains no time on a {device.type} device: it is computed by its reference "
            "formula, slower than without --fp8",
            stacklevel=2,
        )
    return None if plain or device.type not in ("cuda", "cpu") else config


def usable(
    config: FastConfig, device: torch.device, geometry: ChunkGeometry, width: int, ffn_dim: int = 0
) -> FastConfig:
    """`config` without the parts that cannot work here, with one warning that names them.

    width, ffn_dim: of the transformer. Parts that mean nothing off CUDA are dropped without a word
    only if they are the defaults of a CUDA device (`default_config` leaves them out elsewhere).
    """
    lost: dict[str, str] = {}
    cuda = device.type == "cuda"
    has_triton = importlib.util.find_spec("triton") is not None
    for name in ("cudnn", "graph", "image_graph"):
        if getattr(config, name) and not cuda:
            lost[name] = f"the device is {device.type}, not cuda"
    for name in ("graph", "image_graph"):
        if getattr(config, name) and not config.precompute:
            lost.setdefault(name, "without precompute prompts have no memory that stays")
    if config.graph and cuda and not one_past_chunk(geometry):
        past = geometry.window - geometry.sink - geometry.chunk
        lost["graph"] = f"the window holds {past} past frames, more than a chunk"
    if config.triton and not (has_triton and (cuda or triton_interprets())):
        lost["triton"] = "Triton is not installed" if not has_triton else "it needs cuda"
    reason = compiler_fails(device, has_triton) if cuda else ""
    for name in ("compile", "compile_decoder", "triton"):
        if reason and getattr(config, name):
            lost.setdefault(name, reason)
    if config.fp8:
        reason = fp8_fails(device, width, ffn_dim)
        if reason:
            lost["fp8"] = reason
    if lost:
        by_reason: dict[str, list[str]] = {}
        for name, reason in lost.items():
            by_reason.setdefault(reason, []).append(name)
        parts = "; ".join(f"{', '.join(names)} ({why})" for why, names in by_reason.items())
        warnings.warn(f"the fast path runs without {parts}", stacklevel=2)
    return config.without(*lost)


def compiler_fails(device: torch.device, has_triton: bool) -> str:
    """Why kernels cannot be compiled for a CUDA device, or "" if they can: known before a video."""
    if not has_triton:
        return "the compiler needs Triton, which is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (7, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"Triton needs compute capability 7.0, this GPU has {major}.{minor}"
    compilers = [os.environ.get("CC", ""), "gcc", "clang", "cc"]
    if os.name == "posix" and not any(shutil.which(name) for name in compilers if name):
        return "Triton needs a C compiler, and neither gcc nor clang is installed"
    return ""


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it; elsewhere it is emulated and slow."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def triton_interprets() -> bool:
    """Whether Triton's kernels are interpreted on the CPU (TRITON_INTERPRET=1: for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def one_past_chunk(geometry: ChunkGeometry) -> bool:
    """Whether a chunk sees at most the one before it, besides the sink: then K can be stored
    at the position where it will be read, and no position ever grows."""
    past = geometry.window - geometry.sink - geometry.chunk
    return (geometry.relative or not geometry.sink) and past <= geometry.chunk


def fp8_fails(device: torch.device, width: int, ffn_dim: int = 0) -> str:
    """Why row-wise float8 matrix products do not work here, or "" if they do (one is tried)."""
    from aad1.fast.ops import fp8_product, quantise_rows

    for what, size in (("width", width), ("feed-forward width", ffn_dim)):
        if size % 16:
            return f"a {what} of {size} is not a multiple of 16"
    if device.type != "cuda":
        return ""  # computed by the reference formula: slow, for tests
    try:
        x = torch.ones(32, 64, device=device, dtype=torch.bfloat16)
        fp8_product(*quantise_rows(x), *quantise_rows(x), None, x.dtype)
    except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
        return f"this GPU has no row-wise float8 product: {str(error).splitlines()[0][:80]}"
    return ""
