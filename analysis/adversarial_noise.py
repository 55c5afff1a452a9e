"""Statistics of adversarial noise, x_adv - x: mean, skewness and spectrum of each image; a table and a figure.

Smoothing as a defence (GS and NCIS-style purifiers) assumes that adversarial noise has nearly zero mean and a symmetric
distribution, so that local averages cancel much of it. These statistics test the assumption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from analysis.figures import COLOURS, LINES, canvas, literal
from certify.errors import UserError
from denoisers.classical import GaussianSmoothing

_LOW = 0.2210  # cycles per pixel: upper edge of the fifth of 16 rings


@dataclass(frozen=True)
class NoiseStatistics:
    """Statistics of B noises n = x_adv - x, each over all C * H * W values.

    Attributes:
        mean: ``(B,)``, in [0, 1] pixels.
        std: ``(B,)``, population standard deviation.
        skewness: ``(B,)``, third central moment over std cubed: 0 for a symmetric distribution, NaN if std is 0.
        frequency: ``(F,)``, upper edge of each ring in cycles per pixel; 0 is the mean, 0.5 the highest along an axis.
        power: ``(B, F)``, the part of |n|^2 in each ring; the rings sum to the squared l2 distance.
        waves: ``(F,)``, number of two-dimensional frequencies in each ring; ``power / waves`` is the radial spectrum.
    """

    mean: Tensor
    std: Tensor
    skewness: Tensor
    frequency: Tensor
    power: Tensor
    waves: Tensor


def noise_statistics(attacked: Tensor, clean: Tensor, rings: int = 16) -> NoiseStatistics:
    """Compute the statistics of the noise that an attack added.

    Args:
        attacked: ``(B, C, H, W)``.
        clean: the original images, ``(B, C, H, W)``.
        rings: number of rings of equal width up to the diagonal's 0.707; frequency 0 is a ring of its own.

    Raises:
        UserError: different shapes, or no rings.
    """
    if attacked.shape != clean.shape or clean.ndim != 4 or rings < 1:
        raise UserError(
            f"attacked {tuple(attacked.shape)}, clean {tuple(clean.shape)}, {rings} rings; expected (B, C, H, W) "
            "twice, and 1 ring or more"
        )
    noise = (attacked.double() - clean.double()).cpu()
    values = noise.flatten(1)
    mean, std = values.mean(1), values.std(1, correction=0)
    skewness = (values - mean[:, None]).pow(3).mean(1) / std.pow(3)
    height, width = noise.shape[-2:]
    vertical, horizontal = torch.fft.fftfreq(height).double(), torch.fft.fftfreq(width).double()
    radius = torch.hypot(vertical[:, None], horizontal[None, :]).flatten()
    edges = torch.linspace(0, 0.5 * 2**0.5, rings + 1, dtype=torch.float64)
    ring = torch.bucketize(radius - 1e-9, edges)  # the lower edge belongs to the previous ring, 0 to its own
    spectrum = torch.fft.fft2(noise).abs().pow(2).sum(1).flatten(1) / (height * width)  # Parseval: sums to |n|^2
    power = torch.zeros(len(noise), rings + 1, dtype=torch.float64).index_add_(1, ring, spectrum)
    return NoiseStatistics(mean, std, skewness, edges, power, torch.bincount(ring, minlength=rings + 1))


@dataclass(frozen=True)
class NoiseSummary:
    """Medians over the images that an attack changed; None where no value is finite.

    Attributes:
        noise: name of the attack.
        changed: number of images changed.
        mean: median |mean|, in grey levels of 255.
        std: median standard deviation, in grey levels of 255.
        skewness: median |skewness|.
        low_frequencies: median share of power below 0.22 cycles per pixel.
        left_by_smoothing: median :func:`smoothing_factor`.
    """

    noise: str
    changed: int = 0
    mean: float | None = None
    std: float | None = None
    skewness: float | None = None
    low_frequencies: float | None = None
    left_by_smoothing: float | None = None


def summarise_noise(name: str, statistics: NoiseStatistics, left: Tensor) -> NoiseSummary:
    """Summarise the noise of an attack; ``left``, ``(B,)``, is the :func:`smoothing_factor` of each image's noise."""
    changed = statistics.std > 0
    if not changed.any():
        return NoiseSummary(name)
    low = (statistics.power[:, statistics.frequency <= _LOW].sum(1) / statistics.power.sum(1))[changed]
    return NoiseSummary(
        name,
        int(changed.sum()),
        median(255 * statistics.mean[changed].abs()),
        median(255 * statistics.std[changed]),
        median(statistics.skewness[changed].abs()),
        median(low),
        median(left[changed.to(left.device)]),
    )


def smoothing_factor(noise: Tensor) -> Tensor:
    """Return the fraction of each noise's l2 norm left by Gaussian smoothing, ``(B,)``; NaN for zero noise."""
    smooth = GaussianSmoothing(kernel=5, std=1.0, iterations=1).smooth(noise)
    factor: Tensor = smooth.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
    return factor


def median(values: Tensor) -> float | None:
    """Return the median of the finite values, or None if there are none."""
    finite = values[values.isfinite()]
    return float(finite.double().quantile(0.5)) if len(finite) else None


def tabulate_noise(rows: Sequence[NoiseSummary], images: int, images_left: float | None) -> str:
    """Return a table of summaries, with the notes needed to read it.

    Args:
        rows: one per noise.
        images: number of images attacked.
        images_left: median :func:`smoothing_factor` of the images' own texture.
    """
    text = tabulate(
        [["" if value is None else value for value in astuple(row)] for row in rows],
        headers=["noise", "images", "|mean|", "std", "|skewness|", "power below 0.22 cycles", "left by smoothing"],
        floatfmt=("", "d", ".2f", ".2f", ".3f", ".2f", ".2f"),
    )
    share = "an unknown fraction" if images_left is None else f"{images_left:.2f}"
    notes = (
        f"Medians over the changed images, of {images}; mean and std in grey levels of 255.\n"
        f"Smoothing (window 5, deviation 1) leaves {share} of the images' own texture.\n"
        "White noise has 0.15 of its power below 0.22 cycles per pixel; clipping to [0, 1] skews that of dark images."
    )
    if any(row.changed < images for row in rows):
        notes += "\nImages for which an attack found no change that helps are not counted."
    return f"{text}\n\n{notes}"


def draw_noise(noises: Mapping[str, NoiseStatistics], images: NoiseStatistics, path: str | Path, *, title: str) -> None:
    """Plot the statistics in three panels, one line per noise; the spectrum of the clean images is grey.

    Args:
        noises: statistics by name, of at least one image each.
        images: statistics of the clean images.
        path: .png, .svg or .pdf.
        title: figure title.

    Raises:
        UserError: an unknown format.
        RunFault: the file cannot be written.
    """
    with canvas(9.6, 3.0, path, columns=3, title=literal(title)) as (figure, (means, skews, spectra)):
        for i, (name, noise) in enumerate(noises.items()):
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // len(COLOURS) % 4], "linewidth": 1.4}
            for axes, measured in ((means, 255 * noise.mean.numpy()), (skews, noise.skewness.numpy())):
                values = np.sort(measured[np.isfinite(measured)])
                if len(values):
                    axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", **style)
            spectra.plot(*_spectrum(noise), label=literal(name), **style)
        spectra.plot(*_spectrum(images), label="clean images", color="#999999", linewidth=2.5)
        for axes, label in ((means, "mean of the noise (grey levels of 255)"), (skews, "skewness of the noise")):
            axes.axvline(0, color="#555555", linewidth=0.8)
            axes.set(xlabel=label, ylabel="share of images at or below", ylim=(0, 1))
            reach = 1.05 * max(abs(end) for end in axes.get_xlim())
            axes.set_xlim(-reach, reach)
        spectra.set(xlabel="frequency (cycles per pixel)", ylabel="share of the power per wave", yscale="log")
        figure.legend(loc="outside lower center", ncols=4)


def _spectrum(noise: NoiseStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Return the rings' frequencies above 0, and their share of the power per wave, averaged over images."""
    used = noise.waves > 0  # some rings of small images are empty
    used[0] = False
    power = noise.power[:, used]
    shares = power / power.sum(1, keepdim=True)
    spectrum = shares[power.sum(1) > 0].mean(0) / noise.waves[used]
    return noise.frequency[used].numpy(), spectrum.numpy()
