"""The end of ``certify evaluate-denoiser``: a denoiser's figures in words, as one JSON object and as a picture."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certify.smoothing.rounding import ceil_to, floor_to

if TYPE_CHECKING:
    from analysis.grid import Panel, Row
    from certify.images.dataset import ImageSet
    from certify.models.labels import ClassNames
    from training.evaluate import DenoiserReport, Outcome, Share


@dataclass(frozen=True, eq=False)
class Evaluated:
    """What was evaluated, and what came out.

    Attributes:
        denoiser: as asked for.
        model: the classifier as asked for, or None.
        images: the chosen ones.
        shapes: of those that could be read.
        reports: one a noise level.
        described: the denoiser of each noise level, as it describes itself.
        unusable: images that could not be read.
    """

    denoiser: str
    model: str | None
    images: ImageSet
    shapes: Collection[tuple[int, ...]]
    reports: Sequence[DenoiserReport]
    described: Sequence[dict[str, Any]]
    unusable: int

    @property
    def denoiser_name(self) -> str:
        """The denoiser as it calls itself; what ``auto`` chose."""
        return ", ".join(dict.fromkeys(str(about["name"]) for about in self.described))


def _plain(name: str) -> str:
    return Path(name).stem if "/" in name or Path(name).is_file() else name


def in_words(done: Evaluated) -> str:
    """The table, one line a noise level, and what must be known to read it."""
    from analysis.tables import render

    first, images = done.reports[0], done.images
    sizes = ["x".join(map(str, shape)) for shape in done.shapes]
    size = sizes[0] if len(sizes) == 1 else f"of {len(sizes)} sizes"
    of = f" of {images.available:,}" if len(images) < images.available else ""
    title = f"{done.denoiser_name} on {first.images:,}{of} images of {images.name} ({size})"
    lines = [title + (f", classifier {_plain(done.model)}" if done.model else "")]
    if done.unusable:
        lines.append(f"{done.unusable} images could not be read and are left out")
    header = ["sigma", "PSNR in dB"] + ["SSIM"] * bool(first.ssim_window)
    header += ["accuracy noisy", "accuracy denoised"] * bool(first.clean_accuracy)
    header += ["label as without noise"] * bool(first.noisy.agreement)
    lines += ["", render(header, [_row(report) for report in done.reports], "text"), ""]
    clean = first.clean_accuracy
    if clean:
        lines += [f"accuracy without noise   {_share(clean)} ({clean.count} of {clean.total})", ""]
    lines.append("noisy -> denoised; sigma in [0, 1] pixels, values not clipped" + _on_ssim(first.ssim_window))
    if clean:
        lines.append("[ ]: 95 % interval, for the images as a sample of what they stand for")
    lines.append("These are empirical figures from one noise draw for each image; they certify nothing.")
    return "\n".join(lines)


def _row(report: DenoiserReport) -> list[str]:
    noisy, denoised = report.noisy, report.denoised
    cells = [f"{report.sigma:g}", f"{noisy.psnr:.2f} -> {denoised.psnr:.2f}"]
    if noisy.ssim is not None and denoised.ssim is not None:
        cells.append(f"{noisy.ssim:.3f} -> {denoised.ssim:.3f}")
    if noisy.accuracy and denoised.accuracy:
        cells += [_share(noisy.accuracy), _share(denoised.accuracy)]
    if noisy.agreement and denoised.agreement:
        cells.append(f"{floor_to(noisy.agreement.value, 3)} -> {floor_to(denoised.agreement.value, 3)}")
    return cells


def _share(share: Share) -> str:
    low, high = share.interval
    return f"{floor_to(share.value, 3)} [{floor_to(low, 3)}, {ceil_to(high, 3)}]"


def _on_ssim(window: int | None) -> str:
    from training.evaluate import WINDOW, ssim_installed

    if window == WINDOW:
        return ""
    if window:
        return f"; SSIM in windows of {window}x{window} ({WINDOW}x{WINDOW} do not fit)"
    if ssim_installed():
        return "; no SSIM, images are too small"
    return "; no SSIM without scikit-image: pip install 'certify-toolkit[train]'"


def as_json(done: Evaluated, picture: Path | None) -> dict[str, Any]:
    """Every figure; null for what there is not, and for a PSNR that is infinite."""
    first = done.reports[0]
    return {
        "denoiser": done.denoiser,
        "model": done.model,
        "data": done.images.name,
        "images": first.images,
        "available": done.images.available,
        "unreadable": done.unusable,
        "seed": first.seed,
        "noise_draws": 1,
        "certified": False,
        "ssim_window": first.ssim_window,
        "results": [_result(*pair) for pair in zip(done.reports, done.described, strict=True)],
        "pictures": str(picture) if picture else None,
    }


def _result(report: DenoiserReport, described: dict[str, Any]) -> dict[str, Any]:
    def share(found: Share | None) -> dict[str, Any] | None:
        if found is None:
            return None
        low, high = found.interval
        return {"share": found.value, "count": found.count, "total": found.total, "low95": low, "high95": high}

    line: dict[str, Any] = {
        "sigma": report.sigma,
        "denoiser": described,
        "accuracy_clean": share(report.clean_accuracy),
    }
    for kind, quality in (("noisy", report.noisy), ("denoised", report.denoised)):
        line[f"psnr_{kind}"] = quality.psnr if math.isfinite(quality.psnr) else None
        line[f"mse_{kind}"] = quality.mse
        line[f"ssim_{kind}"] = quality.ssim
        line[f"accuracy_{kind}"] = share(quality.accuracy)
        line[f"agreement_{kind}"] = share(quality.agreement)
    return line


def draw(done: Evaluated, kept: Sequence[Sequence[Outcome]], path: Path, class_names: ClassNames | None) -> None:
    """One image a row: clean, then noisy and denoised at each noise level.

    Args:
        done: what was evaluated.
        kept: for each image that is shown, what came out at each noise level.
        path: of the picture.
        class_names: of the classifier, if it has any.
    """
    from analysis.grid import RIGHT, WRONG, Row, draw_grid
    from certify.models.labels import readable

    def row(outcomes: Sequence[Outcome]) -> Row:
        first = outcomes[0]
        panels = [_panel(found, place, class_names) for found in outcomes for place in (1, 2)]
        label = first.example.label
        name = readable(class_names, label) if label is not None else first.example.id
        return Row(name, [_panel(first, 0, class_names), *panels])

    sigmas = [f"{report.sigma:g}" for report in done.reports]
    columns = ["clean", *(f"{kind}\nσ = {sigma}" for sigma in sigmas for kind in ("noisy", "denoised"))]
    title = f"denoiser {done.denoiser_name} on {done.images.name}, σ = {', '.join(sigmas)}"
    caption = "Shown clipped to [0, 1]; everything is measured unclipped. dB: PSNR."
    if done.model:
        should = "the true class" if done.images.labelled else "the same as for the clean image"
        caption = (
            f"Under each image what {_plain(done.model)} calls it: {RIGHT}\u00a0{should}, {WRONG}\u00a0another. "
            + caption
        )
    heading = "true class" if done.images.labelled else "image"
    draw_grid([row(outcomes) for outcomes in kept], columns, path, title=title, caption=caption, names=heading)


def _panel(found: Outcome, place: int, class_names: ClassNames | None) -> Panel:
    """Clean (0), noisy (1) or denoised (2), with the classifier's label."""
    from analysis.grid import Panel
    from certify.models.labels import readable
    from certify.types import FAILED

    picture = (found.example.image, found.noisy, found.denoised)[place].numpy()
    note = f"{found.psnr[place - 1]:.1f} dB" if place else ""
    if found.labels is None:
        return Panel(picture, note=note)
    label, truth = found.labels[place], found.example.label
    text = readable(class_names, label) if label != FAILED else "no answer"
    if truth is None:
        return Panel(picture, text, label == found.labels[0] if place else None, note)
    return Panel(picture, text, label == truth, note)
