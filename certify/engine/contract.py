"""Check base classifiers and denoisers on noisy copies of a real image, before any answer counts.

A certificate needs one fixed function: the output for an image depends on that image alone. Modules that draw random
numbers once per forward pass, use batch statistics, keep state or are in training mode are refused by name. Every path
calls this module the first time a classifier or denoiser meets a real image.

Pixels and scores are compared up to rounding, labels up to ties. A whole batch is evaluated twice, and every copy once
more on its own: a module that flips one fair coin per call passes with probability 2^-17. The noisy copies come from
a separate generator: the global random state is neither set nor restored.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from certify.engine.execution import default_batch_size
from certify.engine.monte_carlo import out_of_memory
from certify.errors import CertifyError, ContractError, RunFault, UserError, first_line
from certify.models.classifier import Classifier, labels_from_logits
from certify.models.defence import Defence
from certify.models.identity import describe_module
from certify.smoothing.rng import block_generator, stream_key
from certify.types import FAILED, BaseClassifier, Noise

COPIES = 16
"""Noisy copies; each is evaluated alone and in its batch."""
LABELLED = 64
"""Noisy copies for a classifier that returns labels only: a label reveals less than scores do."""
QUERIES = 17
"""Queries about one noisy copy, for a classifier that takes one image per query."""

_FEW = 1e-3  # share of pixels that may jump because of rounding before them, as with JPEG's coefficients
_IN_16_BITS = 2.0**-4  # tolerance relative to the largest value, where arithmetic is in 16 bits
_NEAR = 0.05  # of a copy's standard deviation: how far away a tie is looked for
_TWICE, _ALONE = "when called twice on the same batch", "alone and in a batch"
_ADVICE = {
    _TWICE: "remove the random draw inside, or the state that changes from call to call",
    _ALONE: "remove batch statistics (is a network inside in training mode?) and random draws shared by a batch",
}

Evaluate = Callable[[Tensor, Sequence[int]], Tensor]
"""Outputs for a batch ``(B, C, H, W)``, first dimension B, given the indices of its images among all copies."""
Compare = Callable[[Tensor, Tensor, Tensor, Sequence[int], str], None]
"""Raises where two outputs for a batch with these indices differ; the last argument says how they were obtained."""


def check_contract(
    classifier: BaseClassifier | None, denoiser: nn.Module | None, noise: Noise, image: Tensor, *, queries: bool = True
) -> None:
    """Check a denoiser and the classifier behind it on noisy copies of one image.

    Args:
        classifier: in float32, on the image's device; None: the denoiser alone.
        denoiser: ``forward(noisy, sigma)``, on the image's device, or None.
        noise: the smoothing distribution.
        image: ``(C, H, W)``, float32 in [0, 1].
        queries: allow queries to a classifier that takes one image per query; it gets the repeat test only.

    Raises:
        ContractError: a part is not a fixed function of one image.
        UserError: a part returns something else than images or labels.
        RunFault: the classifier failed.
    """
    paid = getattr(classifier, "one_by_one", False)

    def denoise(noisy: Tensor, rows: Sequence[int] = ()) -> Tensor:
        return denoiser(noisy, noise.scale)  # type: ignore[misc,no-any-return]

    def check(size: int) -> None:
        generator = block_generator(stream_key(0, "", "contract"), 0, image.device)
        shape = (size, *image.shape)
        batches: Iterator[Tensor] = (
            noise.add(image, noise.sample(shape, generator).to(image.device)) for _ in itertools.count()
        )
        if denoiser is not None:
            some = list(itertools.islice(batches, -(-COPIES // size)))
            batches = itertools.chain(
                _check_denoiser(f"the denoiser {_name(denoiser)}", denoise, some), map(denoise, batches)
            )
        if classifier is not None and not paid:
            _check_classifier(classifier, batches)
        elif classifier is not None and queries:
            _query_again(classifier, next(batches)[:1])

    _in_memory(check, image)


def check_defence(defence: Defence, image: Tensor, key: bytes) -> None:
    """Check a defence on copies of one image with a little noise, once; the training mode of its parts, every time.

    A purifier that draws random numbers has to use the generators it is given: equal keys give equal images.

    Args:
        defence: purifiers before frozen classifiers.
        image: ``(C, H, W)``, float32 in [0, 1].
        key: of :func:`certify.smoothing.rng.stream_key`, from which the copies' keys follow.

    Raises:
        ContractError: a part is not a fixed function of an image and its key.
        UserError: a part returns something else than images or labels.
        RunFault: a part failed.
    """

    def purify(member: int) -> Evaluate:
        def evaluate(images: Tensor, rows: Sequence[int]) -> Tensor:
            generators = [block_generator(key, row) for row in rows] if defence.random else None
            return defence.purify(images, member, generators)

        return evaluate

    def check(size: int) -> None:
        draws = block_generator(key, COPIES)
        batches = [
            (image + 0.1 * torch.randn((size, *image.shape), generator=draws, device=draws.device).to(image)).clamp(
                0, 1
            )
            for _ in range(0, COPIES, size)
        ]
        for member, (purifier, classifier) in enumerate(parts):
            part = f"the denoiser {_name(purifier)} of defence {defence.name}"
            purified = _check_denoiser(part, purify(member), batches)
            if not getattr(classifier, "one_by_one", False):
                _check_classifier(classifier, iter(purified))

    parts = list(zip(defence.purifiers, defence.classifiers, strict=True))
    for purifier, classifier in parts:
        refuse_training_mode(purifier, classifier)
    if not defence.checked:
        _in_memory(check, image)
        defence.checked = True


def refuse_training_mode(denoiser: nn.Module | None, classifier: Any) -> None:
    """Refuse a denoiser or classifier with a submodule in training mode.

    Raises:
        ContractError: names the submodule.
    """
    for kind, part in (("denoiser", denoiser), ("base classifier", classifier)):
        for name, inner in part.named_modules() if isinstance(part, nn.Module) else ():
            if getattr(inner, "training", False):
                where = f" ({name}: {type(inner).__name__})" if name else ""
                raise ContractError(
                    f"the {kind} {_name(part)} is in training mode{where}, where answers may depend on the batch or on "
                    "chance; call .eval() on it"
                )


@contextlib.contextmanager
def breakage_left() -> Iterator[None]:
    """Ignore every error in the block except a broken contract: the work that follows reports the others itself."""
    try:
        yield
    except ContractError:
        raise
    except Exception:
        return


def _check_denoiser(part: str, denoise: Evaluate, batches: Iterable[Tensor]) -> list[Tensor]:
    """Return the denoised batches, having checked that each image alone gives the same image of the same shape."""

    def evaluate(images: Tensor, rows: Sequence[int]) -> Tensor:
        size = "x".join(map(str, images.shape[1:]))
        hint = "does it take that many channels, and that size?"
        fails = f"{part} fails on images of {size}"
        output = _call(part, denoise, images, rows, lambda error: UserError(f"{fails}: {first_line(error)}; {hint}"))
        if not isinstance(output, Tensor) or output.shape != images.shape or not output.is_floating_point():
            expected = f"floating-point {tuple(images.shape)}"
            raise UserError(f"{part} returned {_kind(output)} for {len(images)} images of {size}; expected {expected}")
        if not output.isfinite().all():
            raise UserError(f"{part} returned NaN or infinity; expected finite pixels")
        return output

    return _compare_all(evaluate, batches, _compare_values(part, evaluate, 1e-4, _FEW))


def _check_classifier(classifier: BaseClassifier, batches: Iterator[Tensor]) -> None:
    """Check that each image alone gives the same label, in range; scores are compared where there are any."""
    part, classes = f"the base classifier {_name(classifier)}", classifier.num_classes
    forward: Callable[[Tensor], Any] = classifier.output if isinstance(classifier, Classifier) else classifier

    def failure(error: Exception) -> CertifyError:
        return RunFault(f"the base classifier failed: {type(error).__name__}: {first_line(error)}")

    def evaluate(images: Tensor, rows: Sequence[int]) -> Tensor:
        output = _call(part, lambda given, _: forward(given), images, rows, failure)
        if isinstance(classifier, Classifier) and isinstance(output, Tensor):
            if output.shape == (len(images), classes):
                return output
            if output.ndim == 2:
                count = output.shape[1]
                raise UserError(f"{part} returned {count} scores per image; expected {classes}, as --num-classes says")
            output = classifier.labels(output)
        if not isinstance(output, Tensor) or output.shape != (len(images),) or output.is_floating_point():
            expected = f"integer labels ({len(images)},)"
            raise UserError(f"{part} returned {_kind(output)} for {len(images)} images; expected {expected}")
        wrong = output[(output < FAILED) | (output >= classes)]
        if len(wrong):
            raise UserError(
                f"{part} returned {len(wrong)} of {len(images)} labels outside 0 to {classes - 1} (from "
                f"{int(wrong.min())} to {int(wrong.max())}; {FAILED} is a failed trial)"
            )
        return output.long()

    batch = next(batches)
    first = evaluate(batch, range(len(batch)))
    scored = first.ndim == 2
    compare = _compare_scores(part, evaluate) if scored else _compare_labels(part, evaluate)
    more = -(-(COPIES if scored else LABELLED) // len(batch)) - 1
    _compare_all(evaluate, [batch, *itertools.islice(batches, more)], compare, first)


def _query_again(classifier: BaseClassifier, image: Tensor) -> None:
    """Query one image ``(1, C, H, W)`` repeatedly and compare the labels; failed queries do not count."""
    labels = classifier(image.expand(QUERIES, -1, -1, -1))
    counts = torch.bincount(labels[labels != FAILED]).tolist()
    shown = [str(count) for count in sorted(counts, reverse=True) if count]
    if len(shown) > 1:
        raise ContractError(
            f"the base classifier {_name(classifier)} answers differently when queried {QUERIES} times about one image "
            f"({len(shown)} labels, {' and '.join(shown)} times): a certificate needs a fixed function of one image"
        )


def _name(part: Any) -> str:
    """Return the name of a denoiser or classifier; for noise with a denoiser behind it, the denoiser's."""
    inner = getattr(part, "denoiser", None)
    module = inner if isinstance(inner, nn.Module) else part
    own = getattr(module, "name", None)
    return own if isinstance(own, str) else str(describe_module(module).get("name", type(module).__name__))


def _kind(output: Any) -> str:
    return f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__


def _in_memory(check: Callable[[int], None], image: Tensor) -> None:
    """Run a check on batches of ``COPIES`` copies of an image, or fewer if memory is short."""
    size = min(COPIES, default_batch_size(image))
    while True:
        try:
            with torch.no_grad():
                check(size)
        except Exception as error:
            if size == 1 or not out_of_memory(error):
                raise
            size //= 2
        else:
            return


def _call(
    part: str, evaluate: Evaluate, images: Tensor, rows: Sequence[int], failure: Callable[[Exception], CertifyError]
) -> Any:
    """Return the output for these images; refuse a module that writes into them, and convert its exceptions."""
    given = images.clone()
    try:
        output = evaluate(given, rows)
    except CertifyError:
        raise
    except Exception as error:  # the user's code may raise anything
        if out_of_memory(error):
            raise
        raise failure(error) from error
    if not torch.equal(given, images):
        raise ContractError(f"{part} writes into the images it is given; work on a copy: images = images.clone()")
    return output


def _compare_all(
    evaluate: Evaluate, batches: Iterable[Tensor], compare: Compare, first: Tensor | None = None
) -> list[Tensor]:
    """Return the outputs for whole batches, compared with a second call (the first batch) and with each image alone.

    ``first`` is the output for the first batch, if it is known already.
    """
    outputs: list[Tensor] = []
    for k, batch in enumerate(batches):
        rows = range(k * len(batch), (k + 1) * len(batch))
        outputs.append(first if first is not None and k == 0 else evaluate(batch, rows))
        if k == 0:
            compare(outputs[k], evaluate(batch, rows), batch, rows, _TWICE)
        alone = [evaluate(batch[i : i + 1], rows[i : i + 1]) for i in reversed(range(len(batch)))]  # reversed: state
        compare(outputs[k], torch.cat(alone[::-1]), batch, rows, _ALONE)  # may still hold the batch's last image
    return outputs


def _refuse(part: str, how: str, amount: str) -> ContractError:
    why = f"a certificate needs a fixed function of one image; {_ADVICE[how]}"
    return ContractError(f"{part} answers differently {how} ({amount}): {why}")


def _clamp_irrelevant(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Clamp scores far below every image's second best, in two outputs ``(B, K)``.

    These decide nothing, and a class that is masked with -1e9 would hide any difference among the others.
    """
    best = torch.cat([one, two]).topk(min(2, one.shape[1]), dim=1).values
    best = best[best.isfinite()]
    if not len(best):
        return one, two
    floor = float(2 * best.min() - best.max())
    return one.clamp(min=floor), two.clamp(min=floor)


def _compare_values(
    part: str,
    evaluate: Evaluate,
    share_of_range: float,
    few: float,
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda one, two: (one, two),
) -> Compare:
    """Return a comparison of pixels or scores up to rounding: a share of their range, or more for 16-bit arithmetic."""

    def compare(one: Tensor, two: Tensor, batch: Tensor, rows: Sequence[int], how: str) -> None:
        one, two = prepare(one.cpu().double(), two.cpu().double())
        finite = one.isfinite() & two.isfinite()
        alike = (one == two) | (one.isnan() & two.isnan())
        difference = torch.where(finite, (one - two).abs(), torch.where(alike, 0.0, torch.inf))
        known = one[finite] if finite.any() else one.new_zeros(1)
        largest = float(known.abs().max())
        rounding = share_of_range * float(known.max() - known.min()) + 1e-5 * largest
        allowed = few if how == _ALONE else 0.0

        def beyond(tolerance: float) -> bool:
            return float((difference > tolerance).double().mean()) > allowed

        if beyond(rounding) and (beyond(_IN_16_BITS * largest) or not _in_16_bits(evaluate, batch, rows)):
            raise _refuse(part, how, f"by up to {float(difference.max()):.2g}")

    return compare


def _compare_scores(part: str, evaluate: Evaluate) -> Compare:
    """Return a comparison of scores up to rounding; if many labels differ all the same, repeated calls must agree."""
    by_value = _compare_values(part, evaluate, 1e-3, 0.0, _clamp_irrelevant)

    def compare(one: Tensor, two: Tensor, batch: Tensor, rows: Sequence[int], how: str) -> None:
        by_value(one, two, batch, rows, how)
        labels = labels_from_logits(one)

        def changed(scores: Tensor) -> int:
            return int((labels_from_logits(scores) != labels).sum())

        again = (changed(evaluate(batch, rows)) for _ in range(COPIES)) if changed(two) > len(batch) // 8 else ()
        if wrong := next((count for count in again if count > len(batch) // 8), 0):
            raise _refuse(part, _TWICE, f"{wrong} of {len(batch)} labels")

    return compare


def _in_16_bits(evaluate: Evaluate, batch: Tensor, rows: Sequence[int]) -> bool:
    """True if any intermediate tensor has 16 bits, or products of float32 may be rounded to fewer bits."""
    narrow = [torch.get_float32_matmul_precision() != "highest"]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            narrow.append(getattr(output, "dtype", None) in (torch.bfloat16, torch.float16))
            return output

    with contextlib.suppress(Exception), Watch():  # type: ignore[no-untyped-call]  # not all code can be watched
        narrow.append(evaluate(batch, rows).dtype in (torch.bfloat16, torch.float16))
    return any(narrow)


def _compare_labels(part: str, evaluate: Evaluate) -> Compare:
    """Return a comparison of labels up to ties: images whose label a change far below the noise changes as well.

    The change has to show within one call, or one coin per call would look like a tie, and among images evaluated
    alone, or a module that compares an image with its batch would.
    """

    def tie(image: Tensor, row: int, size: int) -> bool:
        generator = block_generator(stream_key(row, "", "tie"), 0, image.device)
        together, alone = False, set[int]()
        for _ in range(0, COPIES, size):
            drawn = torch.randn((size, *image.shape), generator=generator, device=generator.device)
            near = image + _NEAR * image.std(correction=0) * drawn.to(image)
            together = together or len(evaluate(near, [row] * size).unique()) > 1
            alone |= {int(evaluate(near[i : i + 1], [row])) for i in range(size)}
        return together and len(alone) > 1

    def compare(one: Tensor, two: Tensor, batch: Tensor, rows: Sequence[int], how: str) -> None:
        wrong = (one != two).nonzero().flatten().tolist()
        many = how == _TWICE and len(wrong) > len(batch) // 8  # the input was bit for bit the same
        if many or any(not tie(batch[i], rows[i], len(batch)) for i in wrong):
            raise _refuse(part, how, f"{len(wrong)} of {len(batch)} labels")

    return compare
