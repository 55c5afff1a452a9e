"""Compare the speed of the vote engine with the plain loop and with other execution settings, on the user's model.

They take turns within one process, so that drifting machine speed favours none of them; every ratio is the median over
rounds. The comparison evaluates the execution policy (:mod:`certify.engine.policy`) and never changes its choice.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from certify.engine.execution import PRECISIONS, Execution, convertible, prepare
from certify.engine.hardware import keep_freed_memory, machine_name
from certify.engine.monte_carlo import Job, count_votes
from certify.engine.noisy_classifier import KEPT, Target
from certify.engine.policy import COMPILE_SECONDS, EngineOptions, count_operations
from certify.errors import UserError
from certify.models.pipeline import Pipeline
from certify.smoothed_classifier import SmoothedClassifier
from certify.smoothing.rng import stream_key
from certify.types import BaseClassifier

_PRODUCT_SECONDS = 0.5  # time limit for the matrix products of one measurement


@dataclass(frozen=True)
class Alternative:
    """Execution settings that the policy did not choose.

    Attributes:
        settings: description of the settings.
        ratio: speed relative to the policy's choice, median over rounds; below 1, the policy is right.
        ratio_min: smallest ratio.
        ratio_max: largest ratio.
        prepared: seconds of preparation, including compilation.
    """

    settings: str
    ratio: float
    ratio_min: float
    ratio_max: float
    prepared: float


@dataclass(frozen=True)
class Measured:
    """The result of :func:`compare`. Rates are samples per second.

    Attributes:
        engine: rate of the engine, median over rounds.
        reference: rate of the plain loop, median over rounds.
        ratio: engine over plain loop, median over rounds.
        ratio_min: smallest ratio.
        ratio_max: largest ratio.
        pairs: number of rounds.
        turn: samples per measurement of the engine and of the plain loop.
        reference_batch: samples per forward pass of the plain loop.
        prepared: seconds to prepare the classifier, including folding and compilation.
        certificate: seconds per certificate of n samples with the engine, including preparation.
        certificate_reference: seconds per certificate of n samples with the plain loop.
        n: samples per certificate.
        flops: floating-point operations (products and sums) of one forward pass, matrix products and convolutions only.
        ceiling: operations per second of a square matrix product at the engine's precision.
        share: fraction of the ceiling that the engine reaches.
        same: number of compared labels that agree with plain float32.
        compared: number of labels compared.
        ran_as: the engine's execution settings.
        alternatives: other settings, measured in the same rounds.
        machine: processor or accelerator.
        threads: number of CPU threads.
        torch: version of torch.
    """

    engine: float
    reference: float
    ratio: float
    ratio_min: float
    ratio_max: float
    pairs: int
    turn: tuple[int, int]
    reference_batch: int
    prepared: float
    certificate: float
    certificate_reference: float
    n: int
    flops: float
    ceiling: float
    share: float
    same: int
    compared: int
    ran_as: Execution
    alternatives: list[Alternative]
    machine: str
    threads: int
    torch: str


def reference_votes(plain: Plain, image: Tensor, sigma: float, n: int, batch: int, num_classes: int) -> Tensor:
    """Count votes ``(K,)`` in the standard loop (Cohen, Rosenfeld and Kolter 2019): float32, eager, one generator."""
    keep_freed_memory(64 << 20)  # glibc's default, as without this engine
    counts = torch.zeros(num_classes, dtype=torch.int64, device=image.device)
    with torch.no_grad():
        left = n
        while left > 0:
            this = min(batch, left)
            left -= this
            copies = image.repeat(this, 1, 1, 1)
            labels = plain(copies + torch.randn_like(copies) * sigma)
            counts += torch.bincount(labels, minlength=num_classes)
    return counts.cpu()


class Plain(nn.Module):
    """The classifier as commonly run: float32, eager, contiguous layout, argmax."""

    def __init__(self, base: Pipeline) -> None:
        super().__init__()
        self.pipeline = base
        if convertible(base):
            self.pipeline = copy.deepcopy(base).to(memory_format=torch.contiguous_format)
            self.pipeline.channels_last = self.pipeline.classifier.channels_last = False  # type: ignore[attr-defined]

    def forward(self, images: Tensor) -> Tensor:
        """Return labels ``(B,)`` of noisy images ``(B, C, H, W)``."""
        try:
            return self.pipeline.logits(images).argmax(1)
        except UserError:  # a label-only classifier
            return self.pipeline(images)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Entry:
    """A function to time, which labels a given number of samples in batches."""

    sample: Callable[[int], object]
    batch: int
    settings: str = ""
    prepared: float = 0.0


def compare(
    smoothed: SmoothedClassifier,
    images: list[Tensor],
    *,
    n: int = 100_000,
    pairs: int = 3,
    seconds: float = 5.0,
    turn: int | None = None,
    reference_batch: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measure the engine, the plain loop and other execution settings on these images.

    Args:
        smoothed: the smoothed classifier, not yet prepared; it is prepared for one certificate of n samples.
        images: real images ``(C, H, W)``; the first is timed, all are used to compare labels.
        n: samples per certificate.
        pairs: number of rounds after a warm-up.
        seconds: duration of one measurement.
        turn: samples per measurement, in place of ``seconds``.
        reference_batch: batch size of the plain loop; None uses 1,000, or 16 for images over 2^14 values on a CPU
            (faster there, and batches of 1,000 would need tens of gigabytes).
        progress: called with the current step.
    """
    image, plain = images[0].to(smoothed.device), Plain(smoothed.base)
    large = image.numel() > 2**14 and image.device.type == "cpu"
    batch = reference_batch or (16 if large else 1000)

    progress("preparing the classifier")
    start = time.perf_counter()
    execution = smoothed.prepare(images[0], n)
    prepared = time.perf_counter() - start
    ceiling = product_speed(execution.precision, smoothed.device)  # and again at the end: shared machines slow down

    def reference(samples: int) -> None:
        reference_votes(plain, image, smoothed.noise.scale, samples, batch, smoothed.num_classes)

    engine = _Entry(lambda samples: smoothed.votes(images[0], samples, stage="benchmark"), execution.batch_size)
    entries = [engine, _Entry(reference, batch), *_alternatives(smoothed, image, execution, progress)]
    rates, lengths = _in_turn(entries, pairs, seconds, turn, progress)
    columns = list(zip(*rates, strict=True))
    rate, plain_rate = (statistics.median(column) for column in columns[:2])
    ratio, smallest, largest = _spread(columns[0], columns[1])
    progress("comparing labels")
    same, compared = _agreement(smoothed, images)
    ceiling = max(ceiling, product_speed(execution.precision, smoothed.device))
    flops = count_operations(plain, image)
    return Measured(
        engine=rate,
        reference=plain_rate,
        ratio=ratio,
        ratio_min=smallest,
        ratio_max=largest,
        pairs=pairs,
        turn=(lengths[0], lengths[1]),
        reference_batch=batch,
        prepared=prepared,
        certificate=prepared + n / rate,
        certificate_reference=n / plain_rate,
        n=n,
        flops=flops,
        ceiling=ceiling,
        share=rate * flops / ceiling,
        same=same,
        compared=compared,
        ran_as=execution,
        alternatives=[
            Alternative(entry.settings, *_spread(column, columns[0]), entry.prepared)
            for entry, column in zip(entries[2:], columns[2:], strict=True)
        ],
        machine=machine_name(smoothed.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def _alternatives(
    smoothed: SmoothedClassifier, image: Tensor, execution: Execution, progress: Callable[[str], None]
) -> Iterator[_Entry]:
    """Prepare the settings that differ from the chosen ones in one respect and run on this machine."""
    for settings in _variants(execution, smoothed.options) if convertible(smoothed.base) else ():
        progress(f"preparing {settings.describe()}")
        start = time.perf_counter()
        try:
            run, real = prepare(smoothed.base, settings, image, compile_seconds=COMPILE_SECONDS)
        except UserError:  # it cannot be cast
            continue
        if real.runs_like(execution) and real.batch_size == execution.batch_size:
            continue

        def sample(samples: int, run: BaseClassifier = run, real: Execution = real) -> None:
            job = Job(image, stream_key(0, "", "benchmark"), samples)
            list(count_votes(run, smoothed.noise, [job], batch_size=real.batch_size, fixed_shape=real.compiled))

        yield _Entry(sample, real.batch_size, real.describe(), time.perf_counter() - start)


def _variants(chosen: Execution, options: EngineOptions) -> Iterator[Execution]:
    """Yield settings that differ from the chosen ones in one respect left to the policy."""
    if options.precision == "auto":
        yield replace(chosen, precision="float32" if chosen.precision == "bfloat16" else "bfloat16")
    if not options.unchanged:
        yield replace(chosen, folded=not chosen.folded)
    if options.compile == "auto":
        yield replace(chosen, compiled=not chosen.compiled)
    if options.batch_size is None:
        yield replace(chosen, batch_size=4 * chosen.batch_size)
        yield replace(chosen, batch_size=max(1, chosen.batch_size // 4))


def _spread(rates: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Return median, minimum and maximum of the ratios of two columns of rates."""
    ratios = [a / b for a, b in zip(rates, others, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def _in_turn(
    entries: Sequence[_Entry], pairs: int, seconds: float, turn: int | None, progress: Callable[[str], None]
) -> tuple[list[list[float]], list[int]]:
    """Return the rates of all entries in every round, after a warm-up, and their samples per measurement."""
    progress("warming up")
    lengths = []
    for entry in entries:
        entry.sample(entry.batch)
        lengths.append(turn or _samples_in(seconds, entry))
    rates = []
    for pair in range(pairs):
        progress(f"round {pair + 1} of {pairs}")
        rates.append([_rate(entry, samples) for entry, samples in zip(entries, lengths, strict=True)])
    return rates, lengths


def _rate(entry: _Entry, samples: int) -> float:
    start = time.perf_counter()
    entry.sample(samples)
    return samples / (time.perf_counter() - start)


def _samples_in(seconds: float, entry: _Entry) -> int:
    """Return the number of samples, in whole batches, that take about ``seconds``."""
    batches = max(1, round(_rate(entry, entry.batch) / entry.batch))  # about one second
    return max(1, round(_rate(entry, batches * entry.batch) * seconds / entry.batch)) * entry.batch


def product_speed(precision: str, device: torch.device) -> float:
    """Measure the operations per second of a square matrix product, the best of several: the machine's ceiling."""
    accelerator = device.type != "cpu"
    size, most = (8192, 30) if accelerator else (1024, 5)
    dtype = PRECISIONS[precision]
    if not accelerator and dtype != torch.float32:  # without hardware support a product takes seconds
        small = _product_seconds(128, dtype, device, 2)
        if small > 4 * _product_seconds(128, torch.float32, device, 2):
            return 2 * 128**3 / small
    return 2 * size**3 / _product_seconds(size, dtype, device, most)


def _product_seconds(size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    a = torch.rand(size, size, device=device).to(dtype)
    best, begun = math.inf, time.perf_counter()
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
        if start - begun > _PRODUCT_SECONDS:
            break
    return best


def _agreement(smoothed: SmoothedClassifier, images: list[Tensor]) -> tuple[int, int]:
    """Count the labels of ``KEPT`` noisy copies per image that agree with plain float32, and those compared."""
    targets = [Target(image, str(i)) for i, image in enumerate(images)]
    same = compared = 0
    for target, tallies in smoothed.sample(targets, {"agreement": KEPT}):
        labels = tallies["agreement"].labels
        assert target.name is not None
        same += smoothed.agreement(target.image, labels, stage="agreement", seed=0, image_id=target.name)
        compared += len(labels)
    return same, compared


def describe(result: Measured) -> str:
    """Return the measurement as text."""
    ran = result.ran_as
    rows = [
        ("machine", f"{result.machine}, {result.threads} threads, torch {result.torch}"),
        ("reference", f"{result.reference:,.1f} samples/s (float32, eager, batches of {result.reference_batch})"),
        ("engine", f"{result.engine:,.1f} samples/s ({ran.describe()})"),
        *(("", why) for why in ran.why),
        ("ratio", f"{result.ratio:.2f} ({result.ratio_min:.2f} to {result.ratio_max:.2f} over {result.pairs} rounds)"),
    ]
    if result.flops:
        rows.append(
            (
                "ceiling",
                f"{result.engine * result.flops / 1e9:,.0f} of the {result.ceiling / 1e9:,.0f} GFLOP/s of a matrix "
                f"product in {ran.precision}: {result.share:.0%}",
            )
        )
    rows += [
        (
            "certificate",
            f"{result.certificate:,.1f} s at n = {result.n:,} (of which {result.prepared:.1f} s to prepare); "
            f"reference {result.certificate_reference:,.1f} s",
        ),
        ("labels", f"{result.same} of {result.compared} are those of plain float32"),
    ]
    heads = itertools.chain(["alternative"], itertools.repeat(""))
    for head, other in zip(heads, result.alternatives, strict=False):
        speed = f"{other.ratio:.2f} ({other.ratio_min:.2f} to {other.ratio_max:.2f}) times the speed"
        rows.append((head, f"{speed}: {other.settings} ({other.prepared:.1f} s to prepare)"))
    return "\n".join(f"{name:<11} {text}".rstrip() for name, text in rows)
