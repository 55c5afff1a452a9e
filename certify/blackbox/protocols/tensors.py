"""Convert pictures to the tensors of model servers: values, layout and JSON text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from certify.blackbox.protocols.parsing import one_of
from certify.blackbox.types import Picture
from certify.errors import UserError

DATATYPES = ("FP32", "UINT8")
LAYOUTS = ("NCHW", "NHWC")


@dataclass(frozen=True)
class TensorInput:
    """Conversion of pixels to a tensor: ``(pixel / 255 - mean) / std`` in float32, or the bytes unchanged.

    Attributes:
        datatype: ``FP32`` or ``UINT8``.
        layout: ``NCHW`` or ``NHWC``.
        mean: one number or one per channel; FP32 only.
        std: one number or one per channel; FP32 only.
    """

    datatype: str = "FP32"
    layout: str = "NCHW"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def array(self, picture: Picture) -> np.ndarray:
        """Return the tensor ``(1, C, H, W)`` or ``(1, H, W, C)``."""
        return self._laid_out(picture, self.levels(picture.pixels.shape[2])[0])

    def text(self, picture: Picture, nested: bool = False) -> str:
        """Return the tensor as JSON, a flat list or nested lists; the texts of the 256 pixel values are precomputed."""
        texts = self._laid_out(picture, self.levels(picture.pixels.shape[2])[1])
        return _written(texts if nested else texts.reshape(-1))

    def _laid_out(self, picture: Picture, levels: np.ndarray) -> np.ndarray:
        values = levels[np.arange(len(levels)), picture.pixels]
        return np.ascontiguousarray((values if self.layout == "NHWC" else values.transpose(2, 0, 1))[None])

    def levels(self, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tensor values of the 256 pixel values, ``(C, 256)``, as numbers and as exact text."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise UserError(
                    f"{name} has {len(values)} numbers; expected 1, or {channels}, one per channel of the pictures"
                )
        return _levels(self, channels)

    @property
    def about(self) -> dict[str, Any]:
        """The options as stored in the ledger."""
        return {"datatype": self.datatype, "layout": self.layout, "mean": list(self.mean), "std": list(self.std)}


def tensor_input(datatype: str, layout: str, mean: Any, std: Any) -> TensorInput:
    """Build the conversion from options; ``mean`` and ``std`` may be a number, a list, or ``0.5,0.5,0.5``.

    Raises:
        UserError: an unknown datatype or layout, or invalid numbers.
    """
    one_of("datatype", datatype, DATATYPES)
    one_of("layout", layout, LAYOUTS)
    tensor = TensorInput(datatype, layout, _numbers("mean", mean), _numbers("std", std))
    if any(s <= 0 for s in tensor.std):
        raise UserError(f"std {std!r}; expected numbers above 0")
    if datatype == "UINT8" and (tensor.mean, tensor.std) != ((0.0,), (1.0,)):
        raise UserError("mean and std are for datatype FP32; UINT8 sends the bytes unchanged")
    return tensor


def _numbers(name: str, given: Any) -> tuple[float, ...]:
    parts: Sequence[Any] = (
        given.split(",") if isinstance(given, str) else given if hasattr(given, "__len__") else [given]
    )
    try:
        values = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        values = ()
    if not values or not all(np.isfinite(values)):
        raise UserError(f"{name} {given!r}; expected a number, or one per channel, such as 0.485,0.456,0.406")
    return values


@functools.lru_cache(maxsize=8)
def _levels(tensor: TensorInput, channels: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.broadcast_to(np.arange(256, dtype=np.uint8), (channels, 256))
    numbers: np.ndarray = pixels
    if tensor.datatype == "FP32":
        mean, std = (np.asarray(v, dtype=np.float32)[:, None] for v in (tensor.mean, tensor.std))
        numbers = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return numbers, np.array([[str(value) for value in row] for row in numbers], dtype=object)


def _written(texts: np.ndarray) -> str:
    rows = texts.tolist() if texts.ndim == 1 else map(_written, texts)
    return f"[{','.join(rows)}]"
