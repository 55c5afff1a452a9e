"""Results of ``certify evaluate-denoiser`` as text, as one JSON object and as a figure."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from certify.smoothing.rounding import ceil_to, floor_to

if TYPE_CHECKING:
    from analysis.grid import Panel, Row
    from certify.images.dataset import ImageSet
    from certify.models.labels import ClassNames
    from training.evaluate import DenoiserReport, Outcome, Share


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A denoiser, the images, and its results at each noise level.

    Attributes:
        denoiser: as named on the command line.
        model: the classifier as named on the command line, or None.
        images: those chosen, including unreadable ones.
        shapes: (C, H, W) of the images measured.
        reports: one per noise level.
        descriptions: of the denoiser, one per noise level.
        unreadable: number of images that could not be read.
    """

    denoiser: str
    model: str | None
    images: ImageSet
    shapes: Collection[tuple[int, ...]]
    reports: Sequence[DenoiserReport]
    descriptions: Sequence[Mapping[str, object]]
    unreadable: int

    @property
    def denoiser_name(self) -> str:
        """Name of the denoiser, such as the one that ``auto`` chose."""
        return ", ".join(dict.fromkeys(str(description["name"]) for description in self.descriptions))


def _plain(name: str) -> str:
    return Path(name).stem if "/" in name or Path(name).is_file() else name


def describe(evaluation: Evaluation) -> str:
    """Return the table, one line per noise level, and the notes needed to read it."""
    from analysis.tables import render

    first, images = evaluation.reports[0], evaluation.images
    sizes = ["x".join(map(str, shape)) for shape in evaluation.shapes]
    size = sizes[0] if len(sizes) == 1 else f"of {len(sizes)} sizes"
    of = f" of {images.available:,}" if len(images) < images.available else ""
    title = f"{evaluation.denoiser_name} on {first.images:,}{of} images of {images.name} ({size})"
    lines = [title + (f", classifier {_plain(evaluation.model)}" if evaluation.model else "")]
    if evaluation.unreadable:
        lines.append(f"{evaluation.unreadable} images could not be read and are left out")
    header = ["sigma", "PSNR in dB"] + ["SSIM"] * bool(first.ssim_window)
    header += ["accuracy noisy", "accuracy denoised"] * bool(first.clean_accuracy)
    header += ["label as without noise"] * bool(first.noisy.agreement)
    lines += ["", render(header, [_row(report) for report in evaluation.reports], "text"), ""]
    clean = first.clean_accuracy
    if clean:
        lines += [f"accuracy without noise   {_share_text(clean)} ({clean.count} of {clean.total})", ""]
    lines.append("noisy -> denoised; sigma in [0, 1] pixels, values not clipped" + _ssim_note(first.ssim_window))
    if clean:
        lines.append("[ ]: 95 % interval, treating the images as a random sample")
    lines.append("These are empirical figures from one noise draw per image, not certificates.")
    return "\n".join(lines)


def _row(report: DenoiserReport) -> list[str]:
    noisy, denoised = report.noisy, report.denoised
    cells = [f"{report.sigma:g}", f"{noisy.psnr:.2f} -> {denoised.psnr:.2f}"]
    if noisy.ssim is not None and denoised.ssim is not None:
        cells.append(f"{noisy.ssim:.3f} -> {denoised.ssim:.3f}")
    if noisy.accuracy and denoised.accuracy:
        cells += [_share_text(noisy.accuracy), _share_text(denoised.accuracy)]
    if noisy.agreement and denoised.agreement:
        cells.append(f"{floor_to(noisy.agreement.value, 3)} -> {floor_to(denoised.agreement.value, 3)}")
    return cells


def _share_text(share: Share) -> str:
    low, high = share.interval
    return f"{floor_to(share.value, 3)} [{floor_to(low, 3)}, {ceil_to(high, 3)}]"


def _ssim_note(window: int | None) -> str:
    from training.evaluate import WINDOW, ssim_installed

    if window == WINDOW:
        return ""
    if window:
        return f"; SSIM in windows of {window}x{window} ({WINDOW}x{WINDOW} do not fit)"
    if ssim_installed():
        return "; no SSIM, images are too small"
    return "; no SSIM without scikit-image: pip install 'certify-toolkit[train]'"


def to_json(evaluation: Evaluation, picture: Path | None) -> dict[str, object]:
    """Return all results; null for those that do not exist, and for an infinite PSNR."""
    first = evaluation.reports[0]
    return {
        "denoiser": evaluation.denoiser,
        "model": evaluation.model,
        "data": evaluation.images.name,
        "images": first.images,
        "available": evaluation.images.available,
        "unreadable": evaluation.unreadable,
        "seed": first.seed,
        "noise_draws": 1,
        "certified": False,
        "ssim_window": first.ssim_window,
        "results": [_result(*pair) for pair in zip(evaluation.reports, evaluation.descriptions, strict=True)],
        "pictures": str(picture) if picture else None,
    }


def _result(report: DenoiserReport, described: Mapping[str, object]) -> dict[str, object]:
    result = {"sigma": report.sigma, "denoiser": described, "accuracy_clean": _share_json(report.clean_accuracy)}
    for kind, quality in (("noisy", report.noisy), ("denoised", report.denoised)):
        result |= {
            f"psnr_{kind}": quality.psnr if math.isfinite(quality.psnr) else None,
            f"mse_{kind}": quality.mse,
            f"ssim_{kind}": quality.ssim,
            f"accuracy_{kind}": _share_json(quality.accuracy),
            f"agreement_{kind}": _share_json(quality.agreement),
        }
    return result


def _share_json(share: Share | None) -> dict[str, float] | None:
    if share is None:
        return None
    low, high = share.interval
    return {"share": share.value, "count": share.count, "total": share.total, "low95": low, "high95": high}


def draw(evaluation: Evaluation, kept: Sequence[Sequence[Outcome]], path: Path, class_names: ClassNames | None) -> None:
    """Draw one image per row: clean, then noisy and denoised at each noise level.

    Args:
        evaluation: what was measured.
        kept: for each image shown, its outcome at each noise level.
        path: of the figure.
        class_names: of the classifier, if it has any.
    """
    from analysis.grid import RIGHT, WRONG, Row, draw_grid
    from certify.models.labels import readable

    def row(outcomes: Sequence[Outcome]) -> Row:
        first = outcomes[0]
        panels = [_panel(outcome, place, class_names) for outcome in outcomes for place in (1, 2)]
        label = first.example.label
        name = readable(class_names, label) if label is not None else first.example.id
        return Row(name, [_panel(first, 0, class_names), *panels])

    sigmas = [f"{report.sigma:g}" for report in evaluation.reports]
    columns = ["clean", *(f"{kind}\nσ = {sigma}" for sigma in sigmas for kind in ("noisy", "denoised"))]
    title = f"denoiser {evaluation.denoiser_name} on {evaluation.images.name}, σ = {', '.join(sigmas)}"
    caption = "Shown clipped to [0, 1]; everything is measured unclipped. dB: PSNR."
    if evaluation.model:
        should = "the true class" if evaluation.images.labelled else "the same as for the clean image"
        caption = (
            f"Under each image the label by {_plain(evaluation.model)}: {RIGHT}\u00a0{should}, {WRONG}\u00a0another. "
            + caption
        )
    heading = "true class" if evaluation.images.labelled else "image"
    draw_grid([row(outcomes) for outcomes in kept], columns, path, title=title, caption=caption, names=heading)


def _panel(outcome: Outcome, place: int, class_names: ClassNames | None) -> Panel:
    """Return the clean (0), noisy (1) or denoised (2) image with the classifier's label."""
    from analysis.grid import Panel
    from certify.models.labels import readable
    from certify.types import FAILED

    picture = (outcome.example.image, outcome.noisy, outcome.denoised)[place].numpy()
    note = f"{outcome.psnr[place - 1]:.1f} dB" if place else ""
    if outcome.labels is None:
        return Panel(picture, note=note)
    label, truth = outcome.labels[place], outcome.example.label
    text = readable(class_names, label) if label != FAILED else "no answer"
    if truth is None:
        return Panel(picture, text, label == outcome.labels[0] if place else None, note)
    return Panel(picture, text, label == truth, note)
