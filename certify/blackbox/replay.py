"""Recompute the certificates of an audit from its folder: the answers in the ledger and the recorded settings.

Images, reference labels and settings are in ``audit.json`` and in the run file's header; every vote comes from the
ledger. No data, no model, no service.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from certify.blackbox.answers import LabelIndex
from certify.blackbox.ledger_contents import read_ledger
from certify.blackbox.record import ABOUT, LEDGER, RUN, read_about
from certify.blackbox.results import rows_of
from certify.blackbox.types import Answer
from certify.errors import UserError
from certify.runs.identity import differences, unproven
from certify.runs.recompute import recomputed_header
from certify.runs.records import ImageRow
from certify.runs.run_file import Run, read_run

_LOG = logging.getLogger("certify")


@dataclass(frozen=True)
class Replayed:
    """The certificates that follow from the answers in a folder.

    Attributes:
        run: the certificates, with the path of the run file that they were compared with.
        differing: ids of images whose certificate in the run file differs; compared at the run's own alpha and bound
            only.
    """

    run: Run
    differing: tuple[str, ...]


def replay(
    folder: str | Path,
    *,
    alpha: float | None = None,
    bound: str | None = None,
    answers: Mapping[str, Answer] | None = None,
    command: str = "",
    warn: Callable[[str], None] = _LOG.warning,
) -> Replayed:
    """Recompute the certificates of an audit from its ledger, ``audit.json`` and the run file's header.

    At another alpha an image with early stopping is settled by the samples that it has, or undecided.

    Args:
        folder: of the audit.
        alpha: failure probability per image; None keeps the audit's.
        bound: name of a bound; None keeps the audit's.
        answers: by name, if they were read already.
        command: for the header.
        warn: called with a sentence if the run file does not prove that one denoiser was used throughout.

    Raises:
        UserError: no such folder, a damaged file, a run file and an ``audit.json`` of different denoisers, or a bound
            that is invalid for the way the votes were sampled.
    """
    folder = Path(folder)
    about = read_about(folder)
    recorded = read_run(folder / RUN, allow_partial=True)
    header, same = recorded.header, alpha is None and bound is None
    pipeline = list(header.pipeline) if header.has("pipeline") else None
    if other := differences({"pipeline": about.get("pipeline", pipeline)}, {"pipeline": pipeline}):
        raise UserError(
            f"{folder / ABOUT} and {folder / RUN} are of different audits ({other}); expected the files of one audit"
        )
    if same:
        header.procedure.changed(header.alpha, header.bound, recorded.path)  # refuses an unsupported bound
    else:
        header = recomputed_header(recorded, {"run": str(folder)}, alpha=alpha, bound=bound, command=command)
    if doubt := unproven(header):
        warn(f"{recorded.path}: {doubt}")
    if answers is None:
        answers = read_ledger(folder / LEDGER).answers
    rows = rows_of(header, about.images, answers, LabelIndex(about.class_map))
    before, now = ({row.id: row for row in some} for some in (recorded.images, rows))
    differing = [i for i in before | now if same and not _equal(before.get(i), now.get(i))]
    return Replayed(Run(recorded.path, header, rows), tuple(differing))


def _equal(before: ImageRow | None, now: ImageRow | None) -> bool:
    """True if both rows hold the same certificate."""
    if before is None or now is None:
        return before is now
    a, b = _comparable(before), _comparable(now)
    numbers = zip(_derived(before), _derived(now), strict=True)
    return a == b and all(
        old == new or bool(old and new and math.isclose(old, new, rel_tol=1e-6)) for old, new in numbers
    )


def _derived(row: ImageRow) -> tuple[float | None, ...]:
    """Numbers that follow from the votes; versions may round them differently, by less than one millionth."""
    return row.radius, row.p_lower, row.p_other, row.p_value


def _comparable(row: ImageRow) -> ImageRow:
    """The rest of a row, with names for class numbers, which depend on the rows before it."""
    row = row.replace(radius=None, p_lower=None, p_other=None, p_value=None, image=str(row.image)[:16])
    if row.classes is None:
        return row
    names = {int(c): name for c, name in row.classes.items()}
    return row.replace(
        classes=None,
        votes={names[int(c)]: count for c, count in row.votes.items()},
        selection={names[int(c)]: count for c, count in row.selection.items()},
        decisions=[outcome.replace(look=[names.get(outcome.look[0]), *outcome.look[1:]]) for outcome in row.outcomes],
        label=names.get(-1 if row.label is None else row.label),
        prediction=names.get(row.prediction),
        base=names.get(-1 if row.base is None else row.base),
    )
