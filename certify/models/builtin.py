"""Builder of the classifiers whose architecture is in this package."""

from __future__ import annotations

from pathlib import Path

from certify.errors import UserError
from certify.models.classifier import ClassifierSpec
from certify.models.resolve import BUILT_IN


def build(name: str, weights: str | Path | None, num_classes: int | None) -> ClassifierSpec:
    """The built-in classifier ``name``, with the weights it ships or those given."""
    if num_classes not in (None, 10):
        raise UserError(f"model {name!r} has 10 classes, not {num_classes}; drop --num-classes")
    spec: ClassifierSpec = BUILT_IN.get(name)(name, weights)
    return spec
