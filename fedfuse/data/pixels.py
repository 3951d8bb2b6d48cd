"""Decoding and converting images: encoded bytes to uint8 arrays, and one data set's shape to another's."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedfuse.data.inflate import check_room
from fedfuse.data.locations import reason_of
from fedfuse.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")  # for others Pillow may start a program, as for EPS


def decode(sources: Sequence[bytes | Path], size: Sequence[int] | int | None, where: str, most: int) -> np.ndarray:
    """Decode images into one array.

    Parameters
    ----------
    sources : sequence of bytes or Path
        Encoded images, of any of `FORMATS`.
    size : (height, width) or int, optional
        Resize to this (bilinear); without it all images must have one size.
    where : str
        Named in errors.
    most : int
        Bytes that the array may take, and each image while it is decoded.

    Returns
    -------
    ndarray of uint8, shape (n, channels, height, width)
        One channel if every image is grey, else three.

    Raises
    ------
    UserError
        For a damaged image, images of several sizes where `size` is not given, or more than there is room for.
    """
    from PIL import Image

    if not sources:
        raise UserError(f"{where}: no images")
    wanted = None
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else tuple(int(side) for side in size)
        wanted = (width, height)
    array = np.empty(0, dtype=np.uint8)
    colour = False
    last = FORMATS[0]
    index = 0
    while index < len(sources):
        source = sources[index]
        try:
            # Trying the last format first spares Pillow from asking every plugin about every image.
            with _opened(source, (last, *FORMATS)) as image:
                last = image.format if image.format in FORMATS else last
                if not colour and image.mode not in ("L", "1"):
                    # Grey as long as every image is; the first one that is not sends us back to the start.
                    colour, array, index = True, np.empty(0, dtype=np.uint8), 0
                    continue
                # So far only the image's header was read.
                wanted = wanted or image.size
                shape = (len(sources), 3 if colour else 1, wanted[1], wanted[0])
                for taken in (4 * image.width * image.height, math.prod(shape)):  # Pillow's pixel has up to 4 bytes
                    check_room(where, taken, most)
                frame: Image.Image = image.convert("RGB" if colour else "L")
            if frame.size != wanted and size is not None:
                frame = frame.resize(wanted, Image.Resampling.BILINEAR)
        except UserError:
            raise
        except Exception as error:  # Pillow raises whatever its decoders do
            name = f"image {index}" if isinstance(source, bytes) else str(source)
            raise UserError(f"{where}: {name} cannot be decoded ({reason_of(error)}); expected an image file") from None
        if frame.size != wanted:
            raise UserError(f"{where}: images of {wanted} and {frame.size}; set data.extra.size=<pixels>")
        if not array.size:
            array = np.empty(shape, dtype=np.uint8)
        pixels = np.asarray(frame)
        array[index] = pixels.transpose(2, 0, 1) if colour else pixels[None]
        index += 1
    return array


def _opened(source: bytes | Path, formats: tuple[str, ...]) -> Image.Image:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)


def reshape(images: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Convert uint8 images (n, c, h, w) to (channels, height, width) of another data set.

    Grey is repeated to RGB, RGB becomes luminance, sizes are resampled bilinearly.
    """
    from PIL import Image

    channels, height, width = (int(side) for side in shape)
    if tuple(images.shape[1:]) == (channels, height, width):
        return images
    mode = "L" if channels == 1 else "RGB"
    array = np.empty((len(images), channels, height, width), dtype=np.uint8)
    for index, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
        frame = Image.fromarray(pixels).convert(mode)
        if frame.size != (width, height):
            frame = frame.resize((width, height), Image.Resampling.BILINEAR)
        converted = np.asarray(frame)
        array[index] = converted[None] if channels == 1 else converted.transpose(2, 0, 1)
    return array
