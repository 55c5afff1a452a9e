"""Decode image files to 8-bit PIL images, within limits.

Only the first frame is read. As in timm and torchvision, EXIF orientation and colour profiles are not applied and an
alpha channel is dropped. 16-bit grey is rounded to 8 bits (v / 257); 16-bit colour keeps its high byte. Grey and
palette images become RGB for an RGB classifier, and colour becomes grey (ITU-R 601) for a grey one. Metadata is
ignored, so damaged metadata does not make an image unusable.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from certify.errors import ImageError
from certify.models.signatures import HEAD, mistaken_for, name_content

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = tuple(".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())
MAX_BYTES = 128 * 2**20


@dataclass(frozen=True)
class DecodeLimits:
    """Limits for one image file, each checked before the work it bounds.

    Attributes:
        max_pixels: width times height, as the file declares them.
        max_scans: scans of a JPEG file. Each scan of a progressive file visits every block again and can be as short
            as ten bytes, so a small file could keep a decoder busy for hours; encoders write about ten scans.
        max_aspect: longer side over shorter side, for images that are resized. Resizing scales the shorter side to the
            classifier's input, so 1 x 12,000 pixels would become 256 x 3,072,000.
    """

    max_pixels: int = 64_000_000
    max_scans: int = 100
    max_aspect: int = 100

    def check_aspect(self, width: int, height: int) -> None:
        """Check that resizing would not make the image too large.

        Raises:
            ImageError: the aspect ratio exceeds ``max_aspect``.
        """
        if max(width, height) > self.max_aspect * min(width, height):
            raise ImageError(
                f"has {width}x{height} pixels; the longer side may be at most {self.max_aspect} times the shorter"
            )


LIMITS = DecodeLimits()


def decode(content: bytes, channels: int = 3, limits: DecodeLimits = LIMITS) -> Image.Image:
    """Decode an image file to a PIL image of mode RGB (3 channels) or L (1 channel).

    Args:
        content: the file's bytes.
        channels: 1 or 3, the classifier's.
        limits: checked before pixels are decoded.

    Raises:
        ImageError: empty, not an image, damaged, over a limit, or ``channels`` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ImageError(f"is a picture, which is read as grey or RGB; the classifier takes {channels} channels")
    if not content:
        raise ImageError("is empty (0 bytes)")
    if len(content) > MAX_BYTES:
        raise ImageError(f"is a file of {len(content):,} bytes; the limit is {MAX_BYTES:,}")
    if (mistake := mistaken_for(content[:HEAD], "an image")) is not None:
        raise ImageError(mistake)
    if content.startswith(_PNG):
        content = _critical_chunks(content)
    elif content.startswith(_JPEG) and _has_more_scans(content, limits.max_scans):
        raise ImageError(f"has more than {limits.max_scans} scans, the limit: a JPEG file made to keep decoders busy")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns about size (checked below) and odd metadata (harmless)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > limits.max_pixels:
                raise ImageError(f"has {image.width}x{image.height} pixels; the limit is {limits.max_pixels:,}")
            image.load()
            return _to_eight_bits(image, channels)
    except Image.DecompressionBombError:
        raise ImageError(f"claims more than the limit of {limits.max_pixels:,} pixels (a decompression bomb)") from None
    except UnidentifiedImageError:
        kind = name_content(content[:HEAD])
        formats = ", ".join(f.lower() for f in FORMATS)
        if kind in ("a PNG image", "a JPEG image", "a GIF image"):
            raise ImageError(f"is damaged: {kind} whose header cannot be read") from None
        why = f"is {kind}, which is not read ({formats} are)" if kind else f"is not an image ({formats} are read)"
        raise ImageError(why) from None
    except ImageError:
        raise
    except Exception as error:  # PIL's readers raise many types on damaged files
        raise ImageError(f"is damaged ({str(error)[:80]})") from None


_PNG = b"\x89PNG\r\n\x1a\n"
_ANCILLARY = 0x20  # bit of a chunk type's first letter: lower case


def _critical_chunks(content: bytes) -> bytes:
    """Remove a PNG file's ancillary chunks: text, profiles, times, and transparency, which is dropped anyway."""
    kept, at = [_PNG], len(_PNG)
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 12 + length
        if not kind[0] & _ANCILLARY:
            kept.append(content[at:end])
        if kind == b"IEND":
            break
        at = end
    return b"".join(kept)


_JPEG = b"\xff\xd8"
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # not a stuffed zero, a restart marker or a fill byte
_SOI, _EOI, _SOS, _FIRST_WITH_LENGTH = 0xD8, 0xD9, 0xDA, 0xC0


def _has_more_scans(content: bytes, limit: int) -> bool:
    """True if a JPEG file starts more than ``limit`` scans before its end of image.

    Bytes inside marker segments do not count, as previews and profiles may contain markers. Segments are skipped
    exactly where the decoder skips them, so no scan can escape the count.
    """
    if content.count(bytes((0xFF, _SOS))) <= limit:  # at least the number of scans
        return False
    scans, at = 0, len(_JPEG)
    while scans <= limit and (marker := _MARKER.search(content, at)) is not None:
        kind, at = marker[1][0], marker.end()
        if kind == _EOI:
            break
        scans += kind == _SOS
        if kind >= _FIRST_WITH_LENGTH and kind != _SOI:
            at += max(2, int.from_bytes(content[at : at + 2], "big"))
    return scans > limit


def to_array(image: Any) -> np.ndarray:
    """Return an image as an array; PIL images of palette, binary or other special modes are converted as files are.

    Raises:
        ImageError: pixels whose scale or colours are not defined.
    """
    if isinstance(image, Image.Image) and image.mode not in ("L", "RGB", "RGBA", "F"):
        grey = image.mode in ("1", "LA", "La") or image.mode.startswith("I")
        image = _to_eight_bits(image, 1 if grey else 3)
    return np.asarray(image)


def _to_eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """Convert to 8 bits per channel and the classifier's number of channels.

    Raises:
        ImageError: pixels whose scale or colours are not defined.
    """
    if image.mode == "F":
        raise ImageError("has floating-point pixels of unknown scale; expected 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        if values.min() < 0 or values.max() > 65_535:
            raise ImageError(f"has values from {values.min():g} to {values.max():g}; expected 8 or 16 bits per channel")
        image = Image.fromarray(np.round(values / 257.0).astype(np.uint8), "L" if values.ndim == 2 else None)
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "LAB":
        raise ImageError("has LAB colours, which are not converted; expected grey or RGB")
    return image.convert("L" if channels == 1 else "RGB")
