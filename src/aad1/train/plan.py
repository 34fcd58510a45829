"""`aad1 train PRESET --dry-run`: what a run of Wan takes, worked out without weights or data.

Parameters are counted on networks without storage (torch's meta device). States - weights,
gradients, Adam's moments (one where beta1 is 0, else two), averages - are what the trainer keeps.
On one GPU that is all there is. On several they are sharded over all of them, or over one of the
replicas of `--mesh`, and the activations of a clip over a context-parallel group: `--mesh`'s cp, or
else as many GPUs as divide all of them and every network's heads, at most 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from torch import nn

from aad1.core.chunks import Plan as AttentionPlan
from aad1.core.chunks import bidirectional, block_causal
from aad1.errors import UserError
from aad1.models.checkpoints import find_parts
from aad1.models.discriminator import Discriminator
from aad1.models.dit import WanConfig, WanTransformer
from aad1.models.wan_shapes import wan_config
from aad1.models.weights import read_json, read_transformer_config
from aad1.parallel.mesh import MeshShape, check_heads, share
from aad1.stages.adversarial import AdversarialConfig
from aad1.stages.dmd_warmup import DmdConfig
from aad1.stages.ode_init import OdeInitConfig
from aad1.train import costs
from aad1.train.config import Experiment, WanData
from aad1.train.costs import Clip
from aad1.train.record import to_plain
from aad1.train.wan_base import VideoSize
from aad1.train.work import work_by_phase

GIB = 2**30
MOST_CONTEXT = 8


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machine that `--dry-run` reckons with."""

    gpus: int = 1
    gib: float = 80.0
    """Memory of a GPU."""
    tflops: float = 989.0
    """Peak of a GPU in 10^12 operations a second, bf16 and dense (989: H100; 148: H20)."""
    mfu: float = 0.4
    """Share of the peak that training reaches."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UserError(f"--gpus must be at least 1, got {self.gpus}")
        if self.gib <= 0 or self.tflops <= 0:
            raise UserError(f"--gib and --tflops must be above 0, got {self.gib}, {self.tflops}")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu must be in (0, 1], got {self.mfu}")


@dataclass(frozen=True, kw_only=True)
class Role:
    """The states of one network, in bytes: on GPUs, and on_cpu in the CPUs' memory."""

    name: str
    parameters: int
    weights: int = 0
    gradients: int = 0
    adam: int = 0
    average: int = 0
    on_cpu: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.adam + self.average


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes, in all; divide as `Cluster` says for one GPU.

    activations: bytes by phase of an update, of one micro-batch; only the largest counts.
    copies: bytes of weights beside the masters, on each GPU.
    work: operations of one update. context: GPUs that share a clip; shards: over which states are
    sharded.
    """

    roles: tuple[Role, ...]
    activations: Mapping[str, float]
    copies: int
    work: float
    warmup_work: float
    context: int
    shards: int
    clip: Clip
    teacher: WanConfig


def plan(e: Experiment, cluster: Cluster, teacher: WanConfig | None = None) -> Plan:
    """The plan of an experiment on Wan's data. UserError for another world or a teacher's run.

    teacher: its architecture, if not that of what the experiment names.
    """
    if not isinstance(e.data, WanData) or not isinstance(
        e.stage, OdeInitConfig | DmdConfig | AdversarialConfig
    ):
        raise UserError(f"--dry-run knows the Wan presets; {e.name} is none")
    clip = _clip(e, e.data)
    e.geometry.chunks(clip.frames)
    teacher = teacher or _config_of(e.teacher) or e.model
    student = _config_of(e.init) or e.model
    bf16 = e.precision != "fp32"
    roles = _roles(e, student, teacher, bf16)
    trained = [r for r in roles if r.gradients]
    heads = {student.num_attention_heads}
    if not isinstance(e.stage, OdeInitConfig):
        heads.add(teacher.num_attention_heads)
    copies = _copies(e, trained, student, teacher, bf16, cluster)
    shape = MeshShape.parse(e.mesh, cluster.gpus) if e.mesh else None
    if shape is not None:
        named = {"generator": student.num_attention_heads}
        if not isinstance(e.stage, OdeInitConfig):
            named["teacher"] = teacher.num_attention_heads
        check_heads(shape.cp, named)
        share(e.optim.batch * e.optim.accumulate, e.optim.batch, shape.dp)
    generator, critic = (sum(of.values()) for of in work_by_phase(e, student, teacher, clip))
    micro = e.optim.batch * e.optim.accumulate
    updates = getattr(e.stage, "critic_updates", 0)
    return Plan(
        roles=roles,
        activations=_activations(e, student, teacher, clip, bf16),
        copies=copies,
        work=micro * (generator + updates * critic),
        warmup_work=micro * getattr(e.stage, "critic_warmup", 0) * critic,
        context=shape.cp if shape else _context(cluster.gpus, heads),
        shards=cluster.gpus // (shape.replicas if shape else 1),
        clip=clip,
        teacher=teacher,
    )


def _context(gpus: int, heads: set[int]) -> int:
    fit = [c for c in range(1, MOST_CONTEXT + 1) if gpus % c == 0 and not any(h % c for h in heads)]
    return max(fit)


def _clip(e: Experiment, data: WanData) -> Clip:
    _, p, q = e.model.patch_size
    _, height, width = VideoSize(width=data.width, height=data.height).latent()
    return Clip(data.frames, (height // p) * (width // q), e.text_length)


def _config_of(path: Path | None) -> WanConfig | None:
    """The architecture of the weights at `path`; None if nothing is there yet."""
    if path is None or not path.exists():
        return None
    config = path / "transformer" / "config.json"
    if config.is_file():  # says it all, even before the weights themselves are there
        return read_transformer_config(read_json(config), config)
    return wan_config(find_parts(path).source("transformer"))


def _count(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _roles(e: Experiment, student: WanConfig, teacher: WanConfig, bf16: bool) -> tuple[Role, ...]:
    def trained(name: str, total: int, used: int, average: bool = False) -> Role:
        betas = e.optim.betas if name == "generator" else e.optim.critic_betas
        moments, mean = (8 if betas[0] else 4) * used, 4 * total * average
        return Role(
            name=name, parameters=total, weights=4 * total, gradients=4 * used,
            adam=0 if e.moments_on_cpu else moments, average=0 if e.average_on_cpu else mean,
            on_cpu=moments * e.moments_on_cpu + mean * e.average_on_cpu,
        )  # fmt: skip

    with torch.device("meta"):
        own = _count(list(WanTransformer(student).parameters()))
        theirs = WanTransformer(teacher)
        critic = None
        if isinstance(e.stage, AdversarialConfig):
            backbone = WanTransformer(student) if e.discriminator.causal else theirs
            critic = Discriminator(backbone, e.discriminator, e.geometry)
    roles = [trained("generator", own, own, average=True)]
    if isinstance(e.stage, DmdConfig):
        n = _count(list(theirs.parameters()))
        roles.append(Role(name="real score", parameters=n, weights=(2 if bf16 else 4) * n))
        roles.append(trained("fake score", n, n))
    if critic is not None:
        backbone_count = _count(list(critic.backbone.parameters()))
        # What lies behind the last tap has no gradient, so no moments either.
        idle = [*critic.backbone.proj_out.parameters(), critic.backbone.scale_shift_table]
        for block in critic.backbone.blocks[e.discriminator.taps[-1] + 1 :]:
            idle += list(block.parameters())
        roles.append(trained("discriminator", backbone_count, backbone_count - _count(idle)))
        n = _count(critic.head_parameters())
        roles.append(trained("its heads", n, n))
    if e.monitor.early_stop and e.monitor.every:
        where = "on_cpu" if e.average_on_cpu else "weights"  # a copy of the average
        roles.append(Role(name="best weights so far", parameters=own, **{where: 4 * own}))
    return tuple(roles)


def _copies(
    e: Experiment,
    trained: list[Role],
    student: WanConfig,
    teacher: WanConfig,
    bf16: bool,
    cluster: Cluster,
) -> int:
    """Weights beside the masters.

    On one GPU autocast keeps a bf16 copy of the network in training. Sharded, two blocks and what
    is outside the blocks are gathered at a time, and all of the generator where it is kept
    gathered: in float32, or the blocks in bf16.
    """
    if cluster.gpus == 1:
        return 2 * max(r.parameters for r in trained) if bf16 else 0
    size = 2 if e.gather_bf16 else 4
    most = 0
    for config in (student, teacher):
        with torch.device("meta"):
            one = WanTransformer(replace(config, num_layers=1))
        block = _count(list(one.blocks.parameters()))
        outside = _count(list(one.parameters())) - block
        most = max(most, 4 * outside + 2 * size * block)
        if config is student and e.keep_gathered:
            kept = 4 * outside + size * (trained[0].parameters - outside)
    return most + (kept if e.keep_gathered else 0)


def _activations(
    e: Experiment, student: WanConfig, teacher: WanConfig, clip: Clip, bf16: bool
) -> dict[str, float]:
    """Bytes by phase for one micro-batch."""
    g, frames, clips = e.geometry, clip.frames, e.optim.batch

    def graph(model: WanConfig, attention: AttentionPlan, prompts: int, **more: int) -> float:
        return costs.graph(
            model, clip, attention, prompts=prompts, bf16=bf16, checkpointed=e.checkpoint_blocks,
            **more,
        )  # fmt: skip

    if isinstance(e.stage, OdeInitConfig):
        return {"generator": graph(student, block_causal(g, frames), frames, clips=clips)}
    past = clips * costs.cache_bytes(student, clip, frames - g.chunk, bf16=bf16)
    phases: dict[str, float] = {"rollout": past}  # the cache that a chunk reads is part of it
    replay = costs.replay_plan(clip, g)
    phases["generator"] = past + graph(student, replay, frames - g.first, clips=clips)
    if isinstance(e.stage, DmdConfig):
        phases["fake score"] = graph(teacher, bidirectional(frames), frames, clips=clips)
        return phases
    assert isinstance(e.stage, AdversarialConfig)
    causal, layers = e.discriminator.causal, e.discriminator.taps[-1] + 1
    seen_by = block_causal(g, frames) if causal else bidirectional(frames)
    judge = student if causal else teacher
    phases["generator, judged"] = past + graph(judge, seen_by, frames, clips=clips, layers=layers)
    groups, _ = e.stage.settled(e.checkpoint_blocks).turns()
    most, pair = max(map(len, groups)), 1 + (len(groups) == 1)
    phases["discriminator"] = graph(  # as one graph, real and generated clips share a pass
        judge, seen_by, frames, clips=pair * clips, passes=most // pair, layers=layers
    )
    return phases


# -- in words -------------------------------------------------------------------------------------


def describe(e: Experiment, cluster: Cluster) -> str:
    """The resolved config and the plan, as text."""
    p = plan(e, cluster)
    gpus, context = cluster.gpus, p.context
    lines = [yaml.safe_dump(to_plain(e), sort_keys=False, allow_unicode=True).rstrip(), ""]
    lines.append(
        f"clip: {p.clip.frames} latent frames of {p.clip.tokens} tokens; batch "
        f"{e.optim.batch * e.optim.accumulate} as {e.optim.batch} x {e.optim.accumulate}"
    )
    lines.append(
        f"GPUs: {gpus} of {cluster.gib:g} GiB; states sharded over {p.shards}, a clip over "
        f"{context}"
    )
    head = ("GiB per GPU", "parameters", "weights", "gradients", "Adam", "average", "total")
    lines += ["", _row(*head)]
    for role in p.roles:
        figures = (role.weights, role.gradients, role.adam, role.average, role.total)
        cells = [f"{x / p.shards / GIB:.2f}" for x in figures]
        lines.append(_row(role.name, f"{role.parameters / 1e9:.3f} G", *cells))
    worst = max(p.activations, key=lambda name: p.activations[name])
    states = sum(role.total for role in p.roles) / p.shards
    lines.append(_row("copies of weights", *[""] * 5, f"{p.copies / GIB:.2f}"))
    for name, size in p.activations.items():
        mark = " (largest)" if name == worst else ""
        lines.append(f"activations, {name}{mark}: {size / context / GIB:.2f}")
    total = (states + p.copies + p.activations[worst] / context) / GIB
    verdict = "fits" if total <= cluster.gib else "does NOT fit"
    lines.append(f"in all {total:.1f} GiB per GPU: {verdict} in {cluster.gib:g} GiB")
    away = sum(role.on_cpu for role in p.roles) / p.shards / GIB
    if away:
        lines.append(f"beside it {away:.1f} GiB of the CPU's memory per GPU")
    operations = e.optim.updates * p.work + p.warmup_work
    seconds = operations / (gpus * cluster.tflops * 1e12 * cluster.mfu)
    lines += [
        "",
        f"work: {p.work / 1e15:,.0f} PFLOP per update, {operations / 1e18:,.1f} EFLOP for "
        f"{e.optim.updates} updates",
        f"time: {_duration(seconds)} at {100 * cluster.mfu:g}% of {cluster.tflops:g} TFLOP/s per "
        "GPU; checks, checkpoints and reading not counted",
    ]
    if isinstance(e.stage, OdeInitConfig):
        t = e.trajectories
        once = costs.transformer(
            p.teacher, p.clip, bidirectional(p.clip.frames), prompts=p.clip.frames
        ).forward
        each = once * t.steps * (1 + (t.guidance_scale != 1))
        seconds = 1000 * each / (gpus * cluster.tflops * 1e12 * cluster.mfu)
        lines.append(
            f"before it: {each / 1e15:,.0f} PFLOP a trajectory, {_duration(seconds)} for 1,000"
        )
    return "\n".join(lines)


def _row(name: str, *cells: str) -> str:
    return f"{name:20}" + "".join(f"{cell:>11}" for cell in cells)


def _duration(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 172800 else f"{seconds / 86400:.1f} days"
