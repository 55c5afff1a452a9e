"""``certify.certify`` and ``certify.predict``: ordinary objects in, the command's run out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import certify
from certify import SmoothedClassifier, UserError, load_classifier
from certify.errors import CertifyWarning
from certify.runs.run_file import read_run
from tests.command import run as command

EXECUTION = {"precision": "float32", "compile": "off", "batch_size": 500}
IN_WORDS = "--precision float32 --compile off --batch-size 500"
PROVENANCE = {"created", "command", "versions", "machine"}


class Halfspaces(nn.Module):
    """Three classes by the mean: below 0.4, up to 0.6, above."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([0.4 - mean, 0.1 - (mean - 0.5).abs(), mean - 0.6], dim=1)


LEVELS = (0.3, 0.5, 0.7, 0.9)
IMAGES = torch.stack([torch.full((3, 6, 6), level) for level in LEVELS])
LABELS = [0, 1, 2, 2]


class Pairs(Dataset[Any]):
    """A map-style data set."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index >= len(IMAGES):
            raise IndexError
        return IMAGES[index], LABELS[index]


def pictures() -> list[tuple[Any, int]]:
    eight_bits = (IMAGES * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [(Image.fromarray(array), label) for array, label in zip(eight_bits, LABELS, strict=True)]


SOURCES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "tensor": lambda: (IMAGES, torch.tensor(LABELS)),
    "array": lambda: (IMAGES.numpy(), np.array(LABELS)),
    "channels last": lambda: (IMAGES.permute(0, 2, 3, 1).numpy(), LABELS),
    "list": lambda: (list(IMAGES), LABELS),
    "dataset": lambda: (Pairs(), None),
    "tensor dataset": lambda: (TensorDataset(IMAGES, torch.tensor(LABELS)), None),
    "loader": lambda: (DataLoader(Pairs(), batch_size=3), None),
    "loader of images": lambda: (DataLoader(list(IMAGES), batch_size=3), LABELS),  # type: ignore[arg-type]
}


@pytest.fixture(scope="module")
def expected() -> list[tuple[int, float]]:
    g = SmoothedClassifier(Halfspaces(), sigma=0.25, **EXECUTION)  # type: ignore[arg-type]
    return [(c.prediction, c.radius) for c in g.certify(list(IMAGES), n=300, image_id=list("0123"))]


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_images_gives_the_same_certificates(source: str, expected: list[tuple[int, float]]) -> None:
    images, labels = SOURCES[source]()
    run = certify.certify(Halfspaces(), images, labels, sigma=0.25, n=300, **EXECUTION)
    assert [(row.prediction, row.radius) for row in run] == expected
    assert [row.label for row in run] == LABELS


def test_pictures_and_data_sets_without_labels() -> None:
    run = certify.certify(Halfspaces(), pictures(), sigma=0.25, n=300)
    assert [row.label for row in run] == LABELS
    assert run.certified_accuracy(0) == 1
    without = certify.certify(Halfspaces(), [picture for picture, _ in pictures()], sigma=0.25, n=300)
    assert [row.label for row in without] == [None] * 4
    assert [row.radius for row in without] == [row.radius for row in run]


def test_the_radius_is_the_true_one() -> None:
    """Class 2 begins at a mean of 0.6: from 0.7 the plane is 0.1 * sqrt(108) away."""
    run = certify.certify(Halfspaces(), IMAGES[2], [2], sigma=0.25, n=10_000)
    assert 0.7 * 0.1 * 108**0.5 < run[0].radius <= 0.1 * 108**0.5


QUESTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "certify": ("--n 300", {"n": 300}),
    "bound": ("--n 300 --bound best --alpha 0.01 --seed 3", {"n": 300, "bound": "best", "alpha": 0.01, "seed": 3}),
    "decide": ("--radius 0.2,0.4", {"radius": (0.2, 0.4)}),
    "tolerance": ("--tolerance 0.3 --n 2000", {"tolerance": 0.3, "n": 2000}),
    "denoiser": ("--n 100 --denoiser median", {"n": 100, "denoiser": "median"}),
    "norm": ("--n 100 --noise laplace --norm linf", {"n": 100, "noise": "laplace", "norm": "linf"}),
    "shard": ("--n 100 --shard 2/3", {"n": 100, "shard": "2/3"}),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_python_and_the_command_write_the_same_run(question: str, tmp_path: Path) -> None:
    words, options = QUESTIONS[question]
    theirs, ours = tmp_path / "command.jsonl", tmp_path / "python.jsonl"
    line = f"--model digits --data digits --skip 60 --max 4 --sigma 0.25 --quiet {IN_WORDS} {words}"
    command(*line.split(), "--out", str(theirs))
    run = certify.certify(
        "digits", "digits", skip=60, max_images=4, sigma=0.25, out=ours, progress=False, **EXECUTION, **options
    )
    compare(theirs, ours)
    written = sorted(read_run(ours).images, key=lambda row: int(row.id))
    assert [row.to_json() for row in run] == [row.to_json() for row in written]  # in the order of the images


def test_merged_and_recomputed_shards_are_those_of_the_command(tmp_path: Path) -> None:
    line = f"--model digits --data digits --skip 60 --max 4 --sigma 0.25 --n 100 --quiet {IN_WORDS}"
    theirs = [str(tmp_path / f"command{i}.jsonl") for i in (1, 2)]
    ours = []
    for i, path in enumerate(theirs, 1):
        command(*line.split(), "--shard", f"{i}/2", "--out", path)
        options: Any = {"skip": 60, "max_images": 4, "shard": f"{i}/2", "progress": False, **EXECUTION}
        ours.append(certify.certify("digits", "digits", sigma=0.25, n=100, out=f"{tmp_path}/{i}.jsonl", **options))
    command("merge", *theirs, "-o", str(tmp_path / "merged.jsonl"))
    ours[0].merge(ours[1], out=tmp_path / "ours.jsonl")
    compare(tmp_path / "merged.jsonl", tmp_path / "ours.jsonl")
    command("recompute", f"{tmp_path}/merged.jsonl", "--alpha", "0.01", "--out", f"{tmp_path}/again.jsonl")
    certify.read_run(tmp_path / "ours.jsonl").recompute(alpha=0.01, out=tmp_path / "ours_again.jsonl")
    compare(tmp_path / "again.jsonl", tmp_path / "ours_again.jsonl")


ON_A_CLUSTER = """
import sys
import certify, torch

class Bright(torch.nn.Module):
    def forward(self, x):
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)

verb, out = sys.argv[1:]
function = getattr(certify, verb)
options = {"precision": "float32", "compile": "off", "batch_size": 500, "progress": False, "sigma": 0.25, "n": 100}
function("digits", "digits", skip=60, max_images=4, out=out, cluster="local:2", **options)
images = torch.stack([torch.full((3, 6, 6), level) for level in (0.3, 0.5, 0.7, 0.9)])
alone, sent = (function(Bright(), images, [0, 1, 1, 1], cluster=c, **options) for c in (None, "local:2"))
assert [row.replace(seconds=0.0) for row in sent] == [row.replace(seconds=0.0) for row in alone]
"""


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["certify", "predict"])
def test_python_and_the_command_write_the_same_run_on_a_cluster(verb: str, tmp_path: Path) -> None:
    """By name, as from the command; an object of a script is sent to the workers."""
    pytest.importorskip("ray")
    theirs, ours = tmp_path / "command.jsonl", tmp_path / "python.jsonl"
    line = f"--model digits --data digits --skip 60 --max 4 --sigma 0.25 --n 100 --quiet {IN_WORDS} --cluster local:2"
    words = ["-m", "certify", "run" if verb == "certify" else verb, *line.split(), "--out", str(theirs)]
    for arguments in (words, ["-c", ON_A_CLUSTER, verb, str(ours)]):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    for path in (theirs, ours):  # in the order in which the workers finish them
        header, *rows = path.read_text().splitlines()
        path.write_text("\n".join([header, *sorted(rows, key=lambda row: int(json.loads(row)["id"]))]))
    compare(theirs, ours)


def test_predict_and_the_command_write_the_same_run(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "command.jsonl", tmp_path / "python.jsonl"
    line = f"predict --model digits --data digits --skip 60 --max 4 --sigma 0.25 --n 100 --quiet {IN_WORDS}"
    command(*line.split(), "--out", str(theirs))
    run = certify.predict("digits", "digits", skip=60, max_images=4, sigma=0.25, n=100, out=ours, **EXECUTION)
    compare(theirs, ours)
    assert [row.radius for row in run] == [None] * 4


def compare(theirs: Path, ours: Path) -> None:
    """Every key of header and rows, where and when it ran apart."""
    for left, right in zip(theirs.read_text().splitlines(), ours.read_text().splitlines(), strict=True):
        first, second = json.loads(left), json.loads(right)
        for key in (PROVENANCE if first["type"] == "run" else {"seconds"}) & first.keys():
            first[key] = second[key]
        for content in (first, second):  # of the files that a file was made of
            again = content.get("recomputed", {})
            for part in (*content.get("merged", ()), again, again.get("from", {})):
                for key in {"run", "sha256", *PROVENANCE} & part.keys():
                    del part[key]
        assert first == second


def test_a_call_resumes_its_file_and_refuses_another(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    whole = certify.certify(Halfspaces(), IMAGES, LABELS, sigma=0.25, n=100, out=path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    again = certify.certify(Halfspaces(), IMAGES, LABELS, sigma=0.25, n=100, out=path)
    assert [row.radius for row in again] == [row.radius for row in whole]
    with pytest.raises(UserError, match=r"\bn\b.*100.*200"):
        certify.certify(Halfspaces(), IMAGES, LABELS, sigma=0.25, n=200, out=path)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((IMAGES, LABELS[:3]), {}, "3 labels for 4 images"),
        ((IMAGES, [0, 1, 2, 3]), {}, r"label 3 of image 3: expected 0 to 2"),
        ((IMAGES, [0, 1, 2, -1]), {}, r"label -1 of image 3: expected 0 to 2"),
        ((IMAGES, [0.5, 1, 2, 2]), {}, "labels are not whole numbers"),
        ((IMAGES[0, 0],), {}, r"images of shape \(6, 6\)"),
        ((IMAGES[:0],), {}, "no images in this Tensor"),
        ((3,), {}, "images of type int"),
        ((IMAGES * 9 - 3,), {}, "none of the 4 images can be used; the first, 0: image with values from -0.3"),
        ((IMAGES,), {"ids": ["a"]}, "1 ids for 4 images"),
        ((IMAGES,), {"class_map": "x.csv"}, "class_map with images of type Tensor"),
        ((IMAGES,), {"ids": 5}, r"ids = 5: expected a list of ids"),
        ((IMAGES,), {"radius": 0.1, "tolerance": 0.1}, "radius and tolerance: .* expected one"),
        ((IMAGES,), {"radius": 0.1, "bound": "best"}, "bound best with radius: .* leave bound out"),
        ((IMAGES,), {"radius": 0.1, "n0": 5}, "n0 with radius: no selection samples"),
        ((IMAGES,), {"radius": -1}, "radius=-1: expected numbers from 0"),
        ((IMAGES,), {"rule": "betting"}, "rule betting without radius"),
        ((IMAGES,), {"skip": 0}, "skip = 0: expected a whole number from 1"),
        ((IMAGES,), {"skip": -1}, "skip = -1: expected a whole number from 1"),
        ((IMAGES,), {"start": -1}, "start = -1: expected a whole number from 0"),
        ((IMAGES,), {"max_images": -1}, "max_images = -1: expected a whole number from 1"),
        ((IMAGES,), {"shard": 1}, "shard=1: expected i/n, such as 1/8"),
        ((IMAGES,), {"shard": "3/2"}, "shard=3/2: expected i/n with i from 1 to n"),
        ((IMAGES,), {"cluster": 2}, "cluster='2': expected local"),
        ((IMAGES,), {"cluster": "local:2", "device": "cuda:1"}, "device cuda:1 with cluster"),
        ((IMAGES,), {"input_size": (1, 8)}, r"input_size = \(1, 8\): expected channels, height and width"),
        ((IMAGES,), {"input_size": "3x6x6"}, "input_size = '3x6x6': expected channels, height and width"),
        ((IMAGES,), {"out": "foo.csv"}, "out foo.csv: expected a file ending in .jsonl"),
        (("digits", [1, 2, 3]), {}, "labels of type list with images 'digits'"),
        (("digits",), {"skip": 0, "input_size": (1, 8, 8)}, "skip = 0: expected a whole number from 1"),
        (("digits",), {"ids": "1297", "input_size": (1, 8, 8)}, "ids = '1297': expected a list of ids"),
        ((IMAGES,), {"batchsize": 3}, "unknown option 'batchsize'; nearest: batch_size"),
        ((IMAGES,), {"sigma": None}, "give either sigma"),
        ((IMAGES,), {"device": "cuda:9"}, "device 'cuda:9' does not exist on this machine"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        certify.certify(Halfspaces(), *arguments, **{"sigma": 0.25, "n": 50, **options})


def test_no_message_in_python_names_an_option_of_the_command() -> None:
    with pytest.raises(UserError) as error:
        SmoothedClassifier("cifar_resnet20", sigma=0.25)
    assert str(error.value).endswith("pass a checkpoint: weights=FILE")
    with pytest.raises(UserError, match="unknown option 'denoisr'; nearest: denoiser"):
        SmoothedClassifier("digits", sigma=0.25, denoisr="median")  # type: ignore[call-arg]


def noise_of_nan(x: torch.Tensor) -> torch.Tensor:
    """Scores of Halfspaces, NaN above a mean of 0.8."""
    scores: torch.Tensor = Halfspaces()(x)
    return scores.masked_fill(x.mean(dim=(1, 2, 3), keepdim=True)[:, :, 0, 0] > 0.8, float("nan"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 64}, r"sigma = 64 is very large for images in \[0, 1\]; did you mean sigma=0.251"),
        ({"n": 5}, r"n = 5 .* pass n="),
        ({"labels": [0] * 20}, "all 20 images are of class 0: is the data sorted"),
        ({"labels": [1, 0] * 10}, "without noise the classifier is right on 0 of 20 images, which is near chance"),
        ({"model": noise_of_nan}, r"[\d,]+ of [\d,]+ samples failed \(NaN"),
        ({"bad": 1}, "1 image could not be used and is left out; the first, 3: image with values from 2.7"),
    ],
)
def test_python_warns_of_what_the_command_warns_of(options: dict[str, Any], message: str) -> None:
    given = {"model": Halfspaces(), "sigma": 0.25, "n": 50, "labels": None, **options}
    images = IMAGES if given["labels"] is None else IMAGES[2:3].expand(20, -1, -1, -1)
    images = list(images[:-1]) + [images[-1] * 3] * given.pop("bad", 0) if "bad" in given else images
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        certify.certify(given.pop("model"), images, given.pop("labels"), **given)
    own = [str(warning.message) for warning in caught if warning.category is CertifyWarning]
    assert any(re.search(message, text) for text in own), own


def test_a_smoothed_classifier_has_its_own_options() -> None:
    g = SmoothedClassifier(load_classifier(Halfspaces(), input_size=(3, 6, 6)), sigma=0.25)
    assert len(certify.certify(g, IMAGES, n=50)) == 4
    assert len(certify.certify(SmoothedClassifier(Halfspaces(), sigma=0.25), IMAGES, n=50)) == 4
    for options in ({"sigma": 0.25}, {"denoiser": "median"}, {"num_classes": 3}):
        with pytest.raises(UserError, match=f"{next(iter(options))} with a SmoothedClassifier"):
            certify.certify(g, IMAGES, n=50, **options)


def test_an_unusable_image_is_recorded() -> None:
    images = list(IMAGES)
    images[1] = images[1] * 3
    with pytest.warns(CertifyWarning, match=r"^1 image could not be used and is left out; the first, 1: image with"):
        run = certify.certify(Halfspaces(), images, LABELS, sigma=0.25, n=50)
    assert "4 images; 1 image could not be used and is left out; certified accuracy" in repr(run)
    assert run.table([0]).endswith("\n\n1 image could not be used and is left out")
    assert run[1].error is not None
    assert "expected [0, 1]" in run[1].error
    assert [row.error for row in run.usable] == [None] * 3
    with pytest.raises(UserError, match="expected \\[0, 1\\]"):
        certify.certify(Halfspaces(), images, LABELS, sigma=0.25, n=50, strict=True)


@pytest.fixture(scope="module")
def finished() -> certify.Run:
    return certify.certify(Halfspaces(), IMAGES, LABELS, sigma=0.25, n=300, ids=list("abcd"))


def test_rows_of_a_run(finished: certify.Run) -> None:
    assert [row.id for row in finished] == list("abcd")
    assert finished["c"] == finished[2]
    assert [row.id for row in finished[1:3]] == ["b", "c"]
    assert len(finished) == 4
    with pytest.raises(KeyError):
        _ = finished["e"]
    assert "c" in finished
    assert finished[2] in finished
    assert "e" not in finished


def test_questions_that_a_run_cannot_answer(finished: certify.Run) -> None:
    predictions = certify.predict(Halfspaces(), IMAGES, LABELS, sigma=0.25, n=50)
    for ask in (lambda: predictions.certified_accuracy(), lambda: predictions.table(), lambda: predictions.plot()):
        with pytest.raises(UserError, match="holds predictions, which have no radius"):
            ask()
    with pytest.raises(UserError, match="holds predictions, which have no radius"):
        finished.plot(None, predictions)
    for radii in (0.5, [], [-1], "0,1", ["a"], [float("nan")]):
        with pytest.raises(UserError, match=r"radi(us|i) = .*: expected"):
            finished.table(radii)  # type: ignore[arg-type]


def test_the_table_is_the_one_of_the_command(
    finished: certify.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.jsonl"
    saved = finished.save(path)
    assert [row.to_json() for row in saved] == [row.to_json() for row in finished]
    capsys.readouterr()
    command("table", str(path), "--radii", "0,0.25,0.5", "--intervals", "--format", "markdown")
    assert str(finished.table([0, 0.25, 0.5], style="markdown")) in capsys.readouterr().out
    assert [line.split()[0] for line in finished.table([0, 0.25]).splitlines()[2:]] == ["0", "0.25"]
    assert finished.table([0, 0.25], style="csv").count("\n") == 2
    with pytest.raises(UserError, match="is there already"):
        finished.save(path)


def test_what_a_notebook_shows(finished: certify.Run) -> None:
    radius = min(row.radius for row in finished if row.radius)
    assert finished.certified_accuracy(radius) == 1
    assert repr(finished).startswith("<Run: Halfspaces, sigma = 0.25, 4 images; certified accuracy 1.000 at 0, ")
    assert "certified accuracy" in finished._repr_html_()
    assert finished.table([0])._repr_html_().startswith("<pre>")


@pytest.mark.usefixtures("users_resolution")
def test_a_curve_of_several_runs(finished: certify.Run, tmp_path: Path) -> None:
    other = certify.certify(Halfspaces(), IMAGES, LABELS, sigma=0.5, n=300)
    plot = finished.plot(tmp_path / "curves.png", other, title="halfspaces")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 500
    assert [line.get_label() for line in plot.figure.axes[0].lines] == ["Halfspaces, σ = 0.25", "Halfspaces, σ = 0.5"]
    assert plot._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot write a picture"):
        finished.plot(tmp_path / "curves.gif")


def test_a_data_frame(finished: certify.Run) -> None:
    pandas = pytest.importorskip("pandas")
    frame = finished.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.index) == list("abcd")
    assert frame["radius"].tolist() == [row.radius for row in finished]


def test_another_alpha_from_the_same_votes(finished: certify.Run, tmp_path: Path) -> None:
    looser = finished.recompute(alpha=0.05)
    exact = SmoothedClassifier(Halfspaces(), sigma=0.25).certify(list(IMAGES), n=300, alpha=0.05, image_id=list("abcd"))
    assert [row.radius for row in looser] == [c.radius for c in exact]
    finished.save(tmp_path / "run.jsonl")
    command("recompute", str(tmp_path / "run.jsonl"), "--alpha", "0.05", "--out", str(tmp_path / "command.jsonl"))
    assert [row.radius for row in certify.read_run(tmp_path / "command.jsonl")] == [row.radius for row in looser]


def test_shards_merge_to_the_whole(finished: certify.Run) -> None:
    shards = [
        certify.certify(Halfspaces(), IMAGES, LABELS, sigma=0.25, n=300, ids=list("abcd"), shard=f"{i}/3")
        for i in (3, 1, 2)
    ]
    whole = shards[0].merge(*shards[1:])
    assert [(row.id, row.radius, row.votes) for row in whole] == [(row.id, row.radius, row.votes) for row in finished]
    with pytest.raises(UserError, match="shard"):
        shards[0].merge(shards[1])


def test_a_run_in_memory_does_not_depend_on_files(
    finished: certify.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record of origin is the hash of what ``save`` writes, whatever lies in the folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / finished.path.name).write_text("another run")
    assert finished.origin["sha256"] == finished.save(tmp_path / "saved.jsonl").origin["sha256"]
