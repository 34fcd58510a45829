"""The fast path of one model: its rollouts and its decoder, each made when first needed."""

from __future__ import annotations

import copy
import warnings
from functools import cached_property

import torch

from aad1.core.chunks import ChunkGeometry
from aad1.fast.config import FastConfig, default_config, usable
from aad1.fast.rollout import FastRollout, admits
from aad1.models.causal_codec import CausalCodec
from aad1.models.codec import Codec, DecoderStream
from aad1.models.dit import WanTransformer
from aad1.models.wan_codec import WanCodec
from aad1.models.wan_vae import FastWanVae
from aad1.rollout.stream import Rollout


class FastPath:
    """What a model streams with on the fast path. Its weights must not change any more.

    config: None takes what pays on the model's device. What cannot work there, or with `geometry`,
        is left out with one warning.
    """

    def __init__(
        self,
        transformer: WanTransformer,
        codec: Codec,
        geometry: ChunkGeometry,
        config: FastConfig | None = None,
    ) -> None:
        self.transformer, self.codec = transformer, codec
        device, own = transformer.device, transformer.config
        config = config or default_config(device, own.width)
        self.config = usable(config, device, geometry, own.width, own.ffn_dim)
        self._rollouts: dict[tuple[ChunkGeometry, tuple[float, ...]], FastRollout | None] = {}

    def rollout(self, plain: Rollout) -> FastRollout | None:
        """`plain` on the fast path; None with a geometry that it does not know (a warning says
        so)."""
        key = (plain.geometry, plain.sigmas)
        if key not in self._rollouts:
            made = None
            if admits(plain.geometry):
                made = FastRollout(self.transformer, *key, self.config)
            else:
                warnings.warn(
                    "the fast path is off: it needs positions that count from the visible frames "
                    "where there is a sink",
                    stacklevel=2,
                )
            self._rollouts[key] = made
        return self._rollouts[key]

    def decoder_stream(self) -> DecoderStream:
        """A decoder at the start of a video."""
        return self._decoder.stream()

    @cached_property
    def _decoder(self) -> Codec | FastWanVae:
        """This package's own of Wan's VAE, the light codec in bfloat16, or the codec as it is."""
        codec, config = self.codec, self.config
        if config.half_decoder and isinstance(codec, CausalCodec):
            return copy.deepcopy(codec).to(torch.bfloat16)
        if config.decoder and isinstance(codec, WanCodec):
            return FastWanVae.of(codec, compiled=config.compile_decoder, kernels=config.triton)
        return codec
