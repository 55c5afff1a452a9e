"""Certified robustness for frozen image classifiers by (denoised) randomized smoothing.

    from certify import SmoothedClassifier, load_classifier

    g = SmoothedClassifier(load_classifier("digits"), sigma=0.25)
    c = g.certify(image, n0=100, n=100_000, alpha=0.001, seed=0)
    c.prediction, c.radius

Importing this package imports nothing heavy; each public name loads its module on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from certify.errors import CertifyError as CertifyError
    from certify.errors import UserError as UserError
    from certify.images.dataset import load_images as load_images
    from certify.models.classifier import Classifier as Classifier
    from certify.models.classifier import load_classifier as load_classifier
    from certify.models.pipeline import Pipeline as Pipeline
    from certify.runs.run_file import Run as Run
    from certify.runs.run_file import read_run as read_run
    from certify.smoothed_classifier import SmoothedClassifier as SmoothedClassifier
    from certify.smoothing.bounds import clopper_pearson_lower as clopper_pearson_lower
    from certify.smoothing.certificates import certificate_from_votes as certificate_from_votes
    from certify.smoothing.certificates import prediction_from_votes as prediction_from_votes
    from certify.smoothing.noise import Gaussian as Gaussian
    from certify.smoothing.noise import make_noise as make_noise
    from certify.types import ABSTAIN as ABSTAIN
    from certify.types import BaseClassifier as BaseClassifier
    from certify.types import Certificate as Certificate
    from certify.types import Decision as Decision
    from certify.types import Prediction as Prediction
    from certify.types import Votes as Votes

_HOME = {
    "ABSTAIN": "types",
    "BaseClassifier": "types",
    "Certificate": "types",
    "CertifyError": "errors",
    "Classifier": "models.classifier",
    "Decision": "types",
    "Gaussian": "smoothing.noise",
    "Pipeline": "models.pipeline",
    "Prediction": "types",
    "Run": "runs.run_file",
    "SmoothedClassifier": "smoothed_classifier",
    "UserError": "errors",
    "Votes": "types",
    "certificate_from_votes": "smoothing.certificates",
    "clopper_pearson_lower": "smoothing.bounds",
    "load_classifier": "models.classifier",
    "load_images": "images.dataset",
    "make_noise": "smoothing.noise",
    "prediction_from_votes": "smoothing.certificates",
    "read_run": "runs.run_file",
}

__version__ = "0.1.0"
__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'certify' has no attribute {name!r}")
    return getattr(importlib.import_module(f"certify.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
