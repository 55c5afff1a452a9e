"""Exact noise: no atom above its probability (by ball arithmetic), and every draw, sum and failure where it belongs."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from flint import arb, ctx
from scipy.stats import chi2

from certify import SmoothedClassifier
from certify.errors import UserError
from certify.models.classifier import Classifier
from certify.smoothing.exact_gaussian import FAILED_DRAW, ExactGaussian, _words, atom_counts, draw_table
from certify.smoothing.noise import Gaussian, make_noise
from certify.smoothing.rng import block_generator, stream_key

DRAWS = 2**60
SIGMAS = (0.12, 0.25, 0.5, 1.0)
EXAMPLE = Path(__file__).parent.parent / "examples" / "floating_point.py"
every_sigma = pytest.mark.parametrize("sigma", SIGMAS)
counts = functools.cache(atom_counts)


def generator(block: int = 0) -> torch.Generator:
    return block_generator(stream_key(3, "exact", "estimation"), block)


def true_atoms(sigma: float, last: int) -> list[arb]:
    """2^60 P(K = i) for i = 0 .. last, as balls that hold the true value."""

    def below(numerator: int) -> arb:
        return (1 + (arb(numerator) / (510 * arb(sigma) * arb(2).sqrt())).erf()) / 2

    inner = [DRAWS * (below(2 * i + 1) - below(2 * i - 1)) for i in range(last)]
    return [*inner, DRAWS * (1 - below(2 * last - 1))]


@pytest.mark.parametrize("sigma", [*SIGMAS, 0.001, 1 / 3, 2.0])
def test_no_atom_exceeds_its_probability(sigma: float) -> None:
    """Proved, not compared: a ball's `<=` holds for all of the ball. And no more is lost than rounding down loses."""
    ctx.prec = 400
    atoms = counts(sigma)
    assert len(atoms) == 255 * (ExactGaussian(sigma).k + 1) + 1
    for count, true in zip(atoms, true_atoms(sigma, len(atoms) - 1), strict=True):
        assert not count or arb(count) <= true
        assert true < arb(count + 1)


@pytest.mark.parametrize("sigma", [*SIGMAS, 1e-300, 1e-5, 6.0])
def test_every_draw_is_an_atom_or_fails(sigma: float) -> None:
    """The table's intervals are the atoms, on both sides alike; less than one draw an atom is left over, and fails."""
    atoms, table = counts(sigma), draw_table(sigma)
    sizes = torch.diff(table.ends, prepend=torch.zeros(1, dtype=torch.int64))
    assert (sizes >= 0).all()
    found = dict.fromkeys(range(1 - len(atoms), len(atoms)), 0)
    for value, size in zip(table.values[:-1].tolist(), sizes.tolist(), strict=True):
        found[value] += size
    assert found == {sign * i: count for i, count in enumerate(atoms) for sign in (-1, 1)}
    assert 0 <= DRAWS - sum(found.values()) < len(found)
    assert table.values[-1] == FAILED_DRAW
    assert table.value(torch.tensor([DRAWS - 1])).tolist() in ([FAILED_DRAW], [len(atoms) - 1])


@every_sigma
@pytest.mark.parametrize("way", ["look_up", "look_up_in_numpy"])
def test_the_look_up_is_the_definition(sigma: float, way: str) -> None:
    """At both ends of every 16-bit prefix, around every end of an interval, and at random numbers."""
    table = draw_table(sigma)
    starts = torch.arange(2**16) << 44
    ends = table.ends[(table.ends > 0) & (table.ends < DRAWS - 1)]
    numbers = torch.randint(0, DRAWS, (10_000,), generator=torch.Generator().manual_seed(1))
    for chosen in (starts, starts + 2**44 - 1, ends - 1, ends, ends + 1, numbers, numbers[:0]):
        undecided = table.coarse[chosen >> 44] == 2**15 - 1
        rest = (chosen & (2**44 - 1))[undecided]
        asked: list[int] = []

        def fine(count: int, rest: torch.Tensor = rest, asked: list[int] = asked) -> torch.Tensor:
            asked.append(count)
            return rest

        assert torch.equal(getattr(table, way)((chosen >> 44).to(torch.uint16), fine), table.value(chosen))
        assert asked == [len(rest)]
    assert 0 < int((table.coarse == 2**15 - 1).sum()) < 0.02 * 2**16  # few prefixes are left open


def test_the_definition_counts_every_interval() -> None:
    """The place of a number is counted again in Python integers."""
    table = draw_table(0.25)
    ends, values = table.ends.tolist(), table.values.tolist()
    numbers = [0, ends[300] - 1, ends[300], 2**59, ends[-1] - 1, ends[-1], DRAWS - 1]
    expected = [values[sum(end <= number for end in ends)] for number in numbers]
    assert table.value(torch.tensor(numbers)).tolist() == expected
    assert expected[-2:] == [FAILED_DRAW, FAILED_DRAW]


@every_sigma
def test_draws_follow_the_atoms(sigma: float) -> None:
    """Chi-squared over all atoms, mean 0 and deviation sqrt(sigma^2 + 1/(12 255^2)), of two million draws."""
    noise, n = ExactGaussian(sigma), 2_000_000
    drawn = noise.sample((n,), generator())
    assert drawn.dtype == torch.int16
    steps = drawn.double() / 255
    deviation = (sigma**2 + 1 / (12 * 255**2)) ** 0.5
    assert abs(float(steps.mean())) < 5 * deviation / n**0.5
    assert abs(float(steps.std()) / deviation - 1) < 5 / (2 * n) ** 0.5
    atoms = counts(sigma)
    last = len(atoms) - 1
    observed = torch.bincount(drawn.long() + last, minlength=2 * last + 1).double()
    expected = torch.tensor([*reversed(atoms[1:]), *atoms]).double() / DRAWS * n
    usual = expected >= 10
    observed = torch.cat([observed[usual], observed[~usual].sum().view(1)])
    expected = torch.cat([expected[usual], expected[~usual].sum().view(1)])
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert 1e-4 < chi2.sf(statistic, len(expected) - 1) < 1 - 1e-4


def test_all_bits_of_a_word_are_random() -> None:
    """Each of the 64 is set half the time, independently of its neighbour: torch gives whole words for this range."""
    words = _words(100_000, generator())
    bits = torch.stack([(words >> shift) & 1 for shift in range(64)]).double()
    assert (bits.mean(dim=1) - 0.5).abs().max() < 5 * 0.5 / len(words) ** 0.5
    assert ((bits[1:] == bits[:-1]).double().mean(dim=1) - 0.5).abs().max() < 5 * 0.5 / len(words) ** 0.5


def test_draws_depend_on_the_generator_alone() -> None:
    noise = ExactGaussian(0.25)
    first = noise.sample((10, 3, 7, 5), generator())
    assert first.shape == (10, 3, 7, 5)
    assert torch.equal(first, noise.sample((10, 3, 7, 5), generator()))
    assert not torch.equal(first, noise.sample((10, 3, 7, 5), generator(block=1)))
    assert first.flatten()[:12].tolist() == PINNED


PINNED = [89, -59, 75, 22, -19, 21, 29, 47, 15, 15, 22, -32]


def test_a_failed_draw_fails_its_sample_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits from the very top of the range, in one of three samples: the draw is marked and the image stays finite."""
    noise = ExactGaussian(0.25)
    draws = torch.zeros(3 * 4, dtype=torch.int64)
    draws[6] = -1  # sample 1: all bits set
    monkeypatch.setattr("certify.smoothing.exact_gaussian._words", lambda count, generator: draws[6].repeat(count))
    assert noise.sample((3,), generator()).tolist() == [FAILED_DRAW] * 3
    monkeypatch.undo()
    drawn = noise.sample((3, 1, 2, 2), generator())
    assert noise.failed(drawn) is None
    drawn[1, 0, 1, 0] = FAILED_DRAW
    failed = noise.failed(drawn)
    assert failed is not None
    assert failed.tolist() == [False, True, False]
    assert noise.add(torch.ones(1, 2, 2), drawn)[1, 0, 1, 0] == -1
    assert noise.failed(drawn[:0]) is None


@pytest.mark.parametrize("small", [0, 2**20])
@pytest.mark.parametrize("sigma", [0.25, 21.1])
def test_sums_are_exact_and_the_same_integer_is_the_same_float(
    sigma: float, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all K and the darkest, a middle and the brightest pixel: (v + K) / 255, clipped, correctly rounded."""
    monkeypatch.setattr("certify.smoothing.exact_gaussian._SMALL", small)  # in torch and in numpy
    noise = ExactGaussian(sigma)
    reach = 255 * (noise.k + 1)
    drawn = torch.cat([torch.arange(-reach, reach + 1), torch.tensor([FAILED_DRAW])]).to(torch.int16).view(-1, 1, 1, 1)
    for value in (0, 1, 100, 255):
        noisy = noise.add(torch.full((1, 1, 1), value, dtype=torch.float32) / 255, drawn.clone())
        assert noisy.dtype == torch.float32
        integers = (drawn.long() + value).clamp(-255 * noise.k, reach)
        assert torch.equal(noisy, (integers.double() / 255).float())


def test_images_on_the_grid_stay_as_they_are_loaded() -> None:
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).float() / 255
    noise = ExactGaussian(0.25)
    assert torch.equal(noise.input(image), image)
    assert torch.equal(noise.input(image * (1 + 2e-7)), image)  # a few roundings away: the same image
    assert torch.equal(noise.add(image, torch.zeros(2, 1, 16, 16, dtype=torch.int16))[1], image)


V = np.arange(256)
STORED = {
    "v / 255 in float32": V.astype(np.float32) / np.float32(255),
    "v / 255 in float64": V / 255,
    "v / 255 in float64, then float32": (V / 255).astype(np.float32),
    "v * (1 / 255) in float32": V.astype(np.float32) * np.float32(1 / 255),
    "1 - (1 - v / 255) in float64": 1 - (1 - V / 255),
    "uint8": V.astype(np.uint8),
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_eight_bit_images_are_on_the_grid_however_they_are_stored(stored: np.ndarray, digits: Classifier) -> None:
    g = SmoothedClassifier(digits, 0.25, noise="exact")
    for part in stored.reshape(4, 1, 8, 8):
        checked = g.check(part)
        assert torch.equal(checked, g.check((part * (1 if part.dtype == np.uint8 else 255)).round().astype(np.uint8)))


@pytest.mark.parametrize("step", [1e-4, -1e-4, 0.01, 0.4])
@pytest.mark.parametrize("value", [1, 3, 100, 200, 254])
def test_a_ten_thousandth_of_a_grey_level_is_off_the_grid(value: int, step: float, digits: Classifier) -> None:
    """Its certificate would be about another image, at a distance that the radius does not take off."""
    image = np.zeros((1, 8, 8))
    image[0, 3, 3] = (value + step) / 255
    with pytest.raises(UserError, match=r"^1 of the image's 64 values are off the 8-bit grid"):
        SmoothedClassifier(digits, 0.25, noise="exact").certify(image, n0=10, n=10)
    rounded = SmoothedClassifier(digits, 0.25, noise="exact", rounded=True)
    assert float(rounded.check(image)[0, 3, 3]) == np.float32(value) / np.float32(255)


def test_images_off_the_grid_are_refused_or_rounded() -> None:
    image = torch.tensor([0.0, 0.5, 1.0, 100.4 / 255]).view(1, 2, 2)
    with pytest.raises(
        UserError, match=r"^2 of the image's 4 values are off the 8-bit grid .*rounded=True.*$"
    ) as error:
        ExactGaussian(0.25).input(image)
    assert "\n" not in str(error.value)
    rounded = make_noise("exact", 0.25, rounded=True).input(image)
    assert torch.equal(rounded, torch.tensor([0.0, 128.0, 255.0, 100.0]).view(1, 2, 2) / 255)


def test_certifies_like_the_gaussian() -> None:
    exact, ordinary = ExactGaussian(0.5), Gaussian(0.5)
    assert (exact.name, exact.norm, exact.scale) == ("exact", "l2", 0.5)
    assert exact.radius(0.9) == ordinary.radius(0.9)
    assert exact.radius(0.9, 0.05) == ordinary.radius(0.9, 0.05)
    assert exact.probability(0.3) == ordinary.probability(0.3)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf"), 21.2, 64.0])
def test_sigma_out_of_range(sigma: float) -> None:
    with pytest.raises(ValueError, match=r"^sigma = .*\[0, 1\] pixels"):
        ExactGaussian(sigma)


def test_the_demonstration() -> None:
    """A base classifier that reads the last bits: ordinary noise certifies a contradiction, exact noise does not."""
    example = runpy.run_path(str(EXAMPLE))
    certificates, contradict = example["certificates"], example["contradict"]
    ordinary, exact = certificates("gaussian", 1000), certificates("exact", 1000)
    assert [c.prediction for c in ordinary.values()] == [0, 1]
    assert contradict(ordinary)
    assert [c.prediction for c in exact.values()] == [0, 0]
    assert all(c.radius > 1.2 for c in exact.values())
    assert not contradict(exact)
