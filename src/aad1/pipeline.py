"""What a user holds: an image and a prompt in, frames out, as they are made.

A pipeline folder holds everything that generation needs, in open formats:

    model_index.json   world, size, frame rate, geometry, noise levels, lineage
    transformer/       the generator, a diffusers Wan folder
    codec/             the video codec
    text/              the prompt encoder
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import torch

from aad1.core.chunks import ChunkGeometry
from aad1.errors import UserError
from aad1.media import ImageLike, read_image
from aad1.models.codec import Codec, DecoderStream, load_codec
from aad1.models.dit import WanTransformer
from aad1.models.text import WordEncoder
from aad1.models.weights import read_json, write_json
from aad1.rollout.stream import Rollout, seeded_noise

INDEX = "model_index.json"
FORMAT = "aad1.pipeline.1"
STAGES = ("teacher", "ode", "dmd", "aad")
PACKAGED = Path(__file__).parent / "packaged"


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the weights are for and where they come from."""

    world: str
    width: int
    height: int
    fps: float
    stage: str
    """"teacher" (bidirectional, does not stream), "ode", "dmd" or "aad"."""
    updates: int = 0
    sha256: str = ""
    """Hash of the generator's weights."""
    parent: Mapping[str, Any] | None = None
    """The same facts of the model that training started from."""
    geometry: ChunkGeometry = ChunkGeometry()
    sigmas: tuple[float, ...] = (1.0,)
    frames: int = 21
    """Latent frames of a training clip."""
    extra: Mapping[str, Any] = dataclass_field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("width", "height", "frames"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.fps <= 0:
            raise UserError(f"fps must be above 0, got {self.fps}")
        if self.stage not in STAGES:
            raise UserError(f"stage must be one of {', '.join(STAGES)}, got {self.stage!r}")


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda or mps -> device; UserError if it is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name not in ("cpu", "cuda", "mps"):
        raise UserError(f"device must be auto, cpu, cuda or mps, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but no CUDA device is available")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps was asked for, but it is not available")
    return torch.device(name)


def weights_hash(model: torch.nn.Module) -> str:
    """sha256 over names and float32 values of all weights, in name order."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def packaged_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in PACKAGED.glob(f"*/{INDEX}"))


def find_model(name: str | Path) -> Path:
    """The folder of a packaged name, a folder, or a hub id (downloaded).

    UserError suggests the nearest packaged name.
    """
    if (Path(name) / INDEX).exists():
        return Path(name)
    if str(name) in packaged_models():
        return PACKAGED / str(name)
    if Path(name).is_dir():
        return Path(name)  # whoever opens it says what is missing
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "out/")):
        return _from_hub(str(name))
    near = difflib.get_close_matches(str(name), packaged_models(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise UserError(
        f"no model {str(name)!r}{hint} Packaged: {', '.join(packaged_models()) or 'none'}; "
        "or give a folder, or a hub id owner/name"
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name!r} is no folder and could not be fetched from the hub: {line}"
        ) from None


class Pipeline:
    """Image + prompt -> video, one pass of the generator per chunk."""

    def __init__(
        self, transformer: WanTransformer, codec: Codec, text: WordEncoder, info: ModelInfo
    ) -> None:
        for what, own, wanted in (
            ("the codec's latent channels", codec.latent_channels, transformer.config.in_channels),
            ("the prompt encoder's width", text.dim, transformer.config.text_dim),
        ):
            if own != wanted:
                raise UserError(f"{what} must be the transformer's {wanted}, got {own}")
        self.transformer, self.codec, self.text, self.info = transformer, codec, text, info

    # -- folders --------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Pipeline:
        """Load a packaged name ("doom", "sprites"), a folder, or a hub id.

        Raises UserError that names the file or key that is wrong.
        """
        folder = find_model(name)
        info = read_info(folder)
        device = torch.device(device)
        return cls(
            WanTransformer.from_pretrained(folder / "transformer", dtype, device),
            load_codec(folder / "codec", dtype=dtype, device=device),
            WordEncoder.from_pretrained(folder / "text").to(device).eval().requires_grad_(False),
            info,
        )

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a folder that `from_pretrained` reads; weights in `dtype`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The index goes last: a folder without one is not a model.
        self.transformer.save_pretrained(folder / "transformer", dtype)
        self.codec.save_pretrained(folder / "codec", dtype)
        self.text.save_pretrained(folder / "text")
        write_json(folder / INDEX, {"format": FORMAT, **asdict(self.info)})

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    # -- generation -----------------------------------------------------------------------

    @property
    def rollout(self) -> Rollout:
        """The generator with its geometry and noise levels. UserError for a teacher."""
        if self.info.stage == "teacher":
            raise UserError(
                "this model is a bidirectional teacher and cannot stream; "
                "distil it first (stages I to III)"
            )
        return Rollout(self.transformer, self.info.geometry, self.info.sigmas)

    @torch.no_grad()
    def encode_image(self, image: ImageLike) -> torch.Tensor:
        """A picture -> latents [1, C, 1, h, w]: resized and centre-cropped to the model's size."""
        pixels = read_image(image, width=self.info.width, height=self.info.height)
        return self.codec.encode(pixels[None, None].to(self.device))

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        """A prompt -> text rows [1, S, D]."""
        return self.text([prompt])

    def stream(self, image: ImageLike, prompt: str, *, seed: int = 0) -> Stream:
        """Frames chunk by chunk for as long as one iterates; set `.prompt` to steer."""
        return Stream(self, self.encode_image(image), prompt, seed)

    def __call__(
        self, image: ImageLike, prompt: str, *, num_chunks: int = 5, seed: int = 0
    ) -> torch.Tensor:
        """A whole video, uint8 [1 + n x chunk x temporal stride, height, width, 3].

        Equal to the first `num_chunks` chunks of `stream` with the same seed.
        """
        if num_chunks < 1:
            raise UserError(f"num_chunks must be at least 1, got {num_chunks}")
        stream = self.stream(image, prompt, seed=seed)
        stream.chunks = num_chunks
        return torch.cat(list(stream))

    @torch.no_grad()
    def generate_latents(
        self,
        images: torch.Tensor,
        captions: Sequence[Sequence[str]],
        seeds: Sequence[int],
        chunks: int,
    ) -> torch.Tensor:
        """A batch of rollouts, image latents included: [B, C, 1 + n x chunk, h, w].

        images: latents [B, C, 1, h, w]; captions: per clip, one prompt per chunk as in
        `aad1.data.batch.Clips` (the last one repeats). Sample b equals the stream of its seed.
        """
        rollout = self.rollout
        shape = (images.shape[1], images.shape[3], images.shape[4])
        noise = seeded_noise(seeds, rollout.geometry, shape, images.device)

        def text(chunk: int) -> torch.Tensor:
            return self.text([c[min(chunk, len(c) - 1)] for c in captions])

        parts = list(rollout.stream(images, text, noise, chunks))
        return torch.cat([images, *parts], 2)


class Stream:
    """An iterator of uint8 frames [n, height, width, 3]; the first item has the image too.

    prompt: assign a new one at any time, it holds from the next chunk on.
    chunks: how many to make; None means endless. A chunk's cache pass runs only when the next
    chunk is asked for.
    """

    def __init__(self, pipeline: Pipeline, image: torch.Tensor, prompt: str, seed: int) -> None:
        self.pipeline, self.image, self.seed = pipeline, image, seed
        self.rollout = pipeline.rollout  # refuses a teacher now, not at the first chunk
        self.chunks: int | None = None
        self.decode_seconds = 0.0
        self._rows: dict[str, torch.Tensor] = {}
        self.prompt = prompt
        self._frames = self._run()

    @property
    def prompt(self) -> str:
        return self._prompt

    @prompt.setter
    def prompt(self, value: str) -> None:
        self._text(value)  # unknown words are reported now, not a chunk later
        self._prompt = value

    def _text(self, prompt: str) -> torch.Tensor:
        if prompt not in self._rows:
            self._rows[prompt] = self.pipeline.encode_prompt(prompt)
        return self._rows[prompt]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        return next(self._frames)

    def latents(self) -> Iterator[torch.Tensor]:
        """Clean latents chunk by chunk, without the image, not decoded."""
        rollout = self.rollout
        shape = (self.image.shape[1], self.image.shape[3], self.image.shape[4])
        noise = seeded_noise([self.seed], rollout.geometry, shape, self.image.device)
        return rollout.stream(self.image, lambda i: self._text(self.prompt), noise, self.chunks)

    def _run(self) -> Iterator[torch.Tensor]:
        decoder: DecoderStream = self.pipeline.codec.stream()
        first = True
        for x0 in self.latents():
            yield self._decode(decoder, torch.cat([self.image, x0], 2) if first else x0)
            first = False

    def _decode(self, decoder: DecoderStream, latents: torch.Tensor) -> torch.Tensor:
        import time

        begin = time.perf_counter()
        frames = decoder.decode(latents)[0].cpu()
        self.decode_seconds += time.perf_counter() - begin
        return frames


def read_info(folder: Path) -> ModelInfo:
    """model_index.json as a `ModelInfo`; UserError if it is missing or of another format."""
    if not (folder / INDEX).exists():
        raise UserError(f"{folder} is not a model: it has no {INDEX}")
    raw = read_json(folder / INDEX)
    if raw.pop("format", None) != FORMAT:
        raise UserError(f"{folder / INDEX} is not of format {FORMAT}")
    try:
        raw["geometry"] = ChunkGeometry(**raw["geometry"])
        raw["sigmas"] = tuple(float(sigma) for sigma in raw["sigmas"])
        return ModelInfo(**raw)
    except KeyError as error:
        raise UserError(f"{folder / INDEX} has no {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / INDEX}: {error}") from None
