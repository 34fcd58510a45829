"""Training at full size with random weights: time, memory, and two GPUs against one.

    python runs/scale_check.py one                                   # 1.3B, stages I to III
    torchrun --nproc-per-node 2 runs/scale_check.py two              # cp=2 and dp=2 against one
    torchrun --nproc-per-node 2 runs/scale_check.py one --mesh cp=2  # time and memory of two
    torchrun --nproc-per-node 2 runs/scale_check.py one --stages aad --critic 14b --mesh cp=2 \\
        --graph single --average-on-cpu --moments-on-cpu --block-by-block --updates 1

`one`: micro-steps of each stage on 21 latent frames at 832x480: seconds by phase, peak memory
beside what the dry run says. `two`: losses, gradient norms and weight changes of the same global
batch on one GPU, dp=2 and cp=2, then a checkpoint saved by two and loaded by one. Each stage's
result is printed as soon as it is there, and added to the JSON of --out; a stage that fails, for
want of memory for example, says so, and one process then tries the next stage. --tiny runs on a
CPU, to see that the script itself works. Needs torch, numpy, safetensors, pillow and pyyaml only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from aad1.models.discriminator import Discriminator, DiscriminatorConfig
from aad1.models.dit import WanConfig, WanTransformer
from aad1.parallel import mesh
from aad1.parallel.shard import distribute, local, whole
from aad1.presets.wan import LARGE, SMALL, experiments
from aad1.rollout.stream import Rollout
from aad1.stages import adversarial, dmd_warmup
from aad1.stages.base import Batch, Conditioner
from aad1.stages.ode_init import OdeInit
from aad1.train import checkpoint
from aad1.train.blocks import checkpoint_blocks
from aad1.train.config import Experiment
from aad1.train.loop import Trainer
from aad1.train.plan import Cluster, plan

TINY = WanConfig(
    num_attention_heads=4, attention_head_dim=12, ffn_dim=96, num_layers=3, text_dim=32
)
GIB = 2**30


class Noise:
    """Clips of noise, one seed each; read ahead as clips on a disk are."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.device = shape, device

    def batch(self, position: int, count: int) -> Batch:
        return self.read(position, count).to(self.device)

    def read(self, position: int, count: int) -> Batch:
        rows = []
        for n in range(position, position + count):
            generator = torch.Generator().manual_seed(n)
            rows.append(torch.randn((2, *self.shape), generator=generator))
        states = torch.stack(rows)
        return Batch(states[:, -1], [["a prompt"]] * count, states)


def build(config: WanConfig, seed: int, where: mesh.Processes, device: torch.device) -> Any:
    """A network of random weights; sharded before it has any where there are several processes."""
    with torch.device("meta" if where.size > 1 else device):
        return WanTransformer(config)


def fill(module: nn.Module, seed: int, where: mesh.Processes, device: torch.device) -> None:
    """Share out, and give each weight random values of its own seed."""
    distribute(module, where)
    if where.size > 1:
        module.to_empty(device=device)
    with torch.no_grad():
        for n, (name, p) in enumerate(module.named_parameters()):
            generator = torch.Generator(device=device).manual_seed(1000 * seed + n)
            full = torch.randn(p.shape, generator=generator, device=device)
            value = full * 0.02 + float("norm" in name and name.endswith("weight"))
            if hasattr(p, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
            local(p).copy_(local(value))


def make(e: Experiment, student: WanConfig, critic: WanConfig, where: mesh.Processes,
         device: torch.device, text_rows: int, size: tuple[int, int, int]) -> Trainer:  # fmt: skip
    """The trainer of one stage, as a run would build it but for the weights."""
    where = replace(where, gather_bf16=e.gather_bf16)
    rows = torch.randn(1, text_rows, student.text_dim, generator=torch.Generator().manual_seed(1))
    rows = rows.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    conditioner = Conditioner(lambda prompts: rows.expand(len(prompts), -1, -1), e.geometry)
    generator = build(student, 1, where, device)
    modules: dict[str, nn.Module] = {"generator": generator}
    rollout = Rollout(generator, e.geometry, e.sigmas)
    stage: Any
    if e.name.endswith("ode"):
        stage = OdeInit(generator, conditioner, e.geometry, e.sigmas, e.stage)  # type: ignore[arg-type]
    elif e.name.endswith("dmd"):
        real, fake = build(critic, 2, where, device), build(critic, 3, where, device)
        if device.type == "cuda":
            real.cast(torch.bfloat16)
        fill(real.requires_grad_(False), 2, where, device)
        modules["fake_score"] = fake
        stage = dmd_warmup.DmdWarmup(rollout, real, fake, conditioner, e.stage)  # type: ignore[arg-type]
    else:
        with torch.device("meta" if where.size > 1 else device):
            modules["discriminator"] = judge = Discriminator(
                WanTransformer(critic), e.discriminator, e.geometry
            )
        config = e.stage.settled(e.checkpoint_blocks)  # type: ignore[union-attr]
        stage = adversarial.Adversarial(rollout, judge, conditioner, config)
    for n, module in enumerate(modules.values()):
        fill(module, 1 + 2 * n, where, device)
    trainer = Trainer(
        stage, Noise((16, *size), device), modules, ("generator",), e.optim, seed=0, device=device,
        bf16=device.type == "cuda", processes=where, keep_gathered=e.keep_gathered,
        average_on_cpu=e.average_on_cpu, moments_on_cpu=e.moments_on_cpu,
        cudnn_attention=e.cudnn_attention,
    )  # fmt: skip
    if e.checkpoint_blocks:
        for module in modules.values():
            checkpoint_blocks(module)
    return trainer


# -- one: time and memory -------------------------------------------------------------------------


class Clock:
    """Seconds and peak memory of named phases."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = self._now()
        yield
        self.seconds.setdefault(name, []).append(self._now() - began)

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **more: Any) -> Any:
            with self.phase(name):
                return call(*args, **more)

        return timed


def measure(
    args: argparse.Namespace, name: str, where: mesh.Processes, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Time and memory of one stage."""
    e, student, critic, size, rows = settings(args, name, 2 * where.shape.dp)
    clock, cuda = Clock(device), device.type == "cuda"
    t = make(e, student, critic, where, device, rows, size)
    states = torch.cuda.memory_allocated() / GIB if cuda else 0.0
    if hasattr(t.stage, "self_rollout"):
        t.stage.self_rollout.run = clock.around("rollout", t.stage.self_rollout.run)
    for part in (dmd_warmup, adversarial):
        part.replay = clock.around("replay, forward", REPLAY)  # type: ignore[attr-defined]
    t._micro = clock.around("micro-step", t._micro)  # type: ignore[method-assign]
    optimise = t._optimise
    report: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}

    def by_role(role: str, index: int) -> Any:
        clock.seconds = {}
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        logs = optimise(role, index)
        for phase, seconds in clock.seconds.items():
            report.setdefault(f"{role}: {phase}", []).extend(seconds)
        if cuda:
            peaks[role] = max(peaks.get(role, 0.0), torch.cuda.max_memory_allocated() / GIB)
        return logs

    t._optimise = by_role  # type: ignore[method-assign]
    watched = t.modules["generator"].patch_embedding.weight  # every process has a part of it
    before = local(watched.detach()).clone()
    for update in range(args.updates):
        began = time.perf_counter()
        logs = t.step() or {}
        if where.main:
            said = " ".join(f"{k} {float(v):.4g}" for k, v in logs.items())
            print(f"{e.name} {update}: {said} ({time.perf_counter() - began:.1f} s)", flush=True)
    t.reader.close()
    line: dict[str, Any] = {
        "stage": e.name,
        "median seconds": {n: round(sorted(v)[len(v) // 2], 3) for n, v in report.items()},
        "weights moved by": float((local(watched.detach()) - before).abs().max()),
    }
    if cuda:
        p = plan(e, Cluster(gpus=where.size), teacher=critic)
        total = sum(role.total for role in p.roles) / where.size + p.copies
        total += max(p.activations.values()) / where.shape.cp
        line |= {"GiB at most": {k: round(v, 2) for k, v in peaks.items()},
                 "GiB before the first step": round(states, 2),
                 "GiB by the dry run": round(total / GIB, 2)}  # fmt: skip
    yield line


REPLAY = adversarial.replay


# -- two: against one -----------------------------------------------------------------------------


def compare(
    args: argparse.Namespace, name: str, where: mesh.Processes, device: torch.device
) -> Iterator[dict[str, Any]]:
    """One stage alone, with dp=2 and with cp=2."""
    e, student, critic, size, rows = settings(args, name, 2)
    student, critic = (
        replace(c, num_layers=min(args.layers, c.num_layers)) for c in (student, critic)
    )
    last = student.num_layers - 1
    e = replace(e, discriminator=DiscriminatorConfig(taps=tuple(range(max(0, last - 2), last + 1))))
    found: dict[str, Any] = {}
    for layout in ("alone", "dp=2", "cp=2"):
        here = mesh.Processes()
        if layout != "alone":
            here = mesh.arrange(mesh.MeshShape.parse(layout, 2), device)
        t = make(e, student, critic, here, device, rows, size)
        start = {n: p.detach().clone() for n, p in t.modules["generator"].named_parameters()}
        began = time.perf_counter()
        logs = [{k: float(v) for k, v in (t.step() or {}).items()} for _ in range(args.updates)]
        seconds = time.perf_counter() - began
        t.reader.close()
        tensors = t.tensors()
        weights = t.modules["generator"].named_parameters()
        moved = torch.cat([whole(p.detach() - start[n]).flatten().cpu() for n, p in weights])
        found[layout] = logs, moved, seconds
        if layout == "dp=2" and name == args.stages[-1]:
            fresh = make(e, student, critic, mesh.Processes(), device, rows, size)
            yield reload(t, tensors, here, fresh)
            del fresh
        del t, tensors, weights
        free(device)
    want, wanted_move, alone = found["alone"]
    for layout in ("dp=2", "cp=2"):
        logs, moved, seconds = found[layout]
        worst = max(
            abs(a[k] - b[k]) / max(abs(b[k]), 1e-6)
            for a, b in zip(logs, want, strict=True)
            for k in b
        )
        yield {
            "stage": e.name, "mesh": layout, "largest relative difference of logs": worst,
            "cosine of weight changes": cosine(moved, wanted_move),
            "logs": logs[0], "logs alone": want[0],
            "seconds": round(seconds, 2), "seconds alone": round(alone, 2),
        }  # fmt: skip


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two long vectors, summed in float64: single precision loses itself over so many."""
    parts = zip(a.split(2**24), b.split(2**24), strict=True)
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in ((x.double(), y.double()) for x, y in parts):
        sums += torch.stack([x @ y, x @ x, y @ y])
    return float(sums[0] / (sums[1] * sums[2]).sqrt())


def reload(
    t: Trainer, tensors: dict[str, torch.Tensor], here: mesh.Processes, again: Trainer
) -> dict[str, Any]:
    """Saved by two, loaded by each process for itself."""
    made = tempfile.mkdtemp(prefix="scale-check-") if here.main else ""
    run = Path(here.gather(made)[0])
    folder = checkpoint.step_folder(run, t.update)
    began = time.perf_counter()
    checkpoint.save(folder, tensors, {"counters": t.counters()}, here)
    seconds = time.perf_counter() - began
    again.restore(
        checkpoint.read_meta(folder)["counters"], checkpoint.shapes(folder),
        lambda wanted: checkpoint.load(folder, wanted),
    )  # fmt: skip
    loaded = again.tensors()
    # All processes take part in putting every tensor together, whatever they have found before.
    apart = [
        n for n, v in tensors.items() if not torch.equal(whole(v).to(loaded[n].device), loaded[n])
    ]
    same = not here.any(bool(apart)) and loaded.keys() == tensors.keys()
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / GIB
    here.barrier()
    if here.main:
        shutil.rmtree(run)
    line = {"saved by 2, loaded by 1": "equal" if same else "NOT EQUAL"}
    return line | {"GiB": round(size, 2), "seconds to save": round(seconds, 2)}


# -- the rest -------------------------------------------------------------------------------------


def settings(args: argparse.Namespace, name: str, micro_steps: int) -> Any:
    """(experiment, student, critic, clip size, text rows) of a stage, cut to a few micro-steps."""
    e = experiments()[f"wan1.3b-{name}"]
    e = replace(
        e, monitor=replace(e.monitor, early_stop=False), keep_gathered=not args.block_by_block,
        gather_bf16=args.gather_bf16, average_on_cpu=args.average_on_cpu,
        moments_on_cpu=args.moments_on_cpu, cudnn_attention=args.cudnn,
        optim=replace(e.optim, batch=1, accumulate=micro_steps, lr=1e-5),
    )  # fmt: skip
    e = replace(e, data=replace(e.data, frames=args.frames))
    if name == "aad":
        e = replace(e, stage=replace(e.stage, graph=args.graph))
    if name == "dmd":
        e = replace(e, stage=replace(e.stage, critic_updates=1))
    student, critic = SMALL, LARGE if args.critic == "14b" else SMALL
    if args.critic == "14b":
        e = replace(e, discriminator=DiscriminatorConfig(taps=(19, 29, 39)))
    if args.causal:
        e = replace(e, discriminator=replace(e.discriminator, causal=True))
    if args.tiny:
        e = replace(e, discriminator=DiscriminatorConfig(taps=(0, 1, 2)))
        return e, TINY, TINY, (args.frames, 4, 8), 5
    return e, student, critic, (args.frames, 60, 104), 512


Check = Callable[[argparse.Namespace, str, mesh.Processes, torch.device], Iterator[dict[str, Any]]]


class Report:
    """Lines of results: printed at once, and all so far in a JSON file."""

    def __init__(self, path: Path | None, speaks: bool) -> None:
        self.path, self.speaks = path, speaks
        self.lines: list[dict[str, Any]] = []

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.speaks:
            print(json.dumps(line), flush=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.lines, indent=1) + "\n")


def free(device: torch.device) -> None:
    """Give back what is not needed any more: FSDP's networks hold themselves in circles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def attempt(check: Check, report: Report, args: argparse.Namespace, name: str,
            where: mesh.Processes, device: torch.device) -> bool:  # fmt: skip
    """One stage's check, and whether it went to its end; what went wrong is a result too.

    Of several processes the others may be waiting for one that failed: so it ends there, and
    torchrun ends them. One process by itself goes on with the next stage.
    """
    problem: dict[str, Any] = {}
    try:
        for line in check(args, name, where, device):
            report.add(line)
    except Exception as error:
        traceback.print_exc()
        out = isinstance(error, torch.OutOfMemoryError)
        what = "out of memory" if out else type(error).__name__
        problem = {"stage": name, what: (str(error).splitlines() or [""])[0]}
        if device.type == "cuda":
            problem["GiB at most"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    # Only now is the exception gone, and with it the frames that hold the networks.
    free(device)
    if problem:
        report.add(problem)
        if where.size > 1:
            sys.stderr.flush()
            os._exit(1)
    return not problem


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("one", "two"))
    parser.add_argument("--stages", nargs="+", default=["ode", "dmd", "aad"])
    parser.add_argument("--mesh", default="")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--frames", type=int, default=21)
    parser.add_argument("--layers", type=int, default=6, help="two: layers of each network")
    parser.add_argument("--critic", choices=("1.3b", "14b"), default="1.3b")
    parser.add_argument("--causal", action="store_true", help="the causal discriminator")
    parser.add_argument("--block-by-block", action="store_true", help="keep nothing gathered")
    parser.add_argument("--graph", default="auto", help="stage III: auto, whole, pairs or single")
    parser.add_argument("--gather-bf16", action="store_true")
    parser.add_argument("--average-on-cpu", action="store_true")
    parser.add_argument("--moments-on-cpu", action="store_true")
    parser.add_argument("--cudnn", action="store_true", help="cuDNN's attention")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--patience", type=float, default=8, help="minutes to wait for a process")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    device = mesh.local_device("cpu" if args.tiny else "cuda")
    # One that waits for another in vain is ended before the ten minutes that a check may have.
    where = mesh.start(args.mesh, device, timedelta(minutes=args.patience))
    if args.what == "two" and where.size != 2:
        raise SystemExit("start it with torchrun --nproc-per-node 2")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    told = {"torch": torch.__version__, "processes": where.size, "device": gpu}
    report = Report(args.out if where.main else None, where.main)
    report.add(told | {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()})
    check: Check = {"one": measure, "two": compare}[args.what]
    good = [attempt(check, report, args, name, where, device) for name in args.stages]
    if dist.is_initialized():
        mesh.leave()
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
