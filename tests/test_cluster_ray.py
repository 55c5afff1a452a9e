"""The same run over Ray, two raylets on this machine: equal records, whoever is killed; what does not fit is refused.

Every Ray process costs seconds, so all of this is slow. A cluster that does not come up is tried again (by
``two_raylets.py``); a run on it is never repeated to make it pass.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import rows_without_seconds, run
from servers import wait_for

from certify.runs.identity import identity
from certify.runs.run_file import peek_header

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
MODEL = '''
import os, pathlib, signal, time

import torch

HERE = pathlib.Path(__file__).parent
ON_A_WORKER = "RAY_RAYLET_PID" in os.environ or "RAY_JOB_ID" in os.environ
weight = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


def pause():
    time.sleep(0.02)


class Net(torch.nn.Module):
    """Four random directions; slow, so that it can be killed in the middle."""
    input_size, num_classes = (1, 8, 8), 4

    def __init__(self, slant=0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(weight + slant)

    def forward(self, images):
        pause()
        return images.flatten(1) @ self.weight


def slow():
    return Net()


class Once(Net):
    """Kills its process in the first forward pass on a real image, one process in all."""

    def forward(self, images):
        if ON_A_WORKER and len(images) > 8 and not (HERE / "killed").exists():
            (HERE / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


def once():
    return Once()


class Poisoned(Net):
    """Does not survive the brightest image."""

    def forward(self, images):
        if ON_A_WORKER and len(images) > 8 and (images.flatten(1).mean(1) > 0.9).any():
            with (HERE / "poison").open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images)


def poisoned():
    return Poisoned()


def other():
    return Net(0.5 if ON_A_WORKER else 0.0)
'''
SETTINGS = ["--data", "d.npz", "--sigma", "0.5", "--n", "400", "--batch-size", "40", "--quiet"]
PLAIN = ["--precision", "float32", "--compile", "off"]


class Raylets:
    """The cluster in its process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.address, _, self.client_port = process.stdout.readline().strip().partition(" ")

    def do(self, command: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline().strip() == "done"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, twelve images of which one is much brighter, and the run of a single process."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "nets.py").write_text(MODEL)
    images = np.random.default_rng(0).integers(0, 200, (12, 8, 8), dtype=np.uint8)
    images[7] = 255
    np.savez(folder / "d.npz", x=images, y=np.arange(12) % 4)
    for kind in ("slow", "once", "poisoned"):
        alone(folder, kind, f"{kind}-alone")
    alone(folder, "slow", "few-alone", "--radius", "0.2")
    alone(folder, "slow", "long-alone", "--n", "4000")
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    """Two raylets with one processor each, ended with their whole process group whatever happens."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "two_raylets.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env=environment(),
    )
    watchdog = threading.Timer(1500, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        raylets = Raylets(process)
        assert raylets.address, "the cluster did not come up"
        yield raylets
    finally:
        watchdog.cancel()
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", **more}


def alone(folder: Path, model: str, out: str, *more: str) -> None:
    """The same by a single process, this one."""
    path = sys.path.copy()
    try:
        with contextlib.chdir(folder):
            run("--model", f"nets:{model}", *SETTINGS, *PLAIN, *more, "--out", f"{out}.jsonl")
    finally:
        sys.path[:] = path


def start(folder: Path, model: str, out: str, *more: str, cluster: Raylets | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "certify", "--model", f"nets:{model}", *SETTINGS, *PLAIN, *more]
    env = environment()
    if cluster is not None:
        command += ["--cluster", "auto"]
        env["RAY_ADDRESS"] = cluster.address
    return subprocess.Popen(
        [*command, "--out", f"{out}.jsonl"],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """Its stdout and stderr."""
    try:
        found, said = process.communicate(timeout=500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, said
    return found, said


def certify(folder: Path, model: str, out: str, *more: str, cluster: Raylets | None = None, code: int = 0) -> str:
    return finish(start(folder, model, out, *more, cluster=cluster), code)[1]


def records(path: Path, without: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in rows_without_seconds(path) if row["id"] not in without}


def wait_for_lines(path: Path, process: subprocess.Popen[str], lines: int) -> None:
    def there() -> bool:
        assert process.poll() is None, process.communicate()[1]
        return path.exists() and path.read_bytes().count(b"\n") > lines

    wait_for(there, 300)


def same_run(folder: Path, one: str, other: str) -> None:
    assert records(folder / f"{one}.jsonl") == records(folder / f"{other}.jsonl")
    headers = [peek_header(folder / f"{name}.jsonl") for name in (one, other)]
    assert identity(headers[0] or {}) == identity(headers[1] or {})


def test_the_records_of_two_raylets_are_those_of_a_single_process(folder: Path, cluster: Raylets) -> None:
    said = certify(folder, "slow", "two", cluster=cluster)
    same_run(folder, "two", "slow-alone")
    assert "warning" not in said
    header = peek_header(folder / "two.jsonl")
    assert header is not None
    assert header["machine"]["workers"] == 2
    before = (folder / "two.jsonl").read_bytes()
    alone(folder, "slow", "two")  # a single process finds nothing left to do
    assert (folder / "two.jsonl").read_bytes() == before
    certify(folder, "slow", "few", "--radius", "0.2", cluster=cluster)
    same_run(folder, "few", "few-alone")


def test_a_killed_worker_is_replaced_and_nothing_is_lost(folder: Path, cluster: Raylets) -> None:
    found, said = finish(start(folder, "once", "killed-worker", "--json", cluster=cluster))
    assert json.loads(found)["images"] == 12  # one object, whatever Ray has to say
    assert (folder / "killed").exists()
    assert "failed" in said
    assert "another one takes its place" in said
    same_run(folder, "killed-worker", "once-alone")


def test_an_image_that_kills_its_worker_is_named_and_set_aside(folder: Path, cluster: Raylets) -> None:
    said = certify(folder, "poisoned", "poison", cluster=cluster)
    assert "image 7 is set aside: its worker failed 3 times on it alone" in said
    found = records(folder / "poison.jsonl")
    assert found["7"]["error"].startswith("is set aside")
    assert (found["7"]["prediction"], found["7"]["trials"]) == (-1, 0)
    del found["7"]
    assert found == records(folder / "poisoned-alone.jsonl", without=("7",))
    assert 3 <= (folder / "poison").stat().st_size <= 5  # also without noise, and once beside others


def test_a_run_whose_driver_was_killed_resumes(folder: Path, cluster: Raylets) -> None:
    process = start(folder, "slow", "killed-driver", "--n", "4000", cluster=cluster)
    wait_for_lines(folder / "killed-driver.jsonl", process, 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = records(folder / "killed-driver.jsonl")
    assert 3 <= len(kept) < 12
    certify(folder, "slow", "killed-driver", "--n", "4000", cluster=cluster)
    same_run(folder, "killed-driver", "long-alone")
    assert kept.items() <= records(folder / "killed-driver.jsonl").items()


def test_a_client_of_the_cluster(folder: Path, cluster: Raylets) -> None:
    """The driver outside the cluster, by ``ray://``."""
    where = f"ray://127.0.0.1:{cluster.client_port}"
    said = certify(folder, "slow", "client", "--cluster", where)
    same_run(folder, "client", "slow-alone")
    assert "warning" not in said


def test_other_weights_are_refused_and_named(folder: Path, cluster: Raylets) -> None:
    said = certify(folder, "other", "other", cluster=cluster, code=2)
    assert "has other weights of classifier nets:other (" in said
    assert "than this driver (" in said
    assert not (folder / "other.jsonl").exists()


def test_a_lost_node_and_one_with_other_code(folder: Path, cluster: Raylets, tmp_path: Path) -> None:
    """One raylet is killed while it works: the other one finishes. Then one comes whose package is another version."""
    process = start(folder, "slow", "lost-node", "--n", "4000", cluster=cluster)
    wait_for_lines(folder / "lost-node.jsonl", process, 2)
    cluster.do("remove")
    finish(process)
    assert len(records(folder / "lost-node.jsonl")) == 12
    same_run(folder, "lost-node", "long-alone")
    for package in ("certify", "denoisers"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.safetensors"))
    with (tmp_path / "certify" / "votes.py").open("a") as file:
        file.write("# another version\n")
    cluster.do(f"add {tmp_path}")
    said = certify(folder, "slow", "other-code", cluster=cluster, code=2)
    assert "install the same version on every machine" in said
    assert not (folder / "other-code.jsonl").exists()


def test_a_cluster_on_this_machine(folder: Path) -> None:
    """``--cluster local:2``, guarded by a token that reaches no file; nothing of it is left afterwards."""
    home = folder / "home"
    home.mkdir()
    command = [sys.executable, "-m", "certify", "--model", "nets:slow", *SETTINGS, *PLAIN, "--cluster", "local:2"]
    env = {k: v for k, v in environment(HOME=str(home)).items() if k not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    ended = subprocess.run(
        [*command, "--out", "local.jsonl"], cwd=folder, env=env, capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 0, ended.stderr
    same_run(folder, "local", "slow-alone")
    assert not (home / ".ray" / "auth_token").exists()


def test_addresses_without_a_cluster(folder: Path) -> None:
    """Nothing there, and something else there: one line each, within bounds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for where, words in ((f"ray://127.0.0.1:{server.getsockname()[1]}", "ray://127.0.0.1"), ("auto", "auto")):
            begun = time.monotonic()
            command = [sys.executable, "-m", "certify", "--model", "nets:slow", *SETTINGS, "--cluster", where]
            ended = subprocess.run(
                command,
                cwd=folder,
                env=environment(RAY_ADDRESS="127.0.0.1:9"),
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert ended.returncode == 1, ended.stderr
            assert ended.stderr.splitlines()[-1].startswith(f"certify: --cluster {words}")
            assert time.monotonic() - begun < 240


def test_a_random_classifier_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not taken for another model on the workers, whose answers differ from the driver's."""
    out = tmp_path / "r.jsonl"
    options = f"--num-classes 10 --data digits --max 4 --sigma 0.25 --n 100 --cluster local:2 --out {out}".split()
    run("--model", "offenders:coin_labels", *options, code=2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("certify: the base classifier offenders:coin_labels answers differently "), last
    assert list(tmp_path.iterdir()) == []
