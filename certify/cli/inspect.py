"""``certify inspect``: statistics and pictures of adversarial noise, before and after purification."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from certify.cli.attack_context import load_attack_context, split_defences
from certify.cli.console import say, tell
from certify.cli.option_groups import DataOptions, GradientAttackOptions, JsonOptions, ModelOptions
from certify.cli.options import Options, command, option
from certify.cli.parameter_types import Count
from certify.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from analysis.comparison.plan import AttackContext
    from analysis.grid import Panel, Row
    from certify.models.defence import Defence

_RANDOM = "random noise"


class DefenceOptions(Options, section="Defences"):
    """Purifiers whose images are shown."""

    defences: str = option(
        default="gs,median,jpeg",
        help="Purifiers shown by --pictures: NAME:KEY=VALUE:..., separated by commas (`certify list defences`).",
    )


class InspectionOutput(JsonOptions):
    """Figures to write."""

    figure: str | None = option(
        metavar="FILE", help="Figure of mean, skewness and spectrum of the noise: .png, .svg or .pdf."
    )
    pictures: str | None = option(
        metavar="FILE", help="Figure of clean, attacked and purified images with labels: .png, .svg or .pdf."
    )
    rows: int = option("--images", type=Count("how many images to show"), default=6, help="Rows of --pictures.")


@command(
    "Measure what attacks add and what purifiers remove.",
    main=("model", "data", "max_images", "attacks", "eps", "norm", "figure", "pictures"),
)
def inspect(
    model: ModelOptions,
    data: DataOptions,
    defences: DefenceOptions,
    attack: GradientAttackOptions,
    output: InspectionOutput,
) -> None:
    """Attack the classifier without a defence, and measure the noise that the attacks add.

    Smoothing as a defence assumes adversarial noise with nearly zero mean and a symmetric distribution. The table shows
    both for each attack, next to random noise of the same size, and the fraction of the noise that Gaussian smoothing
    (window 5, deviation 1) leaves, next to the fraction of the images' own texture.
    """
    from analysis.adversarial_noise import median, noise_statistics, smoothing_factor, summarise_noise, tabulate_noise
    from analysis.figures import check_format

    files = [path for path in (output.figure, output.pictures) if path]
    for path in files:
        check_format(path)
    shown_defences = defences.defences
    if not output.pictures:  # only pictures show defences; without them names are checked and nothing is built
        split_defences(shown_defences)
        shown_defences = "none"
    context = load_attack_context(model, data, attack, shown_defences, quiet=output.as_json)
    if not context.attacks.names:
        raise UserError("--attacks none: there is nothing to measure; name one or more (`certify list attacks`)")
    clean, attacked = _attack_images(attack, context)
    noises = {name: noise_statistics(images, clean) for name, images in attacked.items()}
    texture = noise_statistics(clean, clean.mean((2, 3), keepdim=True).expand_as(clean))
    rows = [summarise_noise(name, noises[name], smoothing_factor(attacked[name] - clean)) for name in noises]
    images_left = median(smoothing_factor(clean - clean.mean((2, 3), keepdim=True)))
    if output.as_json:
        about = {"images": len(clean), "norm": attack.norm, "eps": attack.eps.value}
        result = {**about, "images_left_by_smoothing": images_left, "noises": [asdict(row) for row in rows]}
        tell(json.dumps(result, allow_nan=False))
    else:
        tell(tabulate_noise(rows, len(clean), images_left))
    title = f"{model.model} on {context.images.name}, {len(clean)} images, {attack.norm} {attack.eps}"
    if output.figure:
        from analysis.adversarial_noise import draw_noise

        draw_noise(noises, texture, output.figure, title=f"what attacks add to images: {title}")
    if output.pictures:
        _draw(context, clean, attacked, output.pictures, rows=output.rows, seed=attack.seed, title=title)
    if not output.as_json:
        for path in files:
            say(f"wrote {path}")


def _attack_images(attack: GradientAttackOptions, context: AttackContext) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the clean images and, by name, the images of each attack; random noise comes first."""
    import torch

    from analysis.comparison.results import Condition
    from analysis.comparison.runner import randomly_moved

    ids = [item.id for item in context.images.items]
    clean = torch.stack([context.images.load(i) for i in range(len(ids))])
    labels = torch.tensor(context.images.labels)
    attacked = {_RANDOM: randomly_moved(clean, ids, attack.eps.value, attack.norm, attack.seed)}
    for name in context.attacks.names:
        attacked[name] = context.craft(Condition(name, "blind"), context.bare, clean, labels, ids).images
    return clean, attacked


def _draw(
    context: AttackContext,
    clean: Tensor,
    attacked: Mapping[str, Tensor],
    path: str,
    *,
    rows: int,
    seed: int,
    title: str,
) -> None:
    """Draw one image per row: clean, under the first attack, the noise added, and each purifier's image."""
    from analysis.grid import RIGHT, WRONG, Panel, Row, draw_grid
    from certify.models.defence import Defence
    from certify.models.labels import readable
    from certify.smoothing.rng import block_generator, stream_key

    first = context.attacks.names[0]
    defences = {name: defence for name, defence in context.defences.items() if isinstance(defence, Defence)}
    places = [i * len(clean) // min(rows, len(clean)) for i in range(min(rows, len(clean)))]
    names = context.classifier.class_names

    def row(i: int) -> Row:
        truth, image, moved = context.images.labels[i], clean[i : i + 1], attacked[first][i : i + 1]
        key = stream_key(seed, context.images.items[i].id, "inspect")

        def panel(defence: Defence, images: Tensor) -> Panel:
            label = int(defence(images, [key]))
            purified = defence.purify(images, 0, [block_generator(key, 0)] if defence.random else None)
            text = readable(names, label) if label >= 0 else "no answer"
            return Panel(purified[0].clamp(0, 1).numpy(), text, label == truth)

        added = (0.5 + (moved - image)[0] / (2 * (moved - image).abs().max().clamp_min(1e-9))).numpy()
        panels = [panel(context.bare, image), panel(context.bare, moved), Panel(added)]
        assert truth is not None
        return Row(readable(names, truth), [*panels, *(panel(defence, moved) for defence in defences.values())])

    columns = ["clean", f"{first}", "added,\nstretched", *(name.replace(":", "\n") for name in defences)]
    caption = (
        f"Under each image the classifier's label: {RIGHT}\u00a0the true class, {WRONG}\u00a0another; behind a "
        "purifier the label of the whole defence, of which the picture shows the first pass."
    )
    draw_grid([row(i) for i in places], columns, path, title=title, caption=caption, names="true class")
