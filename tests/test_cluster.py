"""A run on many workers: which worker gets which image, and its answers. With Ray: ``test_cluster_ray.py``."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command import run
from small_networks import PLAIN

from certify import SmoothedClassifier, load_images
from certify.cluster.connect import Address, Slot, _connect, cluster_slots, local_slots, require_ray
from certify.cluster.driver import TRIES, WorkerPool, describe_end, group_size
from certify.cluster.worker import (
    Line,
    Plan,
    Unfit,
    Worker,
    WorkerEngine,
    WorkerSpec,
    WorkItem,
    code_identity,
    other_code,
    other_weights,
)
from certify.errors import RunFault, UserError
from certify.models.classifier import Classifier
from certify.runs.config import Circumstances, Settings
from certify.runs.records import ImageRow
from certify.runs.runner import Task, answered
from certify.smoothing.procedures import Certify, Decide, Measure, Predict

# Which worker gets which image


ROW = ImageRow.unusable(Certify(), "x", None, "not read")


class Died(Exception):
    """In place of Ray's error."""


class ScriptedRay:
    """Ray's calls on workers that die by chance, or on certain images: a call is run when its result is fetched."""

    exceptions = SimpleNamespace(RayError=Died)

    def __init__(self, chance: random.Random, poison: set[int], risk: float) -> None:
        self.chance, self.poison, self.risk = chance, poison, risk
        self.deaths_alone: Counter[int] = Counter()
        self.largest = 0

    def remote(self, cls: type) -> Any:
        def create(spec: Any) -> Any:
            return SimpleNamespace(start=self._method(self._start), answer=self._method(self._answer))

        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=create))

    def _method(self, function: Callable[..., Any]) -> Any:
        call = SimpleNamespace(remote=lambda *arguments: functools.partial(function, *arguments))
        return SimpleNamespace(options=lambda max_task_retries: call)

    def _start(self) -> tuple[str, dict[str, Any]]:
        if self.chance.random() < self.risk:
            raise Died("at the start")
        return "worker", {}

    def _answer(self, items: Sequence[WorkItem], settings: Any, plan: Any) -> list[Line]:
        places = [item.place for item in items]
        self.largest = max(self.largest, len(places))
        if self.poison & set(places) or self.chance.random() < self.risk:
            self.deaths_alone.update(places if len(places) == 1 else ())
            raise Died("at work")
        return [(place, ROW) for place in places]

    def wait(self, calls: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        assert calls
        return [self.chance.choice(calls)], []

    def get(self, call: Any) -> Any:
        return call()

    def kill(self, actor: Any, no_restart: bool) -> None:
        pass


def test_every_image_is_answered_once_whoever_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers die at random, a few images kill whoever has them: those are set aside, all others are answered once."""
    for seed in range(200):
        chance = random.Random(seed)
        images, workers, most = chance.randint(1, 60), chance.randint(1, 8), chance.randint(1, 9)
        poison = {place for place in range(images) if chance.random() < 0.05}
        ray = ScriptedRay(chance, poison, risk=0.02)
        monkeypatch.setitem(sys.modules, "ray", ray)
        spec = WorkerSpec(lambda: None, "", {}, [])  # type: ignore[arg-type,return-value]
        pool = WorkerPool([Slot(None, 1, 0.0, 1)] * workers, spec, lambda warning: None)
        answers: Counter[int] = Counter()
        aside: set[int] = set()
        for place, line in pool.answers(range(images), lambda k: WorkItem(k, str(k), None, b""), None, most=most):  # type: ignore[arg-type]
            if isinstance(line, str):
                assert line.startswith("is set aside: its worker failed 3 times on it alone (")
                aside.add(place)
            else:
                answers[place] += 1
        assert set(answers) | aside == set(range(images))
        assert set(answers.values()) <= {1}
        assert poison <= aside
        assert not set(answers) & aside
        assert all(ray.deaths_alone[place] == TRIES for place in aside)
        assert ray.largest <= most


def test_workers_that_finish_nothing_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ScriptedRay(random.Random(0), set(), risk=1.0))
    spec = WorkerSpec(lambda: None, "", {}, [])  # type: ignore[arg-type,return-value]
    pool = WorkerPool([Slot(None, 1, 0.0, 1)] * 2, spec, lambda warning: None)
    with pytest.raises(RunFault, match=r"12 workers failed one after the other and finished no image; .*at the start"):
        list(pool.answers([0], lambda k: WorkItem(k, "", None, b""), None, most=1))  # type: ignore[arg-type]


def test_none_waits_beside_an_idle_worker_at_the_end() -> None:
    """With costs unlike each other, workers end within one image of each other, whatever a worker may get at once."""
    costs, workers = np.random.default_rng(0).uniform(0.2, 1.8, 400).tolist(), 8
    free, done = [0.0] * workers, 0
    while done < len(costs):
        k = free.index(min(free))
        size = group_size(len(costs) - done, workers, 20)
        free[k] += sum(costs[done : done + size])
        done += size
    assert max(free) <= sum(costs) / workers + max(costs)


# Addresses and devices


@pytest.mark.parametrize(
    "text", ["", "local:0", "local:x", "localhost", "ray://", "ray://host", "ray://:1", "ray://h:0"]
)
def test_invalid_addresses(text: str) -> None:
    with pytest.raises(UserError, match=r"expected local, local:K .* auto .* or ray://HOST:PORT"):
        Address.parse(text)


def test_addresses() -> None:
    found = [Address.parse(text) for text in ("local", "local:3", "auto", "ray://head:10001", "ray://[::1]:10001")]
    assert [(a.where, a.workers) for a in found[:3]] == [("local", None), ("local", 3), ("auto", None)]
    assert [a.where for a in found[3:]] == ["ray://head:10001", "ray://[::1]:10001"]


def test_one_worker_per_device() -> None:
    gpus = [{"NodeID": "a", "Resources": {"CPU": 16.0, "GPU": 2.0}}, {"NodeID": "b", "Resources": {"CPU": 8.0}}]
    assert [(s.node, s.gpus) for s in cluster_slots(gpus, "auto")] == [("a", 1.0), ("a", 1.0)]
    assert cluster_slots(gpus, "cpu") == [Slot("a", 16, 0.0, 16), Slot("b", 8, 0.0, 8)]
    head = {"NodeID": "h", "Resources": {"memory": 1.0}}
    assert cluster_slots([head, gpus[1]], "auto") == [Slot("b", 8, 0.0, 8)]
    assert local_slots(3, 0, 8) == [Slot(None, 1, 0.0, 2)] * 3
    assert [s.gpus for s in local_slots(3, 2, 8)] == [0.5] * 3  # Ray fits two of them on one device


def test_no_ray_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run("--model", "digits", "--sigma", "1", "--cluster", "local", code=2)
    assert "pip install 'certify-toolkit[cluster]'" in capsys.readouterr().err


def test_an_address_that_does_not_answer() -> None:
    start = time.monotonic()
    with pytest.raises(RunFault, match=r"ray://127\.0\.0\.1:9 does not answer"):
        require_ray(Address.parse("ray://127.0.0.1:9"))
    assert time.monotonic() - start < 20  # Ray's own client tries for 35 s


@pytest.mark.parametrize(("failures", "error"), [(2, ""), (3, "ray://h:1: Initialization failure from server: busy$")])
def test_a_busy_cluster_is_tried_three_times(failures: int, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers, but cannot start its side of the connection in the time that Ray gives it."""
    attempts = []

    def init(**options: Any) -> None:
        attempts.append(options["address"])
        if len(attempts) <= failures:
            raise ConnectionAbortedError("Initialization failure from server:\nbusy\nTraceback ...")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init, shutdown=lambda: None))
    with pytest.raises(RunFault, match=error) if error else contextlib.nullcontext():
        _connect("ray://h:1", {})
    assert len(attempts) == 3


# What has to fit


def test_other_code_and_other_weights_are_named_on_both_sides() -> None:
    mine = code_identity()
    assert mine == code_identity()
    assert other_code(mine, mine, "w") == ""
    refused = other_code(mine, {"certify": "9.9", "code": "0" * 12}, "the worker on h")
    for word in ("the worker on h runs certify-toolkit 9.9", "000000000000", mine["certify"], mine["code"]):
        assert word in refused
    steps = [{"step": "classifier", "name": "net", "sha256": "a" * 64, "mean": [0.5]}]
    assert other_weights(steps, [dict(steps[0])], "w") == ""
    refused = other_weights(steps, [steps[0] | {"sha256": "b" * 64, "mean": [0.4]}], "the worker on h")
    assert (
        "the worker on h has other weights of classifier net (bbbbbbbbbbbbbbbb) than this driver (aaaaaaaa" in refused
    )
    assert "other mean of classifier net ([0.4])" in other_weights(steps, [steps[0] | {"mean": [0.4]}], "w")
    assert "a pipeline of 2 steps, this driver one of 1" in other_weights(steps, steps * 2, "w")


def test_the_end_of_a_worker_is_one_line() -> None:
    assert describe_end(RuntimeError("x"), UserError("no such file")) == "no such file"
    assert describe_end(RuntimeError("x"), ZeroDivisionError("by zero")) == "ZeroDivisionError: by zero"
    report = "The actor died.\n  pid: 1\nWorker exit type: SYSTEM_ERROR detail. Some common causes include: (1) memory"
    assert describe_end(RuntimeError(report), None) == "Worker exit type: SYSTEM_ERROR detail."
    assert describe_end(RuntimeError(""), None) == "RuntimeError"


# What a worker answers


SETTINGS = {
    "certify": Settings(Certify(n0=20, n=300)),
    "decide": Settings(Decide((0.1, 0.25), n=2000)),
    "measure": Settings(Measure(0.3, n=2000)),
    "predict": Settings(Predict(n=300)),
}


def spec_of(build: Callable[[], Any], steps: Sequence[Mapping[str, Any]]) -> WorkerSpec:
    return WorkerSpec(build, os.getcwd(), code_identity(), steps)


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_worker_writes_the_lines_of_a_single_machine(kind: str, digits: Classifier) -> None:
    settings, images = SETTINGS[kind], load_images("digits", digits, skip=50)
    bad = WorkItem(10, "unreadable", None, None, "is empty")

    def lines(found: Iterable[Line]) -> dict[int, dict[str, Any]]:
        return {place: {k: v for k, v in line.items() if k != "seconds"} for place, line in found}

    tasks = [
        Task(k, images.items[k].id, images.labels[k], functools.partial(images.load, k)) for k in range(len(images))
    ]
    smoothed = SmoothedClassifier(digits, 0.25)
    alone = lines(answered(smoothed, tasks, settings))
    load = functools.partial(SmoothedClassifier, digits, 0.25)
    worker = Worker(spec_of(functools.partial(WorkerEngine, load), smoothed.base.record()))
    _, facts = worker.start()
    assert facts.device == "cpu"
    example = images.load(0).numpy()
    execution = worker.prepare(example, 1000, None)
    assert execution.plain
    plan = Plan(execution, example, facts)
    assert worker.ask("measure_rate", plan, example) > 0
    assert worker.ask("base_labels", plan, [example]) == [alone[0]["base"]]
    items = [WorkItem(t.place, t.id, t.label, np.asarray(images.items[t.place].read())) for t in tasks]
    for item in items:
        assert isinstance(item.raw, np.ndarray)
        item.raw.setflags(write=False)  # as what comes out of Ray's store
    found = lines(worker.answer([items[0], bad, *items[1:]], settings, plan))
    assert found.pop(10)["error"] == "is empty"
    assert found == alone
    restarted = Worker(worker._spec)  # by Ray: it builds and prepares what it needs
    assert lines(restarted.answer(items[:2], settings, plan)) == {place: alone[place] for place in (0, 1)}
    assert lines(restarted.answer([bad], settings, plan))[10]["error"] == "is empty"
    with pytest.raises(Unfit, match=r"^torch 0\.9 there, 2\.\d+ on the others$|^torch .* there, 0\.9 on the others$"):
        restarted.answer(items[:1], settings, replace(plan, facts=replace(facts, torch="0.9")))


class Failing:
    """An engine that fails with this error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def describe(self) -> list[dict[str, Any]]:
        return []

    def facts(self) -> Circumstances:
        return Circumstances("cpu", None, "2", {}, {})

    def prepare(self, image: Any, samples: int, execution: Any) -> Any:
        return execution

    def answer(self, items: Iterable[WorkItem], settings: Any) -> list[Line]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (UserError("labels outside 0 to 9"), UserError, "^labels outside 0 to 9$"),
        (ZeroDivisionError("by zero"), RunFault, "^ZeroDivisionError: by zero$"),
    ],
)
def test_errors_at_work_travel(error: Exception, kind: type[Exception], words: str) -> None:
    worker = Worker(spec_of(functools.partial(Failing, error), []))
    plan = Plan(PLAIN, np.zeros(1), worker.start()[1])
    with pytest.raises(kind, match=words):
        worker.answer([], SETTINGS["certify"], plan)


def test_what_does_not_fit_is_refused_by_the_worker() -> None:
    """The user's mistakes are errors; a machine that cannot build the pipeline or run as planned is left out."""
    engine = functools.partial(Failing, ZeroDivisionError())
    with pytest.raises(UserError, match="install the same version on every machine"):
        Worker(replace(spec_of(engine, []), code={"certify": "9.9", "code": "0"})).start()
    with pytest.raises(UserError, match="has a pipeline of 0 steps, this driver one of 1"):
        Worker(spec_of(engine, [{"step": "classifier"}])).start()

    def missing() -> Any:
        raise UserError("no such file: net.pt")

    with pytest.raises(Unfit, match=r"no such file: net\.pt"):
        Worker(spec_of(missing, [])).start()

    class Eager(Failing):
        def prepare(self, image: Any, samples: int, execution: Any) -> Any:
            return replace(execution, compiled=False, why=("no compiler",))

    worker = Worker(spec_of(functools.partial(Eager, ZeroDivisionError()), []))
    plan = Plan(replace(PLAIN, compiled=True), np.zeros(1), worker.start()[1])
    with pytest.raises(Unfit, match=r"it can only run as float32, eager, batches of 50 \(no compiler\)"):
        worker.answer([], SETTINGS["certify"], plan)
