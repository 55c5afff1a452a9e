"""Audit a classifier that can only be queried, here a Python function that returns one label per image.

    python examples/audit_function.py

Every query counts against the budget and is logged before it is sent; the same call resumes an interrupted audit.
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

import certify

digits = load_digits()
model = KNeighborsClassifier(5).fit(digits.data[:1200] / 16, digits.target[:1200])
images = np.float32(digits.images[1200:1206] / 16)[:, None]  # (N, 1, 8, 8)


def ask(image: np.ndarray) -> str:
    """Return the label of one 8-bit image (H, W, C), as a remote service would."""
    return str(model.predict(image.reshape(1, -1) / 255)[0])


audit = certify.audit(ask, images, sigma=0.25, n0=10, n=50, budget=500, out="audit")
print(audit.table([0, 0.1, 0.2]))
