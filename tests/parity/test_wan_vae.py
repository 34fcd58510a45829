"""The streaming Wan VAE against diffusers' own, on tiny random autoencoders."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from aad1.errors import UserError
from aad1.models.wan_vae import FastWanVae
from aad1.models.wan_vae_layers import Causal, Upsample, WanVaeConfig

pytest.importorskip("diffusers")

from aad1.models.wan_codec import WanCodec


def build(**config: object) -> WanCodec:
    torch.manual_seed(0)
    codec = WanCodec.from_config(**(dict(base_dim=8, num_res_blocks=1) | config))
    for name, p in codec.vae.named_parameters():  # norms of one would hide a forgotten gamma
        if "gamma" in name:
            torch.nn.init.normal_(p, 1.0, 0.3)
    return codec


@pytest.fixture(scope="module")
def codec() -> WanCodec:
    return build()


def latents(frames: int = 5) -> Tensor:
    return torch.randn(2, 16, frames, 3, 4, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def pixels(vae: FastWanVae, z: Tensor, per_pass: int = 1) -> Tensor:
    first, memory = vae.first(z[:, :, :1])
    later = [vae.later(part, memory) for part in z[:, :, 1:].split(per_pass, 2)]
    return torch.cat([first, *later], 2)


@pytest.mark.parametrize("per_pass", [1, 2, 4])
@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(num_res_blocks=2, decoder_base_dim=12),
        dict(dim_mult=[1, 2, 2, 4], temperal_downsample=[True, False, True]),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["plain", "phases", "padded"])
@torch.no_grad()
def test_decode_equals_diffusers(config: dict[str, object], per_pass: int, form: str) -> None:
    codec = build(**config)
    z = latents()
    want = codec.vae.decode(codec._raw(z)).sample
    vae = FastWanVae.of(codec)
    for module in vae.decoder.modules():
        if isinstance(module, Upsample) and form == "plain":
            module.phases = None
    for module in vae.decoder.modules():
        if isinstance(module, Causal) and form == "padded":
            module.pad_channels(32)
    got = pixels(vae, z, per_pass).clamp(-1, 1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


KERNELS = """
import sys
import torch
import test_wan_vae as t
from aad1.models.wan_vae import FastWanVae
from aad1.models.wan_vae_layers import Causal, Residual

torch.set_grad_enabled(False)
device = sys.argv[1]
codec = t.build(base_dim=12)  # widths that are no power of two
z = t.latents()[:, :, :4, :2, :3]
want = t.pixels(FastWanVae.of(codec), z)
codec.to(device)
for per_pass, padded in ((1, True), (2, False), (3, True)):
    vae = FastWanVae.of(codec, kernels=True, compiled=device == "cuda" and padded)
    for module in vae.decoder.modules():
        if isinstance(module, Causal) and padded:
            module.pad_channels(16)
    got = t.pixels(vae, z.to(device), per_pass).cpu()
    torch.testing.assert_close(got, want, atol=*TOLERANCE*, rtol=*TOLERANCE*)
# Planted: what the convolution before left out is left out again.
vae = FastWanVae.of(codec, kernels=True)
for module in vae.decoder.modules():
    if isinstance(module, Residual):
        module.conv1.bias = None
assert (t.pixels(vae, z.to(device), 3).cpu() - want).abs().max() > 0.01
print("kernels agree")
"""


def kernels_agree(device: str, tolerance: str, **environment: str) -> None:
    pytest.importorskip("triton")
    paths = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", KERNELS.replace("*TOLERANCE*", tolerance), device],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "kernels agree", done.stderr[-2000:]


def test_norms_by_our_kernel_when_interpreted() -> None:
    kernels_agree("cpu", "1e-5", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_norms_by_our_kernel_on_cuda() -> None:
    kernels_agree("cuda", "5e-3")  # TF32 may be on


@torch.no_grad()
def test_an_enlarged_picture_by_phases() -> None:
    up = Upsample(6, False).double()
    x = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
    want = up(x, [])
    up.resample[1].weight.data = up.resample[1].weight.data.contiguous()
    up.split_phases()
    assert up.phases is not None and up.phases.dtype == torch.float64
    torch.testing.assert_close(up(x, []), want, atol=1e-12, rtol=1e-12)
    assert up(x, []).shape == (2, 3, 3, 8, 10)
    up.phases = up.phases.flip(2)  # a planted bug
    assert float((up(x, []) - want).abs().max()) > 0.01


@torch.no_grad()
def test_streams_equal_the_codecs_and_do_not_mix(codec: WanCodec) -> None:
    vae = FastWanVae.of(codec)
    z = latents(6)
    one, two, plain = vae.stream(), vae.stream(), codec.stream()
    for size in (1, 2, 3):
        part, z = z[:, :, :size], z[:, :, size:]
        got = one.decode(part)
        two.decode(-part)
        want = plain.decode(part)
        assert got.dtype == torch.uint8 and got.shape == want.shape
        assert (got.int() - want.int()).abs().max() <= 1


@torch.no_grad()
def test_a_fork_goes_on_by_itself(codec: WanCodec) -> None:
    stream, z = FastWanVae.of(codec).stream(), latents(6)
    stream.decode(z[:, :, :2])
    twin = stream.fork()
    stream.decode(-z[:, :, 2:4])  # must leave no trace in the twin
    plain = codec.stream()
    plain.decode(z[:, :, :2])
    want = plain.decode(z[:, :, 2:4])
    assert (twin.decode(z[:, :, 2:4]).int() - want.int()).abs().max() <= 1


@torch.no_grad()
def test_an_image_is_encoded_as_diffusers_does(codec: WanCodec) -> None:
    image = torch.randint(0, 256, (2, 1, 24, 32, 3), dtype=torch.uint8)
    vae = FastWanVae.of(codec)
    torch.testing.assert_close(vae.encode_image(image), codec.encode(image), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="single images"):
        vae.encode_image(image.repeat(1, 5, 1, 1, 1))


@torch.no_grad()
def test_memory_is_fixed_and_one_compiled_form_serves_all_frames(
    codec: WanCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    vae = FastWanVae.of(codec, compiled=True)
    z = latents()
    first, memory = vae.first(z[:, :, :1])
    places = [t.data_ptr() for t in memory.tensors]
    later = [vae.later(part, memory) for part in z[:, :, 1:].split(1, 2)]
    assert counter.frame_count == 1
    assert places == [t.data_ptr() for t in memory.tensors]
    got = torch.cat([first, *later], 2)
    torch.testing.assert_close(got, pixels(FastWanVae.of(codec), z), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("bug", ["memory", "first", "gamma"])
def test_planted_bugs_are_seen(codec: WanCodec, bug: str) -> None:
    vae, z = FastWanVae.of(codec), latents()
    first, memory = vae.first(z[:, :, :1])
    if bug == "memory":
        memory.tensors[3].zero_()
    elif bug == "first":  # time_conv must not have seen the first frame
        times = [i for i, t in enumerate(memory.tensors) if not t.any()]
        assert len(times) == 2
        memory.tensors[times[0]].fill_(0.5)
    else:
        vae.decoder.norm_out.gamma = torch.nn.Parameter(vae.decoder.norm_out.gamma * 1.01)
    got = torch.cat([first, vae.later(z[:, :, 1:], memory)], 2)
    want = codec.vae.decode(codec._raw(z)).sample
    assert float((got.clamp(-1, 1) - want).abs().max()) > 1e-4


def test_wan_22_is_refused_by_name() -> None:
    class Config:
        base_dim, z_dim, dim_mult, num_res_blocks = 8, 48, (1, 2), 1
        temperal_downsample = (True,)
        is_residual = True

    with pytest.raises(UserError, match="is_residual=True has no fast decoder"):
        WanVaeConfig.of(Config())


def test_defaults_have_wans_size() -> None:
    with torch.device("meta"):
        vae = FastWanVae()
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531
