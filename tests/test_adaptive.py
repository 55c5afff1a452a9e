"""Adaptive sampling: decisions match the boundary whatever the batch size, and they are true."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from certify import Gaussian, SmoothedClassifier, Votes
from certify.engine.adaptive import Sampling, settle
from certify.engine.monte_carlo import Job, Tally
from certify.engine.noisy_classifier import Target
from certify.errors import UserError
from certify.smoothing.certificates import certificate_from_votes, decision_from_counts, largest_radius
from certify.smoothing.procedures.decide import RadiusDecision
from certify.smoothing.procedures.measure import RadiusEstimate
from certify.smoothing.sequential_tests import FixedSample
from certify.smoothing.stopping_rules import RULES
from certify.types import ABSTAIN, Radii

NOISE = Gaussian(0.25)


def half_space(linear_classifier: Any, distance: float) -> tuple[Any, Tensor]:
    """A classifier and an image of class 1 at this distance from the boundary, negative on the other side."""
    image = torch.full((3, 4, 4), 0.5)
    weight = torch.linspace(-1, 2, 48)
    offset = float(image.flatten().double() @ weight.double()) - distance * float(weight.double().norm())
    return linear_classifier(weight, offset), image


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize(
    "distance", [0.2, 0.29, 0.45, *(pytest.param(far, marks=pytest.mark.slow) for far in (0.05, 0.9))]
)
def test_decides_what_is_true_at_the_first_sample_that_settles_it(
    rule: str, distance: float, linear_classifier: Any
) -> None:
    """The same votes, walked through one by one with the table at hand, settle at the same sample."""
    classifier, image = half_space(linear_classifier, distance)
    g = SmoothedClassifier(classifier, 0.25)
    d = g.decide(image, radius=[0.5, 0.25], rule=rule, n=20_000, image_id="x")
    assert d.radii == (0.25, 0.5)
    labels: list[int] = []

    class Spy(type(classifier)):  # type: ignore[misc]
        def __call__(self, images: Tensor) -> Tensor:
            found = super().__call__(images)
            labels.extend(found.tolist())
            return found

    SmoothedClassifier(Spy(classifier.weight, classifier.offset), 0.25).votes(
        image, 20_000, stage="estimation", image_id="x"
    )
    ones = np.cumsum(np.array(labels[-20_000:]))
    trials = np.arange(1, 20_001)
    most = np.maximum(ones, trials - ones)
    p0s = [NOISE.probability(r) for r in d.radii]
    level = RULES.get(rule).level(0.001, p0s)  # type: ignore[attr-defined]
    for p0, radius, outcome, (leader, votes, samples) in zip(p0s, d.radii, d.outcomes, d.looks, strict=True):
        at = RULES.get(rule)(p0, level, trials)
        hits = np.flatnonzero((most >= at.up) | (most <= at.low))
        assert samples == (trials[hits[0]] if len(hits) else 20_000)
        assert votes == most[samples - 1]
        if outcome != "undecided":
            assert outcome == ("robust" if distance > radius else "not certifiable")
            assert leader == int(ones[samples - 1] * 2 > samples)
    assert d.votes.trials == max(samples for *_, samples in d.looks) <= d.drawn
    assert d.drawn <= d.votes.trials + max(32, d.votes.trials / 4)
    assert (d.prediction, d.radius) == {0.9: (1, 0.5), 0.45: (1, 0.25), 0.29: (1, 0.25)}.get(distance, (ABSTAIN, 0.0))
    assert d.robust is (distance > 0.5)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 5000])
def test_decisions_do_not_depend_on_batches_or_on_other_images(batch_size: int, linear_classifier: Any) -> None:
    classifier, _ = half_space(linear_classifier, 0.3)
    generator = torch.Generator().manual_seed(0)
    images = [(torch.rand(3, 4, 4, generator=generator), str(i)) for i in range(12)]

    def test(noise: Radii) -> RadiusDecision:
        return RadiusDecision(2, n=3000, radii=(0.1, 0.3), noise=noise, alpha=0.01, rule="betting")

    g = SmoothedClassifier(classifier, 0.25, batch_size=batch_size)
    targets = [Target(image, name, i) for i, (image, name) in enumerate(images)]
    together = {s.tag.tag: s.test.result() for s in g.sample_until_settled(targets, test)}
    assert sorted(together) == list(range(12))
    for i, (image, name) in enumerate(images):
        one = SmoothedClassifier(classifier, 0.25).decide(
            image, radius=(0.1, 0.3), n=3000, alpha=0.01, rule="betting", image_id=name
        )
        assert together[i] == one
    assert {d.outcomes for d in together.values()} >= {("robust", "robust"), ("not certifiable", "not certifiable")}


@pytest.mark.slow
def test_false_decisions_are_rare(linear_classifier: Any) -> None:
    """Real decisions, noise and all, of half-spaces at and around the radius, at a large alpha."""
    generator, alpha, total, wrong, settled = torch.Generator().manual_seed(1), 0.1, 300, 0, 0
    for i in range(total):
        distance = 0.2 + 0.1 * float(torch.randn(1, generator=generator)) * (i % 2)
        classifier, image = half_space(linear_classifier, distance)
        d = SmoothedClassifier(classifier, 0.25).decide(image, radius=0.2, alpha=alpha, n=400, image_id=str(i))
        wrong += (d.outcomes[0] == "robust" and (distance < 0.2 or d.prediction != 1)) or (
            d.outcomes[0] == "not certifiable" and distance > 0.2
        )
        settled += d.robust is not None
    assert wrong / total <= alpha + 5 * math.sqrt(alpha * (1 - alpha) / total)
    assert settled > 0.2 * total


def test_a_decision_never_flips_after_stopping() -> None:
    """Votes after the look that settles the decision are ignored, also within one batch."""
    rng = np.random.default_rng(3)
    watch = RadiusDecision(3, n=10_000, radii=(0.25,), noise=NOISE, alpha=0.001, rule="betting")
    watch.add((rng.random(500) < 0.97).astype(np.int64))
    before = watch.result()
    assert (before.outcomes, before.prediction, watch.pending) == (("robust",), 1, 0)
    assert before.votes.trials < 200 < before.drawn == 500
    watch.add(np.zeros(5000, dtype=np.int64))
    after = watch.result()
    assert (after.outcomes, after.looks, after.votes) == (before.outcomes, before.looks, before.votes)


def test_failures_are_votes_for_no_class() -> None:
    watch = RadiusDecision(3, n=10_000, radii=(0.25,), noise=NOISE, alpha=0.001, rule="betting")
    watch.add(np.full(100, -1))
    assert watch.result().outcomes == ("not certifiable",)
    assert watch.result().votes.failures == watch.result().votes.trials < 20
    watch = RadiusDecision(3, n=10_000, radii=(0.25,), noise=NOISE, alpha=0.001, rule="betting")
    watch.add(np.where(np.arange(3000) % 10 < 7, 1, -1))  # 70 %, and 84 % are needed
    assert watch.result().outcomes == ("not certifiable",)


def test_few_samples_are_drawn_in_excess() -> None:
    """If all votes agree, about as many are drawn as settle it; n is the cap."""
    for radius, rule, fewest in ((0.25, "betting", 56), (0.5, "betting", 460), (0.5, "one-sided", 352)):
        watch = RadiusDecision(2, n=100_000, radii=(radius,), noise=NOISE, alpha=0.001, rule=rule)
        while watch.pending:
            watch.add(np.ones(watch.pending, dtype=np.int64))
        assert fewest == watch.result().votes.trials <= watch.drawn <= 1.06 * fewest
    watch = RadiusDecision(2, n=50, radii=(0.25,), noise=NOISE, alpha=0.001, rule="betting")
    while watch.pending:
        watch.add(np.ones(watch.pending, dtype=np.int64))
    assert (watch.drawn, watch.result().outcomes, watch.result().robust) == (50, ("undecided",), None)


def test_few_samples_first_and_new_images_while_there_is_room() -> None:
    """Hard images do not hold up the others: all easy ones are settled while two never are."""
    rounds: list[int] = []

    def label(jobs: Iterable[Job]) -> Iterator[Tally]:
        rounds.append(0)
        for job in jobs:
            rounds[-1] += job.trials
            if job.key is None:
                yield Tally(Votes((1, 0)), torch.zeros(1, dtype=torch.int64))
                continue
            hard = job.key in (b"0", b"1")
            where = torch.arange(job.start, job.start + job.trials)
            yield Tally(Votes((job.trials, 0)), (where * 0.841345 % 1 < 0.841345).long() if hard else where * 0)

    def sampling(i: int) -> Sampling:
        test = RadiusDecision(2, n=100_000, radii=(0.25,), noise=NOISE, alpha=0.001, rule="betting")
        return Sampling(torch.zeros(1, 2, 2), str(i).encode(), test, i)

    done = list(settle(label, map(sampling, range(200)), batch_size=256, keep=10))
    assert {s.tag for s in done[-2:]} == {0, 1}
    assert sorted(s.tag for s in done) == list(range(200))
    assert all(s.clean == 0 and len(s.labels) == 10 for s in done)
    assert max(rounds) < 256 + 100_000 / 8
    assert sum(rounds) == sum(s.test.drawn for s in done) + len(done)
    easy = 198 * 56
    assert sum(size >= 256 for size in rounds) > 0.9 * easy / 256  # nearly all easy work went in full batches
    full = [size for size in rounds[: easy // 256] if size > 0.9 * 256 * -(-size // 256)]
    assert len(full) > 0.9 * (easy // 256)  # and what was paid for was used


def test_a_large_image_is_settled_during_an_endless_supply_of_small_ones() -> None:
    sizes = [*[1000], *[100] * 200]

    def label(jobs: Iterable[Job]) -> Iterator[Tally]:
        for job in jobs:
            yield Tally(Votes((job.trials, 0)), torch.zeros(job.trials, dtype=torch.int64))

    images = (Sampling(torch.zeros(1, 2, 2), b"", FixedSample(2, n=n, piece=100), i) for i, n in enumerate(sizes))
    order = [settled.tag for settled in settle(label, images, batch_size=100, clean=False)]
    assert sorted(order) == list(range(201))
    assert order.index(0) < 60  # ten pieces, at least one in four rounds


@pytest.mark.parametrize("batch_size", [4, 64, 300])
def test_in_order_no_image_is_begun_while_others_fill_the_batch(batch_size: int) -> None:
    """Should labels run out at any time, no image but those of one batch was begun in vain; and none takes more."""
    sizes = [100, 40, 250, 16, 120, 60]
    watches = [FixedSample(2, n=n, piece=30) for n in sizes]
    open_ones: list[int] = []
    came = [0]

    def label(jobs: Iterable[Job]) -> Iterator[Tally]:
        for job in jobs:
            begun = [i for i in range(came[0]) if 0 < watches[i].drawn < sizes[i]]
            open_ones.append(len(begun))
            yield Tally(Votes((job.trials, 0)), torch.zeros(job.trials, dtype=torch.int64))

    def images() -> Iterator[Sampling]:
        for i, watch in enumerate(watches):
            came[0] = i + 1
            yield Sampling(torch.zeros(1, 2, 2), b"", watch, i)

    order = [settled.tag for settled in settle(label, images(), batch_size=batch_size, clean=False, in_order=True)]
    assert [watch.drawn for watch in watches] == sizes
    assert sorted(order) == list(range(len(sizes)))
    if batch_size == 4:
        assert order == sorted(order)
        assert max(open_ones) == 1
    assert max(open_ones) <= 1 + batch_size // 16


@pytest.mark.parametrize("distance", [0.1, 0.3, 0.6])
def test_the_radius_is_known_to_the_tolerance(distance: float, linear_classifier: Any) -> None:
    classifier, image = half_space(linear_classifier, distance)
    g = SmoothedClassifier(classifier, 0.25)
    samples = []
    for tolerance in (0.4, 0.15):
        c = g.certify(image, tolerance=tolerance, n=100_000, image_id="x")
        assert (1 - tolerance) * distance <= c.radius <= distance
        assert c.selection.trials == 0
        again = certificate_from_votes(Votes(()), c.estimation, noise=NOISE, alpha=0.001, bound="betting")
        assert again == c
        samples.append(c.estimation.trials)
    assert samples[0] < samples[1] < 100_000


def test_measuring_stops_at_once_where_there_is_no_radius() -> None:
    watch = RadiusEstimate(3, n=100_000, tolerance=0.1, noise=NOISE, alpha=0.001)
    while watch.pending:
        watch.add(np.arange(watch.drawn, watch.drawn + watch.pending) % 3)
    assert watch.drawn < 300
    assert watch.result().abstained


def test_measuring_all_agreeing_votes_stops_near_the_cap_of_n() -> None:
    watch = RadiusEstimate(2, n=10_000, tolerance=0.1, noise=NOISE, alpha=0.001)
    while watch.pending:
        watch.add(np.ones(watch.pending, dtype=np.int64))
    cap = largest_radius(NOISE, 10_000, 0.001, "betting", selected=False)
    assert 0.9 * cap <= watch.result().radius < cap
    assert watch.drawn < 6000


@pytest.mark.parametrize("p", [*(pytest.param(p, marks=pytest.mark.slow) for p in (0.5, 0.8)), 0.97])
def test_measured_bounds_hold_under_optional_stopping(p: float) -> None:
    """300 images whose votes are drawn with a known p, stopped by their own votes: radii too large at most alpha."""
    rng, alpha, total, wrong = np.random.default_rng(11), 0.1, 300, 0
    for _ in range(total):
        watch = RadiusEstimate(2, n=1000, tolerance=0.2, noise=NOISE, alpha=alpha)
        while watch.pending:
            watch.add((rng.random(watch.pending) < p).astype(np.int64))
        c = watch.result()
        wrong += c.radius > NOISE.radius(p) + 1e-12 or c.prediction == 0
    assert wrong / total <= alpha + 5 * math.sqrt(alpha * (1 - alpha) / total)


def test_bounds_for_a_fixed_n_need_selection_votes() -> None:
    with pytest.raises(UserError, match="chosen from other votes than those it counts"):
        certificate_from_votes(Votes(()), Votes((0, 100)), noise=NOISE, alpha=0.001)


def test_a_stricter_alpha_undecides(linear_classifier: Any) -> None:
    classifier, image = half_space(linear_classifier, 0.4)
    d = SmoothedClassifier(classifier, 0.25).decide(image, radius=0.25, alpha=0.01, image_id="x")
    again = {
        alpha: decision_from_counts(
            d.looks, d.votes, radii=d.radii, noise=NOISE, alpha=alpha, rule=d.rule, drawn=d.drawn
        ).outcomes
        for alpha in (0.1, 0.01, 1e-9)
    }
    assert again == {0.1: ("robust",), 0.01: ("robust",), 1e-9: ("undecided",)}


@pytest.mark.parametrize("radius", [-0.1, math.nan, 10.0])
def test_impossible_radii_are_refused(radius: float, linear_classifier: Any) -> None:
    classifier, image = half_space(linear_classifier, 0.3)
    with pytest.raises(UserError, match="expected one from 0"):
        SmoothedClassifier(classifier, 0.25).decide(image, radius=radius)


def test_other_noises_and_norms(linear_classifier: Any) -> None:
    """The same call under uniform noise in l1, and in l-infinity from Gaussian noise."""
    image = torch.full((1, 4, 4), 0.5)
    classifier = linear_classifier(torch.eye(16)[0], 0.2)  # one pixel decides: l1 distance 0.3
    g = SmoothedClassifier(classifier, 0.25, noise="uniform")
    d = g.decide(image, radius=(0.25, 0.35), image_id="x")
    assert (d.outcomes, d.norm, d.prediction) == (("robust", "not certifiable"), "l1", 1)
    g = SmoothedClassifier(classifier, 0.25, norm="linf")
    d = g.decide(image, radius=(0.05, 0.08), image_id="x")  # 0.3 in l2 is 0.075 in l-infinity
    assert (d.outcomes, d.norm) == (("robust", "not certifiable"), "linf")
    assert norm.cdf(0.05 * 4 / 0.25) < d.looks[0][1] / d.looks[0][2]


def test_tiny_alphas_leave_something_to_share(linear_classifier: Any) -> None:
    classifier, image = half_space(linear_classifier, 0.4)
    g = SmoothedClassifier(classifier, 0.25)
    assert g.decide(image, radius=0.1, alpha=1e-40, image_id="x").robust
    assert g.certify(image, alpha=1e-40, bound="best", n=1000, image_id="x").radius > 0
    with pytest.raises(UserError, match="alpha"):
        g.decide(image, radius=0.1, alpha=1e-41)


@pytest.mark.parametrize("tolerance", [0.0, 5.0, -1.0, math.nan])
def test_impossible_tolerances_are_refused(tolerance: float, linear_classifier: Any) -> None:
    classifier, image = half_space(linear_classifier, 0.4)
    g = SmoothedClassifier(classifier, 0.25)
    with pytest.raises(UserError, match="between 0 and 1"):
        g.certify(image, tolerance=tolerance)
    with pytest.raises(UserError, match="expected betting"):
        g.certify(image, tolerance=0.1, bound="best")
    with pytest.raises(UserError, match="no radius"):
        g.decide(image, radius=[])
    assert g.decide(image, radius=np.float32(0.1), image_id="x").robust
