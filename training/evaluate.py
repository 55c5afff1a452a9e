"""How well a denoiser does: errors of pixels, similarity of structures, and what a classifier recognises behind it.

Empirical figures from one noise draw an image: nothing here is a certificate.
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
"""SSIM's Gaussian window: pixels along its side, and its standard deviation (Wang et al. 2004)."""

_STAGE = "denoiser evaluation"
_VALUES = 2**22  # of a batch, at most


@dataclass(frozen=True, eq=False)
class Example:
    """A clean image ``(C, H, W)`` in [0, 1]; its id names its noise; its class, or None."""

    id: str
    image: Tensor
    label: int | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """One image, before and after the denoiser.

    Attributes:
        example: the clean image.
        noisy: ``(C, H, W)``, not clipped.
        denoised: the same, as the denoiser gave it.
        mse: mean squared error of noisy and denoised.
        ssim: structural similarity of both to the clean image; None where it cannot be had.
        window: pixels along the side of its window.
        labels: the classifier's for clean, noisy and denoised; None without a classifier.
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
        """Of noisy and denoised, in dB."""
        return psnr(self.mse[0]), psnr(self.mse[1])


@dataclass(frozen=True)
class Share:
    """How many images of how many."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """The share."""
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Exact 95 % interval (Clopper and Pearson 1934), for the images as a sample of what they stand for."""
        low = clopper_pearson_lower(self.count, self.total, 0.025)
        return low, clopper_pearson_upper(self.count, self.total, 0.025)


@dataclass(frozen=True)
class Quality:
    """Figures of the noisy, or of the denoised images.

    Attributes:
        psnr: peak signal-to-noise ratio in dB for a peak of 1, the mean over images; infinite if any image is exact.
        mse: mean squared error, the mean over images.
        ssim: structural similarity, the mean over images; None where it cannot be had.
        accuracy: images that the classifier gets right; None without classifier or labels.
        agreement: images that it gives the label it gives to the clean image; None without a classifier.
    """

    psnr: float
    mse: float
    ssim: float | None
    accuracy: Share | None
    agreement: Share | None


@dataclass(frozen=True)
class DenoiserReport:
    """A denoiser at one noise level, on one noise draw for each image.

    Values are not clipped to [0, 1] before anything is measured, because the denoiser and the classifier do not get
    them clipped. The noisy PSNR therefore is about -20 log10(sigma): 12.04 dB at sigma = 0.25, 6.02 dB at 0.5.

    Attributes:
        images: how many.
        sigma: standard deviation of the noise, in [0, 1] pixels.
        seed: of the noise.
        noisy: figures without the denoiser.
        denoised: figures with it.
        clean_accuracy: of the classifier without noise and denoiser; None without classifier or labels.
        ssim_window: pixels along the side of SSIM's window: 11, less where an image is smaller; None without SSIM.
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
    """The report on images at hand.

    Args:
        denoiser: ``forward(noisy, sigma)``, in evaluation mode, on the CPU.
        images: clean, ``(B, C, H, W)`` or one ``(C, H, W)`` after the other, in [0, 1].
        sigma: standard deviation of the Gaussian noise, in [0, 1] pixels.
        labels: class of each image.
        classifier: for accuracy and agreement.
        seed: of the noise; image i has the id ``str(i)``.
        batch_size: images a forward pass; changes no noise.

    Raises:
        UserError: no images, or a noise level that is none.
        RunFault: the denoiser or the classifier failed.
    """
    known = None if labels is None else [int(label) for label in labels]
    examples = (Example(str(i), image, known[i] if known else None) for i, image in enumerate(images))
    found = measure(denoiser, examples, sigma, classifier=classifier, seed=seed, batch_size=batch_size)
    return summarise(found, sigma, seed)


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
    """Every image through noise, denoiser and classifier, a batch at a time, in order.

    The noise is drawn on the processor and depends on the seed, the image's id and shape and sigma alone; at another
    sigma it is the same draw, scaled.

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
            three = (clean.to(device), noisy.to(device), denoised)
            labels = torch.stack([label_batch(classifier, images)[0].clone() for images in three], dim=1).tolist()
        for i, (example, before, after) in enumerate(zip(batch, noisy, denoised.cpu(), strict=True)):
            mse = _mse(example.image, before), _mse(example.image, after)
            window = ssim_window(example.image)
            similar = (_ssim(example.image, before, window), _ssim(example.image, after, window)) if window else None
            yield Outcome(example, before, after, mse, similar, window, tuple(labels[i]) if labels else None)


def summarise(outcomes: Iterable[Outcome], sigma: float, seed: int) -> DenoiserReport:
    """The means and counts over all images; holds no image.

    Raises:
        UserError: no images.
    """
    figures = [(o.psnr, o.mse, o.ssim, o.window, o.labels, o.example.label) for o in outcomes]
    if not figures:
        raise UserError("a denoiser is evaluated on images, and there are none; expected one or more")
    psnrs, mses, ssims, windows, labels, truths = zip(*figures, strict=True)

    def share(place: int, wanted: Sequence[int | None]) -> Share | None:
        if any(found is None for found in labels) or any(label is None for label in wanted):
            return None
        hits = sum(found[place] == label != FAILED for found, label in zip(labels, wanted, strict=True))
        return Share(hits, len(figures))

    def quality(place: int) -> Quality:
        return Quality(
            psnr=float(np.mean([pair[place] for pair in psnrs])),
            mse=float(np.mean([pair[place] for pair in mses])),
            ssim=float(np.mean([pair[place] for pair in ssims])) if all(ssims) else None,
            accuracy=share(place + 1, truths),
            agreement=share(place + 1, [found[0] if found else None for found in labels]),
        )

    window = min(windows) or None
    return DenoiserReport(len(figures), sigma, seed, quality(0), quality(1), share(0, truths), window)


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of this mean squared error, for a peak of 1; infinite without error."""
    return -10.0 * math.log10(mse) if mse > 0 else math.inf


def ssim_window(image: Tensor) -> int:
    """Pixels along the side of SSIM's window on this image: the largest odd number up to 11 that fits.

    0 where there is no SSIM: scikit-image is missing, or the image has a side below 3 pixels.
    """
    fits = min(WINDOW, *image.shape[-2:])
    odd = fits - (fits + 1) % 2
    return odd if odd >= 3 and ssim_installed() else 0


def ssim_installed() -> bool:
    """Whether scikit-image is there, which measures it; everything else works without."""
    return importlib.util.find_spec("skimage") is not None


def _ssim(clean: Tensor, other: Tensor, window: int) -> float:
    """Structural similarity with Gaussian weights; a smaller window has a Gaussian narrower by as much."""
    from skimage.metrics import structural_similarity

    similar = structural_similarity(
        clean.double().numpy(),
        other.double().numpy(),
        win_size=window,
        sigma=WIDTH * window / WINDOW,
        data_range=1.0,
        channel_axis=0,
        gaussian_weights=True,
        use_sample_covariance=False,
    )
    return float(similar)


def _mse(clean: Tensor, other: Tensor) -> float:
    return float((clean.double() - other.double()).square().mean())


def _add_noise(noise: Noise, example: Example, seed: int) -> Tensor:
    """One noisy copy."""
    generator = block_generator(stream_key(seed, example.id, _STAGE), 0)
    return noise.add(example.image, noise.sample(tuple(example.image.shape), generator))


def _denoise(denoiser: nn.Module, noisy: Tensor, sigma: float) -> Tensor:
    """The denoiser's answer, checked."""
    shape = tuple(noisy.shape)
    try:
        with torch.no_grad():
            cleaned = denoiser(noisy, sigma)
    except CertifyError:
        raise
    except Exception as error:  # any module may stand there, also the user's own code
        raise RunFault(f"the denoiser failed on {shape}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(cleaned, Tensor) or cleaned.shape != noisy.shape:
        got = tuple(cleaned.shape) if isinstance(cleaned, Tensor) else type(cleaned).__name__
        raise UserError(f"the denoiser returned {got} for noisy images {shape}; expected images of the same shape")
    if not cleaned.isfinite().all():
        raise RunFault("the denoiser returned NaN or infinite values; expected images in the [0, 1] scale")
    return cleaned.to(torch.float32)


def _batches(examples: Iterable[Example], size: int | None) -> Iterator[list[Example]]:
    """Images of one shape that follow each other, so many at a time."""
    batch: list[Example] = []
    for example in examples:
        most = size or max(1, min(256, _VALUES // example.image.numel()))
        if batch and (len(batch) >= most or batch[0].image.shape != example.image.shape):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
