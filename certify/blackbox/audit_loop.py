"""Send the queries of an audit, in order, until every image is finished or the budget is spent.

Images are queried in order: the clean images of a chunk, then the noisy copies image by image, starting the next image
only if the current one leaves concurrency unused. When the budget is spent, earlier images are thus finished and little
was spent on later ones. One clean image is queried repeatedly at the start (a certificate requires a fixed function),
and some clean images again at the end. Certificates follow from the answers alone (:mod:`certify.blackbox.results`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from certify.blackbox.answers import (
    CLEAN,
    DRIFT,
    ESTIMATION,
    PROBE,
    RESUMED,
    SELECTION,
    LabelIndex,
    clean_answer,
    query_name,
    stage_of,
)
from certify.blackbox.determinism import probe_warnings, probes, require_deterministic, require_same_function
from certify.blackbox.encoding import encode, to_pictures
from certify.blackbox.plan import CHUNK, DENOISER_BATCH, DRIFT_IMAGES, Audit
from certify.blackbox.record import FINISHED, SPENT, AuditRecord, writing
from certify.blackbox.results import votes_of
from certify.blackbox.types import Answer, Client, Picture, Query
from certify.engine.adaptive import Sampling, settle
from certify.engine.monte_carlo import Job, Tally, noisy_copies
from certify.errors import BudgetSpent, RunFault, warn
from certify.smoothing.procedures import Sequential, draws_once
from certify.smoothing.rng import stream_key

MAX_DOWN = 10
"""Consecutive queries without a reply, or with an error status, after which an audit stops: the service is down, and
each further query would cost a trial. A reply without a label counts only as long as no reply had one."""


SAME_IMAGES = 3
"""Maximum number of clean images queried again when the audit of a Python function is resumed."""


class AuditClient:
    """Collect all answers by name, and stop when the service is down.

    Args:
        client: answers the queries; may be replaced by one with another budget.

    Attributes:
        answers: answers so far, by name.
    """

    def __init__(self, client: Client) -> None:
        self.answers: dict[str, Answer] = {}
        self.client = client
        self._down, self._sent, self._labelled = 0, 0, False

    @property
    def spent(self) -> int:
        """Requests sent so far."""
        return self.client.spent

    def __call__(self, queries: Iterable[Query]) -> Iterator[Answer]:
        """Yield the answers in the order of the queries.

        Raises:
            RunFault: ``MAX_DOWN`` consecutive queries had no reply, or an error status; or the first have no label.
        """
        for answer in self.client(queries):
            self.answers[answer.name] = answer
            self._down = self._down + 1 if answer.down and not answer.known else 0
            self._sent += not answer.known
            self._labelled = self._labelled or bool(answer.ranked)
            yield answer
            if self._down >= MAX_DOWN:
                raise RunFault(
                    f"{MAX_DOWN} queries in a row got no answer (the last: {answer.failure}); the audit stopped, every "
                    "answer is kept: the same command resumes when the service answers again"
                )
            if self._sent >= MAX_DOWN and not self._labelled:
                raise RunFault(
                    f"none of the first {self._sent} replies has a label (the last: {answer.failure}); the audit "
                    "stopped, every answer is kept: check the options of the protocol; the same command resumes"
                )


def send_queries(
    audit: Audit,
    record: AuditRecord,
    open_client: Callable[[int], Client],
    *,
    progress: Callable[[int], object] = lambda images: None,
) -> str:
    """Send all queries that have no answer yet, within the budget.

    Warns, before most of the budget is spent, if the determinism probe casts doubt on the service.

    Args:
        audit: the audit.
        record: result of :func:`~certify.blackbox.audit.prepare`.
        open_client: opens a client with the given budget.
        progress: called with the number of images finished since the last call.

    Returns:
        ``FINISHED``, or ``SPENT`` if the budget did not cover all queries.

    Raises:
        ContractError: the determinism probe returned different labels; no noisy copy was queried.
        OtherFunction: the Python function is not the one with which the audit began.
        RunFault: the service does not answer.
    """
    usable = [i for i, image in enumerate(record.images) if not image.error]
    reserved, status = min(len(usable), DRIFT_IMAGES) if audit.checked else 0, FINISHED
    client = AuditClient(open_client(max(0, audit.budget - reserved)))
    try:
        for start in range(0, len(usable), CHUNK):
            chunk = usable[start : start + CHUNK]
            if audit.clean:
                _query_clean(audit, client, chunk, alone=not start)
            if audit.checked and not start:
                if audit.spec.function is not None:
                    _check_function(audit, client, chunk)
                _probe(audit, client, chunk)
                probed = probes(client.answers, audit.class_map)
                require_deterministic(probed)
                for text in probe_warnings(probed):
                    warn(text)
            _sample(audit, client, chunk)
            progress(len(chunk))
    except BudgetSpent:
        status = SPENT
    try:
        if audit.checked:
            client.client = open_client(audit.budget)
            _check_drift(audit, client, usable)
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


def _query_clean(audit: Audit, ask: AuditClient, chunk: Sequence[int], *, alone: bool) -> None:
    """Query clean images, retrying those that failed in an earlier run; with ``alone`` the first one by itself."""
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
                skip = "; if only this image has no label, leave it out and choose another folder"
                raise RunFault(
                    f"the service gave no label for the first image: {answers[0].failure}; no other query was sent. "
                    f"The same command tries again{'' if answers[0].down else skip}"
                )
            todo = [i for i, answer in zip(todo, answers, strict=True) if not answer.ranked and answer.known]
            number += 1


def _check_function(audit: Audit, ask: AuditClient, chunk: Sequence[int]) -> None:
    """Repeat some clean queries of an earlier run, to detect that the Python function has changed."""
    before: dict[int, Answer] = {}
    for i in chunk:
        clean = clean_answer(ask.answers, audit.images.items[i].id)
        if clean is not None and clean.known and clean.ranked and len(before) < SAME_IMAGES:
            before[i] = clean
    number = ask.spent  # unique, since each such check sends requests
    queries = [Query(query_name(audit.images.items[i].id, RESUMED, number), _picture(audit, i)) for i in before]
    try:
        for (i, clean), now in zip(before.items(), ask(queries), strict=True):
            require_same_function(clean, now, audit.images.items[i].id, audit.class_map)
    except BudgetSpent:
        warn("the budget is spent: not checked whether this is the function with which the audit began")


def _probe(audit: Audit, ask: AuditClient, chunk: Sequence[int]) -> None:
    """Repeat the query of the image whose two best scores are closest, where randomness shows first."""

    def margin(index: int) -> float:
        answer = clean_answer(ask.answers, audit.images.items[index].id)
        if answer is None or not answer.ranked:
            return float("inf")
        first, *others = answer.ranked
        if first.score is None or not others or others[0].score is None:
            return float("1e300")
        return first.score - others[0].score

    index = min(chunk, key=margin)
    if margin(index) == float("inf"):
        return
    picture = _picture(audit, index)
    name = audit.images.items[index].id
    list(ask([Query(query_name(name, PROBE, k), picture) for k in range(audit.repeat_clean)]))


def _sample(audit: Audit, ask: AuditClient, chunk: Sequence[int]) -> None:
    """Query noisy copies of these images until each is decided or has n samples."""
    procedure, label_index = audit.settings.procedure, LabelIndex(audit.class_map)

    def has_reference(index: int) -> bool:
        """True if the image has a label for which it can be certified."""
        clean = clean_answer(ask.answers, audit.images.items[index].id)
        return audit.given is not None or (clean is not None and label_index.vote(clean.ranked) >= 0)

    def key(index: int, stage: str) -> bytes:
        return stream_key(audit.settings.seed, audit.images.items[index].id, stage)

    label = partial(_label_noisy, audit, ask, label_index)
    todo = [i for i in chunk if has_reference(i)]
    if not isinstance(procedure, Sequential):
        stages = procedure.stages.items()
        once = draws_once(procedure)
        jobs = (Job(audit.load(i), key(i, stage), n, once=once, tag=(i, stage)) for i in todo for stage, n in stages)
        for _ in label(jobs):
            pass
        return
    (stage,) = procedure.stages
    samplings = (Sampling(audit.load(i), key(i, stage), procedure.test(1, audit.noise), (i, stage)) for i in todo)
    for _ in settle(label, samplings, batch_size=audit.limits.concurrency, clean=False, in_order=True):
        pass


def _label_noisy(audit: Audit, ask: AuditClient, label_index: LabelIndex, jobs: Iterable[Job]) -> Iterator[Tally]:
    """Query the service on the noisy copies of all jobs; yield their tallies, with labels, in job order.

    The remote counterpart of :func:`certify.engine.monte_carlo.count_votes`: the noise is drawn in the same blocks, so
    a service yields the same votes as a local classifier that computes the same function. When the budget is spent, the
    answers of the current job are yielded as a shorter tally before the error is raised, because an anytime-valid rule
    can use them.

    Args:
        audit: the audit.
        ask: answers queries in order, within the budget.
        label_index: numbers the labels; grows with the answers.
        jobs: jobs with noise, pulled ahead of the answers; the tag is (image index, stage).

    Raises:
        BudgetSpent: the budget does not cover the next query.
        RunFault: a noise draw failed, so there is no image to query.
    """
    pending: deque[Job] = deque()

    def started() -> Iterator[Job]:
        for job in jobs:
            pending.append(job)
            yield job

    labels: list[int] = []
    answers = ask(_noisy_queries(audit, started()))
    while True:
        try:
            answer = next(answers)
        except StopIteration:
            return
        except BudgetSpent:
            if labels:
                yield _tally(labels)
            raise
        labels.append(label_index.vote(answer.ranked))
        if len(labels) == pending[0].trials:
            pending.popleft()
            yield _tally(labels)
            labels = []


def _noisy_queries(audit: Audit, jobs: Iterable[Job]) -> Iterator[Query]:
    """Yield the queries of all jobs; save the first noisy copy of each stream, before and after denoising."""
    numbers: dict[bytes, int] = {}  # samples of each stream so far
    for job, noisy, failed in noisy_copies(jobs, audit.noise):
        assert job.key is not None
        index, stage = job.tag
        name = audit.images.items[index].id
        if failed is not None and bool(failed.any()):
            raise RunFault(
                f"image {name}: a draw of the noise failed (less than once in 1e9 images); pass another seed"
            )
        for part in noisy.split(DENOISER_BATCH):
            for i, picture in enumerate(to_pictures(_denoise(audit, part))):
                number = numbers.setdefault(job.key, job.start)
                if number == 0:
                    _save(audit, index, "noisy", to_pictures(part[i : i + 1])[0])
                    if audit.denoiser is not None:
                        _save(audit, index, "denoised", picture)
                numbers[job.key] = number + 1
                yield Query(query_name(name, stage, number), picture)


@torch.no_grad()
def _denoise(audit: Audit, part: Tensor) -> Tensor:
    """Denoise up to ``DENOISER_BATCH`` noisy copies ``(B, C, H, W)``, padded to a batch of constant size."""
    if audit.denoiser is None:
        return part
    missing = DENOISER_BATCH - len(part)
    filled = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]) if missing else part
    return audit.pipeline.denoise(filled)[: len(part)]


def _tally(labels: list[int]) -> Tally:
    return Tally(votes_of(labels), torch.tensor(labels, dtype=torch.int64))


def _check_drift(audit: Audit, ask: AuditClient, usable: Sequence[int]) -> None:
    """Repeat some clean queries, evenly spaced, whenever noisy copies were queried since the last check."""
    ids = [(i, audit.images.items[i].id) for i in usable]
    begun = [(i, name) for i, name in ids if (a := clean_answer(ask.answers, name)) is not None and a.ranked]
    number = sum(stage_of(name) in (SELECTION, ESTIMATION) for name in ask.answers)
    chosen = begun[:: -(-len(begun) // DRIFT_IMAGES)] if begun else []
    list(ask(Query(query_name(name, DRIFT, number), _picture(audit, i)) for i, name in chosen))
