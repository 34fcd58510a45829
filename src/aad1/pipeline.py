"""What a user holds: an image and a prompt in, frames out, as they are made.

A pipeline folder holds everything that generation needs, in open formats:

    model_index.json   world, size, frame rate, geometry, noise levels, lineage
    README.md          the same for people
    transformer/       the generator, a diffusers Wan folder
    codec/             the video codec
    text/              the prompt encoder

Wan 2.1's own weights, and generators made from it by others, are read too (`aad1.wan_folder`).
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from aad1.errors import UserError
from aad1.fast.config import FastConfig, default_config, usable
from aad1.fast.rollout import FastRollout, admits
from aad1.flags import check_size
from aad1.media import ImageLike, read_image
from aad1.model_info import FORMAT, INDEX, ModelInfo, read_info, write_card, write_info
from aad1.models.causal_codec import CausalCodec
from aad1.models.checkpoints import load_wan_transformer
from aad1.models.codec import Codec, DecoderStream, latent_frames, load_codec
from aad1.models.dit import WanTransformer
from aad1.models.offload import offload_blocks
from aad1.models.text import TextEncoder, WordEncoder
from aad1.models.tiny_decoder import TinyDecoder, load_tiny_decoder
from aad1.models.umt5 import CLASS_NAMES, Umt5Encoder, WeightsChoice
from aad1.models.wan_codec import WanCodec
from aad1.models.wan_vae import FastWanVae
from aad1.models.weights import read_json
from aad1.rollout.stream import Rollout, seeded_noise
from aad1.rollout.teacher import Sampling, sample
from aad1.streaming import Stream
from aad1.wan_folder import few_step_sigmas, is_wan, load_wan

__all__ = [
    "FORMAT", "INDEX", "ModelInfo", "Pipeline", "Stream", "find_model", "pick_device", "read_info",
]  # fmt: skip
PACKAGED = Path(__file__).parent / "packaged"
DECODED_AT_ONCE = 4  # latent frames of a sampled clip, so that a long one fits in memory


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
    if Path(name).exists():
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
    """Image + prompt -> video, one pass of the generator per chunk and noise level."""

    def __init__(
        self, transformer: WanTransformer, codec: Codec, text: TextEncoder, info: ModelInfo
    ) -> None:
        for what, own, wanted in (
            ("the codec's latent channels", codec.latent_channels, transformer.config.in_channels),
            ("the prompt encoder's width", text.dim, transformer.config.text_dim),
        ):
            if own != wanted:
                raise UserError(f"{what} must be the transformer's {wanted}, got {own}")
        self.transformer, self.codec, self.text, self.info = transformer, codec, text, info
        self.offloaded = False
        self._fast: FastConfig | None = None
        self._fast_rollouts: dict[tuple[object, ...], FastRollout | None] = {}
        self._fast_vae: FastWanVae | None = None
        self._half_codec: CausalCodec | None = None
        self.tiny_decoder: TinyDecoder | None = None

    # -- folders --------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        base: str | Path | None = None,
        recipe: str | None = None,
        steps: int | None = None,
        text_cache: str | Path | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
        weights: str = "",
        offload: bool = False,
        fast: FastConfig | bool | None = None,
        decoder: str | Path | None = None,
        single_pass: bool = False,
    ) -> Pipeline:
        """Load a packaged name ("doom", "sprites"), a folder, or a hub id.

        base: Wan 2.1's folder, for what a generator by itself lacks (codec, prompt encoder).
        recipe: how a generator that does not say so is rolled out; see `wan_folder.RECIPES`.
        steps: 1, 2 or 4 network passes per chunk instead of the model's own number.
        text_cache: folder that keeps encoded prompts (Wan's prompt encoder is large).
        loras: (file, scale), merged into the transformer.
        weights: which state dict of a .pt that holds several; the moving average by default.
        offload: keep the transformer's blocks in host memory, two at a time on the CUDA device,
            and the prompt encoder there only while it encodes; for models larger than the card.
        fast: stream on the fast path (see `speed_up`), or not; by default on CUDA and the CPU.
        decoder: a tiny decoder's file, used in place of Wan's own (see `use_tiny_decoder`).
        single_pass: see `use_single_pass`; a model that was trained so needs no word.

        Raises UserError that names the file or key that is wrong.
        """
        if offload and fast:
            raise UserError(
                "offload moves the blocks that the fast path keeps in place: choose one"
            )
        pipe = cls._load(
            name, device, dtype, base, recipe, steps, text_cache, loras, weights, offload
        )
        if single_pass:
            pipe.use_single_pass()
        if decoder is not None:
            pipe.use_tiny_decoder(decoder, dtype)
        on = (pipe.device.type in ("cuda", "cpu") and not offload) if fast is None else fast
        if on:
            pipe.speed_up(on if isinstance(on, FastConfig) else None)
        return pipe

    @classmethod
    def _load(
        cls,
        name: str | Path,
        device: str | torch.device,
        dtype: torch.dtype,
        base: str | Path | None,
        recipe: str | None,
        steps: int | None,
        text_cache: str | Path | None,
        loras: Sequence[tuple[str | Path, float]],
        weights: str,
        offload: bool,
    ) -> Pipeline:
        folder, device = find_model(name), torch.device(device)
        base = None if base is None else find_model(base)
        cache = None if text_cache is None else Path(text_cache)
        if offload and device.type != "cuda":
            raise UserError(
                f"offload is for CUDA devices smaller than the model; the device is {device}"
            )
        home = torch.device("cpu") if offload else device  # where the transformer is loaded
        if is_wan(folder):
            parts = load_wan(
                folder, base=base, recipe=recipe, steps=steps, device=device, dtype=dtype,
                text_cache=cache, loras=loras, weights=weights, transformer_device=home,
            )  # fmt: skip
            return cls(*parts)._offload(device) if offload else cls(*parts)
        info = read_info(folder)
        if weights:
            raise UserError(f"{folder} holds one set of weights; leave out weights={weights}")
        if recipe is not None:
            raise UserError(f"{folder} says itself how it is rolled out; leave out recipe={recipe}")
        if steps is not None:
            info = replace(info, sigmas=few_step_sigmas(steps))
        if loras:
            info = replace(info, sha256="")  # other weights than those
            transformer = load_wan_transformer(folder / "transformer", dtype, home, loras)
        else:
            transformer = WanTransformer.from_pretrained(folder / "transformer", dtype, home)
        pipe = cls(
            transformer,
            load_codec(folder / "codec", dtype=dtype, device=device),
            _load_text(folder / "text", base, device, dtype, cache),
            info,
        )
        return pipe._offload(device) if offload else pipe

    def _offload(self, device: torch.device) -> Pipeline:
        """See `from_pretrained`; the transformer is on the CPU before."""
        self.transformer = offload_blocks(self.transformer, device)
        self.offloaded = True
        return self

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        text: WeightsChoice = "copy",
    ) -> None:
        """Write a folder that `from_pretrained` reads; transformer and codec in `dtype`.

        text: whether Wan's large prompt encoder is copied, only referred to ("reference": by its
            place on this machine), or left out ("none": give `base` when loading).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.transformer.save_pretrained(folder / "transformer", dtype)
        self.codec.save_pretrained(folder / "codec", dtype)
        if isinstance(self.text, Umt5Encoder):
            self.text.save_pretrained(folder / "text", text)
        else:
            self.text.save_pretrained(folder / "text")
        write_card(folder, self.info, sum(p.numel() for p in self.transformer.parameters()))
        write_info(folder, self.info)  # last: a folder without an index is not a model

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    # -- inputs ---------------------------------------------------------------------------

    def check_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """(width, height) in pixels, the model's own if None; UserError if it cannot be."""
        chosen = size or (self.info.width, self.info.height)
        _, rows, columns = self.transformer.config.patch_size
        stride = self.codec.spatial_stride
        check_size(chosen, (stride * columns, stride * rows))
        return chosen

    @torch.no_grad()
    def encode_image(self, image: ImageLike, size: tuple[int, int] | None = None) -> torch.Tensor:
        """A picture -> latents [1, C, 1, h, w]: resized and centre-cropped to `size`."""
        width, height = self.check_size(size)
        pixels = read_image(image, width=width, height=height)
        return self.codec.encode(pixels[None, None].to(self.device))

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        """A prompt -> text rows [1, S, D]."""
        return self._encode([prompt])

    def _encode(self, prompts: Sequence[str]) -> torch.Tensor:
        rows = self.text(prompts).to(self.device)
        if self.offloaded:
            self.release_text()
        return rows

    def release_text(self) -> None:
        """Free the memory of a large prompt encoder; a prompt not seen before loads it again."""
        if isinstance(self.text, Umt5Encoder) and self.text.loaded:
            self.text.release()

    def frames(self, latents: int) -> int:
        """Video frames of that many latent frames."""
        return 1 + (latents - 1) * self.codec.temporal_stride

    # -- streaming ------------------------------------------------------------------------

    @property
    def rollout(self) -> Rollout:
        """The generator with its geometry and noise levels. UserError for a teacher."""
        self.info.check_streams()
        return Rollout(self.transformer, self.info.geometry, self.info.sigmas)

    def speed_up(self, config: FastConfig | None = None) -> None:
        """Stream on the fast path (`aad1.fast`) from now on: the same video, sooner.

        config: None takes what pays on this device. The weights must not change any more. What
        cannot work here is left out with one warning.
        """
        sizes = self.transformer.config.width, self.transformer.config.ffn_dim
        config = config or default_config(self.device, sizes[0])
        self._fast = usable(config, self.device, self.info.geometry, *sizes)
        self._fast_rollouts.clear()
        self._fast_vae = self._half_codec = None
        if self.tiny_decoder is not None:
            self.tiny_decoder.prepare(self._fast.compile_decoder)

    def fast_rollout(self, rollout: Rollout) -> FastRollout | None:
        """`rollout` on the fast path, made once; None without `speed_up`, or with a geometry that
        the fast path does not know (a warning says so)."""
        if self._fast is None:
            return None
        key = (rollout.geometry, rollout.sigmas)
        if key not in self._fast_rollouts:
            made = None
            if admits(rollout.geometry):
                made = FastRollout(self.transformer, *key, self._fast)
            else:
                warnings.warn(
                    "the fast path is off: it needs positions that count from the visible frames "
                    "where there is a sink",
                    stacklevel=2,
                )
            self._fast_rollouts[key] = made
        return self._fast_rollouts[key]

    def use_single_pass(self) -> None:
        """Stream without the pass over clean chunks (`ChunkGeometry.single_pass`): a trial, with a
        warning, unless the model was trained so. UserError for a teacher, which does not stream."""
        geometry = self.rollout.geometry  # refuses a teacher
        if geometry.single_pass:
            return
        warnings.warn(
            "this model was trained to read clean chunks: in a single pass it makes another video, "
            "of a quality that was not measured",
            stacklevel=2,
        )
        self.info = replace(self.info, geometry=replace(geometry, single_pass=True))

    def use_tiny_decoder(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Decode with a tiny decoder in TAEHV's layout from now on: sooner, and softer pictures.

        path: the user's file (`taew2_1`), .pth or .safetensors. It is no part of what
            `save_pretrained` writes, and whole clips (`Codec.decode`) keep the codec's own decoder.

        UserError unless the codec is Wan 2.1's, or for a file that does not fit.
        """
        if not isinstance(self.codec, WanCodec):
            raise UserError(
                f"a tiny decoder is for Wan 2.1's latents; this model has those of its own "
                f"{type(self.codec).__name__}: leave out decoder={path}"
            )
        tiny = load_tiny_decoder(path, dtype, self.device)
        for what in ("latent_channels", "temporal_stride", "spatial_stride"):
            own, wanted = getattr(tiny, what), getattr(self.codec, what)
            if own != wanted:
                raise UserError(f"{path}: {what} is {own}, the model's codec has {wanted}")
        self.tiny_decoder = tiny.prepare(self._fast is not None and self._fast.compile_decoder)

    def decoder_stream(self) -> DecoderStream:
        """A decoder at the start of a video: the tiny one if it was asked for; as the fast path has
        it, this package's own of Wan's VAE or the light codec's in bfloat16; or the codec's."""
        if self.tiny_decoder is not None:
            return self.tiny_decoder.stream()
        if (
            self._fast is not None
            and self._fast.half_decoder
            and isinstance(self.codec, CausalCodec)
        ):
            if self._half_codec is None:
                self._half_codec = copy.deepcopy(self.codec).to(torch.bfloat16)
            return self._half_codec.stream()
        if self._fast is None or not self._fast.decoder or not isinstance(self.codec, WanCodec):
            return self.codec.stream()
        if self._fast_vae is None:
            compiled = self._fast.compile_decoder
            self._fast_vae = FastWanVae.of(self.codec, compiled=compiled)
        return self._fast_vae.stream()

    def stream(
        self,
        image: ImageLike | None,
        prompt: str,
        *,
        seed: int = 0,
        size: tuple[int, int] | None = None,
    ) -> Stream:
        """Frames chunk by chunk for as long as one iterates; set `.prompt` to steer.

        image: what the video begins with, or None for a model that makes that itself.
        size: (width, height); None takes the model's own.
        """
        self.rollout  # noqa: B018 - refuses a teacher before anything is encoded
        width, height = self.check_size(size)
        if image is None:
            if not self.info.text_to_video:
                raise UserError("this model continues an image: give one (--image)")
            return Stream(self, None, prompt, seed, size=(width, height))
        return Stream(self, self.encode_image(image, (width, height)), prompt, seed)

    def __call__(
        self,
        image: ImageLike | None,
        prompt: str,
        *,
        num_chunks: int = 5,
        seed: int = 0,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """A whole video, uint8 [1 + n x chunk x temporal stride, height, width, 3].

        Equal to the first `num_chunks` chunks of `stream` with the same seed.
        """
        if num_chunks < 1:
            raise UserError(f"num_chunks must be at least 1, got {num_chunks}")
        stream = self.stream(image, prompt, seed=seed, size=size)
        stream.chunks = num_chunks
        return torch.cat(list(stream))

    # -- sampling a teacher ---------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompt: str,
        *,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        sampling: Sampling | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """A whole clip from a teacher, uint8 [frames, height, width, 3].

        frames: 1 + k x temporal stride; None takes the length of a training clip.
        sampling: steps, guidance and so on; None takes the model's own.
        on_step: called with the number of steps done, after each.

        The noise of a seed is that of diffusers' WanPipeline with a CPU generator of this seed.
        """
        width, height = self.check_size(size)
        stride = self.codec.spatial_stride
        f = self.info.frames
        if frames is not None:
            f = latent_frames(frames, self.codec.temporal_stride)
        shape = (1, self.codec.latent_channels, f, height // stride, width // stride)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        latents = self.sample_latents([prompt], noise, sampling, on_step)
        tiny = self.tiny_decoder
        decoder = self.codec.stream() if tiny is None else tiny.stream()
        parts = [decoder.decode(part)[0].cpu() for part in latents.split(DECODED_AT_ONCE, 2)]
        return torch.cat(parts)

    @torch.no_grad()
    def sample_latents(
        self,
        prompts: Sequence[str],
        noise: torch.Tensor,
        sampling: Sampling | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Clean latents of a teacher for noise [B, C, F, h, w], of one prompt each."""
        if self.info.stage != "teacher":
            raise UserError(
                f"this model is distilled to {len(self.info.sigmas)} step(s) and streams; "
                "only a teacher is sampled in many"
            )
        chosen = sampling or self.info.sampling
        null = None
        if chosen.guidance != 1:
            rows = self._encode([*prompts, chosen.negative_prompt])
            text, null = rows[:-1], rows[-1:].expand_as(rows[:-1])
        else:
            text = self._encode(prompts)
        x0, _ = sample(
            self.transformer, noise.to(self.device), text, null,
            steps=chosen.steps, shift=chosen.shift, guidance_scale=chosen.guidance,
            solver_name=chosen.solver, on_step=on_step,
        )  # fmt: skip
        return x0

    # -- many at once ---------------------------------------------------------------------

    @torch.no_grad()
    def generate_latents(
        self,
        images: torch.Tensor,
        captions: Sequence[Sequence[str]],
        seeds: Sequence[int],
        chunks: int,
        rollout: Rollout | FastRollout | None = None,
    ) -> torch.Tensor:
        """A batch of rollouts, image latents included: [B, C, 1 + n x chunk, h, w].

        images: latents [B, C, 1, h, w]; captions: per clip, one prompt per chunk as in
        `aad1.data.batch.Clips` (the last one repeats). Sample b equals the stream of its seed.
        rollout: another than the plain one.
        """
        rollout = rollout or self.rollout
        shape = (images.shape[1], images.shape[3], images.shape[4])
        noise = seeded_noise(seeds, rollout.geometry, shape, images.device)

        def text(chunk: int) -> torch.Tensor:
            return self._encode([c[min(chunk, len(c) - 1)] for c in captions])

        parts = list(rollout.stream(images, text, noise, chunks))
        return torch.cat([images, *parts], 2)


def _load_text(
    folder: Path, base: Path | None, device: torch.device, dtype: torch.dtype, cache: Path | None
) -> TextEncoder:
    """The prompt encoder that `folder` holds, or that of `base` for one that was left out."""
    facts = read_json(folder / "config.json")
    if facts.get("_class_name") in CLASS_NAMES:
        home = folder if base is None or facts.get("encoder") else base
        return Umt5Encoder.from_pretrained(home, device=device, dtype=dtype, cache=cache)
    return WordEncoder.from_pretrained(folder).to(device).eval().requires_grad_(False)
