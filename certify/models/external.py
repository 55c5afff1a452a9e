"""Builder: any Python callable, and what the builders of other people's models share.

None of them says how to normalise: they get images in [0, 1] unless ``--mean`` and ``--std`` are given.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certify.errors import UserError, first_line
from certify.models.classifier import ClassifierSpec, InputSpec, square_input
from certify.models.labels import imagenet_classes
from certify.sibling_packages import claim


def class_names(num_classes: int | None) -> tuple[tuple[str, ...], ...] | None:
    """ImageNet's names for 1,000 classes."""
    return imagenet_classes() if num_classes == 1000 else None


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FunctionNet(nn.Module):
    """Any function from images to logits or labels, as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        """What the function returns, as a tensor."""
        output = self.function(images)
        return output if isinstance(output, Tensor) else torch.as_tensor(np.asarray(output))


def build_callable(name: str, weights: str | Path | None, num_classes: int | None) -> ClassifierSpec:
    """``package.module:callable``: a module, a function of images, or a factory without arguments that returns one.

    The object may carry ``num_classes``, ``input_size`` (C, H, W), ``mean``, ``std`` and ``class_names``.
    """
    return spec_of(*build_object(name), name, weights, num_classes)


def spec_of(
    found: Any, code: str | None, name: str, weights: str | Path | None, num_classes: int | None
) -> ClassifierSpec:
    """A module or a function of images as a classifier; the object states what :func:`build_callable` says."""
    if not isinstance(found, nn.Module) and not callable(found):
        raise UserError(f"{name} gave {type(found).__name__}; expected a module or a function from images to labels")
    net = found if isinstance(found, nn.Module) else FunctionNet(found)
    loaded = "as built"
    if weights is not None:
        if not isinstance(found, nn.Module):
            raise UserError(f"{name} is a function and takes no --weights; return a torch.nn.Module from it")
        from certify.models.checkpoints import load_weights

        loaded = load_weights(net, weights, name)
    size = getattr(found, "input_size", None)
    mean, std = _stated(found, "mean"), _stated(found, "std")
    spec = InputSpec(None, mean, std) if size is None else square_input(tuple(size), mean, std)
    stated = num_classes or getattr(found, "num_classes", None)
    given = getattr(found, "class_names", None)
    names = tuple((str(n),) for n in given) if given is not None else class_names(stated)
    return ClassifierSpec(net, spec, names, stated, loaded, code, native=isinstance(found, nn.Module))


def _stated(found: Any, name: str) -> tuple[float, ...]:
    """The numbers that the object states; a tensor or a method of that name is its own affair."""
    value = getattr(found, name, ())
    return () if isinstance(value, Tensor) or callable(value) else tuple(value)


def build_object(name: str) -> tuple[Any, str | None]:
    """What ``package.module:attribute`` names, or returns if it can be called without arguments.

    Returns:
        The object, and the SHA-256 of the file that defines it.

    Raises:
        UserError: it cannot be imported, or fails.
    """
    found = _made(import_object(name), name)
    return found, code_digest(name.partition(":")[0])


def _made(found: Any, name: str) -> Any:
    if isinstance(found, nn.Module) or not _takes_nothing(found, name):
        return found
    try:
        return found()
    except Exception as error:  # the user's own code
        raise UserError(f"{name} failed: {type(error).__name__}: {first_line(error)}") from error


def code_digest(module: str) -> str | None:
    """SHA-256 of the file that defines a module; None in a notebook or at a prompt."""
    defined = getattr(sys.modules.get(module), "__file__", None)
    return file_digest(defined) if defined and os.path.isfile(defined) else None


def spec_of_object(model: Any, weights: str | Path | None, num_classes: int | None) -> tuple[str, ClassifierSpec]:
    """The name and the classifier of a module, a function of images, or a factory without arguments of one.

    A module is copied: freezing it would surprise whoever trains it.
    """
    own = model if hasattr(model, "__qualname__") else type(model)
    name = str(own.__qualname__)
    found = _made(model, name)
    if found is model and isinstance(found, nn.Module):
        found = copy.deepcopy(found)
    return name, spec_of(found, code_digest(own.__module__), name, weights, num_classes)


def import_object(name: str) -> Any:
    """The attribute ``package.module:attribute`` names; the current folder is searched too."""
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        claim()
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's own code: anything can happen in it
        raise UserError(
            f"cannot import {module_name!r} of {name!r}: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not hasattr(module, attribute):
        public = ", ".join(sorted(k for k in vars(module) if not k.startswith("_"))[:8])
        raise UserError(f"module {module_name!r} has no {attribute!r}; it has {public}")
    return getattr(module, attribute)


def _takes_nothing(function: Any, name: str) -> bool:
    if not callable(function):
        raise UserError(f"{name} is {type(function).__name__}; expected a module, a function of images or a factory")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    own = not inspect.isclass(function)  # a class without __init__ of its own shows its parent's *args
    return all(
        p.default is not p.empty or p.kind == p.VAR_KEYWORD or (p.kind == p.VAR_POSITIONAL and not own)
        for p in parameters
    )


def refuse_weights(name: str, weights: str | Path | None) -> None:
    """Refuse ``--weights`` beside a file that holds its own."""
    if weights is not None:
        raise UserError(f"{name} carries its weights; drop --weights")
