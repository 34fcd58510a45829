"""Videos to latents and text embeddings: what is encoded, what is left out, and going on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from aad1.data.shards import ClipShards, read_header
from aad1.data.text_store import TextStore
from aad1.errors import UserError
from aad1.media.reading import read_video
from aad1.models.codec import Codec, load_codec
from aad1.train.videos import encode_videos
from aad1.train.wan_base import VideoSize

SIZE = VideoSize(width=32, height=32, frames=17)


@pytest.fixture(scope="module")
def codec(tiny_wan: Path) -> Codec:
    return load_codec(tiny_wan / "vae")


def encode(folder: Path, out: Path, codec: Codec, text: Any, **changes: Any) -> int:
    settings: dict[str, Any] = dict(
        size=SIZE, origin={"vae": "a", "text": "b"}, negative="ugly", device=torch.device("cpu"),
        clips_per_shard=3,
    )  # fmt: skip
    return encode_videos(folder, out, codec, lambda: text, **(settings | changes))


def test_latents_text_and_report(
    videos: Path, tmp_path: Path, codec: Codec, tiny_umt5: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_umt5.calls.clear()
    assert encode(videos, tmp_path / "out", codec, tiny_umt5) == 8
    shards = ClipShards(tmp_path / "out")
    assert shards.tensor == "latents" and shards.clip_shape == (16, 5, 4, 4)
    assert [entry["clips"] for entry in shards.manifest["shards"]] == [3, 3, 2]
    # What is stored is the codec's encoding of the very frames, under the right caption.
    files = [
        f
        for entry in shards.manifest["shards"]
        for f in json.loads((read_header(tmp_path / "out" / entry["file"]) or {})["files"])
    ]
    number = files.index("v2.mp4")
    clip = read_video(videos / "v2.mp4", fps=16, frames=17, width=32, height=32)
    want = codec.encode(clip[None])
    torch.testing.assert_close(shards.tensors([number]).float(), want, atol=2e-3, rtol=2e-3)
    assert shards.captions[number] == ["scene number 2"]
    # Each prompt once, the negative one among them.
    assert sorted(tiny_umt5.calls) == sorted(
        ["ugly", "a long scene", "a square moves", *(f"scene number {k}" for k in (2, 4))]
        + (["scene number 0"] if "v0.mp4" in files else ["a bad one"])
    )
    store = TextStore(tmp_path / "out" / "text")
    got = store(["a long scene", "ugly"])
    assert torch.equal(got, tiny_umt5(["a long scene", "ugly"]).bfloat16())
    text = capsys.readouterr().out
    assert "8 clips, 8 of them new; 5 skipped" in text
    for line in ("cut.mp4: is damaged", "empty.mp4: is empty", "short.mp4: too short",
                 "silent.mp4: no caption", "is a copy of"):  # fmt: skip
        assert line in text, line


def test_a_run_that_was_killed_goes_on_and_nothing_doubles(
    videos: Path, tmp_path: Path, codec: Codec, tiny_umt5: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "out", 0
    plain = type(codec).encode

    def killed(self: Codec, video: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return plain(self, video)

    with monkeypatch.context() as patch:
        patch.setattr(type(codec), "encode", killed)
        with pytest.raises(KeyboardInterrupt):
            encode(videos, out, codec, tiny_umt5)
    assert len(list(out.glob("shard-*"))) == 1 and not (out / "manifest.json").exists()
    kept = next(out.glob("shard-*")).read_bytes()
    tiny_umt5.calls.clear()
    assert encode(videos, out, codec, tiny_umt5) == 8
    assert tiny_umt5.calls == []
    assert (out / "shard-00000.safetensors").read_bytes() == kept
    straight = tmp_path / "straight"
    encode(videos, straight, codec, tiny_umt5)
    one, two = ClipShards(out), ClipShards(straight)
    assert one.captions == two.captions
    assert torch.equal(one.read_tensors(), two.read_tensors())
    assert encode(videos, out, codec, tiny_umt5) == 8  # a third time: nothing to do
    # One more video is added to what is there, and a renamed one is known by its content.
    more = tmp_path / "more"
    shutil.copytree(videos, more)
    for suffix in (".mp4", ".txt"):
        (more / f"v1{suffix}").rename(more / f"other{suffix}")
    (more / "silent.txt").write_text("now it talks")
    assert encode(more, out, codec, tiny_umt5) == 9
    assert ClipShards(out).captions[-1] == ["now it talks"]


def test_another_model_size_or_negative_prompt_is_refused(
    videos: Path, tmp_path: Path, codec: Codec, tiny_umt5: Any
) -> None:
    encode(videos, tmp_path, codec, tiny_umt5)
    for change in (
        dict(origin={"vae": "other", "text": "b"}),
        dict(size=VideoSize(width=48, height=32, frames=17)),
    ):
        with pytest.raises(UserError, match="was begun with another model, size or frame rate"):
            encode(videos, tmp_path, codec, tiny_umt5, **change)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="was begun with negative 'ugly', now it is 'other'"):
        encode(videos, tmp_path, codec, tiny_umt5, negative="other")
    shard = tmp_path / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=r"shard-00000\.safetensors is damaged"):
        encode(videos, tmp_path, codec, tiny_umt5)


@pytest.mark.parametrize(
    "size,message",
    [
        (dict(width=100), "width must be a multiple of 16, got 100; use 96 or 112"),
        (dict(height=8), "height must be a multiple of 16, got 8; use 16"),
        (dict(frames=80), "the nearest are 77 and 81"),
    ],
)
def test_sizes_off_the_grid_leave_nothing(
    videos: Path, tmp_path: Path, codec: Codec, tiny_umt5: Any, size: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        encode(videos, tmp_path / "out", codec, tiny_umt5, size=replace(SIZE, **size))
    assert not (tmp_path / "out").exists()


def test_folders_without_a_usable_video_leave_nothing(
    tmp_path: Path, codec: Codec, tiny_umt5: Any
) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    (tmp_path / "clips" / "a.txt").write_text("nothing")
    with pytest.raises(UserError, match=r"gives no clip: a\.mp4 is empty"):
        encode(tmp_path / "clips", tmp_path / "out", codec, tiny_umt5)
    with pytest.raises(UserError, match="is not a folder"):
        encode(tmp_path / "nowhere", tmp_path / "out", codec, tiny_umt5)
    assert not (tmp_path / "out").exists()


def test_a_variable_frame_rate_is_read_by_its_clock(
    tmp_path: Path, codec: Codec, tiny_umt5: Any
) -> None:
    """Half of the frames last twice as long: in 17 frames at 16 fps each of those comes twice."""
    (tmp_path / "clips").mkdir()
    levels = np.arange(20, 260, 20)
    ticks = np.concatenate([[0], np.cumsum([1, 2] * 5 + [1])])  # sixteenths of a second
    with av.open(str(tmp_path / "clips" / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "1"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 16)
        for level, tick in zip(levels, ticks, strict=True):
            frame = av.VideoFrame.from_ndarray(
                np.full((32, 32, 3), level, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = int(tick), stream.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (tmp_path / "clips" / "a.txt").write_text("brighter")
    seen: list[torch.Tensor] = []

    class Spy:
        temporal_stride, spatial_stride = codec.temporal_stride, codec.spatial_stride

        def encode(self, video: torch.Tensor) -> torch.Tensor:
            seen.append(video)
            return codec.encode(video)

    size = VideoSize(width=32, height=32, frames=13)
    assert encode(tmp_path / "clips", tmp_path / "out", Spy(), tiny_umt5, size=size) == 1  # type: ignore[arg-type]
    want = [levels[np.searchsorted(ticks, t, side="right") - 1] for t in range(13)]
    got = seen[0][0].float().mean((1, 2, 3)).tolist()
    assert got == pytest.approx(want, abs=4)
