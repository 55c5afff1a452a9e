"""The smoothed classifier: votes of the base classifier under noise -> certificates, decisions, predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from certify.engine.noisy_classifier import NoisyClassifier, noise_name
from certify.errors import UserError
from certify.smoothing.bounds import BOUNDS
from certify.smoothing.certificates import Prediction, certificate_from_votes, check_counts, prediction_from_votes
from certify.smoothing.numeric import as_float
from certify.smoothing.stopping_rules import DEFAULT_CAP, DEFAULT_RULE, MEASURING_BOUND, RULES
from certify.types import Certificate, Decision

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
        n, n0, alpha = check_counts(n, n0, alpha)
        BOUNDS.get(bound)
        if tolerance is not None:
            if bound not in ("clopper-pearson", MEASURING_BOUND):
                raise UserError(
                    f"bound {bound!r} with a tolerance: expected {MEASURING_BOUND}, which holds whenever one stops"
                )
            from certify.engine.adaptive import Measuring

            measuring = functools.partial(Measuring, self.num_classes, n=n, tolerance=tolerance, alpha=alpha)
            measured: Certificate = self._settle_one(image, measuring, seed, image_id, progress)
            return measured
        stages = {"selection": n0, "estimation": n}
        (found,) = self.tallies([(image, image_id)], stages, seed=seed, progress=progress)
        from certify.smoothing.rng import bound_draw

        tensor = self.check(image)
        return certificate_from_votes(
            found["selection"].votes,
            found["estimation"].votes,
            noise=self.stated(tensor.numel()),
            alpha=alpha,
            bound=bound,
            uniform=bound_draw(seed, noise_name(tensor) if image_id is None else image_id),
        )

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
        from certify.engine.adaptive import Deciding

        n, _, alpha = check_counts(n, 1, alpha)
        RULES.get(rule)
        several: Any = radius  # 0-d arrays and tensors can be iterated over by name only
        one = not isinstance(several, Iterable) or isinstance(several, str) or getattr(several, "ndim", 1) == 0
        given: Iterable[float] = [several] if one else several
        radii = sorted({as_float(r, "radius", "one number or several, such as 0.25") for r in given})
        if not radii:
            raise UserError("no radius: expected one or several, such as 0.25")
        deciding = functools.partial(Deciding, self.num_classes, n=n, radii=radii, alpha=alpha, rule=rule)
        decided: Decision = self._settle_one(image, deciding, seed, image_id, progress)
        return decided

    def _settle_one(
        self,
        image: torch.Tensor | np.ndarray,
        watch: Callable[..., Any],
        seed: int,
        image_id: str | None,
        progress: Callable[[int], None] | None,
    ) -> Any:
        """The result of one image's watch."""
        found = self.settled(
            [(image, image_id)], lambda there: watch(noise=self.stated(there.numel())), seed=seed, progress=progress
        )
        (settled,) = found
        return settled.watch.result()

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
        n, _, alpha = check_counts(n, 1, alpha)
        votes = self.votes(image, n, stage="prediction", seed=seed, image_id=image_id, progress=progress)
        return prediction_from_votes(votes, alpha=alpha)

    def base_label(self, image: torch.Tensor | np.ndarray) -> int:
        """The base classifier's own label of one image without noise."""
        return self.base_labels([image])[0]
