"""One training run from a config: build the stage, train, watch, save."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from aad1.atomic import replace_file, replace_folder
from aad1.errors import UserError
from aad1.models.checkpoints import load_wan_transformer
from aad1.models.discriminator import Discriminator
from aad1.models.dit import Block, WanTransformer
from aad1.models.text import WordEncoder, WordEncoderConfig
from aad1.pipeline import ModelInfo, Pipeline, pick_device, weights_hash
from aad1.rollout.graph import GraphedRollout
from aad1.rollout.stream import Rollout, RolloutFn
from aad1.rollout.teacher import sample
from aad1.stages.adversarial import Adversarial, AdversarialConfig
from aad1.stages.base import Conditioner, Stage, roll_out
from aad1.stages.dmd_warmup import DmdConfig, DmdWarmup
from aad1.stages.ode_init import OdeInit, OdeInitConfig
from aad1.stages.pretrain import Pretrain, PretrainConfig
from aad1.train import checkpoint
from aad1.train.config import Experiment, WanData
from aad1.train.log import RunLog
from aad1.train.loop import Trainer
from aad1.train.monitor import CollapseMonitor, Validation
from aad1.train.record import to_plain, write_record
from aad1.train.sources import ShardSource, Source, World, open_world
from aad1.train.trajectories import trajectories
from aad1.train.wan_world import StoredText, WanWorld, describe, load_student

STAGE_NAMES = {
    PretrainConfig: "teacher",
    OdeInitConfig: "ode",
    DmdConfig: "dmd",
    AdversarialConfig: "aad",
}


class Run:
    """A training run: `Run(experiment).train()` returns the folder of the final model."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = e = experiment
        self.device = pick_device(e.device)
        if e.precision not in ("auto", "fp32", "bf16"):
            raise UserError(f"precision must be auto, fp32 or bf16, got {e.precision!r}")
        self.bf16 = e.precision == "bf16" or (e.precision == "auto" and self.device.type == "cuda")
        self.folder = e.folder
        self.stage_name = STAGE_NAMES[type(e.stage)]
        self._ended = ""
        torch.manual_seed(e.seed)
        self.world: World
        self.teacher: Pipeline | None = None
        """The whole of a small world's teacher; Wan's network is loaded where it is needed."""
        self.teacher_info: ModelInfo | None = None
        self.parent: ModelInfo | None = None
        if isinstance(e.data, WanData):
            self._from_wan(e.data)
            return
        self.world = open_world(e.data, e.seed, self.device)
        if self.stage_name == "teacher":
            self._fresh()
        else:
            self._from_parent()
        self.conditioner = Conditioner(self.text, e.geometry)

    # -- building -------------------------------------------------------------------------

    def _fresh(self) -> None:
        e = self.experiment
        channels = self.world.codec.latent_channels
        config = replace(e.model, in_channels=channels, out_channels=channels)
        self.generator = WanTransformer(config)
        self.generator.init_weights()
        self.text: WordEncoder | StoredText = WordEncoder(
            WordEncoderConfig(words=self.world.words, length=e.text_length, dim=config.text_dim)
        )
        self.generator.to(self.device)
        self.text.to(self.device)

    def _from_parent(self) -> None:
        e = self.experiment
        folder = self._teacher_folder()
        self.teacher = Pipeline.from_pretrained(folder, device=self.device)
        self.teacher_info = _teacher_only(self.teacher.info, folder)
        start = Pipeline.from_pretrained(e.init or folder, device=self.device)
        assert isinstance(self.teacher.text, WordEncoder)  # the small worlds have no other
        self.parent = start.info
        self.generator, self.text = start.transformer, self.teacher.text
        self.teacher.transformer.requires_grad_(False)

    def _from_wan(self, data: WanData) -> None:
        """The student from Wan's weights or an earlier stage; text is looked up, not encoded."""
        e = self.experiment
        folder = self._teacher_folder()
        if self.stage_name == "teacher":
            raise UserError(f"{e.name}: Wan comes trained, there is no stage 0 for it")
        self.teacher_info = _teacher_only(describe(folder), folder)
        world = WanWorld(data, e.seed, self.device)
        e.geometry.chunks(world.frames)  # refuses clips that are no whole number of chunks
        self.generator, self.parent = load_student(e.init or folder, self.device)
        self.world, self.text = world, world.text
        if self.text.dim != self.generator.config.text_dim:
            raise UserError(
                f"text embeddings have width {self.text.dim}, {e.init or folder} takes "
                f"{self.generator.config.text_dim}"
            )
        self.conditioner = world.conditioner(e.geometry)

    def _teacher_folder(self) -> Path:
        e = self.experiment
        if e.teacher is None:
            raise UserError(f"{e.name} needs --teacher, the folder of a trained teacher")
        return e.teacher

    def _teacher_network(self, *, trained: bool) -> WanTransformer:
        """The teacher's network: frozen, or float32 weights of its own to be trained.

        Frozen, Wan's is in bfloat16 where that is what is computed in.
        """
        if self.teacher is not None:
            frozen = self.teacher.transformer
            return copy.deepcopy(frozen).requires_grad_(True) if trained else frozen
        dtype = torch.bfloat16 if self.bf16 and not trained else torch.float32
        network = load_wan_transformer(self._teacher_folder(), dtype, self.device)
        return network.requires_grad_(trained)

    def _stage(self, log: RunLog) -> tuple[Stage, Source, dict[str, nn.Module]]:
        e, config = self.experiment, self.experiment.stage
        modules: dict[str, nn.Module] = {"generator": self.generator}
        if isinstance(config, OdeInitConfig):
            ode = OdeInit(self.generator, self.conditioner, e.geometry, e.sigmas, config)
            return ode, self._trajectories(log), modules
        source = self.world.train()
        if isinstance(config, PretrainConfig):
            assert isinstance(self.text, WordEncoder)
            modules["text"] = self.text
            stage = Pretrain(self.generator, self.conditioner, self.text, config)
            return stage, source, modules
        rollout = Rollout(self.generator, e.geometry, e.sigmas)
        run: RolloutFn = roll_out
        if self.device.type == "cuda" and not self.world.large:
            run = GraphedRollout(roll_out)
        if isinstance(config, DmdConfig):
            real = self._teacher_network(trained=False)
            fake = self._teacher_network(trained=True)
            modules["fake_score"] = fake
            return DmdWarmup(rollout, real, fake, self.conditioner, config, run), source, modules
        if e.discriminator.causal:
            backbone = copy.deepcopy(self.generator).requires_grad_(True)
        else:
            backbone = self._teacher_network(trained=True)
        critic = Discriminator(backbone, e.discriminator, e.geometry)
        modules["discriminator"] = critic.to(self.device)
        return Adversarial(rollout, critic, self.conditioner, config, run), source, modules

    def _trajectories(self, log: RunLog) -> Source:
        """Stage I's trajectories: sampled now on a small world, beforehand for Wan."""
        e = self.experiment
        if isinstance(self.world, WanWorld):
            return self.world.trajectories(e.sigmas)
        assert self.teacher is not None
        states, captions = trajectories(
            self.teacher, self.conditioner, self.world.train(), e.sigmas, e.trajectories,
            self.folder.parent / "trajectories", log, bf16=self.bf16,
        )  # fmt: skip
        return ShardSource(states, captions, e.seed, self.device, trajectory=True)

    # -- training -------------------------------------------------------------------------

    def train(self) -> Path:
        """Train to the end (continuing an interrupted run) and write the final model."""
        e = self.experiment
        self.folder.mkdir(parents=True, exist_ok=True)
        if e.compile:
            _compile_blocks()
        with RunLog(self.folder, e.name, e.optim.updates) as log:
            return self._train(log)

    def _train(self, log: RunLog) -> Path:
        e = self.experiment
        final = self.folder / "final"
        stage, source, modules = self._stage(log)
        averaged = tuple(n for n in ("generator", "text") if n in modules)
        trainer = Trainer(
            stage, source, modules, averaged, e.optim, seed=e.seed, device=self.device,
            bf16=self.bf16,
            critic_warmup=getattr(e.stage, "critic_warmup", 0),
        )  # fmt: skip
        if e.checkpoint_blocks:
            for module in modules.values():
                checkpoint_blocks(module)
        monitor = CollapseMonitor(e.monitor)
        before = self._resume(trainer, monitor, log)
        write_record(e, self.folder / "config.yaml")
        if self._ended and final.is_dir():
            log.say(
                f"{e.name} has ended ({self._ended}); model in {final}. To train on, remove "
                f"{self.folder} or choose another --name"
            )
            return final
        validation = Validation(self.world, e.monitor.clips)
        began = time.monotonic() - before
        reason = "the last update"
        sums = _Means()
        while trainer.update < e.optim.updates:
            if e.max_minutes:
                trainer.spent = (time.monotonic() - began) / (60 * e.max_minutes)
            sums.add(trainer.step())
            update = trainer.update
            log.advance(update)
            if update % e.log_every == 0 or update == e.optim.updates:
                log.values(update, sums.take())
            if self._watched and (update % e.monitor.every == 0 or update == 1):
                latents = self._rollouts(validation, self.pipeline(trainer))
                values = validation.measure(validation.decode(latents))
                if isinstance(stage, Adversarial):
                    real = validation.batch
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                        gap = stage.heldout_gap(
                            real.latents, latents, real.captions, validation.together
                        )
                    values["heldout_gap"] = float(gap)
                monitor.check(update, values["M"], trainer.ema["generator"])
                log.values(update, values, "monitor")
                if monitor.collapsed:
                    log.say(f"motion collapse: M {values['M']:.2f}, best {monitor.best:.2f}")
                    if e.monitor.early_stop:
                        reason = f"motion collapse at update {update}"
                        break
            if e.sample_every and update % e.sample_every == 0:
                self._sheet(validation, trainer, update)
            if update % e.checkpoint_every == 0:
                self._checkpoint(trainer, monitor, time.monotonic() - began)
            if trainer.spent >= 1:
                reason = f"max_minutes at update {update}"
                break
        self._checkpoint(trainer, monitor, time.monotonic() - began, ended=reason)
        if e.monitor.early_stop and monitor.collapsed and monitor.kept:
            trainer.ema["generator"].load_state_dict(monitor.kept["weights"])
            trainer.update = monitor.kept["update"]  # the model says how long it was trained
            reason += f", weights of update {trainer.update} (M {monitor.best:.2f}) kept"
        made = self._sheet(validation, trainer, trainer.update)
        log.values(trainer.update, validation.measure(made), "final")
        pipe = self.pipeline(trainer)
        pipe.info = replace(pipe.info, sha256=weights_hash(pipe.transformer))
        with replace_folder(final) as temporary:
            pipe.save_pretrained(temporary)
        log.say(f"{e.name} ended at {reason}; model in {final}")
        return final

    @property
    def _watched(self) -> bool:
        """Whether the collapse monitor runs: stages II and III roll out their own frames."""
        return self.stage_name in ("dmd", "aad") and self.experiment.monitor.every > 0

    def _identity(self) -> dict[str, Any]:
        """What must not change when a run continues."""
        plain = to_plain(self.experiment)
        keep = ("stage", "data", "model", "geometry", "sigmas", "discriminator", "seed")
        return {
            "kind": self.stage_name,
            "parent": self.parent.sha256 if self.parent else "",
            "teacher": self.teacher_info.sha256 if self.teacher_info else "",
            **{k: plain[k] for k in keep},
        }

    @property
    def _limits(self) -> list[float]:
        """What ends the run."""
        return [self.experiment.optim.updates, self.experiment.max_minutes]

    def _resume(self, trainer: Trainer, monitor: CollapseMonitor, log: RunLog) -> float:
        """Continue from the newest checkpoint if there is one; returns seconds trained before."""
        found = checkpoint.steps(self.folder)
        if not found:
            return 0.0
        state, meta = checkpoint.load(found[-1])
        for name, value in self._identity().items():
            if meta.get(name) != value:
                raise UserError(
                    f"{found[-1]} was made with {name} {meta.get(name)!r}, now it is {value!r}; "
                    f"remove {self.folder} or choose another --name"
                )
        trainer.restore(state["trainer"])
        monitor.restore(state["monitor"])
        # With other limits than before the run is meant to go on.
        if meta["ended"] and meta["limits"] == self._limits:
            self._ended = str(meta["ended"])
        else:
            log.say(f"continuing from {found[-1]}")
        return float(meta["seconds"])

    def _checkpoint(
        self, trainer: Trainer, monitor: CollapseMonitor, seconds: float, ended: str = ""
    ) -> None:
        meta = {
            **self._identity(),
            "ended": ended,
            "limits": self._limits,
            "seconds": round(seconds, 2),
            "hash": weights_hash(trainer.modules["generator"]),
        }
        state = {"trainer": trainer.state(), "monitor": monitor.state()}
        checkpoint.save(self.folder, trainer.update, state, meta)

    # -- what comes out -------------------------------------------------------------------

    def pipeline(self, trainer: Trainer) -> Pipeline:
        """The averaged generator with its codec and prompt encoder; not hashed."""
        e = self.experiment
        model = trainer.ema["generator"]
        assert isinstance(model, WanTransformer)
        text: Any = trainer.ema.get("text", self.text)
        height, width = self.world.size
        info = ModelInfo(
            world=self.world.name, width=width, height=height, fps=self.world.fps,
            stage=self.stage_name, updates=trainer.update,
            parent=_facts(self.parent), geometry=e.geometry, sigmas=e.sigmas,
            frames=self.world.frames,
        )  # fmt: skip
        return Pipeline(model, self.world.codec, text, info)

    def _rollouts(self, validation: Validation, pipeline: Pipeline) -> torch.Tensor:
        """Latents of what the model makes of the held-out first frames (or of none)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if self.stage_name != "teacher":
                return validation.rollouts(pipeline)
            latents = validation.batch.latents
            rng = torch.Generator(device=self.device).manual_seed(0)
            noise = torch.randn(latents.shape, generator=rng, device=self.device)
            text = Conditioner(pipeline.text, self.experiment.geometry)(
                validation.batch.captions, latents.shape[2]
            )
            t = self.experiment.trajectories
            x0, _ = sample(
                pipeline.transformer, noise, text, torch.zeros_like(text),
                steps=t.steps, shift=t.shift, guidance_scale=t.guidance_scale,
                image=latents[:, :, :1] if t.from_image else None,
            )  # fmt: skip
            return x0

    def _sheet(self, validation: Validation, trainer: Trainer, update: int) -> torch.Tensor:
        """Write real clips above generated ones, for the eye; returns the generated ones."""
        from aad1.media import contact_sheet

        made = validation.decode(self._rollouts(validation, self.pipeline(trainer)))
        rows: list[Any] = []
        captions: list[str] = []
        for i in range(min(6, len(made))):
            prompt = validation.batch.captions[i][-1]
            rows += [validation.video[i].cpu().numpy(), made[i].cpu().numpy()]
            captions += [f"real: {prompt}", f"{self.stage_name}, update {update}"]
        path = self.folder / "samples" / f"update-{update:06d}.png"
        with replace_file(path) as temporary:
            contact_sheet(rows, captions).save(temporary)
        return made


def checkpoint_blocks(module: nn.Module) -> None:
    """Have the transformer blocks inside run again in the backward pass (see the config's field).

    What a block is given, cached K and V included, is never written to, so the second run is the
    same. Call it last: a deep copy of the module would still run the first one's blocks.
    """
    for block in module.modules():
        if isinstance(block, Block):
            block.forward = _Checkpointed(block)  # type: ignore[method-assign, assignment]


class _Checkpointed:
    def __init__(self, block: Block) -> None:
        self.block = block

    def __call__(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return Block.forward(self.block, *args)
        return activation_checkpoint(
            Block.forward, self.block, *args, use_reentrant=False, preserve_rng_state=False
        )


@lru_cache(maxsize=1)
def _compile_blocks() -> None:
    """Compile the transformer block for this process, once for all networks that use it."""
    torch._dynamo.config.recompile_limit = 64
    Block.forward = torch.compile(Block.forward)  # type: ignore[method-assign]


class _Means:
    """Means of logged tensors since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}

    def add(self, logs: Mapping[str, torch.Tensor]) -> None:
        for name, value in logs.items():
            total, count = self._sums.get(name, (torch.zeros_like(value), 0))
            self._sums[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        out = {name: float(total) / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return out


def _facts(info: ModelInfo | None) -> dict[str, Any] | None:
    """The lineage of a model as plain data."""
    if info is None:
        return None
    parent = dict(info.parent) if info.parent else None
    return {"stage": info.stage, "updates": info.updates, "sha256": info.sha256, "parent": parent}


def _teacher_only(info: ModelInfo, folder: Path) -> ModelInfo:
    if info.stage != "teacher":
        raise UserError(f"{folder} holds stage {info.stage!r}, a teacher is needed")
    return info
