"""Curves, tables and pictures, against hand-made runs and the field's published logs."""

from __future__ import annotations

import csv
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import run
from PIL import Image
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

from analysis.curves import curve, curves, default_radii, names, proportion_interval
from analysis.plots import plot_curves, steps
from analysis.runs import read_any
from analysis.tables import compare, one_run
from certify.errors import UserError

HEADER = {"type": "run", "schema": 1, "model": "m", "data": "d", "norm": "l2", "sigma": 0.25, "n": 100, "alpha": 0.001}


def row(i: int, label: int | None, prediction: int, radius: float, **more: Any) -> dict[str, Any]:
    empty = {"p_lower": 0.0, "votes": {"1": 100}, "selection": {}, "trials": 100, "failures": 0, "seconds": 0.1}
    return {"type": "image", "id": str(i), "label": label, "prediction": prediction, "radius": radius, **empty, **more}


def write(path: Path, rows: list[dict[str, Any]], expected: int | None = None, **header: Any) -> Path:
    lines = [{**HEADER, "expected": len(rows) if expected is None else expected, **header}, *rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


FOUR = [row(0, 1, 1, 0.5), row(1, 1, 2, 0.9), row(2, 1, -1, 0.0), row(3, 1, 1, 0.25)]


def test_certified_accuracy_counts_correct_images_with_radius_at_least_r(tmp_path: Path) -> None:
    c = curve(read_any(write(tmp_path / "r.jsonl", FOUR)))
    radii = [0.0, 0.2499, 0.25, 0.2501, 0.5, 0.51]
    assert c.accuracy(radii).tolist() == [0.5, 0.5, 0.5, 0.25, 0.25, 0.0]
    low, high = c.interval([0.0])
    assert (low[0], high[0]) == pytest.approx((0.0676, 0.9324), abs=1e-4)  # exact interval of 2 in 4, as tabulated


def test_the_average_certified_radius_counts_wrong_images_as_0(tmp_path: Path) -> None:
    """Zhai et al. 2020: the mean over all images of the radius where the prediction is right, and of 0 elsewhere."""
    c = curve(read_any(write(tmp_path / "r.jsonl", FOUR)))
    assert c.average_radius == (0.5 + 0.25) / 4
    assert "0.187" in compare([c], [0.0]).splitlines()[-1].split()
    stopped = curve(read_any(write(tmp_path / "s.jsonl", FOUR, stopping={"radii": [0.25, 0.5]})))
    assert "≥ 0.187" in compare([stopped], [0.25])
    rows = [row(0, None, 1, 0.5)]
    assert "ACR" not in compare([curve(read_any(write(tmp_path / "u.jsonl", rows)))], [0.0])


def test_radii_out_of_reach_are_not_0(tmp_path: Path) -> None:
    """With 200 samples at sigma 0.12 all votes for one class certify 0.2191 at alpha 0.001, whatever the classifier."""
    few = {"n": 200, "n0": 10, "alpha": 0.001, "sigma": 0.12, "noise": "gaussian", "bound": "clopper-pearson"}
    votes = {"votes": {"1": 200}, "selection": {"1": 10}, "trials": 200, "values": 64}
    cap = 0.12 * norm.ppf(0.001 ** (1 / 200))
    rows = [row(0, 1, 1, cap - 1e-8, **votes), row(1, 1, 2, 0.1, **votes)]
    c = curve(read_any(write(tmp_path / "r.jsonl", rows, **few)))
    assert cap - 1e-8 < c.limit <= cap
    assert (c.capped, [c.reachable(r) for r in (0.0, 0.21, 0.23)]) == (1, [True, True, False])
    *_, line = compare([c], [0.0, 0.21, 0.5]).splitlines()
    assert line.split()[-3:] == ["0.500", "0.500", "-"]
    note = "-: out of reach; with n = 200, alpha = 0.001 and sigma = 0.12 no radius can exceed 0.2191"
    for text in (compare([c], [0.5]), one_run(c, [0.0, 0.5]), compare([c], [0.5], "latex")):
        assert note in text
    assert "out of reach" not in compare([c], [0.21])
    found = list(csv.DictReader(io.StringIO(compare([c], [0.21, 0.5], "csv"))))
    assert [(line["value"], line["reachable"]) for line in found] == [("0.5", "true"), ("0.0", "false")]
    log = tmp_path / "log"
    log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.5\t1\t0:01\n")
    assert curve(read_any(log)).reachable(5.0)


def test_a_radius_that_no_image_can_be_decided_at_is_out_of_reach(tmp_path: Path) -> None:
    few = {"n": 60, "n0": 0, "noise": "gaussian", "bound": "clopper-pearson", "procedure": "decide", "sigma": 0.25}
    rows = [row(0, 1, 1, 0.1, votes={"1": 60}, trials=60, values=64)]
    path = write(tmp_path / "r.jsonl", rows, stopping={"rule": "one-sided", "radii": [0.1, 0.4]}, **few)
    c = curve(read_any(path))
    assert (c.limit, [c.reachable(r) for r in (0.0, 0.1, 0.4)]) == (0.1, [True, True, False])


def test_the_average_radius_of_published_logs(shared_data: Path) -> None:
    """Recomputed from the text of the log, whose columns are idx label predict radius correct time."""
    log = shared_data / "cohen_logs/certify/cifar10/resnet110/noise_0.25/test/sigma_0.25"
    table = np.genfromtxt(log, names=True, dtype=None, encoding="utf-8", delimiter="\t", usecols=(3, 4))
    expected = float((table["radius"] * table["correct"]).mean())
    assert curve(read_any(log)).average_radius == pytest.approx(expected, abs=1e-12)


def test_the_folders_of_a_log_are_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        for log in (Path(folder) / "sigma_0.25", Path(folder) / "a" / "b" / "c" / "d" / "test" / "sigma_0.25"):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.5\t1\t0:00:01\n")
            run("table", str(log))
            named = "b/c/d" if "d" in log.parts else f"tmp/{log.parent.name}"
            assert capsys.readouterr().out.splitlines()[-1].startswith(f"{named}, σ = 0.25 ")


def test_keys_missing_in_logs_do_not_distinguish_runs(tmp_path: Path) -> None:
    """Beside a published log, which says neither data nor bound, runs keep the names that they have without it."""
    log = tmp_path / "resnet110" / "sigma_0.25"
    log.parent.mkdir()
    log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.5\t1\t0:00:01\n")
    said = {"model": "m", "sigma": 0.25, "data": "/far/away.zip"}
    runs = [read_any(write(tmp_path / f"{n}.jsonl", FOUR, **said, n=n)) for n in (10, 20)]
    own = names(runs)
    assert own == ["m, σ = 0.25, n = 10", "m, σ = 0.25, n = 20"]
    assert names([*runs, read_any(log)])[:2] == own
    other = write(tmp_path / "o.jsonl", FOUR, **{**said, "data": "/far/other.zip"}, n=10)
    others = [*runs, read_any(other)]
    assert names(others)[0] == "m, σ = 0.25, away.zip, n = 10"


def test_a_decided_run_can_be_plotted_twice(tmp_path: Path) -> None:
    """Two equal lines are two lines: each has its own place beside a radius."""
    path = write(tmp_path / "d.jsonl", FOUR, stopping={"radii": [0.25, 0.5]})
    run("plot", str(path), str(path), "-o", str(tmp_path / "p.svg"))
    assert (tmp_path / "p.svg").is_file()


def test_names_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(write(tmp_path / f"{n}.jsonl", FOUR, n=n)) for n in (10, 20)]
    run("table", *paths, "--name", "ours", "--name", "theirs, as published", "--radii", "0.25", "--format", "latex")
    out = capsys.readouterr().out
    assert "$r = 0.25$" in out
    first = [line.split("&")[0].strip() for line in out.splitlines() if "&" in line]
    assert first == ["run", "ours", "theirs, as published"]
    run("plot", *paths, "--name", "ours", "--name", "theirs", "-o", str(tmp_path / "p.svg"))
    assert "theirs" in (tmp_path / "p.svg").read_text()
    run("table", *paths, "--name", "ours", code=2)
    assert "1 names for 2 runs" in capsys.readouterr().err


def test_a_radius_just_below_does_not_count(tmp_path: Path) -> None:
    """The field prints three digits and counts 0.24996 as 0.25."""
    c = curve(read_any(write(tmp_path / "r.jsonl", [row(0, 1, 1, 0.24996)])))
    assert c.accuracy([0.25]).tolist() == [0.0]


def test_steps_equal_the_curve(tmp_path: Path) -> None:
    c = curve(read_any(write(tmp_path / "r.jsonl", FOUR)))
    radii, reached = steps(c)
    for r in (0.1, 0.25, 0.3, 0.5):
        assert reached[np.searchsorted(radii, r, side="left")] == c.successes([r])[0]
    assert reached[-1] == 0


def test_unlabelled_images_give_a_fraction(tmp_path: Path) -> None:
    rows = [row(0, None, 1, 0.5), row(1, None, 3, 0.1), row(2, None, -1, 0.0)]
    c = curve(read_any(write(tmp_path / "r.jsonl", rows)))
    assert c.quantity == "certified fraction"
    assert c.accuracy([0.0, 0.2]).tolist() == [2 / 3, 1 / 3]
    with pytest.raises(UserError, match="cannot be compared"):
        curves([read_any(tmp_path / "r.jsonl"), read_any(write(tmp_path / "s.jsonl", FOUR))])


def test_restrictions_are_noted(tmp_path: Path) -> None:
    rows = [*FOUR, row(4, 1, -1, 0.0, error="is damaged")]
    c = curve(read_any(write(tmp_path / "r.jsonl", rows, expected=9)))
    assert c.note == "partial: 5 of 9, 1 unreadable"
    assert c.total == 4
    assert "4 of 9 (partial)" in compare([c], [0.0])


def test_norms_are_not_mixed(tmp_path: Path) -> None:
    runs = [read_any(write(tmp_path / f"{n}.jsonl", FOUR, norm=n)) for n in ("l1", "l2")]
    with pytest.raises(UserError, match="different norms"):
        curves(runs)


def test_names_distinguish_runs(tmp_path: Path) -> None:
    runs = [read_any(write(tmp_path / f"{s}-{n}.jsonl", FOUR, sigma=s, n=n)) for s in (0.25, 0.5) for n in (100, 1000)]
    assert [c.name for c in curves(runs)] == [
        "m, σ = 0.25, n = 100",
        "m, σ = 0.25, n = 1,000",
        "m, σ = 0.5, n = 100",
        "m, σ = 0.5, n = 1,000",
    ]


@pytest.mark.parametrize(("style", "text"), [
    ("text", "0.500"), ("markdown", "|:---"), ("latex", r"\toprule"), ("csv", "certified accuracy,0.25,0.5,")
])  # fmt: skip
def test_table_styles(style: str, text: str, tmp_path: Path) -> None:
    table = compare(curves([read_any(write(tmp_path / "r.jsonl", FOUR))]), [0.0, 0.25], style)
    assert text in table


@pytest.mark.usefixtures("users_resolution")
@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pictures(suffix: str, tmp_path: Path) -> None:
    found = curves([read_any(write(tmp_path / f"{s}.jsonl", FOUR, sigma=s)) for s in (0.25, 0.5)])
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    for path in (first, second):
        plot_curves(found, path)
    assert first.read_bytes() == second.read_bytes()
    if suffix == ".png":
        with Image.open(first) as picture:
            assert picture.size[0] > 600
    if suffix == ".svg":
        assert "0.25" in first.read_text()


def test_nothing_certified_can_still_be_drawn(tmp_path: Path) -> None:
    plot_curves(curves([read_any(write(tmp_path / "r.jsonl", [row(0, 1, -1, 0.0)]))]), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_ten_thousand_images_are_read_fast(tmp_path: Path) -> None:
    """Not a benchmark: the bound is ten times the computing it takes, so only a change of order is caught."""
    rows = [row(i, 1, 1, i / 1e4, votes={str(c): 1000 + c for c in range(20)}, trials=20_190) for i in range(10_000)]
    path = write(tmp_path / "r.jsonl", rows)
    start = time.process_time()  # a busy machine is not slow code
    c = curve(read_any(path))
    assert c.accuracy([0.5]).tolist() == [0.5]
    assert time.process_time() - start < 3.0


def test_default_radii() -> None:
    assert default_radii(0.95) == [0.0, 0.25, 0.5, 0.75]
    assert default_radii(0.2956) == [0.0, 0.05, 0.1, 0.15, 0.2, 0.25]
    assert default_radii(3.8) == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("sigma", "accuracy"),
    [
        ("0.25", {0.0: 0.67, 0.5: 0.49}),
        ("0.50", {0.0: 0.57, 0.5: 0.46, 1.0: 0.37, 1.5: 0.29}),
        ("1.00", {0.0: 0.44, 0.5: 0.38, 1.0: 0.33, 1.5: 0.26, 2.0: 0.19, 2.5: 0.15, 3.0: 0.12}),
    ],
)
def test_published_imagenet_table(sigma: str, accuracy: dict[float, float], shared_data: Path) -> None:
    """Cohen, Rosenfeld and Kolter's own table, from their own logs."""
    run = read_any(shared_data / f"cohen_logs/certify/imagenet/resnet50/noise_{sigma}/test/sigma_{sigma}")
    found = curve(run).accuracy(list(accuracy))
    assert np.round(found, 2).tolist() == list(accuracy.values())
    assert run.header["sigma"] == float(sigma)
    assert (run.partial, run.header["expected"]) == (sigma == "0.25", 500)


def test_every_published_log_is_read(shared_data: Path) -> None:
    logs = sorted((shared_data / "cohen_logs/certify").rglob("sigma_*"))
    assert len(logs) == 13
    partial = [p for p in logs if read_any(p).partial]
    assert [p.parts[-4:] for p in partial] == [("resnet50", "noise_0.25", "test", "sigma_0.25")]


def test_a_log_of_every_image_is_whole(tmp_path: Path) -> None:
    rows = "".join(f"{i}\t1\t1\t0.5\t1\t0:01\n" for i in range(30))
    (tmp_path / "log").write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n" + rows)
    assert not read_any(tmp_path / "log").partial


def test_a_damaged_log_is_named(tmp_path: Path) -> None:
    log = tmp_path / "sigma_0.25"
    heading = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
    for line, text in (
        ("0\t1\t1\tnan\t1\t0:01\n", "damaged at line 2"),
        ("0\t1\t1\tx\t1\t0:01\n", "damaged at line 2"),
        ("0\t1\t2\t0.1\t1\t0:01\n", "contradicts"),
    ):
        log.write_text(heading + line)
        with pytest.raises(UserError, match=text):
            read_any(log)


@pytest.mark.parametrize("repeat", ["20\t5\t5\t0.5\t1\t0:01", "020\t5\t-1\t0.0\t0\t0:09"])
def test_a_log_with_a_duplicate_image_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], repeat: str
) -> None:
    """An image counted twice would change every share, as in run files; its number may be written differently."""
    log = tmp_path / "sigma_0.25"
    rows = ["idx\tlabel\tpredict\tradius\tcorrect\ttime", "0\t3\t3\t0.52\t1\t0:01", "20\t5\t5\t0.5\t1\t0:01"]
    log.write_text("\n".join([*rows, repeat]) + "\n")
    for verb in ("table", "plot"):
        run(verb, str(log), "-o", str(tmp_path / "out.svg"), code=2)
        error = capsys.readouterr().err
        assert error == f"certify: {log} holds image '20' twice; expected one line per image: delete the repeats\n"
    assert not (tmp_path / "out.svg").exists()
    log.write_text("\n".join(rows) + "\n")
    assert curve(read_any(log)).accuracy([0.51]).tolist() == [0.5]


def test_the_order_of_a_logs_lines_does_not_matter(tmp_path: Path) -> None:
    """The number of missing images follows from the stride, also where parallel workers wrote the lines."""
    lines = [f"{i}\t1\t1\t0.5\t1\t0:01\n" for i in range(0, 10_000, 1000)]
    for name, found in (("sorted", lines), ("mixed", lines[::2] + lines[1::2]), ("partial", lines[3:0:-1])):
        (tmp_path / name).write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n" + "".join(found))
    runs = {name: read_any(tmp_path / name) for name in ("sorted", "mixed", "partial")}
    assert {name: (r.partial, r.header["expected"]) for name, r in runs.items()} == {
        "sorted": (False, 10),
        "mixed": (False, 10),
        "partial": (True, 10),
    }


@pytest.mark.parametrize("n", [1, 7, 500])
def test_intervals_over_images_equal_those_of_statsmodels(n: int) -> None:
    counts = np.arange(n + 1)
    for confidence in (0.95, 0.999):
        expected = proportion_confint(counts, n, alpha=1 - confidence, method="beta")
        assert np.allclose(proportion_interval(counts, n, confidence), expected, rtol=0, atol=1e-12)


def test_a_line_for_each_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = [
        row(0, 0, 0, 0.5, base=0, base_class="cat"),
        row(1, 1, 1, 0.375, base=1, base_class="dog"),
        row(2, 1, 0, 0.9, base=0, base_class="cat"),
        row(3, 1, -1, 0.0, base=1, base_class="dog"),
    ]
    path = write(tmp_path / "r.jsonl", named)
    run("table", str(path), "--per-class", "--radii", "0,0.4")
    *_, cat, dog = capsys.readouterr().out.splitlines()
    assert cat.split()[-6:] == ["cat", "1", "0", "0.500", "1.000", "1.000"]
    assert dog.split()[-6:] == ["dog", "3", "1", "0.125", "0.333", "0.000"]
    run("table", str(path), "--per-class", "--envelope", code=2)
    unlabelled = write(tmp_path / "u.jsonl", [row(0, None, 1, 0.5)])
    run("table", str(unlabelled), "--per-class", code=2)
    assert "has no labels, so no classes" in capsys.readouterr().err


def test_a_table_for_a_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(write(tmp_path / "a.jsonl", FOUR)), str(write(tmp_path / "b.jsonl", FOUR[:1], model="50 % $x$"))]
    frame = ["--caption", r"Certified at $\ell_2$ radius $r$.", "--label", "tab:r", "--bold-best", "--columns", "ACR"]
    run("table", *paths, "--radii", "0,0.5", "--format", "latex", *frame, "--name", r"$f_\sigma$", "--name", "other")
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("%")]
    assert lines[:4] == [
        r"\begin{table}", r"\centering", r"\caption{Certified at $\ell_2$ radius $r$.}", r"\label{tab:r}"
    ]  # fmt: skip
    assert lines[-1] == r"\end{table}"
    header, first, second = (" ".join(line.split()) for line in lines if "&" in line)
    assert header == r"run & ACR & $r = 0$ & $r = 0.5$ \\"
    assert first == r"$f_\sigma$ & 0.187 & 0.500 & 0.250 \\"
    assert second == r"other & 0.500 & \textbf{1.000} & \textbf{1.000} \\"
    run("table", *paths, "--radii", "0", "--format", "latex")  # names from files are escaped
    assert r"50 \% \$x\$" in capsys.readouterr().out
    run("table", *paths, "--radii", "0", "--format", "markdown", "--bold-best", "--columns", "none")
    assert "| **1.000** |" in " ".join(capsys.readouterr().out.split())
    run("table", *paths, "--columns", "radius", code=2)
    run("table", *paths, "--caption", "x", code=2)
    assert "--caption is for --format latex" in capsys.readouterr().err
