"""``certify serve --samples 1``: fresh secret noise for every image, and what happens to an attacker without it."""

from __future__ import annotations

import io
import json
import logging
import math
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from scipy.stats import norm

import certify
from certify import Gaussian
from certify.serve import batching
from tests.serving import INFER, outputs, request, serving

SIDE, SIGMA, RADIUS = 8, 0.25, 0.1


class HalfSpace:
    """Class 1 where the mean exceeds one half: the distance to the boundary is |mean - 1/2| * SIDE."""

    num_classes = 2
    class_names = (("dark",), ("bright",))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images.mean(dim=(1, 2, 3)) > 0.5).long()

    def describe(self) -> dict[str, Any]:
        return {"name": "half-space"}


def image_at(margin: float, shift: np.ndarray | None = None) -> np.ndarray:
    """Return an image of class 1 at this distance from the boundary, perhaps moved without changing that distance."""
    image = np.full((1, 1, SIDE, SIDE), 0.5 + margin / SIDE)
    return (image if shift is None else image + shift - shift.mean()).astype(np.float32)


@pytest.fixture
def client() -> Iterator[TestClient]:
    with serving(HalfSpace(), one_copy=True) as (client, *_):
        yield client


def label_of(client: TestClient, image: np.ndarray) -> int:
    (label,) = outputs(client.post(INFER, json=request(image)))["label"]
    return int(label)


def attacked_accuracy(client: TestClient, images: int, tries: int) -> float:
    """Play an attacker who tries images within RADIUS until one is misclassified, then submits that one.

    The attack goes towards the boundary by most of the radius; the rest tries other images, if need be.
    """
    generator, right = np.random.default_rng(3), 0
    along = 0.99 * RADIUS
    for _ in range(images):
        for _ in range(tries):
            shift = generator.standard_normal((1, 1, SIDE, SIDE))
            shift -= shift.mean()
            shift *= math.sqrt(RADIUS**2 - along**2) / np.linalg.norm(shift)
            attempt = image_at(0.3 - along, shift)
            assert np.linalg.norm(attempt - image_at(0.3)) <= RADIUS + 1e-6
            if label_of(client, attempt) != 1:
                break
        right += label_of(client, attempt) == 1
    return right / images


def test_an_attacker_who_asks_again_gains_nothing_unless_the_draw_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clean accuracy is Phi(0.3 / sigma) = 0.885, so the guarantee at RADIUS is 0.788. A server whose noise is
    keyed by the image, here because its fresh keys are all the same, is at the attacker's mercy.
    """
    p = float(norm.cdf(0.3 / SIGMA))
    guaranteed, images = Gaussian(SIGMA).worst_case(p, RADIUS), 100
    spread = 4 * math.sqrt(guaranteed * (1 - guaranteed) / images)
    with serving(HalfSpace(), one_copy=True) as (client, *_):
        assert attacked_accuracy(client, images, 25) >= guaranteed - spread
    monkeypatch.setattr(secrets, "randbits", lambda bits: 1)
    with serving(HalfSpace(), one_copy=True) as (client, *_):
        assert attacked_accuracy(client, 20, 25) == 0.0


def test_every_image_gets_fresh_noise_of_the_stated_distribution(client: TestClient) -> None:
    """The same image, in many requests and many times in one, is right as often as the noise says."""
    image, p = image_at(0.1), float(norm.cdf(0.1 / SIGMA))
    alone = [label_of(client, image) for _ in range(100)]
    together = outputs(client.post(INFER, json=request(np.repeat(image, 20, axis=0))))["label"]
    assert {*alone} == {*together} == {0, 1}
    many = [*alone]
    for _ in range(20):
        many += outputs(client.post(INFER, json=request(np.repeat(image, 20, axis=0))))["label"]
    assert abs(np.mean(many) - p) < 4 * math.sqrt(p * (1 - p) / len(many))


def test_keys_come_from_the_system_and_stay_in_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drawn: list[int] = []

    def randbits(bits: int) -> int:
        assert bits == 128
        drawn.append(real(bits))
        return drawn[-1]

    real = secrets.randbits
    monkeypatch.setattr(batching.secrets, "randbits", randbits)
    caplog.set_level(logging.DEBUG)
    with serving(HalfSpace(), one_copy=True) as (client, *_):
        started = len(drawn)
        replies = [client.post(INFER, json=request(np.repeat(image_at(0.1), 3, axis=0))) for _ in range(4)]
    assert len(drawn) - started == 12
    assert len({*drawn}) == len(drawn)
    said = "".join(reply.text + str(reply.headers) for reply in replies) + caplog.text
    assert not any(text in said for key in drawn for text in (str(key), f"{key:x}"))


def test_answers_and_metadata_carry_the_statement_and_no_certificate(client: TestClient) -> None:
    reply = client.post(INFER, json=request(image_at(0.5)))
    assert outputs(reply) == {
        "label": [1],
        "name": ["bright"],
        "radius": [0.0],
        "p_lower": [0.0],
        "outcome": ["one noisy copy"],
        "samples": [1],
        "failures": [0],
        "leading": [1],
    }
    for parameters in (reply.json()["parameters"], client.get("/v2/models/digits").json()["parameters"]):
        assert "Nothing is guaranteed for a single answer" in parameters["statement"]
        assert not {"alpha", "alpha_all", "radius", "p_lower"} & parameters.keys()
    assert "certify_samples_total 1.0" in client.get("/metrics").text


@pytest.mark.parametrize("parameters", [{"seed": 1}, {"radius": 0.1}, {"samples": 10}])
def test_options_of_certificates_are_refused(client: TestClient, parameters: dict[str, Any]) -> None:
    reply = client.post(INFER, json=request(image_at(0.5), parameters=parameters))
    assert reply.status_code == 400
    assert "do not apply to a server that answers from one fresh noisy copy" in reply.json()["error"]


def test_a_failed_sample_gives_no_label() -> None:
    class Failing(HalfSpace):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full((len(images),), -1)

    with serving(Failing(), one_copy=True) as (client, *_):
        answer = outputs(client.post(INFER, json=request(image_at(0.5))))
    assert (answer["label"], answer["name"], answer["outcome"], answer["failures"]) == (
        [-1], ["abstained"], ["abstained"], [1],
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_page_promises_nothing_about_a_single_answer() -> None:
    with serving(certify.load_classifier("digits"), one_copy=True) as (client, *_):
        picture = io.BytesIO()
        Image.fromarray(np.full((8, 8), 200, dtype=np.uint8)).save(picture, "PNG")
        headers = {"content-type": "image/png"}
        paths = ("classify?", "classify?radius=0.1", "classify?radius=9")
        replies = {path: client.post(f"/{path}", content=picture.getvalue(), headers=headers).json() for path in paths}
        given = json.dumps({"html": client.get("/").text, "replies": replies})
    child = Path(__file__).parent / "page_child.js"
    printed = subprocess.run(["node", str(child)], input=given, capture_output=True, text=True, check=True).stdout
    answered, refused, _ = json.loads(printed)["found"]
    assert answered["verdict"] == replies["classify?"]["name"]
    assert answered["claim"] == "The label of one noisy copy; nothing is guaranteed for this answer."
    assert "Nothing is guaranteed for a single answer" in answered["about"]
    assert not answered["allowed"]
    assert "do not apply" in refused["state"]
