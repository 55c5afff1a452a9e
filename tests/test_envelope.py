"""The upper envelope over sigma: the maximum, its winner, its interval, who belongs together, and how it is shown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import run, run_of_json
from scipy import stats
from test_analysis import row, write

from analysis.curves import Curve, curve, curves, proportion_interval
from analysis.envelope import Envelope, group
from analysis.plots import outline, plot_curves
from analysis.runs import read_any
from analysis.tables import compare
from certify.errors import UserError

IMAGENET = "cohen_logs/certify/imagenet/resnet50"
DIAGONAL = [f"noise_{s}/test/sigma_{s}" for s in ("0.25", "0.50", "1.00")]


def made(radii: Sequence[float], sigma: float | None = 0.25, **header: Any) -> Curve:
    """A curve with one right image for each radius; a negative one is an abstention."""
    rows = [row(i, 1, 1 if r >= 0 else -1, max(r, 0.0)) for i, r in enumerate(radii)]
    known = {} if sigma is None else {"sigma": sigma}
    return curve(run_of_json(f"{sigma}.jsonl", {**known, "expected": len(rows), **header}, rows))


def enveloped(*runs: Sequence[float]) -> Envelope:
    return Envelope(tuple(made(radii, sigma) for radii, sigma in zip(runs, (0.12, 0.25, 0.5, 1.0), strict=False)))


def test_envelope_is_the_pointwise_maximum() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        count, runs = random.integers(1, 30), random.integers(1, 5)
        radii = random.choice([-1.0, 0.0, 0.1, 0.25, 0.5, 0.75], (runs, count))  # with many ties
        e = enveloped(*radii.tolist())
        for r in (0.0, 0.05, 0.1, 0.25, 0.2500001, 0.7, 0.75, 0.8):
            shares = (radii >= r).mean(axis=1)
            assert e.accuracy([r]).tolist() == [shares.max()]
            clean = (radii >= 0.0).mean(axis=1)
            best = min(range(runs), key=lambda s: (-shares[s], -clean[s], s))
            assert e.winner(r) is e.runs[best]


def test_ties_go_to_the_better_at_zero_then_to_the_smaller_sigma() -> None:
    e = enveloped([0.5, -1, -1, 0.1], [0.5, 0.2, 0.1, -1], [0.5, 0.2, 0.1, -1])
    assert [e.winner(r).run.header["sigma"] for r in (0.0, 0.15, 0.5, 0.9)] == [0.25, 0.25, 0.25, 0.25]
    assert Envelope(e.runs[::-1]).winner(0.5).run.header["sigma"] == 0.25
    assert e.levels == "0.12, 0.25, 0.5"


def test_outline_equals_the_envelope() -> None:
    e = enveloped([0.5, 0.2, 0.2, -1], [0.9, 0.1, 0.1, 0.1])
    radii, share, low, high = outline(e)
    for r in (0.0, 0.05, 0.1, 0.15, 0.2, 0.4, 0.5, 0.9):
        corner = np.searchsorted(radii, r, side="left")
        assert share[corner] == e.accuracy([r])[0]
        assert [low[corner], high[corner]] == np.ravel(e.interval([r])).tolist()
    assert (share[-1], radii[-1]) == (0.0, pytest.approx(0.9))


@pytest.mark.parametrize("correlated", [False, True])
def test_interval_covers_the_best_accuracy(correlated: bool) -> None:
    """Summed over all outcomes; one run's own 95 % interval at the largest of three counts misses too often."""
    n, runs = 40, 3
    ends = [
        np.ravel(enveloped([1.0] * k + [-1.0] * (n - k), *[[-1.0] * n] * (runs - 1)).interval([0.5]))
        for k in range(n + 1)
    ]
    alone = np.transpose(proportion_interval(np.arange(n + 1), n))
    worst_alone = 1.0
    for p in np.linspace(0.02, 0.98, 49):
        below = stats.binom.cdf(np.arange(n + 1), n, p) ** (1 if correlated else runs)
        chances = np.diff(below, prepend=0.0)  # of the largest count; the same images may be right in all runs
        covered = sum(c for c, (low, high) in zip(chances, ends, strict=True) if low <= p <= high)
        assert covered >= 0.95
        worst_alone = min(
            worst_alone, sum(c for c, (low, high) in zip(chances, alone, strict=True) if low <= p <= high)
        )
    assert correlated or worst_alone < 0.94


def test_interval_holds_for_the_largest_and_for_the_winner() -> None:
    """Three runs on the same images, right on nested or on unrelated sets of them; the sampling error is 0.005."""
    random = np.random.default_rng(1)
    truth = np.array([0.45, 0.5, 0.5])
    n, repeats = 60, 2000
    missed = 0
    for i in range(repeats):
        draws = random.random((1 if i % 2 else 3, n))
        counts = (draws < truth[:, None]).sum(axis=1)
        best = int(counts.argmax())
        low, high = proportion_interval(counts, n, 1.0 - 0.05 / 3)
        missed += not (low.max() <= truth.max() <= high.max() and low.max() <= truth[best] <= high.max())
    assert missed / repeats <= 0.05 + 0.01
    e = enveloped(*([1.0] * k + [-1.0] * (n - k) for k in counts.tolist()))
    assert np.ravel(e.interval([0.5])).tolist() == [low.max(), high.max()]


def test_one_run_is_its_own_envelope() -> None:
    e = enveloped([0.5, 0.1, -1.0])
    assert e.accuracy([0.3]).tolist() == e.runs[0].accuracy([0.3]).tolist()
    assert np.ravel(e.interval([0.3])) == pytest.approx(np.ravel(e.runs[0].interval([0.3])))


# Who belongs together


def step(name: str, sha256: str, **more: Any) -> dict[str, Any]:
    return {"step": "classifier", "name": name, "sha256": sha256, **more}


def grouped(*headers: dict[str, Any]) -> dict[str, list[float]]:
    """Name -> sigmas."""
    common = {"model": "m", "data": "d", "denoiser": "none", "noise": "gaussian", "n": 100, "n0": 10, "alpha": 0.001}
    found = [made([0.5], **{**common, **header}) for header in headers]
    return {e.name: e.sigmas for e in group(found)}


def test_runs_of_one_method_differ_in_sigma_only() -> None:
    levels = [{"sigma": s, "seed": i} for i, s in enumerate((0.5, 0.12, 0.25))]
    assert grouped(*levels) == {"m": [0.12, 0.25, 0.5]}
    many = [{**h, **more} for h in levels for more in ({}, {"denoiser": "median"}, {"n": 200})]
    assert grouped(*many) == {"m, n = 100": [0.12, 0.25, 0.5], "m, median, n = 100": [0.12, 0.25, 0.5],
                              "m, n = 200": [0.12, 0.25, 0.5]}  # fmt: skip
    stages = [{"sigma": 0.25, "n0": 10}, {"sigma": 0.25, "n0": 20}]
    assert grouped(*stages) == {"m, n0 = 10": [0.25], "m, n0 = 20": [0.25]}


def test_other_weights_are_another_method() -> None:
    weights = [{"sigma": s, "pipeline": [step("m", sha)]} for s, sha in ((0.25, "a"), (0.5, "a"), (0.12, "b"))]
    assert grouped(*weights) == {"m (0.25)": [0.25, 0.5], "m (0.12)": [0.12]}


def test_weights_named_after_their_sigma_are_one_method() -> None:
    classifiers = [
        {"sigma": s, "model": "net", "pipeline": [step("net", str(s), weights=f"w-{s:.2f}.pth")]} for s in (0.25, 0.5)
    ]
    assert grouped(*classifiers) == {"net": [0.25, 0.5]}
    denoisers = [
        {
            "sigma": s,
            "denoiser": f"d/{s}.safetensors",
            "pipeline": [{"step": "denoiser", "sigma": s, "name": str(s), "sha256": str(s), "trained_for": str(s)},
                         step("m", "same")],
        }
        for s in (0.25, 0.5)
    ]  # fmt: skip
    assert grouped(*denoisers) == {"m": [0.25, 0.5]}
    assert grouped({"sigma": 0.25}, *denoisers) == {"m": [0.25], "m, d/σ.safetensors": [0.25, 0.5]}
    used_elsewhere = [{**denoisers[0], "sigma": s} for s in (0.25, 0.5)]
    assert list(grouped(*used_elsewhere).values()) == [[0.25, 0.5]]


def test_auto_chooses_a_denoiser_per_sigma() -> None:
    runs = [
        {
            "sigma": s,
            "denoiser": "auto",
            "pipeline": [{"step": "denoiser", "sigma": s, "sha256": str(s)}, step("m", "a")],
        }
        for s in (0.25, 0.5)
    ]
    assert grouped(*runs) == {"m": [0.25, 0.5]}
    alone = [{"sigma": s, "denoiser": "none", "pipeline": [step("m", "a")]} for s in (0.25, 0.5)]
    assert grouped(*runs, *alone) == {"m, auto": [0.25, 0.5], "m": [0.25, 0.5]}


def test_an_ambiguous_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"belongs both to .* \(same weights\) and to .*pass only its runs"):
        grouped(*({"sigma": s, "model": f"noise_{t}"} for s, t in ((0.25, 0.25), (0.5, 0.5), (0.5, 0.25))))


def test_two_runs_of_one_sigma_are_refused(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"seed{i}.jsonl", [row(0, 1, 1, 0.5)], seed=i) for i in range(2)]
    with pytest.raises(UserError, match=r"seed0\.jsonl and .*seed1\.jsonl are two runs .* sigma = 0\.25"):
        group(curves([read_any(p) for p in paths]))


def test_other_images_are_refused() -> None:
    good = {"sha256": "x"}
    with pytest.raises(UserError, match=r"0\.25\.jsonl and 0\.12\.jsonl are not over the same images"):
        Envelope((made([0.5, 0.1], 0.12), made([0.5], 0.25)))
    with pytest.raises(UserError, match="not over the same images"):  # the same ids of another source
        Envelope((made([0.5], 0.12, images=good), made([0.5], 0.25, images={"sha256": "y"})))
    with pytest.raises(UserError, match="not over the same images"):  # another first half
        Envelope((made([0.5], 0.12), made([0.5], 0.25, expected=2)))
    broken = made([0.5, 0.1], 0.12).run
    broken.images[1] = broken.images[1].replace(error="is damaged")
    with pytest.raises(UserError, match="not over the same images"):  # read by one run alone
        Envelope((curve(broken), made([0.5, 0.1], 0.25)))
    unfinished = Envelope((made([0.5], 0.12, images=good, expected=2), made([0.5, -1], 0.25, images=good)))
    assert unfinished.note == "partial: 1 of 2 at σ 0.12"


def test_no_run_and_no_sigma_are_refused() -> None:
    with pytest.raises(UserError, match="no runs"):
        Envelope(())
    with pytest.raises(UserError, match="has no sigma"):
        group([made([0.5], None)])  # type: ignore[arg-type]


# How it is shown


def decided(path: Path, sigma: float, asked: list[float], radii: Sequence[float]) -> Path:
    rows = [row(i, 1, 1, r) for i, r in enumerate(radii)]
    return write(
        path, rows, sigma=sigma, procedure="decide", stopping={"radii": asked, "rule": "fast", "tolerance": None}
    )


def test_decided_runs_are_compared_at_common_radii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    decided(Path("a.jsonl"), 0.25, [0.25, 0.5], [0.5, 0.25, 0.0])
    decided(Path("b.jsonl"), 0.5, [0.5, 1.0], [1.0, 0.5, 0.0])
    (e,) = group(curves([read_any(p) for p in ("a.jsonl", "b.jsonl")]))
    assert (e.decided, e.accuracy([0.5]).tolist()) == ([0.5], [2 / 3])
    assert (e.at_least(0.5), e.at_least(0.25), e.interval([0.25])[1].tolist()) == (False, True, [1.0])
    run("plot", "a.jsonl", "b.jsonl", "--envelope", "-o", "c.png")
    assert "(≥ 1.000; σ 0.5)" in compare([e], [0.5])
    decided(Path("b.jsonl"), 0.5, [1.0], [1.0, 0.0, 0.0])
    for verb in ("plot", "table"):
        run(verb, "a.jsonl", "b.jsonl", "--envelope", code=2)


@pytest.fixture
def two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.chdir(tmp_path)
    write(Path("a.jsonl"), [row(i, 1, 1, r) for i, r in enumerate((0.3, 0.3, 0.3, 0.1))])
    write(
        Path("b.jsonl"),
        [row(i, 1, p, r) for i, (p, r) in enumerate(((1, 0.9), (1, 0.5), (2, 0.5), (-1, 0.0)))],
        sigma=0.5,
    )
    return "a.jsonl", "b.jsonl"


def test_table_of_an_envelope(two_runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    run("table", *two_runs, "--envelope", "--radii", "0.2,0.4")
    out = capsys.readouterr().out
    assert "upper envelope over sigma: the best run at each radius, chosen on these images" in out
    cells = re.split(r" {2,}", out.splitlines()[-1])
    assert cells == ["m", "0.25, 0.5", "4", "0.750 (1.000; σ 0.25)", "0.500 (0.500; σ 0.5)"]
    run("table", *two_runs, "--envelope", "--radii", "0.4", "--intervals", "--format", "markdown")
    low, high = proportion_interval(np.array([2]), 4, 0.975)
    out = capsys.readouterr().out
    assert f"0.500 [{low[0]:.3f}, {high[0]:.3f}] (0.500; σ 0.5)" in out
    assert "Bonferroni" in out
    run("table", *two_runs, "--envelope", "--radii", "0.4", "--format", "latex")
    out = capsys.readouterr().out
    assert r"0.500 (0.500; $\sigma$ 0.5)" in out
    assert "% upper envelope over sigma" in out
    run("table", *two_runs, "--envelope", "--radii", "0.2,0.4", "--format", "csv")
    first, second = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (first["run"], first["sigma"], first["value"], first["clean"]) == ("a.jsonl", "0.25", "0.75", "1.0")
    assert (second["method"], second["sigmas"], second["sigma"]) == ("m", "0.25, 0.5", "0.5")
    assert second["quantity"] == "certified accuracy (upper envelope)"
    assert float(second["low95"]) == pytest.approx(low[0])


def test_accuracies_relative_to_one(two_runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    run("table", *two_runs, "--radii", "0.4", "--relative-to", "0.8", "--intervals")
    out = capsys.readouterr().out
    low, high = proportion_interval(np.array([2]), 4) / np.float64(0.8)
    assert "divided by 0.8\n" in out
    assert f"0.625 [{low[0]:.3f}, {high[0]:.3f}]" in out
    run("table", *two_runs, "--radii", "0.4", "--relative-to", "0.8", "--envelope")
    assert "0.625 (0.625; σ 0.5)" in capsys.readouterr().out
    run("table", "b.jsonl", "--radii", "0.4", "--relative-to", "0.8", "--format", "csv")
    (line,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (line["value"], line["relative_to"], float(line["high95"])) == ("0.625", "0.8", pytest.approx(high[0]))
    run("table", "b.jsonl", "--radii", "0.4", "--relative-to", "1")
    assert "0.500" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "words"), [
    (["--relative-to", "0"], "at most 1"),
    (["--relative-to", "1.0001"], "at most 1"),
    (["--relative-to", "nan"], "at most 1"),
    (["--relative-to", "0.8", "--simultaneous"], "pass one of them"),
    (["--envelope", "--simultaneous"], "pass one of them"),
])  # fmt: skip
def test_refusals(
    options: list[str], words: str, two_runs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run("table", *two_runs, *options, code=2)
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


def test_a_fraction_is_not_divided(tmp_path: Path) -> None:
    found = curves([read_any(write(tmp_path / "r.jsonl", [row(0, None, 1, 0.5)]))])
    with pytest.raises(UserError, match="no accuracy to divide"):
        compare(found, [0.0], relative_to=0.8)


def test_the_figure_explains_the_envelope(two_runs: tuple[str, str]) -> None:
    import matplotlib.pyplot as plt

    found = group(curves([read_any(p) for p in two_runs]))
    with plt.rc_context({"svg.fonttype": "none"}):
        plot_curves(found, "e.svg")
        plot_curves(found, "again.svg")
        plot_curves(found[0].runs, "runs.svg")
    text = Path("e.svg").read_text()
    assert text.count("upper envelope over σ = 0.25, 0.5") == 1
    assert "chosen on these images" in text
    assert text == Path("again.svg").read_text()
    assert "envelope" not in Path("runs.svg").read_text()


def test_published_imagenet_envelope(shared_data: Path, tmp_path: Path) -> None:
    """Cohen, Rosenfeld and Kolter's own table, from their own logs; the first of them holds 427 of 500 images."""
    (e,) = group(curves([read_any(shared_data / IMAGENET / path) for path in DIAGONAL]))
    assert np.round(e.accuracy([0, 0.5, 1, 1.5, 2, 3]), 2).tolist() == [0.67, 0.49, 0.37, 0.29, 0.19, 0.12]
    assert [e.winner(r).run.header["sigma"] for r in (0, 0.5, 1, 1.5, 2, 3)] == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
    assert (e.name, e.note) == ("imagenet/resnet50/noise_σ", "partial: 427 of 500 at σ 0.25")
    plot_curves([e], tmp_path / "e.png")


def test_published_logs_of_one_network_or_of_many(shared_data: Path) -> None:
    logs = sorted((shared_data / IMAGENET).glob("noise_1.00/test/*"))
    assert [(e.name, e.sigmas) for e in group(curves([read_any(p) for p in logs]))] == [
        ("imagenet/resnet50/noise_1.00", [0.5, 1.0])
    ]
    with pytest.raises(UserError, match="pass only its runs"):
        group(curves([read_any(p) for p in sorted((shared_data / IMAGENET).glob("*/test/*"))]))
