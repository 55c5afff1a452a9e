"""The execution policy: how to run a base classifier, from the hardware and the amount of work alone.

Nothing is timed: the same command computes the same function on every machine of the same kind. What each rule is worth
on a given machine and model is printed by ``certify bench``, which never changes the choice. The figures behind the
constants stand in ``benchmarks/log.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from certify.engine.execution import PRECISIONS, Execution, convertible, default_batch_size, noisy_batch, prepare
from certify.engine.hardware import Hardware, detect_hardware
from certify.engine.monte_carlo import label_batch
from certify.errors import UserError
from certify.smoothing.numeric import as_int
from certify.types import BaseClassifier

LITTLE_WORK = 2**24
"""Values (samples x C x H x W) up to which the classifier runs unchanged."""

COMPILE_SECONDS = 300.0
"""Wall time after which a compilation on a processor is given up, unless the user insists on it."""

# Floating-point operations from which compilation pays several times over, by device type. The figure for CUDA follows
# from published speeds: like the other rules for accelerators, it has not been measured.
_COMPILED_FROM = {"cpu": 3e14, "cuda": 1e16}


@dataclass(frozen=True)
class EngineOptions:
    """The user's choice of how to run the base classifier; ``auto`` (None for the batch size) leaves it to the policy.

    Attributes:
        precision: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        compile: ``auto``, ``on`` or ``off``.
        batch_size: samples per forward pass.

    Raises:
        UserError: anything else.
    """

    precision: str = "auto"
    compile: str = "auto"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in ("auto", *PRECISIONS):
            raise UserError(f"precision {self.precision!r}; expected auto, {', '.join(PRECISIONS)}")
        if self.compile not in ("auto", "on", "off"):
            raise UserError(f"compile {self.compile!r}; expected auto, on or off")
        if self.batch_size is not None:
            object.__setattr__(self, "batch_size", as_int(self.batch_size, "batch_size"))
            if self.batch_size < 1:
                raise UserError(f"batch size {self.batch_size}; expected a whole number from 1, or None for auto")

    @property
    def unchanged(self) -> bool:
        """True if they ask for the classifier as it is: float32 and not compiled."""
        return (self.precision, self.compile) == ("float32", "off")


def plan_execution(options: EngineOptions, hardware: Hardware, *, batch_size: int, work: float) -> Execution:
    """Choose how to run a classifier made of torch modules: a pure function of its arguments.

    Args:
        options: what the user has fixed.
        hardware: where it runs.
        batch_size: samples per forward pass.
        work: floating-point operations of the whole run.
    """
    precision, why = options.precision, []
    if precision == "auto":
        precision = "bfloat16" if hardware.bfloat16 else "float32"
        why.append(f"{precision}: {hardware.bfloat16 or 'no bfloat16 instructions'} on this {_kind(hardware)}")
    compiled = options.compile == "on"
    if options.compile == "auto" and (least := _COMPILED_FROM.get(hardware.device)) is not None:
        compiled = hardware.compiler and work >= least
        sign = "from" if work >= least else "below"
        missing = "" if hardware.compiler else ", and there is no compiler"
        why.append(
            f"{'compiled' if compiled else 'eager'}: {_short(work)} operations, {sign} the {_short(least)} "
            f"where compilation pays{missing}"
        )
    return Execution(precision, not options.unchanged, compiled, batch_size, tuple(why))


def choose_execution(
    base: BaseClassifier, example: Tensor, samples: int, options: EngineOptions
) -> tuple[BaseClassifier, Execution]:
    """Prepare the base classifier as the policy says for this machine and this many samples.

    What the classifier cannot do is left out and named in ``why``: a precision it cannot be cast to, unless the user
    asked for it, and a compilation that fails. A batch that does not fit in memory is halved until it does.

    Args:
        base: the base classifier in float32, on its device.
        example: one clean image ``(C, H, W)`` on the same device.
        samples: noisy copies in the whole run.
        options: what the user has fixed.

    Returns:
        What to call, and how it runs.

    Raises:
        UserError: the classifier cannot be run at the precision that the user asked for.
    """
    hardware = detect_hardware(example.device)
    size = options.batch_size or default_batch_size(example)
    little = samples * example.numel() <= LITTLE_WORK
    if little or not convertible(base):
        why = ("little work: the classifier runs unchanged",) if convertible(base) and not options.unchanged else ()
        precision = "float32" if options.precision == "auto" else options.precision
        return prepare(base, Execution(precision, False, options.compile == "on", size, why), example)
    _, size = label_batch(base, noisy_batch(example, size))
    execution = plan_execution(options, hardware, batch_size=size, work=samples * count_operations(base, example))
    limit = None if options.compile == "on" else COMPILE_SECONDS
    try:
        return prepare(base, execution, example, compile_seconds=limit)
    except UserError as error:
        if options.precision != "auto":
            raise
        reasons = (*execution.why, f"not {execution.precision}: {error}")
        execution = replace(execution, precision="float32", why=reasons)
        return prepare(base, execution, example, compile_seconds=limit)


def count_operations(base: Callable[[Tensor], Tensor], example: Tensor) -> float:
    """Count the products and sums in one forward pass of one image ``(C, H, W)``; 0 where torch counts none."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        base(example[None])
    return float(counter.get_total_flops())


def _kind(hardware: Hardware) -> str:
    return "processor" if hardware.device == "cpu" else "accelerator"


def _short(operations: float) -> str:
    return f"{operations:.0e}".replace("e+", "e") if operations else "0"
