"""Gaussian noise drawn in exact integers: certificates that rounding cannot falsify.

In floating point x + e is not a shifted Gaussian: which numbers it can be depends on x, and a base classifier that
looks at the last bits gets certificates that are wrong (``examples/floating_point.py``). Voracek and Hein ("Sound
Randomized Smoothing in Floating-Point Arithmetics", ICLR 2023) certify instead the smoothing, by a real Gaussian, of

    f'(z) = f(clip(round(z), -k, k + 1)),    k = max(1, floor(6 sigma)),

where ``round`` goes to the nearest j/255. Around an 8-bit image x, round(x + e) = x + K/255 with independent integers

    P(K = i) = Phi((2i + 1) / (510 sigma)) - Phi((2i - 1) / (510 sigma)),

so that only K has to be drawn. All K beyond 255 (k + 1) are clipped alike and are drawn as one, on either side.

Each K is decided by 60 random bits: of the 2^60 draws an atom gets P(K = i) 2^60, rounded down, and what is left over,
less than one draw an atom, is a failed draw. So no outcome is more probable than in theory; with failed samples counted
as votes for nobody, a lower bound on a class's probability is one in theory, too. (An upper bound has to count them as
votes for everybody.) No draw is ever compared in floating point.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from certify.errors import ImageError, UserError
from certify.smoothing.noise import Gaussian
from certify.smoothing.numeric import as_float

FAILED_DRAW = -(2**15)
"""Value in a block for a draw that failed: no K."""

_BITS, _FINE_BITS = 60, 44  # a draw: 16 bits decide almost all, 44 further ones the rest
_OPEN = 2**15 - 1  # first 16 bits that leave K open: no K either
_LARGEST_K = 126  # clip range whose K, and pixels plus K, are told from the two marks in int16
_SMALL = 2**20  # values. Torch starts all threads for each step: on a busy processor that takes 100 times the step
_OFF_GRID = 4  # units in the last place of float32: v / 255 or v * (1 / 255) in float32 or float64 is nearer


@dataclass(frozen=True)
class ExactGaussian(Gaussian):
    """Gaussian noise of 8-bit images in integers (Voracek and Hein 2023): l2 balls, certified for f' (see above).

    sigma is the exact value of the Python float, in the sampler as in the radius.

    Attributes:
        sigma: standard deviation before rounding, in [0, 1] pixels, below 21.16.
        rounded: whether images off the 8-bit grid are rounded to it, rather than refused.
    """

    rounded: bool = False

    name = "exact"
    one_shape = True
    sigmas = (math.ulp(0.0), 1e30)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > _LARGEST_K:
            raise UserError(
                f"sigma = {self.sigma}: exact noise goes up to 21.16, in [0, 1] pixels (0.25, not 64 of 255)"
            )

    @property
    def drawn_sigma(self) -> float:
        """Sigma itself."""
        return self.sigma

    @property
    def k(self) -> int:
        """Noisy pixels are clipped to [-k, k + 1]."""
        return max(1, math.floor(6 * self.sigma))

    def input(self, image: Tensor) -> Tensor:
        """Return the 8-bit image ``(C, H, W)``, as float32 v / 255: this image or, if ``rounded``, the nearest one.

        Raises:
            ImageError: the image is off the grid and ``rounded`` is not set.
        """
        image = image.to(torch.float32) + 0.0  # +0 for -0, whose bits are those of no small number
        nearest = _pixels((image * 255.0).round() + 0.0)
        off = int(((image.view(torch.int32) - nearest.view(torch.int32)).abs() > _OFF_GRID).sum())
        if off and not self.rounded:
            raise ImageError(
                f"{off:,} of the image's {image.numel():,} values are off the 8-bit grid (resized?); exact noise needs "
                "v / 255, v = 0 to 255: --round certifies the nearest 8-bit image"
            )
        return nearest

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw independent K of this shape, int16, on the generator's device; ``FAILED_DRAW`` where the draw failed."""
        count = math.prod(shape)
        first = _words(-(-count // 4), generator).view(torch.uint16)[:count]  # four draws share a word
        fine = functools.partial(_fine_bits, generator=generator)
        table = draw_table(self.sigma, generator.device)
        found = table.look_up_in_numpy(first, fine) if first.device.type == "cpu" else table.look_up(first, fine)
        return found.view(shape)

    def add(self, image: Tensor, drawn: Tensor) -> Tensor:
        """Return noisy copies (v + K) / 255, float32 and clipped, of an image from :meth:`input`.

        The sum is of integers: equal sums give equal floats, for any image. A failed draw becomes -k.
        """
        grid, low, high = (image * 255.0).round_().to(torch.int16), -255 * self.k, 255 * (self.k + 1)
        if image.device.type == "cpu" and drawn.numel() < _SMALL:
            sums = np.add(drawn.numpy(), grid.numpy(), out=drawn.numpy())
            return torch.from_numpy(sums.clip(low, high, out=sums) / np.float32(255.0))
        return _pixels(drawn.to(image.device).add_(grid).clamp_(low, high))

    def failed(self, drawn: Tensor) -> Tensor | None:
        """Return the samples with a failed draw, bool ``(B,)``; None, almost always, if there are none."""
        values = drawn.numpy() if drawn.device.type == "cpu" else drawn
        if not drawn.numel() or int(values.min()) != FAILED_DRAW:
            return None
        return (drawn == FAILED_DRAW).flatten(1).any(dim=1)


def _pixels(values: Tensor) -> Tensor:
    """Divide whole numbers by 255, correctly rounded to float32: CUDA multiplies by 1 / 255 unless 255 is a tensor."""
    return torch.div(values, torch.full((), 255.0, device=values.device))


def _words(count: int, generator: torch.Generator) -> Tensor:
    """Return this many times 64 random bits."""
    words = torch.empty(count, dtype=torch.int64, device=generator.device)
    return words.random_(-(2**63), None, generator=generator)


def _fine_bits(count: int, generator: torch.Generator) -> Tensor:
    """Return this many times 44 random bits."""
    return _words(count, generator).bitwise_and_(2**_FINE_BITS - 1)


def atom_counts(sigma: float) -> list[int]:
    """Return the number of the 2^60 draws for K = 0, 1, .., 255 (k + 1): P(K = i) 2^60 rounded down, as for -i.

    P(K > i) = erfc((2i + 1) / (510 sigma sqrt 2)) / 2 is computed with 256 bits. Its error, and that of differences of
    it, is a small multiple of 2^-256: even times 2^60 it lies far below 2^-100, which is subtracted before rounding
    down, so that no atom exceeds its probability. Beyond 40 standard deviations the tail, below 2^-1000, is taken for
    0, which the 2^-100 cover as well.
    """
    import mpmath

    exact = mpmath.MPContext()  # one's own: the precision of mpmath's common context belongs to all threads
    exact.prec = 256
    sigma = as_float(sigma, "sigma")
    step, last = 510 * exact.mpf(sigma), 255 * (ExactGaussian(sigma).k + 1)
    deviations = [(2 * i + 1) / step for i in range(last)]
    beyond = [exact.erfc(z / exact.sqrt(2)) / 2 if z < 40 else exact.zero for z in deviations]
    probabilities = [1 - 2 * beyond[0], *(a - b for a, b in itertools.pairwise(beyond)), beyond[-1]]
    return [max(0, int(exact.floor(p * 2**_BITS - exact.mpf(2) ** -100))) for p in probabilities]


@dataclass(frozen=True, eq=False)
class DrawTable:
    """A map from numbers in [0, 2^60) to K.

    An atom has two intervals: as many whole multiples of 2^44 as it contains, where the first 16 bits decide, and its
    remainder. The remainders of all atoms come after all the multiples, and failure comes last.

    Attributes:
        ends: ends of the intervals, int64 ``(4M + 2,)``, for K = -M .. M twice.
        values: their K, and ``FAILED_DRAW``, int16 ``(4M + 3,)``.
        coarse: K by a number's first 16 bits, or ``_OPEN`` where they do not decide, int16 ``(2^16,)``.
    """

    ends: Tensor
    values: Tensor
    coarse: Tensor

    def value(self, numbers: Tensor) -> Tensor:
        """Return K, int16, of whole numbers, int64 ``(n,)``: the definition, by a search among all intervals."""
        return self.values.index_select(0, torch.searchsorted(self.ends, numbers, right=True))

    def look_up(self, first: Tensor, fine: Callable[[int], Tensor]) -> Tensor:
        """Return K by the first 16 bits, uint16 ``(n,)``; ``fine(m)`` gives the other 44 of the m undecided ones."""
        index = first.to(torch.int32)
        found = self.coarse.index_select(0, index)
        undecided = (found == _OPEN).nonzero().view(-1)
        high = index.index_select(0, undecided).to(torch.int64).bitwise_left_shift_(_FINE_BITS)
        return found.index_copy_(0, undecided, self.value(high.bitwise_or_(fine(len(undecided)))))

    def look_up_in_numpy(self, first: Tensor, fine: Callable[[int], Tensor]) -> Tensor:
        """Return the same on a processor, in one thread, since blocks are drawn on several threads already."""
        index = first.numpy()
        found = self.coarse.numpy().take(index.astype(np.intp), mode="wrap")  # in range: the mode that checks least
        undecided = np.flatnonzero(found == _OPEN)
        numbers = (index[undecided].astype(np.int64) << _FINE_BITS) | fine(len(undecided)).numpy()
        found[undecided] = self.values.numpy()[self.ends.numpy().searchsorted(numbers, side="right")]
        return torch.from_numpy(found)


_BUILDING = threading.Lock()


def draw_table(sigma: float, device: torch.device | str = "cpu") -> DrawTable:
    """Return the table of this sigma, built on first use (0.1 to 0.5 s) and cached."""
    with _BUILDING:  # blocks are drawn on several threads
        return _draw_table(as_float(sigma, "sigma"), str(device))


@functools.cache
def _draw_table(sigma: float, device: str) -> DrawTable:
    if device != "cpu":
        table = _draw_table(sigma, "cpu")
        return DrawTable(*(part.to(device) for part in (table.ends, table.values, table.coarse)))
    counts = atom_counts(sigma)
    last = len(counts) - 1
    sizes = torch.tensor([*reversed(counts[1:]), *counts])
    remainders = sizes & (2**_FINE_BITS - 1)
    ends = torch.cat([sizes - remainders, remainders]).cumsum(0)
    atoms = torch.arange(-last, last + 1)
    values = torch.cat([atoms, atoms, torch.tensor([FAILED_DRAW])]).to(torch.int16)
    starts = torch.arange(2**16).bitwise_left_shift_(_FINE_BITS)
    lowest, highest = (torch.searchsorted(ends, n, right=True) for n in (starts, starts + (2**_FINE_BITS - 1)))
    coarse = torch.where(lowest == highest, values[lowest], values.new_full((), _OPEN))
    return DrawTable(ends, values, coarse)
