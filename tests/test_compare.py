"""Defences side by side: one line for each image, defence and condition, the same however the work was cut up."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run as command
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor, nn

import certify
from analysis.attacks import AttackSettings
from analysis.comparison import runner as engine
from analysis.comparison.plan import CLEAN, RANDOM, SMOOTHING, AttackContext, Plan, make_header
from analysis.comparison.plot import draw_comparison
from analysis.comparison.results import Cell, Comparison, Condition, wilson
from analysis.comparison.runner import Proposed, compare
from analysis.comparison.tables import records, tabulate_comparison
from analysis.runs import read_comparison
from certify import SmoothedClassifier
from certify.cli.compare import compare as compare_command
from certify.errors import CertifyWarning, RunFault, UserError
from certify.images.dataset import ImageSet, load_images
from certify.models.classifier import Classifier
from certify.models.defence import Defence, Member
from certify.runs.comparison_records import Outcome
from certify.runs.run_file import ComparisonFile, ComparisonRun
from certify.smoothing.rng import stream_key
from denoisers.defences import build_defence

BLIND, ADAPTIVE = Condition("shove", "blind"), Condition("shove", "adaptive")


@pytest.fixture(scope="module")
def images(digits: Classifier) -> ImageSet:
    return load_images("digits", digits, max_images=12)


class Half(nn.Module):
    def forward(self, images: Tensor, sigma: float | None = None, *, generator: object = None) -> Tensor:
        return images[..., ::2]


class Nothing(nn.Module):
    def forward(self, images: Tensor, sigma: float | None = None, *, generator: object = None) -> Tensor:
        return images * float("nan")


class Crash(nn.Module):
    def forward(self, images: Tensor, sigma: float | None = None, *, generator: object = None) -> Tensor:
        raise ZeroDivisionError("a fault of its own")


def defences(digits: Classifier, **broken: nn.Module) -> dict[str, Defence | str]:
    good = {text: build_defence(text, digits) for text in ("none", "median", "denoised:n=25:denoiser=none")}
    return good | {name: Defence(name, [Member(module, digits)]) for name, module in broken.items()}


def shove(condition: Condition, target: Defence, x: Tensor, labels: Tensor, ids: Sequence[str]) -> Proposed:
    """Every pixel up by 0.2: the target is asked once an image."""
    target(x, [stream_key(0, i, "shove") for i in ids])
    return Proposed((x + 0.2).clamp(0, 1), [1] * len(x))


def run(path: Path, given: Any, digits: Classifier, images: ImageSet, craft: Any = shove, **plan: Any) -> Comparison:
    conditions = plan.pop("conditions", [CLEAN, RANDOM, BLIND, ADAPTIVE, SMOOTHING])
    settings = AttackSettings((), 0.2, "linf", queries=1, steps=1, eot=1, seed=0)
    context = AttackContext(digits, images, given, settings, craft)
    numbers = Plan(conditions, settings, repeats=3, certify_n=200, **plan)
    header = make_header(numbers, context, model="digits", data="digits")
    with ComparisonFile(path, header) as file:
        compare(context, numbers, file)
    return read_comparison(path)


def outcomes(found: Comparison) -> list[dict[str, Any]]:
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in found.run.images]
    return sorted(rows, key=lambda row: row["id"])


def test_outcomes_do_not_depend_on_chunks(
    digits: Classifier, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "a.jsonl", defences(digits), digits, images)
    monkeypatch.setattr(engine, "CHUNK", 5)
    parts = run(tmp_path / "b.jsonl", defences(digits), digits, images)
    assert outcomes(whole) == outcomes(parts)
    assert not whole.run.partial


def test_a_killed_comparison_resumes_to_the_same_outcomes(
    digits: Classifier, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHUNK", 5)
    whole = run(tmp_path / "a.jsonl", defences(digits), digits, images)
    calls = iter(range(100))

    def killed(*given: Any) -> Proposed:
        if next(calls) == 6:
            raise KeyboardInterrupt
        return shove(*given)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b.jsonl", defences(digits), digits, images, killed)
    before = ComparisonRun.read(tmp_path / "b.jsonl", allow_partial=True)
    assert 0 < len(before.images) < len(whole.run.images)
    again = run(tmp_path / "b.jsonl", defences(digits), digits, images)
    assert outcomes(again) == outcomes(whole)
    assert again.run.images[: len(before.images)] == before.images


def test_the_numbers_by_hand(digits: Classifier, images: ImageSet, tmp_path: Path) -> None:
    found = run(tmp_path / "a.jsonl", defences(digits), digits, images)
    x = torch.stack([images.load(i) for i in range(len(images))])
    y = torch.tensor([label for label in images.labels if label is not None])
    for condition, shown in ((CLEAN, x), (BLIND, (x + 0.2).clamp(0, 1))):
        cell = found.cell("none", condition)
        assert cell is not None
        assert cell.right == float((digits(shown) == y).sum())
        assert (cell.images, cell.repeats) == (12, 1)
    smoothed = found.cell("denoised:n=25:denoiser=none", CLEAN)
    assert smoothed is not None
    assert smoothed.repeats == 3
    certified = found.cell("denoised:n=25:denoiser=none", SMOOTHING)
    assert certified is not None
    g = SmoothedClassifier(digits, 0.25)
    ids = [item.id for item in images.items]
    decided = [g.decide(x[i], radius=0.2 * 8, n=200, image_id=ids[i]).prediction for i in range(12)]
    assert certified.right == sum(a == b for a, b in zip(decided, y.tolist(), strict=True))
    assert found.cell("none", SMOOTHING) is None  # only smoothing has a certificate
    moved = [row for row in found.run.images if row["condition"] == "random noise" and row["defence"] == "none"]
    assert all(row["linf"] <= 0.2 + 1e-6 for row in moved)


def test_wilson_and_mcnemar(digits: Classifier, images: ImageSet, tmp_path: Path) -> None:
    z, n, p = 1.959963984540054, 40, 0.3
    middle, half = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n**2),
    )
    assert wilson(12, 40) == pytest.approx((middle - half, middle + half))
    found = run(tmp_path / "a.jsonl", defences(digits), digits, images)
    pair = found.pair("median", "none", CLEAN)
    assert pair is not None
    label = {row["image"]: row["label"] for row in found.run.images}
    right = {
        d: {
            r["image"]
            for r in found.run.images
            if r["defence"] == d and r["condition"] == "clean" and r["answers"] == [label[r["image"]]]
        }
        for d in ("none", "median")
    }
    assert (pair.better, pair.worse) == (len(right["median"] - right["none"]), len(right["none"] - right["median"]))
    if pair.better + pair.worse:
        expected = binomtest(pair.better, pair.better + pair.worse, 0.5).pvalue
        assert pair.p_value == pytest.approx(expected)


def test_a_failing_defence_fails_in_its_own_row(digits: Classifier, images: ImageSet, tmp_path: Path) -> None:
    given = defences(digits, half=Half(), nothing=Nothing(), crash=Crash()) | {"absent": "no weights at hand"}
    found = run(tmp_path / "a.jsonl", given, digits, images, conditions=[CLEAN, BLIND, ADAPTIVE])
    text = tabulate_comparison(found)
    assert not found.run.partial
    for name, why in {
        "half": "turned (12, 1, 8, 8) into (12, 1, 8, 4)",
        "nothing": "no finite answer for 12 of 12 images",
        "crash": "ZeroDivisionError: a fault of its own",
        "absent": "no weights at hand",
    }.items():
        cell = found.cell(name, CLEAN)
        assert cell is not None
        assert why in cell.failed
        assert f"failed: {name}, clean: " in text
    assert all(not found.cell("median", c).failed for c in (CLEAN, BLIND, ADAPTIVE))  # type: ignore[union-attr]


def test_every_heading_names_its_group(digits: Classifier, images: ImageSet, tmp_path: Path) -> None:
    found = run(tmp_path / "a.jsonl", defences(digits), digits, images)
    for style in ("markdown", "latex"):
        text = tabulate_comparison(found, style)
        assert "blind: shove" in text
        assert "adaptive: shove" in text
    assert "purifier-blind,shove" in tabulate_comparison(found, "csv")
    for name in ("c.png", "c.svg", "c.pdf"):
        draw_comparison(found, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_a_refuted_certificate_is_an_error_that_names_the_image(
    digits: Classifier, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certificates of radius 9 that nobody earned: the attack moves to another digit, which is nearer than that."""
    honest = engine._certified

    def boast(*given: Any) -> Outcome:
        row = honest(*given)
        return row.replace(answers=[row.label], radius=9.0)

    def swap(condition: Condition, target: Defence, x: Tensor, labels: Tensor, ids: Sequence[str]) -> Proposed:
        return Proposed(x.roll(1, 0), [1] * len(x))

    conditions = [CLEAN, ADAPTIVE, SMOOTHING]
    good = run(tmp_path / "a.jsonl", defences(digits), digits, images, swap, conditions=conditions)
    good.require_sound()
    monkeypatch.setattr(engine, "_certified", boast)
    bad = run(tmp_path / "b.jsonl", defences(digits), digits, images, swap, conditions=conditions)
    with pytest.raises(RunFault, match=r"attacks refute a certificate: image .* is certified within l2 9"):
        bad.require_sound()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("art", reason="attacks need the extra: pip install 'certify-toolkit[attacks]'")
    monkeypatch.chdir(tmp_path)
    given = (
        "compare",
        "--model",
        "digits",
        "--max",
        "4",
        "--defences",
        "none,gs:std=1",
        "--attacks",
        "blind-pgd,square",
    )
    command(*given, "--eps", "1/10", "--queries", "20", "--steps", "3", "--out", "c.jsonl", "--figure", "c.png")
    shown, said = capsys.readouterr()
    assert "linf distance up to 1/10" in shown
    assert said.endswith("wrote c.png\n")
    rows = ComparisonRun.read("c.jsonl").images
    assert len(rows) == 4 * 2 * 5
    assert all(row["queries"] <= 20 for row in rows if "square" in row["condition"])
    assert all(row["linf"] <= 0.1 + 1e-6 for row in rows)
    assert Path("c.png").stat().st_size > 1000
    command("table", "c.jsonl")
    assert capsys.readouterr().out == shown
    command("plot", "c.jsonl", "-o", "d.svg")
    command(
        *given, "--group", "blind", "--eps", "1/10", "--queries", "20", "--steps", "3", "--out", "b.jsonl", "--quiet"
    )
    assert {r["condition"] for r in rows} - {r["condition"] for r in ComparisonRun.read("b.jsonl").images} == {
        "adaptive: square"
    }
    command("table", "c.jsonl", "c.jsonl", code=2)
    command("table", "c.jsonl", "--radii", "0,1", code=2)
    command("recompute", "c.jsonl", "--alpha", "0.01", code=2)
    assert "is a comparison, not a run" in capsys.readouterr().err


def test_a_failure_during_the_run_stays_in_its_column(
    digits: Classifier, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal inside of an attack, on the second part of the images: the column fails, the same when it resumes."""
    monkeypatch.setattr(engine, "CHUNK", 5)
    calls = iter(range(100))

    def refuses(condition: Condition, target: Defence, *given: Any) -> Proposed:
        if condition == ADAPTIVE and target.name == "median" and next(calls) == 1:
            raise UserError("no gradients to climb")
        return shove(condition, target, *given)

    found = run(tmp_path / "a.jsonl", defences(digits), digits, images, refuses)
    cell = found.cell("median", ADAPTIVE)
    assert cell is not None
    assert (cell.failed, cell.images) == ("no gradients to climb", 5)
    assert found.pair("median", "none", ADAPTIVE) is None
    (record,) = [r for r in records(found) if (r["defence"], r["group"]) == ("median", "adaptive")]
    assert record["accuracy"] is None
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if "no gradients" in line)
    (tmp_path / "b.jsonl").write_text("".join(lines[: first + 1]))  # killed right after
    assert outcomes(run(tmp_path / "b.jsonl", defences(digits), digits, images)) == outcomes(found)


def test_a_failed_certificate_does_not_stop_the_attacks(
    digits: Classifier, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any) -> dict[str, Any]:
        raise MemoryError("no room")

    monkeypatch.setattr(engine, "_certified", fails)
    found = run(tmp_path / "a.jsonl", defences(digits), digits, images)
    name = "denoised:n=25:denoiser=none"
    assert found.cell(name, SMOOTHING).failed == "MemoryError: no room"  # type: ignore[union-attr]
    assert not found.cell(name, ADAPTIVE).failed  # type: ignore[union-attr]


def test_a_radius_that_no_vote_reaches_is_not_certifiable(digits: Classifier, images: ImageSet, tmp_path: Path) -> None:
    given = {"denoised:n=5:denoiser=none:sigma=0.01": build_defence("denoised:n=5:denoiser=none:sigma=0.01", digits)}
    found = run(tmp_path / "a.jsonl", given, digits, images, conditions=[CLEAN, SMOOTHING])  # radius 160 sigma
    cell = found.cell(next(iter(given)), SMOOTHING)
    assert cell is not None
    assert (cell.right, cell.images, cell.failed) == (0, 12, "")


def test_the_worst_attack_is_found_image_by_image(digits: Classifier, images: ImageSet, tmp_path: Path) -> None:
    other = Condition("swap", "adaptive")

    def either(condition: Condition, target: Defence, x: Tensor, labels: Tensor, ids: Sequence[str]) -> Proposed:
        """Each attack spoils the half of the images that the other leaves alone."""
        half = torch.tensor([int(i.split("/")[-1].split(".")[0][-1]) % 2 == (condition == other) for i in ids])
        moved = torch.where(half[:, None, None, None], x.flip(2), x)
        return Proposed(moved, [1] * len(x), ["all 3 gradients were zero"] * len(x))

    found = run(tmp_path / "a.jsonl", defences(digits), digits, images, either, conditions=[CLEAN, ADAPTIVE, other])
    (column,) = [c for c in found.columns if c not in found.conditions]
    worst, cells = found.cell("none", column), [found.cell("none", c) for c in (ADAPTIVE, other)]
    assert worst is not None
    right = [
        {
            r["image"]
            for r in found.run.images
            if r["condition"] == c.key and r["defence"] == "none" and r["answers"] == [r["label"]]
        }
        for c in (ADAPTIVE, other)
    ]
    assert worst.right == len(right[0] & right[1])
    assert worst.right < min(cell.right for cell in cells if cell is not None)
    text = tabulate_comparison(found)
    assert "note: none, adaptive: swap: 12 images: all 3 gradients were zero" in text

    def unfinished(first: set[str], second: set[str]) -> Cell | None:
        """The worst while the attacks are on their way, each through with these images."""
        through = {ADAPTIVE.key: first, other.key: second}
        kept = [r for r in found.run.images if r["image"] in through.get(r["condition"], ())]
        return Comparison(ComparisonRun(found.run.path, found.run.header, kept)).cell("none", column)

    names = sorted({r["image"] for r in found.run.images})
    partial = unfinished(set(names), set(names[:1]))  # only one image has met both
    assert partial is not None
    assert (partial.images, partial.right) == (1, names[0] in right[0] & right[1])
    assert unfinished(set(names[1:]), set(names[:1])) is None


SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "certificates": (
        "--defences none,denoised:n=5 --attacks none --certify-n 200 --alpha 0.01 --repeats 2 --seed 3",
        {"defences": ["none", "denoised:n=5"], "attacks": [], "certify_n": 200, "alpha": 0.01, "repeats": 2, "seed": 3},
    ),
    "l2": (
        "--defences none,gs:std=1,median --attacks none --norm l2 --eps 0.5",
        {"defences": ["none", "gs:std=1", "median"], "attacks": [], "norm": "l2", "eps": 0.5},
    ),
    "attacks": (
        "--defences none,gs --attacks adaptive-pgd,square --group adaptive --steps 3 --eot 2 --queries 20",
        {
            "defences": ["none", "gs"],
            "attacks": ["adaptive-pgd", "square"],
            "group": "adaptive",
            "steps": 3,
            "eot": 2,
            "queries": 20,
        },
    ),
}


@pytest.mark.parametrize("question", SAME)
def test_python_and_the_command_write_the_same_comparison(question: str, tmp_path: Path) -> None:
    words, options = SAME[question]
    if options["attacks"]:
        pytest.importorskip("art", reason="attacks need the extra: pip install 'certify-toolkit[attacks]'")
    theirs, ours = tmp_path / "command.jsonl", tmp_path / "python.jsonl"
    line = f"compare --model digits --data digits --skip 60 --max 4 --quiet {words}"
    command(*line.split(), "--out", str(theirs))
    found = certify.compare(
        "digits",
        "digits",
        skip=60,
        max_images=4,
        out=ours,
        progress=False,
        **options,  # type: ignore[arg-type]
    )
    left, right = ComparisonRun.read(theirs), ComparisonRun.read(ours)
    provenance = {"command", "versions"}
    assert {k: v for k, v in left.header.items() if k not in provenance} == {
        k: v for k, v in right.header.items() if k not in provenance
    }
    assert outcomes(Comparison(left)) == outcomes(Comparison(right)) == outcomes(found)
    assert certify.compare("digits", "digits", skip=60, max_images=4, out=ours, **options).rows == found.rows  # type: ignore[arg-type]


def test_defences_and_classifier_of_ones_own(digits: Classifier, images: ImageSet, tmp_path: Path) -> None:
    x = torch.stack([images.load(i) for i in range(12)])

    def darker(noisy: Tensor) -> Tensor:
        return 0.8 * noisy

    given = {"none": "none", "darker": darker, "pool": nn.AvgPool2d(3, 1, 1)}
    found = certify.compare(digits.net, x, images.labels, defences=given, attacks=[], progress=False)
    named = certify.compare("digits", x, images.labels, defences=["none", darker], attacks=[], progress=False)
    assert (found.defences, named.defences) == (["none", "darker", "pool"], ["none", "darker"])
    assert found.cell("none", "clean") == replace(
        named.cell("none", "clean"), seconds=found.cell("none", "clean").seconds
    )  # type: ignore[type-var,union-attr]
    labels = digits(0.8 * x).tolist()
    assert [row.answers for row in found if (row.defence, row.condition) == ("darker", "clean")] == [
        [c] for c in labels
    ]
    assert len(found) == found.run.header.expected
    assert "defences none, darker, pool; clean, random noise>" in repr(found)
    assert "darker" in found.table()
    assert found.table()._repr_html_() == found._repr_html_()
    found.plot(tmp_path / "c.svg")
    assert (tmp_path / "c.svg").stat().st_size > 1000
    assert found.plot()._repr_png_().startswith(b"\x89PNG")
    frame = found.to_pandas()
    assert frame.loc["darker", "no attack", "clean"].accuracy == found.cell("darker", "clean").accuracy  # type: ignore[union-attr]


def needs_level(noisy: Tensor, sigma: float) -> Tensor:
    return noisy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"defences": ["medain"]}, "unknown denoiser 'medain'"),
        ({"defences": [nn.Identity(), nn.Identity()]}, "two defences named Identity; expected a mapping"),
        ({"defences": []}, "no defences to compare"),
        ({"defences": {"mine": 3}}, "defence mine: expected a name, a module or a function of images, not int"),
        ({"defences": [needs_level]}, "defence needs_level needs the noise level"),
        ({"model": SmoothedClassifier("digits", 0.25)}, "a SmoothedClassifier: expected its base classifier"),
        ({"attacks": ["pdg"]}, "unknown attack 'pdg'"),
        ({"attacks": ["adaptive-pgd"], "group": "blind"}, "group blind: attack adaptive-pgd is adaptive only"),
        ({"group": "bilnd"}, "unknown group 'bilnd'; nearest: blind"),
        ({"eps": 0}, "eps = 0: expected a distance above 0"),
        ({"norm": "l7"}, "norm 'l7'; expected one of linf, l2"),
        ({"queries": 0}, "queries = 0: expected a whole number from 1"),
        ({"surrogates": ["digits"]}, "surrogates without the attack transfer"),
        ({"labels": None}, "Tensor has no labels, and accuracies need them"),
        ({"max_imges": 3}, "unknown option 'max_imges'; nearest: max_images"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], message: str) -> None:
    given = {"model": "digits", "labels": [0], "defences": "none", "attacks": [], "progress": False} | options
    with pytest.raises(UserError, match=re.escape(message)):
        certify.compare(images=torch.zeros(1, 1, 8, 8), **given)


def test_images_that_cannot_be_read_are_left_out_with_a_warning() -> None:
    pictures = [torch.zeros(1, 8, 8), torch.full((1, 8, 8), math.nan)]
    with pytest.warns(CertifyWarning, match="1: .*it is left out"):
        found = certify.compare("digits", pictures, [0, 0], defences=["none"], attacks=[], progress=False)
    assert [row.image for row in found if row.condition == "clean"] == ["0"]


def test_defaults_are_those_of_the_command() -> None:
    options = {option.name: option.default for option in compare_command.params}
    options |= {name: tuple(options[name].split(",")) for name in ("defences", "attacks")}
    options |= {"surrogates": options.pop("surrogate"), "eps": options["eps"].value}
    parameters = inspect.signature(certify.compare).parameters.values()
    ours = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert ours == {name: options[name] for name in ours}


def test_a_module_of_any_size_takes_a_folder(tmp_path: Path) -> None:
    for label in range(2):
        (tmp_path / str(label)).mkdir()
        Image.linear_gradient("L").resize((9, 8)).rotate(180 * label).save(tmp_path / f"{label}/a.png")

    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[..., 4:, :].mean((1, 2, 3)), x[..., :4, :].mean((1, 2, 3))], 1)

    options: dict[str, Any] = {"attacks": [], "norm": "linf", "eps": 0.1, "progress": False}
    found = certify.compare(Halves(), tmp_path, defences=["none", "median"], num_classes=2, **options)
    assert [row.answers for row in found if (row.defence, row.condition) == ("none", "clean")] == [[0], [1]]
    assert found.run.header.l2_radius == pytest.approx(0.1 * math.sqrt(3 * 8 * 9))
