"""What a run works with, from its config: the world, the networks, the objective."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from aad1.errors import UserError
from aad1.model_info import ModelInfo
from aad1.models.discriminator import Discriminator
from aad1.models.dit import WanTransformer
from aad1.models.text import WordEncoder, WordEncoderConfig
from aad1.parallel import mesh
from aad1.parallel.load import load_discriminator, load_transformer
from aad1.parallel.shard import distribute
from aad1.pipeline import Pipeline
from aad1.rollout.graph import GraphedRollout
from aad1.rollout.stream import Rollout, RolloutFn
from aad1.stages.adversarial import Adversarial, AdversarialConfig
from aad1.stages.base import Conditioner, Stage, roll_out
from aad1.stages.dmd_warmup import DmdConfig, DmdWarmup
from aad1.stages.joint import Joint, JointConfig
from aad1.stages.ode_init import OdeInit, OdeInitConfig
from aad1.stages.pretrain import Pretrain, PretrainConfig
from aad1.train.config import Experiment, LatentData, SpritesData, WanData
from aad1.train.log import RunLog
from aad1.train.sources import ShardSource, Source, World, open_world
from aad1.train.trajectories import trajectories
from aad1.train.wan_world import StoredText, WanWorld, describe

STAGE_NAMES = {
    PretrainConfig: "teacher",
    OdeInitConfig: "ode",
    DmdConfig: "dmd",
    AdversarialConfig: "aad",
    JointConfig: "joint",
}


class Setup:
    """The generator with its world and prompt encoder; `stage` adds the other networks.

    UserError if the config asks for what cannot be.
    """

    def __init__(
        self, experiment: Experiment, processes: mesh.Processes, device: torch.device
    ) -> None:
        self.experiment = e = experiment
        self.device = device
        if e.precision not in ("auto", "fp32", "bf16"):
            raise UserError(f"precision must be auto, fp32 or bf16, got {e.precision!r}")
        self.bf16 = e.precision == "bf16" or (e.precision == "auto" and device.type == "cuda")
        if e.gather_bf16 and not self.bf16:
            raise UserError("gather_bf16 needs a run that computes in bf16 (precision)")
        self.processes = replace(processes, gather_bf16=e.gather_bf16)
        self.stage_name = STAGE_NAMES[type(e.stage)]
        torch.manual_seed(e.seed)
        self.world: World
        self.generator: WanTransformer
        self.text: WordEncoder | StoredText
        self.teacher: Pipeline | None = None
        """The whole of a small world's teacher; Wan's network is loaded where it is needed."""
        self.teacher_info: ModelInfo | None = None
        self.parent: ModelInfo | None = None
        if isinstance(e.data, WanData):
            self._from_wan(e.data)
        else:
            self.world = self._small_world(e.data)
            if self.stage_name == "teacher":
                self._fresh()
            else:
                self._from_parent()
            self.conditioner = Conditioner(self.text, e.geometry)
        self._check_mesh()

    def _check_mesh(self) -> None:
        """UserError if clips or batches cannot be shared out as the mesh says."""
        e, shape = self.experiment, self.processes.shape
        mesh.share(e.optim.batch * e.optim.accumulate, e.optim.batch, shape.dp)
        _, p, q = self.generator.config.patch_size
        height, width = (side // self.world.codec.spatial_stride for side in self.world.size)
        tokens = height // p * (width // q)
        if tokens % shape.cp:
            raise UserError(f"cp={shape.cp} does not divide the {tokens} tokens of a latent frame")

    def _small_world(self, data: SpritesData | LatentData) -> World:
        return open_world(data, self.experiment.seed, self.device)

    def _fresh(self) -> None:
        e = self.experiment
        channels = self.world.codec.latent_channels
        config = replace(e.model, in_channels=channels, out_channels=channels)
        self.generator = WanTransformer(config)
        self.generator.init_weights()
        self.text = WordEncoder(
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
        world.check_heldout(e.monitor.clips)  # now, not when the run's folder has been begun
        student = e.init or folder
        self.parent = describe(student)
        self.generator = load_transformer(student, torch.float32, self.device, self.processes)
        self.world, self.text = world, world.text
        if self.text.dim != self.generator.config.text_dim:
            raise UserError(
                f"text embeddings have width {self.text.dim}, {student} takes "
                f"{self.generator.config.text_dim}"
            )
        self.conditioner = world.conditioner(e.geometry)

    def _teacher_folder(self) -> Path:
        e = self.experiment
        if e.teacher is None:
            raise UserError(f"{e.name} needs --teacher, the folder of a trained teacher")
        return e.teacher

    def teacher_network(self, *, trained: bool) -> WanTransformer:
        """The teacher's network: frozen, or float32 weights of its own to be trained.

        Frozen, Wan's is in bfloat16 where that is what is computed in.
        """
        if self.teacher is not None:
            frozen = self.teacher.transformer
            return copy.deepcopy(frozen).requires_grad_(True) if trained else frozen
        dtype = torch.bfloat16 if self.bf16 and not trained else torch.float32
        folder = self._teacher_folder()
        with self.processes.together():
            return load_transformer(folder, dtype, self.device, self.processes, trained=trained)

    def stage(self, log: RunLog) -> tuple[Stage, Source, dict[str, nn.Module]]:
        """The objective, where its batches come from, and the networks to train by role."""
        e, config = self.experiment, self.experiment.stage
        modules: dict[str, nn.Module] = {"generator": self.generator}
        if isinstance(config, OdeInitConfig):
            ode = OdeInit(self.generator, self.conditioner, e.geometry, e.sigmas, config)
            return ode, self._trajectories(log), modules
        with self.processes.together():  # opens files
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
            real = self.teacher_network(trained=False)
            fake = self.teacher_network(trained=True)
            modules["fake_score"] = fake
            distribute(real, self.processes)
            return DmdWarmup(rollout, real, fake, self.conditioner, config, run), source, modules
        modules["discriminator"] = critic = self._discriminator()
        if isinstance(config, JointConfig):
            real = self.teacher_network(trained=False)
            distribute(real, self.processes)
            return Joint(rollout, real, critic, self.conditioner, config, run), source, modules
        config = config.settled(e.checkpoint_blocks)
        stretch = self.world.frames if config.rollout_frames else None
        adversarial = Adversarial(rollout, critic, self.conditioner, config, run, stretch)
        return adversarial, source, modules

    def _discriminator(self) -> Discriminator:
        """On the teacher's weights, or the student's if it is causal."""
        e = self.experiment
        if self.teacher is None:
            folder = self._teacher_folder()
            path = (e.init or folder) if e.discriminator.causal else folder
            with self.processes.together():
                return load_discriminator(
                    path, e.discriminator, e.geometry, self.device, self.processes
                )
        backbone = self.generator if e.discriminator.causal else self.teacher.transformer
        backbone = copy.deepcopy(backbone).requires_grad_(True)
        return Discriminator(backbone, e.discriminator, e.geometry).to(self.device)

    def _trajectories(self, log: RunLog) -> Source:
        """Stage I's trajectories: sampled now on a small world, beforehand for Wan."""
        e = self.experiment
        if isinstance(self.world, WanWorld):
            with self.processes.together():
                return self.world.trajectories(e.sigmas)
        assert self.teacher is not None
        if not self.processes.main:
            self.processes.barrier()  # the first one samples them, the others read
        states, captions = trajectories(
            self.teacher, self.conditioner, self.world.train(), e.sigmas, e.trajectories,
            e.folder.parent / "trajectories", log, bf16=self.bf16,
        )  # fmt: skip
        if self.processes.main:
            self.processes.barrier()
        return ShardSource(states, captions, e.seed, self.device, trajectory=True)


def heads(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Attention heads by role (a real score has those of the fake one)."""
    return {
        role: part.config.num_attention_heads
        for role, module in modules.items()
        for part in module.modules()
        if isinstance(part, WanTransformer)
    }


def _teacher_only(info: ModelInfo, folder: Path) -> ModelInfo:
    if info.stage != "teacher":
        raise UserError(f"{folder} holds stage {info.stage!r}, a teacher is needed")
    return info
