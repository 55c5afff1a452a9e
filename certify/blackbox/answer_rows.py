"""Rows of the run file from the answers of a service: the conclusions of an audit, and of its replay.

Certificates are computed here alone, from the answers by name and the settings in the run file's header: no data, no
model, no transport.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from certify.blackbox.label_index import OUTSIDE, LabelIndex
from certify.blackbox.query_votes import CLEAN, query_name, votes_of
from certify.blackbox.types import Answer
from certify.runs.records import ImageRow, RunHeader
from certify.smoothing.procedures import AnswerKeys, Procedure, Sequential
from certify.smoothing.rng import bound_draw
from certify.smoothing.sequential_tests import SequentialTest
from certify.types import ABSTAIN, Radii


def numbered(answers: Mapping[str, Answer], image: str, stage: str) -> Iterator[Answer]:
    """Yield the answers of one image and stage, from number 0 up to the first that is missing."""
    for number in itertools.count():
        answer = answers.get(query_name(image, stage, number))
        if answer is None:
            return
        yield answer


def clean_answer(answers: Mapping[str, Answer], image: str) -> Answer | None:
    """Return the service's answer to the clean image: the first with a label, else the last; None without any.

    It is not a vote, so a failed one may be queried again when an audit is resumed.
    """
    last = None
    for last in numbered(answers, image, CLEAN):
        if last.ranked:
            break
    return last


def rows_of(
    header: RunHeader, images: Sequence[Mapping[str, Any]], answers: Mapping[str, Answer], index: LabelIndex
) -> list[ImageRow]:
    """Return the rows that the answers prove, in the order of the images.

    An image that stopped before it was settled has a row if its stopping rule is anytime-valid (it is marked
    ``unfinished``, and is undecided, or certified as far as its votes go), and none at a fixed n.

    Args:
        header: of the run.
        images: for each ``id``, ``values`` and ``image`` (number and hash of its pixels), ``given`` (its label, where
            labels are given) and ``error`` (why it cannot be used).
        answers: by name.
        index: numbers the classes, in the order of these rows.
    """
    rows = (_row(header, image, answers, index) for image in images)
    return [row for row in rows if row is not None]


def _row(
    header: RunHeader, image: Mapping[str, Any], answers: Mapping[str, Answer], index: LabelIndex
) -> ImageRow | None:
    name, given, procedure = image["id"], image.get("given"), header.procedure
    if image.get("error"):
        return ImageRow.unusable(procedure, name, None, image["error"])
    clean = clean_answer(answers, name)
    if clean is None:
        return None
    base = index.vote(clean.ranked)
    if given is None and base < 0:
        why = clean.failure or "it has no label of the class map"
        reason = f"the service's own answer gives no reference label: {why}"
        return ImageRow.unusable(procedure, name, None, reason, clean.seconds)
    label = base if given is None else index.number(given)
    trials = _Trials(procedure, header.seed, name, answers, index, header.radii_for(image.get("values")))
    test = procedure.test(1, trials.noise) if isinstance(procedure, Sequential) else None
    keys = trials.fixed() if test is None else trials.sequential(test)
    if keys is None:
        return None
    row, names, used = ImageRow.of(name, label, keys), index.names, [clean, *trials.used]
    numbers = sorted({int(c) for c in (*row.votes, *row.selection)} | {c for c in (base, label) if c >= 0})
    return row.replace(
        outside=trials.labels[: row.trials].count(OUTSIDE),
        base=max(base, ABSTAIN),
        class_name=None if row.abstained else names[row.prediction],
        base_class=names[base] if base >= 0 else None,
        classes={str(c): names[c] for c in numbers},
        image=image.get("image"),
        size=image.get("values"),
        queries=len(used),
        seconds=round(sum(answer.seconds for answer in used), 6),
    )


@dataclass
class _Trials:
    """The answers about noisy copies of one image, and the votes that they are.

    Attributes:
        procedure: of the run.
        seed: of the run.
        name: id of the image.
        answers: by name.
        index: numbers the classes.
        noise: states radii in its norm.
        used: the answers that counted, in their order.
        labels: the labels of the last stage.
    """

    procedure: Procedure
    seed: int
    name: str
    answers: Mapping[str, Answer]
    index: LabelIndex
    noise: Radii
    used: list[Answer] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def _take(self, coming: Iterator[Answer], count: int) -> list[int]:
        """Use the next answers, at most so many; return their labels."""
        piece = list(itertools.islice(coming, count))
        self.used += piece
        return [self.index.vote(answer.ranked) for answer in piece]

    def fixed(self) -> AnswerKeys | None:
        """Answer from the procedure's fixed number of samples; None if some are missing."""
        votes = {}
        for stage, n in self.procedure.stages.items():
            self.labels = self._take(numbered(self.answers, self.name, stage), n)
            if len(self.labels) < n:
                return None
            votes[stage] = votes_of(self.labels)
        uniform = bound_draw(self.seed, self.name)
        return self.procedure.record(self.procedure.answer(votes, self.noise, uniform)) | AnswerKeys(uniform=uniform)

    def sequential(self, test: SequentialTest) -> AnswerKeys | None:
        """Answer from as many samples as the sequential test needs, or as there are; None if there are none."""
        (stage,) = self.procedure.stages
        coming = numbered(self.answers, self.name, stage)
        while test.pending and (piece := self._take(coming, test.pending)):
            self.labels += piece
            test.add(np.array(piece, dtype=np.int64))
        if not test.drawn:
            return None
        answer = self.procedure.record(test.result())
        return answer | AnswerKeys(drawn=test.drawn) | (AnswerKeys(unfinished=True) if test.pending else AnswerKeys())
