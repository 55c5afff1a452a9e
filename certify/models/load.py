"""Load a frozen classifier by name, from a file or from a Python object, and apply the user's settings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from certify.errors import CertifyWarning, UserError
from certify.models import resolve
from certify.models.callables import build_from_object
from certify.models.classifier import Classifier, ClassifierSpec, ConfigFile, FailsOnImages, InputSpec, square_input
from certify.smoothing.numeric import as_float, as_int


def load_classifier(
    model: str | nn.Module | Callable[..., Any],
    *,
    weights: str | Path | None = None,
    input_size: tuple[int, int, int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    num_classes: int | None = None,
    trust_code: bool = False,
) -> Classifier:
    """Load a frozen classifier, on the CPU, in evaluation mode.

    Args:
        model: ``digits``, ``cifar_resnet20`` .. ``cifar_resnet110``, a timm or torchvision name (``timm:NAME`` or
            ``torchvision:NAME`` select the library; timm is the default), ``hf-hub:OWNER/NAME``, a TorchScript or ONNX
            file (``FILE.onnx::OUTPUT`` selects an output), a folder saved by timm, or ``package.module:callable``; or
            an object: a module, which is copied, a function from images ``(B, C, H, W)`` to logits or labels, or a
            function without arguments that returns either.
        weights: a checkpoint, or ``FILE::PART`` for one of several sets of weights; the model's published weights by
            default.
        input_size: (C, H, W), in place of the model's own.
        mean: mean in place of the model's own, one number or one per channel; needs ``std``.
        std: standard deviation in place of the model's own, one number or one per channel; needs ``mean``.
        num_classes: K, for checkpoints with another head than the published one, and for label-only callables.
        trust_code: whether to run the program in a TorchScript file, which can do anything that you can.

    Returns:
        The classifier, which takes images as float32 in [0, 1].

    Raises:
        UserError: an unknown name, weights that do not fit, or contradictory settings.
        RunFault: weights that cannot be downloaded.
    """
    if input_size is not None:
        input_size = _check_size(input_size)
    if num_classes is not None:
        num_classes = as_int(num_classes, "num_classes")
    spec: ClassifierSpec
    if isinstance(model, str):
        source = resolve.find_source(model, weights)
        resolve.require_weights(source, weights, trust_code=trust_code)
        consent = {"trust_code": trust_code} if source.kind == "torchscript" else {}
        name, spec = model, resolve.BUILDERS.get(source.kind)(source.name, weights, num_classes, **consent)
    else:
        name, spec = build_from_object(model, weights, num_classes)
        if (
            input_size is not None and input_size[1] != input_size[2]
        ):  # given tensors are not resized, so they need not be square
            spec, input_size = replace(spec, input=replace(spec.input, size=input_size, transform=None)), None
    if mean is not None and spec.eight_bits:
        raise UserError(f"{name} takes 8-bit pixels and normalises them itself; drop --mean and --std")
    if spec.config_file is not None:
        _warn_of_config(name, spec.config_file, input_size, mean)
    spec = replace(spec, input=_override_input(spec.input, input_size, _floats(mean, "mean"), _floats(std, "std")))
    try:
        return Classifier(name, spec, num_classes)
    except FailsOnImages as error:
        given = f"; is --input-size {'x'.join(map(str, input_size))} the right one?" if input_size else ""
        raise UserError(f"{error}{given}") from error


def as_classifier(model: Any, size: tuple[int, int, int] | None = None, *, trust_code: bool = False) -> Classifier:
    """Return a frozen classifier from a classifier, a name ``MODEL`` or ``MODEL=FILE``, or an object.

    Args:
        model: a classifier, a name, or a module or function.
        size: (C, H, W) of the images, for a module or function.
        trust_code: whether to run the program in a TorchScript file.

    Raises:
        UserError: as :func:`load_classifier`.
    """
    if isinstance(model, Classifier):
        return model
    if isinstance(model, str):
        name, _, weights = model.partition("=")
        return load_classifier(name, weights=weights or None, trust_code=trust_code)
    return load_classifier(model, input_size=size)


def _check_size(size: Any) -> tuple[int, int, int]:
    """Validate an input size and return it as three positive integers."""
    expected = "channels, height and width, such as (3, 224, 224)"
    values = tuple(size) if isinstance(size, Iterable) and not isinstance(size, str) else ()
    numbers = [as_int(value, "input_size", expected) for value in values]
    if len(numbers) != 3 or min(numbers) < 1:
        raise UserError(f"input_size = {size!r}: expected {expected}")
    return numbers[0], numbers[1], numbers[2]


def _floats(values: Any, name: str) -> tuple[float, ...] | None:
    """Return one number or several as Python floats; None as it is."""
    values = values.tolist() if hasattr(values, "tolist") else values
    numbers = values if isinstance(values, list | tuple) else [values]
    return None if values is None else tuple(as_float(x, name, "one number, or one per channel") for x in numbers)


def _warn_of_config(
    model: str, file: ConfigFile, size: tuple[int, int, int] | None, mean: float | Sequence[float] | None
) -> None:
    """Warn if input settings come from a ``config.json`` beside the weights, or if that file is not used."""
    left = [*(["size"] if size is None else []), *(["mean", "std"] if mean is None else [])]
    if not left:
        return
    settings = " and ".join(", ".join(left).rsplit(", ", 1))
    if file.used:
        options = " and ".join(", ".join(f"--{s}".replace("--size", "--input-size") for s in left).rsplit(", ", 1))
        verbs = ("is that", "replaces it") if left == ["size"] else ("are those", "replace them")
        text = f"{settings} {verbs[0]} of {file.path} beside the weights; {options} {verbs[1]}"
    else:
        text = f"{file.path} beside the weights describes {file.architecture}, not {model}: its {settings} "
        text += "is not used" if left == ["size"] else "are not used"
    warnings.warn(text, CertifyWarning, stacklevel=3)


_LARGE_STD = 4.0  # implausible for pixels in [0, 1]


def _override_input(
    own: InputSpec, size: tuple[int, int, int] | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> InputSpec:
    """Replace the model's input settings by those the user gave."""
    if (mean is None) != (std is None):
        raise UserError("only one of --mean and --std; give both, such as --mean 0.5 --std 0.5")
    if size is not None:
        own = square_input(size, own.mean, own.std, resize=_keep_ratio(own, size))
    if mean is not None and std is not None:
        if min(std, default=1) <= 0:
            raise UserError(f"--std {std}: expected numbers above 0")
        channels = own.size[0] if own.size else len(mean)
        if (
            len(mean) not in (1, channels)
            or len(std) not in (1, channels)
            or not all(map(math.isfinite, (*mean, *std)))
        ):
            raise UserError(f"--mean {mean} --std {std}: expected 1 or {channels} numbers each, std above 0")
        if max(mean) > 1 or max(std) > _LARGE_STD:
            in_units = " ".join(
                f"--{k} {','.join(f'{x / 255:.3g}' for x in v)}" for k, v in (("mean", mean), ("std", std))
            )
            given = f"mean {','.join(f'{x:g}' for x in mean)} and std {','.join(f'{x:g}' for x in std)}"
            warnings.warn(
                f"{given} are large for images in [0, 1]; if they are for pixels from 0 to 255, pass {in_units}",
                CertifyWarning,
                stacklevel=3,
            )
        own = replace(own, mean=mean * (channels // len(mean)), std=std * (channels // len(std)))
    return own


def _keep_ratio(own: InputSpec, size: tuple[int, int, int]) -> int | None:
    """Return the resize at the new size that keeps the published ratio of resize to crop, such as 256 to 224."""
    resize = getattr(own.transform, "resize_size", None)
    return round(size[1] * resize[0] / own.size[1]) if resize and own.size else None
