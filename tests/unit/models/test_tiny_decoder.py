"""The tiny decoder against a plain re-implementation of TAEHV's published semantics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from aad1.errors import UserError
from aad1.models.tiny_decoder import Grow, Memory, TinyDecoder, load_tiny_decoder
from aad1.pipeline import Pipeline

SMALL = (12, 10, 8, 6)
Weights = dict[str, Tensor]


def published_shapes(widths: tuple[int, ...] = (256, 128, 64, 64)) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the decoder's tensors in a `taew2_1` file."""
    a, b, c, d = widths
    shapes: dict[str, tuple[int, ...]] = {
        "decoder.1.weight": (a, 16, 3, 3), "decoder.1.bias": (a,),
        "decoder.7.conv.weight": (a, a, 1, 1), "decoder.8.weight": (b, a, 3, 3),
        "decoder.13.conv.weight": (2 * b, b, 1, 1), "decoder.14.weight": (c, b, 3, 3),
        "decoder.19.conv.weight": (2 * c, c, 1, 1), "decoder.20.weight": (d, c, 3, 3),
        "decoder.22.weight": (3, d, 3, 3), "decoder.22.bias": (3,),
    }  # fmt: skip
    for first, width in ((3, a), (9, b), (15, c)):
        for block in range(first, first + 3):
            for layer, d_in in ((0, 2 * width), (2, width), (4, width)):
                shapes[f"decoder.{block}.conv.{layer}.weight"] = (width, d_in, 3, 3)
                shapes[f"decoder.{block}.conv.{layer}.bias"] = (width,)
    return shapes


def random_weights(widths: tuple[int, ...] = SMALL) -> Weights:
    """Such that pixels lie around grey, some of them beyond black and white."""
    torch.manual_seed(0)
    weights = {
        name: torch.randn(shape) * (0.05 if len(shape) == 1 else (1.5 / np.prod(shape[1:])) ** 0.5)
        for name, shape in published_shapes(widths).items()
    }
    weights["decoder.22.weight"] *= 0.4
    weights["decoder.22.bias"] += 0.5
    return weights


def reference(weights: Weights, latents: Tensor) -> Tensor:
    """[B, 16, F, h, w] -> [B, 4 F - 3, 3, H, W] in [0, 1]: layer by layer over a list of frames."""

    def conv(x: Tensor, name: str) -> Tensor:
        weight, bias = weights[f"decoder.{name}.weight"], weights.get(f"decoder.{name}.bias")
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    frames = [torch.tanh(z / 3) * 3 for z in latents.unbind(2)]
    frames = [conv(x, "1").relu() for x in frames]
    for first, times in ((3, 1), (9, 2), (15, 2)):
        for block in range(first, first + 3):
            after = []
            for t, x in enumerate(frames):
                past = frames[t - 1] if t else torch.zeros_like(x)
                y = conv(torch.cat([x, past], 1), f"{block}.conv.0").relu()
                y = conv(y, f"{block}.conv.2").relu()
                after.append((conv(y, f"{block}.conv.4") + x).relu())
            frames = after
        frames = [F.interpolate(x, scale_factor=2.0, mode="nearest") for x in frames]
        grown = [conv(x, f"{first + 4}.conv").chunk(times, 1) for x in frames]
        frames = [conv(x, f"{first + 5}") for pair in grown for x in pair]
    return torch.stack([conv(x.relu(), "22") for x in frames], 1).clamp(0, 1)[:, 3:]


def latents(frames: int = 6, batch: int = 2) -> Tensor:
    return torch.randn(batch, 16, frames, 3, 4, generator=torch.Generator().manual_seed(1))


def levels(pixels: Tensor) -> Tensor:
    """[B, T, 3, H, W] in [0, 1] -> uint8 [B, T, H, W, 3]."""
    return (pixels * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)


def saved(path: Path, weights: Weights) -> Path:
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return path


@pytest.fixture
def decoder(tmp_path: Path) -> TinyDecoder:
    return load_tiny_decoder(saved(tmp_path / "tiny.pth", random_weights()))


def test_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        own = TinyDecoder().state_dict()
    assert {name: tuple(value.shape) for name, value in own.items()} == published_shapes()


@torch.no_grad()
def test_it_computes_what_was_published(decoder: TinyDecoder) -> None:
    z = latents()
    want = reference(random_weights(), z)
    assert float(((want > 0) & (want < 1)).float().mean()) > 0.2  # not all of it is clamped
    got = decoder.frames(z, decoder.memory(z))[:, 3:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (decoder.stream().decode(z).int() - levels(want).int()).abs().max() <= 1


@pytest.mark.parametrize("sizes", [(6,), (1, 1, 1, 1, 1, 1), (5, 1), (2, 3, 1)], ids=str)
def test_a_stream_equals_the_whole_clip(decoder: TinyDecoder, sizes: tuple[int, ...]) -> None:
    z = latents()
    with torch.no_grad():
        whole = levels(decoder.frames(z, decoder.memory(z))[:, 3:])
    stream = decoder.stream()
    parts = [stream.decode(part) for part in z.split(sizes, 2)]
    assert [p.shape[1] for p in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(sizes)]
    got = torch.cat(parts, 1)
    assert got.dtype == torch.uint8 and got.shape == (2, 21, 24, 32, 3)
    assert (got.int() - whole.int()).abs().max() <= 1
    assert float((got != whole).float().mean()) < 1e-3  # rounding alone


def test_memory_is_fixed_and_one_compiled_form_serves_all_frames(
    decoder: TinyDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from functools import partial

    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    want = decoder.stream().decode(latents())
    stream = decoder.prepare(compiled=True).stream()
    parts = [stream.decode(latents()[:, :, :1])]
    memory = stream._memory  # type: ignore[attr-defined]
    places = [x.data_ptr() for x in memory]
    assert len(places) == 9
    with torch.inference_mode():  # another mode over the same memory
        parts.append(stream.decode(latents()[:, :, 1:]))
    assert [x.data_ptr() for x in memory] == places
    assert 1 <= counter.frame_count <= 2  # a form for each mode, none for each frame
    assert (torch.cat(parts, 1).int() - want.int()).abs().max() <= 1
    torch._dynamo.reset()


def test_a_fork_goes_on_by_itself(decoder: TinyDecoder) -> None:
    z = latents()
    want = decoder.stream().decode(z)
    stream = decoder.stream()
    stream.decode(z[:, :, :2])
    twin = stream.fork()
    stream.decode(-z[:, :, 2:4])  # must leave no trace in the twin
    assert torch.equal(twin.decode(z[:, :, 2:]), want[:, 5:])


@torch.no_grad()
@pytest.mark.parametrize("bug", ["past", "order", "clamp", "trim"])
def test_planted_bugs_are_seen(
    decoder: TinyDecoder, bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = latents()
    want = levels(reference(random_weights(), z))
    if bug == "past":  # a block that forgets the frame before
        plain = Memory.forward
        monkeypatch.setattr(Memory, "forward", lambda s, x, past: plain(s, x, past.zero_()))
    elif bug == "order":  # frames of a pair swapped
        grow = Grow.forward
        monkeypatch.setattr(Grow, "forward", lambda s, x: grow(s, x).flip(1))
    elif bug == "clamp":
        monkeypatch.setattr(torch, "tanh", lambda x: x)
    got = decoder.stream().decode(z)
    if bug == "trim":
        memory = decoder.memory(z)
        got = levels(torch.cat([decoder.frames(x, memory) for x in z.split(1, 2)], 1)[:, :21])
    assert int((got.int() - want.int()).abs().max()) > 20


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny.pth", "tiny.safetensors"])
def test_files_are_read_whatever_else_they_hold(tmp_path: Path, name: str) -> None:
    """An encoder beside it, half precision, and a `grow` layer that could double the frames."""
    weights = random_weights()
    want = load_tiny_decoder(saved(tmp_path / "plain.pth", weights)).stream().decode(latents())
    more = {**weights, "encoder.0.weight": torch.randn(64, 3, 3, 3)}
    grow = weights["decoder.7.conv.weight"]
    more["decoder.7.conv.weight"] = torch.cat([torch.randn_like(grow), grow])  # the last rows count
    path = saved(tmp_path / name, more)
    assert torch.equal(load_tiny_decoder(path).stream().decode(latents()), want)
    half = saved(tmp_path / f"half-{name}", {k: v.half() for k, v in weights.items()})
    loaded = load_tiny_decoder(half)
    assert loaded.dtype == torch.float32
    assert (loaded.stream().decode(latents()).int() - want.int()).abs().max() <= 3
    assert load_tiny_decoder(path, torch.bfloat16).dtype == torch.bfloat16


def without(name: str) -> Callable[[Weights], None]:
    return lambda weights: weights.__delitem__(name)


def replaced(name: str, shape: tuple[int, ...]) -> Callable[[Weights], None]:
    return lambda weights: weights.__setitem__(name, torch.zeros(shape))


@pytest.mark.parametrize(
    "spoil,message",
    [
        (without("decoder.4.conv.2.bias"), r"1 missing \(decoder.4.conv.2.bias\)"),
        (without("decoder.22.weight"), r"1 missing \(decoder.22.weight\)"),
        (replaced("decoder.23.weight", (3, 3)), r"1 unexpected \(decoder.23.weight\)"),
        (
            replaced("decoder.1.weight", (12, 48, 3, 3)),
            r"decoder.1.weight is \[12, 48, 3, 3\], expected \[12, 16, 3, 3\]",
        ),
        (
            replaced("decoder.13.conv.weight", (10, 10, 1, 1)),
            r"decoder.13.conv.weight is \[10, 10, 1, 1\], expected \[20, 10, 1, 1\]",
        ),
        (replaced("decoder.22.weight", (12, 6, 3, 3)), r"is \[12, 6, 3, 3\], expected \[3, 6"),
        (lambda w: [w.pop(k) for k in list(w) if k.startswith("decoder.1.")] and None,
         "no tiny decoder in TAEHV's layout"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    tmp_path: Path, spoil: Callable[[Weights], None], message: str
) -> None:
    weights = random_weights()
    spoil(weights)
    for suffix in ("pth", "safetensors"):
        path = saved(tmp_path / f"bad.{suffix}", weights)
        with pytest.raises(UserError, match=message) as error:
            load_tiny_decoder(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (pytest.fail, ("code of the file was run",))


def test_no_code_of_a_file_is_run_and_damage_is_named(tmp_path: Path) -> None:
    torch.save({**random_weights(), "decoder.1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="could run any code, so it is refused"):
        load_tiny_decoder(tmp_path / "evil.pth")
    (tmp_path / "short.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="truncated or not a PyTorch file"):
        load_tiny_decoder(tmp_path / "short.pth")
    with pytest.raises(UserError, match="does not exist"):
        load_tiny_decoder(tmp_path / "none.pth")


# -- in a pipeline --------------------------------------------------------------------------------


def test_only_wans_latents_are_decoded(tiny_pipeline: Callable[..., Pipeline], tmp_path: Path
                                       ) -> None:  # fmt: skip
    path = saved(tmp_path / "tiny.pth", random_weights())
    with pytest.raises(UserError, match="Wan 2.1's latents; this model has those of its own Pixel"):
        tiny_pipeline().use_tiny_decoder(path)
    tiny_pipeline().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="leave out decoder="):
        Pipeline.from_pretrained(tmp_path / "model", decoder=path)


@pytest.mark.parametrize("fast", [False, True])
def test_a_pipeline_streams_through_it(
    tiny_pipeline: Callable[..., Pipeline], tmp_path: Path, fast: bool
) -> None:
    pytest.importorskip("diffusers")
    from aad1.models.wan_codec import WanCodec

    torch.manual_seed(0)
    pipe = tiny_pipeline(codec=WanCodec.from_config(base_dim=8, num_res_blocks=1), size=32)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    before = pipe(picture, "left", num_chunks=2)
    pipe.use_tiny_decoder(saved(tmp_path / "tiny.pth", random_weights()))
    if fast:
        pipe.speed_up()
    video = pipe(picture, "left", num_chunks=2)
    assert video.shape == before.shape
    image = pipe.encode_image(picture)
    whole = pipe.generate_latents(image, [["left"]], [0], 2)
    want = levels(reference(random_weights(), whole))[0]
    assert (video.int() - want.int()).abs().max() <= 1
