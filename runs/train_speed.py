"""Where the time of a training update goes, by phase, with parts turned on one after the other.

    python runs/train_speed.py evidence-aad                     # a small world, on a GPU
    python runs/train_speed.py doom-dmd --json out/speed/doom-dmd.json
    python runs/train_speed.py wan1.3b-dmd --updates 1          # 1.3B, two micro-steps a step
    python runs/train_speed.py wan1.3b-aad --updates 1 --no-compile
    python runs/train_speed.py evidence-tiny-aad --device cpu   # to see that it works

The loop, stages and networks are those of `aad1 train PRESET`; weights are random, and so are clips
and prompts' embeddings, but for the drawn world, which draws its own. One process. Variants:

    plain      blocks as they are written, optimisers in lists of tensors
    fused      optimisers in one kernel (what a run has on CUDA)
    cudnn      besides, cuDNN's attention (--cudnn-attention)
    compiled   besides, blocks compiled (--compile); left out on the CPU unless asked for

A phase's milliseconds are those of the device between the phase's first and last kernel, gaps in
which it waits for the host included, and without those of phases within; "host" is how long
the host was busy with it. Nothing is synchronised inside an update. One further update is profiled
(not with --no-profile): kernels, waits of the host for the device, copies from pageable memory,
busy time, top kernels. Work is counted by the formulas of aad1/train/work.py (a multiplication and
an addition each; recomputation of checkpointed blocks included, elementwise operations not). Needs
torch, numpy, safetensors, pillow and pyyaml only.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from random_run import RandomSetup
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from aad1.errors import UserError
from aad1.presets import preset
from aad1.train.adam import AdamW
from aad1.train.blocks import compile_blocks, plain_blocks
from aad1.train.config import Experiment
from aad1.train.log import SilentLog
from aad1.train.loop import Trainer
from aad1.train.run import Run
from aad1.train.work import work_by_phase

GIB = 2**30


# -- phases ---------------------------------------------------------------------------------------


class Phases:
    """Milliseconds of phases on the device and on the host, each without the phases within it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.names = device.type == "cuda", ["rest"]
        self._marks: list[tuple[str, float, Any]] = []
        self.role = ""

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True) if self.cuda else None
        if event is not None:
            event.record()
        self._marks.append((self.names[-1], time.perf_counter(), event))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._mark()
        self.names.append(name)
        try:
            yield
        finally:
            self._mark()
            self.names.pop()

    def take(self) -> dict[str, list[float]]:
        """name: [device, host] since the last call."""
        self._mark()
        if self.cuda:
            torch.cuda.synchronize()
        out: dict[str, list[float]] = {}
        for (_, t, e), (name, u, f) in zip(self._marks, self._marks[1:], strict=False):
            both, host = out.setdefault(name, [0.0, 0.0]), 1e3 * (u - t)
            both[0] += e.elapsed_time(f) if self.cuda else host
            both[1] += host
        self._marks = []
        self._mark()
        return out

    def around(self, owner: Any, attribute: str, name: Callable[[], str]) -> None:
        """Have calls of a method count as a phase."""
        plain = getattr(owner, attribute)

        def timed(*args: Any, **more: Any) -> Any:
            with self.phase(name()):
                return plain(*args, **more)

        setattr(owner, attribute, timed)

    def watch(self, t: Trainer) -> None:
        """Name the parts of a trainer's update."""
        stage: Any = t.stage
        self.around(t.reader, "batch", lambda: "data")
        self.around(t.reader, "announce", lambda: "data")
        if hasattr(stage, "self_rollout"):
            self.around(stage.self_rollout, "run", lambda: "rollout")
        for owner in (stage, getattr(stage, "score", None)):
            if hasattr(owner, "direction"):
                self.around(owner, "direction", lambda: "generator: judged")
        self.around(t, "_backward", lambda: f"{self.role}: backward")
        self.around(t.averages, "update", lambda: "average")
        for optimizer in (o for each in t.optimizers.values() for o in each):
            self.around(optimizer, "step", lambda: "optimizer")
        optimise, losses = t._optimise, t._losses

        def of_role(role: str, index: int) -> Any:
            self.role = role
            return optimise(role, index)

        def in_parts(*args: Any) -> Iterator[Any]:
            parts = losses(*args)
            while True:
                with self.phase(f"{self.role}: forward"):
                    part = next(parts, None)
                if part is None:
                    return
                yield part

        t._optimise, t._losses = of_role, in_parts  # type: ignore[method-assign]


# -- one variant ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What is turned on."""

    fused: bool = False
    cudnn: bool = False
    compiled: bool = False


VARIANTS = {
    "plain": Variant(),
    "fused": Variant(fused=True),
    "cudnn": Variant(fused=True, cudnn=True),
    "compiled": Variant(fused=True, cudnn=True, compiled=True),
}


@dataclass
class Result:
    """Of one variant; milliseconds of one update."""

    update_ms: float
    phases: dict[str, list[float]]
    flops: dict[str, float]
    """Operations by phase."""
    clips: int
    tokens: int
    warm_up_s: float
    peak_gib: float | None
    counts: dict[str, float] = field(default_factory=dict)
    top: list[tuple[str, float, int]] = field(default_factory=list)

    @property
    def tflops(self) -> float:
        return sum(self.flops.values()) / self.update_ms / 1e9


def measure(e: Experiment, variant: Variant, updates: int, warm_up: int, profiling: bool) -> Result:
    """Build, warm up, time and, if asked for, profile."""
    torch.manual_seed(e.seed)
    plain_blocks()
    if variant.compiled:
        compile_blocks()
    run = Run(replace(e, compile=False, cudnn_attention=variant.cudnn), RandomSetup)
    t, setup = run.trainer(SilentLog(e.folder, e.name, updates)), run.setup
    assert isinstance(setup, RandomSetup)
    t.critic_warmup = 0
    for optimizer in (o for each in t.optimizers.values() for o in each):
        if isinstance(optimizer, AdamW):
            optimizer.fused = variant.fused
        for group in optimizer.param_groups if isinstance(optimizer, torch.optim.AdamW) else ():
            group |= {"fused": variant.fused, "foreach": not variant.fused}
    phases = Phases(setup.device)
    phases.watch(t)
    with t.reader:
        began = time.perf_counter()
        for _ in range(warm_up):
            t.step()
        phases.take()
        warm_up_s = time.perf_counter() - began
        if phases.cuda:
            torch.cuda.reset_peak_memory_stats()
        began, position = time.perf_counter(), t.position
        for _ in range(updates):
            t.step()
        found = {n: [x / updates for x in v] for n, v in phases.take().items()}
        seconds, clips = time.perf_counter() - began, (t.position - position) // updates
        clip = setup.clip()
        result = Result(
            1e3 * seconds / updates, found, arithmetic(e, setup), clips,
            clips * clip.frames * clip.tokens, warm_up_s,
            torch.cuda.max_memory_allocated() / GIB if phases.cuda else None,
        )  # fmt: skip
        if profiling:
            profiled(t, phases, result)
    return result


def arithmetic(e: Experiment, setup: RandomSetup) -> dict[str, float]:
    """Operations of an update by phase (`aad1.train.work`)."""
    model = setup.generator.config
    generator, critic = work_by_phase(e, model, model, setup.clip())
    updates, clips = getattr(e.stage, "critic_updates", 0), e.optim.batch * e.optim.accumulate
    if hasattr(e.stage, "score"):
        updates = e.stage.score.critic_updates
    total = {n: clips * generator.get(n, 0.0) for n in [*generator, *critic]}
    return {n: total[n] + clips * updates * critic.get(n, 0.0) for n in total}


NAMED = ("Optimizer.", "ProfilerStep", "Torch-Compiled")
"""What torch names spans of time by, on the device too: no kernels."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def profiled(t: Trainer, phases: Phases, result: Result) -> None:
    """One more update under torch's profiler."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * phases.cuda
    with profile(activities=activities) as profiler:
        t.step()
        phases.take()
    kernels: dict[str, list[float]] = {}
    counts = dict.fromkeys(
        ("kernels", "launches", "graphs", "host waits", "pageable copies", "busy ms"), 0.0
    )
    for event in profiler.events():
        name = event.name
        if getattr(event, "is_user_annotation", False) or name.startswith(NAMED):
            continue
        if event.device_type == DeviceType.CUDA:
            if name.startswith("Memcpy"):
                counts["pageable copies"] += "Pageable" in name
            elif not name.startswith("Memset"):
                milliseconds = event.time_range.elapsed_us() / 1e3
                counts["kernels"] += 1
                counts["busy ms"] += milliseconds
                one = kernels.setdefault(name, [0.0, 0])
                one[0] += milliseconds
                one[1] += 1
            continue
        counts["launches"] += "LaunchKernel" in name
        counts["graphs"] += name == "cudaGraphLaunch"
        counts["host waits"] += name in WAITS
        if not phases.cuda and name.startswith("aten::"):
            counts["kernels"] += 1
            one = kernels.setdefault(name, [0.0, 0])
            one[0] += event.self_cpu_time_total / 1e3
            one[1] += 1
    most = sorted(kernels.items(), key=lambda item: -item[1][0])
    result.counts, result.top = counts, [(n, ms, int(k)) for n, (ms, k) in most]


# -- in words -------------------------------------------------------------------------------------


def table(results: dict[str, Result], top: int, cuda: bool) -> str:
    """One column a variant."""
    names = list(dict.fromkeys(n for r in results.values() for n in r.phases))
    names.sort(key=lambda n: -max(r.phases.get(n, [0.0])[0] for r in results.values()))
    lines = [_row("ms per update (host; TFLOP/s)", list(results))]
    for name in names:
        cells = []
        for r in results.values():
            ms, host = r.phases.get(name, (0.0, 0.0))
            rate = f"; {r.flops[name] / ms / 1e9:.3g}" if r.flops.get(name) and ms else ""
            cells.append(f"{ms:.4g} ({host:.4g}{rate})")
        lines.append(_row("  " + name, cells))

    def counted(r: Result, name: str) -> str:
        return f"{r.counts[name]:.4g}" if r.counts else "not profiled"

    figures: dict[str, Callable[[Result], str]] = {
        "update, ms": lambda r: f"{r.update_ms:.4g}",
        "TFLOP per update": lambda r: f"{sum(r.flops.values()) / 1e12:.4g}",
        "TFLOP/s": lambda r: f"{r.tflops:.4g}",
        "clips/s": lambda r: f"{1e3 * r.clips / r.update_ms:.4g}",
        "tokens/s": lambda r: f"{1e3 * r.tokens / r.update_ms:.4g}",
        "peak GiB": lambda r: "not measured" if r.peak_gib is None else f"{r.peak_gib:.2f}",
        "warm-up, s": lambda r: f"{r.warm_up_s:.3g}",
        "kernels" if cuda else "operations": lambda r: counted(r, "kernels"),
    }
    if cuda:
        figures |= {
            "launches + graphs": lambda r: f"{counted(r, 'launches')} + {counted(r, 'graphs')}",
            "host waits": lambda r: counted(r, "host waits"),
            "pageable copies": lambda r: counted(r, "pageable copies"),
            "kernels' time, ms": lambda r: counted(r, "busy ms"),
        }
    lines += [_row(name, [tell(r) for r in results.values()]) for name, tell in figures.items()]
    for name, r in results.items():
        if not r.counts:
            continue
        lines += ["", f"{name}, most time in:"]
        lines += [f"  {ms:9.2f} ms {count:6d}x  {kernel[:80]}" for kernel, ms, count in r.top[:top]]
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:32}" + "".join(f"{cell:>28}" for cell in cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("preset")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="updates before them (default 1)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=None)
    parser.add_argument("--batch", type=int, help="clips of a micro-step (default: the preset's)")
    parser.add_argument("--micro-steps", type=int, default=2, help="of a step, at most (default 2)")
    parser.add_argument("--critic-updates", type=int, help="per update (default: the preset's)")
    parser.add_argument("--no-profile", action="store_true", help="leave out the profiled update")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--top", type=int, default=12, help="kernels to name (default 12)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    try:
        if min(args.updates, args.warm_up, args.micro_steps) < 1:
            raise UserError("--updates, --warm-up and --micro-steps must be at least 1")
        e = preset(args.preset)
        optim = replace(
            e.optim, batch=e.optim.batch if args.batch is None else args.batch,
            accumulate=min(e.optim.accumulate, args.micro_steps),
        )  # fmt: skip
        e = replace(e, optim=optim, device=args.device)
        if args.critic_updates is not None:
            if not hasattr(e.stage, "critic_updates"):
                raise UserError(f"{e.name} has no critic: leave out --critic-updates")
            e = replace(e, stage=replace(e.stage, critic_updates=args.critic_updates))
        cuda = args.device != "cpu" and torch.cuda.is_available()
        chosen = args.variants or [n for n in VARIANTS if cuda or not VARIANTS[n].cudnn]
        if args.compile and "compiled" not in chosen:
            chosen.append("compiled")
        if args.compile is False:
            chosen = [n for n in chosen if not VARIANTS[n].compiled]
        where = torch.cuda.get_device_name() if cuda else "cpu"
        head = {"preset": e.name, "device": where, "torch": torch.__version__,
                "batch": e.optim.batch, "micro-steps": e.optim.accumulate,
                "updates": args.updates}  # fmt: skip
        print(", ".join(f"{k} {v}" for k, v in head.items()), flush=True)
        results: dict[str, Result] = {}
        for name in chosen:
            try:
                results[name] = measure(
                    e, VARIANTS[name], args.updates, args.warm_up, not args.no_profile
                )
            except UserError:
                raise
            except Exception as error:  # out of memory, a compiler that fails: the rest is told
                said = (str(error).splitlines() or [""])[0]
                print(f"{name}: {type(error).__name__}: {said}", flush=True)
                continue
            finally:
                plain_blocks()
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
            told = results[name]
            print(
                f"{name}: {told.update_ms:.4g} ms an update, {told.tflops:.3g} TFLOP/s", flush=True
            )
            if args.json:  # what is there is kept, whatever comes next
                args.json.parent.mkdir(parents=True, exist_ok=True)
                rows = {n: vars(r) | {"top": r.top[: args.top], "tflops": r.tflops}
                        for n, r in results.items()}  # fmt: skip
                args.json.write_text(json.dumps(head | {"variants": rows}, indent=1) + "\n")
        print(table(results, args.top, cuda))
    except UserError as error:
        print(f"train_speed: {error}", file=sys.stderr)
        return 2
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
