"""A service to audit: scikit-learn's digits behind LitServe, a model server by Lightning AI, on this machine only.

    python examples/litserve_digits.py 8123          # stop with Ctrl-C
    curl -s http://127.0.0.1:8123/predict -H 'Content-Type: application/json' -d '{"image": "<PNG in base64>"}'

It returns words and scores, best first: {"labels": ["three", "eight", ...], "scores": [0.97, 0.02, ...]}.
"""

from __future__ import annotations

import base64
import io
import sys
from typing import Any

import litserve
import numpy as np
import torch
from PIL import Image

from certify import load_classifier

WORDS = "zero one two three four five six seven eight nine".split()


class Digits(litserve.LitAPI):
    """API from an 8x8 picture to ten words and their scores."""

    def setup(self, device: str) -> None:
        """Load the classifier in the worker."""
        self.classifier = load_classifier("digits")

    def decode_request(self, request: dict[str, str]) -> torch.Tensor:
        """Return the PNG's pixels in [0, 1], ``(1, 1, 8, 8)``."""
        picture = Image.open(io.BytesIO(base64.b64decode(request["image"])))
        return torch.from_numpy(np.asarray(picture.convert("L"), dtype=np.float32) / 255)[None, None]

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Return the probabilities of the ten classes."""
        with torch.no_grad():
            return self.classifier.logits(x).softmax(1)[0]

    def encode_response(self, output: torch.Tensor) -> dict[str, Any]:
        """Return the words, best first, and their scores."""
        order = output.argsort(descending=True).tolist()
        return {"labels": [WORDS[c] for c in order], "scores": [float(output[c]) for c in order]}


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8123
    litserve.LitServer(Digits(), accelerator="cpu").run(host="127.0.0.1", port=port, generate_client_file=False)
