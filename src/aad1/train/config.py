"""What a training run is told: the world, the stage, the optimisation and the checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.models.discriminator import DiscriminatorConfig
from aad1.models.dit import WanConfig
from aad1.stages.adversarial import AdversarialConfig
from aad1.stages.dmd_warmup import DmdConfig
from aad1.stages.joint import JointConfig
from aad1.stages.ode_init import OdeInitConfig
from aad1.stages.pretrain import PretrainConfig
from aad1.worlds.sprites import SpritesConfig

StageConfig = PretrainConfig | OdeInitConfig | DmdConfig | AdversarialConfig | JointConfig


@dataclass(frozen=True, kw_only=True)
class SpritesData:
    """The drawn world, generated as training goes; no files."""

    world: SpritesConfig = SpritesConfig()
    stride: int = 8
    """Spatial stride of the pixel codec."""


@dataclass(frozen=True, kw_only=True)
class LatentData:
    """Clips encoded beforehand (`aad1 data encode`), read into memory once."""

    name: str = "doom"
    train: Path = Path("out/data/doom-latents")
    heldout: Path = Path("out/data/doom-heldout-latents")
    codec: Path = Path("out/doom-codec")
    fps: float = 16.0


@dataclass(frozen=True, kw_only=True)
class WanData:
    """Wan's latents and text embeddings, made beforehand and read clip by clip."""

    train: Path = Path("out/data/wan")
    """Clips (`aad1 data videos`), or trajectories, whose end points then are the clips."""
    heldout: Path = Path("out/data/wan-heldout")
    """Clips that are watched, not trained on; again either kind."""
    trajectories: Path = Path("out/data/wan-trajectories")
    """Stage I's trajectories (`aad1 data trajectories` or `aad1 data lmdb`)."""
    base: Path = Path("models/Wan2.1-T2V-1.3B-Diffusers")
    """Folder with Wan's codec (`vae/`)."""
    fps: float = 16.0
    width: int = 832
    """Of a frame in pixels: what `--dry-run` reckons with; training takes it from the clips."""
    height: int = 480
    frames: int = 21
    """Latent frames of a clip; as `width`."""


DataConfig = SpritesData | LatentData | WanData


@dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """How stage I's teacher trajectories are sampled."""

    clips: int = 1024
    steps: int = 24
    """Euler steps; a multiple of 4 puts the two-step level on the grid."""
    shift: float = 5.0
    guidance_scale: float = 1.5
    from_image: bool = False
    """Start from real first frames, for a teacher that was trained with clean first frames among
    others (`stage.image_share`); otherwise the teacher draws its own, as Wan T2V does."""
    batch: int = 32

    def __post_init__(self) -> None:
        for name in ("clips", "steps", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"trajectories.{name} must be at least 1: {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisation of one run; an update is one generator update."""

    updates: int = 1000
    batch: int = 32
    """Clips per micro-batch."""
    accumulate: int = 1
    """Micro-batches per update."""
    optimizer: str = "adamw"
    """"adamw", or "muon" for the matrices inside the blocks (AdamW for the rest): learns a model
    from scratch in far fewer updates."""
    lr: float = 1e-4
    critic_lr: float = 1e-4
    heads_lr: float = 2e-4
    """Learning rate of the discriminator's heads and query tokens."""
    betas: tuple[float, float] = (0.9, 0.95)
    critic_betas: tuple[float, float] = (0.0, 0.99)
    weight_decay: float = 0.01
    warmup: int = 0
    """Updates over which the generator's learning rate rises from 0."""
    schedule: str = "constant"
    """"constant" or "cosine" (to a tenth of lr at the last update)."""
    clip: float = 1.0
    """Largest gradient norm of the generator; larger ones are scaled down, once per update."""
    critic_clip: float = 10.0
    ema: float = 0.99

    def __post_init__(self) -> None:
        for name in ("updates", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"optim.{name} must be at least 1, got {getattr(self, name)}")
        if self.lr <= 0 or self.critic_lr <= 0 or self.heads_lr <= 0:
            raise UserError(
                "optim learning rates must be above 0, got "
                f"{self.lr}, {self.critic_lr}, {self.heads_lr}"
            )
        if self.optimizer not in ("adamw", "muon"):
            raise UserError(f'optim.optimizer must be "adamw" or "muon", got {self.optimizer!r}')
        if not 0 <= self.ema < 1:
            raise UserError(f"optim.ema must be in [0, 1), got {self.ema}")
        if self.schedule not in ("constant", "cosine"):
            raise UserError(f'optim.schedule must be "constant" or "cosine", got {self.schedule!r}')


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """The collapse monitor: fixed validation rollouts against real clips."""

    every: int = 10
    """Updates between checks; 0 switches the monitor off."""
    clips: int = 32
    early_stop: bool = False
    """Stop when M stays below `fall` of its best for `patience` checks in a row (stage II)."""
    fall: float = 0.8
    patience: int = 3

    def __post_init__(self) -> None:
        if self.clips < 1 or self.every < 0 or self.patience < 1 or not 0 < self.fall < 1:
            raise UserError(
                "monitor needs clips >= 1, every >= 0, patience >= 1 and 0 < fall < 1, got "
                f"{self.clips}, {self.every}, {self.patience}, {self.fall}"
            )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run, whole; `config.yaml` in its folder is the record of it."""

    name: str
    stage: StageConfig
    data: DataConfig = field(default_factory=SpritesData)
    model: WanConfig = field(default_factory=WanConfig)
    """Architecture of a teacher that is trained from scratch; later stages inherit it."""
    text_length: int = 16
    geometry: ChunkGeometry = ChunkGeometry()
    sigmas: tuple[float, ...] = (1.0,)
    """Noise levels of the student, one pass each."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig(taps=(3, 5, 7))
    trajectories: TrajectoryConfig = TrajectoryConfig()
    optim: OptimConfig = OptimConfig()
    monitor: MonitorConfig = MonitorConfig()
    teacher: Path | None = None
    """Folder of the trained teacher (stages I to III)."""
    init: Path | None = None
    """Folder of the model that the student starts from (default: the teacher)."""
    out: Path = Path("out")
    """Runs are written to out/<name>."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: str = "auto"
    """auto (bf16 on CUDA, else fp32), fp32 or bf16: what autocast computes in."""
    compile: bool = False
    """Compile the transformer blocks (pays on long CUDA runs)."""
    cudnn_attention: bool = False
    """CUDA: take cuDNN's attention rather than the one that torch prefers, where it can be had."""
    checkpoint_blocks: bool = False
    """Keep only each block's input for the backward pass and run the block again there: memory of
    one block rather than all, for a third more work."""
    mesh: str = ""
    """How processes that torchrun started share the work, as in dp=4,cp=2 (groups that take
    different clips; processes that share a clip); with replicas=2 states are sharded within each of
    two halves. Empty: all dp. An update's batch is optim.batch x optim.accumulate clips on any."""
    keep_gathered: bool = True
    """Several processes: hold the generator's weights whole on each for the length of a step (4
    bytes a weight) rather than gather them block by block for every pass of a rollout."""
    gather_bf16: bool = False
    """Several processes that compute in bf16: exchange the blocks' matrices in bf16 instead of
    float32 (half the traffic, and half of what `keep_gathered` holds). Where a step uses a weight
    twice, its gradients are added in bf16."""
    average_on_cpu: bool = False
    """Keep the average of the weights (4 bytes each) in the CPU's memory."""
    moments_on_cpu: bool = False
    """Keep the optimisers' moments (4 bytes a weight, or 8) in the CPU's memory. Both pass through
    the GPU part by part once an update: time against memory, with the same numbers."""
    max_skipped: int = 0
    """Steps in a row that may be left out because a loss or gradient is not finite."""
    accept_changes: bool = False
    """Continue a run although its settings differ from those of the checkpoint."""
    device_noise: bool = False
    """Draw noise on the training device: faster for small networks, other numbers than on a CPU."""
    prefetch: int = 2
    """Micro-batches that are read ahead where data comes from disk; 0: read when needed."""
    log_every: int = 10
    sample_every: int = 0
    """Updates between sample sheets; 0: at the end only."""
    checkpoint_every: int = 500
    max_minutes: float = 0.0
    """Stop (with a checkpoint) after so many minutes; 0: never."""

    def __post_init__(self) -> None:
        for name in ("log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("sample_every", "max_minutes", "max_skipped", "prefetch"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        s = self.sigmas
        if not s or s[0] != 1 or s[-1] <= 0 or any(a <= b for a, b in pairwise(s)):
            raise UserError(f"sigmas must start at 1 and fall towards 0, got {s}")

    @property
    def folder(self) -> Path:
        """Where this run writes."""
        return self.out / self.name
