"""A tensor to the picture that a service gets, and that to bytes: clipped, rounded to 8 bits, then PNG or JPEG.

What is certified is the service behind this step: a label is a function of the tensor, rounding included, so a
certificate needs no extra term for it.
"""

from __future__ import annotations

import io
import re

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from certify.blackbox.types import Picture
from certify.errors import RunFault, UserError
from certify.images.decode import decode

_LEVELS = 255
_COMPRESSION = 1  # of zlib: noise hardly compresses, so more effort only costs time
_BEST, _USUAL = 100, 95  # JPEG qualities


def to_pictures(images: Tensor) -> list[Picture]:
    """Images ``(B, C, H, W)``, floating, meant for [0, 1], clipped to it and rounded to the nearest of 256 levels.

    Raises:
        RunFault: a value that is no number, which no rounding makes a pixel.
    """
    if not bool(torch.isfinite(images).all()):
        raise RunFault("an image to be sent has values that are not finite; nothing of it was sent")
    levels = (images.detach().clamp(0, 1) * _LEVELS).round().to(torch.uint8)
    return [Picture(one) for one in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def to_tensor(picture: Picture) -> Tensor:
    """The picture as ``(C, H, W)``, float32 in [0, 1]: what a service computes on if it divides pixels by 255."""
    return torch.from_numpy(picture.pixels.transpose(2, 0, 1).astype(np.float32)) / _LEVELS


def encode(picture: Picture, encoding: str = "png") -> bytes:
    """The bytes of an image file.

    Args:
        picture: to encode.
        encoding: ``png`` (lossless), ``jpeg`` or ``jpegQ`` with a quality Q from 1 to 100, such as ``jpeg90``.

    Raises:
        UserError: another encoding.
    """
    kind, quality = read_encoding(encoding)
    out = io.BytesIO()
    pixels = picture.pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if kind == "png":
        image.save(out, "PNG", compress_level=_COMPRESSION)
    else:
        image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def seen(picture: Picture, encoding: str = "png") -> Picture:
    """The picture after it was encoded and decoded again: itself for PNG."""
    return from_bytes(encode(picture, encoding), picture.pixels.shape[2])


def from_bytes(content: bytes, channels: int) -> Picture:
    """An image file as a picture.

    Raises:
        ImageError: it cannot be read, or is larger than the limits of :mod:`certify.images.decode`.
    """
    pixels = np.array(decode(content, channels), dtype=np.uint8)
    return Picture(pixels.reshape(*pixels.shape[:2], channels))


def media_type(encoding: str) -> str:
    """Of HTTP's content type."""
    return f"image/{read_encoding(encoding)[0]}"


def read_encoding(encoding: str) -> tuple[str, int]:
    """``png`` or ``jpeg``, and the quality, which PNG ignores.

    Raises:
        UserError: neither.
    """
    found = re.fullmatch(r"(png)|(jpeg)(\d{1,3})?", str(encoding))
    quality = int(found[3] or _USUAL) if found else 0
    if found is None or not 1 <= quality <= _BEST:
        raise UserError(f"encoding {encoding!r}; expected png, jpeg, or jpeg with a quality of 1 to 100, as in jpeg90")
    return found[1] or found[2], quality
