"""What the processes of the distributed tests do; run by `launch.py` as a program of its own."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import scale_jobs
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.models.discriminator import Discriminator, DiscriminatorConfig
from aad1.models.dit import WanConfig, WanTransformer
from aad1.parallel import context, mesh, shard
from aad1.parallel.shard import distribute, whole
from aad1.rollout.stream import Rollout
from aad1.stages.adversarial import Adversarial, AdversarialConfig
from aad1.stages.base import Batch, Conditioner, SampleNoise, Stage
from aad1.stages.dmd_warmup import DmdConfig, DmdWarmup
from aad1.stages.ode_init import OdeInit, OdeInitConfig
from aad1.train import checkpoint
from aad1.train.blocks import checkpoint_blocks
from aad1.train.config import OptimConfig
from aad1.train.guard import Stopped, only_run
from aad1.train.loop import Trainer

CPU = torch.device("cpu")
GEOMETRY = ChunkGeometry(chunk=2, sink=1, window=5)
FRAMES, SIGMAS = 7, (1.0, 0.8)
CLIP = (4, FRAMES, 4, 8)
MODEL = WanConfig(
    num_attention_heads=4, attention_head_dim=8, ffn_dim=48, num_layers=2, text_dim=8, freq_dim=16,
    in_channels=4, out_channels=4,
)  # fmt: skip


def model(seed: int) -> WanTransformer:
    made = WanTransformer(MODEL)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.15 * torch.randn(p.shape, generator=generator))
    return made


class Clips:
    """Sample n is drawn from seed n."""

    def __init__(self, levels: int = 0) -> None:
        self.levels = levels
        self.asked: list[int] = []

    def batch(self, position: int, count: int) -> Batch:
        numbers = range(position, position + count)
        self.asked += numbers
        states = torch.stack(
            [
                torch.randn((self.levels + 1, *CLIP), generator=torch.Generator().manual_seed(n))
                for n in numbers
            ]
        )
        return Batch(states[:, -1], [[f"prompt {n % 3}"] for n in numbers], states)


def encode(prompts: list[str]) -> torch.Tensor:
    return torch.stack(
        [torch.randn(3, 8, generator=torch.Generator().manual_seed(int(p[-1]))) for p in prompts]
    )


def trainer(
    name: str, processes: mesh.Processes, *, checkpointed: bool = False, averaged: bool = True,
    causal: bool = False, max_skipped: int = 0, keep_gathered: bool = True, graph: str = "auto",
    bf16: bool = False, on_cpu: bool = False, **optim: Any,
) -> Trainer:  # fmt: skip
    """A tiny run of a stage: "ode", "dmd" or "aad"."""
    conditioner = Conditioner(encode, GEOMETRY)
    generator = model(1)
    modules: dict[str, nn.Module] = {"generator": generator}
    stage: Stage
    if name == "ode":
        stage = OdeInit(generator, conditioner, GEOMETRY, SIGMAS, OdeInitConfig())
    elif name == "dmd":
        real = model(2).requires_grad_(False)
        modules["fake_score"] = fake = model(3)
        distribute(real, processes)
        rollout = Rollout(generator, GEOMETRY, SIGMAS)
        stage = DmdWarmup(rollout, real, fake, conditioner, DmdConfig(critic_updates=2))
    else:
        torch.manual_seed(4)
        config = DiscriminatorConfig(taps=(0, 1), causal=causal, per_frame=causal)
        critic = Discriminator(model(3), config, GEOMETRY)
        for p in critic.head_parameters():  # as they begin, heads would give almost no gradient
            nn.init.normal_(p, std=0.2)
        modules["discriminator"] = critic
        rollout = Rollout(generator, GEOMETRY, SIGMAS)
        chosen = AdversarialConfig(graph=graph).settled(checkpointed)
        stage = Adversarial(rollout, critic, conditioner, chosen)
    standard: dict[str, Any] = dict(batch=4, lr=1e-3, critic_lr=1e-3, clip=1e9, critic_clip=1e9)
    made = Trainer(
        stage, Clips(len(SIGMAS)), modules, ("generator",) if averaged else (),
        OptimConfig(**(standard | optim)), seed=3, device=CPU, bf16=bf16, processes=processes,
        max_skipped=max_skipped, keep_gathered=keep_gathered,
        average_on_cpu=on_cpu, moments_on_cpu=on_cpu,
    )  # fmt: skip
    if checkpointed:
        for module in modules.values():
            checkpoint_blocks(module)
    return made


def gradients(t: Trainer, role: str) -> dict[str, torch.Tensor]:
    """Gradients of one optimiser step of a role, put together, and the norm and loss."""
    logs = t._optimise(role, 0)
    found = {
        f"{module}.{name}": whole(p.grad).clone()
        for module, m in t.modules.items()
        for name, p in m.named_parameters()
        if p.grad is not None
    }
    return found | {f"log {k}": torch.as_tensor(v) for k, v in logs.items()}


def laid_out(processes: mesh.Processes, text: str) -> mesh.Processes:
    """The same processes on another mesh."""
    if processes.size == 1:
        return processes
    return mesh.arrange(mesh.MeshShape.parse(text, processes.size), CPU)


def all_gradients(
    processes: mesh.Processes, stages: list[str], variants: list[dict[str, Any]]
) -> Any:
    """For each variant, {stage: gradients by role}."""
    out = []
    for options in variants:
        where = laid_out(processes, options.pop("mesh", ""))
        where = replace(where, gather_bf16=options.pop("gather_bf16", False))
        bug = options.pop("bug", False)
        adjoint = context._Gather.backward
        if bug:  # as if every process's loss were its own: gradients come out 1/cp
            context._Gather.backward = staticmethod(sliced)  # type: ignore[method-assign]
        found = {}
        for name in stages:
            t = trainer(name, where, averaged=False, **options)
            found[name] = [gradients(t, role) for role in t.optimizers]
        context._Gather.backward = staticmethod(adjoint)  # type: ignore[method-assign]
        out.append(found)
    return out


def sliced(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    group, dim = ctx.rest
    return grads[0].chunk(group.size(), dim)[group.rank()].contiguous(), None, None


def part(processes: mesh.Processes, folder: str, until: int, straight: bool) -> Any:
    """A run of stage III to step `until`, gone on with if `folder` has a checkpoint.

    Returns what was asked of the source, seeds of all noise, and the weights at the end.
    """
    t = trainer("aad", processes, batch=2, accumulate=2)
    seeds: list[int] = []
    plain = t._noise

    def spying(role: str, index: int, number: int) -> SampleNoise:
        noise = plain(role, index, number)
        seeds.extend([*(g.initial_seed() for g in noise.samples), noise.shared.initial_seed()])
        return noise

    t._noise = spying  # type: ignore[method-assign]
    found = checkpoint.steps(Path(folder))
    if found and not straight:
        meta = checkpoint.read_meta(found[-1])
        t.restore(
            meta["counters"], checkpoint.shapes(found[-1]),
            lambda tensors: checkpoint.load(found[-1], tensors, processes),
        )  # fmt: skip
    while 2 * t.update + t.turn < until:  # two steps an update: may stop in the middle
        left = iter([False] * (until - 2 * t.update - t.turn) + [True] * 2)
        t.step(lambda left=left: next(left))  # type: ignore[misc]
    tensors = t.tensors()
    if not straight and not (found and processes.size == 2):
        where = checkpoint.step_folder(Path(folder), t.update, t.turn)
        checkpoint.save(where, tensors, {"counters": t.counters()}, processes)
    assert isinstance(t.source, Clips)
    return t.source.asked, seeds, {n: whole(v).clone() for n, v in tensors.items()}


def two_parts(processes: mesh.Processes, folder: str) -> Any:
    """A straight run, and the same run in pieces, of 1, 2 or 3 steps first: equal to the bit?"""
    *_, want = part(processes, "", 4, straight=True)
    equal = []
    for stop in range(1, 4):
        where = f"{folder}/{stop}"
        part(processes, where, stop, straight=False)
        *_, got = part(processes, where, 4, straight=False)
        equal.append(got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want))
    return equal


def states_on_cpu(processes: mesh.Processes, folder: str) -> Any:
    """A step of stage III with averages and moments on the CPU, saved and loaded, against one with
    them beside the weights: (largest difference, equal after loading?) by mesh."""
    # Here the weights are on the CPU too; on a GPU these states have a mesh of their own.
    shard._cpu_mesh = lambda m: DeviceMesh("cpu", m.mesh, mesh_dim_names=m.mesh_dim_names)  # type: ignore[assignment]
    found = []
    for text in ("dp=2", "dp=2,replicas=2"):
        where = laid_out(processes, text)
        here, away, again = (trainer("aad", where, on_cpu=flag) for flag in (False, True, True))
        for t in (here, away):
            t.step()
        tensors, want = away.tensors(), here.tensors()
        assert tensors.keys() == want.keys()
        apart = max(float((whole(v) - whole(tensors[n])).abs().max()) for n, v in want.items())
        step = checkpoint.step_folder(Path(folder) / text, 1)
        checkpoint.save(step, tensors, {}, processes)
        again.restore(
            away.counters(), checkpoint.shapes(step),
            lambda wanted, step=step: checkpoint.load(step, wanted, processes),
        )  # fmt: skip
        loaded = again.tensors()
        equal = [torch.equal(whole(v), whole(loaded[n])) for n, v in tensors.items()]
        found.append((apart, all(equal) and len(equal) == len(loaded)))
    return found


def faults(processes: mesh.Processes, config: str, out: str) -> Any:
    """What becomes of runs of stage II in two processes when something happens to them."""
    from aad1.train import loop, run
    from aad1.train.record import read_record

    base = replace(read_record(Path(config)), out=Path(out), mesh="dp=2")
    first, second = processes.main, processes.rank == 1
    plain = loop.Trainer._optimise
    steps = 0

    def attempt(name: str, at: int = 0, action: Any = None, **changes: Any) -> str:
        """Run `name`; in the second process `action` is called before step number `at`."""
        nonlocal steps
        steps = 0

        def hooked(self: Any, role: str, index: int) -> Any:
            nonlocal steps
            steps += 1
            if steps == at and second and action:
                action()
            return plain(self, role, index)

        loop.Trainer._optimise = hooked  # type: ignore[method-assign]
        try:
            final = run.Run(replace(base, name=name, **changes)).train()
            processes.barrier()
            return str(json.loads((final / "model_index.json").read_text())["sha256"])
        except (UserError, loop.NonFinite, Stopped) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            processes.barrier()

    def saved(name: str) -> list[str]:
        processes.barrier()
        return [p.name for p in checkpoint.steps(Path(out) / name)]

    def kill(number: int) -> Any:
        return lambda: os.kill(os.getpid(), number)

    found: dict[str, Any] = {"straight": attempt("straight")}
    found["term"] = attempt("term", 2, kill(signal.SIGTERM)), saved("term")
    found["term, resumed"] = attempt("term")
    found["usr1"] = attempt("usr1", 5, kill(signal.SIGUSR1)), saved("usr1")
    found["usr1, resumed"] = attempt("usr1")

    def poison() -> None:
        def bad(stage: Any, batch: Batch, rng: Any) -> Any:
            loss, logs = healthy(stage, batch, rng)
            DmdWarmup.critic_loss = healthy  # type: ignore[method-assign]
            return loss * float("nan"), {**logs, "fake": logs["fake"] * float("nan")}

        healthy = DmdWarmup.critic_loss
        DmdWarmup.critic_loss = bad  # type: ignore[method-assign]

    found["nan"] = attempt("nan", 4, poison), saved("nan")
    found["nan, skipped"] = len(attempt("nan-skipped", 4, poison, max_skipped=1)), steps

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # noqa: E731
    found["full"] = attempt("full", 4, full), saved("full")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found["full, resumed"] = attempt("full")
    changed = replace(base.optim, lr=0.5)
    found["changed"] = attempt("full", optim=replace(changed, updates=4))
    found["changed, told"] = len(attempt("full", optim=changed, accept_changes=True))
    found["no mesh"] = attempt("mesh", mesh="dp=3")
    found["muon"] = attempt("muon", optim=replace(base.optim, optimizer="muon"))
    found["no batch"] = attempt("batch", optim=replace(base.optim, batch=3))
    with ExitStack() as stack:
        if first:
            stack.enter_context(only_run(Path(out) / "locked"))
        processes.barrier()
        found["locked"] = attempt("locked")
    if first:
        (shard,) = Path(out).glob("straight/checkpoints/*/weights/__1_0.distcp")
        shard.write_bytes(shard.read_bytes()[:100])
    processes.barrier()
    found["truncated"] = attempt("straight")
    return found


def dies(processes: mesh.Processes, config: str, out: str) -> Any:
    """The second process is killed in the middle of its second save."""
    from aad1.train import run
    from aad1.train.record import read_record

    plain, saves = checkpoint.dcp.save, 0

    def deadly(state: Any, checkpoint_id: Path, **more: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves == 2 and processes.rank == 1:
            (checkpoint_id.parent / "half").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(state, checkpoint_id=checkpoint_id, **more)

    checkpoint.dcp.save = deadly
    run.Run(replace(read_record(Path(config)), out=Path(out), mesh="dp=2")).train()


JOBS = {
    "all_gradients": all_gradients,
    "part": part,
    "two_parts": two_parts,
    "states_on_cpu": states_on_cpu,
    "faults": faults,
    "dies": dies,
    **scale_jobs.JOBS,
}


def main() -> None:
    torch.set_num_threads(1)
    job, out, arguments = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    processes = mesh.start(arguments.pop("mesh", ""), CPU)
    result = JOBS[job](processes, **arguments)
    torch.save(result, out / f"{processes.rank}.pt")
    mesh.leave()
    # The groups of runs that failed on purpose may still hold threads, and an interpreter that
    # takes them down on its way out now and then aborts. The result is on the disk.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
