"""What a user holds: an image and a prompt in, frames out, as they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from aad1.errors import UserError
from aad1.fast.config import FastConfig
from aad1.fast.path import FastPath
from aad1.fast.rollout import FastRollout
from aad1.flags import check_size
from aad1.media.images import ImageLike, read_image
from aad1.model_folder import ModelParts, load_parts, save_parts
from aad1.model_info import ModelInfo
from aad1.model_names import find_model
from aad1.models.codec import Codec, DecoderStream, latent_frames
from aad1.models.dit import WanTransformer
from aad1.models.offload import offload_blocks
from aad1.models.text import TextEncoder
from aad1.models.tiny_decoder import TinyDecoder, load_tiny_decoder
from aad1.models.umt5 import Umt5Encoder, WeightsChoice
from aad1.models.wan_codec import WanCodec
from aad1.rollout.stream import Rollout, seeded_noise
from aad1.rollout.teacher import Sampling, sample_prompts
from aad1.streaming import Stream

DECODED_AT_ONCE = 4  # latent frames of a sampled clip, so that a long one fits in memory


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
        self._fast: FastPath | None = None
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

        Raises UserError that names the file or key that is wrong.
        """
        device = torch.device(device)
        if offload and fast:
            raise UserError(
                "offload moves the blocks that the fast path keeps in place: choose one"
            )
        if offload and device.type != "cuda":
            raise UserError(
                f"offload is for CUDA devices smaller than the model; the device is {device}"
            )
        parts = load_parts(
            find_model(name), base=None if base is None else find_model(base), recipe=recipe,
            steps=steps, device=device, dtype=dtype, text_cache=text_cache, loras=loras,
            weights=weights, transformer_device=torch.device("cpu") if offload else device,
        )  # fmt: skip
        pipe = cls(*parts)
        if offload:
            pipe._offload(device)
        if decoder is not None:
            pipe.use_tiny_decoder(decoder, dtype)
        on = (pipe.device.type in ("cuda", "cpu") and not offload) if fast is None else fast
        if on:
            pipe.speed_up(on if isinstance(on, FastConfig) else None)
        return pipe

    def _offload(self, device: torch.device) -> None:
        """See `from_pretrained`; the transformer is on the CPU before."""
        self.transformer = offload_blocks(self.transformer, device)
        self.offloaded = True

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
        parts = ModelParts(self.transformer, self.codec, self.text, self.info)
        save_parts(Path(folder), parts, dtype, text)

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

    def latent_shape(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """C, h, w of a latent frame of that size; UserError as `check_size`."""
        width, height = self.check_size(size)
        stride = self.codec.spatial_stride
        return self.codec.latent_channels, height // stride, width // stride

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
        self._fast = FastPath(self.transformer, self.codec, self.info.geometry, config)
        if self.tiny_decoder is not None:
            self.tiny_decoder.prepare(self._fast.config.compile_decoder)

    def fast_rollout(self, rollout: Rollout) -> FastRollout | None:
        """`rollout` on the fast path, made once; None without `speed_up`, or with a geometry that
        the fast path does not know (a warning says so)."""
        return None if self._fast is None else self._fast.rollout(rollout)

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
        compiled = self._fast is not None and self._fast.config.compile_decoder
        self.tiny_decoder = tiny.prepare(compiled)

    def decoder_stream(self) -> DecoderStream:
        """A decoder at the start of a video: the tiny one if it was asked for, else that of the
        fast path, else the codec's."""
        if self.tiny_decoder is not None:
            return self.tiny_decoder.stream()
        return self.codec.stream() if self._fast is None else self._fast.decoder_stream()

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
        self.check_size(size)
        if image is None:
            if not self.info.text_to_video:
                raise UserError("this model continues an image: give one (--image)")
            return Stream(self, None, prompt, seed, size=size)
        return Stream(self, self.encode_image(image, size), prompt, seed)

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
        self.info.check_samples()
        channels, height, width = self.latent_shape(size)
        f = self.info.frames
        if frames is not None:
            f = latent_frames(frames, self.codec.temporal_stride)
        shape = (1, channels, f, height, width)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        chosen = sampling or self.info.sampling
        latents = sample_prompts(self.transformer, self._encode, [prompt], noise, chosen, on_step)
        tiny = self.tiny_decoder
        decoder = self.codec.stream() if tiny is None else tiny.stream()
        parts = [decoder.decode(part)[0].cpu() for part in latents.split(DECODED_AT_ONCE, 2)]
        return torch.cat(parts)

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
