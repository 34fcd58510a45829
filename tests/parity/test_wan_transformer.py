"""Our DiT against diffusers' `WanTransformer3DModel` with the same random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aad1.errors import UserError
from aad1.models.dit import WanConfig, WanTransformer

diffusers = pytest.importorskip("diffusers")

CONFIGS = [
    dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=48, num_layers=2, text_dim=16),
    dict(num_attention_heads=3, attention_head_dim=16, ffn_dim=32, num_layers=1, text_dim=8),
    dict(num_attention_heads=1, attention_head_dim=128, ffn_dim=64, num_layers=2, text_dim=32),
]


def reference(kwargs: dict[str, int]) -> torch.nn.Module:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(in_channels=16, out_channels=16, freq_dim=64, **kwargs)
    for p in model.parameters():  # default init leaves norms at 1 and biases at 0: hide nothing
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.mark.parametrize("kwargs", CONFIGS)
@pytest.mark.parametrize(
    "shape", [(2, 5, 6, 10), (1, 1, 2, 2), (3, 3, 10, 4), (2, 1, 14, 6), (2, 21, 6, 10)]
)
def test_forward_equals_diffusers(
    tmp_path: Path, kwargs: dict[str, int], shape: tuple[int, int, int, int]
) -> None:
    theirs = reference(kwargs)
    theirs.save_pretrained(tmp_path)
    ours = WanTransformer.from_pretrained(tmp_path)
    b, f, h, w = shape
    x = torch.randn(b, 16, f, h, w)
    sigma = torch.rand(b)
    text = torch.randn(b, 7, kwargs["text_dim"])
    with torch.no_grad():
        want = theirs(x, sigma * 1000, text, return_dict=False)[0]
        got = ours(x, sigma, text)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kwargs", [
    dict(num_attention_heads=4, attention_head_dim=32, ffn_dim=256, num_layers=4, text_dim=32),
    dict(num_attention_heads=2, attention_head_dim=128, ffn_dim=512, num_layers=2, text_dim=64),
])  # fmt: skip
@pytest.mark.parametrize("std", [0.05, 0.2])
def test_bf16_is_as_close_to_fp32_as_diffusers(
    tmp_path: Path, kwargs: dict[str, int], std: float
) -> None:
    """Relative L2 error against fp32: at most 1.1 times that of diffusers' own bf16."""
    exact = reference(kwargs)
    for p in exact.parameters():
        torch.nn.init.normal_(p, std=std)
    exact.save_pretrained(tmp_path)
    half = torch.bfloat16
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=half).eval()
    ours = WanTransformer.from_pretrained(tmp_path, half)
    assert ours.dtype == half
    x, text = torch.randn(2, 16, 5, 6, 10), torch.randn(2, 7, kwargs["text_dim"])
    sigma = torch.rand(2)

    def error(got: torch.Tensor) -> float:
        return float((got.float() - want).norm() / want.norm())

    with torch.no_grad():
        want = exact(x, sigma * 1000, text, return_dict=False)[0]
        peer = error(theirs(x.to(half), sigma * 1000, text.to(half), return_dict=False)[0])
        own = error(ours(x, sigma, text))
        plain = error(ours.to(half)(x, sigma, text))  # nothing kept in float32: what it would cost
    assert 1e-3 < own <= 1.1 * peer
    if std == 0.2:
        assert plain > own


def test_sigma_per_frame_equals_diffusers_timestep_per_token(tmp_path: Path) -> None:
    theirs = reference(CONFIGS[0])
    theirs.save_pretrained(tmp_path)
    ours = WanTransformer.from_pretrained(tmp_path)
    x, text = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 5, 16)
    sigma = torch.rand(2, 3)
    tokens = (sigma * 1000).repeat_interleave(2 * 3, dim=1)
    with torch.no_grad():
        want = theirs(x, tokens, text, return_dict=False)[0]
        got = ours(x, sigma, text)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_our_folder_loads_in_diffusers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = WanConfig(
        num_attention_heads=2, attention_head_dim=16, ffn_dim=32, num_layers=2, text_dim=8,
        freq_dim=32,
    )  # fmt: skip
    ours = WanTransformer(config).eval()
    ours.save_pretrained(tmp_path)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path).eval()
    x, text, sigma = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 3, 8), torch.rand(2)
    with torch.no_grad():
        want = theirs(x, sigma * 1000, text, return_dict=False)[0]
        torch.testing.assert_close(ours(x, sigma, text), want, atol=1e-5, rtol=1e-5)


def test_sharded_folder_loads(tmp_path: Path) -> None:
    theirs = reference(CONFIGS[0])
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = WanTransformer.from_pretrained(tmp_path)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, atol=0, rtol=0)


def test_gradients_equal_diffusers(tmp_path: Path) -> None:
    theirs = reference(CONFIGS[0])
    theirs.save_pretrained(tmp_path)
    ours = WanTransformer.from_pretrained(tmp_path)
    x, text, sigma = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 3, 16), torch.rand(2)
    (theirs(x, sigma * 1000, text, return_dict=False)[0] ** 2).mean().backward()
    (ours(x, sigma, text) ** 2).mean().backward()
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters() if p.grad is not None)
    for (name, p), (other, q) in zip(
        sorted(theirs.named_parameters()), sorted(ours.named_parameters()), strict=True
    ):
        assert name == other
        torch.testing.assert_close(q.grad, p.grad, atol=1e-5 * largest, rtol=1e-4)


def test_bad_shapes_name_the_value(tmp_path: Path) -> None:
    model = WanTransformer(WanConfig(num_attention_heads=1, attention_head_dim=8, ffn_dim=8,
                                     num_layers=1, text_dim=4, freq_dim=8))  # fmt: skip
    with pytest.raises(UserError, match="3 channels"):
        model(torch.zeros(1, 3, 1, 4, 4), torch.zeros(1), torch.zeros(1, 2, 4))
    with pytest.raises(UserError, match="5x4"):
        model(torch.zeros(1, 16, 1, 5, 4), torch.zeros(1), torch.zeros(1, 2, 4))
