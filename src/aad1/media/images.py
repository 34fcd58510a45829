"""Any image that a user hands over becomes uint8 RGB of the wanted size."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from aad1.errors import UserError

Pixels: TypeAlias = npt.NDArray[np.uint8]
ImageLike: TypeAlias = str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | torch.Tensor

MAX_IMAGE_PIXELS = 100_000_000


def read_image(image: ImageLike, *, width: int, height: int) -> torch.Tensor:
    """Any image as uint8 [height, width, 3], scaled to cover that size and cropped at the centre.

    An image that has the size already is returned unchanged, bit for bit.

    image: a file, a PIL image, or an array or tensor [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of
        uint8, uint16 or floats in [0, 1].

    EXIF rotation is applied, transparency is laid over black, grey and palettes become RGB, 16 bits
    become 8, of an animation the first frame counts.

    Raises:
        UserError: the file is missing, empty, truncated or no image, it has more than
            `MAX_IMAGE_PIXELS` pixels, or the array has another shape, dtype or range.
    """
    if width < 1 or height < 1:
        raise UserError(f"an image size of {width}x{height} must be at least 1x1")
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        picture = _array_to_rgb(image)
    elif isinstance(image, Image.Image):
        picture = _picture_to_rgb(image, "the image")
    else:
        picture = _open_rgb(Path(image))
    return torch.from_numpy(fit(picture, width, height))


def _open_rgb(path: Path) -> Image.Image:
    check_file(path, "an image")
    with _image_errors(str(path)), Image.open(path) as picture:
        return _picture_to_rgb(picture, str(path))


@contextmanager
def _image_errors(name: str) -> Iterator[None]:
    """Pillow's decoders fail with almost any exception; each means that the file is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image in a known format") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name} has more than {MAX_IMAGE_PIXELS:,} pixels") from None
    except Exception as error:
        raise UserError(f"{name} cannot be read as an image: {error}") from error


def _picture_to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.width * picture.height > MAX_IMAGE_PIXELS:
        raise UserError(
            f"{name} is {picture.width}x{picture.height}, more than {MAX_IMAGE_PIXELS:,} pixels"
        )
    if not picture.width or not picture.height:
        raise UserError(f"{name} is {picture.width}x{picture.height}, it has no pixels")
    with _image_errors(name):
        picture.seek(0)
        picture.load()  # here a truncated file fails
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip rather than scale
            grey = np.asarray(picture).astype(np.int64).clip(0, 65535)
            return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
        if picture.mode == "F":
            raise UserError(f"{name} holds floating point numbers, expected 8 or 16 bits")
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        with_alpha = picture.convert("RGBA")
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, with_alpha).convert("RGB")


def _array_to_rgb(array: npt.NDArray[Any]) -> Image.Image:
    shape = list(array.shape)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or 0 in shape or (array.ndim == 3 and shape[-1] not in (3, 4)):
        raise UserError(f"an image array must be [H, W], [H, W, 3] or [H, W, 4], got {shape}")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise UserError("an image array of floats must lie in [0, 1]")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise UserError(
            f"an image array must be uint8, uint16 or floats in [0, 1], got {array.dtype}"
        )
    return _picture_to_rgb(Image.fromarray(np.ascontiguousarray(array)), "the image")


def fit(picture: Image.Image, width: int, height: int, pixel_aspect: float = 1.0) -> Pixels:
    """Cut out the largest centred box of the target's aspect and scale it: no distortion.

    pixel_aspect: width of a source pixel over its height, 1 unless a video says otherwise.
    """
    shown_width = picture.width * pixel_aspect
    scale = min(shown_width / width, picture.height / height)
    box_width, box_height = width * scale / pixel_aspect, height * scale
    left, top = (picture.width - box_width) / 2, (picture.height - box_height) / 2
    box = (max(left, 0.0), max(top, 0.0), left + box_width, top + box_height)
    box = (*box[:2], min(box[2], picture.width), min(box[3], picture.height))
    if picture.size != (width, height) or box != (0, 0, width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    return np.array(picture, dtype=np.uint8)


def check_file(path: Path, kind: str) -> None:
    """UserError unless `path` is a file with something in it."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file with {kind}")
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes)")
