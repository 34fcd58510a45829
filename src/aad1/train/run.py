"""One training run from a config: build the stage, train, watch, save."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aad1.atomic import replace_file, replace_folder
from aad1.errors import UserError
from aad1.models.checkpoints import load_wan_transformer
from aad1.models.discriminator import Discriminator
from aad1.models.dit import WanTransformer
from aad1.models.text import WordEncoder, WordEncoderConfig
from aad1.parallel import mesh
from aad1.parallel.shard import collect, distribute
from aad1.pipeline import ModelInfo, Pipeline, pick_device, weights_hash
from aad1.rollout.graph import GraphedRollout
from aad1.rollout.stream import Rollout, RolloutFn
from aad1.rollout.teacher import sample
from aad1.stages.adversarial import Adversarial, AdversarialConfig
from aad1.stages.base import Conditioner, Stage, roll_out
from aad1.stages.dmd_warmup import DmdConfig, DmdWarmup
from aad1.stages.joint import Joint, JointConfig
from aad1.stages.ode_init import OdeInit, OdeInitConfig
from aad1.stages.pretrain import Pretrain, PretrainConfig
from aad1.train import checkpoint
from aad1.train.blocks import checkpoint_blocks, compile_blocks
from aad1.train.config import Experiment, WanData
from aad1.train.guard import StopFlag, Stopped, changes, only_run
from aad1.train.log import RunLog, SilentLog
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
    JointConfig: "joint",
}


class Run:
    """A training run: `Run(experiment).train()` returns the folder of the final model."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = e = experiment
        self.device = mesh.local_device(pick_device(e.device).type)
        self.processes = mesh.start(e.mesh, self.device)
        self.stop = StopFlag()
        with self.processes.together():
            self._build()

    def _build(self) -> None:
        e = self.experiment
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
            self._check_mesh()
            return
        self.world = open_world(e.data, e.seed, self.device)
        if self.stage_name == "teacher":
            self._fresh()
        else:
            self._from_parent()
        self.conditioner = Conditioner(self.text, e.geometry)
        self._check_mesh()

    # -- building -------------------------------------------------------------------------

    def _check_mesh(self) -> None:
        """UserError if clips or batches cannot be shared out as the mesh says."""
        e, shape = self.experiment, self.processes.shape
        mesh.share(e.optim.batch * e.optim.accumulate, e.optim.batch, shape.dp)
        _, p, q = self.generator.config.patch_size
        height, width = (side // self.world.codec.spatial_stride for side in self.world.size)
        tokens = height // p * (width // q)
        if tokens % shape.cp:
            raise UserError(f"cp={shape.cp} does not divide the {tokens} tokens of a latent frame")

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
        self.teacher = Pipeline.from_pretrained(folder, device=self.device, fast=False)
        self.teacher_info = _teacher_only(self.teacher.info, folder)
        start = Pipeline.from_pretrained(e.init or folder, device=self.device, fast=False)
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
        source = self.world.train(getattr(config, "rollout_frames", 0))
        if isinstance(config, PretrainConfig):
            assert isinstance(self.text, WordEncoder)
            modules["text"] = self.text
            stage = Pretrain(self.generator, self.conditioner, self.text, config)
            return stage, source, modules
        rollout = Rollout(self.generator, e.geometry, e.sigmas)
        run: RolloutFn = roll_out
        if self.device.type == "cuda" and not self.world.large and self.processes.size == 1:
            run = GraphedRollout(roll_out)
        if isinstance(config, DmdConfig):
            real = self._teacher_network(trained=False)
            fake = self._teacher_network(trained=True)
            modules["fake_score"] = fake
            distribute(real, self.processes)
            return DmdWarmup(rollout, real, fake, self.conditioner, config, run), source, modules
        if isinstance(config, JointConfig):
            fake_score = self._teacher_network(trained=True)
            judge = Discriminator(fake_score, e.discriminator, e.geometry).to(self.device)
            real = self._teacher_network(trained=False)
            modules["discriminator"] = judge
            distribute(real, self.processes)
            return Joint(rollout, real, judge, self.conditioner, config, run), source, modules
        if e.discriminator.causal:
            backbone = copy.deepcopy(self.generator).requires_grad_(True)
        else:
            backbone = self._teacher_network(trained=True)
        critic = Discriminator(backbone, e.discriminator, e.geometry)
        modules["discriminator"] = critic.to(self.device)
        stretch = self.world.frames if config.rollout_frames else None
        adversarial = Adversarial(rollout, critic, self.conditioner, config, run, stretch)
        return adversarial, source, modules

    def _trajectories(self, log: RunLog) -> Source:
        """Stage I's trajectories: sampled now on a small world, beforehand for Wan."""
        e = self.experiment
        if isinstance(self.world, WanWorld):
            return self.world.trajectories(e.sigmas)
        assert self.teacher is not None
        if not self.processes.main:
            self.processes.barrier()  # the first one samples them, the others read
        states, captions = trajectories(
            self.teacher, self.conditioner, self.world.train(), e.sigmas, e.trajectories,
            self.folder.parent / "trajectories", log, bf16=self.bf16,
        )  # fmt: skip
        if self.processes.main:
            self.processes.barrier()
        return ShardSource(states, captions, e.seed, self.device, trajectory=True)

    # -- training -------------------------------------------------------------------------

    def train(self) -> Path:
        """Train to the end (continuing an interrupted run) and write the final model.

        Stopped if a signal ended the run early, after a checkpoint.
        """
        e, main = self.experiment, self.processes.main
        if e.compile:
            compile_blocks()
        with ExitStack() as stack:
            with self.processes.together():
                if main:
                    stack.enter_context(only_run(self.folder))
            stack.enter_context(self.stop.listening())
            kind = RunLog if main else SilentLog
            return self._train(stack.enter_context(kind(self.folder, e.name, e.optim.updates)))

    def _train(self, log: RunLog) -> Path:
        e, main = self.experiment, self.processes.main
        final = self.folder / "final"
        stage, source, modules = self._stage(log)
        with self.processes.together():
            mesh.check_heads(self.processes.shape.cp, _heads(modules))
        averaged = tuple(n for n in ("generator", "text") if n in modules)
        trainer = Trainer(
            stage, source, modules, averaged, e.optim, seed=e.seed, device=self.device,
            bf16=self.bf16, critic_warmup=getattr(e.stage, "critic_warmup", 0),
            processes=self.processes, max_skipped=e.max_skipped, keep_gathered=e.keep_gathered,
            device_noise=e.device_noise,
        )  # fmt: skip
        if e.checkpoint_blocks:
            for module in modules.values():
                checkpoint_blocks(module)
        monitor = CollapseMonitor(e.monitor)
        before = self._resume(trainer, monitor, log)
        if main:
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
                spent = (time.monotonic() - began) / (60 * e.max_minutes)
                trainer.spent = float(self.processes.mean(torch.tensor(spent)))
            logs = trainer.step(stop=self._asked_to_stop)
            if logs is None:
                self._checkpoint(trainer, monitor, time.monotonic() - began)
                name = next(filter(None, self.processes.gather(self.stop.name)), "a signal")
                raise Stopped(
                    f"{e.name} stopped by {name} at update {trainer.update}, checkpoint written; "
                    "the same command goes on"
                )
            sums.add(logs)
            update = trainer.update
            log.advance(update)
            if update % e.log_every == 0 or update == e.optim.updates:
                log.values(update, sums.take())
            if self._watched and (update % e.monitor.every == 0 or update == 1):
                values = self._check(stage, validation, trainer)
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
        elif monitor.collapsed:
            last = monitor.history[-1][1]
            reason += f"; its motion has COLLAPSED (M {last:.2f}, best {monitor.best:.2f})"
        made = self._sheet(validation, trainer, trainer.update)
        if main:
            log.values(trainer.update, validation.measure(made), "final")
        self._write(trainer, final)
        log.say(f"{e.name} ended at {reason}; model in {final}")
        return final

    def _asked_to_stop(self) -> bool:
        """Whether a signal came, to any process."""
        return self.processes.any(bool(self.stop.name))

    def _check(self, stage: Stage, validation: Validation, trainer: Trainer) -> dict[str, float]:
        """The collapse monitor's figures; the same in all processes."""
        latents = self._rollouts(validation, self.pipeline(trainer))
        values: dict[str, float] = {}
        if self.processes.main:
            values = validation.measure(validation.decode(latents))
        if isinstance(stage, Adversarial | Joint):
            real = validation.batch
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                gap = stage.heldout_gap(real.latents, latents, real.captions, validation.together)
            values["heldout_gap"] = float(gap)
        found: dict[str, float] = self.processes.gather(values)[0]
        return found

    def _write(self, trainer: Trainer, final: Path) -> None:
        """The model that the run was for, written by the first process."""
        pipe = self.pipeline(trainer)
        if self.processes.size > 1:
            weights = [collect(trainer.ema[n], self.processes) for n in trainer.ema]
            if not self.processes.main:
                return
            for name, tensors in zip(trainer.ema, weights, strict=True):
                if name == "text":
                    assert isinstance(pipe.text, WordEncoder)
                    pipe.text = _filled(WordEncoder, pipe.text.config, tensors)
                else:
                    pipe.transformer = _filled(WanTransformer, pipe.transformer.config, tensors)
        pipe.info = replace(pipe.info, sha256=weights_hash(pipe.transformer))
        with replace_folder(final) as temporary:
            pipe.save_pretrained(temporary)

    @property
    def _watched(self) -> bool:
        """Whether the collapse monitor runs: stages II and III roll out their own frames."""
        return self.stage_name in ("dmd", "aad", "joint") and self.experiment.monitor.every > 0

    def _identity(self) -> dict[str, Any]:
        """What must not change when a run continues."""
        plain = to_plain(self.experiment)
        return {
            "kind": self.stage_name,
            "parent": self.parent.sha256 if self.parent else "",
            "teacher": self.teacher_info.sha256 if self.teacher_info else "",
            "model": plain["model"],
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
        with self.processes.together():
            meta = checkpoint.read_meta(found[-1])
            self._same_run(found[-1], meta)
        stored = checkpoint.shapes(found[-1])
        kept = {n: torch.zeros_like(w) for n, w in trainer.ema["generator"].state_dict().items()
                if f"kept.{n}" in stored}  # fmt: skip
        extra = {f"kept.{n}": w for n, w in kept.items()}
        trainer.restore(
            meta["counters"], stored,
            lambda tensors: checkpoint.load(found[-1], tensors | extra, self.processes),
        )  # fmt: skip
        monitor.restore(meta["monitor"])
        if kept:
            monitor.kept = {"update": meta["kept_update"], "weights": kept}
        # With other limits than before the run is meant to go on.
        if meta["ended"] and meta["limits"] == self._limits:
            self._ended = str(meta["ended"])
        else:
            log.say(f"continuing from {found[-1]}")
        return float(meta["seconds"])

    def _same_run(self, folder: Path, meta: Mapping[str, Any]) -> None:
        """UserError if a checkpoint is another run's, or its settings changed without a flag."""
        for name, value in self._identity().items():
            if meta.get(name) != value:
                raise UserError(
                    f"{folder} was made with {name} {meta.get(name)!r}, now it is {value!r}; "
                    f"remove {self.folder} or choose another --name"
                )
        changed = changes(meta["config"], to_plain(self.experiment))
        if changed and not self.experiment.accept_changes:
            raise UserError(
                f"{folder} was made with other settings ({'; '.join(changed)}); give "
                "--accept-changes to go on with the new ones"
            )

    def _checkpoint(
        self, trainer: Trainer, monitor: CollapseMonitor, seconds: float, ended: str = ""
    ) -> None:
        tensors, kept = trainer.tensors(), monitor.kept
        if kept:
            tensors |= {f"kept.{n}": w for n, w in kept["weights"].items()}
        meta = {
            **self._identity(),
            "update": trainer.update,
            "counters": trainer.counters(),
            "monitor": {k: v for k, v in monitor.state().items() if k != "kept"},
            "kept_update": kept["update"] if kept else None,
            "config": to_plain(self.experiment),
            "ended": ended,
            "limits": self._limits,
            "seconds": round(seconds, 2),
            "processes": self.processes.size,
            "torch": torch.__version__,
        }
        if self.processes.size == 1:
            meta["hash"] = weights_hash(trainer.modules["generator"])
        folder = checkpoint.step_folder(self.folder, trainer.update, trainer.turn)
        checkpoint.save(folder, tensors, meta, self.processes)

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
                return validation.rollouts(pipeline, self.processes)
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
        """Write real clips above generated ones, for the eye; returns the generated ones, to the
        first process (which alone decodes them)."""
        from aad1.media import contact_sheet

        made = self._rollouts(validation, self.pipeline(trainer))
        if not self.processes.main:
            return made
        made = validation.decode(made)
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


def _heads(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Attention heads by role (a real score has those of the fake one)."""
    return {
        role: part.config.num_attention_heads
        for role, module in modules.items()
        for part in module.modules()
        if isinstance(part, WanTransformer)
    }


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


def _teacher_only(info: ModelInfo, folder: Path) -> ModelInfo:
    if info.stage != "teacher":
        raise UserError(f"{folder} holds stage {info.stage!r}, a teacher is needed")
    return info
