"""Write the results of an audit, run file and ``audit.json``, from its answers alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from certify.blackbox.answer_rows import clean_answer, rows_of
from certify.blackbox.determinism import drifts, fixed, probes
from certify.blackbox.label_index import LabelIndex, class_of
from certify.blackbox.query_votes import stage_of
from certify.blackbox.types import Answer
from certify.errors import RunFault, UserError
from certify.runs.files import replacing
from certify.runs.records import ImageRow, RunHeader
from certify.runs.run_file import now, write_run
from certify.runs.schema import AMOUNT, COUNT, OBJECT, TEXT, Record, fault, parse_object, record

RUN, ABOUT, LEDGER = "run.jsonl", "audit.json", "ledger.jsonl"
"""Files in an audit's folder, beside the pictures and the report."""

RUNNING, FINISHED, SPENT, STOPPED = "running", "finished", "budget spent", "stopped"
"""Status of an audit: running (or killed), or how it ended."""

_IMAGE = record(
    "an object with an id",
    {"id": TEXT},
    {
        **dict.fromkeys(("image", "error", "given", "reference", "failure"), TEXT.or_null()),
        "pictures": TEXT,
        "values": COUNT.or_null(),
    },
)
_ABOUT = {
    **dict.fromkeys(("created", "finished", "status", "reason", "command", "replay"), TEXT.or_null()),
    **dict.fromkeys(("endpoint", "protocol", "denoiser", "labels"), TEXT.or_null()),
    **dict.fromkeys(("versions", "settings"), OBJECT),
    "class_map": TEXT.by_name().or_null(),
    "pipeline": OBJECT.list(),
    "vocabulary": TEXT.list(),
    "images": _IMAGE.list(),
    "plan": record(
        "an object",
        {},
        {
            **dict.fromkeys(("radius_cap", "price_per_1000", "cost", "rate"), AMOUNT.or_null()),
            **dict.fromkeys(("budget", "most", "images"), COUNT),
        },
    ),
}
"""Keys of ``audit.json`` that are read; each may be missing."""


def read_about(folder: Path) -> dict[str, Any]:
    """Read the ``audit.json`` of an audit's folder.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / ABOUT
    try:
        about = parse_object(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected the folder of `certify audit`") from None
    wrong = "no JSON object" if about is None else fault(about, _ABOUT)
    if about is None or wrong:
        raise UserError(f"{path} is damaged: {wrong}; put back a copy of it, or run the audit's command again")
    return Record(about, str(path))


def conclude(
    folder: Path,
    header: RunHeader,
    about: Mapping[str, Any],
    answers: Mapping[str, Answer],
    *,
    status: str,
    reason: str = "",
    sent: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Write run file and ``audit.json`` from the answers, and return the latter.

    Args:
        folder: of the audit.
        header: of the run file.
        about: of :func:`~certify.blackbox.plan.prepare`.
        answers: by name.
        status: how the audit ended.
        reason: why, if there is more to say.
        sent: requests and queries that were sent, those without an answer yet included; None counts the answers.

    Raises:
        RunFault: they cannot be written.
    """
    index = LabelIndex(about["class_map"])
    rows = rows_of(header, about["images"], answers, index)
    write_rows(folder, header, rows)
    price = about["plan"]["price_per_1000"]
    probed, drifted = probes(answers, about["class_map"]), drifts(answers, about["class_map"])
    attempts, queries = sent or (sum(answer.attempts for answer in answers.values()), len(answers))
    concluded = {
        **about,
        "finished": now(),
        "status": status,
        "reason": reason,
        "vocabulary": index.names,
        "images": [{**image, **_reference(image, answers, about["class_map"])} for image in about["images"]],
        "fixed_function": fixed(probed, drifted),
        "determinism": [dataclasses.asdict(one) for one in probed],
        "drift": [dataclasses.asdict(one) for one in drifted],
        "asked": {
            "requests": attempts,
            "queries": dict(Counter(stage_of(name) for name in answers)),
            "retries": attempts - queries,
            "failures": dict(Counter(answer.failure for answer in answers.values() if not answer.ranked)),
            "cost": None if price is None else attempts * price / 1000,
            "seconds": _quantiles([answer.seconds for answer in answers.values() if answer.ranked]),
        },
    }
    write_about(folder, concluded)
    return concluded


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return quantiles of the response times."""
    if not seconds:
        return {}
    return {name: float(np.quantile(seconds, q)) for name, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))}


def _reference(
    image: Mapping[str, Any], answers: Mapping[str, Answer], class_map: Mapping[str, str] | None
) -> dict[str, Any]:
    clean = clean_answer(answers, image["id"])
    if clean is None:
        return {"reference": image["given"], "answer": [], "failure": "not asked"}
    ranked = [[one.label, one.score] for one in clean.ranked]
    return {
        "reference": image["given"] or class_of(clean.ranked, class_map),
        "answer": ranked,
        "failure": clean.failure,
    }


def write_rows(folder: Path, header: RunHeader, rows: Sequence[ImageRow]) -> None:
    """Write the run file, replacing an earlier one.

    Raises:
        RunFault: it cannot be written.
    """
    with writing(folder / RUN) as path:
        write_run(path, header, rows)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Make the folder of a file that the block writes; an error such as a full disk is a ``RunFault``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        raise RunFault(f"could not write {path}: {error.strerror}; all answers so far are kept in the ledger") from None


def write_about(folder: Path, about: Mapping[str, Any]) -> None:
    """Write ``audit.json`` atomically, replacing an earlier one.

    Raises:
        RunFault: it cannot be written.
    """
    with writing(folder / ABOUT) as path, replacing(path, sync=True, private=True) as beside:
        beside.write_text(json.dumps(about, indent=1, allow_nan=False) + "\n", encoding="utf-8")
