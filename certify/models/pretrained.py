"""Build timm and torchvision models with published weights or a checkpoint and the model's own input settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from certify.errors import RunFault, UserError, first_line
from certify.models.checkpoints import load_weights
from certify.models.classifier import ClassifierSpec, ConfigFile, InputSpec, square_input
from certify.models.file_kind import split_part
from certify.models.labels import ClassNames, imagenet_classes
from certify.models.resolve import LOCAL, UNTRAINED, cannot_fetch


def build_timm(name: str, weights: str | Path | None, num_classes: int | None) -> ClassifierSpec:
    """Build a timm model (``hf-hub:`` names, too) with the input size, transform, mean and std of its configuration.

    A ``config.json`` beside the weights, as timm saves it, replaces the architecture's own configuration.

    Raises:
        UserError: no such model, or a configuration or weights that do not fit.
        RunFault: weights that cannot be downloaded.
    """
    import timm
    from timm.data import create_transform, resolve_data_config

    if name.startswith(LOCAL) and weights is None:
        weights = name.removeprefix(LOCAL)
    config_file = _config_beside(name, weights)
    folder = f"{LOCAL}{config_file.path.parent}" if config_file and config_file.used else ""
    net = _create(
        name,
        lambda: timm.create_model(
            folder or name,
            pretrained=weights is None,
            **({"num_classes": num_classes} if num_classes and weights else {}),
        ),
        fetches=weights is None,
    )
    loaded = f"published ({net.pretrained_cfg.get('hf_hub_id') or net.pretrained_cfg.get('tag') or name})"
    if weights is not None:
        loaded = load_weights(net, weights, str(net.pretrained_cfg.get("architecture") or name))
    config = resolve_data_config(pretrained_cfg=net.pretrained_cfg)
    channels, height, width = config["input_size"]
    transform = create_transform(
        input_size=config["input_size"],
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        mean=(0.0,) * channels,  # the classifier normalises, after the noise is added
        std=(1.0,) * channels,
        is_training=False,
    )
    steps = f"{config['crop_mode']} crop {height}x{width}, {config['crop_pct']} of a {config['interpolation']} resize"
    spec = InputSpec((channels, height, width), tuple(config["mean"]), tuple(config["std"]), transform, steps)
    own = net.pretrained_cfg.get("label_names")
    names: ClassNames | None = tuple((str(n),) for n in own) if own and len(own) == net.num_classes else None
    if names is None and net.num_classes == 1000:
        names = imagenet_classes()
    return ClassifierSpec(net, spec, names, None, loaded, closed=True, config_file=config_file)


def _config_beside(name: str, weights: str | Path | None) -> ConfigFile | None:
    """Return the ``config.json`` in the folder of a checkpoint, as timm saves it, or None."""
    if weights is None or weights == UNTRAINED or name.startswith(LOCAL):
        return None
    path = split_part(weights)[0].parent / "config.json"
    try:
        architecture = json.loads(path.read_bytes())["architecture"]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None
    return ConfigFile(path, str(architecture), used=architecture == name.partition(".")[0])


def build_torchvision(name: str, weights: str | Path | None, num_classes: int | None) -> ClassifierSpec:
    """Build a torchvision classifier with the transform of its default weights, or of the given file if published.

    Raises:
        UserError: not a classifier, or weights that do not fit.
        RunFault: weights that cannot be downloaded.
    """
    import torchvision

    try:
        known = torchvision.models.get_model_weights(name)
        published = next(
            (w for w in known if weights and Path(w.url).name == split_part(weights)[0].name), known.DEFAULT
        )
        preset = published.transforms()
        mean, std, crop, resize = preset.mean, preset.std, preset.crop_size[0], preset.resize_size[0]
        interpolation = preset.interpolation.value
    except (AttributeError, ValueError, IndexError):
        raise UserError(f"torchvision's {name!r} is not an image classifier; see `certify list models`") from None
    settings: dict[str, Any] = {"num_classes": num_classes} if num_classes and weights is not None else {}
    if name in ("googlenet", "inception_v3") and weights is not None:  # as torchvision does for its own weights
        settings |= {"transform_input": True, "init_weights": False}
    net = _create(
        name,
        lambda: torchvision.models.get_model(name, weights=published if weights is None else None, **settings),
        fetches=weights is None,
    )
    loaded = f"published ({published})" if weights is None else load_weights(net, weights, name)
    spec = square_input((3, crop, crop), mean, std, resize=resize, interpolation=interpolation)
    names = imagenet_classes() if (num_classes or 1000) == 1000 else None
    return ClassifierSpec(net, spec, names, None, loaded, closed=True)


def _create(name: str, create: Callable[[], Any], *, fetches: bool) -> Any:
    """Build a model; turn a failed download or conflicting settings into a one-line error."""
    try:
        return create()
    except Exception as error:  # the hub client and its HTTP library have exception types of their own
        if name.startswith(LOCAL):
            file = Path(name.removeprefix(LOCAL)) / "config.json"
            reason = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
            raise UserError(f"cannot build the model that {file} describes ({reason})") from error
        reason = first_line(error)
        contradiction = isinstance(error, RuntimeError | ValueError | KeyError | AssertionError)
        if fetches and (isinstance(error, OSError) or not contradiction):
            raise RunFault(cannot_fetch(name, reason)) from error
        advice = "; pass a checkpoint with --weights FILE" if fetches else ""
        raise UserError(f"cannot build model {name!r}: {reason}{advice}") from error
