"""The command as a user meets it: plan, warnings, one JSON object, the other verbs."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
from command import run
from PIL import Image
from scipy.stats import norm

from certify import __version__, read_run
from certify.cli.app import group
from certify.cli.info import _installed
from certify.cli.parameter_types import Count

DIGITS = ["--model", "digits", "--sigma", "0.25"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("users_resolution")
def test_the_default_verb(capsys: pytest.CaptureFixture[str]) -> None:
    """Table on stdout, plan on stderr; `certify run` and the bare form are one run, so the second changes nothing."""
    run(*DIGITS, "--n", "500", "--max", "4")
    first = capsys.readouterr()
    for text in ("certified accuracy", "95 % interval", "base accuracy (no noise)", "abstained", "runs/digits-digits-"):
        assert text in first.out
    cap = f"at most {0.25 * norm.ppf(0.001 ** (1 / 500)):.4g} (2.21 sigma)"
    for text in ("1x8x8", "labels: by name", "[0, 1] pixels", cap, "4 images x 600 samples"):
        assert text in first.err
    run("run", "--model=digits", "--sigma=0.25", "--n=500", "--max=4")
    second = capsys.readouterr()
    assert second.out == first.out
    assert "4 of 4 images are there already" in second.err
    (picture,) = Path("runs").glob("*.png")
    with Image.open(picture) as image:
        assert image.size[0] > 600


def test_version_and_help_work_as_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for arguments in (["version"], ["--version"], ["help", "merge"], ["merge", "--help"], ["help"], ["--help"]):
        run(*arguments)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == f"certify, version {__version__}\n"
    assert said[2] == said[3] != said[4] == said[5]


SECTIONS = ["Main options", "Model", "Noise", "Data", "Statistics", "Compute", "Output", "Other options"]


def test_help_has_sections_and_the_main_options_first(capsys: pytest.CaptureFixture[str]) -> None:
    def listed(section: str) -> list[str]:
        return [line.split()[0] for line in section.partition("\n\n")[0].splitlines() if line.startswith("  --")]

    run("run", "--help")
    text = capsys.readouterr().out
    assert [line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "] == SECTIONS
    main = "--model --data --max --sigma --denoiser --n --radius --out".split()
    assert listed(text.split("Main options:")[1]) == main
    run("--help")
    assert listed(capsys.readouterr().out.split("Main options of certify [run]:")[1]) == main


def test_no_help_is_wider_than_a_terminal_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("", *group.commands):
        run(*name.split(), "--help")
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80, name


@pytest.mark.parametrize(
    ("typed", "first", "then"),
    [
        ("--model digits --sigma 0.12,0.25 --n 100 --max 1", "0.12 --n 100 --max 1", "0.25"),
        ("predict --sigma=0.12,0.25 --model digits --n 100 --max 1 --out p.jsonl", "0.12", "0.25 and another --out"),
        ("--model digits --sigma 64/255,128/255 --n 100 --max 1", "64/255 --n 100 --max 1", "128/255"),
        ("--model digits --sigma 0.12 --n 100,1e3 --max 1 --out=r.jsonl", "100 --max 1", "1e3 and another --out"),
        ("--model digits --sigma 0.12 --n 100 --max 1 --alpha 0.001,0.01", "0.001", "0.01"),
        ("--model digits --sigma 0.12 --n 100 --max 1 --seed 0,1,2", "0", "1"),
        ("table r.jsonl --relative-to 0.9,0.8", "0.9", "0.8"),
    ],
)
def test_several_values_of_a_single_number_are_refused_with_a_command(
    capsys: pytest.CaptureFixture[str], typed: str, first: str, then: str
) -> None:
    """The error gives the command for the first value, and that works."""
    run("--model", "digits", "--sigma", "0.5", "--n", "100", "--max", "2", "--out", "r.jsonl")
    capsys.readouterr()
    run(*shlex.split(typed), code=2)
    (said,) = capsys.readouterr().err.splitlines()
    assert "values; expected one in each run: first run `certify " in said
    command = said.split("`")[1]
    assert f"`, then the same with {then}; see `certify" in said
    assert first in command
    if "--out=r.jsonl" in typed:
        Path("r.jsonl").unlink()
    run(*shlex.split(command)[1:])


def test_numbers_may_be_fractions_of_255() -> None:
    run(*DIGITS[:2], "--sigma", "64/255", "--n", "100", "--max", "2", "--radius", "36/255", "--out", "f.jsonl")
    header = read_run("f.jsonl").header
    assert (header["sigma"], header["stopping"]["radii"]) == (64 / 255, [36 / 255])


def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    run(*DIGITS, "--n", "500", "--max", "4", "--radii", "0,0.1", "--json")
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert {"run", "images", "certified_accuracy", "samples", "samples_per_second", "abstained"} <= result.keys()
    assert (result["images"], result["samples"]) == (4, 2400)
    assert list(result["certified_accuracy"]) == ["0", "0.1"]
    assert [one["id"] for one in result["results"]] == [row["id"] for row in read_run(result["run"]).images]
    assert {"label", "base", "prediction", "radius", "p_lower"} <= result["results"][0].keys()


def test_unlabelled_images_get_classes_and_radii_but_no_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    run(*DIGITS, "--n", "500", "--max", "3", "--labels", "none")
    out = capsys.readouterr().out
    assert "certified fraction" in out
    assert "accuracy" not in out
    run(*DIGITS, "--n", "500", "--max", "3", "--labels", "none", "--json")
    assert json.loads(capsys.readouterr().out)["certified_accuracy"] is None


def test_warning_of_too_few_samples(capsys: pytest.CaptureFixture[str]) -> None:
    run(*DIGITS, "--n", "9", "--max", "1")
    assert (
        "n = 9 can certify nothing at alpha = 0.001: every image will abstain; pass --n 10" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("sigma", "warned"), [("64", True), ("4", False)])
def test_warning_of_a_sigma_in_units_of_255(sigma: str, warned: bool, capsys: pytest.CaptureFixture[str]) -> None:
    run("--model", "digits", "--sigma", sigma, "--n", "20", "--n0", "5", "--max", "1")
    assert ("did you mean --sigma 0.251" in capsys.readouterr().err) == warned


def test_warning_of_labels_in_another_order(capsys: pytest.CaptureFixture[str]) -> None:
    """Every class shifted by one: no image is right, and the run says where to look."""
    Path("map.csv").write_text("".join(f"{d},{(d + 1) % 10}\n" for d in range(10)))
    run(*DIGITS, "--data", "digits", "--skip", "20", "--n", "50", "--class-map", "map.csv")
    assert "right on 0 of 25 images, which is near chance: wrong class order (--class-map)?" in capsys.readouterr().err


def test_warning_of_sorted_data_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    for digit in range(2):
        Path(f"d/{digit}").mkdir(parents=True)
        for i in range(25):
            Image.new("L", (8, 8), 10 * i).save(f"d/{digit}/{i}.png")
    run(*DIGITS, "--data", "d", "--max", "20", "--n", "20")
    assert "all 20 images are of class 0: is the data sorted?" in capsys.readouterr().err


def test_without_data_photographs_and_few_samples(capsys: pytest.CaptureFixture[str]) -> None:
    Path("photo_model.py").write_text(
        "def dark(images): return (images.mean(dim=(1, 2, 3)) < 0.5).long()\ndark.num_classes = 2\n"
        "dark.input_size = (3, 16, 16)\ndark.class_names = ['bright', 'dark']\n"
    )
    run("--model", "photo_model:dark", "--sigma", "0.25")
    out, err = capsys.readouterr()
    assert "n = 1,000 for a quick answer" in err
    assert "china.jpg" in out
    assert any(line.split()[:2] == ["flower.jpg", "dark"] for line in out.splitlines())
    run("--model", "photo_model:dark", "--sigma", "0.25", "--n", "2000", "--quiet", "--json")
    assert json.loads(capsys.readouterr().out)["samples"] == 2 * 2100


def test_predict(capsys: pytest.CaptureFixture[str]) -> None:
    run("predict", *DIGITS, "--n", "500", "--max", "4")
    out = capsys.readouterr().out
    assert "smoothed accuracy" in out
    assert "radius" not in out
    (path,) = Path("runs").glob("predict-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert (rows[0]["procedure"], rows[0]["n0"]) == ("predict", 0)
    assert all(row["radius"] is None and 0 <= row["p_value"] <= 1 for row in rows[1:])


def test_plot_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    run(*DIGITS, "--n", "500", "--max", "4", "--out", "a.jsonl", "--quiet")
    run(*DIGITS, "--n", "1000", "--max", "4", "--out", "b.jsonl", "--quiet")
    capsys.readouterr()
    run("table", "a.jsonl", "b.jsonl", "--radii", "0,0.25")
    out = capsys.readouterr().out
    assert "digits, σ = 0.25, n = 500" in out
    assert "r = 0.25" in out
    run("table", "a.jsonl", "--format", "csv", "-o", "t.csv")
    assert Path("t.csv").read_text().startswith("run,model,denoiser,noise,norm,sigma,n,alpha,bound,")
    run("plot", "a.jsonl", "b.jsonl", "-o", "curve.svg")
    assert "<svg" in Path("curve.svg").read_text()


def test_predictions_among_runs_are_left_out_of_a_plot(capsys: pytest.CaptureFixture[str]) -> None:
    run(*DIGITS, "--n", "100", "--max", "2", "--quiet")
    run("predict", *DIGITS, "--n", "100", "--max", "2", "--quiet")
    files = sorted(map(str, Path("runs").glob("*.jsonl")))
    assert len(files) == 2
    capsys.readouterr()
    run("table", *files)
    out, err = capsys.readouterr()
    assert "predictions, which have no radius" in err
    assert "no radius; expected a run of `certify --model ...`; skipped" in err
    assert "digits, σ = 0.25" in out


def test_predict_warns_of_too_few_samples(capsys: pytest.CaptureFixture[str]) -> None:
    run("predict", *DIGITS, "--n", "10", "--max", "1")
    assert "n = 10 can decide nothing at alpha = 0.001: pass --n 11" in capsys.readouterr().err


@pytest.mark.slow
def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    """The figures follow from each other, in words and as JSON; a function of labels only is measured too."""
    run("bench", "--model", "digits", "--seconds", "0.05", "--pairs", "2", "--n", "1000", "--compile", "off", "--json")
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found["ratio_min"] <= found["ratio"] <= found["ratio_max"]
    assert found["certificate"] == pytest.approx(found["prepared"] + 1000 / found["engine"])
    assert found["flops"] == 2 * (64 * 128 + 128 * 128 + 128 * 10)
    assert found["share"] == pytest.approx(found["engine"] * found["flops"] / found["ceiling"])
    assert (found["same"], found["compared"]) == (200, 200)
    assert [other["settings"].split(", ")[-1] for other in found["alternatives"]] == [
        "batches of 8000",  # bfloat16
        "batches of 32000",
        "batches of 2000",
    ]
    options = ["--seconds", "0.05", "--pairs", "1", "--n", "1000", "--input-size", "1x8x8", "--num-classes", "10"]
    Path("only_labels.py").write_text("def f(images):\n    return (images.mean((1, 2, 3)) > 0.5).long()\n")
    run("bench", "--model", "only_labels:f", *options)
    out, err = capsys.readouterr()
    for text in ("reference ", "engine ", "ratio ", "certificate ", "200 of 200 are those of plain float32"):
        assert text in out
    assert "ceiling" not in out
    assert "warming up" in err


@pytest.mark.slow
def test_bench_accepts_an_untrained_model(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seconds", "0.05", "--pairs", "1", "--n", "1000", "--reference-batch", "10", "--compile", "off"]
    run("bench", "--model", "cifar_resnet20", "--weights", "untrained", *options)
    out = capsys.readouterr().out
    assert "float32, eager, batches of 10)" in out
    assert re.search(r"alternative [\d.]+ \([\d.]+ to [\d.]+\) times the speed: bfloat16, eager", out)
    assert "float32, batch norms folded, eager" in out


def test_a_large_seed_is_not_rounded() -> None:
    count = Count("a seed", least=0)
    given = ("9007199254740993", "100_000", "1e5")
    assert [count.convert(text, None, None) for text in given] == [2**53 + 1, 10**5, 10**5]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    run("list", "models", "cifar_resnet")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        f"cifar_resnet{d}" for d in (20, 32, 44, 56, 110)
    ]
    for kind, name in (
        ("denoisers", "median"),
        ("datasets", "cifar10"),
        ("bounds", "clopper-pearson"),
        ("sources", "onnx"),
    ):
        run("list", kind)
        assert name in capsys.readouterr().out
    run("list", "denoisers")
    lines = capsys.readouterr().out.splitlines()
    assert all(line[max(map(len, (row.split()[0] for row in lines)))] == " " for line in lines), "columns are aligned"
    run("list", "nothing", code=2)
    assert "expected one of models, datasets" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    run("doctor", "--json")
    report = json.loads(capsys.readouterr().out)
    assert len(report["checks"]) == 4
    assert all(report["checks"].values())
    assert "does not answer" in report["hub"]
    assert report["versions"]["torch"]
    with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
        assert set(report["extras"]) == set(tomllib.load(file)["project"]["optional-dependencies"])


def test_doctor_notices_a_missing_package() -> None:
    assert _installed("google.cloud.nothing") is _installed("nothing.at.all") is False
    assert _installed("importlib.util") is True


def test_doctor_notices_wrong_mathematics(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("certify.smoothing.bounds.clopper_pearson_lower", lambda k, n, alpha: k / n)
    run("doctor", code=1)
    assert "FAIL" in capsys.readouterr().out


def test_help_texts_of_all_options_have_the_same_form() -> None:
    """A sentence with a capital and a full stop; a default that is shown is shown by click or as (default: ...)."""
    for name, verb in group.commands.items():
        assert (verb.short_help or verb.help or "").strip().split("\n")[0].endswith((".", "...")), name
        for option in verb.params:
            if isinstance(option, click.Option) and option.name != "help":
                text = option.help or ""
                assert text.endswith("."), (name, option.opts, text)
                first = text.split()[0].rstrip(":")
                known = first in ("CSV", "NAME:KEY=VALUE:...,") or first[0].isupper()
                assert known, (name, option.opts, text)
                assert not isinstance(option.show_default, str), (name, option.opts)
