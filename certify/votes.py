"""The one Monte-Carlo loop: seeded noise blocks in, votes out.

Left of this module everything is random, batched and on the device; right of it, float64 and pure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from certify.errors import CertifyError, RunFault, UserError, first_line
from certify.streams import block_generator, block_size
from certify.types import FAILED, BaseClassifier, Noise, Votes


def default_batch_size(image: Tensor) -> int:
    """Samples a batch: 2 MiB of float32 images on a processor, 128 MiB on an accelerator; 4 to 2,048.

    On a processor activations should stay in its cache: batches of 100 CIFAR images run twice as fast as of 1,000
    (``benchmarks/log.md``).
    """
    budget = 2**19 if image.device.type == "cpu" else 2**25
    return max(4, min(2048, budget // max(1, image.numel())))


def count_votes(
    classifier: BaseClassifier,
    image: Tensor,
    noise: Noise,
    trials: int,
    key: bytes,
    *,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Votes:
    """Label ``trials`` noisy copies of one image.

    The noise depends on ``key`` alone: not on the batch size, the order of images or the number of workers. Memory does
    not grow with ``trials``; a batch that does not fit in memory is halved.

    Args:
        classifier: the base classifier, on the image's device.
        image: ``(C, H, W)``, float32 in [0, 1].
        noise: the smoothing distribution; drawn and added in float32.
        trials: n >= 1.
        key: the noise stream (:func:`certify.streams.stream_key`).
        batch_size: samples a forward pass; None chooses.
        progress: called with the number of samples done since the last call.

    Returns:
        The votes: counts and failures add up to ``trials``.

    Raises:
        UserError: a label outside [0, K).
        RunFault: the base classifier raised; the error is chained.
    """
    if trials < 1:
        raise ValueError(f"n = {trials}: expected at least 1")
    size = batch_size or default_batch_size(image)
    counts = torch.zeros(classifier.num_classes + 1, dtype=torch.int64)
    with torch.inference_mode():
        for batch in _batches(image, noise, trials, key, size):
            counts += _tally(label_batch(classifier, batch), len(batch), classifier.num_classes)
            if progress is not None:
                progress(len(batch))
    failures, *by_class = counts.tolist()
    return Votes(tuple(by_class), failures)


def measure_rate(
    classifier: BaseClassifier, image: Tensor, noise: Noise, batch_size: int | None = None, seconds: float = 0.5
) -> float:
    """Samples a second on this machine: one noise block and some batches, whose labels are thrown away."""
    length = block_size(image.numel())
    size = batch_size or default_batch_size(image)
    generator = block_generator(b"rate" * 8, 0, image.device)
    noise.sample((length, *image.shape), generator)  # the first one pays for memory
    start = time.perf_counter()
    noisy = noise.sample((length, *image.shape), generator).to(image.device).add_(image)
    drawing = (time.perf_counter() - start) / length
    batch = noisy[:size]
    with torch.inference_mode():
        label_batch(classifier, batch).cpu()
        done, start = 0, time.perf_counter()
        while not done or time.perf_counter() - start < seconds:
            label_batch(classifier, batch).cpu()
            done += len(batch)
    return 1.0 / (drawing + (time.perf_counter() - start) / done)


def _batches(image: Tensor, noise: Noise, trials: int, key: bytes, size: int) -> Iterator[Tensor]:
    """Noisy copies in batches of ``size``, cut from whole blocks: the same samples however they are cut."""
    ready: list[Tensor] = []
    waiting, block_length = 0, block_size(image.numel())
    for block, start in enumerate(range(0, trials, block_length)):
        generator = block_generator(key, block, image.device)
        drawn = noise.sample((block_length, *image.shape), generator).to(image.device)
        noisy = drawn.add_(image)[: trials - start]
        while len(noisy):
            piece, noisy = noisy[: size - waiting], noisy[size - waiting :]
            ready.append(piece)
            waiting += len(piece)
            if waiting == size:
                yield ready[0] if len(ready) == 1 else torch.cat(ready)
                ready, waiting = [], 0
    if ready:
        yield torch.cat(ready)


def label_batch(classifier: BaseClassifier, batch: Tensor) -> Tensor:
    """Labels of one batch; out of memory halves it and tries again."""
    try:
        return classifier(batch)
    except CertifyError:
        raise
    except Exception as error:  # any classifier may stand there, also the user's own code
        if len(batch) == 1 or not _out_of_memory(error):
            raise RunFault(f"the base classifier failed: {type(error).__name__}: {first_line(error)}") from error
    if batch.device.type == "cuda":
        torch.cuda.empty_cache()
    half = len(batch) // 2
    return torch.cat([label_batch(classifier, batch[:half]), label_batch(classifier, batch[half:])])


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or ("memory" in text and "alloc" in text)


def _tally(labels: Tensor, trials: int, num_classes: int) -> Tensor:
    """Counts ``(K + 1,)``, failures first; exactly one label a trial."""
    labels = labels.cpu()
    if labels.shape != (trials,) or labels.is_floating_point():
        raise UserError(
            f"the base classifier returned {labels.dtype} of shape {tuple(labels.shape)} for {trials} images; "
            f"expected integer labels ({trials},)"
        )
    if int(labels.min()) < FAILED or int(labels.max()) >= num_classes:
        raise UserError(
            f"the base classifier returned labels from {int(labels.min())} to {int(labels.max())}; "
            f"expected 0 to {num_classes - 1}, or {FAILED} for a failed trial"
        )
    return torch.bincount(labels + 1, minlength=num_classes + 1)
