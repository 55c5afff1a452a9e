"""Read an audit's folder in whatever state it is: ledger, run file, ``audit.json``.

Counts come from the ledger and the run file; ``audit.json`` adds the plan, the label names, the settings and the
command. Any of its keys may be missing. What cannot be read is listed in :attr:`AuditFolder.faults`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from certify.blackbox.answers import CLEAN, ESTIMATION, SELECTION, class_of, parts_of
from certify.blackbox.determinism import drifts, probes
from certify.blackbox.ledger_contents import LOST, LedgerContents, read_ledger
from certify.blackbox.record import ABOUT, LEDGER, RUN, Drifted, Probed, read_about
from certify.blackbox.types import Answer
from certify.errors import UserError
from certify.runs.records import ImageRow, RunHeader
from certify.runs.run_file import Run, read_run


@dataclass(frozen=True)
class Query:
    """One query of the ledger.

    Attributes:
        image: id of the image.
        stage: ``clean``, ``probe``, ``selection``, ``estimation`` or ``drift``.
        answer: the service's reply, or the failure.
        label: the class it votes for; None if it votes for no class.
    """

    image: str
    stage: str
    answer: Answer
    label: str | None

    @property
    def answered(self) -> bool:
        """True if the service returned any label."""
        return bool(self.answer.ranked)

    @property
    def lost(self) -> bool:
        """True if the audit stopped between request and answer."""
        return self.answer.failure == LOST


@dataclass(frozen=True)
class AuditFolder:
    """The records of an audit.

    Attributes:
        folder: the audit's folder.
        about: content of ``audit.json``; empty without one.
        ledger: None if it is missing or damaged.
        queries: the ledger's queries, in the order they were first sent.
        run: the run file, finished or not; None without one.
        faults: what is missing or damaged, one sentence each.
    """

    folder: Path
    about: Mapping[str, Any]
    ledger: LedgerContents | None
    queries: tuple[Query, ...]
    run: Run | None
    faults: tuple[str, ...] = ()

    @property
    def header(self) -> RunHeader:
        """Header of the run file; without one, a header that says nothing."""
        return self.run.header if self.run else RunHeader.from_json({}, str(self.folder))

    @property
    def rows(self) -> list[ImageRow]:
        """Finished images of the run file."""
        return self.run.images if self.run else []

    @property
    def plan(self) -> Mapping[str, Any]:
        """The audit's plan, as ``audit.json`` holds it."""
        return self.about.get("plan") or {}

    @property
    def expected(self) -> int:
        """Number of images to certify."""
        return self.run.header.expected if self.run else len(self.about.get("images") or ())

    @property
    def spent(self) -> int:
        """Requests sent, which is what the service counts."""
        return self.ledger.spent if self.ledger else 0

    @property
    def retries(self) -> int:
        """Requests that repeated an earlier one."""
        return self.spent - (self.ledger.queries if self.ledger else 0)

    @property
    def price(self) -> str:
        """Cost of the requests with its currency; empty without a price."""
        per_1000 = self.plan.get("price_per_1000")
        return f"{self.spent * per_1000 / 1000:,.2f} {self.plan.get('currency') or ''}".strip() if per_1000 else ""

    @property
    def failed(self) -> list[Query]:
        """Queries without a label."""
        return [query for query in self.queries if not query.answered]

    @property
    def outside(self) -> list[Query]:
        """Queries answered without a vote: abstentions, or labels that are not in the class map."""
        return [query for query in self.queries if query.answered and query.label is None]

    @property
    def no_vote(self) -> str:
        """The kind of answers that vote for no class."""
        return "not in the class map" if self.about.get("class_map") else "abstained"

    @property
    def noisy(self) -> list[Query]:
        """Queries for noisy copies: the trials of the certificates."""
        return [query for query in self.queries if query.stage in (SELECTION, ESTIMATION)]

    @cached_property
    def clean_answers(self) -> dict[str, Query]:
        """The first answered query for each unmodified image, by image id."""
        clean = [query for query in self.queries if query.stage == CLEAN and query.answered]
        return {query.image: query for query in reversed(clean)}

    @cached_property
    def probes(self) -> list[Probed]:
        """Results of the determinism check."""
        return probes(self.ledger.answers if self.ledger else {}, self.about.get("class_map"))

    @cached_property
    def drifts(self) -> list[Drifted]:
        """Results of the drift check."""
        return drifts(self.ledger.answers if self.ledger else {}, self.about.get("class_map"))

    @cached_property
    def seconds(self) -> list[float]:
        """Response times of all answered queries, ascending."""
        return sorted(query.answer.seconds for query in self.queries if query.answered)

    @property
    def denoiser(self) -> str:
        """Name of the denoiser in front of the service, also if it was chosen automatically; empty without one."""
        requested = str(self.about.get("denoiser") or self.header.denoiser or "none")
        steps = self.header.pipeline
        name = next((str(step.get("name", requested)) for step in steps if step.get("step") == "denoiser"), requested)
        return "" if name == "none" else name


def read_audit(folder: str | Path, ledger: LedgerContents | None = None) -> AuditFolder:
    """Read an audit's folder, finished or not.

    Args:
        folder: the audit's folder.
        ledger: the ledger's contents; None reads them.

    Raises:
        UserError: no such folder, or it contains no part of an audit.
    """
    folder = Path(folder)
    parts = (ABOUT, LEDGER, RUN)
    if not any((folder / part).is_file() for part in parts):
        raise UserError(f"{folder} holds none of {', '.join(parts)}; expected the folder of `certify audit --out`")
    faults: list[str] = []
    about: Mapping[str, Any] = {}
    run = None
    try:
        about = read_about(folder)
    except UserError:
        faults.append(f"{ABOUT} is missing or damaged: plan, label names and settings cannot be shown in full.")
    try:
        ledger = ledger or read_ledger(folder / LEDGER)
    except UserError as error:
        faults.append(f"Queries, failures, cost and response times cannot be counted: {error}.")
    try:
        run = read_run(folder / RUN, allow_partial=True)
    except UserError as error:
        faults.append(f"No certificate can be shown: {error}.")
    if ledger is not None and ledger.torn:
        faults.append("The last line of the ledger is cut off: the program was killed while writing it.")
    class_map = about.get("class_map")
    answers = ledger.answers if ledger else {}
    queries = (
        Query(*parts_of(name)[:2], answer, class_of(answer.ranked, class_map)) for name, answer in answers.items()
    )
    return AuditFolder(folder, about, ledger, tuple(queries), run, tuple(faults))
