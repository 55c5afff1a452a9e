"""All images at once: p-values against exact ones, families that err as rarely as they say, and the verb's table."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import run as certify
from command import run_of_json
from flint import arb, ctx
from scipy import stats
from statsmodels.stats.multitest import multipletests

from analysis.curves import proportion_interval
from analysis.families import accuracy_interval, betting_p, binomial_p, family, p_values, simultaneous
from analysis.runs import read_any
from certify.errors import UserError
from certify.runs.run_file import Run
from certify.smoothing.certificates import certificate_from_votes, decision_from_counts
from certify.smoothing.noise import Gaussian
from certify.smoothing.procedures import Certify, Decide
from certify.smoothing.rounding import ceil_to, floor_to
from certify.smoothing.stopping_rules import thresholds
from certify.types import Votes

HEADER = {
    "type": "run", "schema": 1, "procedure": "certify", "model": "m", "data": "d", "noise": "gaussian", "norm": "l2",
    "sigma": 1.0, "n0": 10, "n": 1000, "alpha": 0.05, "bound": "clopper-pearson", "stopping": None, "seed": 0,
}  # fmt: skip
ALONE: dict[str, Any] = {"n0": 0, "bound": "betting", "stopping": {"rule": "betting", "radii": [], "tolerance": 0.1}}


@pytest.fixture(autouse=True)
def _no_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """statsmodels collects garbage at each of Holm's corrections, 40 ms a time; here there are thousands."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def run_of(
    counts: Sequence[int] | np.ndarray, n: int = 1000, rows: Sequence[Mapping[str, Any]] = (), **header: Any
) -> Run:
    """Images whose class 0 was selected and got so many of n votes, class 1 the others."""
    selection = {} if header.get("stopping") else {"0": 10}
    found = [
        {
            "type": "image", "id": str(i), "label": 0, "prediction": -1, "radius": 0.0, "p_lower": 0.0, "seconds": 0.1,
            "votes": {"0": int(k), "1": n - int(k)}, "selection": selection, "trials": n, "failures": 0,
            "selection_failures": 0, "values": 64,
        }
        for i, k in enumerate(counts)
    ]  # fmt: skip
    found = [{**row, **(rows[i] if i < len(rows) else {})} for i, row in enumerate(found)]
    return run_of_json("r.jsonl", {**HEADER, "n": n, **header, "expected": len(found)}, found)


def five_errors(rate: float, repeats: int) -> float:
    """Five standard errors of a frequency."""
    return 5 * float(np.sqrt(rate * (1 - rate) / repeats))


def test_p_values_are_exact_and_rounded_up() -> None:
    """Against scipy to 1e-7, and never below ball arithmetic."""
    ctx.prec = 300
    for n in (1, 7, 100, 5000):
        counts = sorted({0, 1, n // 2, *(n - j for j in range(min(n, 40)))})
        for radius in (0.0, 0.3, 1.7):
            p0 = Gaussian(1.0).probability(radius)
            found = p_values(run_of(counts, n), radius)
            for k, p in zip(counts, found.tolist(), strict=True):
                plain = stats.binomtest(k, n, p0, alternative="greater").pvalue
                assert p == pytest.approx(plain, rel=1e-7, abs=1e-300)
                assert k == 0 or arb(p) >= min(arb(1), arb(p0).beta_lower(k, n - k + 1, regularized=True))
    assert p_values(run_of([5000], 5000), 8.3).tolist() == [1.0]  # its p0 rounds to 1
    assert 0 < binomial_p(np.array([100_000]), np.array([100_000]), 0.5)[0] < 1e-300  # 2^-100000 underflows


def test_rounding_of_the_required_probability_is_covered() -> None:
    """At ten million votes that agree, an error of one unit in the last place of p0 shows in the p-value."""
    ctx.prec = 300
    n = 10_000_000
    for radius in np.linspace(4.8, 5.3, 40).tolist():
        exact = ((1 + (arb(radius) / arb(2).sqrt()).erf()) / 2) ** n
        assert exact <= arb(float(p_values(run_of([n], n), radius)[0])) <= exact * (1 + arb("1e-7"))


def test_betting_p_value_is_its_formula_rounded_up() -> None:
    """pi p0^(H-1) (1-p0)^(T-H) / B(H + 1/2, T - H + 1/2) where (H-1)/(T-1) reaches p0, else 1."""
    ctx.prec = 300
    for t in (1, 2, 5, 60, 3000):
        for h in sorted({0, 1, *range(t // 2, t + 1, max(1, t // 50)), t}):
            for p0 in (0.5, 0.75, 0.99):
                found = float(betting_p(np.array(h), np.array(t), p0))
                if h - 1 < p0 * (t - 1):
                    assert found == 1.0
                    continue
                beta = (arb(h) + 0.5).gamma() * (arb(t - h) + 0.5).gamma() / arb(t + 1).gamma()
                exact = float(arb.pi() * arb(p0) ** (h - 1) * (1 - arb(p0)) ** (t - h) / beta)
                assert min(1.0, exact) <= found <= max(exact * (1 + 1e-5), 1e-300)
    assert float(betting_p(np.array(0), np.array(0), 0.5)) == 1.0


@pytest.mark.parametrize("noise", ["gaussian", "uniform", "laplace"])
@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_rejected_at_alpha_means_certified(noise: str, norm: str) -> None:
    """At every count and a fixed radius; and at each image's own radius, a hair below and a hair above it."""
    n, alpha = 400, 0.05
    counts = range(n + 1)
    run = run_of(counts, n, alpha=alpha, noise=noise, norm=norm)
    radii = np.array([row.recomputed(run.header).radius for row in run.images])
    certified = np.array([row.recomputed(run.header).prediction for row in run.images]) == 0
    assert 100 < certified.sum() < 300
    f = family(run)
    for radius in (0.0, *np.quantile(radii[certified], [0.1, 0.5, 0.9, 1.0]) * (1 - 1e-6)):
        assert ((f.p_values(radius) <= alpha) == (certified & (radii >= radius))).all()
    for i in np.flatnonzero(radii > 0)[::7]:
        below, above = (f.p_values(radii[i] * (1 + move))[i] <= alpha for move in (-1e-6, 1e-6))
        assert (below, above) == (True, False)


def test_the_tested_class_is_the_selected_one() -> None:
    """A tie goes to the lowest class, failures are trials only, no selection vote at all proves nothing."""
    rows: list[dict[str, Any]] = [
        {"selection": {"1": 6, "0": 4}, "label": 1},
        {"selection": {"2": 5, "1": 5}, "votes": {"1": 540, "2": 410}, "failures": 50},
        {"selection": {}, "selection_failures": 10},
        {"selection": {"3": 10}},
    ]
    f = family(run_of([900, 900, 900, 900], rows=rows))
    assert f.classes.tolist() == [1, 1, -1, 3]
    assert f.right.tolist() == [True, False, False, False]
    exact = stats.binomtest(540, 1000, 0.5, alternative="greater").pvalue
    assert f.p_values(0.0) == pytest.approx([1.0, exact, 1.0, 1.0], rel=1e-7)


def test_holm_by_hand() -> None:
    """Holm's levels are 0.05 / 4, / 3, / 2, / 1 in order of size; he stops at the first p-value above its own."""
    small, second, third, large = (stats.binom.isf(p, 1000, 0.5) for p in (0.008, 0.014, 0.027, 0.5))
    run = run_of([large, third, small, second])
    p = p_values(run, 0.0)
    assert p[2] < 0.05 / 4 < p[3] < 0.05 / 3 < 0.05 / 2 < p[1] < 0.05 < p[0]
    assert simultaneous(run, 0.0).tolist() == [False, False, True, True]
    assert simultaneous(run, 0.0, method="bonferroni").tolist() == [False, False, True, False]
    assert simultaneous(run, 0.0, alpha=0.2).tolist() == [False, True, True, True]
    assert simultaneous(run_of([]), 0.0).tolist() == []


def holm(p: np.ndarray, alpha: float) -> np.ndarray:
    """Holm (1979) as he wrote it."""
    rejected = np.zeros(len(p), dtype=bool)
    for step, i in enumerate(np.argsort(p)):
        if p[i] > alpha / (len(p) - step):
            break
        rejected[i] = True
    return rejected


def test_holm_in_ten_lines() -> None:
    draw = np.random.default_rng(1)
    steps = 0
    for _ in range(300):
        run = run_of(draw.binomial(200, draw.uniform(0.5, 0.65, 12)), 200)
        found = simultaneous(run, 0.05, alpha=0.1)
        assert (found == holm(p_values(run, 0.05), 0.1)).all()
        plain = simultaneous(run, 0.05, alpha=0.1, method="bonferroni")
        assert (found | ~plain).all()
        steps += int((found & ~plain).sum())
    assert steps > 20


@pytest.mark.slow
def test_the_familywise_error_rate_is_at_most_alpha() -> None:
    """Every image exactly on the border, so every certificate is wrong: alone they are wrong in most families."""
    families, m, n, alpha = 2000, 20, 500, 0.1
    p0 = Gaussian(1.0).probability(0.4)
    counts = np.random.default_rng(2).binomial(n, p0, (families, m))
    runs = [run_of(c, n, alpha=alpha) for c in counts]
    alone = np.mean([(p_values(run, 0.4) <= alpha).any() for run in runs])
    wrong = np.mean([simultaneous(run, 0.4).any() for run in runs])
    assert wrong <= alpha + five_errors(alpha, families)
    assert wrong > alpha / 3  # the test can see errors
    assert alone > 0.5


def test_bonferroni_holds_at_all_radii_and_holm_at_each() -> None:
    """Each image is robust just below a radius of its own: Holm's errors add up to alpha (1 + 1/2 + 1/3 + ..)."""
    families, n, alpha = 800, 2000, 0.1
    own = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
    truth = np.array([Gaussian(1.0).probability(r) for r in own])
    draw = np.random.default_rng(3)
    errors: dict[str, list[list[bool]]] = {"holm": [], "bonferroni": []}
    for _ in range(families):
        f = family(run_of(draw.binomial(n, truth), n, alpha=alpha))
        for method, found in errors.items():
            found.append([bool((f.certified(r, method=method) & (own <= r)).any()) for r in own])
    assert np.any(errors["bonferroni"], axis=1).mean() <= alpha + five_errors(alpha, families)
    assert np.mean(errors["holm"], axis=0).max() <= alpha + five_errors(alpha, families)
    assert np.any(errors["holm"], axis=1).mean() > alpha + five_errors(alpha, families)


@pytest.mark.parametrize("level", [0.2, 0.05, 0.001])
def test_betting_p_value_survives_peeking(level: float) -> None:
    """Summed exactly over all paths: two classes of 1/2 each, looked at after every sample and stopped at the first."""
    alive = np.array([1.0])
    caught = 0.0
    for t in range(1, 1501):
        alive = (np.append(alive, 0.0) + np.append(0.0, alive)) / 2
        h = np.arange(t + 1)
        p = np.minimum(betting_p(h, np.full(t + 1, t), 0.5), betting_p(t - h, np.full(t + 1, t), 0.5))
        caught += alive[p <= level].sum()
        alive[p <= level] = 0.0
    assert level / 10 < caught <= level


@pytest.mark.parametrize("radius", [0.0, 0.5])
def test_betting_p_value_of_a_chosen_class(radius: float) -> None:
    """One class is above p0 and never counts; whichever else is chosen, whenever, errs at most at the level."""
    draw, repeats, level = np.random.default_rng(4), 20_000, 0.2
    p0 = Gaussian(1.0).probability(radius)
    drawn = draw.multinomial(1, [p0 - 0.01, 0.2, 0.81 - p0], size=(repeats, 60)).cumsum(axis=1, dtype=np.int16)
    trials = np.arange(1, 61)[:, None] * np.ones((1, 3))
    assert (betting_p(drawn, trials, p0) <= level).any(axis=(1, 2)).mean() <= level + five_errors(level, repeats)


def test_early_stopped_votes() -> None:
    """A settled class has a p-value of at most alpha, if only just; other looks at the class count as well."""
    noise, alpha, radii = Gaussian(1.0), 0.01, [0.2, 0.5]
    p0s = [noise.probability(r) for r in radii]
    looks = []
    for p0 in p0s:  # the first sample at which 0.9 of the votes settle it
        up = thresholds("betting", p0, alpha * p0s[0], 2000).until(2000).up
        t = next(t for t in range(10, 2000, 10) if 9 * t // 10 >= up[t])
        looks.append((1, 9 * t // 10, t))
    votes = Votes((looks[1][2] - looks[1][1], looks[1][1]))
    decision = decision_from_counts(looks, votes, radii=radii, noise=noise, alpha=alpha, rule="betting", drawn=500)
    assert decision.outcomes == ("robust", "robust")
    stopping = {"rule": "betting", "radii": radii, "tolerance": None}
    decided = {**ALONE, "procedure": "decide", "stopping": stopping, "alpha": alpha}
    run = run_of([0], rows=[Decide(tuple(radii), alpha=alpha).record(decision)], **decided)
    f = family(run)
    assert (f.classes.tolist(), f.fixed) == ([1], False)
    assert alpha / 10 < f.p_values(0.5)[0] <= alpha
    assert f.p_values(0.2)[0] < f.p_values(0.5)[0]
    assert f.p_values(0.2)[0] == pytest.approx(
        min(betting_p(np.array(k), np.array(n), p0s[0]) for _, k, n in looks), rel=1e-9
    )
    assert f.certified(0.5).tolist() == [True]
    looks = [(0, 99, 100), (1, 95, 100), (1, 140, 240)]  # of another class, the best, the last
    row = {"votes": {"0": 150, "1": 140}, "prediction": 1, "decisions": [{"look": list(look)} for look in looks]}
    found = p_values(run_of([0], rows=[{**row, "trials": 290}], **decided), 0.0)
    assert found[0] == betting_p(np.array(95), np.array(100), 0.5 * (1 + 1e-15))
    assert not family(run_of([1], rows=[{"selection": {"0": 10}}], **ALONE)).fixed
    votes = Votes((10, 290, 0))
    certificate = certificate_from_votes(Votes(()), votes, noise=noise, alpha=alpha, bound="betting")
    run = run_of([0], rows=[Certify().record(certificate)], **{**ALONE, "alpha": alpha})
    assert p_values(run, certificate.radius)[0] <= alpha < p_values(run, 1.3 * certificate.radius)[0]
    assert p_values(run_of([1, 1], 1, **ALONE), 0.0).tolist() == [1.0, 1.0]


def stop_when_it_pays(size: tuple[int, int], alpha: float, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Votes of class 0 (probability 0.6) and samples, stopped once it has alpha / images or class 1 has alpha."""
    h, trials = np.zeros(size, dtype=np.int64).ravel(), np.full(size, 2000).ravel()
    live = np.arange(h.size)
    for t in range(1, 2001):
        h[live] += draw.random(len(live)) < 0.6
        p = betting_p(np.arange(t + 1), np.full(t + 1, t), 0.5)
        done = (p[h[live]] <= alpha / size[1]) | (p[t - h[live]] <= alpha)
        trials[live[done]] = t
        live = live[~done]
    return h.reshape(size), trials.reshape(size)


@pytest.mark.slow
def test_holm_is_refused_if_the_counted_votes_choose_the_class() -> None:
    """Bonferroni keeps alpha under a stopping time that makes Holm err far more often."""
    families, m, alpha = 200, 200, 0.1
    wrong = {"holm": 0, "bonferroni": 0}
    for h, trials in zip(*stop_when_it_pays((families, m), alpha, np.random.default_rng(5)), strict=True):
        counts = zip(h.tolist(), trials.tolist(), strict=True)
        rows = [{"votes": {"0": k, "1": n - k}, "trials": n} for k, n in counts]
        f = family(run_of(h, rows=rows, alpha=alpha, **ALONE))
        wrong["bonferroni"] += (f.certified(0.0) & ~f.right).any()
        wrong["holm"] += (multipletests(f.p_values(0.0), alpha=alpha, method="holm")[0] & ~f.right).any()
    assert wrong["bonferroni"] / families <= alpha
    assert wrong["holm"] / families > alpha + five_errors(alpha, families)
    with pytest.raises(UserError, match="expected --correction bonferroni"):
        simultaneous(f.run, 0.0, method="holm")


@pytest.mark.parametrize(("votes", "how"), [(575, ALONE), (545, {})], ids=["stopped by itself", "fixed n"])
def test_an_unfinished_run_is_corrected_for_all_its_images(votes: int, how: dict[str, Any]) -> None:
    """The first of fifty images to be settled is the likeliest to be wrong: alone it must not have all of alpha."""
    for expected, marked in ((1, [True]), (50, [False])):
        run = run_of([votes], **{**how, "alpha": 0.01})
        run = Run(run.path, run.header.replace(expected=expected), run.images)
        assert 0.01 / 50 < p_values(run, 0.0)[0] <= 0.01
        assert simultaneous(run, 0.0).tolist() == marked
        assert simultaneous(run, 0.0, method="bonferroni").tolist() == marked


def test_runs_without_p_values_are_refused(tmp_path: Path) -> None:
    log = tmp_path / "sigma_0.25"
    log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.5\t1\t0:01\n")
    with pytest.raises(UserError, match="expected a run file of certify"):
        family(read_any(log))
    with pytest.raises(UserError, match="no radius"):
        family(run_of([1], procedure="predict"))
    with pytest.raises(UserError, match="expected one of holm, bonferroni"):
        simultaneous(run_of([1]), 0.0, method="hochberg")
    for radius in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="at least 0"):
            p_values(run_of([1]), radius)


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("theta", [0.0, 0.3, 0.9, 1.0])
def test_interval_covers_the_true_accuracy(theta: float, alpha: float) -> None:
    """Summed exactly over all counts, where every image that is not robust is counted with probability alpha."""
    total = 2000
    q = theta + alpha * (1 - theta)
    counts = np.arange(total + 1)
    weight = stats.binom.pmf(counts, total, q)
    low, high = accuracy_interval(counts, total, alpha)
    assert weight[(low <= theta) & (q <= high)].sum() >= 0.95
    assert weight[low <= theta].sum() >= 0.975
    assert low.max() <= 1.0
    if alpha == 0.05 and theta < 0.9:  # the interval of a plain proportion forgets the wrong certificates
        assert weight[proportion_interval(counts, total)[0] <= theta].sum() < 0.9


def test_interval_covers_from_votes_on() -> None:
    """Images of a population, three in ten of them a hair short of the radius, through votes to the interval."""
    draw, repeats, total, n, alpha = np.random.default_rng(6), 4000, 100, 300, 0.1
    p0 = Gaussian(1.0).probability(0.5)
    truly = draw.random((repeats, total)) < 0.7
    votes = draw.binomial(n, np.where(truly, 0.9, p0 - 1e-9))
    counted = (binomial_p(votes, np.full_like(votes, n), p0) <= alpha).sum(axis=1)
    low, _ = accuracy_interval(counted, total, alpha)
    assert (low <= 0.7).mean() >= 0.975 - five_errors(0.975, repeats)
    assert low.mean() > 0.55


def write(path: Path, run: Run) -> str:
    path.write_text("".join(json.dumps(line.to_json()) + "\n" for line in (run.header, *run.images)))
    return str(path)


def example(**header: Any) -> Run:
    """Ten images; three with p-values between alpha / 10 and alpha at r = 0, one of them with another label."""
    counts = [990] * 6 + [565, 565, 565, 400]
    noise = Gaussian(1.0)
    rows = []
    for i, k in enumerate(counts):
        found = certificate_from_votes(Votes((10,)), Votes((k, 1000 - k)), noise=noise, alpha=1e-4)
        rows.append({**Certify().record(found), "label": int(i == 8)})
    return run_of(counts, rows=rows, alpha=1e-4, **header)


def test_the_table_of_a_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p = p_values(example(), 0.0)
    assert (p[6:9] > 1e-5).all()
    assert (p[6:9] <= 1e-4 / 4).all()  # Holm takes them, after six certain ones; Bonferroni does not
    path = write(tmp_path / "a.jsonl", example())
    certify("table", path, "--simultaneous", "--radii", "0,0.5")
    out = capsys.readouterr().out
    cells = [line.split()[-6:] for line in out.splitlines() if line.endswith("Holm")]
    low, high = accuracy_interval(np.array([8, 6]), 10, 1e-4)
    for i, (alone, together) in enumerate([("0.800", "0.800"), ("0.600", "0.600")]):
        assert cells[i] == [alone, floor_to(low[i], 3), "-", ceil_to(high[i], 3), together, "Holm"]
    words = " ".join(out.split())
    assert "except with probability at most alpha = 0.0001 over the noise, every image counted here" in words
    assert "l2 radius r" in words
    certify("table", path, "--simultaneous", "--correction", "bonferroni", "--format", "csv", "--radii", "0,0.5")
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["value"], row["all_at_once"], row["correction"]) for row in found] == [
        ("0.8", "0.6", "bonferroni"),
        ("0.6", "0.6", "bonferroni"),
    ]
    assert [float(row["true_low95"]) for row in found] == pytest.approx(low.tolist(), abs=1e-15)
    for style, text in (("markdown", "|:---"), ("latex", r"\toprule")):
        certify("table", path, "--simultaneous", "--format", style, "-o", str(tmp_path / "t"))
        assert text in (tmp_path / "t").read_text(encoding="utf-8")


def test_the_table_of_a_family_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = example()
    path = write(tmp_path / "a.jsonl", Run(run.path, run.header, [row.replace(label=None) for row in run.images]))
    certify("table", path, "--simultaneous", "--radii", "0")
    out = capsys.readouterr().out
    assert "certified fraction" in out
    assert "accuracy" not in out
    assert [line.split()[-6] for line in out.splitlines() if line.endswith("Holm")] == ["0.900"]


@pytest.mark.parametrize("style", ["text", "markdown", "latex", "csv"])
def test_no_upper_end_at_radii_where_images_were_not_decided(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], style: str
) -> None:
    """Images decided at 0.25 stop there: the count at any other radius is a lower bound with nothing above it but 1."""
    rows = [{"prediction": 0, "radius": 0.25}] * 5
    run = run_of([60] * 5 + [31] * 5, 60, rows, procedure="decide", n0=0, stopping={"rule": "betting", "radii": [0.25]})
    path = write(tmp_path / "d.jsonl", run)
    certify("table", path, "--simultaneous", "--format", style, "--radii", "0,0.1,0.25,0.5")
    out = capsys.readouterr().out
    if style == "csv":
        ends = [row["high95"] for row in csv.DictReader(io.StringIO(out))]
    else:
        ends = re.findall(r" - (\d\.\d+)", out)
    assert [float(end) for end in ends] == pytest.approx([1.0, 1.0, 0.8129, 1.0], abs=1e-3)


def test_refusals_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "sigma_0.25"
    log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.5\t1\t0:01\n")
    alone = write(tmp_path / "b.jsonl", run_of([990], **ALONE))
    for args, text in (
        ([str(log), "--simultaneous"], "published logs"),
        ([alone, "--simultaneous", "--correction", "holm"], "expected --correction bonferroni"),
        ([alone, "--correction", "holm"], "pass --simultaneous too"),
    ):
        certify("table", *args, code=2)
        err = capsys.readouterr().err
        assert text in err
        assert err.count("\n") == 1
    certify("table", alone, "--simultaneous", "--radii", "0")
    assert "Bonferroni: at all radii" in capsys.readouterr().out
