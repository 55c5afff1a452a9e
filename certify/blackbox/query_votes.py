"""Noise jobs -> queries -> votes: the remote counterpart of :func:`certify.engine.monte_carlo.count_votes`.

The noise is drawn by the same blocks as for a local classifier, so a service that computes what a local classifier
computes gives the same votes. Between denoiser and service there is one more step, which belongs to what is certified:
clipping and rounding to 8 bits. :class:`AsSent` puts that step in front of a local classifier.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from certify.blackbox.encoding import seen, to_pictures, to_tensor
from certify.blackbox.label_index import Vocabulary
from certify.blackbox.types import Answer, Picture, Query
from certify.engine.monte_carlo import Job, Tally, noisy_copies
from certify.errors import RunFault
from certify.models.query_access import BudgetSpent
from certify.types import BaseClassifier, Noise, Votes

CLEAN, PROBE, DRIFT, SELECTION, ESTIMATION = "clean", "probe", "drift", "selection", "estimation"
"""Stages: the service's own answer, the same again at once, the same again at the end; and the two of the noise."""

TOGETHER = 32
"""Copies that are denoised at once: always as many, so that rounding does not depend on how many there are."""

Ask = Callable[[Iterable[Query]], Iterator[Answer]]
Purify = Callable[[Tensor], Tensor]
Show = Callable[[str, Picture, Picture], None]


def query_name(image: str, stage: str, number: int | str) -> str:
    """The name of a query, unique within an audit."""
    return f"{image} | {stage} | {number}"


def parts_of(name: str) -> tuple[str, str, str]:
    """Image, stage and number that a query's name says; empty where it says none."""
    image, stage, number = [*name.rsplit(" | ", 2), "", ""][:3]
    return image, stage, number


def stage_of(name: str) -> str:
    """The stage that a query's name says."""
    return parts_of(name)[1]


def label_remotely(
    jobs: Iterable[Job],
    *,
    ask: Ask,
    noise: Noise,
    vocabulary: Vocabulary,
    purify: Purify | None = None,
    show: Show = lambda image, noisy, sent: None,
) -> Iterator[Tally]:
    """Ask about the noisy copies of all jobs; their tallies, in the order of the jobs, with every label.

    When the budget is spent, what came of the job in work is handed out as a shorter tally before the error is raised:
    an anytime-valid rule may use it.

    Args:
        jobs: with noise; pulled ahead of the answers. The tag is the image and the stage, which name the queries.
        ask: within the budget, in order.
        noise: the smoothing distribution.
        vocabulary: grows with the answers.
        purify: noisy copies ``(B, C, H, W)`` to what is sent, before clipping and rounding; None: the noisy ones.
        show: called with image, first noisy copy and what was sent of it, once a stream.

    Raises:
        BudgetSpent: the budget does not cover the next query.
        RunFault: a draw of the noise failed, which no query can stand for.
    """
    due: deque[Job] = deque()

    def noted() -> Iterator[Job]:
        for job in jobs:
            due.append(job)
            yield job

    def queries() -> Iterator[Query]:
        at: dict[bytes, int] = {}  # samples of each stream so far
        for job, noisy, failed in noisy_copies(noted(), noise):
            assert job.key is not None
            image, stage = job.tag
            if failed is not None and bool(failed.any()):
                raise RunFault(
                    f"image {image}: a draw of the noise failed (less than once in 1e9 images); pass a --seed"
                )
            for part in noisy.split(TOGETHER):
                for i, picture in enumerate(to_pictures(_whole(part, purify))):
                    number = at.setdefault(job.key, job.start)
                    if number == 0:
                        show(image, to_pictures(part[i : i + 1])[0], picture)
                    at[job.key] = number + 1
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
        labels.append(vocabulary.vote(answer.ranked))
        if len(labels) == due[0].trials:
            due.popleft()
            yield _tally(labels)
            labels = []


def _whole(part: Tensor, purify: Purify | None) -> Tensor:
    """What is sent of these copies, purified in batches of one size."""
    if purify is None:
        return part
    filled = torch.cat([part, part[-1:].expand(TOGETHER - len(part), -1, -1, -1)]) if len(part) < TOGETHER else part
    return purify(filled)[: len(part)]


def _tally(labels: list[int]) -> Tally:
    found = torch.tensor(labels, dtype=torch.int64)
    return Tally(votes_of(labels), found)


def votes_of(labels: Iterable[int]) -> Votes:
    """The votes that labels are; those below 0 are trials for nobody."""
    found = torch.tensor(list(labels), dtype=torch.int64)
    counts = torch.bincount(found[found >= 0])
    return Votes(tuple(counts.tolist()), int((found < 0).sum()))


class AsSent:
    """A local classifier as a service meets it: behind clipping, rounding to 8 bits, and the encoding.

    A local run of it and an audit of a service that computes the same function give the same votes on the same noise.

    Args:
        classifier: any base classifier.
        encoding: as of :func:`certify.blackbox.encoding.encode`.
    """

    def __init__(self, classifier: BaseClassifier, encoding: str = "png") -> None:
        self.classifier, self.encoding = classifier, encoding
        self.num_classes = classifier.num_classes
        self.input = getattr(classifier, "input", None)
        self.class_names = getattr(classifier, "class_names", None)

    def __call__(self, images: Tensor) -> Tensor:
        """Labels ``(B,)`` of images ``(B, C, H, W)``."""
        pictures = to_pictures(images)
        if self.encoding != "png":
            pictures = [seen(picture, self.encoding) for picture in pictures]
        return self.classifier(torch.stack([to_tensor(picture) for picture in pictures]).to(images.device))

    def describe(self) -> dict[str, Any]:
        """The classifier, and how it is reached."""
        return {**self.classifier.describe(), "picture": {"bits": 8, "encoding": self.encoding}}
