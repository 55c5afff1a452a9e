"""The smoothed classifier: votes of the base classifier under noise -> certificates, decisions, predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required, TypedDict, Unpack, overload

from certify.engine.noisy_classifier import NoisyClassifier, Target
from certify.errors import UserError
from certify.registry import check_options, chosen_options
from certify.smoothing.noise import warn_of_units
from certify.smoothing.procedures import Certify, Decide, Measure, Predict, Procedure, Sequential
from certify.smoothing.rng import bound_draw
from certify.smoothing.stopping_rules import DEFAULT_CAP, DEFAULT_RULE
from certify.types import Certificate, Decision, Prediction

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from certify.types import BaseClassifier, Noise

    Image = torch.Tensor | np.ndarray


class ModelOptions(TypedDict, total=False):
    """Options of :func:`certify.load_classifier`."""

    weights: str | Path | None
    input_size: tuple[int, int, int] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    num_classes: int | None
    trust_code: bool


class SmoothingOptions(TypedDict, total=False):
    """Options of :class:`SmoothedClassifier`."""

    denoiser: nn.Module | Callable[..., Any] | str | None
    noise: Noise | str | None
    norm: str | None
    rounded: bool
    device: str | torch.device
    precision: str
    compile: str
    batch_size: int | None


class _AnswerOptions(TypedDict, total=False):
    n: int
    alpha: float
    seed: int
    image_id: str | Sequence[str] | None
    progress: Callable[[int], object] | None


class _CertifyOptions(_AnswerOptions, total=False):
    n0: int
    bound: str
    tolerance: float | None


class _DecideOptions(_AnswerOptions, total=False):
    radius: Required[float | Iterable[float]]
    rule: str


class _Options(ModelOptions, SmoothingOptions, total=False):
    pass


def find_denoiser(
    denoiser: Any,
    sigma: float,
    image: tuple[int, int, int] | None,
    identity: Callable[[], str] | None = None,
    *,
    trust_code: bool = False,
) -> nn.Module | None:
    """Return the module that ``denoiser=`` means; None for no denoiser.

    Args:
        denoiser: a name, a module, a function of one or two arguments, ``"none"`` or None.
        sigma: noise level, in [0, 1] pixels.
        image: (C, H, W) of the images, or None.
        identity: returns the identity of the classifier behind it, by which ``"auto"`` chooses; None: unknown.
        trust_code: run the program in a TorchScript file.

    Raises:
        UserError: unknown name, a denoiser for other images, or TorchScript by name.
    """
    if denoiser is None or denoiser == "none":
        return None
    from denoisers import load_denoiser
    from denoisers.adapters import adapt
    from denoisers.names import find_source

    if not isinstance(denoiser, str):
        return adapt(denoiser)
    if find_source(denoiser).kind == "torchscript" and not trust_code:
        how = f"denoisers.load_denoiser({denoiser!r}, trust_code=True)"
        raise UserError(f"denoiser={denoiser!r} is TorchScript, a program; if you trust it, pass denoiser={how}")
    known = None if identity is None else identity()
    return load_denoiser(denoiser, sigma=sigma, image=image, classifier=known, trust_code=trust_code)


class SmoothedClassifier(NoisyClassifier):
    """The smoothed classifier g(x) = argmax_c P[f(D(x + e)) = c].

    Args:
        classifier: the base classifier f: a ``torch.nn.Module`` or function from images ``(B, C, H, W)`` in [0, 1] to
            logits ``(B, K)`` or labels ``(B,)``; a name or file as of ``--model``; or what
            :func:`certify.load_classifier` returns. A module is copied. If it does not state its input size, it takes
            the size of the first image.
        sigma: standard deviation of the noise, in [0, 1] pixels; not with a ready-made ``noise``.
        **options: those of :class:`certify.engine.noisy_classifier.NoisyClassifier` and, for a classifier that is not
            loaded yet, of :func:`certify.load_classifier`. ``denoiser`` may be a name, as of ``--denoiser`` (``"auto"``
            chooses among the shipped ones), or a module or function of noisy images with or without the noise level:
            ``f(noisy)``, ``f(noisy, sigma)``.

    Raises:
        UserError: sigma not positive, unknown names, a classifier or denoiser that cannot be used.
    """

    def __init__(
        self,
        classifier: BaseClassifier | nn.Module | Callable[..., Any] | str,
        sigma: float | None = None,
        **options: Unpack[_Options],
    ) -> None:
        check_options(_Options, options, SmoothedClassifier)
        self._model_options = chosen_options(ModelOptions, options)
        self._waiting: tuple[Any, Any] | None = None
        super().__init__(classifier, sigma, **chosen_options(SmoothingOptions, options))  # type: ignore[arg-type]
        warn_of_units(self.noise.scale)

    def _attach(self, classifier: Any, denoiser: Any) -> None:
        """Load the classifier; one without an input size, at the first image."""
        from certify.models.load import load_classifier
        from certify.types import BaseClassifier

        options = self._model_options
        if isinstance(classifier, BaseClassifier):
            if options:
                raise UserError(f"{min(options)} with a loaded classifier: expected it in load_classifier")
        elif isinstance(classifier, str) or "input_size" in options or hasattr(classifier, "input_size"):
            classifier = load_classifier(classifier, **options)
        else:
            self._waiting = classifier, denoiser
            return
        super()._attach(classifier, denoiser)

    def adapt_to(self, size: tuple[int, int, int]) -> None:
        """Take images ``(C, H, W)`` of this size from now on, if the classifier does not state its input size."""
        if self._waiting is not None:
            from certify.models.load import load_classifier

            classifier, denoiser = self._waiting
            super()._attach(load_classifier(classifier, **{**self._model_options, "input_size": size}), denoiser)
            self._waiting = None
        elif getattr(self.classifier, "probe_size", size) is None:
            self.classifier.probe_size = size  # type: ignore[attr-defined]

    def check(self, image: Image) -> torch.Tensor:
        """Return the image as it is certified, as :meth:`NoisyClassifier.check`; channels may be last."""
        from certify.images.preprocess import as_image, channels_first

        spec = None if self._waiting is not None else getattr(self.classifier, "input", None)
        if getattr(image, "ndim", 3) == 3:
            image = channels_first(image, spec.size[0] if spec is not None and spec.size is not None else None)
        if self._waiting is not None:
            channels, height, width = as_image(image, None).shape
            self.adapt_to((channels, height, width))
        return super().check(image)

    if not TYPE_CHECKING:  # a type checker knows these attributes

        def __getattr__(self, name: str) -> Any:
            if name in ("classifier", "base") and self.__dict__.get("_waiting"):
                raise UserError(
                    "the classifier does not state its input size: certify an image first, or pass input_size"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _find_denoiser(self, denoiser: Any) -> nn.Module | None:
        """Return the module that ``denoiser=`` means."""
        size, identity = getattr(self.classifier, "input", None), getattr(self.classifier, "identity", None)
        return find_denoiser(
            denoiser,
            self.noise.scale,
            None if size is None else size.size,
            identity if callable(identity) else None,
            trust_code=self._model_options.get("trust_code", False),
        )

    @overload
    def certify(self, image: Image, **how: Unpack[_CertifyOptions]) -> Certificate: ...

    @overload
    def certify(self, image: Sequence[Image], **how: Unpack[_CertifyOptions]) -> list[Certificate]: ...

    def certify(
        self,
        image: Image | Sequence[Image],
        *,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        bound: str = "clopper-pearson",
        tolerance: float | None = None,
        seed: int = 0,
        image_id: str | Sequence[str] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Certificate | list[Certificate]:
        """Certify one image, or each image of a batch.

        For each image, with probability at least 1 - alpha over the noise draws, the result is an abstention or holds
        (CERTIFY of Cohen, Rosenfeld and Kolter 2019).

        Args:
            image: ``(C, H, W)`` or ``(H, W, C)``, float in [0, 1] or uint8, or of PIL, at the classifier's input size;
                a batch ``(N, C, H, W)`` or a sequence of images gives a list of certificates.
            n0: selection samples.
            n: fresh estimation samples; the maximum with a tolerance.
            alpha: failure probability per image.
            bound: name of a bound (``certify list bounds``).
            tolerance: stop once the radius is at least 1 - tolerance of the largest that is still possible. The bound
                is then ``betting``, which is anytime-valid, and no selection samples are drawn.
            seed: determines all noise, together with ``image_id``. An adversary who knows the seed can craft an image
                against its noise, so keep it secret if images may come from an adversary.
            image_id: name of the noise stream (one per image of a batch); default: a hash of the image.
            progress: called with the number of samples done since the last call.

        Raises:
            UserError: an image of the wrong shape, type or range; counts below 1; alpha outside (0, 1).
        """
        procedure: Procedure
        if tolerance is None:
            procedure = Certify(n0, n, alpha, bound)
        elif bound in ("clopper-pearson", Measure.bound):
            procedure = Measure(tolerance, n, alpha)
        else:
            raise UserError(f"bound {bound!r} with a tolerance: expected {Measure.bound}, which is anytime-valid")
        certificates: Certificate | list[Certificate] = self._answer(procedure, image, seed, image_id, progress)
        return certificates

    @overload
    def decide(self, image: Image, **how: Unpack[_DecideOptions]) -> Decision: ...

    @overload
    def decide(self, image: Sequence[Image], **how: Unpack[_DecideOptions]) -> list[Decision]: ...

    def decide(
        self,
        image: Image | Sequence[Image],
        *,
        radius: float | Iterable[float],
        n: int = DEFAULT_CAP,
        alpha: float = 0.001,
        rule: str = DEFAULT_RULE,
        seed: int = 0,
        image_id: str | Sequence[str] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Decision | list[Decision]:
        """Decide whether the smoothed classifier is certifiably robust at given radii, with as few samples as possible.

        For each image, with probability at least 1 - alpha over the noise draws, all outcomes of its decision are
        true. No selection samples are needed.

        Args:
            image: as for :meth:`certify`.
            radius: one or several, in [0, 1] pixels and this classifier's norm.
            n: maximum number of samples; an image not decided by then is undecided.
            alpha: failure probability per image, over all radii.
            rule: name of a stopping rule (``certify list rules``).
            seed: as for :meth:`certify`.
            image_id: as for :meth:`certify`.
            progress: as for :meth:`certify`.

        Raises:
            UserError: as for :meth:`certify`; a radius that this noise cannot certify.
        """
        procedure = Decide(radius, n, alpha, rule)  # type: ignore[arg-type]
        decisions: Decision | list[Decision] = self._answer(procedure, image, seed, image_id, progress)
        return decisions

    @overload
    def predict(self, image: Image, **how: Unpack[_AnswerOptions]) -> Prediction: ...

    @overload
    def predict(self, image: Sequence[Image], **how: Unpack[_AnswerOptions]) -> list[Prediction]: ...

    def predict(
        self,
        image: Image | Sequence[Image],
        *,
        n: int = 100_000,
        alpha: float = 0.001,
        seed: int = 0,
        image_id: str | Sequence[str] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Prediction | list[Prediction]:
        """Predict the smoothed class of one image, or of each image of a batch, or abstain.

        For each image, with probability at least 1 - alpha over the noise draws, the result is the smoothed
        classifier's prediction or an abstention (PREDICT of Cohen, Rosenfeld and Kolter 2019).

        Args:
            image: as for :meth:`certify`.
            n: samples, from 1.
            alpha: failure probability per image, in (0, 1).
            seed: as for :meth:`certify`.
            image_id: as for :meth:`certify`.
            progress: as for :meth:`certify`.

        Raises:
            UserError: as for :meth:`certify`.
        """
        predictions: Prediction | list[Prediction] = self._answer(Predict(n, alpha), image, seed, image_id, progress)
        return predictions

    def _answer(
        self,
        procedure: Procedure,
        image: Image | Sequence[Image],
        seed: int,
        image_id: str | Sequence[str] | None,
        progress: Callable[[int], object] | None,
    ) -> Any:
        """Return the procedure's answer about one image, or a list of answers about several, which share batches."""
        several = isinstance(image, list | tuple) or getattr(image, "ndim", 3) == 4
        images: list[Image] = list(image) if several else [image]  # type: ignore[list-item]
        names = list(image_id) if several and isinstance(image_id, list | tuple) else [image_id] * len(images)
        if len(names) != len(images) or (several and isinstance(image_id, str)):
            raise UserError(f"image_id = {image_id!r}: expected one for each of {len(images)} images")
        targets = [
            Target(self.check(one), name, place)  # type: ignore[arg-type]
            for place, (one, name) in enumerate(zip(images, names, strict=True))
        ]
        answers: list[Any] = [None] * len(images)
        if isinstance(procedure, Sequential):
            test = functools.partial(procedure.test, self.num_classes)
            for settled in self.sample_until_settled(targets, test, seed=seed, progress=progress):
                answers[settled.tag.tag] = settled.test.result()
        else:
            for target, tallies in self.sample(targets, procedure.stages, seed=seed, progress=progress):
                uniform = bound_draw(seed, target.noise_name)
                votes = {stage: tally.votes for stage, tally in tallies.items()}
                answers[target.tag] = procedure.answer(votes, self.stated(target.image.numel()), uniform)
        return answers if several else answers[0]

    def base_label(self, image: Image) -> int:
        """Return the base classifier's own label of one image without noise."""
        return self.base_labels([self.check(image)])[0]
