"""Images of every kind in, videos out and in again, and one clear line for bad ones."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from aad1.errors import UserError
from aad1.media import images
from aad1.media.images import read_image
from aad1.media.reading import probe_video, read_video
from aad1.media.sheet import contact_sheet
from aad1.media.writing import check_video_path, write_video

RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)


def solid(colour: tuple[int, ...], width: int = 8, height: int = 6) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def colours(image: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(pixel) for pixel in image.flatten(0, 1).tolist()}


def noise(height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- images -------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_is_unchanged(tmp_path: Path) -> None:
    array = noise()
    Image.fromarray(array).save(tmp_path / "a.png")
    for image in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(array),
        array,
        torch.from_numpy(array),
        array.astype(np.float32) / 255,
    ):
        out = read_image(image, width=8, height=6)
        assert out.dtype == torch.uint8
        np.testing.assert_array_equal(out.numpy(), array)


def test_the_centre_is_cut_out_of_a_wide_image() -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, :10], wide[:, 10:20], wide[:, 20:] = RED, GREEN, BLUE
    assert colours(read_image(wide, width=10, height=10)) == {GREEN}
    tall = wide.transpose(1, 0, 2)
    assert colours(read_image(tall, width=10, height=10)) == {GREEN}


def test_scaling_does_not_distort() -> None:
    y, x = np.mgrid[:300, :700]
    disc = ((x - 350) ** 2 + (y - 150) ** 2 < 75**2).astype(np.uint8) * 255
    out = read_image(disc, width=128, height=96)[..., 0] > 127
    across, down = out.any(dim=0).sum().item(), out.any(dim=1).sum().item()
    assert across == pytest.approx(48, abs=1)
    assert down == pytest.approx(48, abs=1)


def test_a_tiny_image_is_enlarged() -> None:
    assert colours(read_image(solid(RED, 1, 1), width=16, height=8)) == {RED}


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (200, 0), BLACK),
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 0), BLACK),
        ("RGBA", (255, 255, 0, 128), (128, 128, 0)),
        ("I;16", 77 * 256 + 5, (77, 77, 77)),
    ],
)
def test_every_mode_becomes_rgb(
    tmp_path: Path, mode: str, colour: int | tuple[int, ...], expected: tuple[int, ...]
) -> None:
    Image.new(mode, (8, 6), colour).save(tmp_path / "a.png")
    assert colours(read_image(tmp_path / "a.png", width=8, height=6)) == {expected}


def test_cmyk_and_palettes_with_transparency(tmp_path: Path) -> None:
    solid((255, 0, 0)).convert("CMYK").save(tmp_path / "a.tiff")
    assert colours(read_image(tmp_path / "a.tiff", width=8, height=6)) == {RED}
    palette = solid(GREEN).quantize(2)
    palette.save(tmp_path / "a.png", transparency=palette.getpixel((0, 0)))
    assert colours(read_image(tmp_path / "a.png", width=8, height=6)) == {BLACK}


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    array = np.zeros((16, 32, 3), dtype=np.uint8)
    array[:, :16], array[:, 16:] = RED, BLUE
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the left side comes to the top
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    out = read_image(tmp_path / "a.png", width=16, height=32)
    assert colours(out[:14]) == {RED}
    assert colours(out[18:]) == {BLUE}


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    solid(RED).save(tmp_path / "a.gif", save_all=True, append_images=[solid(BLUE)])
    assert colours(read_image(tmp_path / "a.gif", width=8, height=6)) == {RED}


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image at all")
    Image.fromarray(noise(64, 64)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.jpg").write_bytes(jpeg(tmp_path)[:-200])
    for name, message in {
        "empty.png": r"empty\.png is empty \(0 bytes\)",
        "text.png": r"text\.png is not an image in a known format",
        "cut.png": r"cut\.png cannot be read as an image",
        "cut.jpg": r"cut\.jpg cannot be read as an image",
        "missing.png": r"missing\.png does not exist",
        ".": "is a folder, not a file with an image",
    }.items():
        with pytest.raises(UserError, match=message):
            read_image(tmp_path / name, width=8, height=6)


def jpeg(folder: Path) -> bytes:
    Image.fromarray(noise(64, 64)).save(folder / "whole.jpg")
    return (folder / "whole.jpg").read_bytes()


def test_a_huge_image_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    tracemalloc.start()
    with pytest.raises(UserError, match=r"bomb\.png has more than 100,000,000 pixels"):
        read_image(tmp_path / "bomb.png", width=8, height=6)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 47)
    with pytest.raises(UserError, match="the image is 8x6, more than 47 pixels"):
        read_image(solid(RED), width=8, height=6)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 6, 8), np.uint8), r"must be \[H, W\].*got \[3, 6, 8\]"),
        (np.zeros((0, 8, 3), np.uint8), r"got \[0, 8, 3\]"),
        (np.zeros((2, 6, 8, 3), np.uint8), r"got \[2, 6, 8, 3\]"),
        (np.zeros((6, 8, 3), np.int32), "got int32"),
        (np.full((6, 8, 3), 2.0), r"floats must lie in \[0, 1\]"),
        (np.full((6, 8, 3), np.nan), r"floats must lie in \[0, 1\]"),
    ],
)
def test_bad_arrays(array: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_image(array, width=8, height=6)


def test_bad_sizes() -> None:
    with pytest.raises(UserError, match="0x6"):
        read_image(solid(RED), width=0, height=6)


# ---- videos -------------------------------------------------------------------------------------


def clip(frames: int = 21, height: int = 48, width: int = 64) -> torch.Tensor:
    """A square that moves right over a smooth ground; each frame differs from the others."""
    video = torch.zeros(frames, height, width, 3, dtype=torch.uint8)
    video[..., 2] = torch.linspace(40, 200, height).to(torch.uint8)[:, None]
    for t in range(frames):
        video[t, 16:32, 2 * t : 2 * t + 16] = torch.tensor([250, 180, 20], dtype=torch.uint8)
    return video


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().mean().item()


def test_mp4_there_and_back(tmp_path: Path) -> None:
    video = clip()
    assert write_video(tmp_path / "a.mp4", video, 16, scale=1) == 21
    back = read_video(tmp_path / "a.mp4")
    assert back.shape == video.shape
    assert distance(back, video) < 2
    assert distance(back[1:], video[:-1]) > 1.5 * distance(back, video)
    # Saturated colours show a wrong matrix or range at once.
    torch.testing.assert_close(back[0, 24, 8].float(), video[0, 24, 8].float(), atol=6, rtol=0)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 16


def test_pieces_equal_the_whole(tmp_path: Path) -> None:
    video = clip()
    pieces = [video[0], video[1:9].numpy(), video[9:]]
    assert write_video(tmp_path / "a.mp4", iter(pieces), 16) == 21
    write_video(tmp_path / "b.mp4", video, 16)
    a, b = read_video(tmp_path / "a.mp4"), read_video(tmp_path / "b.mp4")
    assert a.shape == b.shape  # not equal in bytes: x264 is not deterministic to the bit
    assert distance(a, b) < 0.5


def test_small_videos_are_enlarged_by_a_whole_factor(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", clip(3), 16)
    info = probe_video(tmp_path / "a.mp4")
    assert (info.width, info.height) == (320, 240)
    write_video(tmp_path / "b.mp4", clip(3), 16, scale=2)
    info = probe_video(tmp_path / "b.mp4")
    assert (info.width, info.height) == (128, 96)
    write_video(tmp_path / "c.mp4", torch.zeros(2, 250, 300, 3, dtype=torch.uint8), 16)
    assert probe_video(tmp_path / "c.mp4").height == 250


def test_odd_sizes_get_one_more_row_and_column(tmp_path: Path) -> None:
    video = clip(3)[:, :47, :63]
    write_video(tmp_path / "a.mp4", video, 16, scale=1)
    back = read_video(tmp_path / "a.mp4")
    assert back.shape == (3, 48, 64, 3)
    assert distance(back[:, :47, :63], video) < 3


def test_writing_mp4_needs_constant_memory(tmp_path: Path) -> None:
    def endless(count: int) -> Iterator[np.ndarray]:
        for k in range(count):
            yield np.full((16, 48, 64, 3), k % 256, dtype=np.uint8)

    def peak(count: int) -> int:
        tracemalloc.start()
        write_video(tmp_path / "a.mp4", endless(count), 16, scale=1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(4)
    assert peak(64) < peak(16) + 16 * 48 * 64 * 3


def test_gif_keeps_frames_and_time(tmp_path: Path) -> None:
    assert write_video(tmp_path / "a.gif", clip(17), 16) == 17
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 17
        assert gif.size == (320, 240)
        total = 0
        for k in range(17):
            gif.seek(k)
            total += gif.info["duration"]
    assert total == pytest.approx(17 * 1000 / 16, abs=10)


def test_png_is_a_sheet_of_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "a.PNG", clip(81)[:, :, :, :], 16, scale=1)
    with Image.open(tmp_path / "a.PNG") as sheet:
        assert sheet.size == (8 * 66 - 2, 3 * 50 - 2)
        first = np.asarray(sheet)[:48, :64]
        last = np.asarray(sheet)[-48:, -64:]
    np.testing.assert_array_equal(first, clip(81)[0].numpy())
    np.testing.assert_array_equal(last, clip(81)[80].numpy())


def test_contact_sheet_rows_and_captions() -> None:
    videos = [clip(81), clip(3)]
    plain = contact_sheet(videos, columns=3)
    assert plain.size == (3 * 66 - 2, 2 * 50 - 2)
    array = np.asarray(plain)
    for column, frame in enumerate((0, 40, 80)):
        left = column * 66
        np.testing.assert_array_equal(array[:48, left : left + 64], videos[0][frame].numpy())
    np.testing.assert_array_equal(array[-48:, 66:130], videos[1][1].numpy())
    captioned = contact_sheet(videos, ["turn left " * 50, "two\nlines"], columns=3)
    assert captioned.width == plain.width
    assert captioned.height == plain.height + 2 * 16
    assert np.asarray(captioned)[:14].any()
    with pytest.raises(UserError, match="1 captions for 2 videos"):
        contact_sheet(videos, ["one"])
    with pytest.raises(UserError, match="at least one video"):
        contact_sheet([])


@pytest.mark.parametrize(
    ("name", "frames", "options", "message"),
    [
        ("a.avi", clip(2), {}, r"must end in one of \.mp4, \.gif, \.png, not in '\.avi'"),
        ("a", clip(2), {}, r"must end in one of .* not in ''"),
        ("a.mp4", clip(2), {"fps": 0}, r"fps=0 must be in \(0, 1000\]"),
        ("a.mp4", clip(2), {"scale": 0}, r"scale=0 must be in 1\.\.64"),
        ("a.mp4", [], {}, "no frames to write"),
        ("a.gif", [], {}, "no frames to write"),
        ("a.png", [], {}, "no frames to write"),
        ("a.mp4", clip(2).float(), {}, "must be uint8"),
        ("a.mp4", [clip(2), clip(2)[:, :40]], {}, r"a frame has shape \[40, 64, 3\]"),
    ],
)
def test_bad_output(
    tmp_path: Path, name: str, frames: object, options: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        write_video(tmp_path / name, frames, **{"fps": 16, **options})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_output_path_is_checked_beforehand(tmp_path: Path) -> None:
    assert check_video_path(tmp_path / "new" / "a.MP4") == tmp_path / "new" / "a.MP4"
    (tmp_path / "dir.mp4").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_video_path(tmp_path / "dir.mp4")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        check_video_path(tmp_path / "file" / "a.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_an_error_on_the_way_leaves_the_old_file(tmp_path: Path, suffix: str) -> None:
    def broken() -> Iterator[torch.Tensor]:
        yield clip(4)
        raise RuntimeError("generation failed")

    target = tmp_path / f"a{suffix}"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="generation failed"):
        write_video(target, broken(), 16)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == [target.name]


# ---- reading videos -----------------------------------------------------------------------------


def write_timed(path: Path, video: torch.Tensor, ticks: list[int]) -> None:
    """An mp4 whose frames come at the given hundredths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=100, options={"crf": "10"})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100)
        for frame, tick in zip(video.numpy(), ticks, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = tick, Fraction(1, 100)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def nearest(frames: torch.Tensor, video: torch.Tensor) -> list[int]:
    """Which frame of `video` each of `frames` is."""
    return [int((frame.float() - video.float()).abs().mean((1, 2, 3)).argmin()) for frame in frames]


def test_another_rate_picks_frames_by_the_clock(tmp_path: Path) -> None:
    video = clip(24)
    write_video(tmp_path / "a.mp4", video, 24, scale=1)
    info = probe_video(tmp_path / "a.mp4")
    assert (info.frames, info.constant_rate) == (24, True)
    assert info.fps == pytest.approx(24)
    assert info.duration == pytest.approx(1)
    assert nearest(read_video(tmp_path / "a.mp4", fps=24), video) == list(range(24))
    assert nearest(read_video(tmp_path / "a.mp4", fps=12), video) == list(range(1, 24, 2))
    assert nearest(read_video(tmp_path / "a.mp4", fps=8), video) == list(range(1, 24, 3))
    doubled = [k // 2 for k in range(48)]
    assert nearest(read_video(tmp_path / "a.mp4", fps=48), video) == doubled


def test_part_of_a_video(tmp_path: Path) -> None:
    video = clip(24)
    write_video(tmp_path / "a.mp4", video, 24, scale=1)
    part = read_video(tmp_path / "a.mp4", fps=24, start=0.5, frames=5)
    assert nearest(part, video) == [12, 13, 14, 15, 16]
    with pytest.raises(UserError, match=r"holds 12 frames at 24 fps from 0\.5 s on, 13 are needed"):
        read_video(tmp_path / "a.mp4", fps=24, start=0.5, frames=13)
    with pytest.raises(UserError, match="holds 0 frames"):
        read_video(tmp_path / "a.mp4", start=2)


def test_size_is_met_without_distortion(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", clip(5), 16, scale=1)
    small = read_video(tmp_path / "a.mp4", width=24, height=24)
    assert small.shape == (5, 24, 24, 3)
    expected = torch.stack([read_image(frame, width=24, height=24) for frame in clip(5)])
    assert distance(small, expected) < 3


def test_variable_rate_needs_a_rate(tmp_path: Path) -> None:
    video = clip(8)
    write_timed(tmp_path / "a.mp4", video, [0, 10, 20, 30, 70, 80, 90, 100])
    assert not probe_video(tmp_path / "a.mp4").constant_rate
    with pytest.raises(UserError, match="variable frame rate"):
        read_video(tmp_path / "a.mp4")
    frames = read_video(tmp_path / "a.mp4", fps=10)
    assert nearest(frames, video)[:9] == [0, 1, 2, 3, 3, 3, 3, 4, 5]


def test_rotation_noted_in_the_file_is_undone(tmp_path: Path) -> None:
    video = torch.zeros(2, 32, 64, 3, dtype=torch.uint8)
    video[:, :, :32] = torch.tensor(RED, dtype=torch.uint8)
    write_video(tmp_path / "a.mp4", video, 16, scale=1)
    data = (tmp_path / "a.mp4").read_bytes()
    place = data.index(b"tkhd") + 4 + 40
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    assert data[place : place + 36] == upright
    # What a telephone writes when it is held upright: to be turned a quarter clockwise.
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(data[:place] + turned + data[place + 36 :])
    back = read_video(tmp_path / "a.mp4")
    assert back.shape == (2, 64, 32, 3)
    assert back[0, 8, 16, 0] > 200  # the left side has come to the top
    assert back[0, 56, 16, 0] < 50


def test_non_square_pixels_are_undone(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for frame in clip(3).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    assert read_video(tmp_path / "a.mp4").shape == (3, 48, 128, 3)


def test_bad_videos(tmp_path: Path) -> None:
    write_video(tmp_path / "whole.mp4", clip(60), 16)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video at all " * 100)
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for name, message in {
        "empty.mp4": r"empty\.mp4 is empty \(0 bytes\)",
        "text.mp4": r"text\.mp4 is damaged or no video",
        "cut.mp4": r"cut\.mp4 is damaged: \d+ of 60 video frames are there",
        "sound.mp4": r"sound\.mp4 holds no video track",
        "missing.mp4": r"missing\.mp4 does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            read_video(tmp_path / name)


def test_scrambled_pictures_are_not_passed_off_as_frames(tmp_path: Path) -> None:
    """A decoder that stops half-way must not be padded with repeats of the last good frame."""
    video = torch.randint(0, 256, (48, 48, 64, 3), dtype=torch.uint8)
    write_video(tmp_path / "a.mp4", video, 16, scale=1)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[middle:] = bytes(len(data) - middle)
    (tmp_path / "a.mp4").write_bytes(bytes(data))
    with pytest.raises(UserError, match="damaged"):
        read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, "fps=0 must be > 0"),
        ({"frames": 0}, "frames=0 must be > 0"),
        ({"start": -1}, "start=-1 must be >= 0"),
        ({"width": 8}, "must be given together"),
    ],
)
def test_bad_requests(tmp_path: Path, options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_video(tmp_path / "a.mp4", **options)  # type: ignore[arg-type]
