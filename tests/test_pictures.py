"""Pictures of votes, samples and speeds: what they show, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import run as certify
from scipy.stats import beta, norm

from analysis.figures import canvas
from analysis.speed_plot import Speed, read_speeds
from analysis.vote_plots import largest_with, radii_with, sample_sizes
from certify.runs.run_file import Run, read_run

RUN = "--model digits --sigma 0.25 --n 1000 --max 12 --quiet --out run.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found)
        certify(*RUN.split())
        certify(*"--model digits --sigma 0.25 --radius 0.25 --max 3 --quiet --out decided.jsonl".split())
        certify(*RUN.replace("run.jsonl", "l1.jsonl --noise laplace").split())
        Path("log").write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.5\t1\t0:00:01\n")
    return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are written, as they were when they were written."""
    kept: list[Any] = []
    monkeypatch.setattr("analysis.figures.save_figure", lambda figure, path: kept.append(figure))
    return kept


def test_all_votes_give_the_radii_of_the_run(folder: Path) -> None:
    run = read_run(folder / "run.jsonl")
    assert radii_with(run, 1000).tolist() == [row["radius"] for row in run.images]


def test_subsampled_votes_have_the_distribution_of_fewer_samples(folder: Path) -> None:
    """The votes for the class among m drawn from n: mean mp, variance mp(1-p) (n-m)/(n-1)."""
    run = read_run(folder / "run.jsonl")
    one = next(row for row in run.images if 800 <= max(row["votes"].values()) <= 950)
    many, n, m, draws = Run(run.path, run.header, [one]), 1000, 500, 400
    bounds = norm.cdf([radii_with(many, m, seed)[0] / 0.25 for seed in range(draws)])
    assert bounds.max() <= norm.cdf(largest_with(run, m) / 0.25) + 1e-12
    k = np.arange(1, m + 1)
    known = beta.ppf(0.001, k, m - k + 1)  # Clopper-Pearson's of so many votes
    counts = k[np.abs(known - bounds[:, None]).argmin(axis=1)]
    assert known[counts - 1] == pytest.approx(bounds, abs=1e-9)
    p = max(one["votes"].values()) / n
    variance = m * p * (1 - p) * (n - m) / (n - 1)
    assert counts.mean() == pytest.approx(m * p, abs=4 * (variance / draws) ** 0.5)
    assert counts.var(ddof=1) == pytest.approx(variance, rel=4 * (2 / draws) ** 0.5)  # 28%; of fresh votes: twice it


def test_the_largest_radius_is_the_published_formula(folder: Path) -> None:
    """All n votes agree: p_lower = alpha^(1/n) (Cohen et al. 2019)."""
    run = read_run(folder / "run.jsonl")
    for n in (20, 1000):
        assert largest_with(run, n) == pytest.approx(0.25 * norm.ppf(0.001 ** (1 / n)), rel=1e-9)


def test_sizes_end_with_n() -> None:
    assert sample_sizes(1000)[0] == 20
    assert sample_sizes(1000)[-1] == 1000
    assert sample_sizes(7) == [7]


def test_the_line_ends_at_the_median_radius_of_the_run(folder: Path, drawn: list[Any]) -> None:
    """The dotted line is the largest radius that as many samples can certify."""
    from analysis.vote_plots import plot_samples

    run = read_run(folder / "run.jsonl")
    plot_samples([run], "s.svg")
    line, most = (found for found in drawn[0].axes[0].lines if len(found.get_xdata()) > 1)
    assert list(line.get_xdata()) == list(most.get_xdata()) == sample_sizes(1000)
    assert line.get_ydata()[-1] == pytest.approx(np.median([row["radius"] for row in run.images]))
    assert most.get_ydata()[-1] == pytest.approx(largest_with(run, 1000))


def test_the_votes_of_an_image_are_its_bars(folder: Path, drawn: list[Any]) -> None:
    from analysis.vote_plots import plot_votes

    run = read_run(folder / "run.jsonl")
    row = max(run.images, key=lambda row: len(row["votes"]))
    plot_votes(run, row["id"], "v.svg")
    (axes,) = drawn[0].axes
    widths = [bar.get_width() for bar in axes.patches]
    counts = sorted(row["votes"].values(), reverse=True)
    assert widths[:8] == pytest.approx([count / 1000 for count in counts[:8]])
    assert sum(widths) == pytest.approx(1)
    assert axes.lines[0].get_xdata()[0] == pytest.approx(row["p_lower"])


def test_bounds_are_rounded_to_the_safe_side(folder: Path, drawn: list[Any]) -> None:
    """A unanimous image's lower bound is not shown as 1, nor its radius larger than it is."""
    from analysis.vote_plots import plot_votes

    run = read_run(folder / "run.jsonl")
    row = run.images[0].replace(p_lower=0.001 ** (1 / 100_000), p_other=3e-5, radius=0.95279)
    plot_votes(Run(run.path, run.header, [row]), row["id"], "v.svg")
    (axes,) = drawn[0].axes
    shown = [line.get_label().rpartition(" ")[2] for line in axes.lines]
    assert shown == ["0.9999", "0.0001"]
    assert axes.figure.get_suptitle().endswith("radius 0.9527")


def test_the_last_speed_of_each_name_is_shown(tmp_path: Path, drawn: list[Any]) -> None:
    from analysis.speed_plot import plot_speeds

    rows = [
        {"case": "a", "engine": 1, "reference": 1, "ratio": 1, "ratio_min": 1, "ratio_max": 1},
        {"case": "a", "peak_kib": 3},
        {"case": "a", "engine": 6, "reference": 2, "ratio": 3, "ratio_min": 2, "ratio_max": 4, "pairs": 5},
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_speeds(tmp_path / "s.jsonl")
    assert found[-1] == Speed("a", 6, 2, 3, 2, 4)
    assert len(found) == 2
    plot_speeds(found, "s.svg")
    assert [bar.get_width() for bar in drawn[0].axes[0].patches] == [3]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("run.jsonl --image 1", "run.jsonl holds no image '1'; expected one of its ids, such as "),
        ("run.jsonl run.jsonl --image 1", "the votes of an image belong to one run; name one"),
        ("run.jsonl --image 1 --samples", "--image and --samples are two figures"),
        (
            "run.jsonl --samples --envelope",
            "--envelope applies to runs of certificates; leave it out for radius against",
        ),
        ("decided.jsonl --samples", "has no votes at a fixed n; expected a run file of `certify --n N`"),
        ("log --samples", "log has no votes at a fixed n; expected a run file of `certify --n N`"),
        ("run.jsonl l1.jsonl --samples", "runs with radii in different norms (l1, l2); show them separately"),
        ("run.jsonl --samples -o x.bmp", "cannot write a picture as 'x.bmp'"),
    ],
)
def test_refusals_are_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, says: str
) -> None:
    monkeypatch.chdir(folder)
    certify("plot", *command.split(), code=2)
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


def test_pyplot_state_is_not_touched() -> None:
    import matplotlib.pyplot as plt
    from matplotlib import get_backend

    plt.switch_backend("svg")
    with canvas(2, 2) as (_, _axes):
        assert get_backend() == "svg"
        assert plt.get_fignums() == []


def test_long_names_wrap_below_the_samples(folder: Path, drawn: list[Any]) -> None:
    from analysis.vote_plots import plot_samples

    run = read_run(folder / "run.jsonl")
    plot_samples([Run(run.path, run.header.replace(model="a long name " * 12), run.images)], "s.svg")
    (legend,) = drawn[0].legends
    name = legend.get_texts()[0].get_text()
    assert max(map(len, name.split("\n"))) <= 66
    assert drawn[0].get_figheight() > 3.3
