"""``certify.audit`` on Python functions: the certificates of the function itself, within the budget, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import certify
from certify import SmoothedClassifier, UserError, load_classifier
from certify.errors import CertifyWarning, ContractError, RunFault
from tests.command import run as command

LEVELS = (0.3, 0.45, 0.7)
IMAGES = torch.stack([torch.full((1, 6, 6), level) for level in LEVELS])


class Bright:
    """``bright`` where the mean of the 8-bit image exceeds one half; counts its calls."""

    def __init__(self, form: str = "label") -> None:
        self.calls, self.form = 0, form

    def __call__(self, image: np.ndarray) -> Any:
        self.calls += 1
        assert image.dtype == np.uint8
        assert image.shape == (6, 6, 1)
        return self.answer("bright" if image.mean() > 127.5 else "dark")

    def answer(self, label: str) -> Any:
        other = {"bright": "dark", "dark": "bright"}[label]
        return {"label": label, "list": [label, other], "scores": {other: 0.1, label: 0.9}, "number": np.int64(7)}[
            self.form
        ]


def eight_bits(images: torch.Tensor) -> torch.Tensor:
    """The same function as a base classifier: clipped, rounded, 0 for the first class in the order of the audit."""
    levels = (images.clamp(0, 1) * 255).round()
    return (levels.mean(dim=(1, 2, 3)) > 127.5).long()


OPTIONS: dict[str, Any] = {"sigma": 0.25, "budget": 1000, "n0": 10, "n": 100, "progress": False}


@pytest.mark.parametrize("form", ["label", "list", "scores"])
def test_votes_and_radii_are_those_of_the_function(form: str, tmp_path: Path) -> None:
    audit = certify.audit(Bright(form), IMAGES, out=tmp_path / "audit", **OPTIONS)
    classifier = load_classifier(eight_bits, input_size=(1, 6, 6), num_classes=2)
    g = SmoothedClassifier(classifier, sigma=0.25, precision="float32", compile="off")
    exact = g.certify(IMAGES, n0=10, n=100, image_id=["0", "1", "2"])  # type: ignore[arg-type]
    assert [row.radius for row in audit] == [c.radius for c in exact]
    assert [max(row.votes.values()) for row in audit] == [max(c.counts) for c in exact]
    assert [row.class_name for row in audit] == ["dark", "dark", "bright"]


def test_the_same_call_resumes_and_replays(tmp_path: Path) -> None:
    ask, folder = Bright(), tmp_path / "audit"
    short = certify.audit(ask, IMAGES, out=folder, **{**OPTIONS, "budget": 250})
    assert ask.calls == 250
    assert short.partial
    whole = certify.audit(ask, IMAGES, out=folder, **OPTIONS)
    assert not whole.partial
    done = ask.calls
    assert certify.audit(ask, IMAGES, out=folder, **OPTIONS).images == whole.images
    assert ask.calls == done
    assert json.loads((folder / "audit.json").read_text())["fixed_function"] is True
    assert (folder / "report.html").exists()
    command("replay", str(folder))
    with pytest.raises(UserError, match="sigma"):
        certify.audit(ask, IMAGES, out=folder, **{**OPTIONS, "sigma": 0.5})


@pytest.mark.slow
def test_decisions_and_reference_labels(tmp_path: Path) -> None:
    decided = certify.audit(
        Bright(), IMAGES, ["dark", "bright", "bright"], radius=0.2, out=tmp_path / "a", **{**OPTIONS, "n": None}
    )
    assert decided.header.kind == "decide"
    labels = [row.label == row.prediction for row in decided if not row.abstained]
    assert labels
    numbered = certify.audit(Bright("number"), IMAGES, torch.tensor([7, 7, 8]), out=tmp_path / "c", **OPTIONS)  # type: ignore[arg-type]
    assert [row.label == row.prediction for row in numbered if not row.abstained] == [True, True, False]
    with pytest.raises(UserError, match="unknown option 'max_image'"):
        certify.audit(Bright(), IMAGES, max_image=1, out=tmp_path / "d", **OPTIONS)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="2 labels for 3 images"):
        certify.audit(Bright(), IMAGES, ["dark", "bright"], out=tmp_path / "b", **OPTIONS)


def test_a_function_that_fails_or_gives_chance_is_named(tmp_path: Path) -> None:
    def broken(image: np.ndarray) -> str:
        raise ValueError("out of order")

    with pytest.raises(RunFault, match="ValueError: out of order"):
        certify.audit(broken, IMAGES, out=tmp_path / "broken", **OPTIONS)
    draws = np.random.default_rng(0)
    with pytest.raises(ContractError, match="answers differently when queried again about image 0"):
        certify.audit(lambda image: int(draws.integers(50)), IMAGES, out=tmp_path / "chance", **OPTIONS)


def test_a_function_that_changes_during_the_audit_is_named(tmp_path: Path) -> None:
    ask = Bright()

    def tired(image: np.ndarray) -> str:
        return "dark" if ask.calls > 300 else str(ask(image))

    with pytest.warns(CertifyWarning, match="other labels at its end"):
        certify.audit(tired, IMAGES, out=tmp_path / "drift", **OPTIONS)


def test_an_answer_of_another_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFault, match="the function returned NoneType; expected a label, a sequence"):
        certify.audit(lambda image: None, IMAGES[:1], out=tmp_path / "none", **OPTIONS)


def test_a_url_needs_its_protocol(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="protocol is missing"):
        certify.audit("https://example.org/predict", IMAGES, out=tmp_path / "x", **OPTIONS)
    with pytest.raises(UserError, match="unknown protocol"):
        certify.audit("https://example.org/predict", IMAGES, protocol="nothing", out=tmp_path / "x", **OPTIONS)
