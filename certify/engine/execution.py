"""Run a base classifier: precision, folded batch norms, compilation, batch size.

The function stays the same up to rounding; what ran is what is certified, so all of it goes into the run's header.
``certify/engine/policy.py`` chooses.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from certify.engine.hardware import detect_hardware
from certify.errors import UserError, first_line
from certify.models.classifier import Classifier
from certify.models.pipeline import Pipeline
from certify.types import BaseClassifier

_T = TypeVar("_T")

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Execution:
    """One way to run a base classifier.

    Attributes:
        precision: inference dtype after the noise is added: ``float32``, ``bfloat16`` or ``float16``.
        folded: True if batch norms are folded into the convolutions before them.
        compiled: True if denoiser, normalisation, network and argmax run as one compiled function.
        batch_size: samples per forward pass.
        why: the reasons, for people.
        failed: what was planned and could not be done, such as compiling; empty when nothing failed.
    """

    precision: str
    folded: bool
    compiled: bool
    batch_size: int
    why: tuple[str, ...] = ()
    failed: str = ""

    @property
    def plain(self) -> bool:
        """True if this is the base classifier unchanged: float32, unfolded, eager."""
        return self.precision == "float32" and not self.folded and not self.compiled

    def describe(self) -> str:
        """Return the settings as text, without the reasons."""
        words = [self.precision, *(["batch norms folded"] if self.folded else [])]
        return ", ".join([*words, "compiled" if self.compiled else "eager", f"batches of {self.batch_size}"])

    def runs_like(self, other: Execution) -> bool:
        """True if both compute the same function, whatever their batch sizes."""
        mine, theirs = ((e.precision, e.folded, e.compiled) for e in (self, other))
        return mine == theirs


def default_batch_size(image: Tensor) -> int:
    """Return the samples per batch: 2 MiB of float32 images on a processor, at most 128 MiB on an accelerator.

    On a processor activations should stay in its cache (``benchmarks/log.md``). On an accelerator half of the memory
    should hold them, if they take 100 times the space of the images. Between 4 and 8,000.
    """
    budget = 2**19 if image.device.type == "cpu" else 2**25
    if memory := detect_hardware(image.device).memory:
        budget = min(budget, memory * 2**30 // 800)
    return max(4, min(8000, budget // max(1, image.numel())))


def convertible(base: BaseClassifier) -> bool:
    """True if the base classifier is made of torch modules only, which can be copied, cast, folded and compiled."""
    return isinstance(base, Pipeline) and isinstance(base.classifier, Classifier) and base.classifier.native


def prepare(
    base: BaseClassifier, execution: Execution, example: Tensor, *, compile_seconds: float | None = None
) -> tuple[BaseClassifier, Execution]:
    """Prepare the base classifier to run this way; ``base`` itself is left unchanged.

    What cannot be done is left out: batch norms that cannot be folded, silently; conversion where the network is not
    made of torch modules or cannot be copied, and compilation, with the reason in the returned execution's ``why``.

    Args:
        base: the base classifier in float32, on its device.
        execution: how to run it.
        example: one clean image ``(C, H, W)`` on the same device.
        compile_seconds: wall time after which a compilation on a processor is given up; None: never.

    Returns:
        What to call, and how it really runs.

    Raises:
        UserError: the classifier cannot be run at this precision.
    """
    if execution.plain:
        return base, execution
    noisy = noisy_batch(example, execution.batch_size)
    fast, real = _converted(base, execution, noisy[:4])
    return _compiled(fast, real, noisy, compile_seconds) if real.compiled else (fast, real)


def _converted(base: BaseClassifier, execution: Execution, noisy: Tensor) -> tuple[BaseClassifier, Execution]:
    """Return a copy of the base classifier, folded and cast; ``base`` itself where nothing is or can be changed."""
    reason = "it is not made of torch modules"
    if isinstance(base, Pipeline) and convertible(base):
        try:
            fast = copy.deepcopy(base)
        except Exception as error:  # modules may hold anything
            reason = f"it cannot be copied ({first_line(error)})"
        else:
            real = replace(execution, folded=execution.folded and _fold(fast, base, noisy))
            if real.precision != "float32":
                _cast(fast, real.precision, noisy)
            return (base if real.plain else fast), real
    if execution.precision != "float32":
        raise UserError(f"--precision {execution.precision} does not fit this classifier: {reason}; drop --precision")
    why = (*execution.why, f"the classifier runs as it is: {reason}")
    return base, replace(execution, folded=False, compiled=False, why=why)


def noisy_batch(example: Tensor, size: int) -> Tensor:
    """Return a batch ``(size, C, H, W)`` to try a classifier on: the same noisy copies of an image every time."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.25 * torch.randn((min(size, 64), *example.shape), generator=generator)
    return noise.to(example.device).add_(example).repeat(-(-size // 64), 1, 1, 1)[:size].contiguous()


class _AtSigma(nn.Module):
    """A denoiser at one noise level, so that whatever it computes from sigma is a constant when it is traced."""

    def __init__(self, denoiser: nn.Module, sigma: float | None) -> None:
        super().__init__()
        self.denoiser, self.fixed = denoiser, sigma

    def forward(self, noisy: Tensor, sigma: float | None = None) -> Tensor:
        cleaned: Tensor = self.denoiser(noisy, self.fixed)
        return cleaned


def _fold(fast: Pipeline, base: Pipeline, noisy: Tensor) -> bool:
    """Fold batch norms into the convolutions before them, where that leaves the logits as they are."""
    classifier, denoiser = fast.classifier, fast.denoiser
    assert isinstance(classifier, Classifier)
    net = classifier.net
    folded_net = _folded(net)
    folded_denoiser = None if denoiser is None else _folded(_AtSigma(denoiser, fast.sigma))
    if folded_net is None and folded_denoiser is None:
        return False
    classifier.net, fast.denoiser = folded_net or net, folded_denoiser or denoiser
    fast.to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            same = torch.allclose(fast.logits(noisy), base.logits(noisy), rtol=1e-3, atol=1e-3, equal_nan=True)
    except Exception:  # labels only, or control flow that was traced away
        same = False
    if not same:
        classifier.net, fast.denoiser = net, denoiser
    return same


def folded_copy(net: nn.Module) -> nn.Module | None:
    """Return a copy of a network with its batch norms folded, differentiable with respect to its input; or None.

    The caller has to check that it still is the same function: a convolution may be used twice.
    """
    return _folded(copy.deepcopy(net))


def _folded(net: nn.Module) -> nn.Module | None:
    """Return the network with its batch norms folded; None where there are none, or where it cannot be traced."""
    if not _batch_norms(net):
        return None
    from torch.fx.experimental.optimization import fuse

    try:
        graph = fx.GraphModule(net, fx.Tracer().trace(net))
        folded: nn.Module = fuse(graph, inplace=True, no_trace=True)
    except Exception:  # control flow that depends on the data
        return None
    return folded.eval() if _batch_norms(folded) < _batch_norms(net) else None


def _batch_norms(net: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())


def _cast(fast: Pipeline, precision: str, noisy: Tensor) -> None:
    """Cast weights and activations to this precision; images are noised and normalised in float32 before that."""
    try:
        fast.cast(PRECISIONS[precision])
        with torch.no_grad():
            fast(noisy)
    except Exception as error:
        raise UserError(
            f"the base classifier does not run in {precision} ({first_line(error)}); pass --precision float32"
        ) from error


class Compiled:
    """A base classifier as one compiled function with frozen weights, compiled once for each batch shape.

    The weights are part of the compiled code, so those of ``fast`` must not change afterwards.
    """

    _numbers = itertools.count()

    def __init__(self, fast: BaseClassifier) -> None:
        self.fast = fast
        self.num_classes = fast.num_classes
        self._shapes: set[torch.Size] = set()

        def labels(noisy: Tensor) -> Tensor:
            return fast(noisy)

        # A code object of its own: the compiler counts recompilations by it, and gives up on the ninth classifier.
        labels.__code__ = labels.__code__.replace(co_name=f"labels_{next(self._numbers)}")
        self._function: Callable[[Tensor], Tensor] = torch.compile(labels, dynamic=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Labels ``(B,)`` of noisy images ``(B, C, H, W)``; compiles at the first batch of a shape."""
        from torch._dynamo import config as tracing  # takes half a second, which eager runs need not wait for
        from torch._inductor import config as lowering

        # Freezing must be set while the function is traced, not only while it is lowered: as an option of
        # torch.compile it has no effect. One launch a batch on an accelerator, by a recorded graph.
        options: dict[str, Any] = {"freezing": True}
        if images.device.type == "cuda":
            options["triton.cudagraphs"] = True
        else:
            options["compile_threads"] = 1  # no worker processes, which would keep running beside the run
        limit = "recompile_limit" if hasattr(tracing, "recompile_limit") else "cache_size_limit"  # in torch 2.6
        with lowering.patch(options), tracing.patch({limit: 64}):
            images = images.contiguous()
            if images.shape in self._shapes:
                return self._function(images)
            with _quiet():
                labels = self._function(images)
            self._shapes.add(images.shape)
            return labels

    def describe(self) -> dict[str, Any]:
        """Return the description of the base classifier."""
        return self.fast.describe()


def _compiled(
    fast: BaseClassifier, execution: Execution, noisy: Tensor, seconds: float | None
) -> tuple[BaseClassifier, Execution]:
    """Compile the base classifier for batches like this one, now; run it eagerly if that fails."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))

    def compile_now() -> tuple[Compiled, Tensor]:
        with torch.no_grad():
            function = Compiled(fast)
            return function, function(noisy)

    try:
        with torch.no_grad():
            expected = fast(noisy)
            if seconds is None or noisy.device.type != "cpu":  # an accelerator's recorded graphs belong to one thread
                function, labels = compile_now()
            else:
                function, labels = _run_within(seconds, compile_now)
            if labels.shape != expected.shape or (labels != expected).sum() > max(1, len(labels) // 20):
                raise RuntimeError("the compiled function gives other labels")
    except Exception as error:  # no compiler, an unsupported operator, a bug in it: all the same to the user
        reason = f"compilation failed ({type(error).__name__}: {first_line(error)[:160]}): running eagerly"
        if isinstance(error, TimeoutError) and seconds is not None:
            reason = f"compilation was given up after {seconds:.3g} s: running eagerly (--compile on sets no limit)"
        return fast, replace(execution, compiled=False, why=(*execution.why, reason), failed=reason)
    return function, execution


class _Stopped(BaseException):
    """Raised in a thread whose time is up."""


def _run_within(seconds: float, work: Callable[[], _T]) -> _T:
    """Call ``work`` in a thread of its own and return its result.

    When the time is up, this returns at once, and the thread is told to stop, which it does at its next step of Python
    code. State that belongs to the thread disappears with it.

    Raises:
        TimeoutError: this many seconds of wall time have passed.
        BaseException: whatever ``work`` raises.
    """
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name="certify-within", daemon=True)
    thread.start()
    try:
        return result.result(seconds)
    finally:
        if not result.done():
            threading.Thread(target=_stop, args=(thread,), daemon=True).start()


def _stop(thread: threading.Thread) -> None:
    """Raise ``_Stopped`` in a thread until it ends: callbacks of the garbage collector swallow it."""
    report = sys.unraisablehook

    def ignore_stopped(unraisable: Any) -> None:
        if unraisable.exc_type is not _Stopped:
            report(unraisable)

    sys.unraisablehook = ignore_stopped
    while thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Stopped))
        thread.join(1.0)
    sys.unraisablehook = report


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the compiler's log messages and warnings."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def cache_folder() -> Path:
    """Return the folder of compiled code: ``CERTIFY_CACHE``, or ``certify`` in the user's cache folder."""
    own = os.environ.get("CERTIFY_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "certify"
