"""Convert image files and arrays to tensors ``(C, H, W)`` in [0, 1] at the classifier's input size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from certify.errors import ImageError
from certify.images.decode import LIMITS, DecodeLimits, decode, to_array

if TYPE_CHECKING:
    from certify.models.classifier import InputSpec


def preprocess(raw: bytes | np.ndarray, spec: InputSpec) -> Tensor:
    """Convert a file's content or an array to the classifier's input ``(C, H, W)``, float32 in [0, 1].

    Raises:
        ImageError: the image is damaged, or its channels, type or values are not supported.
    """
    channels = spec.size[0] if spec.size else None
    if isinstance(raw, bytes):
        return resize_to_input(decode(raw, channels or 3), spec)
    array = np.asarray(raw)
    image = _array_to_tensor(array, channels)
    if spec.size is None or tuple(image.shape) == spec.size:
        return image
    if array.dtype == np.uint8 and channels in (1, 3):  # as a file of the same picture would be
        from torchvision.transforms.functional import to_pil_image

        return resize_to_input(to_pil_image(image), spec)
    return resize_to_input(image, spec)


def resize_to_input(picture: Any, spec: InputSpec, limits: DecodeLimits = LIMITS) -> Tensor:
    """Resize and crop a PIL image or a tensor ``(C, H, W)`` in [0, 1] to the classifier's input, in [0, 1].

    Raises:
        ImageError: the aspect ratio is too large to resize.
    """
    if spec.transform is None:
        from torchvision.transforms.functional import to_tensor

        return as_image(to_tensor(picture), None)
    height, width = picture.shape[-2:] if isinstance(picture, Tensor) else picture.size[::-1]
    limits.check_aspect(width, height)
    return as_image(spec.transform(picture).clamp(0.0, 1.0), spec.size)  # bicubic overshoots


_SLACK = 1e-6  # rounding errors of float32, such as -3e-8, are clamped; anything further out is rejected


def as_image(image: Tensor | np.ndarray, size: tuple[int, int, int] | None) -> Tensor:
    """Convert an image to float32 ``(C, H, W)`` in [0, 1] and check it.

    Args:
        image: ``(C, H, W)`` float in [0, 1], or uint8.
        size: expected shape (C, H, W), or None for any.

    Raises:
        ImageError: wrong shape, type or range.
    """
    try:
        if isinstance(image, Tensor):
            tensor = image.detach()
        else:  # a copy, as arrays of PIL images cannot be written to
            array = np.asarray(image)
            extended = array.dtype.kind == "f" and array.dtype.itemsize > 8  # long double, which torch lacks
            own_order = np.dtype(np.float64) if extended else array.dtype.newbyteorder("=")
            tensor = torch.from_numpy(np.array(array, own_order, order="C"))
    except (TypeError, ValueError):
        raise ImageError(f"image of type {type(image).__name__}; expected an array or tensor (C, H, W)") from None
    if tensor.ndim != 3 or (size is not None and tuple(tensor.shape) != size):
        expected = "(C, H, W)" if size is None else str(size)
        raise ImageError(
            f"image of shape {tuple(tensor.shape)}; expected {expected}, one image at the classifier's input size"
        )
    if tensor.dtype == torch.uint8:
        return tensor.to(torch.float32) / 255.0
    if not tensor.is_floating_point():
        raise ImageError(f"image of type {tensor.dtype}; expected floating point in [0, 1] or uint8")
    tensor = tensor.to(torch.float32)
    low, high = float(tensor.min()), float(tensor.max())
    if not (low >= -_SLACK and high <= 1.0 + _SLACK):  # also true of NaN
        raise ImageError(
            f"image with values from {low:.4g} to {high:.4g}; expected [0, 1], before normalisation, or uint8"
        )
    return tensor.clamp(0.0, 1.0) + 0.0  # turns -0.0 into 0.0, so that equal images have equal bits


def channels_first(image: Any, channels: int | None) -> Any:
    """Convert an array, tensor or PIL image to ``(C, H, W)``; return anything but 2 or 3 dimensions unchanged.

    Args:
        image: ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)``.
        channels: the classifier's, or None.
    """
    array = image if isinstance(image, Tensor) else to_array(image)
    if array.ndim not in (2, 3):
        return image
    own, last = channels_of(array.shape, channels)
    if array.ndim == 2:
        return array[None]
    return (array.permute(2, 0, 1) if isinstance(array, Tensor) else np.moveaxis(array, 2, 0))[:own] if last else array


def _array_to_tensor(array: np.ndarray, channels: int | None) -> Tensor:
    """Convert an array (H, W), (H, W, C) or (C, H, W) to ``(C, H, W)`` in [0, 1] with the classifier's channels.

    Raises:
        ImageError: wrong number of channels, or values that :func:`as_image` rejects.
    """
    if array.ndim in (2, 3):
        array = channels_first(array, channels)
        if channels is not None and len(array) != channels and {len(array), channels} != {1, 3}:
            raise ImageError(f"has {len(array)} channels; the classifier takes {channels}")
    image = as_image(array, None)
    if channels == 3 and image.shape[0] == 1:
        return image.expand(3, -1, -1).contiguous()
    if channels == 1 and image.shape[0] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R 601, as PIL converts
        return (image * weights).sum(0, keepdim=True).clamp(0.0, 1.0)
    return image


def channels_of(shape: Sequence[int], expected: int | None) -> tuple[int, bool]:
    """Return the number of channels of an array (H, W), (H, W, C) or (C, H, W), and whether they come last.

    With channels last, a fourth channel is alpha; it is dropped unless ``expected`` is 4.
    """
    if len(shape) == 2:
        return 1, False
    if shape[0] not in (1, 3, expected) and shape[2] in (1, 3, 4, expected):
        return (shape[2] if shape[2] == expected else min(shape[2], 3)), True
    return shape[0], False
