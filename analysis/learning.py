"""Learning curves of trainings: the logged loss, and the scores on held-out images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.figures import COLOURS, add_legend, canvas, literal
from certify.errors import UserError

METRICS = "metrics.jsonl"
_NAMES = {"accuracy": "held-out accuracy", "agreement": "held-out agreement", "psnr": "held-out PSNR (dB)"}
_MARKERS = "osD^v<>pP*X"
_WINDOWS = 60
"""Points of the smoothed loss: means over as many intervals of equal length."""


@dataclass(frozen=True)
class Learning:
    """The log of one training.

    Attributes:
        name: name of its folder.
        images: images seen at each logged loss, float64, increasing.
        loss: the losses.
        seen: images seen at each validation.
        held_out: values by name, such as ``"accuracy@0.25"`` (measure and sigma; no ``@`` without noise).
    """

    name: str
    images: np.ndarray
    loss: np.ndarray
    seen: np.ndarray
    held_out: dict[str, np.ndarray]


def is_training(path: str | Path) -> bool:
    """Return True for the output folder of a training, or its ``metrics.jsonl``."""
    path = Path(path)
    return path.name == METRICS or (path / METRICS).is_file()


def read_learning(path: str | Path) -> Learning:
    """Read the log of ``certify train``, finished or not; torn lines are skipped.

    Raises:
        UserError: no such file, or it holds no training.
    """
    path = Path(path)
    file = path if path.name == METRICS else path / METRICS
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    losses: dict[int, tuple[float, float]] = {}
    validations: dict[int, dict[str, float]] = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
            if "loss" in row:
                losses[int(row["step"])] = float(row["images"]), float(row["loss"])
            elif "held_out" in row:
                validations[int(row["step"])] = {str(k): float(v) for k, v in row["held_out"].items() if k != "score"}
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            continue
    if not losses:
        raise UserError(f"{file} holds no log of a training; expected the --out folder of certify train")
    images, loss = np.array(sorted(losses.values())).T
    images_per_step = images[-1] / max(losses)
    named = sorted({name for scores in validations.values() for name in scores})
    held_out = {
        name: np.array([scores.get(name, np.nan) for _, scores in sorted(validations.items())]) for name in named
    }
    return Learning(
        file.parent.name or str(file), images, loss, np.array(sorted(validations)) * images_per_step, held_out
    )


def plot_learning(trainings: Sequence[Learning], path: str | Path, *, title: str | None = None) -> None:
    """Plot the loss and each held-out measure over images seen, with a colour per training.

    Raises:
        UserError: an unknown format.
        RunFault: the file cannot be written.
    """
    figures = {name for training in trainings for name in training.held_out}
    measures = [m for m in _NAMES if any(_parts(name)[0] == m for name in figures)]
    levels = sorted({sigma for name in figures for m, sigma in [_parts(name)] if m in measures}, key=_as_number)
    wide = 1 + len(measures)
    columns = min(2, wide)
    rows = -(-wide // columns)
    with canvas(3.2 * columns, 2.6 * rows, path, columns=columns, rows=(1.0,) * rows, title=title) as (figure, grid):
        first, *others = np.ravel(grid)
        while len(others) > len(measures):
            others.pop().remove()
        for i, training in enumerate(trainings):
            colour = COLOURS[i % len(COLOURS)]
            smooth = [
                part.mean(1)
                for part in np.array_split(np.stack([training.images, training.loss]), _WINDOWS, 1)
                if part.size
            ]
            first.plot(*np.array(smooth).T / [[1e3], [1]], color=colour, label=literal(training.name), linewidth=1.4)
            for axes, measure in zip(others, measures, strict=True):
                for level, sigma in enumerate(levels):
                    values = training.held_out.get(f"{measure}@{sigma}" if sigma else measure)
                    if values is not None:
                        marker = _MARKERS[level % len(_MARKERS)]
                        axes.plot(training.seen / 1e3, values, color=colour, marker=marker, markersize=4, linewidth=1)
        first.set(ylabel="loss of each objective" if len(trainings) > 1 else "training loss")
        for axes, measure in zip(others, measures, strict=True):
            axes.set(ylabel=_NAMES[measure])
        for axes in (first, *others):
            axes.set(xlabel="images seen (thousands)")
            axes.set_xlim(left=0)
        handles = list(first.get_lines())
        for level, sigma in enumerate(levels if levels != [""] else []):
            marker = _MARKERS[level % len(_MARKERS)]
            handles += first.plot(
                [], [], color="#555555", marker=marker, markersize=4, linewidth=0, label=f"sigma = {sigma}"
            )
        add_legend(figure, first, 4, handles=handles)


def _parts(name: str) -> tuple[str, str]:
    measure, _, sigma = name.partition("@")
    return measure, sigma


def _as_number(sigma: str) -> float:
    try:
        return float(sigma)
    except ValueError:
        return 0.0
