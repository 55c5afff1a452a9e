"""From votes to certificates: rules on hand-made votes, and the whole chain where the true radius is known."""

from __future__ import annotations

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from flint import arb, ctx
from scipy.stats import binom, norm

from certify import (
    ABSTAIN,
    Gaussian,
    SmoothedClassifier,
    Votes,
    certificate_from_votes,
    load_classifier,
    prediction_from_votes,
)
from certify.errors import UserError
from certify.models.classifier import labels_from_logits
from certify.smoothing.certificates import decision_from_counts, largest_radius
from certify.smoothing.procedures import Decide
from certify.types import FAILED

NOISE = Gaussian(0.25)


def certify(selection: tuple[int, ...], estimation: tuple[int, ...], failures: int = 0, alpha: float = 0.001) -> Any:
    return certificate_from_votes(Votes(selection), Votes(estimation, failures), noise=NOISE, alpha=alpha)


def test_all_votes_agree() -> None:
    c = certify((0, 100), (0, 100_000))
    assert c.prediction == 1
    assert c.radius == pytest.approx(0.25 * norm.ppf(0.001**1e-5), rel=1e-6)
    assert (c.norm, c.alpha, c.counts) == ("l2", 0.001, (0, 100_000))


def test_class_comes_from_selection_alone() -> None:
    """The estimation votes favour class 0, the selection chose 1: the answer is an abstention, never class 0."""
    c = certify((10, 90), (99_000, 1_000))
    assert (c.prediction, c.radius) == (ABSTAIN, 0.0)
    assert c.abstained


def test_tie_in_selection_goes_to_the_lowest_class() -> None:
    assert certify((0, 50, 50), (0, 1000, 0)).prediction == 1
    assert certify((0, 50, 50), (0, 0, 1000)).prediction == ABSTAIN


def test_failures_are_trials_and_nobodys_vote() -> None:
    with_failures = certify((100, 0), (900, 0), failures=100)
    against = certify((100, 0), (900, 100))
    assert with_failures.p_lower == against.p_lower
    assert with_failures.estimation.trials == 1000


def test_all_failures_abstain() -> None:
    c = certificate_from_votes(Votes((0, 0), 100), Votes((0, 0), 1000), noise=NOISE, alpha=0.001)
    assert (c.prediction, c.radius, c.p_lower) == (ABSTAIN, 0.0, 0.0)


def test_abstains_exactly_when_the_bound_is_not_above_one_half() -> None:
    for k in range(0, 101):
        c = certify((100, 0), (k, 100 - k))
        assert c.abstained == (not c.p_lower > 0.5)
        assert (c.radius > 0) == (not c.abstained)


def test_nan_and_infinite_logits_are_failed_trials() -> None:
    nan, inf = math.nan, math.inf
    logits = torch.tensor([[1.0, 2.0], [nan, 2.0], [2.0, nan], [inf, 0.0], [-inf, 0.0], [-inf, -inf], [3.0, 3.0]])
    assert labels_from_logits(logits).tolist() == [1, FAILED, FAILED, FAILED, 1, FAILED, 0]


def test_predict_is_the_binomial_test_between_the_leading_two() -> None:
    """With n = 100 and alpha = 0.001, 67 against 33 passes the two-sided test and 66 against 34 does not."""
    p67, p66 = 2 * binom.sf(66, 100, 0.5), 2 * binom.sf(65, 100, 0.5)
    assert p67 <= 0.001 < p66
    assert prediction_from_votes(Votes((33, 67)), alpha=0.001).prediction == 1
    assert prediction_from_votes(Votes((34, 66)), alpha=0.001).prediction == ABSTAIN
    assert prediction_from_votes(Votes((33, 67)), alpha=0.001).p_value == pytest.approx(p67)
    assert prediction_from_votes(Votes((0, 0), 50), alpha=0.001).prediction == ABSTAIN
    assert prediction_from_votes(Votes((50,)), alpha=0.001).prediction == 0


def test_failed_trials_cannot_help_a_prediction() -> None:
    """Any class may be behind them: whatever their labels were, the p-value is at least what it would have been."""
    assert prediction_from_votes(Votes((60, 10), 930), alpha=0.001).prediction == ABSTAIN
    assert prediction_from_votes(Votes((60,), 940), alpha=0.001).p_value == 1.0
    for failures in (0, 5, 30, 57):
        found = prediction_from_votes(Votes((60, 3, 1), failures), alpha=0.001)
        for second in range(failures + 1):
            labelled = Votes((60, 3 + second, 1 + failures - second))
            assert labelled.leader != 0 or prediction_from_votes(labelled, alpha=0.001).p_value <= found.p_value
        assert found.p_value == prediction_from_votes(Votes((60, 3 + failures, 1)), alpha=0.001).p_value


@pytest.mark.slow
def test_the_p_value_of_a_prediction_is_the_exact_one_rounded_up() -> None:
    ctx.prec = 400
    for n in (1, 2, 7, 100, 1000, 30_000, 1_000_000):
        for lead in {n % 2, *(round(z * math.sqrt(n)) // 2 * 2 + n % 2 for z in (1, 2, 3.3, 5, 8))}:
            if lead > n:
                continue
            a, b = (n + lead) // 2, (n - lead) // 2
            exact = 2 * arb(0.5).beta_lower(a, b + 1, regularized=True)
            found = prediction_from_votes(Votes((a, b)), alpha=0.001).p_value
            assert found == 1.0 if lead <= 1 else exact <= found <= exact * (1 + arb("1e-9")), (a, b)


def test_largest_radius() -> None:
    assert largest_radius(NOISE, 9, 0.001) == 0.0
    assert largest_radius(NOISE, 10, 0.001) > 0.0
    assert largest_radius(NOISE, 100, 0.001) == certify((100,), (100,)).radius


def test_certificates_from_exact_probabilities_hold() -> None:
    """4,000 certificates whose true radius is known, at a large alpha: violations within alpha + 5 standard errors."""
    generator = torch.Generator().manual_seed(0)
    alpha, n, wrong, total = 0.1, 200, 0, 4000
    for _ in range(total):
        margin = float(torch.rand(1, generator=generator)) * 0.8
        p = norm.cdf(margin / NOISE.sigma)  # a half-space's probability depends on its distance alone
        k = int((torch.rand(n, generator=generator, dtype=torch.float64) < p).sum())
        wrong += certify((0, 1), (n - k, k), alpha=alpha).radius > margin
    assert wrong / total <= alpha + 5 * math.sqrt(alpha * (1 - alpha) / total)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "total"), [((3, 4, 4), 2000), ((3, 32, 32), 300)])
def test_whole_chain_on_half_spaces(shape: tuple[int, int, int], total: int, linear_classifier: Any) -> None:
    """Real certificates, noise and all, of half-spaces in 48 and 3,072 dimensions: violations within alpha."""
    generator = torch.Generator().manual_seed(0)
    alpha, wrong, informative = 0.1, 0, 0
    for i in range(total):
        weight, image = torch.randn(math.prod(shape), generator=generator), torch.rand(shape, generator=generator)
        distance = 0.05 + 0.5 * float(torch.rand(1, generator=generator))
        offset = float(image.flatten().double() @ weight.double()) - distance * float(weight.double().norm())
        classifier = linear_classifier(weight, offset)
        assert classifier.radius(image) == pytest.approx(distance, rel=1e-6)
        c = SmoothedClassifier(classifier, 0.25).certify(image, n0=20, n=200, alpha=alpha, image_id=str(i))
        wrong += c.prediction == 0 or c.radius > distance
        informative += c.radius > 0.5 * distance
    assert wrong / total <= alpha + 5 * math.sqrt(alpha * (1 - alpha) / total)
    assert informative > 0.5 * total


def test_radius_approaches_the_truth(linear_classifier: Any) -> None:
    image = torch.full((3, 8, 8), 0.5)
    weight = torch.linspace(-1, 1, 192)
    classifier = linear_classifier(weight, -0.3 * float(weight.double().norm()))
    truth = classifier.radius(image)
    gaps = []
    for n in (100, 1_000, 10_000, 100_000):
        radius = SmoothedClassifier(classifier, 0.25).certify(image, n=n).radius
        assert radius <= truth
        gaps.append(truth - radius)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.02 * truth


@pytest.mark.parametrize("batch_size", [1, 7, 64, 100, 333, 1000, 5000])
def test_votes_do_not_depend_on_the_batch_size(batch_size: int, linear_classifier: Any) -> None:
    image = torch.full((1, 3, 5), 0.5)
    classifier = linear_classifier(torch.ones(15), 7.4)
    reference = SmoothedClassifier(classifier, 0.25).votes(image, 1234, stage="estimation", image_id="x")
    g = SmoothedClassifier(classifier, 0.25, batch_size=batch_size)
    assert g.votes(image, 1234, stage="estimation", image_id="x") == reference
    assert reference.trials == 1234
    assert 0 < reference.counts[0] < 1234


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_votes_of_a_float32_network_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    classifier = load_classifier("digits")
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(3))
    reference = SmoothedClassifier(classifier, 0.5).votes(image, 1500, stage="estimation", image_id="x")
    g = SmoothedClassifier(classifier, 0.5, batch_size=batch_size)
    assert g.votes(image, 1500, stage="estimation", image_id="x") == reference
    assert len(reference.as_dict()) > 3


def test_more_labels_than_images_are_refused(linear_classifier: Any) -> None:
    """Votes that nobody cast would inflate the count beyond n."""

    class Twice(linear_classifier):  # type: ignore[misc]
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return super().__call__(images).repeat(2)

    with pytest.raises(UserError, match=r"linear returned torch.int64 \(32,\) for 16 images"):
        SmoothedClassifier(Twice(torch.ones(4), 0.0), 0.25, batch_size=100).certify(torch.zeros(1, 2, 2), n=100)


def test_fewer_samples_are_a_prefix_of_more(linear_classifier: Any) -> None:
    """n = 150 sees the first 150 of the samples that n = 1000 sees, so runs of several n nest."""
    seen: list[torch.Tensor] = []

    class Spy(linear_classifier):  # type: ignore[misc]
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.clone())
            return super().__call__(images)

    g = SmoothedClassifier(Spy(torch.ones(12), 6.0), 0.25, batch_size=64)
    image = torch.full((3, 2, 2), 0.5)
    g.check_contract(image)
    seen.clear()
    g.votes(image, 150, stage="estimation", image_id="x")
    short = torch.cat(seen)
    seen.clear()
    g.votes(image, 1000, stage="estimation", image_id="x")
    assert torch.equal(torch.cat(seen)[:150], short)


def test_seed_image_and_stage_all_matter(linear_classifier: Any) -> None:
    g = SmoothedClassifier(linear_classifier(torch.ones(48), 24.0), 0.25)
    image = torch.full((3, 4, 4), 0.5)
    votes = {
        g.votes(image, 10_000, stage=stage, seed=seed, image_id=name).counts
        for stage in ("selection", "estimation")
        for seed in (0, 1)
        for name in ("a", "b")
    }
    assert len(votes) == 8


def test_a_label_out_of_range_is_an_error(linear_classifier: Any) -> None:
    class Wrong(linear_classifier):  # type: ignore[misc]
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images),), 7)

    with pytest.raises(ValueError, match=r"16 of 16 labels outside 0 to 1 \(from 7 to 7"):
        SmoothedClassifier(Wrong(torch.ones(4), 0.0), 0.25).certify(torch.zeros(1, 2, 2), n=100)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (torch.zeros(8, 8), "expected"),
        (torch.full((1, 8, 8), 255.0), "values from 255 to 255"),
        (torch.full((1, 8, 8), math.nan), "expected \\[0, 1\\]"),
        (torch.zeros(1, 8, 8, dtype=torch.int32), "type torch.int32"),
    ],
)
def test_wrong_images_are_refused(image: torch.Tensor, text: str, linear_classifier: Any) -> None:
    g = SmoothedClassifier(linear_classifier(torch.ones(64), 0.0), 0.25)
    with pytest.raises(UserError, match=text):
        g.certify(image, n=100)


def test_uint8_and_rounding_noise_are_accepted(linear_classifier: Any) -> None:
    g = SmoothedClassifier(linear_classifier(torch.ones(64), 0.0), 0.25)
    white = torch.full((1, 8, 8), 255, dtype=torch.uint8)
    assert g.certify(white, n=100, image_id="x") == g.certify(torch.ones(1, 8, 8), n=100, image_id="x")
    assert g.certify(torch.full((1, 8, 8), -3e-8), n=100, image_id="x") == g.certify(
        torch.zeros(1, 8, 8), n=100, image_id="x"
    )


@pytest.mark.parametrize("settings", [{"n": 0}, {"n0": 0}, {"alpha": 0.0}, {"alpha": 1.0}])
def test_wrong_settings_are_refused(settings: dict[str, Any], linear_classifier: Any) -> None:
    with pytest.raises(UserError, match="expected"):
        SmoothedClassifier(linear_classifier(torch.ones(4), 0.0), 0.25).certify(torch.zeros(1, 2, 2), **settings)


def test_sigma_or_noise_not_both(linear_classifier: Any) -> None:
    classifier = linear_classifier(torch.ones(4), 0.0)
    with pytest.raises(UserError, match="either sigma"):
        SmoothedClassifier(classifier)
    with pytest.raises(UserError, match="either sigma"):
        SmoothedClassifier(classifier, 0.25, noise=NOISE)
    with pytest.raises(UserError, match="positive number"):
        SmoothedClassifier(classifier, 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, x: g.certify(x, n=1e3), r"^n = 1000.0: expected a whole number, such as 1_000$"),
        (lambda g, x: g.certify(x, n=100, seed=None), r"seed = None: expected a whole number"),
        (lambda g, x: g.certify(x, n=100, seed=1.5), r"seed = 1.5: expected a whole number"),
        (lambda g, x: g.certify(None, n=100), r"image of type NoneType; expected an array or tensor"),
        (lambda g, x: g.decide(x, radius="0.25"), r"radius = '0.25': expected one number or several"),
        (lambda g, x: g.decide(x, radius=None), r"radius = None: expected one number or several"),
        (
            lambda g, x: SmoothedClassifier(g.classifier, sigma=0.25, device="gpu"),
            r"device 'gpu' does not exist on this machine",
        ),
    ],
)
def test_slips_in_python_are_told_as_such(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(SmoothedClassifier(load_classifier("digits"), sigma=0.25), torch.rand(1, 8, 8))


def test_images_as_people_have_them() -> None:
    """A tensor that wants a gradient, a read-only array: the same image, and no warning."""
    g = SmoothedClassifier(load_classifier("digits"), sigma=0.25, precision="float32", compile="off")
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    own = g.certify(image, n=200)
    frozen = image.numpy().copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert g.certify(frozen, n=200) == own
        assert g.certify(image.clone().requires_grad_(), n=200) == own


def test_threads_may_share_one_that_is_prepared() -> None:
    g = SmoothedClassifier(load_classifier("digits"), sigma=0.25, precision="float32", compile="off")
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    g.prepare(images[0], 10_000)
    alone = [g.certify(image, n=2000) for image in images]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda image: g.certify(image, n=2000), images)) == alone


def test_radii_are_decided_in_ascending_order() -> None:
    """The last outcome is that of the largest radius, in whatever order they were given."""
    assert Decide((0.5, 0.25, 0.5)).radii == (0.25, 0.5)
    looks, votes = [(0, 99, 100), (0, 990, 1000)], Votes((990, 10))
    with pytest.raises(UserError, match=r"^radii 0.5, 0.25: expected them in ascending order$"):
        decision_from_counts(looks, votes, radii=[0.5, 0.25], noise=NOISE, alpha=0.01, rule="betting", drawn=1000)
