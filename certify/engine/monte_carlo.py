"""The one Monte-Carlo loop: keyed noise blocks in, votes out.

Up to here everything is random, batched and on the device; from here on, float64 and pure.
"""

from __future__ import annotations

import itertools
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from certify.engine.hardware import keep_freed_memory
from certify.errors import CertifyError, RunFault, UserError, first_line
from certify.models.pipeline import Pipeline
from certify.smoothing.rng import block_generator, block_size
from certify.types import FAILED, BaseClassifier, Noise, Votes

_SMALL, _WAVE = 2**17, 2**26  # values of a block worth a thread; values drawn at once, at most (256 MiB)


@dataclass(frozen=True, eq=False)
class Job:
    """A request for the labels of noisy copies of one image, or of the image itself.

    Attributes:
        image: ``(C, H, W)``, float32 in [0, 1], on the device.
        key: the noise stream (:func:`certify.smoothing.rng.stream_key`); None adds no noise.
        trials: n >= 1.
        keep: number of first labels to keep one by one.
        start: samples of the stream to skip because they were labelled before.
        drawn: keeps the noise of partly used blocks, by block number; None keeps nothing.
        once: no other job has this key: draw the samples that are needed, not whole blocks.
        tag: returned with the tally, so that callers need no queue of their own.
    """

    image: Tensor
    key: bytes | None
    trials: int
    keep: int = 0
    start: int = 0
    drawn: dict[int, Tensor] | None = None
    once: bool = False
    tag: Any = None


@dataclass(frozen=True, eq=False)
class Tally:
    """A finished job: its votes (counts and failures add up to its trials), first labels ``(keep,)`` int64, and tag."""

    votes: Votes
    labels: Tensor
    tag: Any = None


def count_votes(
    classifier: BaseClassifier,
    noise: Noise,
    jobs: Iterable[Job],
    *,
    batch_size: int,
    fixed_shape: bool = False,
    settled: dict[torch.Size, int] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Iterator[Tally]:
    """Label the noisy copies of all jobs, and yield the tallies in the order of the jobs.

    Jobs share batches. The noise of a job depends on its key alone, not on the batch size, the other jobs or the
    number of workers. Memory does not grow with the trials; a batch that does not fit in memory is halved, and so are
    all later ones. A sample that was not drawn from the distribution is a failure, whatever its label.

    Args:
        classifier: the base classifier, on the images' device.
        noise: the smoothing distribution.
        jobs: pulled some blocks ahead of the work.
        batch_size: samples per forward pass.
        fixed_shape: pad every batch to ``batch_size`` with samples that are not counted (compiled classifiers).
        settled: batch sizes by image shape, for a noise that needs batches of one shape. A size shrinks to what fits in
            memory until the first label of such an image is counted; then it is stored here and never changes.
        progress: called with the number of noisy samples done since the last call.

    Raises:
        UserError: a label outside [0, K).
        RunFault: the base classifier raised (the error is chained), or memory runs out at a settled size.
    """
    keep_freed_memory()
    size, classes = batch_size, classifier.num_classes
    unfinished: deque[_Count] = deque()
    batch: list[_Piece] = []
    waiting = 0

    def flush() -> None:
        nonlocal size, waiting
        noisy = batch[0].noisy if len(batch) == 1 else torch.cat([piece.noisy for piece in batch])
        if settled is None:
            labels, largest = label_batch(classifier, _filled(noisy, size) if fixed_shape else noisy)
        else:
            labels, largest = _label_in_one_shape(classifier, noisy, size, settled)
        labels = labels[:waiting]
        if any(piece.failed is not None for piece in batch):
            labels = labels.masked_fill(torch.cat([piece.mask() for piece in batch]), FAILED)
        start = 0
        for count, pieces in itertools.groupby(batch, key=lambda piece: piece.count):
            length = sum(len(piece.noisy) for piece in pieces)
            count.add(labels[start : start + length])
            start += length
        if progress is not None and (done := sum(len(piece.noisy) for piece in batch if piece.count.job.key)):
            progress(done)
        size, waiting = min(size, largest), 0
        batch.clear()

    for whole in _drawn(_blocks(jobs, classes), noise):
        if not unfinished or unfinished[-1] is not whole.count:
            unfinished.append(whole.count)
        if batch and batch[0].noisy.shape[1:] != whole.noisy.shape[1:]:
            flush()
        if settled is not None:
            size = settled.get(whole.noisy.shape[1:], batch_size)
        rest = whole
        while len(rest.noisy):
            piece, rest = rest.split(size - waiting)
            batch.append(piece)
            waiting += len(piece.noisy)
            if waiting >= size:
                flush()
                while unfinished and not unfinished[0].missing:
                    yield unfinished.popleft().tally()
    if batch:
        flush()
    for count in unfinished:
        yield count.tally()


def noisy_copies(jobs: Iterable[Job], noise: Noise) -> Iterator[tuple[Job, Tensor, Tensor | None]]:
    """Yield the noisy copies that :func:`count_votes` labels, in its order: a job, and some of its copies.

    Each item is the job, copies ``(B, C, H, W)``, and a bool mask ``(B,)`` of the copies that were not drawn from the
    distribution, or None.
    """
    for piece in _drawn(_blocks(jobs, 1), noise):
        yield piece.count.job, piece.noisy, piece.failed


class _Count:
    """The labels of a job so far, on the device: bin 0 failures, 1 to K classes, K + 1 invalid labels."""

    def __init__(self, job: Job, num_classes: int) -> None:
        self.job, self.missing = job, job.trials
        self.num_classes = num_classes
        self.bins = torch.zeros(num_classes + 2, dtype=torch.int64, device=job.image.device)
        extremes = torch.iinfo(torch.int64)
        self.lowest, self.highest = self.bins.new_tensor(extremes.max), self.bins.new_tensor(extremes.min)
        self.kept: list[Tensor] = []

    def add(self, labels: Tensor) -> None:
        if self.job.trials - self.missing < self.job.keep:
            self.kept.append(labels.clone())  # a compiled function may reuse the memory
        self.missing -= len(labels)
        low, high = labels.aminmax()
        self.lowest, self.highest = torch.minimum(self.lowest, low), torch.maximum(self.highest, high)
        index = torch.where((labels >= FAILED) & (labels < self.num_classes), labels, self.num_classes).add_(1)
        self.bins.index_add_(0, index, torch.ones_like(index))

    def tally(self) -> Tally:
        failures, *by_class, wrong = self.bins.tolist()
        if wrong:
            raise UserError(
                f"the base classifier returned {wrong:,} of {self.job.trials:,} labels outside 0 to "
                f"{self.num_classes - 1} (from {int(self.lowest)} to {int(self.highest)}; {FAILED} is a failed trial)"
            )
        labels = torch.cat(self.kept)[: self.job.keep].cpu() if self.kept else torch.empty(0, dtype=torch.int64)
        return Tally(Votes(tuple(by_class), failures), labels, self.job.tag)


@dataclass(frozen=True, eq=False)
class _Piece:
    """Consecutive noisy copies of one job; ``failed`` marks those that were not drawn properly, if any."""

    count: _Count
    noisy: Tensor
    failed: Tensor | None = None

    def split(self, length: int) -> tuple[_Piece, _Piece]:
        ends = (slice(None, length), slice(length, None))
        first, second = (
            _Piece(self.count, self.noisy[end], None if self.failed is None else self.failed[end]) for end in ends
        )
        return first, second

    def mask(self) -> Tensor:
        return self.noisy.new_zeros(len(self.noisy), dtype=torch.bool) if self.failed is None else self.failed


@dataclass(frozen=True, eq=False)
class _Block:
    """One block of a job's stream; the job uses the samples in ``wanted``."""

    count: _Count
    number: int
    wanted: slice

    def draw(self, noise: Noise) -> Tensor | None:
        """Draw the whole block, so that any n sees the same samples; None for a job without noise."""
        image, key, kept = self.count.job.image, self.count.job.key, self.count.job.drawn
        if key is None:
            return None
        size = self.wanted.stop if self.count.job.once else block_size(image.numel())
        drawn = kept.pop(self.number, None) if kept else None
        if drawn is None:
            drawn = noise.sample((size, *image.shape), block_generator(key, self.number, image.device))
        if kept is not None and self.wanted.stop < size:
            kept[self.number] = drawn  # the samples used now will be overwritten, the rest will not
        return drawn

    def noisy(self, noise: Noise, drawn: Tensor | None) -> _Piece:
        """Return the noisy copies that the job uses, on the image's device."""
        image = self.count.job.image
        if drawn is None:
            return _Piece(self.count, image.expand(self.wanted.stop, -1, -1, -1))
        drawn = drawn[self.wanted].to(image.device)
        failed = noise.failed(drawn)
        return _Piece(self.count, noise.add(image, drawn), failed)


def _blocks(jobs: Iterable[Job], num_classes: int) -> Iterator[_Block]:
    """Yield the blocks of all jobs, in order."""
    for job in jobs:
        if job.trials < 1:
            raise UserError(f"n = {job.trials}: expected at least 1")
        count = _Count(job, num_classes)
        step, end = block_size(job.image.numel()) if job.key else job.trials, job.start + job.trials
        for number in range(job.start // step, -(-end // step)):
            yield _Block(count, number, slice(max(0, job.start - number * step), min(step, end - number * step)))


def _drawn(blocks: Iterator[_Block], noise: Noise) -> Iterator[_Piece]:
    """Yield the noisy copies of all blocks; a processor draws as many blocks at once as it has threads.

    A generator runs in one thread, so drawing block after block would leave the other cores idle.
    """
    with ThreadPoolExecutor(torch.get_num_threads(), "certify-noise") as pool:
        for first in blocks:
            wave = [first, *itertools.islice(blocks, _at_once(first) - 1)]
            drawn = [pool.submit(block.draw, noise) for block in wave[1:]]
            yield first.noisy(noise, first.draw(noise))
            for block, future in zip(wave[1:], drawn, strict=True):
                yield block.noisy(noise, future.result())


def _at_once(block: _Block) -> int:
    """Return how many such blocks to draw at once: small ones cost less than a thread, large ones take memory."""
    image = block.count.job.image
    values = block_size(image.numel()) * image.numel()
    if image.device.type != "cpu" or values < _SMALL:
        return 1
    return max(1, min(torch.get_num_threads(), _WAVE // values))


def label_batch(classifier: BaseClassifier, batch: Tensor) -> tuple[Tensor, int]:
    """Return the labels of one batch, and how many samples fit in memory at once; halves a batch that does not."""
    if (labels := _labels(classifier, batch)) is not None:
        return labels, len(batch)
    half = (len(batch) + 1) // 2
    first, fits = label_batch(classifier, batch[:half])
    first = first.clone()  # a compiled function may reuse the memory
    second, _ = label_batch(classifier, batch[half:])
    return torch.cat([first, second]), fits


def _label_in_one_shape(
    classifier: BaseClassifier, noisy: Tensor, size: int, settled: dict[torch.Size, int]
) -> tuple[Tensor, int]:
    """Label noisy copies ``(B, C, H, W)`` in batches of exactly ``size``, or of what fits if it is not settled."""
    shape, found, done = noisy.shape[1:], list[Tensor](), 0
    while done < len(noisy):
        piece = noisy[done : done + size]
        labels = _labels(classifier, _filled(piece, size))
        if labels is None and settled.get(shape) == size:
            labels = _labels(classifier, _filled(piece, size))  # memory that others held may be free by now
            if labels is None:
                raise RunFault(
                    f"out of memory in a batch of {size} images, which fitted before; this noise needs one batch shape "
                    f"for all samples of an image: free memory, or pass --batch-size {size // 2}"
                )
        if labels is None:
            size = settled.get(shape, (size + 1) // 2)
            continue
        if settled.setdefault(shape, size) != size:  # another thread has settled it
            size = settled[shape]
            continue
        found.append(labels[: len(piece)].clone())  # a compiled function may reuse the memory
        done += len(piece)
    return torch.cat(found), size


def _filled(noisy: Tensor, size: int) -> Tensor:
    """Pad a batch to ``size`` with copies of its last sample."""
    missing = size - len(noisy)
    return torch.cat([noisy, noisy[-1:].expand(missing, -1, -1, -1)]) if missing > 0 else noisy


def _labels(classifier: BaseClassifier, batch: Tensor) -> Tensor | None:
    """Return the labels of one batch, int64 ``(B,)``; None if several images do not fit in memory together."""
    try:
        with torch.no_grad():
            labels = classifier(batch)
    except CertifyError:
        raise
    except Exception as error:  # the classifier may be the user's own code
        if len(batch) == 1 or not out_of_memory(error):
            raise RunFault(f"{_failed_part(error)} failed: {type(error).__name__}: {first_line(error)}") from error
    else:
        if labels.shape != (len(batch),) or labels.is_floating_point():
            raise UserError(
                f"the base classifier returned {labels.dtype} of shape {tuple(labels.shape)} for {len(batch)} images; "
                f"expected integer labels ({len(batch)},)"
            )
        return labels.long()
    if batch.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _failed_part(error: BaseException) -> str:
    """Return the denoiser's name if the error passed through it, else the base classifier."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is Pipeline.denoise.__code__:
            return f"the denoiser {frame.f_locals['self'].denoiser_name}"
    return "the base classifier"


def out_of_memory(error: BaseException) -> bool:
    """True if the error says that memory ran out."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or ("memory" in text and "alloc" in text)


def measure_rate(
    classifier: BaseClassifier, image: Tensor, noise: Noise, batch_size: int, seconds: float = 0.5
) -> float:
    """Measure the samples per second, drawing the noise included, on one image ``(C, H, W)``."""
    length = block_size(image.numel())
    generator = block_generator(b"rate" * 8, 0, image.device)
    float(noise.sample((length, *image.shape), generator).sum())  # the first draw allocates the memory
    start = time.perf_counter()
    noisy = noise.add(image, noise.sample((length, *image.shape), generator).to(image.device))
    float(noisy[-1, -1, -1, -1])  # waits for the device
    drawing = (time.perf_counter() - start) / length
    batch = noisy.repeat(-(-batch_size // length), 1, 1, 1)[:batch_size]
    label_batch(classifier, batch)  # warm-up
    done, start = 0, time.perf_counter()
    while not done or time.perf_counter() - start < seconds:
        label_batch(classifier, batch)[0].cpu()
        done += len(batch)
    return 1.0 / (drawing + (time.perf_counter() - start) / done)
