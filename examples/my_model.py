"""Your own classifier as a function of images: the nearest class mean of scikit-learn's digits.

    certify --model examples.my_model:nearest_mean --data digits --skip 20 --sigma 0.25 --n 10000

``--model module:name`` takes a function from images to labels or logits (as here), a ``torch.nn.Module``, or a function
without arguments that returns one of them. The attributes replace ``--input-size`` and ``--num-classes``.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

_DIGITS = load_digits()
_X = torch.tensor(_DIGITS.images[:1297] / 16, dtype=torch.float32).flatten(1)
_Y = torch.tensor(_DIGITS.target[:1297])
MEANS = torch.stack([_X[digit == _Y].mean(dim=0) for digit in range(10)])


def nearest_mean(images: torch.Tensor) -> torch.Tensor:
    """Return logits (B, 10) of images (B, 1, 8, 8): the negative distance to each class's mean."""
    return -torch.cdist(images.flatten(1), MEANS)


nearest_mean.num_classes = 10  # type: ignore[attr-defined]
nearest_mean.input_size = (1, 8, 8)  # type: ignore[attr-defined]
nearest_mean.class_names = [str(digit) for digit in range(10)]  # type: ignore[attr-defined]
