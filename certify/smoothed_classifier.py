"""The smoothed classifier: votes of the base classifier under noise -> certificates, decisions, predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from certify.engine.noisy_classifier import NoisyClassifier, Target
from certify.errors import UserError
from certify.smoothing.certificates import check_counts
from certify.smoothing.procedures import Certify, Decide, Measure, Predict, Procedure
from certify.smoothing.stopping_rules import DEFAULT_CAP, DEFAULT_RULE
from certify.types import Certificate, Decision, Prediction

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn


class SmoothedClassifier(NoisyClassifier):
    """The smoothed classifier g(x) = argmax_c P[f(D(x + e)) = c].

    Its arguments are those of :class:`certify.engine.noisy_classifier.NoisyClassifier`; ``denoiser`` may also be a
    name, as of ``--denoiser`` (``"auto"`` chooses among the shipped ones), or a module or function of noisy images with
    or without the noise level: ``f(noisy)``, ``f(noisy, sigma)``.
    """

    def _find_denoiser(self, denoiser: Any) -> nn.Module | None:
        """A module for the name, function or module that ``denoiser=`` was given."""
        if denoiser is None or denoiser == "none":
            return None
        from denoisers import load_denoiser
        from denoisers.adapters import adapt
        from denoisers.names import find_source

        if not isinstance(denoiser, str):
            return adapt(denoiser)
        if find_source(denoiser).kind == "torchscript":
            how = f"denoisers.load_denoiser({denoiser!r}, trust_code=True)"
            raise UserError(f"denoiser={denoiser!r} is TorchScript, a program; if you trust it, pass denoiser={how}")
        size, identity = getattr(self.classifier, "input", None), getattr(self.classifier, "identity", None)
        return load_denoiser(
            denoiser,
            sigma=self.noise.scale,
            image=None if size is None else size.size,
            classifier=identity() if callable(identity) else None,
        )

    def certify(
        self,
        image: torch.Tensor | np.ndarray,
        *,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        seed: int = 0,
        bound: str = "clopper-pearson",
        tolerance: float | None = None,
        image_id: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Certificate:
        """Certify one image: with probability at least 1 - alpha the result is an abstention or holds.

        Args:
            image: ``(C, H, W)``, float in [0, 1] or uint8, already at the classifier's input size.
            n0: selection samples.
            n: estimation samples, fresh ones; at most, with a tolerance.
            alpha: probability of error for this image.
            seed: of the run; with ``image_id`` it fixes all noise. The default is public: whoever knows the seed can
                craft an image against its noise, so where images may come from an adversary it must be secret.
            bound: name of a bound (``certify list bounds``).
            tolerance: stop once the radius is at least 1 - tolerance of what it can still become. The bound is then
                ``betting``, which holds whenever one stops, and no selection samples are drawn.
            image_id: names the noise stream; default: a hash of the image.
            progress: called with the number of samples done since the last call.

        Raises:
            UserError: an image of the wrong shape, type or range; counts below 1; alpha outside (0, 1).
        """
        check_counts(n, n0, alpha)
        procedure: Procedure = Certify(n0, n, alpha, bound)
        if tolerance is not None:
            if bound not in ("clopper-pearson", Measure.bound):
                raise UserError(
                    f"bound {bound!r} with a tolerance: expected {Measure.bound}, which holds whenever one stops"
                )
            procedure = Measure(tolerance, n, alpha)
        certificate: Certificate = self._answer(procedure, image, seed, image_id, progress)
        return certificate

    def decide(
        self,
        image: torch.Tensor | np.ndarray,
        *,
        radius: float | Iterable[float],
        alpha: float = 0.001,
        n: int = DEFAULT_CAP,
        rule: str = DEFAULT_RULE,
        seed: int = 0,
        image_id: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Decision:
        """Whether the smoothed classifier is certifiably robust at a radius, with as few samples as that takes.

        With probability at least 1 - alpha all of the decision is true. No selection samples are needed.

        Args:
            image: as for :meth:`certify`.
            radius: one or several, in [0, 1] pixels and this classifier's norm.
            alpha: probability that any part of the decision is wrong, at most.
            n: the most samples (20,000 unless given); at n an image stays undecided.
            rule: name of a stopping rule (``certify list rules``); ``one-sided`` unless given.
            seed: as for :meth:`certify`.
            image_id: as for :meth:`certify`.
            progress: as for :meth:`certify`.

        Raises:
            UserError: as for :meth:`certify`; a radius that this noise cannot certify.
        """
        decision: Decision = self._answer(Decide(radius, n, alpha, rule), image, seed, image_id, progress)  # type: ignore[arg-type]
        return decision

    def predict(
        self,
        image: torch.Tensor | np.ndarray,
        *,
        n: int = 100_000,
        alpha: float = 0.001,
        seed: int = 0,
        image_id: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Prediction:
        """The smoothed classifier's class, or an abstention; wrong with probability at most alpha.

        Arguments as in :meth:`certify`.
        """
        prediction: Prediction = self._answer(Predict(n, alpha), image, seed, image_id, progress)
        return prediction

    def _answer(
        self,
        procedure: Procedure,
        image: torch.Tensor | np.ndarray,
        seed: int,
        image_id: str | None,
        progress: Callable[[int], None] | None,
    ) -> Any:
        """Return the procedure's answer about one image."""
        target = Target(image, image_id)
        if procedure.sequential:
            (stage,) = procedure.stages
            (settled,) = self.sample_until_settled(
                [target], lambda noise: procedure.tests(self.num_classes, noise, 0)[stage], seed=seed, progress=progress
            )
            return settled.test.result()
        ((_, tallies),) = self.sample([target], procedure.stages, seed=seed, progress=progress)
        tensor = self.check(image)
        from certify.smoothing.rng import bound_draw

        uniform = bound_draw(seed, target.noise_name(tensor))
        votes = {stage: tally.votes for stage, tally in tallies.items()}
        return procedure.answer(votes, self.stated(tensor.numel()), uniform)

    def base_label(self, image: torch.Tensor | np.ndarray) -> int:
        """The base classifier's own label of one image without noise."""
        return self.base_labels([image])[0]
