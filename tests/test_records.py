"""The run file: what is fixed in it, that it proves its own certificates, and that a kill loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import rows_without_seconds, run
from PIL import Image
from servers import wait_for

from certify import Votes, certificate_from_votes, read_run
from certify.errors import UserError
from certify.runs.identity import identity
from certify.runs.records import ImageRow, RunHeader
from certify.runs.run_file import RunFile
from certify.smoothing.noise import NOISES

COMMAND = ["--model", "digits", "--sigma", "0.25", "--n", "2000", "--max", "6", "--quiet"]
CIRCUMSTANCES = ("created", "command", "batch_size", "execution")


def without_times(path: Path) -> list[dict[str, Any]]:
    header = read_run(path).header
    return [{k: v for k, v in header.items() if k not in CIRCUMSTANCES}, *rows_without_seconds(path)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "whole.jsonl"
    run(*COMMAND, "--out", str(path))
    return path


def test_keys_that_others_rely_on(finished: Path) -> None:
    found = read_run(finished, allow_partial=False)
    fixed = "type schema model data denoiser noise sigma n0 n alpha bound seed precision device expected".split()
    assert set(fixed) <= found.header.keys()
    assert found.header["type"] == "run"
    assert (found.header["model"], found.header["sigma"], found.header["n"]) == ("digits", 0.25, 2000)
    assert found.header["expected"] == len(found.images) == 6
    for row in found.images:
        assert not ImageRow.fault(row)
        assert row["type"] == "image"
        assert sum(row["votes"].values()) + row["failures"] == row["trials"] == 2000
        assert sum(row["selection"].values()) == 100
        assert all(k > 0 for k in row["votes"].values())


def test_the_record_proves_its_own_certificates(finished: Path) -> None:
    """Prediction, bound and radius follow from the counts alone, without a model."""
    found = read_run(finished)
    noise = NOISES.get(found.header["noise"])(found.header["sigma"])
    for row in found.images:
        again = certificate_from_votes(
            Votes.from_dict(row["selection"], row["selection_failures"]),
            Votes.from_dict(row["votes"], row["failures"]),
            noise=noise,
            alpha=found.header["alpha"],
            bound=found.header["bound"],
        )
        assert (again.prediction, again.radius, again.p_lower) == (row["prediction"], row["radius"], row["p_lower"])


def test_the_same_command_again_changes_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = finished.read_bytes()
    run(*COMMAND, "--out", str(finished), "--json")
    assert finished.read_bytes() == before
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 6
    assert result["samples"] == 6 * 2100
    assert result["run"] == str(finished)


@pytest.mark.parametrize("batch_size", ["1000", "170"])
def test_batch_size_changes_nothing(batch_size: str, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run(*COMMAND, "--out", str(path), "--batch-size", batch_size)
    assert without_times(path) == without_times(finished)


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_a_torn_last_line_is_done_again(cut: int, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(finished.read_bytes()[:-cut])
    assert read_run(path, allow_partial=True).torn
    assert read_run(path, allow_partial=True).partial
    run(*COMMAND, "--out", str(path))
    assert without_times(path) == without_times(finished)


def test_a_torn_header_starts_again(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(finished.read_bytes()[:100])
    run(*COMMAND, "--out", str(path))
    assert without_times(path) == without_times(finished)


@pytest.mark.slow
def test_kill_and_resume_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    """SIGKILL at several moments; at most the image in work is lost, and the end result is the same."""
    settings = [*COMMAND, "--n", "40000", "--out"]
    command = [sys.executable, "-m", "certify", "--batch-size", "20", *settings]  # slowly: it must not end by itself
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    for _ in range(2):
        process = subprocess.Popen([*command, str(killed)], stderr=subprocess.PIPE, text=True, start_new_session=True)
        _wait_for_images(killed, _images(killed) + 2, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert read_run(killed, allow_partial=True).partial
    for path in (killed, whole):
        run(*settings, str(path))
    assert without_times(killed) == without_times(whole)


def _images(path: Path) -> int:
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def _wait_for_images(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    def there() -> bool:
        assert process.poll() is None, process.communicate()[1]
        return _images(path) >= count

    wait_for(there, 300)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_says_how_to_go_on(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    path = tmp_path / "r.jsonl"
    command = [sys.executable, "-m", "certify", *COMMAND, "--n", "500000", "--precision", "float32", "--compile", "off"]
    command += ["--out", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    _wait_for_images(path, 1, process)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    (line,) = err.strip().splitlines()
    assert line.startswith("certify: stopped: ")
    assert line.endswith("re-run the command to resume")


@pytest.mark.parametrize(("option", "value"), [("--n", "3000"), ("--seed", "1"), ("--sigma", "0.5"), ("--max", "5")])
def test_a_run_of_other_settings_is_left_alone(
    option: str, value: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = finished.read_bytes()
    run(*COMMAND, option, value, "--out", str(finished), code=2)
    assert "holds a run with other settings" in capsys.readouterr().err
    assert finished.read_bytes() == before


def test_file_names_that_are_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    for name in (b"\xff\xfe.png", "σ ü.png".encode()):
        Path("d", os.fsdecode(name)).write_bytes(b"")
        Image.new("L", (8, 8), 9).save(Path("d", os.fsdecode(name)))
    command = ["--model", "digits", "--data", "d", "--sigma", "0.25", "--n", "50", "--out", "r.jsonl"]
    run(*command)
    run(*command)
    assert [row["id"] for row in read_run("r.jsonl").images] == ["σ ü.png", "\udcff\udcfe.png"]


def test_strict_also_minds_what_an_earlier_run_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    Image.new("L", (8, 8), 9).save("d/a.png")
    Path("d/b.png").write_bytes(b"no image")
    command = ["--model", "digits", "--data", "d", "--sigma", "0.25", "--n", "50", "--quiet", "--out", "r.jsonl"]
    run(*command)
    run(*command, "--strict", code=2)


@pytest.mark.parametrize("form", ["npz", "folder", "zip"])
def test_changed_images_are_not_taken_for_the_old_ones(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same names, same sizes, other pixels: the finished run must not be shown as theirs."""

    def write(value: int) -> Path:
        if form == "npz":
            np.savez(tmp_path / "d.npz", x=np.full((2, 8, 8), value, np.uint8), y=np.array([1, 2]))
            return tmp_path / "d.npz"
        (tmp_path / "d").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / "d" / "a.bmp")
        if form == "folder":
            return tmp_path / "d"
        with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
            archive.write(tmp_path / "d" / "a.bmp", "a.bmp")
        return tmp_path / "d.zip"

    out = tmp_path / "r.jsonl"
    command = ["--model", "digits", "--sigma", "0.25", "--n", "100", "--quiet", "--out", str(out)]
    run(*command, "--data", str(write(100)))
    run(*command, "--data", str(write(100)))
    before = out.read_bytes()
    run(*command, "--data", str(write(200)), code=2)
    assert "images.sha256" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    header = RunHeader.from_json({"schema": 1, "expected": 2})
    with RunFile(tmp_path / "r.jsonl", header), pytest.raises(UserError, match="another process"):
        RunFile(tmp_path / "r.jsonl", header)


def test_identity_ignores_names_and_circumstances() -> None:
    a = {"type": "run", "n": 5, "data": "here", "created": "now", "pipeline": [{"sha256": "x"}]}
    b = {"type": "run", "n": 5, "data": "there", "created": "then", "pipeline": [{"sha256": "x"}]}
    assert identity(a) == identity(b) == {"type": "run", "n": 5, "pipeline[0].sha256": "x"}
    assert identity(a) != identity({**b, "pipeline": [{"sha256": "y"}]})


def test_damage_is_named(finished: Path, tmp_path: Path) -> None:
    lines = finished.read_bytes().split(b"\n")
    path = tmp_path / "r.jsonl"
    for content, text in (
        (b"\n".join([*lines[:2], lines[2][:50], *lines[3:]]), "damaged at line 3"),
        (b"\n".join([*lines[:3], lines[2], *lines[4:]]), "twice"),
        (b"\n".join(lines[1:]), "no header"),
        (lines[0].replace(b'"schema": 1', b'"schema": 9') + b"\n", "newer version"),
        (b"\n".join([lines[0], lines[1].replace(b'"radius": ', b'"radius": NaN, "x": ')]) + b"\n", "damaged at line 2"),
        (b"\n".join([lines[0], lines[1].replace(b'"radius": ', b'"radius": -1, "x": ')]) + b"\n", "damaged at line 2"),
        (b"", "no header"),
        (b"hello\n", "not a run file"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=text):
            read_run(path)
    path.write_bytes(b"\n".join(lines[:3]) + b"\n")
    with pytest.raises(UserError, match="unfinished: 2 of 6"):
        read_run(path, allow_partial=False)


def test_nan_classifier_abstains_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nan_model.py").write_text(
        "import torch\ndef nan(images): return torch.full((len(images), 10), torch.nan)\n"
        "nan.num_classes = 10\nnan.input_size = (1, 8, 8)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    run("--model", "nan_model:nan", "--data", "digits", "--sigma", "0.25", "--n", "100", "--max", "3")
    err = capsys.readouterr().err
    assert "every sample failed" in err
    assert "near chance" not in err  # three images are too few to say
    (path,) = (tmp_path / "runs").glob("*.jsonl")
    found = read_run(path)
    again = [
        certificate_from_votes(
            Votes.from_dict(row["selection"], row["selection_failures"]),
            Votes.from_dict(row["votes"], row["failures"]),
            noise=NOISES.get("gaussian")(0.25),
            alpha=0.001,
        )
        for row in found.images
    ]
    assert all(c.abstained and c.radius == 0 for c in again)
    for row in found.images:
        assert (row["prediction"], row["votes"], row["failures"], row["trials"]) == (-1, {}, 100, 100)


def test_a_record_has_attributes_and_keys_and_keeps_what_it_does_not_know() -> None:
    content = {"type": "run", "expected": 2, "sigma": 0.5, "stopping": {"rule": "betting"}, "later": [1, 2]}
    header = RunHeader.from_json(content, "r.jsonl, line 1,")
    assert (header.sigma, header["sigma"], header.get("alpha"), "n" in header) == (0.5, 0.5, None, False)
    assert header.to_json() == content
    assert header.replace(sigma=0.25).to_json() == {**content, "sigma": 0.25}
    assert (header.norm, header.kind, header.denoiser) == ("l2", "certify", None)  # as files without these keys mean
    for missing in (lambda: header.alpha, lambda: header["alpha"]):
        with pytest.raises(UserError, match=r"^r\.jsonl, line 1, has no 'alpha', which is needed here"):
            missing()
    assert header.radii == ()
    with pytest.raises(TypeError, match="has no colour"):
        header.replace(colour="red")
    assert not hasattr(header, "colour")
