"""Answers -> lines of the run file, and nothing else: what an audit concludes, and what a replay finds again.

An audit only chooses what to ask. Its certificates are made here, from the answers by name and the settings in the run
file's header: no data, no model, no transport.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from certify.blackbox.label_index import OUTSIDE, Vocabulary
from certify.blackbox.query_votes import CLEAN, query_name, votes_of
from certify.blackbox.types import Answer
from certify.runs.image_rows import answer_row, noise_of, unusable_row
from certify.smoothing.procedures import ESTIMATION, Procedure, procedure_of
from certify.smoothing.rng import bound_draw
from certify.types import Radii


def numbered(answers: Mapping[str, Answer], image: str, stage: str) -> Iterator[Answer]:
    """The answers of one image and stage, from number 0 up to the first that is not there."""
    for number in itertools.count():
        found = answers.get(query_name(image, stage, number))
        if found is None:
            return
        yield found


def clean_answer(answers: Mapping[str, Answer], image: str) -> Answer | None:
    """The service's own answer: the first with a label, else the last; None if it was not asked for.

    It votes for nothing, so one that failed may be asked for again when an audit goes on.
    """
    last = None
    for last in numbered(answers, image, CLEAN):
        if last.ranked:
            break
    return last


def rows_of(
    header: Mapping[str, Any],
    images: Sequence[Mapping[str, Any]],
    answers: Mapping[str, Answer],
    vocabulary: Vocabulary,
) -> list[dict[str, Any]]:
    """The lines of the run file that the answers prove, in the order of the images.

    An image that stopped before it was settled has a line if its rule holds whenever one stops (it is marked
    ``unfinished``, and is undecided, or certified as far as its votes go), and none at a fixed n.

    Args:
        header: of the run.
        images: for each ``id``, ``values`` and ``image`` (number and hash of its pixels), ``given`` (its label, where
            labels are given) and ``error`` (why it cannot be used).
        answers: by name.
        vocabulary: numbers the classes, in the order of these lines.
    """
    lines = (_line(header, image, answers, vocabulary) for image in images)
    return [{"type": "image", **line} for line in lines if line is not None]


def _line(
    header: Mapping[str, Any], image: Mapping[str, Any], answers: Mapping[str, Answer], vocabulary: Vocabulary
) -> dict[str, Any] | None:
    name, given = image["id"], image.get("given")
    if image.get("error"):
        return {"id": name, "label": None, **unusable_row(header["procedure"], image["error"]), "seconds": 0.0}
    clean = clean_answer(answers, name)
    if clean is None:
        return None
    base = vocabulary.vote(clean.ranked)
    if given is None and base < 0:
        why = clean.failure or "no label of the class map is in it"
        row = unusable_row(header["procedure"], f"the service's own answer gives no reference label: {why}")
        return {"id": name, "label": None, **row, "seconds": clean.seconds}
    label = base if given is None else vocabulary.number(given)
    noise, used, procedure = noise_of(header, image.get("values")), [clean], procedure_of(header)
    find = _sequential if header["stopping"] else _fixed
    row, labels = find(procedure, header["seed"], name, answers, vocabulary, noise, used)
    if not row:
        return None
    numbers = sorted({int(c) for c in (*row["votes"], *row["selection"])} | {c for c in (base, label) if c >= 0})
    names = vocabulary.names
    return {
        "id": name,
        "label": label,
        **row,
        "outside": labels[: row["trials"]].count(OUTSIDE),
        "base": max(base, -1),
        "class": names[row["prediction"]] if row["prediction"] >= 0 else None,
        "base_class": names[base] if base >= 0 else None,
        "classes": {str(c): names[c] for c in numbers},
        "image": image.get("image"),
        "values": image.get("values"),
        "queries": len(used),
        "seconds": round(sum(answer.seconds for answer in used), 6),
    }


Found = tuple[dict[str, Any], list[int]]
"""The keys of a line, none where there is nothing to say, and the labels of the estimation stage."""


def _fixed(
    procedure: Procedure,
    seed: int,
    name: str,
    answers: Mapping[str, Answer],
    vocabulary: Vocabulary,
    noise: Radii,
    used: list[Answer],
) -> Found:
    """Answer from the procedure's fixed number of samples, or not at all."""
    there = {stage: list(itertools.islice(numbered(answers, name, stage), n)) for stage, n in procedure.stages.items()}
    if any(len(there[stage]) < n for stage, n in procedure.stages.items()):
        return {}, []
    labels = {stage: [vocabulary.vote(answer.ranked) for answer in some] for stage, some in there.items()}
    used += itertools.chain.from_iterable(there.values())
    uniform = bound_draw(seed, name)
    answer = procedure.answer({stage: votes_of(some) for stage, some in labels.items()}, noise, uniform)
    return answer_row(answer) | {"uniform": uniform}, labels[ESTIMATION]


def _sequential(
    procedure: Procedure,
    seed: int,
    name: str,
    answers: Mapping[str, Answer],
    vocabulary: Vocabulary,
    noise: Radii,
    used: list[Answer],
) -> Found:
    """Answer from as many samples as the sequential test needs, or as there are."""
    (stage,) = procedure.stages
    test = procedure.tests(1, noise, 0)[stage]
    coming, labels = numbered(answers, name, stage), list[int]()
    while test.pending and (piece := list(itertools.islice(coming, test.pending))):
        used += piece
        labels += [vocabulary.vote(answer.ranked) for answer in piece]
        test.add(np.array(labels[-len(piece) :], dtype=np.int64))
    if not test.drawn:
        return {}, []
    row = answer_row(procedure.answer({stage: test.result()}, noise))
    return row | {"drawn": test.drawn} | ({"unfinished": True} if test.pending else {}), labels
