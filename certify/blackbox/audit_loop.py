"""What an audit asks, in which order, and when it stops.

The order is that of the images: of a few at a time the service's own answers, then the noisy copies of one image after
another, of a second one only where the first does not keep all threads busy. So when the budget is spent, the images
before are finished, and little went into others. The same clean image is asked about several times at the start (a
certificate presupposes a fixed function), and some clean images once more at the end. Nothing is concluded here: that
follows from the answers alone (:mod:`certify.blackbox.results`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from certify.blackbox.answer_rows import clean_answer
from certify.blackbox.determinism import probes, require_deterministic
from certify.blackbox.encoding import encode, to_pictures
from certify.blackbox.label_index import Vocabulary
from certify.blackbox.plan import CHUNK, DRIFT_IMAGES, Audit
from certify.blackbox.query_votes import (
    CLEAN,
    DRIFT,
    ESTIMATION,
    PROBE,
    SELECTION,
    label_remotely,
    query_name,
    stage_of,
)
from certify.blackbox.results import FINISHED, SPENT, writing
from certify.blackbox.types import Answer, Client, Picture, Query
from certify.engine.adaptive import Sampling, settle
from certify.engine.monte_carlo import Job
from certify.errors import RunFault
from certify.models.query_access import BudgetSpent
from certify.runs.records import RunHeader
from certify.smoothing.rng import stream_key

PATIENCE = 10
"""Queries in a row without a reply, or with an error status, after which an audit stops: the service is down, and each
costs a trial. A reply without a label is an answer, however many there are."""


class Patient:
    """Keeps all answers so far, by name, and gives up when a service has gone silent.

    Args:
        asking: what asks; may be set later.
    """

    def __init__(self, asking: Client | None = None) -> None:
        self.answers: dict[str, Answer] = {}
        self.asking = asking
        self._silent = 0

    @property
    def spent(self) -> int:
        """Requests sent so far."""
        assert self.asking is not None
        return self.asking.spent

    def __call__(self, queries: Iterable[Query]) -> Iterator[Answer]:
        """Their answers, in the order of the queries.

        Raises:
            RunFault: ``PATIENCE`` of them in a row got no reply, or an error status.
        """
        assert self.asking is not None
        for answer in self.asking(queries):
            self.answers[answer.name] = answer
            self._silent = self._silent + 1 if answer.down and not answer.known else 0
            yield answer
            if self._silent >= PATIENCE:
                raise RunFault(
                    f"{PATIENCE} queries in a row got no answer (the last: {answer.failure}); the audit stopped, every "
                    "answer is kept: the same command goes on when the service answers again"
                )


def drive(
    audit: Audit,
    header: RunHeader,
    about: Mapping[str, Any],
    open_asking: Callable[[int], AbstractContextManager[Client]],
    *,
    progress: Callable[[int], None] = lambda images: None,
    probed: Callable[[Mapping[str, Answer]], None] = lambda answers: None,
) -> str:
    """Ask whatever is not answered yet, within the budget.

    Args:
        audit: what is to be done.
        header: of the run file.
        about: of :func:`prepare`.
        open_asking: opens the ledger, with this budget.
        progress: told how many further images are done with.
        probed: gets the answers once the determinism probe is over, before most of the budget is spent.

    Returns:
        ``FINISHED``, or ``SPENT`` where the budget did not cover everything.

    Raises:
        ContractError: the determinism probe got different labels; no noisy copy was queried.
        RunFault: the service does not answer.
    """
    asked, usable = Patient(), [i for i, image in enumerate(about["images"]) if not image["error"]]
    kept, status = min(len(usable), DRIFT_IMAGES), FINISHED
    try:
        with open_asking(max(0, audit.budget - kept)) as asked.asking:
            for start in range(0, len(usable), CHUNK):
                chunk = usable[start : start + CHUNK]
                _ask_clean(audit, asked, chunk, alone=not start)
                if not start:
                    _ask_again(audit, asked, chunk)
                    require_deterministic(probes(asked.answers, audit.class_map))
                    probed(asked.answers)
                _sample(audit, asked, header, chunk)
                progress(len(chunk))
    except BudgetSpent:
        status = SPENT
    try:
        with open_asking(audit.budget) as asked.asking:
            _ask_at_the_end(audit, asked, usable)
    except BudgetSpent:
        status = SPENT
    return status


def _picture(audit: Audit, index: int) -> Picture:
    return to_pictures(audit.load(index)[None])[0]


def _save(audit: Audit, index: int, kind: str, picture: Picture) -> None:
    path = audit.folder / "pictures" / f"{index:03d}-{kind}.png"
    if not path.exists():
        with writing(path):
            path.write_bytes(encode(picture))


def _ask_clean(audit: Audit, ask: Patient, chunk: Sequence[int], *, alone: bool) -> None:
    """The service's own answers; what failed in an earlier run is asked once more. The first is asked alone."""
    groups = [chunk[:1], chunk[1:]] if alone else [chunk]
    for group in groups:
        todo, number = list(group), 0
        while todo:
            queries = []
            for i in todo:
                picture = _picture(audit, i)
                _save(audit, i, "clean", picture)
                queries.append(Query(query_name(audit.images.items[i].id, CLEAN, number), picture))
            answers = list(ask(queries))
            if alone and group is groups[0] and not answers[0].ranked and not answers[0].known:
                skip = "; where it has none for this image alone, begin behind it: --start, and another --out"
                raise RunFault(
                    f"the service gave no label for the first image: {answers[0].failure}; nothing else was asked. The "
                    f"same command tries again{'' if answers[0].down else skip}"
                )
            todo = [i for i, answer in zip(todo, answers, strict=True) if not answer.ranked and answer.known]
            number += 1


def _ask_again(audit: Audit, ask: Patient, chunk: Sequence[int]) -> None:
    """The determinism probe, on the image whose two best scores are nearest: there a wavering service shows first."""

    def margin(index: int) -> float:
        found = clean_answer(ask.answers, audit.images.items[index].id)
        if found is None or not found.ranked:
            return float("inf")
        first, *others = found.ranked
        if first.score is None or not others or others[0].score is None:
            return float("1e300")
        return first.score - others[0].score

    index = min(chunk, key=margin)
    if margin(index) == float("inf"):
        return
    picture = _picture(audit, index)
    name = audit.images.items[index].id
    list(ask([Query(query_name(name, PROBE, k), picture) for k in range(audit.repeat_clean)]))


def _sample(audit: Audit, ask: Patient, header: RunHeader, chunk: Sequence[int]) -> None:
    """Noisy copies of these images, until each is settled or at n."""
    procedure, vocabulary = audit.settings.procedure, Vocabulary(audit.class_map)
    pipeline = audit.pipeline
    places = {audit.images.items[i].id: i for i in chunk}

    def purify(images: Tensor) -> Tensor:
        with torch.no_grad():
            return pipeline.denoise(images)

    def show(image: str, noisy: Picture, sent: Picture) -> None:
        _save(audit, places[image], "noisy", noisy)
        if audit.denoiser is not None:
            _save(audit, places[image], "denoised", sent)

    def key(name: str, stage: str) -> bytes:
        return stream_key(audit.settings.seed, name, stage)

    def referred(index: int) -> bool:
        """Whether there is a label to certify it for."""
        clean = clean_answer(ask.answers, audit.images.items[index].id)
        return audit.given is not None or (clean is not None and vocabulary.vote(clean.ranked) >= 0)

    label = partial(
        label_remotely,
        ask=ask,
        noise=audit.noise,
        vocabulary=vocabulary,
        purify=purify if audit.denoiser is not None else None,
        show=show,
    )
    names = [(i, audit.images.items[i].id) for i in chunk if referred(i)]
    if not procedure.sequential:
        stages = procedure.stages.items()
        jobs = (Job(audit.load(i), key(name, k), n, tag=(name, k)) for i, name in names for k, n in stages)
        for _ in label(jobs):
            pass
        return
    (stage,) = procedure.stages
    samplings = (
        Sampling(audit.load(i), key(name, stage), procedure.tests(1, audit.noise, 0)[stage], (name, stage))
        for i, name in names
    )
    for _ in settle(label, samplings, batch_size=audit.concurrency, clean=False, in_order=True):
        pass


def _ask_at_the_end(audit: Audit, ask: Patient, usable: Sequence[int]) -> None:
    """Clean images once more, spread over those that were begun; anew whenever further noise was asked about."""
    ids = [(i, audit.images.items[i].id) for i in usable]
    begun = [(i, name) for i, name in ids if (a := clean_answer(ask.answers, name)) is not None and a.ranked]
    number = sum(stage_of(name) in (SELECTION, ESTIMATION) for name in ask.answers)
    chosen = begun[:: -(-len(begun) // DRIFT_IMAGES)] if begun else []
    list(ask(Query(query_name(name, DRIFT, number), _picture(audit, i)) for i, name in chosen))
