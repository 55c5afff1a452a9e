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
from certify.blackbox.query_votes import CLEAN, ESTIMATION, SELECTION, query_name, votes_of
from certify.blackbox.types import Answer
from certify.engine.adaptive import Deciding, Measuring, Watch
from certify.runs.image_rows import certified_row, decided_row, noise_of, unusable_row
from certify.smoothing.certificates import certificate_from_votes
from certify.smoothing.rng import bound_draw
from certify.types import Decision, Radii


def watch_for(header: Mapping[str, Any], noise: Radii) -> Watch:
    """When an image of this run has been asked about enough, where images stop by themselves."""
    stopping, n, alpha = header["stopping"], header["n"], header["alpha"]
    if stopping["tolerance"] is not None:
        return Measuring(1, n=n, tolerance=stopping["tolerance"], noise=noise, alpha=alpha)
    return Deciding(1, n=n, radii=stopping["radii"], noise=noise, alpha=alpha, rule=stopping["rule"])


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
    name, given, procedure = image["id"], image.get("given"), header["procedure"]
    if image.get("error"):
        return {"id": name, "label": None, **unusable_row(procedure, image["error"]), "seconds": 0.0}
    clean = clean_answer(answers, name)
    if clean is None:
        return None
    base = vocabulary.vote(clean.ranked)
    if given is None and base < 0:
        why = clean.failure or "no label of the class map is in it"
        row = unusable_row(procedure, f"the service's own answer gives no reference label: {why}")
        return {"id": name, "label": None, **row, "seconds": clean.seconds}
    label = base if given is None else vocabulary.number(given)
    noise, used = noise_of(header, image["values"]), [clean]
    find = _adaptive if header["stopping"] else _fixed
    row, labels = find(header, name, answers, vocabulary, noise, used)
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
        "image": image["image"],
        "values": image["values"],
        "queries": len(used),
        "seconds": round(sum(answer.seconds for answer in used), 6),
    }


Found = tuple[dict[str, Any], list[int]]
"""The keys of a line, none where there is nothing to say, and the labels of the estimation stage."""


def _fixed(
    header: Mapping[str, Any],
    name: str,
    answers: Mapping[str, Answer],
    vocabulary: Vocabulary,
    noise: Radii,
    used: list[Answer],
) -> Found:
    """From as many samples as the run's numbers say, or nothing."""
    there = {
        stage: list(itertools.islice(numbered(answers, name, stage), n))
        for stage, n in ((SELECTION, header["n0"]), (ESTIMATION, header["n"]))
    }
    if len(there[SELECTION]) < header["n0"] or len(there[ESTIMATION]) < header["n"]:
        return {}, []
    labels = {stage: [vocabulary.vote(answer.ranked) for answer in found] for stage, found in there.items()}
    used += [*there[SELECTION], *there[ESTIMATION]]
    uniform = bound_draw(header["seed"], name)
    certificate = certificate_from_votes(
        votes_of(labels[SELECTION]),
        votes_of(labels[ESTIMATION]),
        noise=noise,
        alpha=header["alpha"],
        bound=header["bound"],
        uniform=uniform,
    )
    return certified_row(certificate) | {"uniform": uniform}, labels[ESTIMATION]


def _adaptive(
    header: Mapping[str, Any],
    name: str,
    answers: Mapping[str, Answer],
    vocabulary: Vocabulary,
    noise: Radii,
    used: list[Answer],
) -> Found:
    """From as many samples as it takes, or as there are."""
    watch, coming, labels = watch_for(header, noise), numbered(answers, name, ESTIMATION), list[int]()
    while watch.want and (piece := list(itertools.islice(coming, watch.want))):
        used += piece
        labels += [vocabulary.vote(answer.ranked) for answer in piece]
        watch.add(np.array(labels[-len(piece) :], dtype=np.int64))
    if not watch.drawn:
        return {}, []
    result = watch.result()
    row = decided_row(result) if isinstance(result, Decision) else certified_row(result)
    return row | {"drawn": watch.drawn} | ({"unfinished": True} if watch.want else {}), labels
