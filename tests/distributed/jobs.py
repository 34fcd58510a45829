"""What the processes of the distributed tests do; run by `launch.py` as a program of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aad1.core.chunks import ChunkGeometry
from aad1.models.discriminator import Discriminator, DiscriminatorConfig
from aad1.models.dit import WanConfig, WanTransformer
from aad1.parallel import mesh
from aad1.parallel.shard import distribute, whole
from aad1.rollout.stream import Rollout
from aad1.stages.adversarial import Adversarial, AdversarialConfig
from aad1.stages.base import Batch, Conditioner, Stage
from aad1.stages.dmd_warmup import DmdConfig, DmdWarmup
from aad1.stages.ode_init import OdeInit, OdeInitConfig
from aad1.train.blocks import checkpoint_blocks
from aad1.train.config import OptimConfig
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
    causal: bool = False, max_skipped: int = 0, keep_gathered: bool = True, **optim: Any,
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
        stage = Adversarial(rollout, critic, conditioner, AdversarialConfig())
    standard: dict[str, Any] = dict(batch=4, lr=1e-3, critic_lr=1e-3, clip=1e9, critic_clip=1e9)
    made = Trainer(
        stage, Clips(len(SIGMAS)), modules, ("generator",) if averaged else (),
        OptimConfig(**(standard | optim)), seed=3, device=CPU, bf16=False, processes=processes,
        max_skipped=max_skipped, keep_gathered=keep_gathered,
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


def all_gradients(processes: mesh.Processes, stages: list[str], **options: Any) -> Any:
    out = {}
    for name in stages:
        t = trainer(name, processes, averaged=False, **options)
        out[name] = [gradients(t, role) for role in t.optimizers]
        source = t.source
        assert isinstance(source, Clips)
        out[name, "asked"] = source.asked
    return out


JOBS = {"all_gradients": all_gradients}


def main() -> None:
    torch.set_num_threads(1)
    job, out, arguments = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    processes = mesh.start(arguments.pop("mesh", ""), CPU)
    result = JOBS[job](processes, **arguments)
    torch.save(result, out / f"{processes.rank}.pt")
    mesh.leave()


if __name__ == "__main__":
    main()
