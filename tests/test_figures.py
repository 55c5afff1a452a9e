"""Figures at the sizes of papers and slides: dimensions, fonts, dashes, legends, labels within the picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import certify
from analysis.curves import curves
from analysis.figures import FigureStyle, figure_style
from analysis.plots import plot_curves
from certify.errors import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs that differ in sigma alone."""
    folder = tmp_path_factory.mktemp("figures")
    paths = [folder / f"{sigma}.jsonl" for sigma in (0.12, 0.25, 0.5)]
    for path in paths:
        run(
            "run", "--model", "digits", "--sigma", path.stem, "--n", "200", "--max", "10", "--out", str(path), "--quiet"
        )
    return paths


def drawn(runs: list[Path], style: FigureStyle) -> Figure:
    lines = curves([certify.read_run(path) for path in runs], short=style.name != "screen")
    with figure_style(style):
        figure = plot_curves(lines)
        FigureCanvasAgg(figure).draw()
        return figure


@pytest.mark.usefixtures("users_resolution")
def test_a_figure_for_a_paper_has_its_size(runs: list[Path], tmp_path: Path) -> None:
    run("plot", *map(str, runs), "-o", str(tmp_path / "p.png"), "--style", "paper")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size[0] == 3.25 * 200
    run("plot", *map(str, runs), "-o", str(tmp_path / "s.png"), "--width", "4", "--height", "2.5")
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.size == (800, 500)


@pytest.mark.parametrize("style", [FigureStyle("paper"), FigureStyle("slides"), FigureStyle(width=2.5, font_size=7)])
def test_all_text_is_within_the_picture(runs: list[Path], style: FigureStyle) -> None:
    figure = drawn(runs, style)
    (axes,) = figure.axes
    texts = [axes.xaxis.label, axes.yaxis.label, *figure.legends[0].get_texts()]
    for text in texts:
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1, text


def test_lines_of_a_paper_survive_grey_print_and_have_short_names(runs: list[Path]) -> None:
    figure = drawn(runs, FigureStyle("paper"))
    (axes,) = figure.axes
    assert len({line.get_linestyle() for line in axes.get_lines()}) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["σ = 0.12", "σ = 0.25", "σ = 0.5"]
    assert axes.xaxis.label.get_fontsize() == 8
    screen = drawn(runs, FigureStyle())
    assert len({line.get_linestyle() for line in screen.axes[0].get_lines()}) == 1
    assert screen.legends[0].get_texts()[0].get_text() == "digits, σ = 0.12"


def test_legend_and_largest_radius(runs: list[Path]) -> None:
    assert not drawn(runs, FigureStyle(legend="none")).legends
    inside = drawn(runs, FigureStyle(legend="inside", xmax=0.4))
    assert inside.axes[0].get_legend() is not None
    assert inside.axes[0].get_xlim() == (0, 0.4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "poster"}, "style 'poster': expected one of screen, paper, slides"),
        ({"legend": "left"}, "legend 'left': expected one of outside"),
        ({"width": 0.0}, "width 0.0: expected a number above 0"),
        ({"font_size": 1e9}, "expected a number above 0, at most 100"),
    ],
)
def test_mistakes(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FigureStyle(**wrong)  # type: ignore[arg-type]


def test_the_true_class_has_a_bar_even_without_votes(runs: list[Path], tmp_path: Path) -> None:
    from analysis import vote_plots

    found = certify.read_run(runs[2])
    row = found.usable[0]
    changed = certify.Run(found.path, found.header, [row.replace(label=9, votes={"1": 150, "3": 50})])
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vote_plots, "tick_name", lambda name: seen.append(name) or name)
        vote_plots.plot_votes(changed, row.id, tmp_path / "v.png")
    assert len(seen) == 3
    assert seen[-1].endswith("9 (label)")
