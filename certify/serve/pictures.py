"""Decode image files uploaded to the server's page, and create its example image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from certify.blackbox.encoding import encode, to_pictures
from certify.errors import UserError
from certify.images.decode import DecodeLimits, decode
from certify.images.preprocess import resize_to_input
from certify.models.classifier import InputSpec

_MAX_ASPECT = 20  # maximum ratio of the longer to the shorter side of an image file


def read_picture(content: bytes, spec: InputSpec, max_pixels: int) -> np.ndarray:
    """Decode an image file to the classifier's input, ``(C, H, W)`` in [0, 1].

    Raises:
        ImageError: not an image, or an image beyond the limits.
    """
    limits = DecodeLimits(max_pixels, max_aspect=_MAX_ASPECT)
    return resize_to_input(decode(content, spec.size[0] if spec.size is not None else 3, limits), spec, limits).numpy()


def example_picture(
    path: str | None, size: tuple[int, int, int], read: Callable[[bytes], np.ndarray], *, digits: bool
) -> bytes | None:
    """Return the page's example as PNG: the user's file, or a digit or landscape at the classifier's input size.

    Returns None if the classifier takes neither grey nor colour images.

    Raises:
        UserError: the user's file cannot be read.
    """
    if size[0] not in (1, 3):
        return None
    if path is None:
        image = digit() if digits and size == (1, 8, 8) else landscape(size)
    else:
        try:
            image = torch.from_numpy(read(Path(path).read_bytes()))
        except OSError as error:
            raise UserError(f"--example {path}: cannot be read: {error.strerror}") from None
        except UserError as error:
            raise UserError(f"--example {path}: the image {error}") from None
    return encode(to_pictures(image[None])[0])


def digit() -> Tensor:
    """Return a handwritten digit that was not used for training, ``(1, 8, 8)`` in [0, 1]."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images[-1]).float()[None] / 16


def landscape(size: tuple[int, int, int]) -> Tensor:
    """Draw a sun over hills, ``(C, H, W)`` in [0, 1]; in colour if C is 3, else in grey."""
    channels, height, width = size
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")

    def colour(red: float, green: float, blue: float) -> Tensor:
        return torch.tensor([red, green, blue])[:, None, None]

    sky = colour(0.35, 0.6, 0.9) + (colour(0.95, 0.9, 0.8) - colour(0.35, 0.6, 0.9)) * y
    sun = (x - 0.72) ** 2 + (y - 0.25) ** 2 < 0.012
    far, near = y > 0.62 - 0.1 * torch.sin(7 * x), y > 0.75 + 0.08 * torch.sin(5 * x + 2)
    image = torch.where(sun, colour(1.0, 0.85, 0.3), sky)
    image = torch.where(far, colour(0.35, 0.55, 0.4), image)
    image = torch.where(near, colour(0.2, 0.4, 0.2) * (1.4 - 0.5 * y), image)
    return image if channels == 3 else image.mean(0, keepdim=True).expand(channels, -1, -1).contiguous()
