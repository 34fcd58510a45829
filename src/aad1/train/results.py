"""What comes out of a run: validation rollouts, checks, sample sheets, and the final model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aad1.atomic import replace_file, replace_folder
from aad1.model_info import ModelInfo, weights_hash
from aad1.models.dit import WanTransformer
from aad1.models.text import WordEncoder
from aad1.parallel.shard import collect
from aad1.pipeline import Pipeline
from aad1.rollout.teacher import sample
from aad1.stages.adversarial import Adversarial
from aad1.stages.base import Conditioner, Stage
from aad1.stages.joint import Joint
from aad1.train.blocks import uncompiled
from aad1.train.loop import Trainer
from aad1.train.monitor import Validation
from aad1.train.setup import Setup


class Results:
    """Views of a run's averaged weights; all processes take part in each."""

    def __init__(self, setup: Setup, trainer: Trainer) -> None:
        self.setup, self.trainer = setup, trainer
        self.processes = setup.processes
        self.validation = Validation(setup.world, setup.experiment.monitor.clips)

    def _pipeline(self) -> Pipeline:
        """The generator in training with its codec and prompt encoder; not hashed."""
        setup, e = self.setup, self.setup.experiment
        height, width = setup.world.size
        info = ModelInfo(
            world=setup.world.name, width=width, height=height, fps=setup.world.fps,
            stage=setup.stage_name, updates=self.trainer.update,
            parent=_facts(setup.parent), geometry=e.geometry, sigmas=e.sigmas,
            frames=setup.world.frames,
        )  # fmt: skip
        return Pipeline(setup.generator, setup.world.codec, setup.text, info)

    def check(self, stage: Stage) -> dict[str, float]:
        """The collapse monitor's figures; the same in all processes."""
        with uncompiled():  # other shapes than in training, and few passes
            return self._check(stage)

    def _check(self, stage: Stage) -> dict[str, float]:
        validation, setup = self.validation, self.setup
        latents = self._rollouts()
        values: dict[str, float] = {}
        if self.processes.main:
            values = validation.measure(validation.decode(latents))
        if isinstance(stage, Adversarial | Joint):
            real = validation.batch
            with torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.bf16):
                gap = stage.heldout_gap(real.latents, latents, real.captions, validation.together)
            values["heldout_gap"] = float(gap)
        found: dict[str, float] = self.processes.gather(values)[0]
        return found

    def _rollouts(self) -> torch.Tensor:
        """Latents of what the model makes of the held-out first frames (or of none)."""
        setup, batch = self.setup, self.validation.batch
        pipeline = self._pipeline()
        with (
            torch.no_grad(),
            self.trainer.averages.applied(),
            torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.bf16),
        ):
            if setup.stage_name != "teacher":
                return self.validation.rollouts(pipeline, self.processes)
            latents = batch.latents
            rng = torch.Generator(device=setup.device).manual_seed(0)
            noise = torch.randn(latents.shape, generator=rng, device=setup.device)
            text = Conditioner(pipeline.text, setup.experiment.geometry)(
                batch.captions, latents.shape[2]
            )
            t = setup.experiment.trajectories
            x0, _ = sample(
                pipeline.transformer, noise, text, torch.zeros_like(text),
                steps=t.steps, shift=t.shift, guidance_scale=t.guidance_scale,
                image=latents[:, :, :1] if t.from_image else None,
            )  # fmt: skip
            return x0

    def sheet(self) -> torch.Tensor:
        """Write real clips above generated ones, for the eye; returns the generated ones, to the
        first process (which alone decodes them)."""
        from aad1.media.sheet import contact_sheet

        with uncompiled():
            made, validation = self._rollouts(), self.validation
        if not self.processes.main:
            return made
        made, update = validation.decode(made), self.trainer.update
        rows: list[Any] = []
        captions: list[str] = []
        for i in range(min(6, len(made))):
            prompt = validation.batch.captions[i][-1]
            rows += [validation.video[i].cpu().numpy(), made[i].cpu().numpy()]
            captions += [f"real: {prompt}", f"{self.setup.stage_name}, update {update}"]
        path = self.setup.experiment.folder / "samples" / f"update-{update:06d}.png"
        with replace_file(path) as temporary:
            contact_sheet(rows, captions).save(temporary)
        return made

    def write(self, final: Path) -> None:
        """The model that the run was for, written by the first process."""
        with self.trainer.averages.applied():
            pipe = self._pipeline()
            if self.processes.size > 1:
                averaged = self.trainer.averages.modules
                weights = {n: collect(m, self.processes) for n, m in averaged.items()}
                if self.processes.main:
                    _put(pipe, weights)
            if self.processes.main:
                pipe.info = replace(pipe.info, sha256=weights_hash(pipe.transformer))
                with replace_folder(final) as temporary:
                    pipe.save_pretrained(temporary)


def _put(pipe: Pipeline, weights: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Networks of these weights in place of a pipeline's own."""
    pipe.transformer = _filled(WanTransformer, pipe.transformer.config, weights["generator"])
    if "text" in weights:
        assert isinstance(pipe.text, WordEncoder)
        pipe.text = _filled(WordEncoder, pipe.text.config, weights["text"])


def _filled(kind: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """A network of this class with these weights."""
    with torch.device("meta"):
        network = kind(config)
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)


def _facts(info: ModelInfo | None) -> dict[str, Any] | None:
    """The lineage of a model as plain data."""
    if info is None:
        return None
    parent = dict(info.parent) if info.parent else None
    return {"stage": info.stage, "updates": info.updates, "sha256": info.sha256, "parent": parent}
