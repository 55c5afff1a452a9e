"""The pictures of a report, inside its file: SVG that takes the page's colours, thumbnails as data URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from analysis.curves import Curve
from analysis.figures import COLOURS, canvas, log_ticks
from analysis.plots import drawn_curves
from certify.smoothing.norms import IN_WORDS

STAGES = ("clean", "noisy", "denoised")
_SMALL = 64  # pixels; up to here a picture is shown as it was sent
_SIDES = ((60, 160), (400, 96), (10**9, 64))  # up to so many images, thumbnails of so many pixels
_IN_PAGE = {"#000000": "currentColor", "#dddddd": "var(--line)", COLOURS[0]: "var(--accent)"}


def curve_svg(curve: Curve) -> str:
    """Certified accuracy over radius."""
    with drawn_curves([curve]) as figure:
        (axes,) = figure.axes
        if legend := axes.get_legend():  # there is none where nothing in the run has a name
            legend.remove()  # one line, named by the text beside it
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(f"{IN_WORDS[curve.norm]} radius (images in [0, 1] pixels)")
        return _inline(
            figure, "curve", f"{curve.quantity} over {IN_WORDS[curve.norm]} radius; the table has its numbers"
        )


def latency_svg(seconds: Sequence[float]) -> str:
    """How long answers took: a histogram over equal steps of the logarithm."""
    milliseconds = np.maximum(1000 * np.asarray(seconds), 1e-3)
    low, high = milliseconds.min() / 1.05, milliseconds.max() * 1.05
    with canvas(4.8, 1.9, style={"axes.grid.axis": "y"}) as (figure, axes):
        bins = np.geomspace(low, high, min(40, max(8, int(len(milliseconds) ** 0.5))) + 1)
        axes.hist(milliseconds, bins=bins, color=COLOURS[0], rwidth=0.92)
        axes.set_xscale("log")
        log_ticks(axes.xaxis, "{x:g}")
        axes.set(xlim=(low, high), xlabel="milliseconds from sending to reply", ylabel="answers")
        return _inline(figure, "latency", "histogram of how long answers took")


def _inline(figure: Any, name: str, title: str) -> str:
    """The figure as an element of a page, in the page's colours and font; ids begin with ``name``."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"certify {name}"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(?<= id=")|(?<=href="#)|(?<=url\(#)', f"{name}-", text)
    for colour, here in _IN_PAGE.items():
        text = re.sub(re.escape(colour), here, text, flags=re.IGNORECASE)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1.1"', "", text).replace("xlink:href", "href")
    size = re.compile(r'<svg width="[^"]*" height="[^"]*"')
    return size.sub(f'<svg role="img" aria-label="{title}" fill="currentColor"', text, count=1)


class Thumbnails:
    """Pictures of an audit as data URIs, as long as there is room for them.

    Args:
        folder: with ``PREFIX-clean.png`` and so on.
        images: how many there are; more of them are shown smaller.
        limit: bytes of all data URIs.
    """

    def __init__(self, folder: Path, images: int, limit: int) -> None:
        self._folder, self._left = folder, limit
        self._side = next(side for most, side in _SIDES if images <= most)
        self.left_out = 0
        """Images that are there and that the report has no room for."""
        self.reduced = False
        """Whether any is smaller than it was sent."""

    def of(self, prefix: str) -> dict[str, str]:
        """One image's pictures by stage; without those that are missing or unreadable, none when there is no room."""
        if not re.fullmatch(r"[\w-]+", prefix):  # a name of this folder, and of no other
            return {}
        paths = {stage: self._folder / f"{prefix}-{stage}.png" for stage in STAGES}
        if not self._left:
            self.left_out += any(path.is_file() for path in paths.values())
            return {}
        uris = {stage: uri for stage, path in paths.items() if (uri := self._uri(path))}
        size = sum(map(len, uris.values()))
        if size > self._left:
            self._left, self.left_out = 0, self.left_out + 1  # none after the first that does not fit
            return {}
        self._left -= size
        return uris

    def _uri(self, path: Path) -> str:
        try:
            with Image.open(path, formats=["PNG"]) as image:
                if max(image.size) <= _SMALL:
                    return _data("png", lambda out: image.save(out, "PNG", optimize=True))
                self.reduced = True
                image.thumbnail((self._side, self._side))
                return _data("jpeg", lambda out: image.convert("RGB").save(out, "JPEG", quality=82))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return ""


def _data(kind: str, save: Callable[[io.BytesIO], None]) -> str:
    out = io.BytesIO()
    save(out)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
