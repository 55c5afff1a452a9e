"""An audit's folder from real votes: the digits classifier stands for a service, certify's own engine asks it."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from certify.blackbox.ledger_contents import SCHEMA
from certify.engine.adaptive import Sampling, settle
from certify.engine.monte_carlo import Job, Tally, count_votes
from certify.engine.noisy_classifier import NoisyClassifier, image_digest
from certify.images.dataset import ImageSet
from certify.models.classifier import Classifier
from certify.runs.config import Settings, run_header
from certify.runs.records import ImageRow
from certify.runs.run_file import RunFile
from certify.smoothing.noise import make_noise
from certify.smoothing.procedures import AnswerKeys, Sequential, answer_keys
from certify.smoothing.rng import stream_key
from certify.types import FAILED, Votes

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Mood = Callable[[str, int], tuple[int, str]]
"""How often a query (its name, its number) is sent, and why it fails in the end, if it does."""


Turn = Callable[[str, int], bool]
"""Whether the answer to a query (its name, its number) has its two best labels the other way round."""


def calm(name: str, number: int) -> tuple[int, str]:
    """Every query is answered at once."""
    return 1, ""


def never(name: str, number: int) -> bool:
    """Every answer is the classifier's."""
    return False


@dataclass
class Service:
    """The digits classifier on 8-bit pictures, every answer in the ledger before it is a vote."""

    digits: Classifier
    ledger: io.TextIOWrapper
    words: Sequence[str] = WORDS
    mood: Mood = calm
    turn: Turn = never
    num_classes: int = 10
    stage: str = ""
    start: int = 0
    asked: int = 0
    last: list[list[Any]] = field(default_factory=list)

    def __call__(self, images: Tensor) -> Tensor:
        before = time.perf_counter()
        scores = self.digits.logits(eight_bits(images)).softmax(1)
        seconds = (time.perf_counter() - before) / len(images)
        order = scores.argsort(dim=1, descending=True)[:, :5]
        digests = [image_digest(image) for image in images]
        rows = zip(digests, order.tolist(), scores.gather(1, order).tolist(), strict=True)
        return torch.tensor([self.answer(*row, seconds) for row in rows])

    def describe(self) -> dict[str, Any]:
        return {"name": "service"}

    def answer(self, digest: str, order: list[int], scores: list[float], seconds: float) -> int:
        name, self.start, self.asked = f"{self.stage} | {self.start}", self.start + 1, self.asked + 1
        attempts, failure = self.mood(name, self.asked)
        for attempt in range(1, attempts + 1):
            if attempt > 1:
                self.write(type="refused", name=name, attempt=attempt - 1, why="HTTP 503: Service Unavailable")
            self.write(type="sent", name=name, attempt=attempt, pixels=digest, body=digest, time="2026-01-01")
        if self.turn(name, self.asked):
            order[:2] = order[1::-1]
        self.last = [] if failure else [[self.words[c], round(p, 6)] for c, p in zip(order, scores, strict=True)]
        self.write(type="answer", name=name, attempts=attempts, ranked=self.last, failure=failure, seconds=seconds)
        return FAILED if failure else order[0]

    def write(self, **row: Any) -> None:
        self.ledger.write(json.dumps(row) + "\n")


def eight_bits(image: Tensor) -> Tensor:
    """Clipped and rounded, as a picture on its way."""
    return (image.clamp(0, 1) * 255).round() / 255


def save(image: Tensor, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray((eight_bits(image)[0] * 255).numpy().astype(np.uint8)).save(path)


def make_audit(
    folder: Path,
    digits: Classifier,
    images: ImageSet,
    *,
    settings: Settings,
    sigma: float = 0.25,
    mood: Mood = calm,
    words: Sequence[str] = WORDS,
    turn: Turn = never,
    blurred: bool = True,
    about: dict[str, Any] | None = None,
    only: int | None = None,
) -> Path:
    """Audit the images (the first ``only`` of them, as if stopped then) and leave what an audit leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    noise, wanted = make_noise("gaussian", sigma), list(range(len(images)))[:only]
    loaded = [images.load(i) for i in wanted]
    names = [images.items[i].id for i in wanted]
    with (folder / "ledger.jsonl").open("w") as ledger:
        service = Service(digits, ledger, words, mood, turn)
        service.write(
            type="ledger", schema=SCHEMA, endpoint="http://127.0.0.1:9/v2/models/digits/infer", format={"name": "v2"}
        )
        clean: list[int] = []
        entries = []
        for number, (name, image) in enumerate(zip(names, loaded, strict=True)):
            clean.append(_again(service, name, "clean", image, 1)[0])
            why = "" if service.last else "no answer"
            found = {"id": name, "pictures": f"{number:03d}", "reference": None if why else words[clean[-1]]}
            entries.append(found | {"answer": service.last, "failure": why})
        for name, image in list(zip(names, loaded, strict=True))[:3]:
            _again(service, name, "probe", image, 5)
        header = run_header(NoisyClassifier(digits, sigma), images, settings, model="v2", data="digits")
        with RunFile(folder / "run.jsonl", header.replace(expected=len(images))) as file:
            for index, line in _lines(service, loaded, names, clean, settings, noise):
                base = clean[index] if clean[index] >= 0 else None
                row = ImageRow.of(names[index], base, line, base=base, size=64, seconds=0.1)
                name = None if row.abstained else words[row.prediction]
                row = row.replace(class_name=name, image=image_digest(loaded[index]))
                error = None if base is not None else "the service gave no label without noise"
                file.append(row.replace(error=error))
        for name, image in zip(names, loaded, strict=True):
            _again(service, name, "drift", image, 1)
    for number, image in enumerate(loaded):
        noisy = image + sigma * torch.randn(image.shape, generator=torch.Generator().manual_seed(number))
        save(image, folder / "pictures" / f"{number:03d}-clean.png")
        save(noisy, folder / "pictures" / f"{number:03d}-noisy.png")
        if blurred:
            save(torch.nn.functional.avg_pool2d(noisy, 3, 1, 1), folder / "pictures" / f"{number:03d}-denoised.png")
    spent = {"vocabulary": list(words), "images": entries, "labels": "service"}
    (folder / "audit.json").write_text(json.dumps(usual(len(images), settings) | spent | (about or {})))
    return folder


def usual(images: int, settings: Settings) -> dict[str, Any]:
    """The contents of audit.json for a small audit."""
    return {
        "schema": 1,
        "created": "2026-01-01T10:00:00+00:00",
        "finished": "2026-01-01T10:02:00+00:00",
        "status": "finished",
        "command": "certify audit --endpoint http://127.0.0.1:9/v2/models/digits/infer --protocol v2 --data digits",
        "endpoint": "http://127.0.0.1:9/v2/models/digits/infer",
        "protocol": "v2",
        "encoding": {"name": "png"},
        "size": [1, 8, 8],
        "denoiser": "none",
        "plan": {"images": images, "budget": 20_000, "price_per_1000": 1.5, "currency": "USD", "concurrency": 4},
        "settings": {"sigma": 0.25, "seed": settings.seed, "timeout": 30},
        "versions": {"python": "3.11", "certify-toolkit": "0.1.0"},
    }


def _again(service: Service, name: str, stage: str, image: Tensor, times: int) -> list[int]:
    service.stage, service.start = f"{name} | {stage}", 0
    return [int(label) for label in service(image.expand(times, -1, -1, -1))]


def _lines(
    service: Service, loaded: list[Tensor], names: list[str], clean: list[int], settings: Settings, noise: Any
) -> Iterator[tuple[int, AnswerKeys]]:
    """Each image's answer by the engine: at a fixed n, or as few samples as it takes."""
    procedure = settings.procedure
    usable = [i for i, label in enumerate(clean) if label >= 0]

    def key(i: int, stage: str) -> bytes:
        return stream_key(settings.seed, names[i], stage)

    def label(jobs: Iterable[Job]) -> Iterator[Tally]:
        for job in jobs:
            if job.key is None:  # known already
                yield Tally(count_none(), torch.zeros(1, dtype=torch.int64))
                continue
            service.stage, service.start = " | ".join(job.tag[1]), job.start
            yield from count_votes(service, noise, [job], batch_size=64)

    for i in set(range(len(names))) - set(usable):
        yield i, answer_keys(-1, 0.0, 0.0, Votes(()))
    if isinstance(procedure, Sequential):
        (stage,) = procedure.stages
        queue = [Sampling(loaded[i], key(i, stage), procedure.test(10, noise), (i, (names[i], stage))) for i in usable]
        for settled in settle(label, queue, batch_size=64):
            yield settled.tag[0], procedure.record(settled.test.result()) | AnswerKeys(drawn=settled.test.drawn)
        return
    for i in usable:
        stages = procedure.stages.items()
        tallies = label(Job(loaded[i], key(i, k), n, tag=(i, (names[i], k))) for k, n in stages)
        votes = {tally.tag[1][1]: tally.votes for tally in tallies}
        yield i, procedure.record(procedure.answer(votes, noise))


def count_none() -> Any:
    from certify.types import Votes

    return Votes((1,))
