"""Bytes of an image file -> an 8-bit PIL image, with limits.

Defined behaviour: the first frame; EXIF orientation and colour profiles are not applied and an alpha channel is dropped
(as timm and torchvision load images); 16-bit grey becomes 8-bit by rounding v / 257, of 16-bit colour the high byte is
kept; grey and palette images become RGB for an RGB classifier, and colour becomes grey (ITU-R 601) for a grey one.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from certify.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 64_000_000
MAX_BYTES = 128 * 2**20


def decode(content: bytes, channels: int = 3, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A PIL image of mode RGB (3 channels) or L (1 channel).

    Args:
        content: of the file.
        channels: 1 or 3.
        max_pixels: refused before they are decoded.

    Raises:
        ImageError: empty, not an image, damaged, or larger than the limits.
    """
    if not content:
        raise ImageError("is empty (0 bytes)")
    if len(content) > MAX_BYTES:
        raise ImageError(f"is a file of {len(content):,} bytes; the limit is {MAX_BYTES:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of size (checked below) and of odd metadata (harmless)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > max_pixels:
                raise ImageError(f"has {image.width}x{image.height} pixels; the limit is {max_pixels:,}")
            image.load()
            return _to_eight_bits(image, channels)
    except Image.DecompressionBombError:
        raise ImageError(f"claims more than the limit of {max_pixels:,} pixels (a decompression bomb)") from None
    except UnidentifiedImageError:
        raise ImageError(f"is not an image ({', '.join(f.lower() for f in FORMATS)} are read)") from None
    except ImageError:
        raise
    except Exception as error:  # PIL's readers raise whatever a damaged file makes them stumble over
        raise ImageError(f"is damaged ({str(error)[:80]})") from None


def _to_eight_bits(image: Image.Image, channels: int) -> Image.Image:
    if image.mode == "F":
        raise ImageError("has floating-point pixels, whose scale nobody can tell; expected 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        if values.min() < 0 or values.max() > 65_535:
            raise ImageError(f"has values from {values.min():g} to {values.max():g}; expected 8 or 16 bits a channel")
        image = Image.fromarray(np.round(values / 257.0).astype(np.uint8), "L" if values.ndim == 2 else None)
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")
