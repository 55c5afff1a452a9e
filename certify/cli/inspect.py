"""``certify inspect``: what an attack adds to images, and what purifiers hand to the classifier, to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from certify.cli import options
from certify.cli.attack_options import Scene, attack_options, check_names, listed, set_scene
from certify.cli.console import say, tell
from certify.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from analysis.adversarial_noise import NoiseStatistics
    from analysis.grid import Row

_RANDOM = "random noise"
_LOW = 0.2210  # cycles a pixel: the edge of the fifth of 16 rings


@click.command(short_help="Look at what attacks add, and at what purifiers make of it.")
@options.classifier_options
@options.data_options
@click.option(
    "--defences",
    default="gs,median,jpeg",
    help="Whose purified images --pictures shows, NAME:KEY=VALUE:..., separated by commas.",
)
@attack_options
@click.option("--figure", metavar="FILE", help="Mean, skewness and frequencies of the noise: .png, .svg or .pdf.")
@click.option(
    "--pictures", metavar="FILE", help="Clean, attacked and purified images, with labels: .png, .svg or .pdf."
)
@click.option("--images", "rows", type=options.Count("how many images to show"), default=6, help="Rows of --pictures.")
@options.as_json("the table")
def inspect(**o: Any) -> None:
    """Attack the bare classifier and measure what was added.

    Smoothing as a defence rests on adversarial noise having nearly zero mean and a symmetric distribution. The table
    says for each attack, beside random noise of the same size, what they are, and which part of the noise is left after
    Gaussian smoothing (window 5, deviation 1), beside the part of the images themselves.
    """
    from analysis.adversarial_noise import noise_statistics
    from analysis.figures import check_format

    for name in ("figure", "pictures"):
        if o[name]:
            check_format(o[name])
    if not o["pictures"]:  # which alone show defences: others need not be built, only be right
        check_names(listed("--defences", o["defences"]))
        o["defences"] = "none"
    scene = set_scene(o, digits=50)
    if not scene.attacks:
        raise UserError("--attacks none: there is nothing to look at; name one or more (`certify list attacks`)")
    clean, shown = _attacked(o, scene)
    noises = {name: noise_statistics(images, clean) for name, images in shown.items()}
    texture = noise_statistics(clean, clean.mean((2, 3), keepdim=True).expand_as(clean))
    left = {name: _left(images - clean) for name, images in shown.items()}
    rows = [_line(name, found, left[name]) for name, found in noises.items()]
    images_left = _median(_left(clean - clean.mean((2, 3), keepdim=True)))
    if o["as_json"]:
        about = {"images": len(clean), "norm": o["norm"], "eps": o["eps"][0], "images_left_by_smoothing": images_left}
        tell(json.dumps({**about, "noises": rows}, allow_nan=False))
    else:
        tell(_table(rows, len(clean), images_left))
    title = f"{o['model']} on {scene.images.name}, {len(clean)} images, {o['norm']} {o['eps'][1]}"
    if o["figure"]:
        from analysis.adversarial_noise import draw_noise

        draw_noise(noises, texture, o["figure"], title=f"what attacks add to images: {title}")
    if o["pictures"]:
        _draw(o, scene, clean, shown, title)
    if not o["as_json"]:
        for name in ("figure", "pictures"):
            if o[name]:
                say(f"wrote {o[name]}")


def _attacked(o: dict[str, Any], scene: Scene) -> tuple[Tensor, dict[str, Tensor]]:
    """The clean images, and by name what each attack makes of them; random noise is the first."""
    import torch

    from analysis.comparison.results import Condition
    from analysis.comparison.runner import randomly_moved
    from denoisers.defences import undefended

    ids = [item.id for item in scene.images.items]
    clean = torch.stack([scene.images.load(i) for i in range(len(ids))])
    labels = torch.tensor(scene.images.labels)
    shown = {_RANDOM: randomly_moved(clean, ids, o["eps"][0], o["norm"], o["seed"])}
    bare = undefended(scene.classifier)
    for name in scene.attacks:
        shown[name] = scene.craft(Condition(name, "blind"), bare, clean, labels, ids).images
    return clean, shown


def _left(noise: Tensor) -> Tensor:
    """Which part of each noise's length Gaussian smoothing leaves, ``(B,)``; NaN where there is none."""
    from denoisers.classical import GaussianSmoothing

    smooth = GaussianSmoothing(kernel=5, std=1.0, iterations=1).smooth(noise)
    found: Tensor = smooth.flatten(1).norm(dim=1) / noise.flatten(1).norm(dim=1)
    return found


def _line(name: str, found: NoiseStatistics, left: Tensor) -> dict[str, Any]:
    """Medians over the images that were changed at all."""
    changed = found.std > 0
    if not changed.any():
        return {"noise": name, "changed": 0, **dict.fromkeys(_COLUMNS)}
    low = (found.power[:, found.frequency <= _LOW].sum(1) / found.power.sum(1))[changed]
    return {
        "noise": name,
        "changed": int(changed.sum()),
        "mean": _median(255 * found.mean[changed].abs()),
        "std": _median(255 * found.std[changed]),
        "skewness": _median(found.skewness[changed].abs()),
        "low_frequencies": _median(low),
        "left_by_smoothing": _median(left[changed.to(left.device)]),
    }


def _median(values: Tensor) -> float | None:
    """Of those that are numbers, between the middle two of an even number; None, which JSON has, where none is."""
    known = values[values.isfinite()]
    return float(known.double().quantile(0.5)) if len(known) else None


def _table(rows: list[dict[str, Any]], images: int, images_left: float | None) -> str:
    from tabulate import tabulate

    def numbers(row: Mapping[str, Any]) -> list[Any]:
        return ["" if row.get(key) is None else row[key] for key in _COLUMNS]

    text = tabulate(
        [[row["noise"], row["changed"], *numbers(row)] for row in rows],
        headers=["noise", "images", *_COLUMNS.values()],
        floatfmt=("", "d", ".2f", ".2f", ".3f", ".2f", ".2f"),
    )
    share = "an unknown part" if images_left is None else f"{images_left:.2f}"
    below = (
        f"Medians over the images that were changed, of {images}; mean and std in grey levels of 255.\n"
        f"Smoothing (window 5, deviation 1) leaves {share} of the images' own texture.\n"
        "White noise has 0.15 of its power below 0.22 cycles a pixel; clipping to [0, 1] skews that of dark images."
    )
    if any(row["changed"] < images for row in rows):
        below += "\nImages that an attack left as they were, as it found nothing better, are not counted."
    return f"{text}\n\n{below}"


_COLUMNS = {
    "mean": "|mean|",
    "std": "std",
    "skewness": "|skewness|",
    "low_frequencies": "power below 0.22 cycles",
    "left_by_smoothing": "left by smoothing",
}


def _draw(o: dict[str, Any], scene: Scene, clean: Tensor, shown: dict[str, Tensor], title: str) -> None:
    """One image a row: clean, attacked by the first attack, what was added, and what each purifier makes of it."""
    from analysis.grid import RIGHT, WRONG, Panel, Row, draw_grid
    from certify.models.defence import Defence
    from certify.models.labels import readable
    from certify.smoothing.rng import block_generator, stream_key
    from denoisers.defences import undefended

    first = scene.attacks[0]
    defences = {name: found for name, found in scene.defences.items() if isinstance(found, Defence)}
    bare = undefended(scene.classifier)
    places = [i * len(clean) // min(o["rows"], len(clean)) for i in range(min(o["rows"], len(clean)))]
    names = scene.classifier.class_names

    def row(i: int) -> Row:
        truth, image, moved = scene.images.labels[i], clean[i : i + 1], shown[first][i : i + 1]
        key = stream_key(o["seed"], scene.images.items[i].id, "inspect")

        def panel(defence: Defence, given: Tensor) -> Panel:
            label = int(defence(given, [key]))
            seen = defence.purify(given, 0, [block_generator(key, 0)] if defence.random else None)
            text = readable(names, label) if label >= 0 else "no answer"
            return Panel(seen[0].clamp(0, 1).numpy(), text, label == truth)

        added = (0.5 + (moved - image)[0] / (2 * (moved - image).abs().max().clamp_min(1e-9))).numpy()
        panels = [panel(bare, image), panel(bare, moved), Panel(added)]
        assert truth is not None
        return Row(readable(names, truth), [*panels, *(panel(defence, moved) for defence in defences.values())])

    columns = ["clean", f"{first}", "added,\nstretched", *(name.replace(":", "\n") for name in defences)]
    caption = (
        f"Under each image what the classifier calls it: {RIGHT}\u00a0the true class, {WRONG}\u00a0another; behind a "
        "purifier the answer of the whole defence, of which the picture shows the first pass."
    )
    draw_grid([row(i) for i in places], columns, o["pictures"], title=title, caption=caption, names="true class")
