"""Certified robustness for frozen image classifiers by (denoised) randomized smoothing.

    import certify

    run = certify.certify(model, images, labels, sigma=0.25, n=10_000)  # a module, tensors
    run.table([0, 0.25, 0.5])
    g = certify.SmoothedClassifier(model, sigma=0.25)
    g.certify(image).radius

Importing this package imports nothing heavy; each public name loads its module on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.accuracy_bound import AccuracyBound as AccuracyBound
    from analysis.comparison.results import Comparison as Comparison
    from analysis.runs import read_comparison as read_comparison
    from certify.api import accuracy as accuracy
    from certify.api import certify as certify
    from certify.api import predict as predict
    from certify.auditing import audit as audit
    from certify.comparing import compare as compare
    from certify.comparing import evaluate_denoiser as evaluate_denoiser
    from certify.errors import CertifyError as CertifyError
    from certify.errors import UserError as UserError
    from certify.images.dataset import load_images as load_images
    from certify.models.classifier import Classifier as Classifier
    from certify.models.load import load_classifier as load_classifier
    from certify.models.pipeline import Pipeline as Pipeline
    from certify.results import Run as Run
    from certify.results import read_run as read_run
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
    from training.api import train_denoiser as train_denoiser

_HOME = {
    "ABSTAIN": "types",
    "AccuracyBound": "analysis.accuracy_bound",
    "BaseClassifier": "types",
    "Certificate": "types",
    "CertifyError": "errors",
    "Classifier": "models.classifier",
    "Comparison": "analysis.comparison.results",
    "Decision": "types",
    "Gaussian": "smoothing.noise",
    "Pipeline": "models.pipeline",
    "Prediction": "types",
    "Run": "results",
    "SmoothedClassifier": "smoothed_classifier",
    "UserError": "errors",
    "Votes": "types",
    "accuracy": "api",
    "audit": "auditing",
    "certificate_from_votes": "smoothing.certificates",
    "certify": "api",
    "clopper_pearson_lower": "smoothing.bounds",
    "compare": "comparing",
    "evaluate_denoiser": "comparing",
    "load_classifier": "models.load",
    "load_images": "images.dataset",
    "make_noise": "smoothing.noise",
    "predict": "api",
    "prediction_from_votes": "smoothing.certificates",
    "read_comparison": "analysis.runs",
    "read_run": "results",
    "train_denoiser": "training.api",
}

_SIBLINGS = ("analysis.", "training.")

__version__ = "0.1.0"
__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'certify' has no attribute {name!r}")
    home = _HOME[name]
    return getattr(importlib.import_module(home if home.startswith(_SIBLINGS) else f"certify.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
