"""A model of KServe, run in its own environment: the digits network in NumPy, ``python kserve_digits.py NPZ PORT``."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from kserve import Model, ModelServer  # type: ignore[import-not-found]
from kserve.utils.utils import get_predict_response  # type: ignore[import-not-found]


class Digits(Model):  # type: ignore[misc]
    """Scores, by protocol v1 (instances, channels last) or v2 (tensors, channels first)."""

    def __init__(self, weights: str) -> None:
        super().__init__("digits")
        found = np.load(weights)
        self.layers = [(found[f"w{n}"], found[f"b{n}"]) for n in range(3)]
        self.ready = True

    def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
        if isinstance(payload, dict):
            value = np.array(payload["instances"], np.float32).transpose(0, 3, 1, 2)
        else:
            value = payload.inputs[0].as_numpy()
        value = value.reshape(-1, 64)
        for n, (weight, bias) in enumerate(self.layers):
            value = value @ weight.T + bias
            value = value if n == 2 else np.maximum(value, 0)
        return get_predict_response(payload, np.exp(value) / np.exp(value).sum(1, keepdims=True), self.name)


if __name__ == "__main__":
    ModelServer(http_port=int(sys.argv[2]), enable_grpc=False, workers=1).start([Digits(sys.argv[1])])
