"""Shared pieces: the real data beside the checkout (tests skip without it), a classifier whose true radius is known."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis import figures
from certify import load_classifier
from certify.engine import monte_carlo
from certify.models.classifier import Classifier

# Choices of other runs must not decide here.
_CACHE = os.environ["CERTIFY_CACHE"] = tempfile.mkdtemp(prefix="certify-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

# Tests run in parallel; more threads would only compete.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of child processes

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"

_DPI = figures.DPI


def pytest_xdist_auto_num_workers() -> int:
    """Workers of ``-n auto``: one per core this process may use, but no more than 8, as each imports torch."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.fixture(scope="session", autouse=True)
def _cheap_extras() -> Iterator[None]:
    """Runs in this process measure their speed, which they only display, on one batch, and draw coarse pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monte_carlo, "measure_rate", functools.partial(monte_carlo.measure_rate, seconds=0.0))
        patch.setattr(figures, "DPI", 50)
        yield


@pytest.fixture
def users_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures have the size that users get."""
    monkeypatch.setattr(figures, "DPI", _DPI)


@pytest.fixture(scope="module", autouse=True)
def _frozen_imports() -> None:
    """Garbage collections, of which accelerate forces many, pass over the imported libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def digits() -> Classifier:
    return load_classifier("digits")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Child processes obey SIGINT, also where this one was told to ignore it, as by nohup: that is inherited."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Linear:
    """sign(w . x - b): two classes, a half-space; the true radius at x is |w . x - b| / ||w||."""

    num_classes = 2

    def __init__(self, weight: torch.Tensor, offset: float) -> None:
        self.weight, self.offset = weight.double(), float(offset)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1).double() @ self.weight > self.offset).long()

    def describe(self) -> dict[str, Any]:
        return {"name": "linear"}

    def radius(self, image: torch.Tensor) -> float:
        margin = float(image.flatten().double() @ self.weight - self.offset)
        return abs(margin) / float(self.weight.norm())


@pytest.fixture
def linear_classifier() -> type[Linear]:
    return Linear
