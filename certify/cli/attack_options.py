"""What ``compare`` and ``inspect`` share, ``audit`` in part: options of attacks, names of defences, images to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from certify.cli import options
from certify.cli.console import few_warnings, speaker, warn
from certify.cli.load import chosen_images, classifier_from, surrogate_from
from certify.errors import ImageError, UserError, first_line

if TYPE_CHECKING:
    from certify.images.dataset import ImageSet
    from certify.models.classifier import Classifier
    from certify.models.defence import Defence


class Distance(options.ParamType):
    """A distance: 0.5, or a fraction such as 8/255."""

    name = "number|fraction"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, str]:
        """``"8/255"`` to ``(0.0313..., "8/255")``."""
        if isinstance(value, tuple):
            return value
        try:
            found = options.number(str(value))
            if not 0 < found < float("inf"):
                raise ValueError
        except ValueError:
            self.fail(f"{value!r}; expected a distance above 0 in [0, 1] pixels, such as 8/255 or 0.5", param, ctx)
        return found, str(value)


distance_options = options.together(
    click.option("--eps", type=Distance(), default="8/255", help="Largest distance in [0, 1] pixels."),
    click.option("--norm", type=click.Choice(["linf", "l2"]), default="linf", help="Norm of --eps."),
)

attack_options = options.together(
    click.option(
        "--attacks", default="blind-pgd,square", help="Attacks, separated by commas (`certify list attacks`)."
    ),
    distance_options,
    click.option(
        "--queries", type=options.Count("queries"), default=1000, help="Queries of an attack for an image, at most."
    ),
    click.option("--surrogate", multiple=True, metavar="MODEL[=FILE]", help="For --attacks transfer; repeatable."),
    click.option("--steps", type=options.Count("steps"), default=40, help="Steps of gradient attacks."),
    options.seed("everything that is drawn"),
)


@dataclass(frozen=True)
class Scene:
    """What a command needs that attacks a classifier behind defences.

    Attributes:
        classifier: frozen.
        images: with labels; all of them can be read.
        defences: as named by the user; a text is why there is none.
        attacks: their names.
        surrogates: that ``transfer`` climbs.
        craft: runs an attack under its condition, see :func:`analysis.attacks.crafter`.
    """

    classifier: Classifier
    images: ImageSet
    defences: dict[str, Defence | str]
    attacks: list[str]
    surrogates: list[Classifier]
    craft: Callable[..., Any]


def attacks_wanted(o: dict[str, Any]) -> list[str]:
    """The names in ``--attacks``; ``none`` is no attack."""
    return listed("--attacks", o["attacks"]) if o["attacks"] != "none" else []


def set_scene(o: dict[str, Any], *, digits: int, eot: int = 1) -> Scene:
    """Everything that the options of both commands name, refused before any work where it is wrong.

    Args:
        o: the options.
        digits: images of the default data, for the default model.
        eot: passes a gradient, where a defence is random.

    Raises:
        UserError: a name, a number or a file that is wrong.
    """
    from certify.models import resolve as hub

    hub.require_weights(hub.find_source(o["model"], o["weights"]), o["weights"], trust_code=o["trust_code"])
    named = listed("--defences", o["defences"])
    attacks = attacks_wanted(o)
    check_names(named)
    if o["data"] is None:
        if o["model"] != "digits":
            raise UserError(
                "--data is missing: expected labelled images, such as a folder with a folder for each class"
            )
        o["data"] = "digits"
        o["max_images"] = o["max_images"] or digits
    if o["surrogate"] and "transfer" not in attacks:
        raise UserError("--surrogate belongs to --attacks transfer; leave it out here")
    from analysis.attacks import check_attacks, crafter

    check_attacks(attacks, norm=o["norm"], surrogates=len(o["surrogate"]))
    classifier = classifier_from(o["model"], o)
    images = readable(chosen_images(o, classifier), o)
    if classifier.input.size is None:  # attacks take batches
        one_size(f"the images of {images.name}", {tuple(images.load(i).shape) for i in range(len(images))})
    if not images.labelled:
        raise UserError(f"{images.name} has no labels, and accuracies need them: --labels FILE, or a folder a class")
    defences = {text: build(text, classifier, trust_code=o["trust_code"]) for text in named}
    surrogates = [surrogate_from(s, trust_code=o["trust_code"]) for s in o["surrogate"]]
    craft = crafter(
        classifier,
        eps=o["eps"][0],
        norm=o["norm"],
        queries=o["queries"],
        steps=o["steps"],
        eot=eot,
        seed=o["seed"],
        surrogates=surrogates,
    )
    return Scene(classifier, images, defences, attacks, surrogates, craft)


def listed(option: str, text: str) -> list[str]:
    """Names separated by commas, each once; options of a name may hold commas before digits.

    Raises:
        UserError: an empty name, or one twice.
    """
    found: list[str] = []
    for part in text.split(","):
        if found and part[:1].isdigit():  # the value of an option goes on: levels=90,75
            found[-1] += f",{part.strip()}"
        else:
            found.append(part.strip())
    if "" in found or len(set(found)) < len(found):
        raise UserError(f"{option} {text!r}: expected names separated by commas, each once")
    return found


def check_names(named: list[str]) -> None:
    """Refuse what is no defence before anything is loaded."""
    from denoisers import DEFENCES
    from denoisers.names import find_source

    for text in named:
        if text.partition(":")[0] not in DEFENCES:
            find_source(text)


def build(text: str, classifier: Classifier, *, trust_code: bool = False) -> Defence | str:
    """The defence, or why there is none: a user's mistake stops the command, a fault of its own fails its row alone."""
    from denoisers.defences import build_defence

    try:
        return build_defence(text, classifier, trust_code=trust_code)
    except UserError:
        raise
    except Exception as error:
        warn(f"defence {text}: {type(error).__name__}: {first_line(error)}; its row is left without figures")
        return f"{type(error).__name__}: {first_line(error)}"


def one_size(images: str, sizes: Collection[tuple[int, ...]]) -> tuple[int, int, int]:
    """The one size (C, H, W) that all of these images have; several do not fit into a batch."""
    if len(sizes) != 1:
        raise UserError(f"{images} have {len(sizes)} sizes; expected one: pass --input-size CxHxW")
    ((channels, height, width),) = sizes
    return channels, height, width


def readable(images: ImageSet, o: dict[str, Any]) -> ImageSet:
    """The images that can be read: all defences and noise levels are judged on the same ones."""
    if images.omissions:
        say = speaker(quiet=o.get("quiet") or o["as_json"])
        say(f"data       {images.name}: {len(images):,} of {images.available:,} images{images.omissions}")
    kept = []
    with few_warnings() as left_out:
        for index, item in enumerate(images.items):
            try:
                images.load(index)
            except ImageError as error:
                if o["strict"]:
                    raise ImageError(f"{item.id}: {error}") from None
                left_out(f"{item.id}: {error}; it is left out")
            else:
                kept.append(index)
    if not kept:
        raise UserError(f"none of the {len(images)} images of {images.name} can be read; expected one or more")
    items, labels = [images.items[i] for i in kept], [images.labels[i] for i in kept]
    return dataclasses.replace(images, items=items, labels=labels)
