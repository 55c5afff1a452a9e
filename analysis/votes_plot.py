"""The votes of one image: what its certificate is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.figures import COLOURS, LABEL, canvas, check_format, literal, save_figure
from certify.errors import UserError
from certify.runs.run_file import Run
from certify.smoothing.norms import DECIMALS
from certify.smoothing.procedures import votes_of
from certify.smoothing.rounding import ceil_to, exact, floor_to
from certify.types import ABSTAIN

_MOST = 8  # classes that get a bar of their own


def plot_votes(run: Run, image_id: str, path: str | Path, *, title: str | None = None) -> None:
    """Write the figure: the share of votes of each class, and the bounds that its radius was computed from.

    Args:
        run: a run file of certify.
        image_id: of one of its images.
        path: .png, .svg or .pdf.
        title: in place of the certificate in words.

    Raises:
        UserError: a format that is not written; no such image; an image without votes.
        RunFault: the file cannot be written.
    """
    check_format(path)
    row = _row(run, image_id)
    _, votes = votes_of(row)
    counts = sorted(((count, label) for label, count in enumerate(votes.counts) if count), reverse=True)
    shown, rest = counts[:_MOST], counts[_MOST:]
    bars = [(_name(row, label), count, label == row["prediction"]) for count, label in shown]
    if rest:
        bars.append((f"{len(rest)} others", sum(count for count, _ in rest), False))
    if votes.failures:
        bars.append(("no answer", votes.failures, False))
    with canvas(4.8, 1.1 + 0.28 * len(bars), style={"axes.grid.axis": "x"}) as (figure, axes):
        for place, (_, count, leads) in enumerate(bars):
            share = count / votes.trials
            axes.barh(place, share, height=0.62, color=COLOURS[0] if leads else "#B8C4CE")
            axes.text(share + 0.01, place, f"{count:,}", va="center", fontsize=8)
        lower, other = row.get("p_lower"), row.get("p_other")
        if lower:
            label = f"lower bound of the prediction: {floor_to(lower)}"
            axes.axvline(lower, color=COLOURS[1], lw=1.4, label=label)
        if other and other < 1 - (lower or 0):
            label = f"upper bound of every other class: {ceil_to(other)}"
            axes.axvline(other, color=COLOURS[2], ls="--", lw=1.4, label=label)
        axes.set_yticks(range(len(bars)), [literal(name, LABEL) for name, _, _ in bars])
        axes.set(xlim=(0, 1.12), ylim=(len(bars) - 0.4, -0.6), xlabel=f"share of {votes.trials:,} votes under noise")
        axes.set_title(title or literal(_in_words(run, row)), fontsize=9, loc="left", wrap=True)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2)
        save_figure(figure, Path(path))


def _row(run: Run, image_id: str) -> dict[str, Any]:
    row = next((row for row in run.images if row["id"] == image_id), None)
    if row is None:
        some = ", ".join(row["id"] for row in run.images[:3])
        raise UserError(f"{run.path} holds no image {image_id!r}; expected one of its ids, such as {some}")
    if "votes" not in row or "error" in row:
        raise UserError(f"{run.path} holds no votes of image {image_id}; expected a line of certify with trials")
    return row


def _name(row: dict[str, Any], label: int) -> str:
    if label == row["prediction"] and row.get("class"):
        return str(row["class"])
    if label == row.get("base") and row.get("base_class"):
        return str(row["base_class"])
    numbered = str(label) if row.get("base_class") == str(row.get("base")) else f"class {label}"
    return str(row.get("classes", {}).get(str(label), numbered))


def _in_words(run: Run, row: dict[str, Any]) -> str:
    header = run.header
    if row["prediction"] == ABSTAIN:
        answer = "abstains"
    else:
        digits = DECIMALS[header.get("norm", "l2")]
        right = {True: "right", False: "wrong"}[row["prediction"] == row["label"]] if row["label"] is not None else ""
        radius = f", radius {floor_to(row['radius'], digits)}" if row.get("radius") is not None else ""
        answer = f"{_name(row, row['prediction'])}{f' ({right})' if right else ''}{radius}"
    return f"image {row['id']}, sigma {exact(header['sigma'])}: {answer}"
