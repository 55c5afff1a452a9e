"""The lossy part of JPEG as a purifier: colour space, blocks, cosine transform, quantisation, and their inverses.

Entropy coding is lossless and left out. The exact mode rounds where a standard encoder and decoder round, and so has no
useful gradient; the soft mode (:meth:`Codec.twin`) is what an adaptive attacker differentiates through.
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
from denoisers.quantisation import Steps, TableSet, flat, read_tables, standard
from denoisers.randomness import Generators

BLOCK = 8
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))  # BT.601, full range, as in JFIF


def dct_matrix(length: int = BLOCK) -> Tensor:
    """Return the orthonormal DCT-II ``(length, length)`` in float64; row k is the k-th basis vector."""
    n = torch.arange(length, dtype=torch.float64)
    matrix: Tensor = (2 / length) ** 0.5 * torch.cos(math.pi / length * n[:, None] * (n + 0.5))
    matrix[0] = length**-0.5
    return matrix


@functools.cache
def _dct2(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the two-dimensional transform ``(64, 64)`` of a flattened block."""
    with torch.inference_mode(False):  # the result is cached, and later callers may need gradients
        return torch.kron(dct_matrix(), dct_matrix()).to(device, dtype)


def coefficients(planes: Tensor) -> Tensor:
    """Compute DCT coefficients ``(B, N, rows, columns, 64)`` of the 8x8 blocks of planes ``(B, N, H, W)``.

    Planes are padded to whole blocks by repeating their edges.
    """
    height, width = planes.shape[-2:]
    padded = pad(planes, (0, -width % BLOCK, 0, -height % BLOCK), mode="replicate")
    blocks = padded.unfold(2, BLOCK, BLOCK).unfold(3, BLOCK, BLOCK).flatten(-2)
    return blocks @ _dct2(planes.device, planes.dtype).T


def inverse_coefficients(values: Tensor, height: int, width: int) -> Tensor:
    """Invert :func:`coefficients`: planes ``(B, N, height, width)``."""
    batch, planes, rows, columns, _ = values.shape
    blocks = (values @ _dct2(values.device, values.dtype)).view(batch, planes, rows, columns, BLOCK, BLOCK)
    padded = blocks.transpose(3, 4).reshape(batch, planes, rows * BLOCK, columns * BLOCK)
    return padded[..., :height, :width]


def to_planes(images: Tensor) -> list[Tensor]:
    """Split images into luma ``(B, 1, H, W)`` and, for RGB, colour differences ``(B, 2, H, W)`` around 0.

    The map is linear and keeps the unit, so it applies to differences of images too.

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
    """Invert :func:`to_planes`: images ``(B, 1 or 3, H, W)``."""
    if len(planes) == 1:
        return planes[0]
    return torch.einsum("ij,bjhw->bihw", planes[0].new_tensor(_TO_RGB), torch.cat(list(planes), 1))


class Codec(nn.Module):
    """Encode and decode images ``(B, C, H, W)`` in [0, 1], of 1 or 3 channels and any size.

    Exact mode: as in libjpeg, samples are rounded to grey levels before and after each transform and coefficients to
    multiples of 1/8 before quantisation, with ties away from zero; computed in float64, so that no image depends on its
    batch. The result equals Pillow's up to 2 grey levels (3 in blue, the sum of two planes), except in blocks with a
    coefficient within libjpeg's own rounding error of a tie. The grid of blocks starts at the upper left corner.

    Soft mode: z = coefficient / step is rounded to round(z) + (z - round(z))^3, which is within 1/8 of it (Shin and
    Song 2017), and rounding to grey levels has the gradient of the identity.

    Args:
        luma: 64 steps.
        chroma: 64 steps of both colour differences.
        subsampling: 444, or 420 for colour differences at half the resolution.
        soft: differentiable mode.
        table: kind of the tables, for the record.
        quality: their nominal quality, for the record.
        tables: SHA-256 of the file they are from, for the record.

    Raises:
        UserError: invalid steps or subsampling.
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
        """True in soft mode: autograd gives the gradient of the output."""
        return self.soft

    def twin(self) -> Codec:
        """Return the soft codec with the same steps."""
        return from_record({**self.describe(), "soft": True}).to(self.luma.device)

    def quantised(self, images: Tensor) -> list[Tensor]:
        """Quantise coefficients ``(B, N, rows, columns, 64)`` of luma (N = 1) and, for RGB, chroma (N = 2)."""
        exact = torch.float32 if images.device.type == "mps" else torch.float64
        planes = to_planes(self._grey_levels(images.to(exact).clamp(0, 1) * 255))
        planes[0] = planes[0] - 128
        planes = [self._grey_levels(p).clamp(-128, 127) for p in planes]
        if self.subsampling == 420:
            planes[1:] = [self._halved(p) for p in planes[1:]]
        return [self._divide(coefficients(p), s) for p, s in zip(planes, (self.luma, self.chroma), strict=False)]

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Generators = None) -> Tensor:
        """Encode and decode; deterministic, ``sigma`` is not used."""
        height, width = images.shape[-2:]
        half = 2 if self.subsampling == 420 else 1
        shapes = ((height, width), (-(-height // half), -(-width // half)))
        planes = []
        for values, steps, shape in zip(self.quantised(images), (self.luma, self.chroma), shapes, strict=False):
            planes.append(self._grey_levels(inverse_coefficients(values * steps, *shape)).clamp(-128, 127))
        if len(planes) > 1 and self.subsampling == 420:  # linear interpolation, libjpeg's "fancy upsampling"
            large = interpolate(planes[1], scale_factor=2, mode="bilinear", align_corners=False)
            planes[1] = self._grey_levels(large[..., :height, :width])
        return (self._grey_levels(to_images(planes) + 128).clamp(0, 255) / 255).to(images.dtype)

    def nonzeros(self, images: Tensor) -> Tensor:
        """Count nonzero coefficients per pixel ``(B,)``, to which the file size is roughly proportional."""
        counts = [(q.round() != 0).flatten(1).sum(1) for q in self.quantised(images)]
        return torch.stack(counts).sum(0) / (images.shape[-2] * images.shape[-1])

    def _grey_levels(self, values: Tensor) -> Tensor:
        """Round to whole grey levels; in soft mode with the gradient of the identity."""
        rounded = (values + 0.5).floor()
        return values + (rounded - values).detach() if self.soft else rounded

    def _divide(self, values: Tensor, steps: Tensor) -> Tensor:
        """Divide coefficients by steps, and round."""
        if self.soft:
            z = values / steps
            return z.round() + (z - z.round()) ** 3
        z = (values * 8).round() / 8 / steps
        return z.sign() * (z.abs() + 0.5).floor()

    def _halved(self, planes: Tensor) -> Tensor:
        """Average 2x2 pixels; halves are rounded down and up in turn, as in libjpeg."""
        height, width = planes.shape[-2:]
        padded = pad(planes, (0, -width % (2 * BLOCK), 0, height % 2), mode="replicate")
        mean = avg_pool2d(padded, 2)
        if self.soft:
            return mean
        bias = torch.tensor([0.25, 0.5], dtype=mean.dtype, device=mean.device).repeat(mean.shape[-1] // 2)
        return (mean + bias).floor()

    def describe(self) -> dict[str, Any]:
        """Return all numbers that define the function, for the record; :func:`from_record` reads it."""
        steps = {"luma": self.luma.tolist(), "chroma": self.chroma.tolist(), "subsampling": self.subsampling}
        origin = {"table": self.table, "quality": self.quality, "tables": self.tables}
        return {"name": "jpeg", **steps, **origin, **({"soft": True} if self.soft else {})}


def from_record(record: dict[str, Any]) -> Codec:
    """Build the codec that :meth:`Codec.describe` describes."""
    return Codec(**{key: value for key, value in record.items() if key != "name"})


def from_tables(tables: TableSet, kind: str, quality: int, subsampling: int = 444) -> Codec:
    """Build a codec from measured tables.

    Raises:
        UserError: no such kind or nominal quality.
    """
    steps = tables.steps(kind, quality)
    return Codec(steps.luma, steps.chroma, subsampling, table=kind, quality=quality, tables=tables.sha256)


def jpeg(quality: int = 75, subsampling: int = 444, table: str | None = None, tables: str | None = None) -> Codec:
    """Build the codec of a quality.

    Args:
        quality: from 1 to 100; with a file of tables, one of their nominal qualities.
        subsampling: 444 or 420.
        table: ``standard`` (default) or ``flat``; with a file ``nn`` (default), ``std`` or ``flat``.
        tables: a file written by ``python -m training.coefficients``.

    Raises:
        UserError: no such quality, table or file.
    """
    if tables is not None:
        return from_tables(read_tables(tables), table or "nn", quality, subsampling)
    if table not in (None, "standard", "flat"):
        raise UserError(f"jpeg: table={table!r}; expected standard or flat, or tables=FILE with nn, std or flat")
    steps = flat(quality) if table == "flat" else standard(quality)
    return Codec(steps.luma, steps.chroma, subsampling, table=table or "standard", quality=quality)
