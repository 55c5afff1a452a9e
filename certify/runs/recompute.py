"""Recompute a run at another alpha or bound from its votes alone, into a new file."""

from __future__ import annotations

from collections.abc import Mapping

from certify.errors import UserError, warn
from certify.runs.identity import unproven
from certify.runs.records import ImageRow, RunHeader
from certify.runs.run_file import Run, now
from certify.smoothing.bounds import check_alpha
from certify.smoothing.rng import bound_draw


def recompute(
    run: Run, *, alpha: float | None = None, bound: str | None = None, command: str = ""
) -> tuple[RunHeader, list[ImageRow]]:
    """Return header and rows of the same votes at another alpha or bound.

    Each certificate fails with probability at most the new alpha, provided that alpha and bound were chosen without
    looking at the results. Bounds that the run's design cannot support are rejected. Warns of a run that cannot prove
    that all its images were labelled by the same model.

    Args:
        run: as it was read.
        alpha: failure probability per image; None keeps it.
        bound: name of a bound; None keeps it.
        command: for the record.

    Raises:
        UserError: alpha out of range, an unknown bound, or one that these votes cannot support.
    """
    if not run.header.has("kind") or not run.header.has("noise"):
        raise UserError(f"{run.path} names no procedure or noise; expected a run file of certify")
    if doubt := unproven(run.header):
        warn(f"{run.path}: {doubt}")
    changed = recomputed_header(run, run.origin, alpha=alpha, bound=bound, command=command)
    return changed, [_renewed(changed, row) for row in run.images]


def recomputed_header(
    run: Run, origin: Mapping[str, str], *, alpha: float | None, bound: str | None, command: str
) -> RunHeader:
    """Return the run's header at another alpha or bound (None keeps it), with the origin of its votes.

    Raises:
        UserError: as :func:`recompute`.
    """
    header = run.header
    alpha = check_alpha(header.alpha if alpha is None else alpha)
    bound = header.bound if bound is None else bound
    header.procedure.changed(alpha, bound, run.path)  # refuses what these votes cannot support
    kept = {key: header[key] for key in ("alpha", "bound", "created", "command")}
    return header.replace(alpha=alpha, bound=bound, recomputed={**origin, "from": kept}, created=now(), command=command)


def _renewed(header: RunHeader, row: ImageRow) -> ImageRow:
    """Return a row with its answer recomputed; an unusable image stays as it is."""
    if row.error is not None:
        return row
    if header.bound == "randomized" and row.uniform is None:
        row = row.replace(uniform=bound_draw(header.seed, row.id))
    renewed = row.recomputed(header)
    if renewed.prediction == row.prediction:
        return renewed
    # the name of a class that was an abstention may be unknown
    name = row.base_class if renewed.prediction == row.base else None
    if not renewed.abstained and name is None:
        number = str(renewed.prediction)
        name = (row.classes or {}).get(number, number)
    return renewed.replace(class_name=name)
