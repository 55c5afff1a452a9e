"""Another alpha or another bound from the votes of a run file: no model, no images, a new file."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from certify.errors import UserError
from certify.runs.identity import unproven
from certify.runs.image_rows import recomputed_row
from certify.runs.run_file import Run, new_run_file, now, read_run, write_derived
from certify.smoothing.bounds import check_alpha
from certify.smoothing.procedures import procedure_of

_LOG = logging.getLogger("certify")


def recompute(
    run: Run, *, alpha: float | None = None, bound: str | None = None, command: str = ""
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and image lines of the same votes at another alpha or bound.

    Every certificate is again wrong with probability at most the new alpha, provided that alpha and bound were not
    chosen by looking at the results. What the run's design cannot support is refused.

    Args:
        run: as it was read.
        alpha: probability of error for each image; None keeps it.
        bound: name of a bound; None keeps it.
        command: for the record.

    Raises:
        UserError: alpha out of range, an unknown bound, or one that these votes cannot support.
    """
    header = run.header
    if "procedure" not in header or "noise" not in header:
        raise UserError(f"{run.path} names no procedure or noise; expected a run file of certify")
    changed = recomputed_header(run, run.origin, alpha=alpha, bound=bound, command=command)
    return changed, [_line(changed, row) for row in run.images]


def recomputed_header(
    run: Run, origin: Mapping[str, str], *, alpha: float | None, bound: str | None, command: str
) -> dict[str, Any]:
    """The run's header at another alpha or bound (None keeps it), with what it was and where its votes are from.

    Raises:
        UserError: as :func:`recompute`.
    """
    header = run.header
    alpha = header["alpha"] if alpha is None else alpha
    bound = header["bound"] if bound is None else bound
    alpha = check_alpha(alpha)
    procedure_of(header).changed(alpha, bound, run.path)  # refuses what these votes cannot support
    kept = {key: header[key] for key in ("alpha", "bound", "created", "command")}
    said = {"recomputed": {**origin, "from": kept}, "created": now(), "command": command}
    changed = copy.copy(header)
    changed.update({"alpha": alpha, "bound": bound, **said})
    return changed


def _line(header: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """An image's line with its answer renewed; an unusable image stays as it is."""
    if "error" in row:
        return row
    if header["bound"] == "randomized" and "uniform" not in row:
        from certify.smoothing.rng import bound_draw

        row = copy.copy(row)
        row["uniform"] = bound_draw(header["seed"], row["id"])
    renewed = copy.copy(row)
    renewed.update(recomputed_row(header, row))
    if renewed["prediction"] != row["prediction"]:  # the name of a class that was an abstention may not be known
        renewed["class"] = row["base_class"] if renewed["prediction"] == row["base"] else None
        if renewed["prediction"] >= 0 and renewed["class"] is None:
            number = str(renewed["prediction"])
            renewed["class"] = row.get("classes", {}).get(number, number)
    return renewed


def recompute_file(
    source: str | Path,
    target: str | Path,
    *,
    alpha: float | None = None,
    bound: str | None = None,
    allow_partial: bool = False,
    command: str = "",
    warn: Callable[[str], None] = _LOG.warning,
) -> Run:
    """Write the recomputed run beside the old one, whole or not at all.

    Warns of a run that cannot prove that all its images met the same model.

    Raises:
        UserError: as :func:`recompute`; the target is there already, or no run file by its name.
        RunFault: it cannot be written.
    """
    target = new_run_file(target)
    run = read_run(source, allow_partial=allow_partial)
    if doubt := unproven(run.header):
        warn(f"{run.path}: {doubt}")
    header, rows = recompute(run, alpha=alpha, bound=bound, command=command)
    return write_derived(target, header, rows)
