"""The embedded default: a small classifier of 8x8 handwritten digits, its weights in the package.

Trained without noise by ``python -m training.digits`` (the card in the safetensors file says how), so it stands for any
classifier that nobody made robust.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from certify.models.checkpoints import load_weights
from certify.models.classifier import ClassifierSpec, square_input

SHIPPED = Path(__file__).parent / "data" / "digits.safetensors"
TRAIN_IMAGES = 1297
"""scikit-learn's first 1,297 digits train the classifier; the last 500, by other writers, are for certification."""


def digits_net() -> nn.Sequential:
    """A perceptron from 1x8x8 to 10 logits, with two hidden layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def build(name: str, weights: str | Path | None) -> ClassifierSpec:
    """The digits classifier with its shipped weights, or those given."""
    net = digits_net()
    loaded = load_weights(net, weights or SHIPPED, name)
    names = tuple((str(d),) for d in range(10))
    return ClassifierSpec(net, square_input((1, 8, 8)), names, 10, loaded, closed=True)
