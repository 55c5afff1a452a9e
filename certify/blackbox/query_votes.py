"""Sample votes by queries: the remote counterpart of :func:`certify.engine.monte_carlo.count_votes`.

The noise is drawn in the same blocks as for a local classifier, so a service gives the same votes as a local classifier
that computes the same function. Between denoiser and service there is one more step, which belongs to the certified
function: clipping and rounding to 8 bits (:class:`certify.blackbox.encoding.AsSent`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from certify.blackbox.answers import LabelIndex, query_name
from certify.blackbox.encoding import to_pictures
from certify.blackbox.results import votes_of
from certify.blackbox.types import Answer, Picture, Query
from certify.engine.monte_carlo import Job, Tally, noisy_copies
from certify.errors import RunFault
from certify.models.query_access import BudgetSpent
from certify.types import Noise

TOGETHER = 32
"""Copies per batch of the denoiser; constant, so that rounding does not depend on how many copies are left."""

Ask = Callable[[Iterable[Query]], Iterator[Answer]]
Purify = Callable[[Tensor], Tensor]
Show = Callable[[str, Picture, Picture], None]


def label_remotely(
    jobs: Iterable[Job],
    *,
    ask: Ask,
    noise: Noise,
    index: LabelIndex,
    purify: Purify | None = None,
    show: Show = lambda image, noisy, sent: None,
) -> Iterator[Tally]:
    """Query the service on the noisy copies of all jobs; yield their tallies, with labels, in the order of the jobs.

    When the budget is spent, the answers of the current job are yielded as a shorter tally before the error is raised,
    because an anytime-valid rule may use them.

    Args:
        jobs: with noise; pulled ahead of the answers. The tag is image and stage, which name the queries.
        ask: answers queries in order, within the budget.
        noise: the smoothing distribution.
        index: numbers the labels; grows with the answers.
        purify: maps noisy copies ``(B, C, H, W)`` to the images that are sent, before clipping and rounding; None sends
            the noisy copies.
        show: called once per stream with the image's id, its first noisy copy, and that copy as sent.

    Raises:
        BudgetSpent: the budget does not cover the next query.
        RunFault: a draw of the noise failed, which no query can represent.
    """
    pending: deque[Job] = deque()

    def started() -> Iterator[Job]:
        for job in jobs:
            pending.append(job)
            yield job

    def queries() -> Iterator[Query]:
        numbers: dict[bytes, int] = {}  # samples of each stream so far
        for job, noisy, failed in noisy_copies(started(), noise):
            assert job.key is not None
            image, stage = job.tag
            if failed is not None and bool(failed.any()):
                raise RunFault(
                    f"image {image}: a draw of the noise failed (less than once in 1e9 images); pass another seed"
                )
            for part in noisy.split(TOGETHER):
                for i, picture in enumerate(to_pictures(_purified(part, purify))):
                    number = numbers.setdefault(job.key, job.start)
                    if number == 0:
                        show(image, to_pictures(part[i : i + 1])[0], picture)
                    numbers[job.key] = number + 1
                    yield Query(query_name(image, stage, number), picture)

    answers = ask(queries())
    labels: list[int] = []
    while True:
        try:
            answer = next(answers)
        except StopIteration:
            return
        except BudgetSpent:
            if labels:
                yield _tally(labels)
            raise
        labels.append(index.vote(answer.ranked))
        if len(labels) == pending[0].trials:
            pending.popleft()
            yield _tally(labels)
            labels = []


def _purified(part: Tensor, purify: Purify | None) -> Tensor:
    """Purify copies in batches of one size."""
    if purify is None:
        return part
    filled = torch.cat([part, part[-1:].expand(TOGETHER - len(part), -1, -1, -1)]) if len(part) < TOGETHER else part
    return purify(filled)[: len(part)]


def _tally(labels: list[int]) -> Tally:
    return Tally(votes_of(labels), torch.tensor(labels, dtype=torch.int64))
