"""The vote engine against the loop that everybody copies, in one process, on the user's own model.

The two take turns, so that a machine whose speed drifts does not favour one; the ratio is the median over the pairs.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from certify.engine.allocator import keep_freed_memory
from certify.engine.execution import Execution, convertible
from certify.engine.hardware import machine_name, product_speed
from certify.engine.noisy_classifier import KEPT, Target
from certify.errors import UserError
from certify.models.pipeline import Pipeline
from certify.smoothed_classifier import SmoothedClassifier


@dataclass(frozen=True)
class Measured:
    """What :func:`compare` found. Rates are samples a second.

    Attributes:
        engine: this engine's rate, the median over the pairs.
        reference: the plain loop's.
        ratio: median of the pairs' ratios.
        ratio_min: smallest.
        ratio_max: largest.
        pairs: turns of each.
        turn: samples of the engine's and of the reference's turns.
        reference_batch: samples a forward pass of the reference.
        prepared: seconds to decide, fold and compile.
        certificate: seconds for one certificate of n samples with this engine, preparing included.
        certificate_reference: the same with the plain loop.
        n: of that certificate.
        flops: floating-point operations (products and sums) of one forward pass, matrix products and convolutions only.
        ceiling: those a second of a square matrix product at the engine's precision.
        share: of the ceiling that the engine reaches.
        same: labels that plain float32 gives too.
        compared: labels compared.
        ran_as: precision, folding, compilation, batches and why.
        machine: processor or accelerator.
        threads: of the processor.
        torch: version.
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
    ran_as: dict[str, Any]
    machine: str
    threads: int
    torch: str


def reference_votes(plain: Plain, image: Tensor, sigma: float, n: int, batch: int, num_classes: int) -> Tensor:
    """The field's loop (Cohen, Rosenfeld and Kolter 2019): float32, eager, one generator; counts ``(K,)``."""
    keep_freed_memory(64 << 20)  # as in a process that this engine never ran in
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
    """Labels the way code without further thought computes them: float32, eager, contiguous layout, argmax."""

    def __init__(self, base: Pipeline) -> None:
        super().__init__()
        self.pipeline = base
        if convertible(base):
            self.pipeline = copy.deepcopy(base).to(memory_format=torch.contiguous_format)
            self.pipeline.channels_last = self.pipeline.classifier.channels_last = False  # type: ignore[attr-defined]

    def forward(self, images: Tensor) -> Tensor:
        """Labels ``(B,)`` of noisy images ``(B, C, H, W)``."""
        try:
            return self.pipeline.logits(images).argmax(1)
        except UserError:  # this classifier gives labels only
            return self.pipeline(images)  # type: ignore[no-any-return]


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
    """Measure both on these images.

    Args:
        smoothed: not prepared yet: it decides for one certificate of n samples.
        images: real ones, ``(C, H, W)``; the first is timed, all serve to compare labels.
        n: samples of a certificate.
        pairs: turns of each, after one to warm up.
        seconds: of a turn.
        turn: samples of a turn, in place of ``seconds``.
        reference_batch: None takes 1,000, or 16 for images over 2^14 values on a processor (faster there, and
            batches of 1,000 would need tens of gigabytes).
        progress: called with what is being done.
    """
    image = images[0].to(smoothed.device)
    batch = reference_batch or _usual_batch(image)
    plain = Plain(smoothed.base)
    flops = _flops(plain, image)

    progress("deciding how to run")
    start = time.perf_counter()
    execution = smoothed.prepare(images[0], n, again=True)
    prepared = time.perf_counter() - start
    ceiling = product_speed(execution.precision, smoothed.device)  # and at the end: a shared machine has its moments

    def engine(samples: int) -> None:
        smoothed.votes(images[0], samples, stage="benchmark")

    def reference(samples: int) -> None:
        reference_votes(plain, image, smoothed.noise.scale, samples, batch, smoothed.num_classes)

    runs = [(engine, execution.batch_size), (reference, batch)]
    rates, lengths = _in_turn(runs, pairs, seconds, turn, progress)
    ratios = [a / b for a, b in rates]
    mine, theirs = (statistics.median(column) for column in zip(*rates, strict=True))
    progress("comparing labels")
    same, compared = _agreement(smoothed, images)
    ceiling = max(ceiling, product_speed(execution.precision, smoothed.device))
    return Measured(
        engine=mine,
        reference=theirs,
        ratio=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        pairs=pairs,
        turn=(lengths[0], lengths[1]),
        reference_batch=batch,
        prepared=prepared,
        certificate=prepared + n / mine,
        certificate_reference=n / theirs,
        n=n,
        flops=flops,
        ceiling=ceiling,
        share=mine * flops / ceiling,
        same=same,
        compared=compared,
        ran_as=asdict(execution),
        machine=machine_name(smoothed.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def _usual_batch(image: Tensor) -> int:
    large = image.numel() > 2**14 and image.device.type == "cpu"
    return 16 if large else 1000


def _in_turn(
    runs: Sequence[tuple[Callable[[int], None], int]],
    pairs: int,
    seconds: float,
    turn: int | None,
    progress: Callable[[str], None],
) -> tuple[list[list[float]], list[int]]:
    """Rates of the functions in every pair of turns, once warm, and the samples of their turns."""
    progress("warming up")
    lengths = []
    for run, batch in runs:
        run(batch)
        lengths.append(turn or _samples_in(seconds, run, batch))
    rates = []
    for pair in range(pairs):
        progress(f"pair {pair + 1} of {pairs}")
        rates.append([_rate(run, samples) for (run, _), samples in zip(runs, lengths, strict=True)])
    return rates, lengths


def _rate(run: Callable[[int], None], samples: int) -> float:
    start = time.perf_counter()
    run(samples)
    return samples / (time.perf_counter() - start)


def _samples_in(seconds: float, run: Callable[[int], None], batch: int) -> int:
    """Samples of so many seconds, in whole batches."""
    guess = _rate(run, batch)
    speed = _rate(run, max(1, round(guess / batch)) * batch)  # a second's worth
    return max(1, round(speed * seconds / batch)) * batch


def _flops(plain: Plain, image: Tensor) -> float:
    """Of one forward pass of one image; 0 where the counter sees none (ONNX, a Python function)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plain(image[None])
    return float(counter.get_total_flops())


def _agreement(smoothed: SmoothedClassifier, images: list[Tensor]) -> tuple[int, int]:
    """Labels of ``KEPT`` noisy copies of each image that plain float32 gives too, and how many were compared."""
    targets = [Target(image, str(i)) for i, image in enumerate(images)]
    same = compared = 0
    for target, tallies in smoothed.sample(targets, {"agreement": KEPT}):
        labels = tallies["agreement"].labels
        assert target.name is not None
        same += smoothed.agreement(target.image, labels, stage="agreement", seed=0, image_id=target.name)
        compared += len(labels)
    return same, compared


def in_words(found: Measured) -> str:
    """The measurement as people read it."""
    ran = found.ran_as
    rows = [
        ("machine", f"{found.machine}, {found.threads} threads, torch {found.torch}"),
        ("reference", f"{found.reference:,.1f} samples/s (float32, eager, batches of {found.reference_batch})"),
        ("engine", f"{found.engine:,.1f} samples/s ({Execution(**ran).describe()})"),
        *(("", why) for why in ran["why"]),
        ("ratio", f"{found.ratio:.2f} ({found.ratio_min:.2f} to {found.ratio_max:.2f} over {found.pairs} pairs)"),
    ]
    if found.flops:
        rows.append(
            (
                "ceiling",
                f"{found.engine * found.flops / 1e9:,.0f} of the {found.ceiling / 1e9:,.0f} GFLOP/s of a matrix "
                f"product in {ran['precision']}: {found.share:.0%}",
            )
        )
    rows += [
        (
            "certificate",
            f"{found.certificate:,.1f} s at n = {found.n:,} (of which {found.prepared:.1f} s to decide and compile); "
            f"reference {found.certificate_reference:,.1f} s",
        ),
        ("labels", f"{found.same} of {found.compared} are those of plain float32"),
    ]
    return "\n".join(f"{name:<11} {text}".rstrip() for name, text in rows)
