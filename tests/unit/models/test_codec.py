"""Codecs: exact or causal round trips, streaming equal to whole decoding, clear errors."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import aad1
from aad1.errors import UserError
from aad1.models.causal_codec import CausalCodec, CausalCodecConfig, fold_time, unfold_time
from aad1.models.codec import Codec, PixelCodec, load_codec, to_pixels
from aad1.stages.codec_loss import (
    CodecLossConfig,
    CodecStage,
    PatchDiscriminator,
    codec_loss,
    psnr,
    sharpness_ratio,
)

ROOT = Path(__file__).parents[3]
PACKAGED = Path(aad1.__file__).parent / "packaged"
TINY = CausalCodecConfig(latent_channels=6, widths=(16, 12, 8, 8))


def video(frames: int = 9, height: int = 16, width: int = 24, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (batch, frames, height, width, 3), dtype=torch.uint8, generator=generator
    )


def moving_texture(batch: int = 8, frames: int = 9, size: int = 32) -> Tensor:
    """Smooth textures that pan at a constant speed."""
    generator = torch.Generator().manual_seed(1)
    phase = 6.28 * torch.rand(batch, 1, 1, 1, 3, generator=generator)
    speed = torch.randn(batch, 1, 1, 1, 1, generator=generator)
    time = torch.arange(frames).view(1, -1, 1, 1, 1) * speed
    rows = torch.arange(size).view(1, 1, -1, 1, 1)
    columns = torch.arange(size).view(1, 1, 1, -1, 1)
    wave = torch.sin(0.3 * (columns + time) + phase) * torch.cos(0.25 * rows + phase)
    return (127.5 * (1 + 0.8 * wave)).to(torch.uint8)


def tiny_codec() -> CausalCodec:
    """Random weights everywhere: the outputs that start at zero would hide mistakes."""
    torch.manual_seed(0)
    codec = CausalCodec(TINY).eval()
    for half in (codec.encoder, codec.decoder):
        torch.nn.init.normal_(half.conv_out.weight, std=0.1)
    codec.latents_mean.copy_(torch.linspace(-0.5, 0.5, 6))
    codec.latents_std.copy_(torch.linspace(0.5, 2.0, 6))
    return codec


def stream_pixels(codec: CausalCodec, latents: Tensor, sizes: list[int]) -> Tensor:
    state = codec.decoder.start()
    parts = []
    for part in latents.split(sizes, dim=2):
        pixels, state = codec.decode_step(part, state)
        parts.append(pixels)
    return torch.cat(parts, dim=2)[:, :, 3:]


@pytest.mark.parametrize("stride", [1, 2, 8])
def test_pixel_codec_is_lossless(stride: int) -> None:
    levels = torch.arange(256, dtype=torch.uint8).repeat(3 * 9)[: 9 * 16 * 16 * 3]
    clip = levels.reshape(1, 9, 16, 16, 3)
    codec = PixelCodec.fit(clip, stride)
    latents = codec.encode(clip)
    assert latents.shape == (1, 3 * stride**2, 9, 16 // stride, 16 // stride)
    assert float(latents.std()) == pytest.approx(0.9, abs=0.01)
    assert float(latents.mean()) == pytest.approx(0, abs=1e-4)
    assert torch.equal(codec.decode(latents), clip)
    stream = codec.stream()
    parts = [stream.decode(part) for part in latents.split(4, dim=2)]
    assert torch.equal(torch.cat(parts, dim=1), clip)


def test_pixel_codec_keeps_the_place_of_each_pixel() -> None:
    clip = video(1)
    latents = PixelCodec(8).encode(clip)
    # channel = (colour, row, column) within the 8 x 8 square, as of pixel_unshuffle
    pixel = to_pixels(clip)[1, 2, 0, 8 + 3, 16 + 5]
    assert latents[1, 2 * 64 + 3 * 8 + 5, 0, 1, 2] == pixel


def test_codecs_follow_the_protocol() -> None:
    assert isinstance(PixelCodec(), Codec)
    assert isinstance(tiny_codec(), Codec)


def test_fold_time_is_a_bijection_with_time_outermost() -> None:
    x = torch.arange(8 * 3 * 2 * 2.0).reshape(8, 3, 2, 2)
    folded = fold_time(x)
    assert folded.shape == (2, 12, 2, 2)
    assert torch.equal(folded[1, 3:6], x[5])
    assert torch.equal(unfold_time(folded), x)


def test_causal_codec_shapes() -> None:
    codec = tiny_codec()
    latents = codec.encode(video(9))
    assert latents.shape == (2, 6, 3, 2, 3)
    assert latents.dtype == torch.float32
    decoded = codec.decode(latents)
    assert decoded.shape == (2, 9, 16, 24, 3)
    assert decoded.dtype == torch.uint8


@torch.no_grad()
def test_encode_is_causal_and_an_image_is_latent_frame_0() -> None:
    codec = tiny_codec()
    pixels = to_pixels(video(13))
    latents, _ = codec.encode_pixels(pixels)
    for count in (1, 2, 3):
        part, _ = codec.encode_pixels(pixels[:, :, : 4 * count - 3])
        torch.testing.assert_close(part, latents[:, :, :count], atol=1e-5, rtol=0)
    changed = pixels.clone()
    changed[:, :, 5:] = 0
    other, _ = codec.encode_pixels(changed)
    torch.testing.assert_close(other[:, :, :2], latents[:, :, :2], atol=1e-5, rtol=0)
    # ... and later latent frames do see the past, beyond their own group.
    changed = pixels.clone()
    changed[:, :, 4] = 0
    other, _ = codec.encode_pixels(changed)
    assert (other[:, :, 2] - latents[:, :, 2]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [1, 4], [2, 3], [3, 1, 1]])
def test_causal_streaming_equals_whole_decoding(sizes: list[int]) -> None:
    codec = tiny_codec()
    latents = torch.randn(2, 6, 5, 2, 3, generator=torch.Generator().manual_seed(2))
    whole = codec.decode_pixels(latents)
    assert whole.shape == (2, 3, 17, 16, 24)
    torch.testing.assert_close(stream_pixels(codec, latents, sizes), whole, atol=1e-5, rtol=0)
    stream = codec.stream()
    frames = [stream.decode(part) for part in latents.split(sizes, dim=2)]
    assert [part.shape[1] for part in frames] == [4 * n - 3 * (i == 0) for i, n in enumerate(sizes)]
    difference = torch.cat(frames, 1).int() - codec.decode(latents).int()
    assert difference.abs().max() <= 1  # a value on the edge between two levels may round apart


@torch.no_grad()
def test_the_decoder_uses_its_past_and_streams_are_independent() -> None:
    codec = tiny_codec()
    latents = torch.randn(1, 6, 5, 2, 3, generator=torch.Generator().manual_seed(3))
    whole = codec.decode_pixels(latents)
    forgot = torch.cat([stream_pixels(codec, latents[:, :, :3], [3]), whole[:, :, 9:]], dim=2)
    torch.testing.assert_close(forgot[:, :, :9], whole[:, :, :9], atol=1e-5, rtol=0)
    fresh, _ = codec.decode_step(latents[:, :, 3:], codec.decoder.start())
    assert (fresh - whole[:, :, 9:]).abs().max() > 1e-3
    one, two = codec.stream(), codec.stream()
    first = one.decode(latents[:, :, :2])
    two.decode(-latents)
    rest = one.decode(latents[:, :, 2:])
    difference = torch.cat([first, rest], 1).int() - codec.decode(latents).int()
    assert difference.abs().max() <= 1


@torch.no_grad()
def test_batch_position_does_not_matter() -> None:
    codec = tiny_codec()
    clip = to_pixels(video(5, batch=3))
    latents, _ = codec.encode_pixels(clip)
    alone, _ = codec.encode_pixels(clip[2:])
    torch.testing.assert_close(alone, latents[2:], atol=1e-5, rtol=0)
    decoded = codec.decode_pixels(latents)
    torch.testing.assert_close(codec.decode_pixels(alone), decoded[2:], atol=1e-5, rtol=0)


def test_calibrate_normalises_and_leaves_the_reconstruction() -> None:
    codec = tiny_codec()
    clip = video(17)
    before = codec.decode(codec.encode(clip))
    codec.calibrate(codec.encode(clip))
    latents = codec.encode(clip)
    flat = latents.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(flat.std(1, correction=0), torch.ones(6), atol=1e-4, rtol=0)
    assert (codec.decode(latents).int() - before.int()).abs().max() <= 1
    with pytest.raises(UserError, match="constant"):
        codec.calibrate(torch.zeros(1, 6, 2, 2, 2))


def test_fit_linear_reconstructs_low_rank_video() -> None:
    """Video that is one colour per frame group has 3 components: 6 channels hold it."""
    torch.manual_seed(0)
    codec = CausalCodec(TINY)
    colours = torch.randint(0, 256, (16, 3, 1, 1, 3), dtype=torch.uint8)
    groups = colours.repeat_interleave(torch.tensor([1, 4, 4]), dim=1)
    clip = groups.expand(16, 9, 16, 16, 3).contiguous()
    noise = psnr(codec.decode(codec.encode(clip)), clip)
    codec.fit_linear(clip)
    assert noise < 20
    assert psnr(codec.decode(codec.encode(clip)), clip) > 45


def test_training_raises_psnr() -> None:
    torch.manual_seed(0)
    clip = moving_texture()
    codec = CausalCodec(CausalCodecConfig(latent_channels=4, widths=(32, 24, 16, 16)))
    codec.fit_linear(clip[:4])
    stage = CodecStage(codec, CodecLossConfig(noise=0.05))
    before = psnr(codec.decode(codec.encode(clip)), clip)
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3)
    for _ in range(40):
        loss, _ = stage.generator_loss(clip)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert psnr(codec.decode(codec.encode(clip)), clip) > before + 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_and_load(tmp_path: Path, dtype: torch.dtype) -> None:
    codec = tiny_codec()
    codec.save_pretrained(tmp_path / "codec", dtype)
    assert sorted(path.name for path in (tmp_path / "codec").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = load_codec(tmp_path / "codec")
    assert isinstance(loaded, CausalCodec)
    assert loaded.config == codec.config
    assert loaded.latents_std.tolist() == codec.latents_std.tolist()
    clip = video()
    tolerance = 0 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(loaded.encode(clip), codec.encode(clip), atol=tolerance, rtol=0)


def test_save_and_load_pixel_codec(tmp_path: Path) -> None:
    PixelCodec(4, mean=-0.1, std=0.3).save_pretrained(tmp_path)
    loaded = load_codec(tmp_path)
    assert isinstance(loaded, PixelCodec)
    assert (loaded.spatial_stride, loaded.mean, loaded.std) == (4, -0.1, 0.3)


@pytest.mark.parametrize(
    ("frames", "height", "width", "words"),
    [
        (9, 15, 24, ["height", "15", "8 or 16"]),
        (9, 16, 7, ["width", "7", "use 8"]),
        (8, 16, 24, ["8 frames", "5 and 9"]),
    ],
)
def test_a_wrong_size_names_the_nearest(
    frames: int, height: int, width: int, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        tiny_codec().encode(video(frames, height, width))
    assert all(word in str(caught.value) for word in words), caught.value


def test_wrong_latents_and_dtype_are_refused() -> None:
    codec = tiny_codec()
    with pytest.raises(UserError, match="6"):
        codec.decode(torch.zeros(1, 5, 1, 2, 3))
    with pytest.raises(UserError, match="uint8"):
        codec.encode(video().float())
    with pytest.raises(UserError, match="spatial_stride"):
        PixelCodec(0)
    with pytest.raises(UserError, match="widths"):
        CausalCodecConfig(widths=(16, 16, 16, 10))


@torch.no_grad()
def test_refinement_changes_nothing_until_it_is_trained_and_is_saved(tmp_path: Path) -> None:
    plain = tiny_codec()
    latents = torch.randn(2, 6, 3, 2, 3, generator=torch.Generator().manual_seed(4))
    refined = plain.with_refinement(4)
    assert torch.equal(refined.decode_pixels(latents), plain.decode_pixels(latents))
    assert torch.equal(refined.encode(video()), plain.encode(video()))
    torch.nn.init.normal_(refined.decoder.refine.conv2.weight, std=0.1)
    pixels = refined.decode_pixels(latents)
    assert (pixels - plain.decode_pixels(latents)).abs().max() > 1e-2
    parts = stream_pixels(refined, latents, [1, 2])
    torch.testing.assert_close(parts, pixels, atol=1e-5, rtol=0)
    refined.save_pretrained(tmp_path)
    loaded = load_codec(tmp_path)
    assert isinstance(loaded, CausalCodec)
    assert loaded.config.refine_width == 4
    assert torch.equal(loaded.decode_pixels(latents), pixels)
    with pytest.raises(UserError, match="refine_width 4"):
        refined.with_refinement(4)
    with pytest.raises(UserError, match="refine_width -1"):
        CausalCodecConfig(refine_width=-1)


def test_a_codec_saved_before_there_was_refinement_still_loads(tmp_path: Path) -> None:
    codec = tiny_codec()
    codec.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["refine_width"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    clip = video()
    assert torch.equal(load_codec(tmp_path).encode(clip), codec.encode(clip))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "codec"
    with pytest.raises(UserError, match=r"config\.json"):
        load_codec(folder)
    tiny_codec().save_pretrained(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    state = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # not mapped

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_codec(folder)

    missing = dict(state)
    del missing["decoder.conv_in.weight"]
    save_file(missing, weights)
    with pytest.raises(UserError, match=r"missing.*decoder\.conv_in\.weight"):
        load_codec(folder)

    save_file({**state, "extra.weight": torch.zeros(1)}, weights)
    with pytest.raises(UserError, match=r"unexpected.*extra\.weight"):
        load_codec(folder)

    save_file({**state, "latents_mean": torch.zeros(3)}, weights)
    with pytest.raises(UserError, match=r"latents_mean.*\[3\]"):
        load_codec(folder)

    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_codec(folder)

    config = json.loads((folder / "config.json").read_text())
    for changes, word in [({"_class_name": "VQGAN"}, "VQGAN"), ({"depth": 3}, "depth")]:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError, match=word):
            load_codec(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        load_codec(folder)


def test_codec_loss_is_zero_for_a_perfect_codec_and_counts_each_term() -> None:
    pixels = to_pixels(video(5, 16, 16))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 64, 16, 16, generator=generator)
    loss, logs = codec_loss(pixels, pixels, latents, CodecLossConfig())
    assert float(loss) == pytest.approx(0, abs=1e-5)
    # A constant offset has no texture and no motion error.
    _, logs = codec_loss(pixels + 0.1, pixels, latents, CodecLossConfig())
    assert float(logs["l1"]) == pytest.approx(0.1, abs=1e-4)
    assert float(logs["l2"]) == pytest.approx(0.01, abs=1e-4)
    assert float(logs["temporal"]) < 1e-5
    assert float(logs["laplacian"]) < 1e-5
    assert float(logs["texture"]) < 1e-3
    # Texture does not mind where the detail lies, l1 does.
    _, moved = codec_loss(-pixels, pixels, latents, CodecLossConfig())
    assert float(moved["texture"]) < 1e-5 < float(moved["l1"])
    _, wide = codec_loss(pixels, pixels, 3 * latents, CodecLossConfig())
    closed = 0.5 * (9 - 1 - math.log(9))
    assert float(wide["moments"]) == pytest.approx(closed, rel=0.05)
    latents[0, 2, 0, 0, 0] = 1000.0  # one value of 32768: std 5.6, so 178 of them away
    _, tail = codec_loss(pixels, pixels, latents, CodecLossConfig())
    assert float(tail["tails"]) == pytest.approx((1000 / 5.6 - 4) / latents.numel(), rel=0.1)
    with pytest.raises(UserError, match="noise"):
        CodecLossConfig(noise=-1)


def test_latent_noise_is_relative_to_the_latents() -> None:
    """Scaling the latents up must not escape the noise."""
    seen: list[Tensor] = []

    class Recorder:
        def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, None]:
            generator = torch.Generator().manual_seed(1)
            return 50 * torch.randn(64, 4, 5, 4, 4, generator=generator), None

        def decode_pixels(self, latents: Tensor) -> Tensor:
            seen.append(latents)
            return torch.zeros(64, 3, 17, 4, 4)

    stage = CodecStage(Recorder(), CodecLossConfig(noise=0.2), None, torch.Generator())
    _, clean = stage.reconstruct(torch.zeros(64, 3, 17, 4, 4))
    levels = (seen[0] - clean).std(dim=(1, 3, 4)) / 50
    assert 0.15 < float(levels.max()) < 0.26
    assert float(levels.min()) < 0.03


def test_critic_learns_to_tell_apart_and_pushes_the_codec() -> None:
    torch.manual_seed(0)
    clip = video(5, 16, 16)
    codec = CausalCodec(TINY)
    critic = PatchDiscriminator(8)
    stage = CodecStage(codec, CodecLossConfig(), critic)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss, logs = stage.critic_loss(clip)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert float(logs["logit_real"]) > float(logs["logit_fake"])
    assert all(parameter.grad is None for parameter in codec.parameters())
    plain, _ = stage.generator_loss(clip)
    loss, logs = stage.generator_loss(clip, torch.tensor(100.0))
    assert float(loss.detach()) > float(plain.detach()) + 10
    with pytest.raises(ValueError, match="critic"):
        CodecStage(codec).generator_loss(clip, torch.tensor(1.0))


def test_training_with_a_frozen_encoder_changes_the_decoder_alone(tmp_path: Path) -> None:
    """The training script, whole, from a codec in float16."""
    main = runpy.run_path(str(ROOT / "runs" / "train_codec.py"))["main"]
    tiny_codec().save_pretrained(tmp_path / "before", torch.float16)
    (tmp_path / "data").mkdir()
    save_file({"video": moving_texture(size=16)}, tmp_path / "data" / "a.safetensors")
    flags = f"--data {tmp_path}/data --out {tmp_path}/after --minutes 0.005 --batch 2 --frames 5"
    main([*flags.split(), "--device=cpu", "--init", str(tmp_path / "before"), "--freeze-encoder"])
    before = load_file(tmp_path / "before" / "model.safetensors")
    after = load_file(tmp_path / "after" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "decoder.conv_out.weight" in changed
    assert all(name.startswith("decoder.") for name in changed)
    assert before.keys() == after.keys()
    main([*flags.split(), "--device=cpu", f"--init={tmp_path}/before", "--blend=0"])
    same = load_file(tmp_path / "after" / "model.safetensors")
    assert all(torch.equal(same[name], before[name]) for name in before if "latents" not in name)
    with pytest.raises(SystemExit):
        main([*flags.split(), "--freeze-encoder"])


def unrefined(codec: Path, folder: Path) -> Path:
    """The codec without its correction at full resolution."""
    config = json.loads((codec / "config.json").read_text()) | {"refine_width": 0}
    tensors = load_file(codec / "model.safetensors")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    kept = {n: t for n, t in tensors.items() if not n.startswith("decoder.refine.")}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors")
    return folder


def test_the_packaged_codec_is_fine_tuned_and_judged_by_one_command(tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "runs" / "train_codec.py"))["main"]
    (tmp_path / "data").mkdir()
    soft = unrefined(PACKAGED / "doom" / "codec", tmp_path / "soft")
    save_file({"video": moving_texture(size=32)}, tmp_path / "data" / "a.safetensors")
    flags = f"--data {tmp_path}/data --out {tmp_path}/after --minutes 0.005 --batch 1 --frames 5"
    flags += " --decoder-only --refine 4 --texture 0 --subbands 0.2 --report-every 0.01"
    with pytest.raises(SystemExit, match=r"--refine 4: .* the codec's own \(8\) 0"):
        main([*flags.split(), "--init=packaged", "--device=cpu"])
    main([*flags.split(), f"--init={soft}", "--device=cpu"])
    before = load_file(soft / "model.safetensors")
    after = load_file(tmp_path / "after" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "decoder.conv_out.weight" in changed
    assert all(name.startswith("decoder.") for name in changed)
    added = after.keys() - before.keys()
    assert added and all(name.startswith("decoder.refine.") for name in added)
    # What training did not see is judged before, during and after, with the same figures.
    figures = json.loads((tmp_path / "after" / "figures.json").read_text())
    history = figures["history"]
    assert [history[0]["update"], len(history) > 1] == [0, True]
    assert figures["heldout_clips"] == 2
    assert history[0].items() >= figures["before"].items()  # the same two clips, the same weights
    assert figures["after"].keys() == figures["before"].keys()
    assert {"psnr", "sharpness", "FDnss", "across", "nyquist"} <= figures["after"].keys()
    clip = moving_texture(size=32)[-2:]
    saved = load_codec(tmp_path / "after")
    recomputed = psnr(saved.decode(saved.encode(clip)), clip)
    assert figures["after"]["psnr"] == pytest.approx(recomputed, abs=1e-3)


def test_texture_tells_fine_grain_from_a_few_strong_edges_of_the_same_energy() -> None:
    generator = torch.Generator().manual_seed(0)
    grain = 0.1 * torch.randn(1, 1, 2, 48, 48, generator=generator).expand(1, 3, 2, 48, 48)
    edges = torch.zeros(1, 3, 2, 48, 48)
    edges[..., ::8, ::8] = 0.8  # one pixel in 64: the same mean square as the grain
    assert float(edges.square().mean()) == pytest.approx(float(grain.square().mean()), rel=0.1)
    latents = torch.zeros(1, 4, 2, 6, 6)
    _, same = codec_loss(grain.roll(3, -1), grain, latents, CodecLossConfig())
    _, other = codec_loss(edges, grain, latents, CodecLossConfig())
    assert float(same["texture"]) < 0.3 < 1.5 < float(other["texture"])


def test_packaged_doom_codec_keeps_the_packaged_frames_sharp() -> None:
    codec = load_codec(PACKAGED / "doom" / "codec")
    frames = [np.array(Image.open(path)) for path in sorted(PACKAGED.glob("doom_frames/*.png"))]
    captions = json.loads((PACKAGED / "doom_frames" / "captions.json").read_text())
    assert len(frames) == len(captions) >= 12
    images = torch.from_numpy(np.stack(frames))[:, None]
    decoded = codec.decode(codec.encode(images))
    assert psnr(decoded, images) >= 27
    assert 0.8 <= sharpness_ratio(decoded, images) <= 1.2


def test_metrics_against_known_values() -> None:
    clip = video(2, 16, 16) // 2
    assert psnr(clip, clip) == math.inf
    assert psnr(clip + 1, clip) == pytest.approx(20 * math.log10(255))
    assert sharpness_ratio(clip, clip) == 1
    assert sharpness_ratio(clip + 1, clip) == pytest.approx(1, abs=1e-4)
    flat = torch.full_like(clip, 100)
    assert sharpness_ratio(flat, clip) < 0.1
    # One white pixel in the middle of 5 x 5: |L| is 4 x 255 once, 255 four times, 0 else, of 9.
    dot = torch.zeros(1, 5, 5, 3, dtype=torch.uint8)
    dot[0, 2, 2] = 255
    expected = math.exp((math.log1p(4 * 255) + 4 * math.log1p(255)) / 9)
    assert sharpness_ratio(dot, torch.zeros_like(dot)) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="uint8"):
        psnr(clip.float(), clip)
