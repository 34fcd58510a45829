"""What Wan at full size takes on a GPU: load time, peak memory, seconds per chunk.

    python runs/measure_wan.py --out out/wan.json                    # 1.3B and 14B, 480p and 720p
    python runs/measure_wan.py --models 1.3B --sizes 832x480 --cap-gib 16 --text
    python runs/measure_wan.py --models 14B --offload both --cap-gib 24
    python runs/measure_wan.py --models 14B --save /tmp/wan14b       # for --folder: load time
    python runs/measure_wan.py --models 14B --folder /tmp/wan14b     # or Wan2.1-T2V-14B itself

Weights are random and made on the device, unless --folder names real ones; speed and memory do not
depend on their values. Chunks of the paper's geometry (chunk 4, sink 1, window 9: 16 video frames)
are streamed from an image, in one step each, without compilation. Reported are the generating pass,
the cache pass and the decode with hand-over to the CPU, each the median over the chunks whose cache
is full. Needs PyTorch; diffusers for the decode (0.42, left out if missing), transformers for
--text.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aad1.atomic import replace_file
from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.models.dit import WanConfig, WanTransformer
from aad1.models.offload import offload_blocks
from aad1.rollout.stream import Rollout, State, seeded_noise

GIB = 2**30
MODELS = {
    "1.3B": WanConfig(),
    "14B": WanConfig(num_attention_heads=40, ffn_dim=13824, num_layers=40),
}
TINY = dict(num_attention_heads=2, attention_head_dim=16, ffn_dim=32, text_dim=32, num_layers=3)
TINY_SIZE = (32, 32)
UMT5 = dict(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
    feed_forward_proj="gated-gelu",
)  # fmt: skip
TINY_UMT5 = dict(UMT5, vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
FIRST_FULL = 2
"""Chunk 1 sees the image alone; from the second generated one on the window is full."""


def fill(module: nn.Module, device: torch.device) -> None:
    """Give a module without storage random weights on `device`, blocks alike."""
    module.to_empty(device=device)
    blocks = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    copies = {id(p) for b in blocks[:1] for block in list(b)[1:] for p in block.parameters()}
    with torch.no_grad():
        for name, p in module.named_parameters():
            if id(p) in copies:
                continue
            p.fill_(1.0) if "norm" in name and name.endswith("weight") else p.normal_(std=0.02)
        for block in list(blocks[0])[1:] if blocks else []:
            for p, first in zip(block.parameters(), blocks[0][0].parameters(), strict=True):
                p.copy_(first)


def build(config: WanConfig, folder: Path | None, device: torch.device, dtype: torch.dtype,
          offload: bool) -> WanTransformer:  # fmt: skip
    home = torch.device("cpu") if offload else device
    if folder is not None:
        from aad1.models.checkpoints import load_wan_transformer

        model = load_wan_transformer(folder, dtype, home)
    else:
        with torch.device("meta"):
            model = WanTransformer(config).cast(dtype)
        fill(model, home)
    model.eval().requires_grad_(False)
    return offload_blocks(model, device) if offload else model


def decoder(device: torch.device, dtype: torch.dtype, tiny: bool) -> tuple[Any, str]:
    """(codec with random weights, or None; why there is none)."""
    try:
        from aad1.models.wan_codec import WanCodec

        codec = WanCodec.from_config(**(dict(base_dim=8, num_res_blocks=1) if tiny else {}))
        codec.stream()
    except (ImportError, UserError) as error:
        return None, str(error)
    return codec.to(device, dtype), ""


def encode_text(device: torch.device, dtype: torch.dtype, tiny: bool) -> nn.Module:
    """UMT5 with random weights, after it has encoded 512 tokens."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"--text needs transformers ({error})") from None
    with torch.device("meta"):
        config = transformers.UMT5Config(**(TINY_UMT5 if tiny else UMT5))
        model = transformers.UMT5EncoderModel(config).to(dtype)
    fill(model, device)
    model.eval()
    model(torch.arange(512, device=device)[None] % config.vocab_size)
    return model  # type: ignore[no-any-return]


class Meter:
    """Time and peak memory of a device; memory is not measured on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def timed(self, call: Callable[[], Any]) -> tuple[Any, float]:
        self._wait()
        began = time.perf_counter()
        out = call()
        self._wait()
        return out, time.perf_counter() - began

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def reset(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float | None:
        """GiB at most allocated since `reset`."""
        if not self.cuda:
            return None
        return round(torch.cuda.max_memory_allocated(self.device) / GIB, 2)

    def reserved(self) -> float | None:
        """GiB at most taken from the device: what other programs see, CUDA itself left out."""
        if not self.cuda:
            return None
        return round(torch.cuda.max_memory_reserved(self.device) / GIB, 2)


@torch.inference_mode()
def measure(args: argparse.Namespace, name: str, sizes: list[tuple[int, int]], offload: bool
            ) -> list[dict[str, Any]]:  # fmt: skip
    """One model at several sizes."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    tiny = args.scale == "tiny"
    config = replace(MODELS[name], **TINY) if tiny else MODELS[name]  # type: ignore[arg-type]
    meter = Meter(device)
    meter.reset()
    facts: dict[str, Any] = {"model": name, "offload": offload}
    model, facts["load_s"] = meter.timed(lambda: build(config, args.folder, device, dtype, offload))
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    facts["load_peak_gib"] = meter.peak()
    if args.save is not None:
        model.save_pretrained(args.save)
    codec, facts["no_decode"] = decoder(device, dtype, tiny)
    encoder = None
    if args.text != "none":
        encoder, facts["text_s"] = meter.timed(lambda: encode_text(device, dtype, tiny))
        facts["with_text_peak_gib"] = meter.peak()
        if args.text == "release":
            encoder = None
    out = []
    for width, height in sizes:
        meter.reset()
        row = dict(facts, size=f"{width}x{height}", text=args.text)
        try:
            row |= stream(model, codec, meter, width, height, args.chunks)
        except torch.OutOfMemoryError as error:
            row["error"] = str(error).splitlines()[0]
        row |= {"peak_gib": meter.peak(), "reserved_gib": meter.reserved()}
        out.append(row)
    del encoder
    return out


def stream(model: WanTransformer, codec: Any, meter: Meter, width: int, height: int, chunks: int
           ) -> dict[str, Any]:  # fmt: skip
    """Stream chunks from a random image; seconds of each part, medians, frames per second."""
    device, geometry = model.device, ChunkGeometry()
    channels, h, w = model.config.in_channels, height // 8, width // 8
    rollout = Rollout(model, geometry)
    noise = seeded_noise([0], geometry, (channels, h, w), device)
    text = torch.zeros(1, 512, model.config.text_dim, device=device)
    text[:, :20] = torch.randn(1, 20, model.config.text_dim, device=device)
    image = torch.randn(1, channels, 1, h, w, device=device)
    state, prefill = meter.timed(lambda: rollout.prefill(image, text))
    decoding = None if codec is None else codec.stream()
    if decoding is not None:
        decoding.decode(image)
    parts: dict[str, list[float]] = {"generate_s": [], "cache_s": [], "decode_s": []}
    for _ in range(chunks):
        x0, seconds = meter.timed(lambda: rollout.generate(state, text, noise).x0)  # noqa: B023
        parts["generate_s"].append(seconds)
        if decoding is not None:
            _, seconds = meter.timed(lambda: decoding.decode(x0).cpu())  # noqa: B023
            parts["decode_s"].append(seconds)
        new, seconds = meter.timed(lambda: rollout.commit(state, x0, text))  # noqa: B023
        assert isinstance(new, State)
        state = new
        parts["cache_s"].append(seconds)
    row: dict[str, Any] = {"prefill_s": prefill, "chunks": parts}
    medians = {k: statistics.median(v[FIRST_FULL:] or v) for k, v in parts.items() if v}
    frames = geometry.chunk * 4
    passes = medians["generate_s"] + medians["cache_s"]
    row |= medians
    row["fps"] = frames / passes
    if decoding is not None:
        row["fps_with_decode"] = frames / (passes + medians["decode_s"])
    return row


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="1.3B,14B", help="of 1.3B, 14B; with commas")
    parser.add_argument("--sizes", default="832x480,1280x720", help="WIDTHxHEIGHT, with commas")
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--offload", choices=("no", "yes", "both"), default="no")
    parser.add_argument("--cap-gib", type=float, help="let PyTorch allocate no more than this")
    parser.add_argument(
        "--text", nargs="?", const="release", default="none", choices=("none", "release", "hold"),
        help="encode a prompt with UMT5 first; then release it, or hold it while streaming",
    )  # fmt: skip
    parser.add_argument("--folder", type=Path, help="Wan's weights, in any format, of one model")
    parser.add_argument("--save", type=Path, help="write the random weights to this folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny: for tests")
    parser.add_argument("--out", type=Path, default=Path("out/measure_wan.json"))
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> tuple[list[str], list[tuple[int, int]], list[bool]]:
    """(models, sizes, offload or not); UserError for what cannot be."""
    models = args.models.split(",")
    for name in models:
        if name not in MODELS:
            raise UserError(f"--models must be of {', '.join(MODELS)}, got {name!r}")
    if (args.folder or args.save) is not None and len(models) > 1:
        raise UserError("--folder and --save are of one model: give --models 1.3B or 14B with them")
    sizes = []
    for text in args.sizes.split(","):
        numbers = [int(n) for n in text.split("x") if n.isdecimal()]
        if len(numbers) != 2 or any(n < 16 or n % 16 for n in numbers):
            raise UserError(f"--sizes must be WIDTHxHEIGHT, multiples of 16, got {text!r}")
        sizes.append((numbers[0], numbers[1]))
    if args.scale == "tiny":
        sizes = [TINY_SIZE]
    if args.chunks < 1:
        raise UserError(f"--chunks must be at least 1, got {args.chunks}")
    cuda = torch.device(args.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("no CUDA device is available")
    if args.cap_gib is not None:
        if not cuda:
            raise UserError("--cap-gib needs a CUDA device")
        total = torch.cuda.mem_get_info()[1] / GIB
        if not 0 < args.cap_gib <= total:
            raise UserError(f"--cap-gib must be in (0, {total:.1f}] here, got {args.cap_gib:g}")
        torch.cuda.set_per_process_memory_fraction(args.cap_gib / total)
    if args.offload != "no" and not cuda and args.scale != "tiny":
        raise UserError("--offload needs a CUDA device")
    return models, sizes, {"no": [False], "yes": [True], "both": [False, True]}[args.offload]


def show(row: dict[str, Any]) -> str:
    def seconds(name: str) -> str:
        return f"{row[name]:.3f}" if name in row else "-"

    memory = f"{row['peak_gib']} GiB" if row.get("peak_gib") is not None else "not measured"
    where = " offloaded" if row["offload"] else ""
    if "error" in row:
        return f"{row['model']}{where} {row['size']}: {row['error']}"
    return (
        f"{row['model']}{where} {row['size']}: load {row['load_s']:.1f} s; peak {memory}; a chunk: "
        f"generate {seconds('generate_s')}, cache {seconds('cache_s')}, decode "
        f"{seconds('decode_s')} s; {row['fps']:.1f} frames/s, with decode "
        f"{row.get('fps_with_decode', float('nan')):.1f}"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        models, sizes, offloads = check(args)
        rows: list[dict[str, Any]] = []
        for name in models:
            for offload in offloads:
                try:
                    made = measure(args, name, sizes, offload)
                except torch.OutOfMemoryError as error:  # before anything was streamed
                    line = str(error).splitlines()[0]
                    made = [{"model": name, "offload": offload, "size": "", "error": line}]
                rows += made
                print("\n".join(map(show, made)), flush=True)
    except UserError as error:
        print(f"measure_wan: {error}", file=sys.stderr)
        return 2
    if any(row.get("no_decode") for row in rows):
        print(f"no decode: {next(r['no_decode'] for r in rows if r.get('no_decode'))}")
    cuda = torch.device(args.device).type == "cuda"
    result = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "dtype": args.dtype,
        "cap_gib": args.cap_gib,
        "weights": str(args.folder or "random"),
        "rows": rows,
    }
    with replace_file(args.out) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
