"""A runtime of MLServer, run in its own environment: the digits network in NumPy, weights from an .npz file."""

from __future__ import annotations

import numpy as np
from mlserver import MLModel  # type: ignore[import-not-found]
from mlserver.codecs import NumpyCodec  # type: ignore[import-not-found]
from mlserver.types import InferenceRequest, InferenceResponse  # type: ignore[import-not-found]


class Digits(MLModel):  # type: ignore[misc]
    """Scores, or the label alone where the settings say so."""

    async def load(self) -> bool:
        found = np.load(self.settings.parameters.uri)
        self.layers = [(found[f"w{n}"], found[f"b{n}"]) for n in range(3)]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        value = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32).reshape(-1, 64)
        for n, (weight, bias) in enumerate(self.layers):
            value = value @ weight.T + bias
            value = value if n == 2 else np.maximum(value, 0)
        if self.settings.parameters.extra["answer"] == "label":
            name, value = "label", value.argmax(1)[:, None]
        else:
            name, value = "scores", np.exp(value - value.max(1, keepdims=True))
            value /= value.sum(1, keepdims=True)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output(name, value)])
