"""Evaluate a denoiser: pixel errors, structural similarity, and a classifier's accuracy behind it.

These are empirical figures from one noise draw per image; nothing here is a certificate.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from certify.engine.contract import breakage_left, check_contract
from certify.engine.monte_carlo import label_batch
from certify.errors import CertifyError, RunFault, UserError, first_line
from certify.smoothing.bounds import clopper_pearson_lower, clopper_pearson_upper
from certify.smoothing.noise import make_noise
from certify.smoothing.rng import block_generator, stream_key
from certify.types import FAILED, BaseClassifier, Noise

WINDOW, WIDTH = 11, 1.5
"""Gaussian window of SSIM: side in pixels and standard deviation (Wang et al. 2004)."""

_STAGE = "denoiser evaluation"
_MAX_VALUES = 2**22  # of a batch


@dataclass(frozen=True, eq=False)
class Example:
    """A clean image ``(C, H, W)`` in [0, 1], the id that keys its noise, and its class, or None."""

    id: str
    image: Tensor
    label: int | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """One image before and after the denoiser.

    Attributes:
        example: the clean image.
        noisy: ``(C, H, W)``, not clipped.
        denoised: ``(C, H, W)``, not clipped.
        mse: mean squared errors of noisy and denoised.
        ssim: structural similarities of both to the clean image; None if not available.
        window: side of the SSIM window in pixels; 0 without SSIM.
        labels: the classifier's labels of clean, noisy and denoised; None without a classifier.
    """

    example: Example
    noisy: Tensor
    denoised: Tensor
    mse: tuple[float, float]
    ssim: tuple[float, float] | None
    window: int
    labels: tuple[int, int, int] | None

    @property
    def psnr(self) -> tuple[float, float]:
        """PSNR of noisy and denoised, in dB."""
        return psnr(self.mse[0]), psnr(self.mse[1])


@dataclass(frozen=True)
class Share:
    """A number of images among a total."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """The fraction."""
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95 % interval (Clopper and Pearson 1934), with the images as a sample of their population."""
        low = clopper_pearson_lower(self.count, self.total, 0.025)
        return low, clopper_pearson_upper(self.count, self.total, 0.025)


@dataclass(frozen=True)
class Quality:
    """Figures of the noisy or of the denoised images, averaged over images.

    Attributes:
        psnr: peak signal-to-noise ratio in dB for a peak of 1; infinite if any image is exact.
        mse: mean squared error.
        ssim: structural similarity; None if not available.
        accuracy: images with the true label; None without classifier or labels.
        agreement: images with the classifier's label of the clean image; None without a classifier.
    """

    psnr: float
    mse: float
    ssim: float | None
    accuracy: Share | None
    agreement: Share | None


@dataclass(frozen=True)
class DenoiserReport:
    """A denoiser at one noise level, on one noise draw per image.

    Nothing is clipped to [0, 1] before it is measured, because denoiser and classifier see unclipped values. The noisy
    PSNR is therefore about -20 log10(sigma): 12.04 dB at sigma = 0.25, 6.02 dB at 0.5.

    Attributes:
        images: number of images.
        sigma: standard deviation of the noise, in [0, 1] pixels.
        seed: of the noise.
        noisy: figures without the denoiser.
        denoised: figures with it.
        clean_accuracy: of the classifier without noise and denoiser; None without classifier or labels.
        ssim_window: side of the smallest SSIM window in pixels (11 unless an image is smaller); None without SSIM.
    """

    images: int
    sigma: float
    seed: int
    noisy: Quality
    denoised: Quality
    clean_accuracy: Share | None
    ssim_window: int | None


def evaluate_denoiser(
    denoiser: nn.Module,
    images: Iterable[Tensor],
    sigma: float,
    *,
    labels: Sequence[int] | Tensor | None = None,
    classifier: BaseClassifier | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> DenoiserReport:
    """Evaluate a denoiser on images.

    Args:
        denoiser: ``forward(noisy, sigma)``, in evaluation mode, on the CPU.
        images: clean, ``(B, C, H, W)`` or an iterable of ``(C, H, W)``, in [0, 1].
        sigma: standard deviation of the Gaussian noise, in [0, 1] pixels.
        labels: class of each image.
        classifier: for accuracy and agreement.
        seed: of the noise; image i has the id ``str(i)``.
        batch_size: images per forward pass; does not affect the noise.

    Raises:
        UserError: no images, or an invalid noise level.
        RunFault: denoiser or classifier failed.
    """
    known = None if labels is None else [int(label) for label in labels]
    examples = (Example(str(i), image, known[i] if known else None) for i, image in enumerate(images))
    outcomes = measure(denoiser, examples, sigma, classifier=classifier, seed=seed, batch_size=batch_size)
    return summarise(outcomes, sigma, seed)


def measure(
    denoiser: nn.Module,
    examples: Iterable[Example],
    sigma: float,
    *,
    classifier: BaseClassifier | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "cpu",
) -> Iterator[Outcome]:
    """Pass images through noise, denoiser and classifier, in order.

    The noise is drawn on the CPU and depends only on seed, image id, image shape and sigma; at another sigma it is the
    same draw, scaled.

    Raises:
        ContractError: denoiser or classifier is not a fixed function of one image.
    """
    noise = make_noise("gaussian", sigma)
    for number, batch in enumerate(_batches(examples, batch_size)):
        if not number:
            with breakage_left():
                check_contract(classifier, denoiser, noise, batch[0].image.to(device))
        clean = torch.stack([example.image for example in batch])
        noisy = torch.stack([_add_noise(noise, example, seed) for example in batch])
        denoised = _denoise(denoiser, noisy.to(device), sigma)
        labels = None
        if classifier is not None:
            inputs = (clean.to(device), noisy.to(device), denoised)
            labels = torch.stack([label_batch(classifier, images)[0].clone() for images in inputs], dim=1).tolist()
        for i, (example, before, after) in enumerate(zip(batch, noisy, denoised.cpu(), strict=True)):
            mse = _mse(example.image, before), _mse(example.image, after)
            window = ssim_window(example.image)
            ssim = (_ssim(example.image, before, window), _ssim(example.image, after, window)) if window else None
            yield Outcome(example, before, after, mse, ssim, window, tuple(labels[i]) if labels else None)


def summarise(outcomes: Iterable[Outcome], sigma: float, seed: int) -> DenoiserReport:
    """Average over images, without keeping them in memory.

    Raises:
        UserError: no images.
    """
    figures = [(o.psnr, o.mse, o.ssim, o.window, o.labels, o.example.label) for o in outcomes]
    if not figures:
        raise UserError("no images to evaluate the denoiser on; expected one or more")
    psnrs, mses, ssims, windows, labels, truths = zip(*figures, strict=True)

    def share(stage: int, expected: Sequence[int | None]) -> Share | None:
        if None in labels or None in expected:
            return None
        hits = sum(own[stage] == label != FAILED for own, label in zip(labels, expected, strict=True))
        return Share(hits, len(figures))

    def quality(stage: int) -> Quality:
        return Quality(
            psnr=float(np.mean([pair[stage] for pair in psnrs])),
            mse=float(np.mean([pair[stage] for pair in mses])),
            ssim=float(np.mean([pair[stage] for pair in ssims])) if all(ssims) else None,
            accuracy=share(stage + 1, truths),
            agreement=share(stage + 1, [own[0] if own else None for own in labels]),
        )

    window = min(windows) or None
    return DenoiserReport(len(figures), sigma, seed, quality(0), quality(1), share(0, truths), window)


def psnr(mse: float) -> float:
    """Convert a mean squared error into a PSNR in dB for a peak of 1; infinite for 0."""
    return -10.0 * math.log10(mse) if mse > 0 else math.inf


def ssim_window(image: Tensor) -> int:
    """Return the side of the SSIM window in pixels: the largest odd number up to 11 that fits the image.

    0 if there is no SSIM: scikit-image is missing, or a side is below 3 pixels.
    """
    fits = min(WINDOW, *image.shape[-2:])
    odd = fits - (fits + 1) % 2
    return odd if odd >= 3 and ssim_installed() else 0


def ssim_installed() -> bool:
    """True if scikit-image is installed, which computes SSIM; nothing else needs it."""
    return importlib.util.find_spec("skimage") is not None


def _ssim(clean: Tensor, other: Tensor, window: int) -> float:
    """Compute SSIM with Gaussian weights, whose width shrinks with the window."""
    from skimage.metrics import structural_similarity

    similarity = structural_similarity(
        clean.double().numpy(),
        other.double().numpy(),
        win_size=window,
        sigma=WIDTH * window / WINDOW,
        data_range=1.0,
        channel_axis=0,
        gaussian_weights=True,
        use_sample_covariance=False,
    )
    return float(similarity)


def _mse(clean: Tensor, other: Tensor) -> float:
    return float((clean.double() - other.double()).square().mean())


def _add_noise(noise: Noise, example: Example, seed: int) -> Tensor:
    generator = block_generator(stream_key(seed, example.id, _STAGE), 0)
    return noise.add(example.image, noise.sample(tuple(example.image.shape), generator))


def _denoise(denoiser: nn.Module, noisy: Tensor, sigma: float) -> Tensor:
    """Run the denoiser, and check its output."""
    shape = tuple(noisy.shape)
    try:
        with torch.no_grad():
            cleaned = denoiser(noisy, sigma)
    except CertifyError:
        raise
    except Exception as error:  # of any module, the user's own included
        raise RunFault(f"the denoiser failed on {shape}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(cleaned, Tensor) or cleaned.shape != noisy.shape:
        got = tuple(cleaned.shape) if isinstance(cleaned, Tensor) else type(cleaned).__name__
        raise UserError(f"the denoiser returned {got} for noisy images {shape}; expected images of the same shape")
    if not cleaned.isfinite().all():
        raise RunFault("the denoiser returned NaN or infinite values; expected images in the [0, 1] scale")
    return cleaned.to(torch.float32)


def _batches(examples: Iterable[Example], size: int | None) -> Iterator[list[Example]]:
    """Group consecutive images of one shape."""
    batch: list[Example] = []
    for example in examples:
        limit = size or max(1, min(256, _MAX_VALUES // example.image.numel()))
        if batch and (len(batch) >= limit or batch[0].image.shape != example.image.shape):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
