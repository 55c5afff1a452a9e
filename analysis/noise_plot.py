"""What attacks add to images, as a figure: the mean, the asymmetry, and the frequencies it lies at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from analysis.adversarial_noise import NoiseStatistics
from analysis.figures import COLOURS, canvas, check_format, literal, save_figure

_LINES = ("-", "--", ":", "-.")


def draw_noise(noises: Mapping[str, NoiseStatistics], images: NoiseStatistics, path: str | Path, *, title: str) -> None:
    """Write the figure: three panels, one colour and dash a noise; grey is what clean images themselves hold.

    Args:
        noises: by name; at least one image each.
        images: the statistics of the clean images, for their spectrum.
        path: .png, .svg or .pdf.
        title: above everything.

    Raises:
        UserError: a format that is not written.
        RunFault: the file cannot be written.
    """
    check_format(path)
    with canvas(9.6, 3.0, columns=3) as (figure, (means, skews, spectra)):
        for i, (name, found) in enumerate(noises.items()):
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": _LINES[i // len(COLOURS) % 4], "linewidth": 1.4}
            for axes, measured in ((means, 255 * found.mean.numpy()), (skews, found.skewness.numpy())):
                values = np.sort(measured[np.isfinite(measured)])
                if len(values):
                    axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", **style)
            spectra.plot(*_spectrum(found), label=literal(name), **style)
        spectra.plot(*_spectrum(images), label="the images", color="#999999", linewidth=2.5)
        for axes, what in ((means, "mean of the noise (grey levels of 255)"), (skews, "skewness of the noise")):
            axes.axvline(0, color="#555555", linewidth=0.8)
            axes.set(xlabel=what, ylabel="share of images up to there", ylim=(0, 1))
            reach = 1.05 * max(abs(end) for end in axes.get_xlim())
            axes.set_xlim(-reach, reach)
        spectra.set(xlabel="frequency (cycles a pixel)", ylabel="share of the power a wave", yscale="log")
        figure.legend(loc="outside lower center", ncols=4)
        figure.suptitle(literal(title), fontsize=8, x=0.01, ha="left", wrap=True)
        save_figure(figure, Path(path))


def _spectrum(found: NoiseStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies of the rings beyond 0, and the mean over images of their share of the power, for each wave in it."""
    there = found.waves > 0  # small images have rings without any
    there[0] = False
    power = found.power[:, there]
    shares = power / power.sum(1, keepdim=True)
    spectrum = shares[power.sum(1) > 0].mean(0) / found.waves[there]
    return found.frequency[there].numpy(), spectrum.numpy()
