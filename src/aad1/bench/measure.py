"""Timing one way to run: each stage on the device's own clock, and the whole on the wall's."""

from __future__ import annotations

import copy
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol

import torch

from aad1.bench import kernels
from aad1.bench.subject import Subject
from aad1.fast.config import FastConfig
from aad1.fast.handover import Handover
from aad1.fast.rollout import FastRollout
from aad1.models.codec import DecoderStream
from aad1.rollout.stream import Noise, Rollout, State, seeded_noise

COMPARED = 4  # chunks whose latents are compared between ways to run
STARTS = 5  # videos begun to measure a beginning


class Clock:
    """Spans by name. On CUDA they are events, read when all is done: no wait in between."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._spans.setdefault(name, []).append((begin, self._now()))

    def milliseconds(self) -> dict[str, list[float]]:
        if not self._cuda:
            return {n: [1000 * (b - a) for a, b in s] for n, s in self._spans.items()}
        torch.cuda.synchronize()
        return {n: [a.elapsed_time(b) for a, b in s] for n, s in self._spans.items()}


class Video(Protocol):
    """One video in the making, as both paths make it."""

    def begin(self, image: torch.Tensor, text: torch.Tensor) -> None: ...
    def generate(self, text: torch.Tensor, noise: Noise) -> torch.Tensor: ...
    def commit(self, x0: torch.Tensor, text: torch.Tensor) -> None: ...


class PlainVideo:
    """The untuned path: aad1.rollout.stream.Rollout."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout

    def begin(self, image: torch.Tensor, text: torch.Tensor) -> None:
        self._state: State = self._rollout.prefill(image, text)

    def generate(self, text: torch.Tensor, noise: Noise) -> torch.Tensor:
        return self._rollout.generate(self._state, text, noise).x0

    def commit(self, x0: torch.Tensor, text: torch.Tensor) -> None:
        self._state = self._rollout.commit(self._state, x0, text)


class FastVideo:
    """The fast path, in one session that each video begins anew."""

    def __init__(self, rollout: FastRollout, height: int, width: int) -> None:
        self._session = rollout.session(1, height, width)

    def begin(self, image: torch.Tensor, text: torch.Tensor) -> None:
        self._session.restart()
        self._session.prefill(image, text)

    def generate(self, text: torch.Tensor, noise: Noise) -> torch.Tensor:
        return self._session.generate(text, noise)

    def commit(self, x0: torch.Tensor, text: torch.Tensor) -> None:
        self._session.commit(x0, text)


@torch.inference_mode()
def measure(
    subject: Subject,
    fast: FastConfig | None,
    *,
    chunks: int,
    seed: int,
    decode: bool,
    profile: bool = False,
) -> tuple[dict[str, Any], torch.Tensor]:
    """Figures of one way to run (None: the untuned path) in the steady state, the window full.

    profile: also the kernels of one chunk. Returns the figures, and the first latents, float32 on
    the CPU, to be compared with those of another way.
    """
    device = _fresh(subject)
    _, height, width = subject.latent_shape
    began = time.perf_counter()
    video: Video
    if fast is None:
        video = PlainVideo(Rollout(subject.model, subject.geometry, subject.sigmas))
    else:
        rollout = FastRollout(subject.model, subject.geometry, subject.sigmas, fast)
        video = FastVideo(rollout, height, width)
    decoder = _decoder(subject, fast) if decode else None
    early = fast is not None and fast.early
    player = Player(subject, video, decoder, seed, early)
    filling = _filling(subject)
    clip, _ = player.play(filling, Clock(device))
    warm_up = time.perf_counter() - began
    starts = Clock(device)
    first = [player.play(1, starts)[1][0] for _ in range(STARTS)]
    clock = Clock(device)
    _, arrivals = player.play(filling + chunks, clock)
    steady = {name: values[filling:] for name, values in clock.milliseconds().items()}
    steady["chunk"] = [1000 * (b - a) for a, b in pairwise(arrivals[filling - 1 :])]
    begin = starts.milliseconds()
    spans = {
        **_text_times(subject),
        **{name: begin[name] for name in ("image encode", "prefill")},
        **{name: values for name, values in steady.items() if values},
    }
    stages = {name: _statistics(values) for name, values in spans.items()}
    frames = subject.geometry.chunk * subject.temporal_stride
    dit = stages["generate pass"]["median"] + stages["cache pass"]["median"]
    figures = {
        "stages": stages,
        "dit_ms": dit,
        "dit_fps": 1000 * frames / dit,
        "fps": 1000 * frames / stages["chunk"]["median"],
        "first_pixels_ms": 1000 * statistics.median(first),
        "warm_up_s": warm_up,
        "peak_memory_gib": _peak_gib(device),
    }
    if profile:
        figures["kernels"] = player.kernels(filling)
    return figures, clip


@torch.inference_mode()
def measure_merged(
    subject: Subject, fast: FastConfig, *, chunks: int, seed: int
) -> tuple[dict[str, Any], torch.Tensor]:
    """As `measure`, of `FastRollout.merged`: one pass per chunk, no decode, for offline use."""
    device = _fresh(subject)
    began = time.perf_counter()
    rollout = FastRollout(subject.model, subject.geometry, subject.sigmas, fast)
    noise = seeded_noise([seed], subject.geometry, subject.latent_shape, device)
    image = subject.encode(picture(subject).to(device))
    filling = _filling(subject)

    def play(count: int) -> tuple[torch.Tensor, list[float]]:
        kept: list[torch.Tensor] = []
        times: list[float] = []
        for x0 in rollout.merged(image, lambda i: subject.rows, noise, count):
            _wait(device)
            times.append(time.perf_counter())
            if len(kept) < COMPARED:
                kept.append(x0.float().cpu())
        return torch.cat(kept, 2), times

    clip, _ = play(filling)
    warm_up = time.perf_counter() - began
    _, times = play(filling + chunks)
    spans = [1000 * (b - a) for a, b in pairwise(times[filling - 1 :])]
    median = statistics.median(spans)
    figures = {
        "stages": {"merged pass": _statistics(spans)},
        "dit_ms": median,
        "dit_fps": 1000 * subject.geometry.chunk * subject.temporal_stride / median,
        "warm_up_s": warm_up,
        "peak_memory_gib": _peak_gib(device),
    }
    return figures, clip


class Player:
    """Makes videos of one way to run, from a picture to frames in host memory."""

    def __init__(
        self,
        subject: Subject,
        video: Video,
        decoder: Callable[[], DecoderStream] | None,
        seed: int,
        early: bool,
    ) -> None:
        self.subject, self.video, self.decoder, self.early = subject, video, decoder, early
        self.device = subject.model.device
        self.noise = seeded_noise([seed], subject.geometry, subject.latent_shape, self.device)
        self.picture = picture(subject)

    def play(self, chunks: int, clock: Clock) -> tuple[torch.Tensor, list[float]]:
        """A new video. Returns its first latents, and when the frames of each chunk were at hand,
        in seconds after the picture was."""
        _wait(self.device)
        began = time.perf_counter()
        rows = self.subject.rows
        with clock.span("image encode"):
            image = self.subject.encode(self.picture.to(self.device))
        with clock.span("prefill"):
            self.video.begin(image, rows)
        decoder = None if self.decoder is None else self.decoder()
        before = [image]
        kept: list[torch.Tensor] = []
        arrivals: list[float] = []
        for _ in range(chunks):
            with clock.span("generate pass"):
                x0 = self.video.generate(rows, self.noise)
            if len(kept) < COMPARED:
                kept.append(x0)
            sent = Handover(self.device)
            if decoder is not None:
                with clock.span("decode"):
                    sent.begin()
                    frames = decoder.decode(torch.cat([*before, x0], 2))
                with clock.span("hand-over"):
                    if self.early:
                        sent.send(frames)
                    else:
                        frames.cpu()
            before = []
            arrived = time.perf_counter() - began  # if the frames were waited for
            with clock.span("cache pass"):
                self.video.commit(x0, rows)
            if decoder is None:
                _wait(self.device)
            elif self.early:
                sent.wait()
            if decoder is None or self.early:
                arrived = time.perf_counter() - began
            arrivals.append(arrived)
        return torch.cat([x.float().cpu() for x in kept], 2), arrivals

    def kernels(self, filling: int) -> dict[str, Any]:
        """Kernels of one chunk's passes, and of its decode, after `filling` chunks (CUDA only)."""
        self.play(filling, Clock(self.device))
        rows, x0 = self.subject.rows, self.subject.encode(self.picture.to(self.device))
        first = x0

        def passes() -> None:
            nonlocal x0
            x0 = self.video.generate(rows, self.noise)
            self.video.commit(x0, rows)

        found = {"generate + cache": kernels.profiled(passes)}
        if self.decoder is not None:
            stream = self.decoder()
            stream.decode(torch.cat([first, x0], 2))
            found["decode"] = kernels.profiled(lambda: stream.decode(x0))
        return found


def picture(subject: Subject) -> torch.Tensor:
    """uint8 [1, 1, H, W, 3], the same each time."""
    width, height = subject.size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 1, height, width, 3), dtype=torch.uint8, generator=generator)


@torch.inference_mode()
def decode_errors(
    subject: Subject, fast: FastConfig, seed: int, frames: int = 5
) -> dict[str, float]:
    """Relative error of the plain and the fast decode against one in float32, on noise latents."""
    assert subject.fast_vae is not None
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = subject.latent_shape
    latents = torch.randn(1, channels, frames, height, width, generator=generator)
    latents = latents.to(subject.model.device)
    exact = copy.deepcopy(subject.fast_vae).float()
    fast_decoder = _decoder(subject, fast)
    streams = dict(exact=exact.stream(), plain=subject.plain_decoder(), fast=fast_decoder())
    videos = {n: s.decode(latents).float() - 127.5 for n, s in streams.items()}
    size = videos["exact"].norm()
    return {n: float((videos[n] - videos["exact"]).norm() / size) for n in ("plain", "fast")}


def _decoder(subject: Subject, fast: FastConfig | None) -> Callable[[], DecoderStream]:
    if fast is not None and subject.tiny_decoder is not None:
        return subject.tiny_decoder.prepare(fast.compile_decoder).stream
    if fast is not None and fast.half_decoder and subject.half_decoder is not None:
        return subject.half_decoder
    if fast is None or not fast.decoder or subject.fast_vae is None:
        return subject.plain_decoder
    vae = copy.deepcopy(subject.fast_vae)
    return vae.prepare(True, fast.compile_decoder, fast.triton).stream


def _filling(subject: Subject) -> int:
    """Chunks until the window is full and every phase of the ring has come once."""
    return -(-2 * subject.geometry.window // subject.geometry.chunk) + 1


def _text_times(subject: Subject) -> dict[str, list[float]]:
    if subject.encode_text is None:
        return {}
    spans = []
    for _ in range(STARTS):
        begin = time.perf_counter()
        subject.encode_text()
        _wait(subject.model.device)
        spans.append(1000 * (time.perf_counter() - begin))
    return {"text": spans}


def _fresh(subject: Subject) -> torch.device:
    device = subject.model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return device


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_gib(device: torch.device) -> float:
    """Memory on the GPU; on the CPU the largest that the process ever had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _statistics(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p90": ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))],
    }
