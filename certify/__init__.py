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
    from certify.bounds import clopper_pearson_lower as clopper_pearson_lower
    from certify.certificates import Prediction as Prediction
    from certify.certificates import certificate_from_votes as certificate_from_votes
    from certify.certificates import prediction_from_votes as prediction_from_votes
    from certify.classifiers import Classifier as Classifier
    from certify.classifiers import load_classifier as load_classifier
    from certify.errors import CertifyError as CertifyError
    from certify.errors import UserError as UserError
    from certify.images import load_images as load_images
    from certify.noise import Gaussian as Gaussian
    from certify.noise import make_noise as make_noise
    from certify.pipeline import Pipeline as Pipeline
    from certify.records import Run as Run
    from certify.records import read_run as read_run
    from certify.smoothing import SmoothedClassifier as SmoothedClassifier
    from certify.types import ABSTAIN as ABSTAIN
    from certify.types import BaseClassifier as BaseClassifier
    from certify.types import Certificate as Certificate
    from certify.types import Decision as Decision
    from certify.types import Votes as Votes

_HOME = {
    "ABSTAIN": "types",
    "BaseClassifier": "types",
    "Certificate": "types",
    "CertifyError": "errors",
    "Classifier": "classifiers",
    "Decision": "types",
    "Gaussian": "noise",
    "Pipeline": "pipeline",
    "Prediction": "certificates",
    "Run": "records",
    "SmoothedClassifier": "smoothing",
    "UserError": "errors",
    "Votes": "types",
    "certificate_from_votes": "certificates",
    "clopper_pearson_lower": "bounds",
    "load_classifier": "classifiers",
    "load_images": "images",
    "make_noise": "noise",
    "prediction_from_votes": "certificates",
    "read_run": "records",
}

__version__ = "0.1.0"
__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'certify' has no attribute {name!r}")
    return getattr(importlib.import_module(f"certify.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
