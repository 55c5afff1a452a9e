"""Convert tensors to the pictures that a service receives: clipped, rounded to 8 bits, then encoded as PNG or JPEG.

This step is part of the certified function: the label is a function of the tensor, rounding included, so a certificate
needs no extra term for it.
"""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from certify.blackbox.types import Picture
from certify.errors import RunFault, UserError
from certify.images.decode import decode
from certify.types import BaseClassifier

_LEVELS = 255
_COMPRESSION = 1  # zlib level: noise hardly compresses, so a higher one only costs time
_BEST, _USUAL = 100, 95  # JPEG qualities


def to_pictures(images: Tensor) -> list[Picture]:
    """Clip floating-point images ``(B, C, H, W)`` to [0, 1] and round them to the nearest of 256 levels.

    Raises:
        RunFault: a value is not finite.
    """
    if not bool(torch.isfinite(images).all()):
        raise RunFault("an image has values that are not finite; it was not sent")
    levels = (images.detach().clamp(0, 1) * _LEVELS).round().to(torch.uint8)
    return [Picture(one) for one in levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def to_tensor(picture: Picture) -> Tensor:
    """Return a picture as ``(C, H, W)``, float32 in [0, 1]: the pixels divided by 255."""
    return torch.from_numpy(picture.pixels.transpose(2, 0, 1).astype(np.float32)) / _LEVELS


def encode(picture: Picture, encoding: str = "png") -> bytes:
    """Encode a picture as the bytes of an image file.

    Args:
        picture: the picture.
        encoding: ``png`` (lossless), ``jpeg`` or ``jpegQ`` with a quality Q from 1 to 100, such as ``jpeg90``.

    Raises:
        UserError: an unknown encoding.
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


def encode_base64(picture: Picture, encoding: str = "png") -> str:
    """Return the image file of :func:`encode` in base64, for JSON."""
    return base64.b64encode(encode(picture, encoding)).decode()


def round_trip(picture: Picture, encoding: str = "png") -> Picture:
    """Return the picture as a service decodes it; with PNG the picture itself."""
    return from_bytes(encode(picture, encoding), picture.pixels.shape[2])


def from_bytes(content: bytes, channels: int) -> Picture:
    """Decode an image file to a picture with 1 or 3 channels.

    Raises:
        ImageError: the file cannot be decoded, or exceeds the limits of :mod:`certify.images.decode`.
    """
    pixels = np.array(decode(content, channels), dtype=np.uint8)
    return Picture(pixels.reshape(*pixels.shape[:2], channels))


def media_type(encoding: str) -> str:
    """Return the HTTP content type of an encoding."""
    return f"image/{read_encoding(encoding)[0]}"


def read_encoding(encoding: str) -> tuple[str, int]:
    """Parse an encoding into ``png`` or ``jpeg``, and the quality, which PNG ignores.

    Raises:
        UserError: an unknown encoding.
    """
    match = re.fullmatch(r"(png)|(jpeg)(\d{1,3})?", str(encoding))
    quality = int(match[3] or _USUAL) if match else 0
    if match is None or not 1 <= quality <= _BEST:
        raise UserError(f"encoding {encoding!r}; expected png, jpeg, or jpeg with a quality of 1 to 100, as in jpeg90")
    return match[1] or match[2], quality


class AsSent:
    """A local classifier preceded by the steps before a service: clipping, rounding to 8 bits, and encoding.

    A local run of it and an audit of a service that computes the same function yield the same votes on the same noise.

    Args:
        classifier: any base classifier.
        encoding: as for :func:`encode`.
    """

    def __init__(self, classifier: BaseClassifier, encoding: str = "png") -> None:
        self.classifier, self.encoding = classifier, encoding
        self.num_classes = classifier.num_classes
        self.input = getattr(classifier, "input", None)
        self.class_names = getattr(classifier, "class_names", None)

    def __call__(self, images: Tensor) -> Tensor:
        """Return labels ``(B,)`` of images ``(B, C, H, W)``."""
        pictures = to_pictures(images)
        if self.encoding != "png":
            pictures = [round_trip(picture, self.encoding) for picture in pictures]
        return self.classifier(torch.stack([to_tensor(picture) for picture in pictures]).to(images.device))

    def describe(self) -> dict[str, Any]:
        """Return the classifier's description, and the encoding."""
        return {**self.classifier.describe(), "picture": {"bits": 8, "encoding": self.encoding}}
