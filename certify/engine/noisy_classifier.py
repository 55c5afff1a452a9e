"""A base classifier under noise: images -> votes, with execution settings that are chosen once."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from certify.errors import UserError
from certify.smoothing.noise import make_noise
from certify.smoothing.norms import implied_factor, in_norm
from certify.smoothing.numeric import as_int
from certify.smoothing.procedures import USUAL_SAMPLES
from certify.types import BaseClassifier, Noise, Radii, Votes

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from certify.engine.adaptive import Settled
    from certify.engine.execution import Execution
    from certify.engine.monte_carlo import Job, Tally
    from certify.smoothing.sequential_tests import SequentialTest

KEPT = 100
"""First labels of each stage that are kept one by one, to be compared with those of plain float32."""


@dataclass(frozen=True, eq=False)
class Target:
    """An image to sample.

    Attributes:
        image: ``(C, H, W)``, as :meth:`NoisyClassifier.check` returns it.
        name: names its noise; None: a hash of the image.
        tag: returned with the result.
    """

    image: torch.Tensor
    name: str | None = None
    tag: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str | None):
            raise UserError(f"image_id = {self.name!r}: expected text, such as {str(self.name)!r}")

    @functools.cached_property
    def noise_name(self) -> str:
        """Name of the image's noise."""
        return noise_name(self.image) if self.name is None else self.name


class NoisyClassifier:
    """A base classifier f behind a denoiser D under noise e: labels of f(D(x + e)), counted.

    Args:
        classifier: the base classifier f (:func:`certify.load_classifier`, or anything with its contract).
        sigma: standard deviation of the noise, in [0, 1] pixels; not with a ready-made ``noise``.
        denoiser: D, a module ``forward(noisy, sigma)``, which becomes part of the base classifier.
        noise: the smoothing distribution: a name (``gaussian`` by default, ``exact``, ``uniform``, ``laplace``), or
            a ready-made one.
        norm: of the radii: ``l1``, ``l2`` or ``linf``, implied by the noise's own, which is the default.
        rounded: with noise ``exact``, round images to the 8-bit grid instead of refusing others.
        device: where to compute, such as ``"cpu"`` or ``"cuda"``; ``"auto"`` is an accelerator, if there is one.
        precision: inference dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``.
        compile: ``on``, ``off``, or ``auto``.
        batch_size: samples per forward pass; None chooses. It does not affect the noise.

    The first call chooses what is left open, from its number of samples and the hardware
    (:mod:`certify.engine.policy`), or :meth:`prepare` does. The choice then stays, so that all certificates are about
    one function.

    Raises:
        UserError: sigma not positive, an unknown noise or norm, or neither or both of sigma and a ready-made noise.
    """

    def __init__(
        self,
        classifier: BaseClassifier,
        sigma: float | None = None,
        *,
        denoiser: nn.Module | Callable[..., Any] | str | None = None,
        noise: Noise | str | None = None,
        norm: str | None = None,
        rounded: bool = False,
        device: str | torch.device = "cpu",
        precision: str = "auto",
        compile: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        import torch

        from certify.engine.hardware import find_device
        from certify.engine.policy import EngineOptions

        named = noise is None or isinstance(noise, str)
        if (sigma is not None) != named:
            raise UserError("give either sigma ([0, 1] pixels; and a noise by name) or a ready-made noise, not both")
        if rounded and not named:
            raise UserError(
                "rounded belongs to noise 'exact' by name; a ready-made noise says for itself whether it rounds"
            )
        self.noise: Noise = (
            make_noise(str(noise or "gaussian"), sigma, rounded=rounded) if named else noise  # type: ignore[arg-type,assignment]
        )
        self.norm = norm or self.noise.norm
        implied_factor(self.noise.norm, self.norm, 1)  # refuses an unknown norm
        self.device = find_device(device)
        if self.device.type == "cuda":  # float32 means float32: convolutions would run in TF32 by default
            torch.backends.cudnn.allow_tf32 = False
        self._unchecked = {"local", "queries"}  # parts of the contract that no image has been used to check
        self.options = EngineOptions(precision, compile, batch_size)
        self.execution: Execution | None = None
        self._batch_sizes: dict[torch.Size, int] = {}  # by image shape, for a noise that needs one batch shape
        self._attach(classifier, denoiser)

    def _attach(self, classifier: BaseClassifier, denoiser: Any) -> None:
        """Compose denoiser and classifier, on the device and in evaluation mode."""
        from certify.models.pipeline import Pipeline

        self.classifier = classifier
        self.base = Pipeline(classifier, self._find_denoiser(denoiser), self.noise.scale).to(self.device)
        self.base.eval()
        self._run: BaseClassifier = self.base

    def _find_denoiser(self, denoiser: Any) -> nn.Module | None:
        """Return the module that ``denoiser=`` names: here it is a module already."""
        module: nn.Module | None = denoiser
        return module

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return self.base.num_classes

    def check_contract(self, image: torch.Tensor, *, again: bool = False, queries: bool = True) -> None:
        """Check denoiser and classifier on noisy copies of one image, once; their training mode, every time.

        Called before anything is counted (:mod:`certify.engine.contract`).

        Args:
            image: a real image, ``(C, H, W)``, as :meth:`check` returns it; so in all methods below.
            again: check on this image too if another one was used before.
            queries: allow queries to a classifier that takes one image per query.

        Raises:
            ContractError: one of them is not a fixed function of one image.
        """
        from certify.engine import contract

        contract.refuse_training_mode(self.base.denoiser, self.classifier)
        paid = queries and getattr(self.classifier, "one_by_one", False)
        todo = {"local", "queries"} if again else self._unchecked
        if "local" in todo or (paid and "queries" in todo):
            there = image.to(self.device)
            contract.check_contract(self.classifier, self.base.denoiser, self.noise, there, queries=paid)
            self._unchecked -= {"local", "queries"} if paid else {"local"}

    def prepare(self, image: torch.Tensor, samples: int, execution: Execution | None = None) -> Execution:
        """Choose the execution settings for this many samples, and use them from now on.

        Args:
            image: one of the images, ``(C, H, W)``.
            samples: noisy copies in the whole run.
            execution: the settings, where they are known already: those of the run that is resumed, or of another
                worker.
        """
        from certify.engine.execution import prepare
        from certify.engine.policy import choose_execution

        self.check_contract(image, queries=False)
        example = image.to(self.device)
        self._batch_sizes = {}
        if execution is None:
            self._run, self.execution = choose_execution(self.base, example, samples, self.options)
        else:
            self._run, self.execution = prepare(self.base, execution, example)
        return self.execution

    def stated(self, values: int) -> Radii:
        """Return the noise's radii in this classifier's norm, for images of this many values (C * H * W)."""
        return in_norm(self.noise, self.norm, values)

    def measure_rate(self, image: torch.Tensor) -> float:
        """Return the samples per second of this machine, noise included, once prepared; for estimates of run time."""
        from certify.engine.monte_carlo import measure_rate

        if self.execution is None:
            raise RuntimeError("not prepared yet: call prepare first")
        return measure_rate(self._run, image.to(self.device), self.noise, self.execution.batch_size)

    def sample(
        self,
        images: Iterable[Target],
        stages: Mapping[str, int],
        *,
        seed: int = 0,
        clean: bool = False,
        once: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[tuple[Target, dict[str, Tally]]]:
        """Label noisy copies of each image, stage by stage; images share batches.

        Args:
            images: pulled a few blocks of noise ahead.
            stages: number of noisy copies by stage; each stage draws its own noise.
            seed: together with the image's name and the stage it determines the noise.
            clean: label each image without noise too, as stage ``"clean"``.
            once: draw exactly so many samples, not whole blocks: faster where they are few, and other noise for each n.
            progress: called with the number of noisy samples done since the last call.

        Yields:
            Each image with the tallies of its stages, in the order of the images.
        """
        from certify.engine.monte_carlo import Job
        from certify.smoothing.rng import stream_key

        stages = {stage: as_int(trials, "n") for stage, trials in stages.items()}
        queue = iter(images)
        first = next(queue, None)
        if first is None:
            return
        self.check_contract(first.image)
        label, _ = self.labeller(first.image, sum(stages.values()), progress)

        def jobs() -> Iterator[Job]:
            for target in itertools.chain([first], queue):
                there = target.image.to(self.device)
                if clean:
                    yield Job(there, None, 1, keep=1, tag=(target, "clean"))
                for stage, trials in stages.items():
                    key = stream_key(seed, target.noise_name, stage)
                    yield Job(there, key, trials, keep=KEPT, once=once, tag=(target, stage))

        expected = len(stages) + clean
        tallies: dict[str, Tally] = {}
        for tally in label(jobs()):
            target, stage = tally.tag
            tallies[stage] = tally
            if len(tallies) == expected:
                yield target, tallies
                tallies = {}

    def sample_until_settled(
        self,
        images: Iterable[Target],
        test: Callable[[Radii], SequentialTest],
        *,
        seed: int = 0,
        progress: Callable[[int], object] | None = None,
    ) -> Iterator[Settled]:
        """Label samples of each image until its sequential test is settled, and yield images as they are settled.

        Args:
            images: sampled with the noise of stage ``"estimation"``. The tag of a result is its target.
            test: makes the sequential test of an image from its radii.
            seed: as for :meth:`sample`.
            progress: as for :meth:`sample`.
        """
        from certify.engine.adaptive import Sampling, settle
        from certify.smoothing.rng import stream_key

        queue = iter(images)
        first = next(queue, None)
        if first is None:
            return
        self.check_contract(first.image)
        label, batch_size = self.labeller(first.image, USUAL_SAMPLES, progress)

        def samplings() -> Iterator[Sampling]:
            for target in itertools.chain([first], queue):
                key = stream_key(seed, target.noise_name, "estimation")
                yield Sampling(target.image.to(self.device), key, test(self.stated(target.image.numel())), target)

        yield from settle(label, samplings(), batch_size=batch_size, keep=KEPT)

    def labeller(
        self, image: torch.Tensor, samples: int, progress: Callable[[int], object] | None = None
    ) -> tuple[Callable[[Iterable[Job]], Iterator[Tally]], int]:
        """Return the vote loop, which lacks only its jobs, and its batch size.

        Args:
            image: one of the images, to choose how to run the base classifier where that is still open.
            samples: noisy copies in the whole run, approximately.
            progress: called with the number of noisy samples done since the last call.
        """
        from certify.engine.execution import Execution, default_batch_size
        from certify.engine.monte_carlo import count_votes

        if self.execution is None and samples:
            self.prepare(image, samples)
        execution = self.execution
        if execution is None:
            size = self.options.batch_size or default_batch_size(image.to(self.device))
            execution = Execution("float32", False, False, size)
        paid = getattr(self.classifier, "one_by_one", False)  # a copy that only fills a batch would be a query too
        label = functools.partial(
            count_votes,
            self._run,
            self.noise,
            batch_size=execution.batch_size,
            fixed_shape=execution.compiled,
            settled=self._batch_sizes if self.noise.one_shape and not paid else None,
            progress=progress,
        )
        return label, execution.batch_size

    def votes(
        self,
        image: torch.Tensor | np.ndarray,
        n: int,
        *,
        stage: str,
        seed: int = 0,
        image_id: str | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Votes:
        """Count the votes of n noisy copies of one image ``(C, H, W)``.

        The noise is fixed by ``seed``, ``image_id`` (default: a hash of the image) and ``stage``.
        """
        ((_, tallies),) = self.sample([Target(self.check(image), image_id)], {stage: n}, seed=seed, progress=progress)
        return tallies[stage].votes

    def base_labels(self, images: Iterable[torch.Tensor]) -> list[int]:
        """Return the base classifier's labels of images without noise (``FAILED`` where it has none)."""
        sampled = self.sample(map(Target, images), {}, clean=True)
        return [int(tallies["clean"].labels[0]) for _, tallies in sampled]

    def agreement(
        self,
        image: torch.Tensor,
        labels: torch.Tensor,
        *,
        stage: str,
        seed: int,
        image_id: str,
        once: int | None = None,
    ) -> int:
        """Count the first labels of a stage that plain float32 reproduces from the same noise.

        ``once`` is the number of samples of the stage if :meth:`sample` drew them once.
        """
        from certify.engine.execution import default_batch_size
        from certify.engine.monte_carlo import Job, count_votes
        from certify.smoothing.rng import stream_key

        there = image.to(self.device)
        key = stream_key(seed, image_id, stage)
        job = Job(there, key, once or len(labels), keep=len(labels), once=once is not None)
        (plain,) = count_votes(self.base, self.noise, [job], batch_size=default_batch_size(there))
        return int((plain.labels == labels).sum())

    def check(self, image: torch.Tensor | np.ndarray) -> torch.Tensor:
        """Return the image as it is certified: float32 ``(C, H, W)`` in [0, 1], rounded if the noise rounds.

        Raises:
            UserError: wrong shape, type or range, or an image that the noise is not defined around.
        """
        from certify.images.preprocess import as_image

        spec = getattr(self.classifier, "input", None)
        return self.noise.input(as_image(image, spec.size if spec is not None else None))


def image_digest(image: torch.Tensor) -> str:
    """Return 128 bits of the SHA-256 of one image's pixels as it is certified: 32 hexadecimal digits."""
    return hashlib.sha256(str(tuple(image.shape)).encode() + image.cpu().numpy().tobytes()).hexdigest()[:32]


def noise_name(image: torch.Tensor) -> str:
    """Return the noise name of an image without an id: the first 64 bits of its digest.

    Two images with the same name share their noise. Each certificate still holds; only the independence of their
    errors is lost. A longer name would change the noise of every such image.
    """
    return image_digest(image)[:16]
