"""Every public function gives for a number of any type exactly what it gives for the same Python number."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import run_of_json
from scipy.stats import binom

from analysis.attacks import AttackSettings
from analysis.comparison.plan import Plan
from analysis.curves import curve, proportion_interval
from analysis.envelope import Envelope
from analysis.families import accuracy_interval, betting_p, binomial_p, family, p_values, simultaneous
from certify import (
    SmoothedClassifier,
    UserError,
    Votes,
    certificate_from_votes,
    clopper_pearson_lower,
    make_noise,
    prediction_from_votes,
)
from certify.runs.config import Settings
from certify.runs.recompute import recompute
from certify.runs.run_file import read_run
from certify.smoothing.bounds import BOUNDS, Evidence, clopper_pearson_upper, randomized_lower, two_classes
from certify.smoothing.certificates import decision_from_counts, largest_radius, needed
from certify.smoothing.noise import NOISES, Gaussian
from certify.smoothing.norms import implied_factor, in_norm
from certify.smoothing.procedures import Certify, Decide, Measure
from certify.smoothing.procedures.decide import RadiusDecision
from certify.smoothing.procedures.measure import RadiusEstimate
from certify.smoothing.rng import bound_draw
from certify.smoothing.stopping_rules import RULES, betting_lower, betting_upper, log_wealth, thresholds

FLOATS: dict[str, Callable[[float], Any]] = {
    "np.float16": np.float16,
    "np.float32": np.float32,
    "np.float64": np.float64,
    "np.longdouble": np.longdouble,
    "0-d array of float32": lambda x: np.array(x, dtype=np.float32),
    "0-d array": np.array,
    "0-d tensor": torch.tensor,
    "0-d tensor of float64": lambda x: torch.tensor(x, dtype=torch.float64),
    "0-d tensor of bfloat16": lambda x: torch.tensor(x, dtype=torch.bfloat16),
    "Fraction": Fraction,
    "Decimal": Decimal,
}
INTS: dict[str, Callable[[int], Any]] = {
    "np.int32": np.int32,
    "np.int64": np.int64,
    "np.uint16": np.uint16,
    "0-d array": np.array,
    "0-d tensor": torch.tensor,
    "0-d tensor of int32": lambda x: torch.tensor(x, dtype=torch.int32),
}

HEADER = {
    "type": "run", "schema": 1, "procedure": "certify", "model": "m", "data": "d", "noise": "gaussian", "norm": "l2",
    "sigma": 1.0, "n0": 10, "n": 1000, "alpha": 0.05, "bound": "clopper-pearson", "stopping": None, "seed": 0,
    "created": "", "command": "", "expected": 2,
}  # fmt: skip
ROWS = [
    {
        "type": "image", "id": str(k), "label": 0, "prediction": 0, "radius": 0.5, "p_lower": 0.7, "seconds": 0.1,
        "votes": {"0": k, "1": 1000 - k}, "selection": {"0": 10}, "trials": 1000, "failures": 0,
        "selection_failures": 0, "values": 64, "base": 0, "class": "0", "base_class": "0",
    }
    for k in (940, 720)
]  # fmt: skip
RUN = run_of_json("r.jsonl", HEADER, ROWS)
LOOKS = [(0, 930, 1000), (0, 931, 1001)]
TRIALS = np.arange(300)


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """statsmodels collects garbage at each of Holm's corrections."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def bound(name: str) -> Any:
    return BOUNDS.get(name)


def rule(name: str) -> Any:
    return RULES.get(name)


def plan(eps: Any = 0.1, count: Any = 1, **options: Any) -> Plan:
    return Plan((), AttackSettings((), eps, "linf", queries=count, steps=count, eot=count, seed=count), **options)


def smoothed(sigma: Any = 0.25, **options: Any) -> SmoothedClassifier:
    class Half:
        num_classes = 2

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return (images.mean((1, 2, 3)) > 0.5).long()

        def describe(self) -> dict[str, Any]:
            return {}

    return SmoothedClassifier(Half(), sigma, batch_size=100, **options)


IMAGE = torch.full((1, 4, 4), 0.57)


def decided(alpha: Any = 0.05, radii: Any = (0.1, 0.2)) -> Any:
    return decision_from_counts(
        LOOKS, Votes((931, 70)), radii=radii, noise=Gaussian(0.25), alpha=alpha, rule="betting", drawn=1001
    )


def measured(alpha: Any) -> Any:
    watch = RadiusEstimate(2, n=100, tolerance=0.1, noise=Gaussian(0.25), alpha=alpha)
    watch.add(np.zeros(100, dtype=np.int64))
    return watch.result()


ALPHA: dict[str, Callable[[Any], Any]] = {
    "clopper_pearson_lower": lambda a: [clopper_pearson_lower(k, 1000, a) for k in range(900, 1000, 7)],
    "clopper_pearson_upper": lambda a: [clopper_pearson_upper(k, 1000, a) for k in range(0, 100, 7)],
    "randomized_lower": lambda a: [randomized_lower(k, 1000, a, 0.3) for k in range(900, 1001, 7)],
    "two_classes": lambda a: two_classes(Evidence(900, 30, 1000), a, 0.1),
    **{f"bound {name}": lambda a, name=name: bound(name)(Evidence(900, 30, 1000, 0.3), a) for name in BOUNDS},
    **{f"rule {name}": lambda a, name=name: table(rule(name)(0.9, a, TRIALS)) for name in RULES},
    **{f"level of {name}": lambda a, name=name: rule(name).level(a, [0.6, 0.7]) for name in RULES},
    "betting_lower": lambda a: [betting_lower(k, 1000, a) for k in range(900, 1000, 7)],
    "betting_upper": lambda a: [betting_upper(k, 1000, a) for k in range(900, 1000, 7)],
    "thresholds": lambda a: thresholds("betting", 0.7, a, 1000).earliest(),
    "certificate_from_votes": lambda a: certificate_from_votes(
        Votes((9, 1)), Votes((930, 70)), noise=Gaussian(1.0), alpha=a, bound="best"
    ),
    "certificate without selection": lambda a: certificate_from_votes(
        Votes(()), Votes((930, 70)), noise=Gaussian(1.0), alpha=a, bound="betting"
    ),
    "decision_from_counts": decided,
    "needed": lambda a: needed([0.1, 0.2], Gaussian(0.25), a, "one-sided"),
    "prediction_from_votes": lambda a: prediction_from_votes(Votes((530, 470)), alpha=a),
    "largest_radius": lambda a: [largest_radius(Gaussian(1.0), 1000, a, name) for name in BOUNDS],
    "Certify": lambda a: asdict(Certify(n=1000, alpha=a)),
    "Plan": lambda a: asdict(plan(alpha=a)),
    "RadiusDecision": lambda a: RadiusDecision(
        2, n=100, radii=[0.1], noise=Gaussian(0.25), alpha=a, rule="one-sided"
    ).result(),
    "RadiusEstimate": lambda a: measured(a),
    "certify": lambda a: smoothed().certify(IMAGE, n0=10, n=200, alpha=a),
    "certify to a tolerance": lambda a: smoothed().certify(IMAGE, n0=10, n=200, alpha=a, tolerance=0.2),
    "decide": lambda a: smoothed().decide(IMAGE, radius=0.01, n=200, alpha=a),
    "predict": lambda a: smoothed().predict(IMAGE, n=200, alpha=a),
    "simultaneous": lambda a: simultaneous(RUN, 0.3, alpha=a).tolist(),
    "Family.certified": lambda a: family(RUN).certified(0.3, alpha=a, method="bonferroni").tolist(),
    "accuracy_interval": lambda a: rounded(accuracy_interval(30, 50, a)),
}
SHARE: dict[str, Callable[[Any], Any]] = {
    "uniform": lambda u: randomized_lower(930, 1000, 0.05, u),
    "uniform of the evidence": lambda u: bound("randomized")(Evidence(930, 70, 1000, u), 0.05),
    "uniform of a certificate": lambda u: certificate_from_votes(
        Votes((9, 1)), Votes((930, 70)), noise=Gaussian(1.0), alpha=0.05, bound="randomized", uniform=u
    ),
    "others_share": lambda s: two_classes(Evidence(900, 30, 1000), 0.05, s),
    "log_wealth": lambda p: log_wealth(np.arange(5), np.full(5, 5), p).tolist(),
    "binomial_p": lambda p: binomial_p(np.array([9, 8]), np.array([10, 10]), p).tolist(),
    "betting_p": lambda p: betting_p(np.array([90, 80]), np.array([100, 100]), p).tolist(),
    "tolerance of Measure": lambda t: asdict(Measure(t)),
    "tolerance": lambda t: smoothed().certify(IMAGE, n0=10, n=200, tolerance=t),
    "confidence": lambda c: rounded(proportion_interval(30, 50, c)),
    "confidence of accuracy": lambda c: rounded(accuracy_interval(30, 50, 0.01, c)),
    "confidence of a curve": lambda c: rounded(curve(RUN).interval([0.1, 0.2], c)),
    "confidence of an envelope": lambda c: rounded(Envelope((curve(RUN),)).interval([0.1, 0.2], c)),
    "sigma of a classifier": lambda s: asdict(smoothed(s).certify(IMAGE, n0=10, n=200)),
    "eps": lambda e: asdict(plan(e)) | {"l2": plan(e).l2_radius(17)},
    **{f"sigma of {name}": lambda s, name=name: make_noise(name, s).radius(0.93) for name in NOISES},
    **{f"scale of {name}": lambda s, name=name: make_noise(name, s).scale for name in NOISES},
}
PROBABILITY: dict[str, Callable[[Any], Any]] = {
    **{f"rule {name} at p0": lambda p, name=name: table(rule(name)(p, 0.05, TRIALS)) for name in RULES},
    **{f"level of {name} at p0": lambda p, name=name: rule(name).level(0.05, [p, 0.9]) for name in RULES},
    "thresholds": lambda p: thresholds("one-sided", p, 0.05, 1000).earliest(),
    **{f"{name} radius": lambda p, name=name: make_noise(name, 0.3).radius(p) for name in NOISES},
    **{f"{name} radius of two": lambda p, name=name: make_noise(name, 0.3).radius(p, 0.02) for name in NOISES},
    **{f"{name} implied": lambda p, name=name: in_norm(make_noise(name, 0.3), "linf", 7).radius(p) for name in NOISES},
}
RADIUS: dict[str, Callable[[Any], Any]] = {
    **{f"{name} probability": lambda r, name=name: make_noise(name, 0.25).probability(r) for name in NOISES},
    **{
        f"{name} implied": lambda r, name=name: in_norm(make_noise(name, 0.25), "linf", 7).probability(r)
        for name in NOISES
    },
    "decide": lambda r: smoothed().decide(IMAGE, radius=r, n=200),
    "decide at several": lambda r: smoothed().decide(IMAGE, radius=[r, 0.001], n=200),
    "decision_from_counts": lambda r: decided(radii=(r, 0.3)),
    "needed": lambda r: needed([r], Gaussian(0.25), 0.05, "betting"),
    "p_values": lambda r: p_values(RUN, r).tolist(),
    "Decide": lambda r: asdict(Decide((r,))),
}
COUNT: dict[str, Callable[[Any], Any]] = {
    "clopper_pearson_lower": lambda n: [clopper_pearson_lower(k(n), n, 0.01) for k in (lambda n: n, lambda n: n - 1)],
    "clopper_pearson_upper": lambda n: clopper_pearson_upper(5, n, 0.01),
    "randomized_lower": lambda n: randomized_lower(50, n, 0.01, 0.5),
    "Evidence": lambda n: asdict(Evidence(50, 5, n)),
    "betting_lower": lambda n: betting_lower(50, n, 0.01),
    "betting_upper": lambda n: betting_upper(50, n, 0.01),
    "thresholds": lambda n: thresholds("betting", 0.7, 0.01, n).earliest(),
    "Votes": lambda n: json.dumps(Votes((n, 3), 1).as_dict()),
    "prediction_from_votes": lambda n: prediction_from_votes(Votes((n, 3)), alpha=0.01),
    "largest_radius": lambda n: largest_radius(Gaussian(1.0), n, 0.01),
    "implied_factor": lambda n: implied_factor("l2", "linf", n),
    "Settings": lambda n: json.dumps(asdict(Settings(Certify(n, n), n))),
    "Plan": lambda n: json.dumps(asdict(plan(count=n, certify_n=n, repeats=n))),
    "batch size": lambda n: smoothed_votes(n),
    "seed": lambda n: bound_draw(n, "x"),
    "certify": lambda n: smoothed().certify(IMAGE, n0=n, n=n, seed=n),
    "decide": lambda n: smoothed().decide(IMAGE, radius=0.01, n=n, seed=n),
    "predict": lambda n: smoothed().predict(IMAGE, n=n, seed=n),
    "votes": lambda n: smoothed().votes(IMAGE, n, stage="a"),
}


def smoothed_votes(size: Any) -> Any:
    return smoothed().votes(IMAGE, 50, stage="a") and SmoothedClassifier(
        smoothed().classifier, 0.25, batch_size=size
    ).votes(IMAGE, 50, stage="a")


def table(found: Any) -> Any:
    return found.up.tolist(), found.low.tolist()


def rounded(ends: tuple[np.ndarray, np.ndarray]) -> Any:
    return [np.asarray(end).tolist() for end in ends]


def cases(entrances: dict[str, Callable[[Any], Any]], *values: float) -> list[Any]:
    return [pytest.param(call, value, id=name) for name, call in entrances.items() for value in values]


@pytest.mark.parametrize(("call", "value"), [
    *cases(ALPHA, 0.001), *cases(SHARE, 0.3), *cases(PROBABILITY, 0.93), *cases(RADIUS, 0.013),
])  # fmt: skip
def test_real_numbers_of_any_type(call: Callable[[Any], Any], value: float) -> None:
    for name, convert in FLOATS.items():
        given = convert(value)
        found, plain = call(given), call(float(given))
        assert repr(found) == repr(plain), name  # repr: the types inside are Python's, too


@pytest.mark.parametrize(("call", "value"), cases(COUNT, 60))
def test_whole_numbers_of_any_type(call: Callable[[Any], Any], value: int) -> None:
    for name, convert in INTS.items():
        assert repr(call(convert(value))) == repr(call(value)), name


NO_NUMBER = ["0.001", True, np.True_, torch.tensor(True), 1j, None, [0.1], np.array([0.1]), torch.tensor([0.1])]


@pytest.mark.parametrize("call", [*ALPHA.values(), *PROBABILITY.values()], ids=[*ALPHA, *PROBABILITY])
def test_no_number_is_refused(call: Callable[[Any], Any]) -> None:
    for value in NO_NUMBER:
        if value is None and call in (ALPHA["simultaneous"], ALPHA["Family.certified"]):
            continue  # None: the run's own alpha
        with pytest.raises(UserError, match=r"^[^\n]* = [^\n]*: expected [^\n]*$"):
            call(value)


@pytest.mark.parametrize(
    "value", [1e5, 10.0, "100", True, np.True_, None, np.float64(7), torch.tensor([7]), Fraction(7)]
)
def test_no_whole_number_is_refused(value: Any) -> None:
    for name in ("clopper_pearson_upper", "Evidence", "largest_radius", "Settings", "certify", "seed"):
        with pytest.raises(UserError, match=r"^(n|n0|trials|seed) = .*: expected a whole number") as error:
            COUNT[name](value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [1e5, "100", None, np.float64(7), Fraction(7)])
def test_votes_are_whole_numbers(value: Any) -> None:
    for votes in (lambda: Votes((value,)), lambda: Votes((1,), value)):
        with pytest.raises(UserError, match=r"^votes .*: expected whole numbers$"):
            votes()


@pytest.mark.parametrize("alpha", [convert(0.001) for convert in FLOATS.values()], ids=list(FLOATS))
def test_a_run_is_recomputed_at_alpha_of_any_type(alpha: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (HEADER, *ROWS)))
    header, rows = recompute(read_run(path), alpha=alpha)
    assert json.loads(json.dumps(header.to_json()))["alpha"] == float(alpha)
    assert rows == recompute(read_run(path), alpha=float(alpha))[1]


def test_single_precision_does_not_overstate() -> None:
    """At a single-precision alpha the true error of the bound is at most alpha, as at any other."""
    alpha = np.float32(0.001)
    for n in (100, 1000, 100_000):
        for k in range(n - 50, n + 1):
            assert binom.sf(k - 1, n, clopper_pearson_lower(k, n, alpha)) <= float(alpha)
