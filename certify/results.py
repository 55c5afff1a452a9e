"""A finished run as Python and notebooks see it: rows, tables, curves, data frames."""

from __future__ import annotations

import hashlib
import html
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from certify.errors import UserError
from certify.runs import run_file
from certify.runs.files import new_run_file
from certify.smoothing.norms import IN_WORDS
from certify.smoothing.numeric import as_float
from certify.smoothing.rounding import exact, floor_to
from certify.text import printable

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from analysis.accuracy_bound import AccuracyBound
    from certify.runs.records import ImageRow, RunHeader


class Table(str):
    """A table as text, which notebooks show as it is printed."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self)}</pre>"


@dataclass(frozen=True)
class Plot:
    """A figure of matplotlib, which notebooks show as a picture."""

    figure: Figure

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.figure.savefig(picture, format="png", dpi=120)
        return picture.getvalue()


def data_frame(rows: Sequence[Mapping[str, object]], index: list[str]) -> pandas.DataFrame:
    """Return a data frame of these rows, indexed by some of their keys.

    Raises:
        UserError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise UserError("to_pandas needs pandas: pip install pandas") from None
    return pandas.DataFrame(list(rows)).set_index(index)


class Run(run_file.Run):
    """A run: its header and one row per image.

    ``len(run)``, ``run[0]``, ``run["id"]``, ``run[:10]`` and iteration give rows. Rows have ``id``, ``label``,
    ``prediction`` (-1 abstains), ``radius`` (in [0, 1] pixels and the run's norm), ``p_lower``, ``votes`` and the other
    keys of the run file (``docs/run-file.md``). For each image separately, the statement of its row is true or an
    abstention with probability at least 1 - ``header.alpha`` over the noise draws.

    Attributes:
        path: of the run file; a bare name for a run in memory.
        header: settings and provenance, as typed fields (``run.header.sigma``).
        images: all rows; ``usable`` are those without an error.
        torn: True if the last line was incomplete, and ignored.
    """

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[ImageRow]:
        return iter(self.images)

    @overload
    def __getitem__(self, key: int | str) -> ImageRow: ...

    @overload
    def __getitem__(self, key: slice) -> list[ImageRow]: ...

    def __getitem__(self, key: int | str | slice) -> ImageRow | list[ImageRow]:
        """Return a row by position or id, or several by a slice.

        Raises:
            IndexError: no such position.
            KeyError: no such id.
        """
        if not isinstance(key, str):
            return self.images[key]
        for row in self.images:
            if row.id == key:
                return row
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return key in self.images or any(row.id == key for row in self.images)

    def certified_accuracy(self, radius: float = 0.0) -> float:
        """Return the share of images that are certified, with the right class if they have labels, at this radius.

        Raises:
            UserError: a run of predictions, which have no radius; a radius below 0.
        """
        from analysis.curves import curve

        require_radii(self)
        return float(curve(self).accuracy(check_radii([radius]))[0])

    def table(self, radii: Sequence[float] | None = None, *, style: str = "text") -> Table:
        """Return the table of certified accuracy with its 95 % interval over images.

        As text it is the table at the end of ``certify run``, with the number of images that are left out; in the other
        styles that of ``certify table``.

        Args:
            radii: in [0, 1] pixels; round numbers up to the largest possible radius unless given.
            style: ``"text"``, ``"markdown"``, ``"latex"`` or ``"csv"``.

        Raises:
            UserError: a run of predictions, which have no radius; radii below 0; an unknown style.
        """
        from analysis.curves import curves, table_radii
        from analysis.tables import compare, one_run

        require_radii(self)
        (own,) = curves([self])
        radii = table_radii(self) if radii is None else check_radii(radii)
        if style != "text":
            return Table(compare([own], radii, style, intervals=True))
        return Table("\n\n".join(part for part in (one_run(own, radii), self.omissions) if part))

    def plot(self, path: str | Path | None = None, *others: Run, title: str | None = None, band: bool = True) -> Plot:
        """Draw certified accuracy against the radius, with those of other runs, and return the plot.

        Args:
            path: of the picture to write, such as ``"curve.png"``; None writes none.
            others: further runs in the same figure.
            title: above the axes.
            band: shade the 95 % interval over images.

        Raises:
            UserError: runs that cannot be compared or hold predictions, or a format that cannot be written.
            RunFault: the file cannot be written.
        """
        from analysis.curves import curves
        from analysis.plots import plot_curves

        require_radii(self, *others)
        return Plot(plot_curves(curves([self, *others]), path, title=title, band=band))

    def accuracy_bound(self, *, alpha: float | None = None, population: bool | None = None) -> AccuracyBound:
        """Return a lower bound on the mean accuracy under attack of the classifier that votes once.

        It uses all votes of the last stage of a run with a fixed n; images without a result count as wrong.

        Args:
            alpha: failure probability of the whole statement; None takes the run's.
            population: see :func:`certify.accuracy`; None takes the run's choice.

        Raises:
            UserError: a run that stopped early, or labels for some images only.
        """
        from analysis.accuracy_bound import accuracy_bound

        return accuracy_bound(self, alpha=alpha, population=population)

    def to_pandas(self) -> pandas.DataFrame:
        """Return a data frame with a row per image, indexed by id.

        Raises:
            UserError: pandas is not installed.
        """
        return data_frame([row.to_json() for row in self.images], ["id"]).drop(columns="type")

    def recompute(self, *, alpha: float | None = None, bound: str | None = None, out: str | Path | None = None) -> Run:
        """Return the run at another alpha or bound, from the same votes.

        Every certificate is again wrong with probability at most the new alpha, provided that alpha and bound were not
        chosen by looking at the results.

        Args:
            alpha: failure probability per image; None keeps it.
            bound: name of a bound; None keeps it.
            out: run file to write; None keeps the run in memory.

        Raises:
            UserError: a bound that these votes cannot support, alpha out of range, or a file that exists.
        """
        from certify.runs.recompute import recompute

        return self._derived(recompute(self, alpha=alpha, bound=bound, command="certify.Run.recompute"), out)

    def merge(self, *others: Run, out: str | Path | None = None) -> Run:
        """Return the whole run of which this and the others are the shards, its images in their order.

        Args:
            others: the other shards, in any order.
            out: run file to write; None keeps the run in memory.

        Raises:
            UserError: a run that is no shard, a shard of another run, one missing or twice, or a file that exists.
        """
        from certify.runs.shards import merge_shards

        return self._derived(merge_shards([self, *others], command="certify.Run.merge"), out)

    def save(self, path: str | Path) -> Run:
        """Write the run file and return the run that it holds.

        Raises:
            UserError: not a name of a run file (``.jsonl``), or the file exists.
            RunFault: it cannot be written.
        """
        return self._derived((self.header, self.images), path)

    def _derived(self, content: tuple[RunHeader, list[ImageRow]], out: str | Path | None) -> Run:
        """Return a run with this content, written to ``out`` unless that is None."""
        if out is None:
            return RunInMemory(self.path, *content)
        return Run.of(run_file.write_derived(new_run_file(out), *content))

    @classmethod
    def of(cls, run: run_file.Run) -> Run:
        """Return the same run with the methods of this class."""
        return cls(run.path, run.header, run.images, run.torn)

    def _summary(self) -> str:
        """Describe the run in one line: model, noise, images, and the share certified at a few radii."""
        header = self.header
        parts = [f"{header.model}, sigma = {exact(header.sigma)}, {len(self.images)} images"]
        if self.partial:
            parts.append(f"unfinished: {header.expected} expected")
        if self.omissions:
            parts.append(self.omissions)
        failures, trials = self.failures
        if failures:
            parts.append(f"{failures:,} of {trials:,} samples failed")
        if self.usable and not header.without_radii:
            from analysis.curves import curve, table_radii

            own, radii = curve(self), table_radii(self)[:4]
            shares = ", ".join(
                f"{floor_to(a, 3)} at {exact(r)}" for a, r in zip(own.accuracy(radii), radii, strict=True)
            )
            parts.append(f"{own.quantity} {shares} ({IN_WORDS[own.norm]} radius)")
        return printable("; ".join(parts))

    def __repr__(self) -> str:
        return f"<Run: {self._summary()}>"

    def _repr_html_(self) -> str:
        """Show the summary and the table in a notebook."""
        if not self.usable or self.header.without_radii:
            return f"<p>{html.escape(self._summary())}</p>"
        return f"<p>{html.escape(self._summary())}</p>{self.table()._repr_html_()}"


def require_radii(*runs: Run) -> None:
    """Refuse runs without radii.

    Raises:
        UserError: names the first of them.
    """
    for run in runs:
        if why := run.header.without_radii:
            raise UserError(f"{run.path} {why}; expected a run of certify.certify")


def check_radii(radii: Any) -> list[float]:
    """Return the radii of a table as floats.

    Raises:
        UserError: not a list of numbers from 0.
    """
    expected = "a list of numbers from 0, such as [0, 0.25, 0.5]"
    if isinstance(radii, str) or not isinstance(radii, Iterable) or getattr(radii, "ndim", 1) != 1:
        raise UserError(f"radii = {radii!r}: expected {expected}")
    found = [as_float(radius, "radius") for radius in radii]
    if not found or not all(0 <= radius < float("inf") for radius in found):
        raise UserError(f"radii = {radii!r}: expected {expected}")
    return found


class RunInMemory(Run):
    """A run without a file; its path only names it."""

    @property
    def origin(self) -> dict[str, str]:
        """Name, and hash of what the file would hold, for the record of what is derived from it."""
        lines = "".join(json.dumps(line.to_json()) + "\n" for line in (self.header, *self.images))
        return {"run": self.path.name, "sha256": hashlib.sha256(lines.encode()).hexdigest()}


def read_run(path: str | Path, *, allow_partial: bool = False) -> Run:
    """Read a run file.

    Args:
        path: of the file (``.jsonl``).
        allow_partial: accept an unfinished run; ``run.partial`` is then true.

    Returns:
        The run, whose rows have been checked: types, and votes that sum to the trials.

    Raises:
        UserError: a file that cannot be read, is not a run file, is damaged or of a newer version; an unfinished run,
            unless ``allow_partial``.
    """
    return Run.read(path, allow_partial=allow_partial)
