"""A run on many workers: who gets which image, and what a worker answers. With Ray: ``test_cluster_ray.py``."""

from __future__ import annotations

import functools
import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command import run

from certify import SmoothedClassifier, load_images
from certify.cluster.compatibility import how_it_ended, other_code, other_weights
from certify.cluster.connect import Address, Slot, cluster_slots, local_slots, require_ray
from certify.cluster.scheduler import TRIES, Handing
from certify.cluster.worker import Line, Order, Sent, Worker, code_identity
from certify.cluster.worker_engine import SmoothedStation
from certify.errors import RunFault, UserError
from certify.models.classifier import Classifier
from certify.runs.config import Settings
from certify.runs.runner import Task, answered
from certify.smoothing.procedures import Certify, Decide, Measure, Predict

# Who gets which image


def test_every_image_is_answered_once_whoever_dies() -> None:
    """Workers die at random, a few images kill whoever has them: those are set aside, all others are answered once."""
    for seed in range(200):
        chance = random.Random(seed)
        images, workers, depth = chance.randint(1, 60), chance.randint(1, 8), chance.randint(1, 9)
        poison = {place for place in range(images) if chance.random() < 0.05}
        handing, names = Handing(range(images), depth), list(range(workers))
        answers: Counter[int] = Counter()
        aside: set[int] = set()
        deaths_alone: Counter[int] = Counter()
        while handing.left:
            k = chance.randrange(workers)
            handing.take(names[k], workers)
            held = set(handing.held[names[k]])
            assert len(held) <= depth
            if held & poison or (held and chance.random() < 0.02):
                if len(held) == 1:
                    deaths_alone.update(held)
                aside.update(handing.lost(names[k]))
                names[k] = max(names) + 1
            elif held:
                place = chance.choice(sorted(held))
                assert handing.done(names[k], place)
                answers[place] += 1
        assert set(answers) | aside == set(range(images))
        assert set(answers.values()) <= {1}
        assert not set(answers) & (aside | poison)
        assert all(deaths_alone[place] >= TRIES for place in aside)


def test_an_innocent_image_is_not_blamed_for_what_shares_its_worker() -> None:
    handing = Handing([3, 4, 5, 6], depth=9)
    assert handing.take("a", 1) == [3, 4]  # half of what is left
    handing.take("b", 1)
    assert handing.lost("a") == []
    assert handing.take("c", 1) == [3]
    assert handing.take("c", 1) == []  # alone
    assert handing.done("c", 3)
    for name in "cde":
        assert handing.take(name, 1) == [4]
        assert handing.lost(name) == ([4] if name == "e" else [])
    assert handing.done("a", 3) is False  # an answer of a worker that was given up is nobody's


def test_none_waits_beside_an_idle_worker_at_the_end() -> None:
    """With costs unlike each other, workers end within one image of each other, whatever depth they are given."""
    chance = np.random.default_rng(0)
    costs, workers = chance.uniform(0.2, 1.8, 400), 8
    handing, free, held = Handing(range(400), depth=20), [0.0] * workers, [[] for _ in range(workers)]
    while handing.left:
        k = min(range(workers), key=lambda k: free[k] if held[k] or handing.waiting else np.inf)
        held[k] += handing.take(k, workers)
        place = held[k].pop(0)
        free[k] += costs[place]
        handing.done(k, place)
    assert max(free) <= costs.sum() / workers + costs.max()


# Addresses and devices


@pytest.mark.parametrize(
    "text", ["", "local:0", "local:x", "localhost", "ray://", "ray://host", "ray://:1", "ray://h:0"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"expected local, local:K .* auto .* or ray://HOST:PORT"):
        Address.parse(text)


def test_addresses() -> None:
    found = [Address.parse(text) for text in ("local", "local:3", "auto", "ray://head:10001", "ray://[::1]:10001")]
    assert [(a.where, a.workers) for a in found[:3]] == [("local", None), ("local", 3), ("auto", None)]
    assert [a.where for a in found[3:]] == ["ray://head:10001", "ray://[::1]:10001"]


def test_one_worker_a_device() -> None:
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


def test_how_a_worker_ended_is_one_line() -> None:
    assert how_it_ended(RuntimeError("x"), UserError("no such file")) == "no such file"
    assert how_it_ended(RuntimeError("x"), ZeroDivisionError("by zero")) == "ZeroDivisionError: by zero"
    report = "The actor died.\n  pid: 1\nWorker exit type: SYSTEM_ERROR detail. Some common causes include: (1) memory"
    assert how_it_ended(RuntimeError(report), None) == "Worker exit type: SYSTEM_ERROR detail."
    assert how_it_ended(RuntimeError(""), None) == "RuntimeError"


# What a worker answers


SETTINGS = {
    "certify": Settings(Certify(n0=20, n=300)),
    "decide": Settings(Decide((0.1, 0.25), n=2000)),
    "measure": Settings(Measure(0.3, n=2000)),
    "predict": Settings(Predict(n=300)),
}


def collect(worker: Worker, sent: list[Sent], settings: Any, seconds: float = 60.0) -> list[Line]:
    """Everything the worker answers to these images, given a few at a time."""
    found: list[Line] = []
    queue, end = list(sent), time.monotonic() + seconds
    while len(found) < len(sent):
        assert time.monotonic() < end, "no answer"
        some, queue = queue[:3], queue[3:]
        found += worker.exchange(some, settings, 0.05)
    return found


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_worker_writes_the_lines_of_a_single_machine(kind: str, digits: Classifier) -> None:
    settings, images = SETTINGS[kind], load_images("digits", digits, skip=50)
    bad = Sent(10, "unreadable", None, None, "is empty")

    def lines(found: Iterable[Line]) -> dict[int, dict[str, Any]]:
        return {place: {k: v for k, v in line.items() if k != "seconds"} for place, line in found}

    tasks = [
        Task(k, images.items[k].id, images.labels[k], functools.partial(images.load, k)) for k in range(len(images))
    ]
    alone = lines(answered(SmoothedClassifier(digits, 0.25), tasks, settings))
    worker = Worker()
    steps, facts = worker.build(
        Order(functools.partial(SmoothedStation, functools.partial(SmoothedClassifier, digits, 0.25)), os.getcwd())
    )
    assert facts["device"] == "cpu"
    assert steps[0]["sha256"]
    example = images.load(0).numpy()
    assert worker.ask("prepare", example, 1000, None).plain
    assert worker.ask("measure_rate", example) > 0
    assert worker.ask("base_labels", [example]) == [alone[0]["base"]]
    sent = [Sent(t.place, t.id, t.label, np.asarray(images.items[t.place].read())) for t in tasks]
    for image in sent:
        assert isinstance(image.raw, np.ndarray)
        image.raw.setflags(write=False)  # as what comes out of Ray's store
    found = lines(collect(worker, [sent[0], bad, *sent[1:]], settings))
    assert found.pop(10)["error"] == "is empty"
    assert found == alone
    again = lines(collect(worker, sent[:2], settings))  # after it had nothing to do
    assert again == {place: alone[place] for place in (0, 1)}
    assert lines(collect(worker, [bad], settings))[10]["error"] == "is empty"


class Stubborn:
    """A station that fails as it is told."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def describe(self) -> list[dict[str, Any]]:
        return []

    def facts(self) -> dict[str, Any]:
        return {}

    def answered(self, sent: Iterable[Sent], settings: Any) -> Iterator[Line]:
        for image in sent:
            if image.place == 2:
                raise self.error
            yield image.place, {}


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (UserError("labels outside 0 to 9"), UserError, "^labels outside 0 to 9$"),
        (ZeroDivisionError("by zero"), RunFault, "^ZeroDivisionError: by zero$"),
    ],
)
def test_what_ends_the_work_is_told_after_what_was_done(error: Exception, kind: type[Exception], words: str) -> None:
    worker = Worker()
    worker.build(Order(functools.partial(Stubborn, error), os.getcwd()))
    settings = SimpleNamespace(procedure=Certify())
    found = worker.exchange([Sent(k, str(k), None, b"") for k in range(3)], settings, 5.0)  # type: ignore[arg-type]
    while len(found) < 2:
        found += worker.exchange([], settings, 5.0)  # type: ignore[arg-type]
    for _ in range(2):  # and nothing goes on after that
        with pytest.raises(kind, match=words):
            worker.exchange([], settings, 5.0)  # type: ignore[arg-type]
    assert [place for place, _ in found] == [0, 1]
