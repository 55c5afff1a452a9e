"""Build classifiers from Python objects: a module, a function of images, or a factory of either.

They receive images in [0, 1], normalised if the object has ``mean`` and ``std`` or the options give them.
"""

from __future__ import annotations

import copy
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
from certify.models.checkpoints import load_weights
from certify.models.classifier import ClassifierSpec, InputSpec, square_input
from certify.models.identity import file_digest
from certify.models.labels import default_class_names
from certify.sibling_packages import claim


class FunctionNet(nn.Module):
    """Module that wraps a function from images to logits or labels."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        """Return the function's output as a tensor."""
        output = self.function(images)
        return output if isinstance(output, Tensor) else torch.as_tensor(np.asarray(output))


def build_callable(name: str, weights: str | Path | None, num_classes: int | None) -> ClassifierSpec:
    """Build ``package.module:callable``: a module, a function of images, or a factory without arguments.

    The object may have the attributes ``num_classes``, ``input_size`` (C, H, W), ``mean``, ``std`` and ``class_names``.
    """
    return _describe_object(*build_object(name), name, weights, num_classes)


def _describe_object(
    model: Any, code: str | None, name: str, weights: str | Path | None, num_classes: int | None
) -> ClassifierSpec:
    """Return the spec of a module or a function of images, from the attributes that :func:`build_callable` lists."""
    if not isinstance(model, nn.Module) and not callable(model):
        raise UserError(f"{name} is {type(model).__name__}; expected a module or a function from images to labels")
    net = model if isinstance(model, nn.Module) else FunctionNet(model)
    loaded = "as built"
    if weights is not None:
        if not isinstance(model, nn.Module):
            raise UserError(f"{name} is a function and takes no --weights; return a torch.nn.Module from it")
        loaded = load_weights(net, weights, name)
    size = getattr(model, "input_size", None)
    mean, std = _numbers(model, "mean"), _numbers(model, "std")
    spec = InputSpec(None, mean, std) if size is None else square_input(tuple(size), mean, std)
    classes = num_classes or getattr(model, "num_classes", None)
    own_names = getattr(model, "class_names", None)
    names = default_class_names(classes) if own_names is None else tuple((str(n),) for n in own_names)
    return ClassifierSpec(net, spec, names, classes, loaded, code, native=isinstance(model, nn.Module))


def _numbers(model: Any, name: str) -> tuple[float, ...]:
    """Return an attribute that holds numbers; a tensor or method of that name has another meaning and is ignored."""
    value = getattr(model, name, ())
    return () if isinstance(value, Tensor) or callable(value) else tuple(value)


def build_object(name: str) -> tuple[Any, str | None]:
    """Import ``package.module:attribute``, and call it if it takes no arguments.

    Returns:
        The object, and the SHA-256 of the file that defines it.

    Raises:
        UserError: the import or the call fails.
    """
    model = _call_factory(import_object(name), name)
    return model, code_digest(name.partition(":")[0])


def _call_factory(model: Any, name: str) -> Any:
    """Call a function that takes no arguments; return anything else unchanged."""
    if isinstance(model, nn.Module) or not _takes_nothing(model, name):
        return model
    try:
        return model()
    except Exception as error:  # the user's own code
        raise UserError(f"{name} failed: {type(error).__name__}: {first_line(error)}") from error


def code_digest(module: str) -> str | None:
    """Return the SHA-256 of the file that defines a module; None in a notebook or interactive session."""
    defined = getattr(sys.modules.get(module), "__file__", None)
    return file_digest(defined) if defined and os.path.isfile(defined) else None


def build_from_object(model: Any, weights: str | Path | None, num_classes: int | None) -> tuple[str, ClassifierSpec]:
    """Return the name and the spec of a module, a function of images, or a factory without arguments.

    A module is copied, so that freezing it does not affect the caller's own.
    """
    own = model if hasattr(model, "__qualname__") else type(model)
    name = str(own.__qualname__)
    made = _call_factory(model, name)
    if made is model and isinstance(made, nn.Module):
        made = copy.deepcopy(made)
    return name, _describe_object(made, code_digest(own.__module__), name, weights, num_classes)


def import_object(name: str) -> Any:
    """Import ``package.module:attribute``; the current folder is searched, too.

    Raises:
        UserError: the import fails, or the module has no such attribute.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        claim()
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's own code
        raise UserError(
            f"cannot import {module_name!r} of {name!r}: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not hasattr(module, attribute):
        public = ", ".join(sorted(k for k in vars(module) if not k.startswith("_"))[:8])
        raise UserError(f"module {module_name!r} has no {attribute!r}; it has {public}")
    return getattr(module, attribute)


def _takes_nothing(function: Any, name: str) -> bool:
    """True if a callable takes no required arguments."""
    if not callable(function):
        raise UserError(f"{name} is {type(function).__name__}; expected a module, a function of images or a factory")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    own = not inspect.isclass(function)  # a class without its own __init__ shows its parent's *args
    return all(
        p.default is not p.empty or p.kind == p.VAR_KEYWORD or (p.kind == p.VAR_POSITIONAL and not own)
        for p in parameters
    )
