"""The records in an audit's folder: ``audit.json``, the run file, and the names of the files.

``audit.json`` contains what the run file does not: the service, the plan, the images with the answers for their clean
copies, the determinism checks, and the cost. Each key is spelled only here; older files may lack any of them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from certify.errors import RunFault, UserError
from certify.runs.files import replacing
from certify.runs.records import ImageRow, RunHeader
from certify.runs.run_file import write_run
from certify.runs.schema import (
    AMOUNT,
    COUNT,
    FLAG,
    NUMBER,
    OBJECT,
    REQUIRED,
    TEXT,
    Absent,
    JsonRecord,
    Key,
    Kind,
    object_of,
    parse_object,
)

RUN, ABOUT, LEDGER = "run.jsonl", "audit.json", "ledger.jsonl"
"""Files in an audit's folder, beside the pictures and the report."""

RUNNING, FINISHED, SPENT, STOPPED = "running", "finished", "budget spent", "stopped"
"""Status of an audit: running (or killed), or how it ended."""

OWN, GIVEN = "service", "given"
"""Sources of reference labels: the service's answers for the clean images, or the user."""

SCORED_LABEL = Kind(
    "a label and a score",
    lambda v: isinstance(v, list) and len(v) == 2 and TEXT.fits(v[0]) and NUMBER.or_null().fits(v[1]),
)
_COUNT_BY_NAME = COUNT.by_name()
_ANYTHING = Kind("anything", lambda value: True)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AuditPlan(JsonRecord):
    """The largest cost of an audit and the largest radius it can certify.

    Attributes:
        images: number of images.
        queries: maximum number of queries by stage.
        most: sum of ``queries``.
        budget: maximum number of requests.
        covers: number of images that the budget finishes if each takes all its samples and there are no retries.
        least: budget that finishes one image.
        radius_cap: largest radius, or None if the procedure has none.
        earliest: smallest number of samples that can decide an image, or None at a fixed n.
        price_per_1000: price of 1,000 requests, or None.
        cost: cost without retries, or None.
        cost_most: cost if retries use up the budget, or None.
        rate: maximum requests per second, or None.
        concurrency: maximum requests in flight.
        seconds: duration at that rate without retries, or None.
    """

    images: Annotated[int, COUNT]
    queries: Annotated[Mapping[str, int], _COUNT_BY_NAME]
    most: Annotated[int, COUNT]
    budget: Annotated[int, COUNT]
    covers: Annotated[int, COUNT]
    least: Annotated[int, COUNT]
    radius_cap: Annotated[float | None, AMOUNT.or_null(), Absent(None)]
    earliest: Annotated[int | None, COUNT.or_null(), Absent(None)]
    price_per_1000: Annotated[float | None, AMOUNT.or_null(), Absent(None)]
    cost: Annotated[float | None, AMOUNT.or_null(), Absent(None)]
    cost_most: Annotated[float | None, AMOUNT.or_null(), Absent(None)]
    rate: Annotated[float | None, AMOUNT.or_null(), Absent(None)]
    concurrency: Annotated[int, COUNT]
    seconds: Annotated[float | None, AMOUNT.or_null(), Absent(None)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AuditImage(JsonRecord):
    """An image of an audit.

    Attributes:
        pictures: prefix of the names of its picture files.
        numel: number of its values, C * H * W; None if unusable.
        image: hash of its values; None if unusable.
        size: (C, H, W).
        error: why it is unusable; empty if it is usable.
        given: label given by the user, or None.
        reference: label for which it is certified, the given one or the service's own; None without one.
        answer: labels and scores of the service for the clean image, best first.
        failure: why ``answer`` is empty.
    """

    id: Annotated[str, TEXT, REQUIRED]
    pictures: Annotated[str, TEXT, Absent("")]
    numel: Annotated[int | None, COUNT.or_null(), Key("values"), Absent(None)]
    image: Annotated[str | None, TEXT.or_null(), Absent(None)]
    size: Annotated[Sequence[int], COUNT.list()] = ()
    error: Annotated[str | None, TEXT.or_null(), Absent("")]
    given: Annotated[str | None, TEXT.or_null(), Absent(None)]
    reference: Annotated[str | None, TEXT.or_null(), Absent(None)]
    answer: Annotated[Sequence[Sequence[Any]], SCORED_LABEL.list(), Absent(())]
    failure: Annotated[str | None, TEXT.or_null(), Absent("")]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Probed(JsonRecord):
    """One image of the determinism probe, queried repeatedly at the start.

    Attributes:
        id: the image's id.
        labels: number of answers per class, most frequent first; answers without a label are left out.
        failures: number of repetitions without a label.
        spread: largest minus smallest score of the class; None unless all answers have the same class and a score.
        tie: True if the classes of the answers have equal scores, up to rounding, in every answer.
    """

    id: Annotated[str, TEXT, REQUIRED]
    labels: Annotated[Mapping[str, int], _COUNT_BY_NAME, REQUIRED]
    failures: Annotated[int, COUNT, Absent(0)]
    spread: Annotated[float | None, AMOUNT.or_null(), Absent(None)]
    tie: Annotated[bool, FLAG, Absent(False)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Drifted(JsonRecord):
    """One image of the drift check, queried at the start and at the end.

    Attributes:
        id: the image's id.
        before: class of the first answer; None if it has no label.
        after: class of the latest answer at the end; None if it has no label.
    """

    id: Annotated[str, TEXT, REQUIRED]
    before: Annotated[str | None, TEXT.or_null(), Absent(None)]
    after: Annotated[str | None, TEXT.or_null(), Absent(None)]

    @property
    def compared(self) -> bool:
        """True if both answers have a label."""
        return self.before is not None and self.after is not None

    @property
    def changed(self) -> bool:
        """True if the two labels differ."""
        return self.compared and self.before != self.after


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Spent(JsonRecord):
    """Cost of an audit: answered queries by stage, failures by reason, quantiles of response times in seconds.

    ``requests`` counts all requests sent, including retries and those without an answer.
    """

    requests: Annotated[int, COUNT]
    queries: Annotated[Mapping[str, int], _COUNT_BY_NAME]
    retries: Annotated[int, COUNT]
    failures: Annotated[Mapping[str, int], _COUNT_BY_NAME]
    cost: Annotated[float | None, AMOUNT.or_null(), Absent(None)]
    seconds: Annotated[Mapping[str, float], AMOUNT.by_name()]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AuditRecord(JsonRecord, type_name="audit"):
    """The content of ``audit.json``.

    ``labels`` is ``OWN`` or ``GIVEN``; ``vocabulary`` lists the classes by number; ``fixed_function`` is True if
    repeated queries returned the same labels, False if not, None if nothing was repeated; ``asked`` is written last.
    """

    schema: Annotated[int, COUNT, Absent(0)]
    created: Annotated[str | None, TEXT.or_null(), Absent("")]
    finished: Annotated[str | None, TEXT.or_null(), Absent(None)]
    status: Annotated[str | None, TEXT.or_null(), Absent("")]
    reason: Annotated[str | None, TEXT.or_null(), Absent("")]
    command: Annotated[str | None, TEXT.or_null(), Absent("")]
    endpoint: Annotated[str | None, TEXT.or_null(), Absent("")]
    protocol: Annotated[str | None, TEXT.or_null(), Absent("")]
    format: Annotated[Mapping[str, Any], OBJECT, Absent({})]
    encoding: Annotated[Any, _ANYTHING, Absent("")]
    size: Annotated[Sequence[int] | None, COUNT.list().or_null(), Absent(None)]
    denoiser: Annotated[str | None, TEXT.or_null(), Absent(None)]
    pipeline: Annotated[Sequence[Mapping[str, Any]], OBJECT.list(), Absent(())]
    labels: Annotated[str | None, TEXT.or_null(), Absent(OWN)]
    class_map: Annotated[Mapping[str, str] | None, TEXT.by_name().or_null(), Absent(None)]
    vocabulary: Annotated[Sequence[str], TEXT.list(), Absent(())]
    plan: Annotated[AuditPlan, object_of(AuditPlan)]
    images: Annotated[Sequence[AuditImage], object_of(AuditImage, "an object with an id").list()]
    fixed_function: Annotated[bool | None, FLAG.or_null(), Absent(None)]
    determinism: Annotated[Sequence[Probed], object_of(Probed).list(), Absent(())]
    drift: Annotated[Sequence[Drifted], object_of(Drifted).list(), Absent(())]
    versions: Annotated[Mapping[str, str], OBJECT, Absent({})]
    replay: Annotated[str | None, TEXT.or_null(), Absent("")]
    settings: Annotated[Mapping[str, Any], OBJECT, Absent({})]
    asked: Annotated[Spent | None, object_of(Spent)] = None


def read_about(folder: Path) -> AuditRecord:
    """Read the ``audit.json`` of an audit's folder.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / ABOUT
    try:
        value = parse_object(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected the folder of `certify audit`") from None
    wrong = "no JSON object" if value is None else AuditRecord.fault(value)
    if value is None or wrong:
        raise UserError(f"{path} is damaged: {wrong}; put back a copy of it, or run the audit's command again")
    return AuditRecord.from_json(value, str(path))


def write_about(folder: Path, record: AuditRecord) -> None:
    """Write ``audit.json`` atomically, replacing an earlier one.

    Raises:
        RunFault: the file cannot be written.
    """
    with writing(folder / ABOUT) as path, replacing(path, sync=True, private=True) as beside:
        beside.write_text(json.dumps(record.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_rows(folder: Path, header: RunHeader, rows: Sequence[ImageRow]) -> None:
    """Write the run file, replacing an earlier one.

    Raises:
        RunFault: the file cannot be written.
    """
    with writing(folder / RUN) as path:
        write_run(path, header, rows)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Create the parent folder of a file to be written; turn an ``OSError`` in the block into a ``RunFault``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        raise RunFault(f"could not write {path}: {error.strerror}; all answers so far are kept in the ledger") from None
