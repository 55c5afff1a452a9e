"""The smoothed classifier: images -> votes of the base classifier under noise -> certificates."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from certify.bounds import BOUNDS
from certify.certificates import Prediction, certificate_from_votes, check_counts, prediction_from_votes
from certify.errors import UserError
from certify.noise import Gaussian
from certify.types import BaseClassifier, Certificate, Noise, Votes

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from certify.execution import Execution
    from certify.votes import Tally

KEPT = 100
"""Labels of each stage that are kept one by one, to be compared with plain float32's."""


class SmoothedClassifier:
    """A base classifier under noise: g(x) = argmax_c P[f(D(x + e)) = c].

    Args:
        classifier: the base classifier f (:func:`certify.load_classifier`, or anything with its contract).
        sigma: standard deviation of Gaussian noise, in [0, 1] pixels; or give ``noise``.
        denoiser: D, a module ``forward(noisy, sigma)``; part of the base classifier from then on.
        noise: another smoothing distribution in place of the Gaussian.
        device: where to compute, such as ``"cpu"`` or ``"cuda"``.
        precision: of the arithmetic behind the noise: ``float32``, ``bfloat16``, ``float16``, or ``auto``.
        compile: ``on``, ``off``, or ``auto``.
        batch_size: samples a forward pass; None chooses. It changes no noise.

    What is left open is decided by the first call from the number of samples it asks for, or by :meth:`prepare`; from
    then on it stays, so that all certificates are about one function.

    Raises:
        UserError: sigma not positive, or neither or both of sigma and noise.
    """

    def __init__(
        self,
        classifier: BaseClassifier,
        sigma: float | None = None,
        *,
        denoiser: nn.Module | None = None,
        noise: Noise | None = None,
        device: str | torch.device = "cpu",
        precision: str = "auto",
        compile: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        import torch

        from certify.pipeline import Pipeline
        from certify.tuning import Wanted

        if (sigma is None) == (noise is None):
            raise UserError("give either sigma (Gaussian noise, [0, 1] pixels) or noise, not both and not neither")
        try:
            self.noise: Noise = noise if noise is not None else Gaussian(float(sigma))  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(str(error)) from None
        self.device = torch.device(device)
        if self.device.type == "cuda":  # float32 means float32: convolutions would run in TF32 by default
            torch.backends.cudnn.allow_tf32 = False
        self.classifier = classifier
        self.base = Pipeline(classifier, denoiser, self.noise.scale).to(self.device)
        self.base.eval()
        self.wanted = Wanted(precision, compile, batch_size)
        self.execution: Execution | None = None
        self._run: BaseClassifier = self.base

    @property
    def num_classes(self) -> int:
        """K."""
        return self.base.num_classes

    def prepare(
        self,
        image: torch.Tensor | np.ndarray,
        samples: int,
        execution: Execution | None = None,
        *,
        again: bool = False,
    ) -> Execution:
        """Decide how to run the base classifier for this many samples; it is run this way from now on.

        Args:
            image: one of the images, ``(C, H, W)``.
            samples: noisy copies in all.
            execution: how, where that is known already: of the run that is resumed, or another worker's.
            again: measure although this machine has chosen before for such work.
        """
        from certify import execution as executions
        from certify import tuning

        example = self._check(image).to(self.device)
        if execution is None:
            self._run, self.execution = tuning.choose(self.base, example, self.noise, samples, self.wanted, again=again)
        else:
            self._run, self.execution = executions.prepare(self.base, execution, example)
        return self.execution

    def measure_rate(self, image: torch.Tensor | np.ndarray) -> float:
        """Samples a second on this machine, once prepared."""
        from certify.tuning import measure_rate

        if self.execution is None:
            raise RuntimeError("not prepared yet: call prepare first")
        return measure_rate(self._run, self._check(image).to(self.device), self.noise, self.execution.batch_size)

    def tallies(
        self,
        images: Iterable[tuple[torch.Tensor | np.ndarray, str | None]],
        stages: Mapping[str, int],
        *,
        seed: int = 0,
        clean: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[dict[str, Tally]]:
        """For each image the tallies of its stages; images share batches.

        Args:
            images: pairs of an image ``(C, H, W)`` and the name of its noise (None: a hash of the image), pulled a few
                blocks of noise ahead.
            stages: noisy copies of each stage; each stage draws its own.
            seed: with the name and the stage it fixes all noise.
            clean: whether to label the image without noise too, as stage ``"clean"``.
            progress: called with the number of noisy samples done since the last call.
        """
        from certify.execution import Execution, default_batch_size
        from certify.streams import stream_key
        from certify.votes import Job, count_votes

        queue = iter(images)
        first = next(queue, None)
        if first is None:
            return
        if self.execution is None and stages:
            self.prepare(first[0], sum(stages.values()))
        size = self.wanted.batch_size or default_batch_size(self._check(first[0]).to(self.device))
        execution = self.execution or Execution("float32", False, False, size)

        def jobs() -> Iterator[Job]:
            for image, name in itertools.chain([first], queue):
                tensor = self._check(image)
                there = tensor.to(self.device)
                if clean:
                    yield Job(there, None, 1, keep=1)
                for stage, trials in stages.items():
                    key = stream_key(seed, image_digest(tensor) if name is None else name, stage)
                    yield Job(there, key, trials, keep=KEPT)

        done = count_votes(
            self._run,
            self.noise,
            jobs(),
            batch_size=execution.batch_size,
            fixed_shape=execution.compiled,
            progress=progress,
        )
        names = [*(["clean"] if clean else []), *stages]
        for tally in done:
            yield {name: tally if name == names[0] else next(done) for name in names}

    def votes(
        self,
        image: torch.Tensor | np.ndarray,
        n: int,
        *,
        stage: str,
        seed: int = 0,
        image_id: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Votes:
        """Votes of n noisy copies of one image ``(C, H, W)``.

        The noise is fixed by ``seed``, ``image_id`` (default: a hash of the image) and ``stage``.
        """
        (found,) = self.tallies([(image, image_id)], {stage: n}, seed=seed, progress=progress)
        return found[stage].votes

    def certify(
        self,
        image: torch.Tensor | np.ndarray,
        *,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        seed: int = 0,
        bound: str = "clopper-pearson",
        image_id: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Certificate:
        """Certify one image: with probability at least 1 - alpha the result is an abstention or holds.

        Args:
            image: ``(C, H, W)``, float in [0, 1] or uint8, already at the classifier's input size.
            n0: selection samples.
            n: estimation samples, fresh ones.
            alpha: probability of error for this image.
            seed: of the run; with ``image_id`` it fixes all noise.
            bound: name of a one-sided bound.
            image_id: names the noise stream; default: a hash of the image.
            progress: called with the number of samples done since the last call.

        Raises:
            UserError: an image of the wrong shape, type or range; counts below 1; alpha outside (0, 1).
        """
        check_counts(n, n0, alpha)
        BOUNDS.get(bound)
        stages = {"selection": n0, "estimation": n}
        (found,) = self.tallies([(image, image_id)], stages, seed=seed, progress=progress)
        selection, estimation = found["selection"].votes, found["estimation"].votes
        return certificate_from_votes(selection, estimation, noise=self.noise, alpha=alpha, bound=bound)

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
        check_counts(n, 1, alpha)
        votes = self.votes(image, n, stage="prediction", seed=seed, image_id=image_id, progress=progress)
        return prediction_from_votes(votes, alpha=alpha)

    def base_labels(self, images: Iterable[torch.Tensor | np.ndarray]) -> list[int]:
        """The base classifier's own labels of images without noise (``FAILED`` where it has none)."""
        found = self.tallies(((image, None) for image in images), {}, clean=True)
        return [int(tally["clean"].labels[0]) for tally in found]

    def base_label(self, image: torch.Tensor | np.ndarray) -> int:
        """The base classifier's own label of one image without noise."""
        return self.base_labels([image])[0]

    def agreement(
        self, image: torch.Tensor | np.ndarray, labels: torch.Tensor, *, stage: str, seed: int, image_id: str
    ) -> int:
        """How many of a stage's first labels the base classifier in plain float32 gives too, from the same noise."""
        from certify.execution import default_batch_size
        from certify.streams import stream_key
        from certify.votes import Job, count_votes

        there = self._check(image).to(self.device)
        job = Job(there, stream_key(seed, image_id, stage), len(labels), keep=len(labels))
        (plain,) = count_votes(self.base, self.noise, [job], batch_size=default_batch_size(there))
        return int((plain.labels == labels).sum())

    def _check(self, image: torch.Tensor | np.ndarray) -> torch.Tensor:
        from certify.images import as_image

        spec = getattr(self.classifier, "input", None)
        return as_image(image, spec.size if spec is not None else None)


def image_digest(image: torch.Tensor) -> str:
    """SHA-256 of the pixels of one image as it is certified: 16 hexadecimal digits."""
    return hashlib.sha256(str(tuple(image.shape)).encode() + image.cpu().numpy().tobytes()).hexdigest()[:16]
