"""What VBench-I2V asks for (VBench at 45e79ec): dimensions, weights, prompts, file names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aad1.errors import UserError

SEEDS = 5  # videos per prompt
SIDE = 128  # below it RAFT's flow is NaN, and every video counts as static (tried at 64 and 96)
INFO = Path("vbench2_beta_i2v", "vbench2_i2v_full_info.json")

# Where VBench looks, with local=True. {cache}: VBENCH_CACHE_DIR; {hub}: torch.hub's folder;
# {root}: the checkout, which is the working folder.
_DINO = (
    "{cache}/dino_model/facebookresearch_dino_main/hubconf.py",
    "{cache}/dino_model/dino_vitbase16_pretrain.pth",  # only looked for
    "{hub}/checkpoints/dino_vitbase16_pretrain.pth",  # the one that is loaded
)
_CLIP_B = ("{cache}/clip_model/ViT-B-32.pt",)
_AMT = ("{cache}/amt_model/amt-s.pth",)
_RAFT = ("{cache}/raft_model/models/raft-things.pth",)
_AESTHETIC = (
    "{cache}/clip_model/ViT-L-14.pt",
    "{cache}/aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
)
_MUSIQ = ("{cache}/pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",)
_DREAMSIM = tuple(  # DreamSim 0.2's ensemble, which moves torch.hub's folder to ./models
    f"{{root}}/models/{name}"
    for name in (
        "dino_vitb16_pretrain.pth",
        "open_clip_vitb16_pretrain.pth.tar",
        "clip_vitb16_pretrain.pth.tar",
        "ensemble_lora",
        "facebookresearch_dino_main/hubconf.py",
        "checkpoints/dino_vitbase16_pretrain.pth",
    )
)


@dataclass(frozen=True)
class Dimension:
    """One of the paper's eight scores. prompts: how many the published JSON has for it."""

    name: str
    title: str
    prompts: int
    weights: tuple[str, ...]

    @property
    def module(self) -> str:
        """The Python module that computes it."""
        return f"{'vbench2_beta_i2v' if self.name.startswith('i2v_') else 'vbench'}.{self.name}"


# In the order of the paper's table.
DIMENSIONS = {
    d.name: d
    for d in (
        Dimension("subject_consistency", "Subj. cons.", 246, _DINO),
        Dimension("background_consistency", "Backg. cons.", 109, _CLIP_B),
        Dimension("motion_smoothness", "Motion smooth.", 246, _AMT),
        Dimension("dynamic_degree", "Dynamic deg.", 246, _RAFT),
        Dimension("aesthetic_quality", "Aesthetic", 355, _AESTHETIC),
        Dimension("imaging_quality", "Imaging", 355, _MUSIQ),
        Dimension("i2v_subject", "I2V subj.", 246, _DINO),
        Dimension("i2v_background", "I2V backg.", 109, _DREAMSIM),
    )
}


def choose_dimensions(names: Sequence[str]) -> list[str]:
    """The named dimensions in the table's order, all eight if none; UserError for another name."""
    for name in names:
        if name not in DIMENSIONS:
            raise UserError(f"dimension {name!r} must be one of {', '.join(DIMENSIONS)}")
    return [name for name in DIMENSIONS if name in names or not names]


@dataclass(frozen=True)
class Pair:
    """A prompt and its image, with those of the eight dimensions that use it."""

    prompt: str
    image: str
    dimensions: frozenset[str]


@dataclass(frozen=True)
class Places:
    """A VBench checkout and what it reads. All paths absolute."""

    root: Path
    cache: Path
    hub: Path
    ratio: str
    """Folder of the image crops, such as 26-15, which is exactly 832x480."""

    @property
    def images(self) -> Path:
        return self.root / "vbench2_beta_i2v" / "data" / "crop" / self.ratio

    def weights(self, dimension: str) -> list[Path]:
        """Every file or folder that the dimension's networks are read from."""
        where = dict(root=self.root, cache=self.cache, hub=self.hub)
        return [Path(path.format(**where)) for path in DIMENSIONS[dimension].weights]


def read_pairs(root: Path) -> list[Pair]:
    """The prompts of the eight dimensions, in the order of VBench's JSON (published: 355).

    UserError if the file is missing or of another form, or one prompt has two images.
    """
    path = root / INFO
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{path} does not exist: --vbench-root must be a git checkout of VBench (the wheel on "
            "PyPI lacks this file)"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    pairs: dict[str, Pair] = {}
    for entry in entries:
        try:
            dimensions = frozenset(entry["dimension"]) & DIMENSIONS.keys()
            if not dimensions:
                continue  # camera motion, which the paper leaves out
            pair = Pair(entry["prompt_en"], entry["image_name"], dimensions)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: an entry lacks {error}") from None
        before = pairs.setdefault(pair.prompt, pair)
        if before != pair or "/" in pair.prompt:
            raise UserError(f"{path}: the prompt {pair.prompt!r} cannot name one video file each")
    if not pairs:
        raise UserError(f"{path} has no prompt of any of the eight dimensions")
    return list(pairs.values())


def video_name(prompt: str, index: int) -> str:
    """VBench's name of the index-th video of a prompt."""
    return f"{prompt}-{index}.mp4"


def video_names(pairs: Iterable[Pair], seeds: int = SEEDS, dimension: str = "") -> list[str]:
    """Names of all videos, or of those that one dimension looks at."""
    return [
        video_name(pair.prompt, index)
        for pair in pairs
        if not dimension or dimension in pair.dimensions
        for index in range(seeds)
    ]


def departures(pairs: Sequence[Pair], seeds: int) -> list[str]:
    """How a set differs from the published one of 355 prompts x 5 videos; empty if it does not."""
    found = []
    for dimension in DIMENSIONS.values():
        count = sum(dimension.name in pair.dimensions for pair in pairs)
        if count != dimension.prompts:
            found.append(f"{dimension.name}: {count} prompts, published {dimension.prompts}")
    if seeds != SEEDS:
        found.append(f"{seeds} videos a prompt, published {SEEDS}")
    return found
