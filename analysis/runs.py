"""Read run files, comparisons, and published certification logs."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis.comparison.results import Comparison
from certify.errors import UserError
from certify.runs.comparison_records import ComparisonHeader
from certify.runs.identity import unproven
from certify.runs.records import ImageRow, RunHeader
from certify.runs.run_file import ComparisonRun, Run, peek_header, read_run, refuse_duplicates
from certify.text import read_text


class NoRadii(UserError):
    """The images of the run have no radii."""


LOG_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
_TEST_SETS = (10_000, 50_000)


def read_any(path: str | Path) -> Run:
    """Read a run file, or a tab-separated log ``idx label predict radius correct time`` (Cohen et al. 2019).

    Raises:
        UserError: another kind of file, a damaged one, a duplicate image, or a run without radii.
    """
    path = Path(path)
    try:
        if path.is_dir():
            files = sorted(file.name for file in path.iterdir() if file.is_file())
            logs = bool(files) and not any(name.endswith(".jsonl") for name in files)
            example = f"{path}/{shlex.quote(files[0]) if logs else '*.jsonl'}"
            raise UserError(f"{path} is a folder; name the run files in it, such as {example}")
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if head.removeprefix(codecs.BOM_UTF8).split(b"\t")[0].strip() == b"idx":
        return _read_log(path)
    run = read_run(path, allow_partial=True)
    if why := run.header.without_radii:
        raise NoRadii(f"{path} {why}; expected a run of `certify --model ...`")
    return run


def is_comparison(path: str | Path) -> bool:
    """Return True for a file of ``certify compare``."""
    return isinstance(peek_header(path), ComparisonHeader)


def read_comparison(path: str | Path, warn: Callable[[str], None] | None = None) -> Comparison:
    """Read a file of ``certify compare``, finished or not.

    Args:
        path: the file (``.jsonl``).
        warn: called with a message if the file cannot prove the identity of its models; None ignores this.

    Returns:
        The comparison, with ``table()``, ``plot()``, ``to_pandas()`` and a row per image, defence and condition.

    Raises:
        UserError: the file is unreadable, damaged, or not a comparison.
    """
    run = ComparisonRun.read(path, allow_partial=True)
    if warn is not None and (doubt := unproven(run.header)):
        warn(f"{run.path}: {doubt}")
    return Comparison(run)


def read_all(paths: Sequence[str | Path], warn: Callable[[str], None]) -> list[Run]:
    """Read runs; those without radii, such as of `certify predict`, are skipped with a warning.

    Raises:
        UserError: see :func:`read_any`; or no run has radii.
    """
    runs = []
    for path in paths:
        try:
            runs.append(read_any(path))
        except NoRadii as error:
            if len(paths) == 1:
                raise
            warn(f"{error}; skipped")
    for run in runs:
        if shard := run.header.shard:
            part = f"shard {shard.index}/{shard.of} of a run"
            warn(f"{run.path} is {part}, so it has only part of the images (see `certify merge`)")
        if doubt := unproven(run.header):
            warn(f"{run.path}: {doubt}")
    if not runs:
        raise UserError("none of these runs has radii; expected runs of `certify --model ...`")
    return runs


def _read_log(path: Path) -> Run:
    try:
        rows = list(csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a log in text ({error})") from None
    columns = [c.strip() for c in rows[0]]
    if tuple(columns) != LOG_COLUMNS:
        raise UserError(f"{path}: columns {' '.join(columns)}; expected {' '.join(LOG_COLUMNS)}")
    images = [_log_image(row, number, path) for number, row in enumerate(rows[1:], 2) if row]
    if not images:
        raise UserError(f"{path} holds no images")
    refuse_duplicates(path, images)
    return Run(path, _log_header(path, _expected(sorted(int(row.id) for row in images))), images)


def _log_image(row: list[str], number: int, path: Path) -> ImageRow:
    try:
        idx, label, predict, radius, correct, _ = row
        image = {"id": str(int(idx)), "label": int(label), "prediction": int(predict), "radius": float(radius)}
        if not 0 <= float(radius) < math.inf:
            raise ValueError(radius)
        agrees = int(correct) == int(int(predict) == int(label))
    except ValueError:
        raise UserError(f"{path} is damaged at line {number}: {' '.join(row)[:60]!r}") from None
    if not agrees:
        raise UserError(
            f"{path}, line {number}: correct = {correct} contradicts label {label} and prediction {predict}"
        )
    return ImageRow.from_json(image, f"{path}, line {number},")


def _log_header(path: Path, expected: int) -> RunHeader:
    """Make a header from the folder names; such logs contain neither sigma nor n nor alpha."""
    named = re.search(r"sigma_([\d.]+)", path.name) or re.search(r"sigma_([\d.]+)", str(path))
    folders = [p for p in path.resolve().parts[1:-1][-4:] if p not in ("test", "certify", "data")]
    sigma = {"sigma": float(named[1].rstrip("."))} if named else {}
    return RunHeader.from_json({"model": "/".join(folders), "norm": "l2", "expected": expected, **sigma}, str(path))


def _expected(indices: list[int]) -> int:
    """Return the number of images of a complete log: every K-th of a test set of 10,000 or 50,000 images."""
    if len(indices) < 2:
        return len(indices)
    stride = max(1, min(b - a for a, b in itertools.pairwise(indices)))
    reach = indices[-1] + stride
    size = next((s for s in _TEST_SETS if reach <= s), reach) if stride > 1 else reach
    return max(len(indices), (size - indices[0] % stride + stride - 1) // stride)
