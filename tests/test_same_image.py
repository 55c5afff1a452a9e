"""Equal images get the same noise, digest and answer, whatever bits, type or memory is behind them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import rows_without_seconds, run

from certify import SmoothedClassifier, UserError
from certify.models.classifier import Classifier
from certify.smoothing.noise import NOISES

GREY = torch.arange(64, dtype=torch.float32).view(1, 8, 8) / 255
DARK = GREY.clone()
DARK[:, 2:5] = 0.0  # 24 pixels with two zeros each


def negative(which: int) -> torch.Tensor:
    """The dark image with some of its zeros negative: equal to it under ``==``."""
    found = DARK.clone()
    found[:, 2 : 2 + which] = -0.0
    assert torch.equal(found, DARK)
    assert found.numpy().tobytes() != DARK.numpy().tobytes()
    return found


ANSWERS: dict[str, Callable[[SmoothedClassifier, Any], Any]] = {
    "certify": lambda g, x: g.certify(x, n0=20, n=300),
    "certify, randomized": lambda g, x: g.certify(x, n0=20, n=300, bound="randomized"),
    "certify to a tolerance": lambda g, x: g.certify(x, n0=20, n=300, tolerance=0.1),
    "decide": lambda g, x: g.decide(x, radius=0.01, n=300),
    "predict": lambda g, x: g.predict(x, n=300),
    "base label": lambda g, x: g.base_label(x),
    "votes": lambda g, x: g.votes(x, 300, stage="any"),
}


@pytest.mark.parametrize("noise", list(NOISES))
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_zeros_of_either_sign_are_one_image(
    noise: str, answer: Callable[[SmoothedClassifier, Any], Any], digits: Classifier
) -> None:
    g = SmoothedClassifier(digits, 0.25, noise=noise)
    expected = answer(g, DARK)
    just_below = torch.where(DARK == 0, -1e-9, DARK)  # which is clamped
    for other in (negative(1), negative(3), negative(3).numpy(), negative(2).double(), just_below):
        assert answer(g, other) == expected


@pytest.mark.parametrize("noise", list(NOISES))
def test_memory_and_type_make_no_difference(noise: str, digits: Classifier) -> None:
    g = SmoothedClassifier(digits, 0.25, noise=noise)
    expected = g.certify(DARK, n0=20, n=300)
    strided = torch.empty(1, 8, 16)[..., ::2].copy_(DARK)
    for other in (
        strided,
        DARK.double(),
        DARK.numpy(),
        (DARK * 255).round().to(torch.uint8),
        np.asfortranarray(DARK.numpy()),
    ):
        assert g.certify(other, n0=20, n=300) == expected


@pytest.mark.slow
def test_digests_of_a_run_agree(tmp_path: Path) -> None:
    """One npz with two images that are equal: same digest in the run file, by 32 digits."""
    digest = hashlib.sha256(b"(1, 8, 8)" + DARK.numpy().tobytes()).hexdigest()[:32]
    both = np.stack([DARK.numpy(), negative(3).numpy()])
    np.savez(tmp_path / "two.npz", x=both, y=[0, 0])
    for noise in ("gaussian", "exact"):
        out = tmp_path / f"{noise}.jsonl"
        run("--model", "digits", "--sigma", "0.25", "--data", str(tmp_path / "two.npz"), "--n0", "10", "--n", "50",
            "--noise", noise, "--out", str(out), "--quiet")  # fmt: skip
        first, second = rows_without_seconds(out)
        assert first["image"] == second["image"] == digest
        assert first["base"] == second["base"]


def test_a_radius_of_negative_zero_is_zero(digits: Classifier) -> None:
    decision = SmoothedClassifier(digits, sigma=0.25).decide(DARK, radius=-0.0, n=100)
    assert str(decision.radii) == "(0.0,)"


@pytest.mark.parametrize("image_id", [5, b"5", 5.0, Path("a.png")])
@pytest.mark.parametrize("ask", ["certify", "decide", "predict"])
def test_an_id_that_is_no_text_is_refused(ask: str, image_id: Any, digits: Classifier) -> None:
    g = SmoothedClassifier(digits, sigma=0.25)
    with pytest.raises(UserError, match=f"image_id = .*: expected text, such as {re.escape(repr(str(image_id)))}$"):
        getattr(g, ask)(DARK, n=100, image_id=image_id, **({"radius": 0.1} if ask == "decide" else {}))


def test_noise_of_images_without_negative_zeros_is_what_it_was(digits: Classifier) -> None:
    """Counts and noise name as they were before zeros lost their sign."""
    counts = {
        "gaussian": (71, 54, 142, 35, 64, 20, 48, 37, 18, 11),
        "exact": (70, 61, 151, 21, 55, 25, 45, 40, 19, 13),
        "uniform": (69, 57, 149, 35, 51, 24, 58, 34, 17, 6),
    }
    for noise, expected in counts.items():
        assert SmoothedClassifier(digits, 0.25, noise=noise).certify(GREY, n0=50, n=500).counts == expected
