"""Attack context of ``compare`` and ``inspect``: classifier, images, defences and attacks from the options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from certify.cli.console import few_warnings, speaker, warn
from certify.cli.load import check_classifier, classifier_from, load_image_set, surrogate_from
from certify.cli.option_groups import DataOptions, GradientAttackOptions, ModelOptions
from certify.errors import ImageError, UserError, first_line

if TYPE_CHECKING:
    from certify.images.dataset import ImageSet
    from certify.models.classifier import Classifier
    from certify.models.defence import Defence


@dataclass(frozen=True)
class AttackContext:
    """Inputs of an attack on a classifier behind defences.

    Attributes:
        classifier: frozen.
        images: with labels; all of them can be read.
        defences: by the name given; a text is the reason why one could not be built.
        attacks: names.
        surrogates: classifiers whose gradients the attack ``transfer`` follows.
        craft: runs an attack under a condition, see :func:`analysis.attacks.crafter`.
    """

    classifier: Classifier
    images: ImageSet
    defences: dict[str, Defence | str]
    attacks: list[str]
    surrogates: list[Classifier]
    craft: Callable[..., Any]


def attack_names(attacks: str) -> list[str]:
    """Return the names in ``--attacks``; ``none`` is no attack."""
    return split_names("--attacks", attacks) if attacks != "none" else []


def load_attack_context(
    model: ModelOptions,
    data: DataOptions,
    attack: GradientAttackOptions,
    defences: str,
    *,
    demo_images: int,
    eot: int = 1,
    quiet: bool = False,
) -> AttackContext:
    """Load what the options name; wrong names and numbers are refused before anything is loaded.

    Args:
        model: the classifier.
        data: the images; without --data the digits, for the model ``digits``.
        attack: attacks and their norm ball.
        defences: names separated by commas.
        demo_images: number of images where --data is not given.
        eot: forward passes per gradient where a defence is random.
        quiet: show no line about the images.

    Raises:
        UserError: a name, a number or a file that is wrong.
    """
    check_classifier(model.model, model)
    names, attacks = split_names("--defences", defences), attack_names(attack.attacks)
    check_defence_names(names)
    if data.data is None:
        if model.model != "digits":
            raise UserError(
                "--data is missing: expected labelled images, such as a folder with a folder for each class"
            )
        data = dataclasses.replace(data, data="digits", max_images=data.max_images or demo_images)
    if attack.surrogate and "transfer" not in attacks:
        raise UserError("--surrogate belongs to --attacks transfer; leave it out here")
    from analysis.attacks import check_attacks, crafter

    check_attacks(attacks, norm=attack.norm, surrogates=len(attack.surrogate))
    classifier = classifier_from(model.model, model)
    images = readable_images(load_image_set(data, classifier), strict=data.strict, quiet=quiet)
    if classifier.input.size is None:  # attacks take batches
        one_size(f"the images of {images.name}", {tuple(images.load(i).shape) for i in range(len(images))})
    if not images.labelled:
        raise UserError(
            f"{images.name} has no labels, and accuracies need them: --labels FILE, or a folder for each class"
        )
    built = {name: build(name, classifier, trust_code=model.trust_code) for name in names}
    surrogates = [surrogate_from(text, trust_code=model.trust_code) for text in attack.surrogate]
    craft = crafter(
        classifier,
        eps=attack.eps.value,
        norm=attack.norm,
        queries=attack.queries,
        steps=attack.steps,
        eot=eot,
        seed=attack.seed,
        surrogates=surrogates,
    )
    return AttackContext(classifier, images, built, attacks, surrogates, craft)


def split_names(option: str, text: str) -> list[str]:
    """Split names separated by commas; a part that starts with a digit belongs to the option before it (levels=90,75).

    Raises:
        UserError: an empty name, or one twice.
    """
    names: list[str] = []
    for part in text.split(","):
        if names and part[:1].isdigit():
            names[-1] += f",{part.strip()}"
        else:
            names.append(part.strip())
    if "" in names or len(set(names)) < len(names):
        raise UserError(f"{option} {text!r}: expected names separated by commas, each once")
    return names


def check_defence_names(names: list[str]) -> None:
    """Refuse unknown defences before anything is loaded."""
    from denoisers import DEFENCES
    from denoisers.names import find_source

    for name in names:
        if name.partition(":")[0] not in DEFENCES:
            find_source(name)


def build(name: str, classifier: Classifier, *, trust_code: bool = False) -> Defence | str:
    """Build a defence, or return why it failed: then only its own row is left without figures.

    Raises:
        UserError: a mistake in the name or its options.
    """
    from denoisers.defences import build_defence

    try:
        return build_defence(name, classifier, trust_code=trust_code)
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        warn(f"defence {name}: {reason}; its row is left without figures")
        return reason


def one_size(images: str, sizes: Collection[tuple[int, ...]]) -> tuple[int, int, int]:
    """Return the size (C, H, W) that all of these images have; refuse several, which do not fit into a batch."""
    if len(sizes) != 1:
        raise UserError(f"{images} have {len(sizes)} sizes; expected one: pass --input-size CxHxW")
    ((channels, height, width),) = sizes
    return channels, height, width


def readable_images(images: ImageSet, *, strict: bool, quiet: bool) -> ImageSet:
    """Leave out images that cannot be read, so that all defences and noise levels are measured on the same ones.

    Raises:
        ImageError: one cannot be read, and ``strict``.
        UserError: none can be read.
    """
    if images.omissions:
        say = speaker(quiet=quiet)
        say(f"data       {images.name}: {len(images):,} of {images.available:,} images{images.omissions}")
    kept = []
    with few_warnings() as left_out:
        for index, item in enumerate(images.items):
            try:
                images.load(index)
            except ImageError as error:
                if strict:
                    raise ImageError(f"{item.id}: {error}") from None
                left_out(f"{item.id}: {error}; it is left out")
            else:
                kept.append(index)
    if not kept:
        raise UserError(f"none of the {len(images)} images of {images.name} can be read; expected one or more")
    items, labels = [images.items[i] for i in kept], [images.labels[i] for i in kept]
    return dataclasses.replace(images, items=items, labels=labels)
