"""`aad1 serve`: a page where video is watched, steered and recorded while it is made."""

from __future__ import annotations

import contextlib
import math
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from aad1.errors import UserError
from aad1.flags import check_size, pair_loras, parse_size

if TYPE_CHECKING:
    from fastapi import FastAPI

NEEDED = ("fastapi", "uvicorn", "websockets", "python_multipart", "httpx")


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Watch, steer and record live video in the browser.

    Example: aad1 serve --model doom, then open http://127.0.0.1:8000
    """

    model: str = "doom"
    """Packaged name, folder, hub id, or a generator made from Wan 2.1 (see `aad1 generate`)."""
    base: str | None = None
    """Wan 2.1's folder, for the parts that a generator by itself lacks."""
    recipe: str | None = None
    """How a generator made elsewhere is rolled out."""
    steps: int | None = None
    """Network passes per chunk, 1, 2 or 4, if not the model's own number."""
    weights: str = ""
    """Which weights of a .pt that holds several; the moving average by default."""
    lora: tuple[Path, ...] = ()
    """LoRA files to merge into the transformer, in this order."""
    lora_scale: tuple[float, ...] = ()
    """One scale per LoRA; 1 by default."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels, such as 480x832; the model's own if left out."""
    text_cache: Path | None = None
    """Folder that keeps encoded prompts."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision; auto is bfloat16 for Wan's networks on cuda and float32 otherwise."""
    threads: int = 0
    """CPU threads of the network; 0 takes all cores but one, which is left to the server and to the
    browser: networks that share their last core with them become slow and uneven."""
    plain: bool = False
    """Without the fast path, which is on by default on cuda and cpu."""
    fp8: bool = False
    """The blocks' matrices in float8: faster on GPUs that can, and not quite the same video."""
    without: str = ""
    """Parts of the fast path to leave out, such as compile,cudnn; see `aad1 bench --help`."""
    decoder: Path | None = None
    """A tiny decoder's file (TAEHV layout, taew2_1) for models with Wan's latents: sooner and
    softer."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines can reach needs --token."""
    port: int = 8000
    """0 picks a free one."""
    token: str | None = None
    """What clients must show; the page takes it as ?token=..."""
    max_sessions: int = 4
    """Sessions at once; the next client is told that the server is busy."""
    format: Literal["jpeg", "webp"] = "jpeg"
    """Of the frames on the wire."""
    quality: int = 85
    """Of JPEG or WebP, 1 to 100."""
    max_image_mb: float = 8.0
    """Largest picture that is taken, in 10^6 bytes."""
    max_recording: float = 600.0
    """Longest recording, in seconds."""
    max_idle: float = 15.0
    """Minutes without a running video and without a command after which a session ends."""
    open: bool = False
    """Open the page in this machine's browser."""
    selftest: bool = False
    """Connect to the server from this process, drive ten chunks, check them, and stop."""


def serve(args: Serve) -> None:
    """Serve until Ctrl-C. UserError before the port is open for anything that cannot work."""
    from aad1.serve.run import address, bind, is_loopback, is_one, uvicorn_server

    _check_packages()
    if args.token is not None and len(args.token) < 8:
        raise UserError(f"--token must have at least 8 characters, got {len(args.token)}")
    if not is_loopback(args.host) and args.token is None:
        raise UserError(f"--host {args.host} can be reached from elsewhere: it needs --token")
    if args.selftest:
        _selftest(args)
        return
    with bind(args.host, args.port) as sock:
        app = _app(args)
        server = uvicorn_server(app)
        url = address(sock) + (f"/?token={quote(args.token, safe='')}" if args.token else "")
        where = "" if is_one(args.host) else "on all addresses of this machine; "
        print(f"aad1 live: {url}  ({where}Ctrl-C stops)", flush=True)
        if args.open:
            _open_browser(url)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has shut down; that is how to stop
            server.run(sockets=[sock])
    if app.state.hub.failed:
        raise SystemExit(1)  # the reason is on stderr already


def _check_packages() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"aad1 serve needs {', '.join(missing)}: pip install 'aad1[serve]'")


def _app(args: Serve, token: bool = True) -> FastAPI:
    import torch

    from aad1.device import pick_device
    from aad1.fast.config import asked_config
    from aad1.model_info import read_info
    from aad1.model_names import find_model
    from aad1.pipeline import Pipeline
    from aad1.serve.engine import packer
    from aad1.serve.facts import read_facts
    from aad1.serve.guard import Limits
    from aad1.serve.model import PipelineModel
    from aad1.serve.server import create_app
    from aad1.wan_folder import UNIT, WORLD, find_wan, is_wan

    for flag, value in (
        ("--max-image-mb", args.max_image_mb), ("--max-recording", args.max_recording),
        ("--max-idle", args.max_idle),
    ):  # fmt: skip
        if not 0 < value < math.inf:
            raise UserError(f"{flag} must be a finite number above 0, got {value}")
    limits = Limits(
        sessions=args.max_sessions, image_bytes=round(args.max_image_mb * 1e6),
        recording_seconds=args.max_recording, idle_seconds=60 * args.max_idle,
    )  # fmt: skip
    pack = packer(args.format, args.quality)
    if args.threads < 0:
        raise UserError(f"--threads must be at least 0, got {args.threads}")
    loras, size = pair_loras(args.lora, args.lora_scale), parse_size(args.size)
    folder = find_model(args.model)
    wan = is_wan(folder)
    # What is wrong is told now, not when all weights have been read.
    if wan and size is not None:
        check_size(size, (UNIT, UNIT))
    if wan:
        base = None if args.base is None else find_model(args.base)
        _, info = find_wan(
            folder, base=base, recipe=args.recipe, steps=args.steps, weights=args.weights
        )
    else:
        info = read_info(folder)
    info.check_streams()
    device = pick_device(args.device)
    if args.threads or device.type == "cpu":
        torch.set_num_threads(args.threads or max(1, torch.get_num_threads() - 1))
    large = wan or info.world == WORLD
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and large and device.type == "cuda")
    pipeline = Pipeline.from_pretrained(
        folder, device=device, dtype=torch.bfloat16 if half else torch.float32, base=args.base,
        recipe=args.recipe, text_cache=args.text_cache, steps=args.steps, weights=args.weights,
        loras=loras, decoder=args.decoder, fast=False,
    )  # fmt: skip
    width, height = pipeline.check_size(size)
    pipeline.info = replace(pipeline.info, width=width, height=height)
    fast = asked_config(
        device, pipeline.transformer.config.width, plain=args.plain, fp8=args.fp8,
        without=args.without,
    )  # fmt: skip
    if fast is not None:
        pipeline.speed_up(fast)
    facts = read_facts(Path(args.model).name, pipeline)
    return create_app(
        PipelineModel(pipeline), facts, limits, token=args.token if token else None, pack=pack
    )


def _open_browser(url: str) -> None:
    import webbrowser

    if not webbrowser.open(url):
        print(f"aad1: no browser was found; open {url} in one", file=sys.stderr)


def _selftest(args: Serve) -> None:
    from aad1.serve.selftest import selftest

    app = _app(args, token=False)
    prompts = list(dict.fromkeys(app.state.hub.facts.samples.values())) or ["a cat", "a dog"]
    for line in selftest(app, (prompts[0], prompts[-1])):
        print(line)
