"""What an update computes, by phase: sums of `costs`' formulas over a stage's passes.

n tokens, d width: a linear layer a x b is 2 n a b operations, attention 4 d per pair of tokens. A
backward pass is twice its forward pass, three times where blocks run again.
"""

from __future__ import annotations

from aad1.core.chunks import bidirectional, block_causal, parallel_chunks
from aad1.models.dit import WanConfig
from aad1.stages.adversarial import AdversarialConfig
from aad1.stages.dmd_warmup import DmdConfig
from aad1.stages.joint import JointConfig
from aad1.stages.ode_init import OdeInitConfig
from aad1.stages.pretrain import PretrainConfig
from aad1.train import costs
from aad1.train.config import Experiment
from aad1.train.costs import Clip

Phases = dict[str, float]


def work_by_phase(
    e: Experiment, student: WanConfig, teacher: WanConfig, clip: Clip
) -> tuple[Phases, Phases]:
    """Operations per clip of one generator update and of one critic update.

    "rollout" has no gradient; "judged" is what scores or discriminator make of a generated clip.
    """
    stage, again, geometry, frames = e.stage, e.checkpoint_blocks, e.geometry, clip.frames
    if isinstance(stage, PretrainConfig):
        plan = bidirectional(frames)
        whole = costs.transformer(student, clip, plan, prompts=frames, levels=frames)
        return _trained("generator", whole.forward, again), {}
    if isinstance(stage, OdeInitConfig):
        return _trained("generator", _regression(e, stage, student, clip), again), {}
    # The exit step is drawn evenly, so on average half of the further steps are run.
    steps = (len(e.sigmas) + 1) / 2
    rollout = {"rollout": costs.rollout(student, clip, geometry, steps).forward}
    replay = costs.replay(student, clip, geometry).forward
    judged = critic = ahead = 0.0
    score = stage.score if isinstance(stage, JointConfig) else stage
    levels = 1
    if isinstance(score, DmdConfig):
        plan = bidirectional(frames)
        levels = frames if score.clean_image else 1  # the image has one of its own
        one = costs.transformer(teacher, clip, plan, prompts=frames, levels=levels).forward
        judged += (2 + (score.guidance_scale != 1)) * one
        critic += one
    if not isinstance(stage, DmdConfig):
        backbone = student if e.discriminator.causal else teacher
        judge = costs.discriminator(backbone, clip, geometry, e.discriminator, levels)
        judged += judge.to_input(again)
        if isinstance(stage, AdversarialConfig):
            judged += judge.forward * (stage.loss == "relativistic")
            groups, before = stage.settled(again).turns()
            critic += sum(map(len, groups)) * judge.forward
            ahead = len(before) * judge.forward
        else:
            critic += (2 + 2 * bool(stage.r1_weight or stage.r2_weight)) * judge.forward
    learnt = _trained("critic", critic, again)
    learnt["critic: forward"] += ahead
    own = _trained("generator", replay, again)
    return rollout | {"generator: judged": judged} | own, rollout | learnt


def _trained(role: str, forward: float, again: bool) -> Phases:
    return {f"{role}: forward": forward, f"{role}: backward": (2 + again) * forward}


def _regression(e: Experiment, stage: OdeInitConfig, model: WanConfig, clip: Clip) -> float:
    """Operations of stage I's forward pass or passes."""
    geometry, frames = e.geometry, clip.frames
    causal = block_causal(geometry, frames)
    if stage.context != "teacher_forcing":
        return costs.transformer(model, clip, causal, prompts=frames, levels=frames).forward
    context = costs.cache_pass(model, clip, causal, prompts=frames)
    noisy = parallel_chunks(geometry, frames, frames, 1)
    rest = costs.transformer(
        model, clip, noisy, prompts=frames - geometry.first, levels=frames - geometry.first
    )
    return (context + rest).forward
