"""Results of a comparison, from its file: accuracies with intervals, and paired tests on the same images.

Conditions belong to groups that never share a column: no attack (``plain``), attacks that do not know the purifier
(``blind``), attacks on the whole defended classifier (``adaptive``), and certificates (``certified``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from analysis.comparison.sandwich import Crossing, require_none
from certify.results import Plot, Table, data_frame
from certify.runs.comparison_records import DefenceRecord, Outcome
from certify.runs.records import ImageRow, RunHeader
from certify.runs.run_file import ComparisonRun, Run
from certify.text import printable
from certify.types import UNDECIDED

if TYPE_CHECKING:
    import pandas

GROUPS = {"plain": "no attack", "blind": "purifier-blind", "adaptive": "adaptive", "certified": "certified"}
"""Groups of conditions in the order of the table, with their display names."""


@dataclass(frozen=True)
class Condition:
    """A treatment of the images before a defence classifies them.

    Attributes:
        name: ``clean``, ``random noise``, or the name of an attack.
        group: one of ``GROUPS``.
    """

    name: str
    group: str

    @property
    def short(self) -> str:
        """The name beside that of the group: ``pgd`` for ``blind-pgd``."""
        return self.name.removeprefix(f"{self.group}-")

    @property
    def attacked(self) -> bool:
        """True for attacks, whose accuracies are upper bounds on the accuracy under the worst attack."""
        return self.group in ("blind", "adaptive")

    @property
    def key(self) -> str:
        """Name in the file, where the same attack may be blind in one column and adaptive in another."""
        return self.name if self.group == "plain" else f"{self.group}: {self.name}"


WORST = Condition("worst", "adaptive")
"""Each image under the adaptive attack with the lowest accuracy on it; computed from the others."""


def outcome_id(image: str, defence: str, condition: str) -> str:
    """Return the key of a line of the file."""
    return f"{image} | {defence} | {condition}"


@dataclass(frozen=True)
class Cell:
    """One defence under one condition.

    Attributes:
        images: number of images evaluated.
        right: sum over images of the share of correct answers.
        worst: number of images with only correct answers (worst case over repeats).
        repeats: maximum number of answers per image; above 1 if the defence is random.
        failed: why there is no result, or empty.
        queries: mean number of the attack's queries per image.
        seconds: mean time per image, of the answers alone.
        undecided: number of images left undecided by the samples, for certificates.
    """

    images: int
    right: Fraction
    worst: int
    repeats: int
    failed: str = ""
    queries: float = 0.0
    seconds: float = 0.0
    undecided: int = 0

    @property
    def accuracy(self) -> float:
        """Share of correct answers, averaged over images and repeats."""
        return float(self.right / self.images)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval over images (conservative if an image has several answers)."""
        return wilson(float(self.right), self.images)


def wilson(successes: float, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion; ``successes`` may be fractional."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(successes, total, alpha=0.05, method="wilson")
    return max(0.0, float(low)), min(1.0, float(high))


@dataclass(frozen=True)
class Pair:
    """Two defences on the same images.

    Attributes:
        better: images that only the first classifies correctly.
        worse: images that only the second classifies correctly.
        images: number of common images.
        p_value: McNemar's exact two-sided test of equal accuracy.
    """

    better: int
    worse: int
    images: int
    p_value: float


@dataclass(frozen=True, repr=False)
class Comparison:
    """A comparison of defences, finished or not.

    ``len(comparison)`` and iteration give a row per image, defence and condition, with ``image``, ``defence``,
    ``condition``, ``label``, ``answers``, the distances ``l2`` and ``linf`` in [0, 1] pixels, and ``queries``.

    Attributes:
        run: header and rows, as in the file.
    """

    run: ComparisonRun

    @property
    def rows(self) -> list[Outcome]:
        """A row per image, defence and condition."""
        return self.run.images

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Outcome]:
        return iter(self.rows)

    def table(self, *, style: str = "text") -> Table:
        """Return the tables of ``certify compare``: accuracies with 95 % intervals, costs, and paired tests.

        Args:
            style: ``"text"``, ``"markdown"``, ``"latex"`` or ``"csv"``.

        Raises:
            UserError: an unknown style.
        """
        from analysis.comparison.tables import tabulate_comparison

        return Table(tabulate_comparison(self, style))

    def plot(self, path: str | Path | None = None) -> Plot:
        """Draw the accuracies with their 95 % intervals, and return the plot.

        Args:
            path: picture to write (.png, .svg or .pdf); None writes none.

        Raises:
            UserError: an unsupported format.
            RunFault: the file cannot be written.
        """
        from analysis.comparison.plot import draw_comparison

        return Plot(draw_comparison(self, path))

    def to_pandas(self) -> pandas.DataFrame:
        """Return a data frame with a row per defence and condition: accuracy, its interval, queries, seconds.

        Raises:
            UserError: pandas is not installed.
        """
        from analysis.comparison.tables import records

        return data_frame(records(self), ["defence", "group", "condition"])

    def __repr__(self) -> str:
        header = self.run.header
        unfinished = f", unfinished: {len(self)} of {header.expected} outcomes" if self.run.partial else ""
        names = f"defences {', '.join(self.defences)}; {', '.join(c.key for c in self.conditions)}"
        ball = f"{header.norm} distance {header.eps_text}"
        return printable(f"<Comparison: {header.model} on {header.data}, {ball}; {names}{unfinished}>")

    def _repr_html_(self) -> str:
        """Show the tables in a notebook."""
        return self.table()._repr_html_()

    @property
    def defences(self) -> list[str]:
        """Names of the defences, in the order they were given."""
        return [d.named for d in self.run.header.defences]

    def about(self, defence: str) -> DefenceRecord:
        """Return the header's record of a defence."""
        return next(d for d in self.run.header.defences if d.named == defence)

    @property
    def conditions(self) -> list[Condition]:
        """Conditions in the order of the table."""
        return [Condition(c.name, c.group) for c in self.run.header.conditions]

    @cached_property
    def _outcomes(self) -> dict[tuple[str, str], list[Outcome]]:
        groups: dict[tuple[str, str], list[Outcome]] = {}
        for row in self.run.images:
            groups.setdefault((row.defence, row.condition), []).append(row)
        return groups

    def _usable(self, defence: str, condition: Condition) -> list[Outcome]:
        """Return the outcomes of a cell that have answers."""
        return [o for o in self._outcomes.get((defence, condition.key), ()) if o.error is None]

    def cell(self, defence: str, condition: Condition | str) -> Cell | None:
        """Return the result of a defence under a condition (or its key: ``"adaptive: square"``); None without one."""
        if isinstance(condition, str):
            condition = next((c for c in self.columns if condition == c.key), Condition(condition, "plain"))
        if condition == WORST:
            return self._worst(defence)
        outcomes = self._outcomes.get((defence, condition.key), [])
        if not outcomes:
            return None
        usable = self._usable(defence, condition)
        return Cell(
            images=len(usable),
            right=sum(map(_share, usable), Fraction()),
            worst=sum(_share(o) == 1 for o in usable),
            repeats=max((len(o.answers) for o in usable), default=0),
            failed=next((o.error for o in outcomes if o.error is not None), ""),
            queries=fmean(o.queries or 0 for o in usable) if usable else 0.0,
            seconds=fmean(o.seconds or 0.0 for o in usable) if usable else 0.0,
            undecided=sum(o.outcome == UNDECIDED for o in usable),
        )

    @property
    def columns(self) -> list[Condition]:
        """The conditions, with :data:`WORST` after several adaptive ones."""
        adaptive = [c for c in self.conditions if c.group == "adaptive"]
        if len(adaptive) < 2:
            return self.conditions
        place = self.conditions.index(adaptive[-1]) + 1
        return [*self.conditions[:place], WORST, *self.conditions[place:]]

    def _worst(self, defence: str) -> Cell | None:
        """Combine the adaptive attacks: for each image the attack with the lowest accuracy on it."""
        adaptive = [c for c in self.conditions if c.group == "adaptive"]
        cells = [cell for c in adaptive if (cell := self.cell(defence, c)) is not None]
        if len(cells) < len(adaptive) or not cells:
            return None
        shares: dict[str, list[Fraction]] = {}
        for c in adaptive:
            for o in self._usable(defence, c):
                shares.setdefault(o.image, []).append(_share(o))
        least = [min(each) for each in shares.values() if len(each) == len(adaptive)]  # attacked by all of them
        failed = next((cell.failed for cell in cells if cell.failed), "")
        if not least and not failed:
            return None
        return Cell(
            len(least), sum(least, Fraction()), sum(s == 1 for s in least), max(c.repeats for c in cells), failed
        )

    def notes(self, defence: str, condition: Condition) -> dict[str, int]:
        """Count the images of each remark about gradients; other remarks repeat what the table shows."""
        outcomes = self._outcomes.get((defence, condition.key), [])
        return Counter(o.note for o in outcomes if o.note and "gradients" in o.note)

    def pair(self, first: str, second: str, condition: Condition) -> Pair | None:
        """Compare two defences on the same images, unless one failed; an image counts as correct by majority."""
        from statsmodels.stats.contingency_tables import mcnemar

        cells = [self.cell(name, condition) for name in (first, second)]
        if any(cell is None or cell.failed for cell in cells):
            return None
        a, b = ({o.image: _share(o) > 0.5 for o in self._usable(name, condition)} for name in (first, second))
        common = a.keys() & b.keys()
        if not common:
            return None
        better = sum(a[i] and not b[i] for i in common)
        worse = sum(b[i] and not a[i] for i in common)
        test = mcnemar([[0, better], [worse, 0]], exact=True)
        return Pair(better, worse, len(common), min(1.0, float(test.pvalue)))

    def _certificates(self) -> Iterator[tuple[Run, list[Crossing]]]:
        """Yield the certificates of each defence as a run, with the predictions at attacked images within them."""
        for (defence, condition), outcomes in self._outcomes.items():
            if not condition.startswith("certified: "):
                continue
            certificates = [
                ImageRow.from_json({"id": o.image, "prediction": o.answers[0], "radius": o.radius})
                for o in outcomes
                if o.error is None
            ]
            crossings = [
                Crossing(o.image, "l2", o.crossing.distance, o.crossing.prediction, o.crossing.alpha)
                for o in self.run.images
                if o.defence == defence and o.crossing is not None
            ]
            header = {"norm": "l2", "alpha": self.run.header.alpha, "expected": len(certificates)}
            yield Run(self.run.path, RunHeader.from_json(header), certificates), crossings

    def require_sound(self) -> None:
        """Check that no attack refutes a certificate.

        Raises:
            RunFault: some are refuted; the message names image, radius and distance of each.
        """
        for run, crossings in self._certificates():
            require_none(run, crossings)


def _share(outcome: Outcome) -> Fraction:
    """Return the share of correct answers, which adds up without rounding errors."""
    return Fraction(list(outcome.answers).count(outcome.label), len(outcome.answers))
