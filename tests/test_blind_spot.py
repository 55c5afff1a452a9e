"""The blind-spot network: blindness, receptive field, training; the purifier follows the card."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import small_networks
import torch
from command import run
from torch import Tensor

from certify import load_classifier
from certify.errors import UserError, options_in_messages
from certify.smoothing.rng import stream_key
from denoisers.blind_spot import BlindSpot, Iterated
from denoisers.classical import GaussianSmoothing
from denoisers.defences import build_defence, trained
from denoisers.weights import Card, Trained, read_card, read_denoiser, save_denoiser
from training.data import TrainingData, load_training_data
from training.denoiser import WEIGHTS, train_denoiser
from training.loop import TrainerConfig, make_accelerator
from training.losses import Draw, make_objective
from training.recipe import Recipe

SMALL = {"layers": 3, "filters": 16}
Offsets = set[tuple[int, int]]


def random_net(layers: int, filters: int = 4, channels: int = 1) -> BlindSpot:
    net = BlindSpot(layers, filters, channels).double()
    small_networks.trained(net)
    return net


def seen_from(net: BlindSpot, row: int, column: int, side: int) -> Tensor:
    """Gradient of the output at a pixel, summed over channels, with respect to the image ``(H, W)``."""
    images = torch.rand((1, net.first.weight.shape[1], side, side), dtype=torch.float64).requires_grad_(True)
    net(images)[0, :, row, column].sum().backward()
    assert images.grad is not None
    return images.grad[0].abs().sum(0)


@pytest.mark.parametrize(
    ("side", "name"), [(32, "cifar10-ncis"), (40, "cifar10-ncis"), (96, "photos-ncis"), (224, "photos-ncis")]
)
def test_the_weights_are_those_for_the_nearest_size(side: int, name: str) -> None:
    assert trained("ncis", (3, side, side)).name == name


@pytest.mark.parametrize("layers", [3, 5])
def test_the_receptive_field_is_the_documented_square_without_the_pixel(layers: int) -> None:
    radius = 3 * layers - 3
    side = 2 * radius + 7
    centre = side // 2
    seen = seen_from(random_net(layers, 8), centre, centre, side)
    rows, columns = seen.nonzero(as_tuple=True)
    for places in (rows, columns):
        assert (int(places.min()), int(places.max())) == (centre - radius, centre + radius)
    assert seen[centre, centre] == 0
    neighbours = [(y, x) for y, x in product((-1, 0, 1), repeat=2) if (y, x) != (0, 0)]
    assert all(seen[centre + y, centre + x] > 0 for y, x in neighbours)


@pytest.mark.parametrize("side", [6, 8, 11])
def test_it_is_blind_at_every_pixel_also_at_the_border(side: int) -> None:
    net = random_net(6)
    image = torch.rand((1, 1, side, side), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(net, image).view(side**2, side**2)
    assert torch.equal(jacobian.diagonal(), torch.zeros(side**2, dtype=torch.float64))
    assert ((jacobian != 0).sum(1) > side**2 / 2).all()


def test_every_channel_of_the_pixel_is_hidden() -> None:
    assert seen_from(random_net(3, 4, channels=3), 4, 4, 9)[4, 4] == 0


def reach(layers: int) -> Offsets:
    """Offsets that some output of ``layers`` layers sees, from the published masks, by enumeration."""
    ring = {(y, x) for y, x in product((-1, 0, 1), repeat=2)} - {(0, 0)}
    knight = {(y, x) for y, x in product((-2, -1, 1, 2), repeat=2) if abs(y) != abs(x)} | {(0, 0)}
    far = {(y, x) for y, x in product((-3, 3), repeat=2)} | {(0, 0)}
    found = ring
    streams = set(ring)
    for step in [knight, *[far] * (layers - 2)]:
        found = {(a + y, b + x) for a, b in found for y, x in step}
        streams |= found
    return streams


def test_the_receptive_field_follows_from_the_published_masks() -> None:
    for layers in range(2, 18):
        assert (0, 0) not in reach(layers)
    seen = seen_from(random_net(4, 8), 11, 11, 23)
    assert {(int(y) - 11, int(x) - 11) for y, x in seen.nonzero()} == reach(4)


def test_masked_weights_have_no_effect_after_a_step() -> None:
    torch.manual_seed(0)
    net = BlindSpot(3, 4, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    with torch.no_grad():
        net.first.weight[:, :, 1, 1] = 5.0
    images = torch.rand(2, 1, 9, 9)
    for _ in range(2):
        optimizer.zero_grad()
        (net(images) - images).pow(2).mean().backward()
        optimizer.step()
    assert (net.first.weight[:, :, 1, 1] != 0).all()  # they are there, and
    assert seen_from(net.double(), 4, 4, 9)[4, 4] == 0
    output = net(images.double())
    with torch.no_grad():
        net.first.weight[:, :, 1, 1] = -7.0
    assert torch.equal(net(images.double()), output)


def test_flat_images_stay_flat() -> None:
    """Zero padding would darken the border."""
    output = random_net(6, 8, 3)(torch.full((1, 3, 12, 12), 0.7, dtype=torch.float64))
    assert torch.allclose(output, output[..., :1, :1].expand_as(output), atol=1e-12)


def test_sizes() -> None:
    net = BlindSpot()
    masked = 64 * 64 * 9  # layer 2 is kept as two 3x3 kernels, of 25 entries 9 are used either way
    layers = 64 * 3 * 9 + 64 + 17 * masked - masked + 16 * 64 + masked
    ones = 18 * (2 * (64 * 64 + 64) + 128) + (64 * 3 + 3)
    assert sum(p.numel() for p in net.parameters()) == layers + ones + (17 + 16 + 1) * 64
    with pytest.raises(UserError, match="blind-spot on images of 5x8; expected at least 6x6"):
        net(torch.rand(1, 3, 5, 8))
    with pytest.raises(ValueError, match="expected 2 layers or more"):
        BlindSpot(layers=1)


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return load_training_data("digits-train", held_out=400)


def train(data: TrainingData, out: Path, objective: str, **settings: Any) -> Any:
    recipe = Recipe(objective, sigmas=(), epochs=4, batch_size=32, rate=5e-3, settings=settings)
    how = TrainerConfig(make_accelerator("cpu"), validations=1)
    return train_denoiser("blind-spot", data, recipe, out, how, options=SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["context", "restore"])
def test_it_learns_from_images_alone(objective: str, data: TrainingData, tmp_path: Path) -> None:
    """Held-out images: error below that of the mean training image."""
    settings = {"kernel": 3, "std": 1.0} if objective == "restore" else {}
    best = train(data, tmp_path, objective, **settings).best["score"]
    mean = data.take(data.train).float().mean(0) / 255
    guess = (data.take(data.held_out).float() / 255 - mean).pow(2).mean().item()
    assert best < 0.8 * guess
    card = read_card(tmp_path / WEIGHTS)
    assert (card.purifier, card.access, card.sigmas, card.objective) == ("ncis", "none", (), objective)
    smoothing = {"kernel": 3, "std": 1.0, "iterations": 2}  # the number of passes was left at its default
    assert card.training["settings"] == (smoothing if objective == "restore" else {})
    defence = build_defence(f"ncis:iterations=3:weights={tmp_path / WEIGHTS}", load_classifier("digits"))
    images = data.take(data.held_out[:4]).float() / 255
    expected = images
    net = read_denoiser(tmp_path / WEIGHTS)
    for _ in range(3):
        expected = net(GaussianSmoothing(**smoothing).smooth(expected) if objective == "restore" else expected)
    assert torch.equal(defence.purify(images), expected.clamp(0, 1))
    assert defence.passes == 3 + 1
    assert not defence.random
    assert defence.differentiable
    record = defence.describe()["members"][0]["purifier"]
    assert record["smoothing"] == ({"name": "gs", **smoothing} if objective == "restore" else None)
    assert (record["iterations"], record["weights"]["sha256"]) == (3, card.sha256)


def test_the_inputs_of_the_network() -> None:
    clean = torch.rand((3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    draw = Draw(clean, torch.zeros(3), None, None, torch.Generator())
    plain = make_objective("context").prepare(draw)
    smoothed = make_objective("restore", {"std": 1.0, "iterations": 3}).prepare(draw)
    assert torch.equal(plain.inputs[0], clean)
    assert torch.equal(smoothed.inputs[0], GaussianSmoothing(5, 1.0, 3).smooth(clean))
    assert torch.equal(plain.target, clean)
    assert torch.equal(smoothed.target, clean)


def test_gradients_pass_through_the_iterations() -> None:
    """Against a difference quotient, in 64 bits, away from the clipping."""
    net = Trained(BlindSpot(3, 4, 1).double(), Card("blind-spot", {}, (1, 8, 8), (), False, "context", "none"), "n")
    purifier = Iterated(net, 2, GaussianSmoothing())
    image = torch.rand((1, 1, 8, 8), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(purifier, image)


def test_from_the_command_to_a_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--option layers=3 --option filters=4 --epochs 0.3 --validations 1 --data digits-train --quiet --json"
    run("train", "--denoiser", "blind-spot", "--objective", "context", *options.split(), "--out", str(tmp_path / "c"))
    assert json.loads(capsys.readouterr().out)["held_out"]["score"] > 0
    weights = tmp_path / "c" / "denoiser.safetensors"
    digits = load_classifier("digits")
    defence = build_defence(f"ncis:weights={weights}", digits)
    images = torch.rand((5, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    labels = defence(images, [stream_key(0, str(i), "test") for i in range(5)])
    assert labels.tolist() == digits(read_denoiser(weights)(images).clamp(0, 1)).tolist()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ncis:iterations=0:weights={}", "ncis:iterations=0; expected a whole number from 1"),
        ("ncis:iterations=1.5:weights={}", "ncis:iterations=1.5; expected a whole number from 1"),
        ("ncis:passes=2", "has no option 'passes'; its options: iterations=1, weights=null"),
        ("ncis:weights={}", "holds no weights for ncis"),
    ],
)
def test_mistakes(text: str, words: str, tmp_path: Path) -> None:
    card = Card("blind-spot", SMALL, (1, 8, 8), (0.25,), False, "mse", "none")  # of a denoiser for smoothing
    save_denoiser(tmp_path / "n.safetensors", BlindSpot(3, 16, 1), card)
    with pytest.raises(UserError, match=words):
        build_defence(text.format(tmp_path / "n.safetensors"), load_classifier("digits"))


def test_another_network_is_refused(data: TrainingData, tmp_path: Path) -> None:
    with (
        options_in_messages(),
        pytest.raises(UserError, match=r"needs a blind-spot network \(--denoiser blind-spot\), not DnCNN"),
    ):
        train_denoiser("dncnn", data, Recipe("context"), tmp_path, TrainerConfig(make_accelerator("cpu")))
