"""JPEG's lossy part as a purifier: colour space, blocks, cosine transform, quantisation, and back.

Entropy coding loses nothing and is left out. Two modes: exact, which rounds where a stock encoder and decoder round and
so has no gradient, and soft (:meth:`Codec.twin`), which an adaptive attacker differentiates through.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, pad

from certify.errors import UserError
from denoisers.quantisation import Steps, flat, read_tables, standard
from denoisers.randomness import Generators

BLOCK = 8
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))  # BT.601, full range, as JFIF has it


def dct_matrix(length: int = BLOCK) -> Tensor:
    """The orthonormal DCT-II: ``(length, length)`` float64, row k the k-th basis vector."""
    n = torch.arange(length, dtype=torch.float64)
    found: Tensor = (2 / length) ** 0.5 * torch.cos(math.pi / length * n[:, None] * (n + 0.5))
    found[0] = length**-0.5
    return found


@functools.cache
def _dct2(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two-dimensional transform of a block whose rows follow each other, ``(64, 64)``."""
    with torch.inference_mode(False):  # it is kept, and what comes later may need gradients
        return torch.kron(dct_matrix(), dct_matrix()).to(device, dtype)


def coefficients(planes: Tensor) -> Tensor:
    """DCT coefficients ``(B, N, rows, columns, 64)`` of the 8x8 blocks of planes ``(B, N, H, W)``, edges repeated."""
    height, width = planes.shape[-2:]
    padded = pad(planes, (0, -width % BLOCK, 0, -height % BLOCK), mode="replicate")
    blocks = padded.unfold(2, BLOCK, BLOCK).unfold(3, BLOCK, BLOCK).flatten(-2)
    return blocks @ _dct2(planes.device, planes.dtype).T


def planes_of(found: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`coefficients`: planes ``(B, N, height, width)``."""
    batch, planes, rows, columns, _ = found.shape
    blocks = (found @ _dct2(found.device, found.dtype)).view(batch, planes, rows, columns, BLOCK, BLOCK)
    whole = blocks.transpose(3, 4).reshape(batch, planes, rows * BLOCK, columns * BLOCK)
    return whole[..., :height, :width]


def to_planes(images: Tensor) -> list[Tensor]:
    """Luma ``(B, 1, H, W)`` and, of colour images, both colour differences ``(B, 2, H, W)``, about 0, in the same unit.

    Linear: of a difference of images it gives the difference of their planes.

    Raises:
        UserError: images of neither 1 nor 3 channels.
    """
    if images.shape[1] == 1:
        return [images]
    if images.shape[1] != 3:
        raise UserError(f"JPEG: images of {images.shape[1]} channels; expected 1 (grey) or 3 (RGB)")
    mixed = torch.einsum("ij,bjhw->bihw", images.new_tensor(_TO_YCC), images)
    return [mixed[:, :1], mixed[:, 1:]]


def to_images(planes: Sequence[Tensor]) -> Tensor:
    """The inverse of :func:`to_planes`: images ``(B, 1 or 3, H, W)``."""
    if len(planes) == 1:
        return planes[0]
    return torch.einsum("ij,bjhw->bihw", planes[0].new_tensor(_TO_RGB), torch.cat(list(planes), 1))


class Codec(nn.Module):
    """Images coded and decoded again: ``(B, C, H, W)`` in [0, 1] to the same shape, for 1 or 3 channels of any size.

    Exact: samples are whole grey levels before and after each transform, coefficients multiples of 1/8 before they are
    quantised, as in libjpeg, and ties go away from zero; computed in float64, so that no image depends on its batch.
    The result is Pillow's to 2 grey levels (3 in blue, which adds two planes), except in blocks with a coefficient
    within libjpeg's own rounding error of a tie. The grid of blocks starts at the upper left corner.

    Soft: round(z) + (z - round(z))^3 in place of rounding z = coefficient / step (Shin and Song 2017), at most 1/8 away
    from it, and rounding to grey levels has the gradient of the identity.

    Args:
        luma: 64 steps.
        chroma: 64 steps of both colour differences.
        subsampling: 444, or 420 for colour differences at half the resolution.
        soft: differentiable.
        table: what the steps are called, for the record.
        quality: their nominal quality, likewise.
        tables: SHA-256 of the file they come from, likewise.

    Raises:
        UserError: steps or subsampling that are none.
    """

    luma: Tensor
    chroma: Tensor

    def __init__(
        self,
        luma: Sequence[int],
        chroma: Sequence[int],
        subsampling: int = 444,
        *,
        soft: bool = False,
        table: str = "own",
        quality: int | None = None,
        tables: str | None = None,
    ) -> None:
        super().__init__()
        steps = Steps(tuple(luma), tuple(chroma))
        if subsampling not in (444, 420):
            raise UserError(f"JPEG: subsampling={subsampling!r}; expected 444 (none) or 420")
        self.register_buffer("luma", torch.tensor(steps.luma), persistent=False)
        self.register_buffer("chroma", torch.tensor(steps.chroma), persistent=False)
        self.subsampling, self.soft = subsampling, soft
        self.table, self.quality, self.tables = table, quality, tables

    @property
    def differentiable(self) -> bool:
        """Whether autograd gives gradients of the output: of the soft mode only."""
        return self.soft

    def twin(self) -> Codec:
        """The soft codec with the same steps."""
        return Codec(**{**self._options(), "soft": True}).to(self.luma.device)

    def quantised(self, images: Tensor) -> list[Tensor]:
        """Quantised coefficients ``(B, N, rows, columns, 64)`` of luma (N = 1) and, if any, colour (N = 2)."""
        exact = torch.float32 if images.device.type == "mps" else torch.float64
        planes = to_planes(self._whole(images.to(exact).clamp(0, 1) * 255))
        planes[0] = planes[0] - 128
        planes = [self._whole(p).clamp(-128, 127) for p in planes]
        if self.subsampling == 420:
            planes[1:] = [self._halved(p) for p in planes[1:]]
        return [self._rounded(coefficients(p), s) for p, s in zip(planes, (self.luma, self.chroma), strict=False)]

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Generators = None) -> Tensor:
        """Decoded images; deterministic, whatever the noise level."""
        height, width = images.shape[-2:]
        small = ((height + 1) // 2, (width + 1) // 2) if self.subsampling == 420 else (height, width)
        planes = []
        for found, steps, size in zip(
            self.quantised(images), (self.luma, self.chroma), ((height, width), small), strict=False
        ):
            plane = planes_of(found * steps, *size)
            planes.append(self._whole(plane).clamp(-128, 127))
        if len(planes) > 1 and self.subsampling == 420:  # linear interpolation, which decoders call fancy upsampling
            large = interpolate(planes[1], scale_factor=2, mode="bilinear", align_corners=False)
            planes[1] = self._whole(large[..., :height, :width])
        return (self._whole(to_images(planes) + 128).clamp(0, 255) / 255).to(images.dtype)

    def nonzeros(self, images: Tensor) -> Tensor:
        """Coefficients a pixel ``(B,)`` that are not zero: what the size of the file is roughly proportional to."""
        counts = [(q.round() != 0).flatten(1).sum(1) for q in self.quantised(images)]
        return torch.stack(counts).sum(0) / (images.shape[-2] * images.shape[-1])

    def _whole(self, values: Tensor) -> Tensor:
        """Whole grey levels; in soft mode with the gradient of the identity."""
        found = (values + 0.5).floor()
        return values + (found - values).detach() if self.soft else found

    def _rounded(self, found: Tensor, steps: Tensor) -> Tensor:
        if self.soft:
            z = found / steps
            return z.round() + (z - z.round()) ** 3
        z = (found * 8).round() / 8 / steps
        return z.sign() * (z.abs() + 0.5).floor()

    def _halved(self, planes: Tensor) -> Tensor:
        """Means of 2x2 pixels; halves go down and up in turn, as in libjpeg."""
        height, width = planes.shape[-2:]
        padded = pad(planes, (0, -width % (2 * BLOCK), 0, height % 2), mode="replicate")
        mean = avg_pool2d(padded, 2)
        if self.soft:
            return mean
        bias = torch.tensor([0.25, 0.5], dtype=mean.dtype, device=mean.device).repeat(mean.shape[-1] // 2)
        return (mean + bias).floor()

    def _options(self) -> dict[str, Any]:
        steps = {"luma": self.luma.tolist(), "chroma": self.chroma.tolist(), "subsampling": self.subsampling}
        return {**steps, "table": self.table, "quality": self.quality, "tables": self.tables}

    def describe(self) -> dict[str, Any]:
        """Every number that fixes the function, for the record; :func:`from_record` reads it."""
        return {"name": "jpeg", **self._options(), **({"soft": True} if self.soft else {})}


def from_record(found: dict[str, Any]) -> Codec:
    """The codec that :meth:`Codec.describe` describes."""
    return Codec(**{key: value for key, value in found.items() if key != "name"})


def jpeg(quality: int = 75, subsampling: int = 444, table: str | None = None, tables: str | None = None) -> Codec:
    """The codec at a quality.

    Args:
        quality: from 1 to 100; of tables in a file, one of their nominal qualities.
        subsampling: 444, or 420.
        table: ``standard`` (default) or ``flat``, one step for all; of a file ``nn`` (default), ``std`` or ``flat``.
        tables: a file of ``python -m training.coefficients``.

    Raises:
        UserError: no such quality, table or file.
    """
    if tables is not None and table != "standard":
        found = read_tables(tables)
        kind = table or "nn"
        steps, source = found.steps(kind, quality), found.sha256
    elif table in (None, "standard", "flat"):
        kind, source = table or "standard", None
        steps = flat(quality) if table == "flat" else standard(quality)
    else:
        raise UserError(f"jpeg: table={table!r}; expected standard or flat, or tables=FILE with nn, std or flat")
    return Codec(steps.luma, steps.chroma, subsampling, table=kind, quality=quality, tables=source)
