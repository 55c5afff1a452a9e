"""Attack context of ``compare`` and ``inspect``: classifier, images, defences and attacks from the options."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from certify.cli.console import few_warnings, speaker, warn
from certify.cli.load import check_classifier, classifier_from, load_image_set
from certify.cli.option_groups import AttackOptions, DataOptions, GradientAttackOptions, ModelOptions
from certify.errors import UserError

if TYPE_CHECKING:
    from analysis.attacks import AttackSettings
    from analysis.comparison.plan import AttackContext
    from certify.images.dataset import ImageSet

DEMO_IMAGES = 50
"""Images at most, where no --data is given."""


def settings_from(
    options: AttackOptions, names: list[str], *, steps: int = 0, eot: int = 1, seed: int = 0
) -> AttackSettings:
    """Return the settings of these attacks."""
    from analysis.attacks import AttackSettings

    eps = options.eps
    return AttackSettings(names, eps.value, options.norm, options.queries, steps, eot, seed, eps_text=eps.text)


def load_attack_context(
    model: ModelOptions,
    data: DataOptions,
    attack: GradientAttackOptions,
    defences: str,
    *,
    group: str = "both",
    eot: int = 1,
    quiet: bool = False,
) -> AttackContext:
    """Load what the options name; wrong names and numbers are refused before anything is loaded.

    Args:
        model: the classifier.
        data: the images; without --data the digits, for the model ``digits``.
        attack: attacks and their norm ball.
        defences: names separated by commas.
        group: of the attacks.
        eot: forward passes per gradient of a random defence.
        quiet: show no line about the images.

    Raises:
        UserError: a name, a number or a file that is wrong.
    """
    from analysis.attacks import check_attacks

    check_classifier(model.model, model)
    texts = split_defences(defences)
    names = split_names("--attacks", attack.attacks) if attack.attacks != "none" else []
    settings = settings_from(attack, names, steps=attack.steps, eot=eot, seed=attack.seed)
    if data.data is None:
        if model.model != "digits":
            raise UserError(
                "--data is missing: expected labelled images, such as a folder with a folder for each class"
            )
        data = dataclasses.replace(data, data="digits", max_images=data.max_images or DEMO_IMAGES)
    check_attacks(names, norm=attack.norm, group=group, surrogates=len(attack.surrogate))
    from analysis.comparison.plan import attack_context
    from certify.models.load import as_classifier

    classifier = classifier_from(model.model, model)
    images = load_readable(load_image_set(data, classifier), strict=data.strict, quiet=quiet)
    surrogates = [as_classifier(text, trust_code=model.trust_code) for text in attack.surrogate]
    settings = dataclasses.replace(settings, surrogates=surrogates)
    return attack_context(
        classifier, images, {text: text for text in texts}, settings, trust_code=model.trust_code, warn=warn
    )


def split_defences(text: str) -> list[str]:
    """Split the names in ``--defences``, and refuse unknown ones before anything is loaded."""
    from denoisers.names import check_defence

    names = split_names("--defences", text)
    for name in names:
        check_defence(name)
    return names


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


def load_readable(images: ImageSet, *, strict: bool, quiet: bool) -> ImageSet:
    """Leave out images that cannot be read, with a warning; state what else of the data is not read."""
    if images.omissions:
        text = f"data       {images.name}: {len(images):,} of {images.available:,} images{images.omissions}"
        speaker(quiet=quiet)(text)
    from certify.comparing import readable_images

    with few_warnings() as left_out:
        return readable_images(images, strict=strict, warn=left_out)
