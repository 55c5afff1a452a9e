"""The report's pictures, embedded in its file: SVG in the page's colours, thumbnails as data URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from analysis.accuracy_bound import AccuracyBound
from analysis.curves import Curve
from analysis.figures import COLOURS, canvas, log_ticks
from analysis.plots import plot_curves
from certify.smoothing.norms import IN_WORDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = ("clean", "noisy", "denoised")
_SMALL = 64  # pixels; pictures up to this size are embedded as they were sent
_SIDES = ((60, 160), (400, 96), (10**9, 64))  # (maximum number of images, side of their thumbnails in pixels)
_IN_PAGE = {"#000000": "currentColor", "#dddddd": "var(--line)", COLOURS[0]: "var(--accent)"}


def curve_svg(curve: Curve) -> str:
    """Draw certified accuracy over radius."""
    return _curve(plot_curves([curve]), curve.quantity, curve.norm)


def bound_svg(bound: AccuracyBound) -> str:
    """Draw the bound on the accuracy of all images together over radius."""
    return _curve(bound.plot().figure, bound.quantity, bound.run.header.norm)


def _curve(figure: Figure, quantity: str, norm: str) -> str:
    for legend in list(figure.legends):
        legend.remove()  # a single curve, described in the text
    (axes,) = figure.axes
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(f"{IN_WORDS[norm]} radius (images in [0, 1] pixels)")
    return _inline(figure, "curve", f"{quantity} over {IN_WORDS[norm]} radius; the table has its numbers")


def latency_svg(seconds: Sequence[float]) -> str:
    """Draw a histogram of response times on a logarithmic axis."""
    milliseconds = np.maximum(1000 * np.asarray(seconds), 1e-3)
    low, high = milliseconds.min() / 1.05, milliseconds.max() * 1.05
    with canvas(4.8, 1.9, grid="y") as (figure, axes):
        bins = np.geomspace(low, high, min(40, max(8, int(len(milliseconds) ** 0.5))) + 1)
        axes.hist(milliseconds, bins=bins, color=COLOURS[0], rwidth=0.92)
        axes.set_xscale("log")
        log_ticks(axes.xaxis, "{x:g}")
        axes.set(xlim=(low, high), xlabel="milliseconds from request to reply", ylabel="answers")
        return _inline(figure, "latency", "histogram of response times")


def _inline(figure: Figure, name: str, title: str) -> str:
    """Return a figure as an ``<svg>`` element in the page's colours and font; its ids begin with ``name``."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"certify {name}"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(?<= id=")|(?<=href="#)|(?<=url\(#)', f"{name}-", text)
    for colour, in_page in _IN_PAGE.items():
        text = re.sub(re.escape(colour), in_page, text, flags=re.IGNORECASE)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| version="1.1"', "", text).replace("xlink:href", "href")
    size = re.compile(r'<svg width="[^"]*" height="[^"]*"')
    return size.sub(f'<svg role="img" aria-label="{title}" fill="currentColor"', text, count=1)


class Thumbnails:
    """Pictures of an audit as data URIs, up to a total size.

    Args:
        folder: holds ``PREFIX-clean.png`` and so on.
        images: number of images; the more there are, the smaller they are shown.
        limit: maximum size of all data URIs in bytes.

    Attributes:
        left_out: images whose pictures exist but exceed the limit.
        reduced: True if any picture is smaller than it was sent.
    """

    def __init__(self, folder: Path, images: int, limit: int) -> None:
        self._folder, self._left = folder, limit
        self._side = next(side for most, side in _SIDES if images <= most)
        self.left_out, self.reduced = 0, False

    def of(self, prefix: str) -> dict[str, str]:
        """Return one image's pictures by stage, without missing or unreadable ones; none beyond the limit."""
        if not re.fullmatch(r"[\w-]+", prefix):  # only names of files in this folder
            return {}
        paths = {stage: self._folder / f"{prefix}-{stage}.png" for stage in STAGES}
        if not self._left:
            self.left_out += any(path.is_file() for path in paths.values())
            return {}
        uris = {stage: uri for stage, path in paths.items() if (uri := self._uri(path))}
        size = sum(map(len, uris.values()))
        if size > self._left:
            self._left, self.left_out = 0, self.left_out + 1  # after the first that does not fit, none is embedded
            return {}
        self._left -= size
        return uris

    def _uri(self, path: Path) -> str:
        try:
            with Image.open(path, formats=["PNG"]) as image:
                if max(image.size) <= _SMALL:
                    return _data_uri("png", lambda out: image.save(out, "PNG", optimize=True))
                self.reduced = True
                image.thumbnail((self._side, self._side))
                return _data_uri("jpeg", lambda out: image.convert("RGB").save(out, "JPEG", quality=82))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return ""


def _data_uri(kind: str, save: Callable[[io.BytesIO], None]) -> str:
    out = io.BytesIO()
    save(out)
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
