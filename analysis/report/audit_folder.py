"""An audit's folder as it was left: ledger, run file, ``audit.json``; what is missing is said, never guessed.

What can be counted is counted from the ledger and the run file. ``audit.json`` says what was meant: the plan, the
vocabulary, settings, the command. Every one of its keys may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from certify.blackbox.determinism import Drifted, Probed, drifts, probes
from certify.blackbox.label_index import class_of
from certify.blackbox.ledger_contents import LOST, Kept, read_ledger
from certify.blackbox.query_votes import ESTIMATION, SELECTION, parts_of
from certify.blackbox.results import ABOUT, LEDGER, RUN, read_about
from certify.blackbox.types import Answer
from certify.errors import UserError
from certify.runs.run_file import Run, read_run


@dataclass(frozen=True)
class Asked:
    """One query of the ledger.

    Attributes:
        image: id of the image it is about.
        stage: ``clean``, ``probe``, ``selection``, ``estimation`` or ``drift``.
        answer: what it brought.
        label: the class it votes for, None for nobody's vote.
    """

    image: str
    stage: str
    answer: Answer
    label: str | None

    @property
    def ranked(self) -> bool:
        """Whether the service gave any label."""
        return bool(self.answer.ranked)

    @property
    def score(self) -> float | None:
        """The first label's score, where the service gives any."""
        return self.answer.ranked[0].score if self.answer.ranked else None

    @property
    def lost(self) -> bool:
        """Whether a stop came between the sending and the answer."""
        return self.answer.failure == LOST


@dataclass(frozen=True)
class AuditFolder:
    """Everything that is there.

    Attributes:
        folder: of the audit.
        about: ``audit.json``; empty if there is none.
        kept: the ledger; None if there is none, or it is damaged.
        asked: its queries, in the order of their first sending.
        run: the run file, finished or not; None if there is none.
        faults: what is missing or damaged, one sentence each.
    """

    folder: Path
    about: Mapping[str, Any]
    kept: Kept | None
    asked: tuple[Asked, ...]
    run: Run | None
    faults: tuple[str, ...] = ()
    _by_image: dict[tuple[str, str], list[Asked]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for query in self.asked:
            self._by_image.setdefault((query.image, query.stage), []).append(query)

    @property
    def header(self) -> Mapping[str, Any]:
        """The run file's, empty without one."""
        return self.run.header if self.run else {}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The finished images of the run file."""
        return self.run.images if self.run else []

    @property
    def owed(self) -> int:
        """Images that the audit set out to certify."""
        return int(self.header.get("expected") or len(self.about.get("images") or ()))

    def of(self, image: str, *stages: str) -> list[Asked]:
        """The queries about one image in these stages."""
        return [query for stage in stages for query in self._by_image.get((image, stage), ())]

    @property
    def spent(self) -> int:
        """Requests that went out: what the service counts."""
        return self.kept.spent if self.kept else 0

    @property
    def retries(self) -> int:
        """Requests that repeated an earlier one."""
        return self.spent - (self.kept.queries if self.kept else 0)

    @property
    def failed(self) -> list[Asked]:
        """Queries without a label."""
        return [query for query in self.asked if not query.ranked]

    @property
    def outside(self) -> list[Asked]:
        """Queries that were answered with no label of the class map."""
        return [query for query in self.asked if query.ranked and query.label is None]

    @property
    def noisy(self) -> list[Asked]:
        """Queries about noisy copies: the trials of the certificates."""
        return [query for query in self.asked if query.stage in (SELECTION, ESTIMATION)]

    @property
    def probes(self) -> list[Probed]:
        """The determinism probe, from the ledger."""
        return probes(self.kept.answers if self.kept else {}, self.about.get("class_map"))

    @property
    def drifts(self) -> list[Drifted]:
        """The drift check, from the ledger."""
        return drifts(self.kept.answers if self.kept else {}, self.about.get("class_map"))

    @property
    def seconds(self) -> list[float]:
        """How long each answer with a label took, ascending."""
        return sorted(query.answer.seconds for query in self.asked if query.ranked)


def read_audit(folder: str | Path) -> AuditFolder:
    """Read an audit's folder, however far it came.

    Raises:
        UserError: no such folder, or nothing of an audit in it.
    """
    folder = Path(folder)
    parts = (ABOUT, LEDGER, RUN)
    if not any((folder / part).is_file() for part in parts):
        raise UserError(f"{folder} holds none of {', '.join(parts)}; expected the folder of `certify audit --out`")
    faults: list[str] = []
    about: dict[str, Any] = {}
    kept = run = None
    try:
        about = read_about(folder)
    except UserError:
        faults.append(f"{ABOUT} is missing or damaged: plan, names of labels and settings cannot all be shown.")
    try:
        kept = read_ledger(folder / LEDGER)
    except UserError as error:
        faults.append(f"Queries, failures, cost and answer times cannot be counted: {error}.")
    try:
        run = read_run(folder / RUN, allow_partial=True)
    except UserError as error:
        faults.append(f"No certificate can be shown: {error}.")
    if kept is not None and kept.torn:
        faults.append("The last line of the ledger is cut off: the program was stopped while it wrote.")
    return AuditFolder(folder, about, kept, _asked(kept, about.get("class_map")), run, tuple(faults))


def _asked(kept: Kept | None, class_map: Mapping[str, str] | None) -> tuple[Asked, ...]:
    answers = kept.answers if kept else {}
    return tuple(
        Asked(*parts_of(name)[:2], answer, class_of(answer.ranked, class_map)) for name, answer in answers.items()
    )
