"""Defences by conditions, from a comparison's file: accuracies with intervals, and pairs on the same images.

Conditions belong to groups that never share a column: images that nobody attacked (``plain``), attacks that never saw
the purifier (``blind``), attacks on the whole defended classifier (``adaptive``), and certificates (``certified``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from analysis.comparison.sandwich import Crossing, require_none
from certify.runs.records import ImageRow, Outcome, RunHeader
from certify.runs.run_file import ComparisonRun, Run

GROUPS = {"plain": "no attack", "blind": "purifier-blind", "adaptive": "adaptive", "certified": "certified"}
"""Groups of conditions, in the order of the table, in words."""


@dataclass(frozen=True)
class Condition:
    """What is done to the images before a defence answers.

    Attributes:
        name: ``clean``, ``random noise``, or an attack's.
        group: one of ``GROUPS``.
    """

    name: str
    group: str

    @property
    def short(self) -> str:
        """Its name beside its group's: ``pgd`` for ``blind-pgd``."""
        return self.name.removeprefix(f"{self.group}-")

    @property
    def attacked(self) -> bool:
        """True for attacks, whose accuracies are upper bounds on the accuracy under the worst attack."""
        return self.group in ("blind", "adaptive")

    @property
    def key(self) -> str:
        """As it stands in the file: the same attack may be blind in one column and adaptive in another."""
        return self.name if self.group == "plain" else f"{self.group}: {self.name}"


WORST = Condition("worst", "adaptive")
"""Not run but found: each image under whichever adaptive attack leaves the least."""


@dataclass(frozen=True)
class Cell:
    """One defence under one condition.

    Attributes:
        images: how many were judged.
        right: the sum over images of the share of answers that were right.
        worst: images for which every answer was right.
        repeats: answers an image, at most; more than one where the defence draws random numbers.
        failed: why there is no figure, or empty.
        queries: of the attack, an image, on average.
        seconds: an image, on average, of the answers alone.
    """

    images: int
    right: float
    worst: int
    repeats: int
    failed: str = ""
    queries: float = 0.0
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """Share of right answers, averaged over images and repeats."""
        return self.right / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval over images (conservative where an image has several answers)."""
        return wilson(self.right, self.images)


def wilson(successes: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (statsmodels)."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(successes, total, alpha=0.05, method="wilson")
    return max(0.0, float(low)), min(1.0, float(high))


@dataclass(frozen=True)
class Pair:
    """Two defences on the same images.

    Attributes:
        better: images that only the first gets right.
        worse: images that only the second gets right.
        images: in common.
        p_value: McNemar's exact test of "equally often", two-sided.
    """

    better: int
    worse: int
    images: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """A comparison's file, read.

    Attributes:
        run: header and outcomes.
    """

    run: ComparisonRun

    @property
    def defences(self) -> list[str]:
        """In the order they were named."""
        return [d.named for d in self.run.header.defences]

    @property
    def conditions(self) -> list[Condition]:
        """In the order of the table."""
        return [Condition(c.name, c.group) for c in self.run.header.conditions]

    @cached_property
    def _rows(self) -> dict[tuple[str, str], list[Outcome]]:
        found: dict[tuple[str, str], list[Outcome]] = {}
        for row in self.run.images:
            found.setdefault((row.defence, row.condition), []).append(row)
        return found

    def cell(self, defence: str, condition: Condition) -> Cell | None:
        """The figure, or None where nothing was run."""
        if condition == WORST:
            return self._worst(defence)
        rows = self._rows.get((defence, condition.key), [])
        if not rows:
            return None
        usable = [row for row in rows if row.error is None]
        failed = next((row.error for row in rows if row.error is not None), "")
        shares = [_share(row) for row in usable]
        return Cell(
            images=len(usable),
            right=sum(shares),
            worst=sum(share == 1 for share in shares),
            repeats=max((len(row.answers) for row in usable), default=0),
            failed=failed,
            queries=_mean(row.queries or 0 for row in usable),
            seconds=_mean(row.seconds or 0.0 for row in usable),
        )

    @property
    def columns(self) -> list[Condition]:
        """The conditions; after several adaptive ones the worst of them, image by image."""
        adaptive = [c for c in self.conditions if c.group == "adaptive"]
        if len(adaptive) < 2:
            return self.conditions
        place = self.conditions.index(adaptive[-1]) + 1
        return [*self.conditions[:place], WORST, *self.conditions[place:]]

    def _worst(self, defence: str) -> Cell | None:
        """Each image under the adaptive attack that leaves the least of it."""
        found = [self.cell(defence, c) for c in self.conditions if c.group == "adaptive"]
        cells = [cell for cell in found if cell is not None]
        if len(cells) < len(found) or not cells:
            return None
        shares: dict[str, list[float]] = {}
        for c in self.conditions:
            if c.group == "adaptive":
                for row in self._rows[defence, c.key]:
                    if row.error is None:
                        shares.setdefault(row.image, []).append(_share(row))
        least = [min(given) for given in shares.values() if len(given) == len(found)]  # attacked by all of them
        failed = next((cell.failed for cell in cells if cell.failed), "")
        if not least and not failed:
            return None
        return Cell(len(least), sum(least), sum(s == 1 for s in least), max(c.repeats for c in cells), failed)

    def notes(self, defence: str, condition: Condition) -> dict[str, int]:
        """What an attack had to say about gradients, and about how many images.

        Not that it found nothing, which is the figure itself, nor how far away an image was, another text for each.
        """
        notes = (row.note or "" for row in self._rows.get((defence, condition.key), []))
        return Counter(note for note in notes if "gradients" in note)

    def pair(self, first: str, second: str, condition: Condition) -> Pair | None:
        """The two on the same images, if neither failed; an image counts as right where most of its answers are."""
        from statsmodels.stats.contingency_tables import mcnemar

        cells = [self.cell(name, condition) for name in (first, second)]
        if any(cell is None or cell.failed for cell in cells):
            return None
        a, b = (self._most(name, condition) for name in (first, second))
        common = a.keys() & b.keys()
        if not common:
            return None
        better = sum(a[i] and not b[i] for i in common)
        worse = sum(b[i] and not a[i] for i in common)
        test = mcnemar([[0, better], [worse, 0]], exact=True)
        return Pair(better, worse, len(common), min(1.0, float(test.pvalue)))

    def _certificates(self) -> Iterator[tuple[Run, list[Crossing]]]:
        """For each defence that has certificates: those, and what was found inside of them."""
        for (defence, condition), rows in self._rows.items():
            if not condition.startswith("certified: "):
                continue
            held = [
                ImageRow.from_json({"id": row.image, "prediction": row.answers[0], "radius": row.radius})
                for row in rows
                if row.error is None
            ]
            met = [
                Crossing(row.image, "l2", row.crossing.distance, row.crossing.prediction, row.crossing.alpha)
                for row in self.run.images
                if row.defence == defence and row.crossing is not None
            ]
            about = {"norm": "l2", "alpha": self.run.header.alpha, "expected": len(held)}
            yield Run(self.run.path, RunHeader.from_json(about), held), met

    def require_sound(self) -> None:
        """Stop where an attack refutes a certificate: no picture of such figures.

        Raises:
            RunFault: names image, radius and distance of each.
        """
        for run, met in self._certificates():
            require_none(run, met)

    def _most(self, defence: str, condition: Condition) -> dict[str, bool]:
        rows = self._rows.get((defence, condition.key), [])
        return {row.image: _share(row) > 0.5 for row in rows if row.error is None}


def _share(row: Outcome) -> float:
    return row.answers.count(row.label) / len(row.answers)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
