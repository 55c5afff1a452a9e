"""Compute the results of an audit, and of its replay, from the answers: run file and ``audit.json``.

Certificates are computed only here, from the answers by query name, the images and labels in ``audit.json``, and the
settings in the run file's header; neither data nor model nor network is needed.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from certify.blackbox.answers import OUTSIDE, LabelIndex, class_of, clean_answer, numbered, stage_of
from certify.blackbox.determinism import drifts, fixed, probes
from certify.blackbox.ledger_contents import read_ledger
from certify.blackbox.record import (
    ABOUT,
    LEDGER,
    RUN,
    AuditImage,
    AuditRecord,
    Spent,
    read_about,
    write_about,
    write_rows,
)
from certify.blackbox.types import Answer
from certify.errors import UserError, warn
from certify.runs.identity import differences, unproven
from certify.runs.recompute import recomputed_header
from certify.runs.records import ImageRow, RunHeader
from certify.runs.run_file import Run, now, read_run
from certify.smoothing.procedures import AnswerKeys, Procedure, Sequential, needs_fixed_function
from certify.smoothing.rng import bound_draw
from certify.smoothing.sequential_tests import SequentialTest
from certify.types import ABSTAIN, FAILED, Radii, Votes


def rows_of(
    header: RunHeader, images: Sequence[AuditImage], answers: Mapping[str, Answer], index: LabelIndex
) -> list[ImageRow]:
    """Return the rows that follow from the answers, in the order of the images.

    An image that stopped early has a row if its stopping rule is anytime-valid (it is marked ``unfinished``, and is
    undecided, or certified as far as its votes allow), and none at a fixed n.

    Args:
        header: the run's header.
        images: the audit's images.
        answers: answers by query name.
        index: numbers the classes, in the order of these rows.
    """
    rows = (_row(header, image, answers, index) for image in images)
    return [row for row in rows if row is not None]


def _row(header: RunHeader, image: AuditImage, answers: Mapping[str, Answer], index: LabelIndex) -> ImageRow | None:
    name, given, procedure = image.id, image.given, header.procedure
    if image.error:
        return ImageRow.unusable(procedure, name, None, image.error)
    clean = clean_answer(answers, name)
    if clean is None and (given is None or needs_fixed_function(procedure)):
        return None
    base = FAILED if clean is None else index.vote(clean.ranked)
    if clean is not None and given is None and base < 0:
        why = clean.failure or "it has no label of the class map"
        reason = f"the service's own answer gives no reference label: {why}"
        return ImageRow.unusable(procedure, name, None, reason, clean.seconds)
    label = base if given is None else index.number(given)
    trials = _Trials(procedure, header.seed, name, answers, index, header.radii_for(image.numel))
    test = procedure.test(1, trials.noise) if isinstance(procedure, Sequential) else None
    keys = trials.fixed() if test is None else trials.sequential(test)
    if keys is None:
        return None
    row, names, used = ImageRow.of(name, label, keys), index.names, [*([clean] if clean else []), *trials.used]
    numbers = sorted({int(c) for c in (*row.votes, *row.selection)} | {c for c in (base, label) if c >= 0})
    return row.replace(
        outside=trials.labels[: row.trials].count(OUTSIDE),
        base=None if clean is None else max(base, ABSTAIN),
        class_name=None if row.abstained else names[row.prediction],
        base_class=names[base] if base >= 0 else None,
        classes={str(c): names[c] for c in numbers},
        image=image.image,
        size=image.numel,
        queries=len(used),
        seconds=round(sum(answer.seconds for answer in used), 6),
    )


@dataclass
class _Trials:
    """The answers about noisy copies of one image, counted as votes.

    Attributes:
        procedure: the run's procedure.
        seed: the run's seed.
        name: id of the image.
        answers: answers by query name.
        index: numbers the classes.
        noise: the smoothing distribution, which gives radii in its norm.
        used: answers used so far, in order.
        labels: labels of the last stage.
    """

    procedure: Procedure
    seed: int
    name: str
    answers: Mapping[str, Answer]
    index: LabelIndex
    noise: Radii
    used: list[Answer] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def _take(self, answers: Iterator[Answer], count: int) -> list[int]:
        """Use up to ``count`` further answers and return their labels."""
        piece = list(itertools.islice(answers, count))
        self.used += piece
        return [self.index.vote(answer.ranked) for answer in piece]

    def fixed(self) -> AnswerKeys | None:
        """Return the answer from the procedure's fixed number of samples; None if some are missing."""
        votes = {}
        for stage, n in self.procedure.stages.items():
            self.labels = self._take(numbered(self.answers, self.name, stage), n)
            if len(self.labels) < n:
                return None
            votes[stage] = votes_of(self.labels)
        uniform = bound_draw(self.seed, self.name)
        return self.procedure.record(self.procedure.answer(votes, self.noise, uniform)) | AnswerKeys(uniform=uniform)

    def sequential(self, test: SequentialTest) -> AnswerKeys | None:
        """Return the answer from the samples that the sequential test needs, as far as available; None without any."""
        (stage,) = self.procedure.stages
        remaining = numbered(self.answers, self.name, stage)
        while test.pending and (piece := self._take(remaining, test.pending)):
            self.labels += piece
            test.add(np.array(piece, dtype=np.int64))
        if not test.drawn:
            return None
        answer = self.procedure.record(test.result())
        return answer | AnswerKeys(drawn=test.drawn) | (AnswerKeys(unfinished=True) if test.pending else AnswerKeys())


def votes_of(labels: Sequence[int]) -> Votes:
    """Count labels as votes; negative ones are trials that vote for no class."""
    votes = [label for label in labels if label >= 0]
    return Votes(tuple(np.bincount(votes).tolist()) if votes else (), len(labels) - len(votes))


def conclude(
    folder: Path,
    header: RunHeader,
    record: AuditRecord,
    answers: Mapping[str, Answer],
    *,
    status: str,
    reason: str = "",
    sent: tuple[int, int] | None = None,
) -> AuditRecord:
    """Write run file and ``audit.json`` from the answers, and return the latter.

    Args:
        folder: the audit's folder.
        header: the run file's header.
        record: result of :func:`~certify.blackbox.audit.prepare`.
        answers: answers by query name.
        status: how the audit ended.
        reason: further explanation of ``status``, or empty.
        sent: numbers of requests and queries sent, including those without an answer; None counts the answers.

    Raises:
        RunFault: the files cannot be written.
    """
    index = LabelIndex(record.class_map)
    rows = rows_of(header, record.images, answers, index)
    write_rows(folder, header, rows)
    price = record.plan.price_per_1000
    place = {image.id: k for k, image in enumerate(record.images)}  # answers are in the order in which they arrived
    probed = sorted(probes(answers, record.class_map), key=lambda one: place.get(one.id, len(place)))
    drifted = sorted(drifts(answers, record.class_map), key=lambda one: place.get(one.id, len(place)))
    requests, queries = sent or (sum(answer.attempts for answer in answers.values()), len(answers))
    concluded = record.replace(
        finished=now(),
        status=status,
        reason=reason,
        vocabulary=index.names,
        images=[_with_answer(image, answers, record.class_map) for image in record.images],
        fixed_function=fixed(probed, drifted),
        determinism=probed,
        drift=drifted,
        asked=Spent(
            requests=requests,
            queries=dict(Counter(stage_of(name) for name in answers)),
            retries=requests - queries,
            failures=dict(Counter(answer.failure for answer in answers.values() if not answer.ranked)),
            cost=None if price is None else requests * price / 1000,
            seconds=_quantiles([answer.seconds for answer in answers.values() if answer.ranked]),
        ),
    )
    write_about(folder, concluded)
    return concluded


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return quantiles of response times in seconds, by name."""
    if not seconds:
        return {}
    return {name: float(np.quantile(seconds, q)) for name, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))}


def _with_answer(image: AuditImage, answers: Mapping[str, Answer], class_map: Mapping[str, str] | None) -> AuditImage:
    clean = clean_answer(answers, image.id)
    if clean is None:
        return image.replace(reference=image.given, answer=[], failure="not asked")
    return image.replace(
        reference=image.given or class_of(clean.ranked, class_map),
        answer=[[one.label, one.score] for one in clean.ranked],
        failure=clean.failure,
    )


@dataclass(frozen=True)
class Replayed:
    """The certificates that follow from the answers in a folder.

    Attributes:
        run: the certificates, with the path of the run file with which they were compared.
        differing: ids of images whose certificate in the run file differs; empty at another alpha or bound.
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
) -> Replayed:
    """Recompute the certificates of an audit from its ledger, ``audit.json`` and the run file's header.

    At another alpha, an image with early stopping is decided by the samples it has, or undecided. Warns if the run file
    does not prove that one denoiser was used throughout.

    Args:
        folder: the audit's folder.
        alpha: failure probability per image; None keeps the audit's.
        bound: name of a bound; None keeps the audit's.
        answers: answers by query name, if already read.
        command: command to record in the header.

    Raises:
        UserError: no such folder, a damaged file, a run file and an ``audit.json`` of different denoisers, or a bound
            that is invalid for the way in which the votes were sampled.
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
        header.procedure.changed(header.alpha, header.bound, recorded.path)  # raises for an unsupported bound
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
    """True if both rows contain the same certificate."""
    if before is None or now is None:
        return before is now
    a, b = _comparable(before), _comparable(now)
    numbers = zip(_derived(before), _derived(now), strict=True)
    return a == b and all(
        old == new or bool(old and new and math.isclose(old, new, rel_tol=1e-6)) for old, new in numbers
    )


def _derived(row: ImageRow) -> tuple[float | None, ...]:
    """Return the numbers computed from votes; versions may round them differently, by less than 1e-6."""
    return row.radius, row.p_lower, row.p_other, row.p_value


def _comparable(row: ImageRow) -> ImageRow:
    """Return the rest of a row, with class names in place of numbers, which depend on earlier rows."""
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
