"""A new question about an image is one class and one line in the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from certify import SmoothedClassifier, UserError, Votes, load_classifier, load_images, read_run
from certify.runs.config import Settings, run_header
from certify.runs.recompute import recompute
from certify.runs.run_file import RunFile
from certify.runs.runner import process
from certify.smoothing.procedures import (
    ESTIMATION,
    PROCEDURES,
    Accuracy,
    AnswerKeys,
    Certify,
    Decide,
    Measure,
    Predict,
    Procedure,
    ProcedureSettings,
    RecordedVotes,
    Sequential,
    answer_keys,
    procedure_of,
    stage_tests,
)
from certify.smoothing.procedures.base import Prospects
from certify.types import Prediction, Radii


@dataclass(frozen=True)
class Unanimous:
    """The class of all n samples, or an abstention."""

    n: int

    kind: ClassVar[str] = "unanimous"
    sequential: ClassVar[bool] = False
    radii: ClassVar[tuple[float, ...]] = ()
    alpha: ClassVar[float] = 0.5
    bound: ClassVar[str] = "none"
    stopping: ClassVar[None] = None

    @property
    def stages(self) -> dict[str, int]:
        return {ESTIMATION: self.n}

    def answer(self, results: Mapping[str, Any], noise: Radii, uniform: float = 1.0) -> Prediction:
        votes: Votes = results[ESTIMATION]
        return Prediction(votes.leader if votes.of(votes.leader) == self.n else -1, 1.0, votes)

    def recompute(self, votes: RecordedVotes, noise: Radii) -> Prediction:
        return self.answer({ESTIMATION: votes.estimation}, noise)

    def record(self, answer: Any) -> AnswerKeys:
        keys: Any = answer_keys(answer.prediction, None, None, answer.votes)
        return {**keys, "dissenters": self.n - max(answer.votes.counts)}  # type: ignore[return-value]

    def describe(self) -> str:
        return "all alike"

    def prospects(self, noise: Radii) -> Prospects:
        return Prospects()

    def changed(self, alpha: float, bound: str, path: object) -> Unanimous:
        return self


def test_a_new_procedure_needs_no_change_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is run, written with its own keys, read and recomputed."""
    monkeypatch.setitem(PROCEDURES._entries, "unanimous", (lambda settings: Unanimous(settings.n), ""))
    digits = load_classifier("digits")
    images = load_images("digits", digits, max_images=3)
    g, settings = SmoothedClassifier(digits, 0.25), Settings(Unanimous(50))
    with RunFile(tmp_path / "r.jsonl", run_header(g, images, settings, model="digits", data="digits")) as file:
        process(g, images, settings, file)
    run = read_run(tmp_path / "r.jsonl")
    assert run.header.procedure == Unanimous(50)
    for row in run.images:
        assert (row.prediction >= 0) == (row["dissenters"] == 0)
        assert row["dissenters"] == 50 - max(row.votes.values())
    assert recompute(run)[1] == run.images


@pytest.mark.parametrize(
    "procedure",
    [
        Certify(10, 100, 0.01, "best"),
        Measure(0.2, 300, 0.01),
        Decide((0.1, 0.2), 500, 0.01, "betting"),
        Predict(40, 0.01),
        Accuracy(2, 0.01),
        Accuracy(1, 0.3, population=True),
    ],
    ids=lambda procedure: type(procedure).__name__,
)
def test_a_procedure_follows_from_its_settings(procedure: Procedure) -> None:
    n0 = procedure.stages.get("selection", 0)
    settings = ProcedureSettings(procedure.kind, n0, procedure.n, procedure.alpha, procedure.bound, procedure.stopping)
    assert procedure_of(settings) == procedure
    assert isinstance(procedure, Sequential) == procedure.sequential
    with pytest.raises(UserError, match="unknown procedure 'x'; expected one of certify, decide, predict, accuracy"):
        procedure_of(ProcedureSettings("x", 0, 1, 0.5, "", None))


def test_every_stage_has_a_test() -> None:
    from certify import Gaussian

    for procedure in (Certify(10, 100), Accuracy(), Predict(40), Decide((0.1,)), Measure(0.5)):
        tests = stage_tests(procedure, 3, Gaussian(0.25), 16)
        assert tests.keys() == procedure.stages.keys()
        assert all(test.pending > 0 for test in tests.values())
