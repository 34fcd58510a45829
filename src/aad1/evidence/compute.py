"""What a run on the drawn world computes, counted: arms at equal compute hang on no clock."""

from __future__ import annotations

from dataclasses import replace

from aad1.stages.joint import JointConfig
from aad1.train.config import Experiment, SpritesData
from aad1.train.costs import Clip
from aad1.train.work import work_by_phase


def work(e: Experiment) -> tuple[float, float]:
    """Operations of the networks in stages II and III: (of one update, before the first one).

    An update is a generator step and the critic's steps before it; what comes before is a warm-up
    of the critic alone. Student and teacher have the same architecture.
    """
    assert isinstance(e.data, SpritesData)
    channels = 3 * e.data.stride**2
    model = replace(e.model, in_channels=channels, out_channels=channels)
    _, p, q = model.patch_size
    side = e.data.world.size // e.data.stride
    clip = Clip(e.data.world.frames, (side // p) * (side // q), e.text_length)
    generator, critic = (sum(of.values()) for of in work_by_phase(e, model, model, clip))
    micro = e.optim.batch * e.optim.accumulate
    matching = e.stage.score if isinstance(e.stage, JointConfig) else e.stage
    steps = getattr(matching, "critic_updates", 0)
    before = micro * getattr(e.stage, "critic_warmup", 0) * critic
    return micro * (generator + steps * critic), before


def equal_updates(e: Experiment, others: list[Experiment]) -> int:
    """Updates of a run that computes as much as other runs do together, to the nearest whole."""
    total = sum(e.optim.updates * each + before for e in others for each, before in (work(e),))
    each, before = work(e)
    return max(1, round((total - before) / each))
