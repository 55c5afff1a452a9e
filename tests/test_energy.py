"""Score networks and score purification: closed forms of Gaussian models, the loop, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import small_networks
import torch
from torch import Tensor, nn

from certify import load_classifier
from certify.errors import UserError, options_in_messages
from certify.models.checkpoints import read_state_dict
from certify.models.defence import Defence
from certify.smoothing.rng import block_generator, stream_key
from denoisers import ARCHITECTURES
from denoisers.defences import build_defence
from denoisers.energy import EnergyNet, ScoreNet
from denoisers.purification import ScorePurifier, calibrate, score_norm
from denoisers.weights import read_denoiser
from training.data import TrainingData, load_training_data
from training.denoiser import WEIGHTS, train_denoiser
from training.loop import TrainerConfig, TrainingResult, make_accelerator
from training.losses import Batch
from training.optimizers import averaged, make_average
from training.purifiers import dsm
from training.recipe import Recipe

TINY: dict[str, Any] = {"channels": [8, 16], "blocks": 1}
NETS = ["score", "energy"]


class Model(nn.Module):
    """A score that is written down."""

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.score = score


def quadratic(middle: float, spread: float) -> Model:
    """h of the energy ||x - m||^2 / 2s."""
    return Model(lambda x: -(x - middle) / spread)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generators(count: int, draw: int = 0) -> list[torch.Generator]:
    return [block_generator(stream_key(0, str(i), "test"), draw) for i in range(count)]


def tiny(name: str, channels: int = 1, seed: int = 0) -> Any:
    """A network as if it had been trained."""
    return small_networks.trained(ARCHITECTURES.get(name)(image_channels=channels, **TINY), seed).eval()


def run(name: str, data: TrainingData, out: Path, recipe: Recipe, **conduct: Any) -> TrainingResult:
    return train_denoiser(name, data, recipe, out, TrainerConfig(make_accelerator("cpu"), **conduct), options=TINY)


@pytest.fixture(scope="module")
def data() -> TrainingData:
    return load_training_data("digits-train", load_classifier("digits"), held_out=200)


@pytest.fixture(scope="module")
def weights(data: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both networks, trained for a few seconds on digits."""
    recipe = Recipe("dsm", (0.03, 1.0), True, epochs=4, batch_size=32, rate=1e-2, weight_decay=0.0, ema=0.99)
    found = {}
    for name in NETS:
        folder = tmp_path_factory.mktemp(name)
        outcome = run(name, data, folder, recipe, validations=1)
        # untrained, h = 0 and the loss is half the expected square of 64 normal numbers
        assert outcome.best["score"] < 0.8 * 32
        found[name] = folder / WEIGHTS
    return found


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.3])
def test_a_quadratic_energy_gives_lambda_times_its_variance(spread: float) -> None:
    purifier = ScorePurifier(quadratic(0.4, spread), step=0.05)
    x = images(5, 3, 4, 4)
    length = purifier.length(x, -(x - 0.4) / spread)
    assert torch.allclose(length, torch.full((5,), 0.05 * spread, dtype=torch.float64), rtol=1e-9)
    wide = ScorePurifier(quadratic(0.4, spread), step=0.05, largest=0.01, smallest=0.008)
    assert torch.equal(
        wide.length(x, -(x - 0.4) / spread), torch.full((5,), min(0.01, max(0.008, 0.05 * spread)), dtype=torch.float64)
    )


def test_the_published_formula_step_by_step() -> None:
    """Against the rule as it is printed, with z, on a score that is no gradient of anything simple."""
    field = Model(lambda x: torch.sin(3 * x) - x.flip(3) * x)
    x = images(6, 1, 3, 3)
    path = ScorePurifier(field, steps=4, noise=0.0).trace(x)
    assert len(path) == 5
    for before, after in pairwise(path):
        for i in range(6):
            at = before[i : i + 1]
            g = field.score(at)
            z = (g * field.score(at + 1e-3 * g)).sum() / (g * g).sum()
            alpha = (0.05 * 1e-3 / (1 - z)).clamp(1e-5, 1e-1)
            expected = (at + alpha * g).clamp(0, 1) if alpha > 1e-3 else at
            assert torch.allclose(after[i : i + 1], expected, atol=1e-9)


def test_zero_curvature_takes_the_largest_step_and_upward_curvature_stops() -> None:
    x = images(2, 1, 4, 4)
    level = ScorePurifier(Model(torch.ones_like), noise=0.0, steps=1)
    assert torch.allclose(level(x), (x + 0.1).clamp(0, 1))
    upward = ScorePurifier(Model(lambda x: x - 0.5), noise=0.0)
    assert len(upward.trace(x)) == 1
    assert torch.equal(upward(x), x)
    nothing = ScorePurifier(Model(torch.zeros_like), noise=0.0)
    assert torch.equal(nothing(x), x)


def test_a_stopped_image_stays_unchanged() -> None:
    """Image 1 meets a sharp curvature in its second step only; image 0 never."""
    calls = []

    def score(x: Tensor) -> Tensor:
        calls.append(1)
        second = (len(calls) - 1) // 2 == 1  # two calls a step
        spread = torch.tensor([0.4, 0.001 if second else 0.4], dtype=x.dtype)
        return -(x - 0.5) / spread[:, None, None, None]

    path = ScorePurifier(Model(score), noise=0.0, steps=6).trace(images(2, 1, 4, 4))
    moved = [[not torch.equal(a[i], b[i]) for a, b in pairwise(path)] for i in range(2)]
    assert moved == [[True] * 6, [True] + [False] * 5]
    assert len(calls) == 12


@pytest.mark.parametrize("kind", ["gaussian", "sign"])
def test_without_noise_it_is_deterministic_and_the_output_is_in_range(kind: str) -> None:
    net = tiny("score", 3)
    x = images(4, 3, 9, 7).float()
    still, moving = (ScorePurifier(net, 3, noise=noise, kind=kind).eval() for noise in (0.0, 0.5))
    with torch.no_grad():
        assert torch.equal(still(x), still(x))
        for at in [*still.trace(x), *moving.trace(x, generator=generators(4))]:
            assert at.shape == x.shape
            assert 0 <= at.min() <= at.max() <= 1
        assert not torch.equal(moving(x, generator=generators(4)), moving(x, generator=generators(4, draw=1)))
    assert (still.random, moving.random, moving.passes) == (False, True, 6)
    with pytest.raises(ValueError, match="draws random numbers"):
        moving(x)


def test_both_kinds_of_noise_have_the_same_mean_absolute_value() -> None:
    x = torch.full((1, 3, 64, 64), 0.5)
    gaussian, sign = (
        (ScorePurifier(quadratic(0, 1), noise=0.1, kind=kind).start(x, generators(1)) - x).abs()
        for kind in ("gaussian", "sign")
    )
    assert sign.min().item() == pytest.approx(sign.max().item(), abs=1e-6)
    # |e| has variance sigma^2 (1 - 2 / pi); five standard errors of the mean of 12,288 numbers
    assert gaussian.mean().item() == pytest.approx(sign.mean().item(), abs=5 * 0.1 * 0.603 / math.sqrt(12288))


def test_score_ascent_from_a_gaussian_model_removes_noise_as_computed_by_hand() -> None:
    """Every step shrinks the distance to the mean by 1 - lambda, so T = 10 leave 0.95^10 of the noise."""
    clean = 0.5 + 0.02 * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noisy = clean + 0.1 * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = ScorePurifier(quadratic(0.5, 0.3), noise=0.0)(noisy)
    assert torch.allclose(found, 0.5 + 0.95**10 * (noisy - 0.5), atol=1e-6)
    assert (found - clean).pow(2).mean() < 0.5 * (noisy - clean).pow(2).mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_a_trained_network_removes_noise(name: str, weights: dict[str, Path], data: TrainingData) -> None:
    net = read_denoiser(weights[name]).net
    clean = data.take(data.held_out).float() / 255
    noisy = clean + 0.25 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    purifier = ScorePurifier(net, noise=0.0)
    with torch.no_grad():
        clipped = (noisy.clamp(0, 1) - clean).pow(2).mean()  # clipping alone removes some of it
        assert (purifier(noisy) - clean).pow(2).mean() < 0.9 * clipped
        assert (net(noisy, 0.25) - clean).pow(2).mean() < 0.75 * 0.25**2


@pytest.mark.parametrize("sigma", [0.05, 0.5])
def test_the_loss_of_a_gaussians_own_score_is_its_minimum(sigma: float) -> None:
    """Data N(m, s^2): h = -sigma (x - m) / (s^2 + sigma^2), and the least loss is d/2 s^2 / (s^2 + sigma^2)."""
    count, d, middle, spread = 4000, 3 * 4 * 4, 0.3, 0.2
    source = torch.Generator().manual_seed(0)
    clean = middle + spread * torch.randn(count, 3, 4, 4, generator=source, dtype=torch.float64)
    noisy = clean + sigma * torch.randn(count, 3, 4, 4, generator=source, dtype=torch.float64)
    total = spread**2 + sigma**2
    exact = -sigma * (noisy - middle) / total

    def loss(h: Tensor) -> float:
        level = torch.full((count,), sigma, dtype=torch.float64)
        return float(dsm(Batch(clean, level, None, None, torch.Generator(), output=noisy + sigma * h)))

    least = 0.5 * d * spread**2 / total
    # an image's loss is s^2 / (s^2 + sigma^2) / 2 times a chi-square number of d degrees of freedom
    error = 0.5 * spread**2 / total * math.sqrt(2 * d / count)
    assert loss(exact) == pytest.approx(least, abs=5 * error)
    # h + z is uncorrelated with any function of the noisy image, so 1.5 h costs 0.5^2 / 2 E ||h||^2 more; what varies
    # is 0.5 <h, h + z>, products of independent normal numbers, and a little ||h||^2
    error = 0.5 * math.sqrt(d / count) * sigma * spread / total + 0.125 * sigma**2 / total * math.sqrt(2 * d / count)
    assert loss(1.5 * exact) - loss(exact) == pytest.approx(0.125 * d * sigma**2 / total, abs=5 * error)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 32, 32), (2, 1, 9, 7)])
def test_the_denoiser_contract(name: str, shape: tuple[int, ...]) -> None:
    """Shape, independence of images, one level or one an image, and x + sigma h(x)."""
    net = tiny(name, shape[1])
    x = images(*shape).float()
    with torch.inference_mode():
        inside = net(x.clone(), 0.25)
    with torch.no_grad():
        h = net.score(x)
        assert h.shape == x.shape
        assert torch.allclose(inside, x + 0.25 * h, atol=1e-5)
        assert torch.equal(net(x), x)
        levels = torch.linspace(0.1, 1, shape[0])
        assert torch.allclose(net(x, levels), x + levels[:, None, None, None] * h)
        alone = torch.cat([net.score(x[i : i + 1]) for i in range(shape[0])])
        assert torch.allclose(h, alone, atol=1e-4 * float(h.abs().max()))
    assert not h.requires_grad
    assert net(x.clone().requires_grad_(), 0.1).requires_grad
    assert torch.equal(ARCHITECTURES.get(name)(image_channels=shape[1]).score(x), torch.zeros_like(x))


def test_the_default_networks_are_compact() -> None:
    for net in (ScoreNet(), EnergyNet()):
        assert 0.5e6 < sum(p.numel() for p in net.parameters()) < 2e6


def test_the_energys_score_is_minus_its_gradient() -> None:
    """Central differences, in float64, along random directions."""
    net = tiny("energy").double()
    x = images(2, 1, 8, 8)
    h = net.score(x)
    for seed in range(5):
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        slope = (net.energy(x + 1e-5 * v) - net.energy(x - 1e-5 * v)) / 2e-5
        assert torch.allclose(slope.detach(), -(h * v).sum((1, 2, 3)).detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NETS)
def test_gradients_of_the_unrolled_loop_are_true(name: str) -> None:
    """Two steps with their step lengths, against central differences; and through the networks themselves."""
    net = tiny(name).double().requires_grad_(False)
    purifier = ScorePurifier(net, steps=2, noise=0.0, smallest=1e-9, largest=1e9, stop=0.0, step=1e-3)
    x = (0.4 + 0.2 * images(1, 1, 4, 4)).requires_grad_()
    path = purifier.trace(x)
    assert len(path) == 3
    assert all(at.min() > 0 and at.max() < 1 and not torch.equal(at, x) for at in path[1:])
    target = images(1, 1, 4, 4, seed=1)
    (slope,) = torch.autograd.grad((path[-1] * target).sum(), x)
    for seed in range(3):
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            near = [((purifier(x + e * v)) * target).sum() for e in (1e-5, -1e-5)]
        assert float((near[0] - near[1]) / 2e-5) == pytest.approx(float((slope * v).sum()), rel=1e-4)


def test_gradients_of_a_written_score_by_gradcheck() -> None:
    field = Model(lambda x: torch.sin(3 * (0.5 - x)) - 0.2 * x.flip(3) * x)
    purifier = ScorePurifier(field, steps=3, noise=0.0)
    x = (0.3 + 0.4 * images(2, 1, 2, 2)).requires_grad_()
    lengths = purifier.length(x, field.score(x))
    assert ((lengths > 1e-3) & (lengths < 0.1)).all()  # not at its limits, where the gradient would be zero
    assert torch.autograd.gradcheck(purifier, (x,))


def test_the_detector_passes_the_share_it_was_calibrated_for() -> None:
    net = quadratic(0.5, 1.0)
    clean = images(200, 1, 4, 4, seed=3)
    for quantile in (0.0, 0.5, 0.9, 1.0):
        threshold = calibrate(net, clean, quantile)
        assert int((score_norm(net, clean) <= threshold).sum()) == max(1, round(200 * quantile))
    with pytest.raises(UserError, match="expected a share in"):
        calibrate(net, clean, 1.5)


def test_images_detected_as_clean_get_less_noise() -> None:
    near, far = torch.full((1, 1, 4, 4), 0.5), torch.full((1, 1, 4, 4), 0.9)
    both = torch.cat([near, far])
    plain = ScorePurifier(quadratic(0.5, 1.0), noise=0.02)
    reference = plain.start(both, generators(2)) - both
    for quiet in (0.0, 0.2):
        purifier = ScorePurifier(quadratic(0.5, 1.0), noise=0.02, threshold=1.0, quiet=quiet)  # the norms are 0 and 1.6
        change = purifier.start(both, generators(2)) - both
        assert torch.allclose(change[0], quiet * reference[0], atol=1e-6)
        assert torch.allclose(change[1], reference[1], atol=1e-6)
        assert purifier.passes == 21


@pytest.fixture(scope="module")
def defence(weights: dict[str, Path]) -> Defence:
    return build_defence(f"ebm:weights={weights['score']}:draws=3:steps=4", load_classifier("digits"))


@pytest.mark.slow
def test_the_defence_draws_again_for_every_pass_and_ignores_their_order(
    defence: Defence, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [stream_key(0, str(i), "test") for i in range(4)]
    x = data.take(data.held_out[:4]).float() / 255
    with torch.no_grad():
        passes = defence.passes_of(x, keys)
        alone = torch.cat([defence.passes_of(x[i : i + 1], keys[i : i + 1]) for i in range(4)])
    assert passes.shape == (4, 3, 10)
    assert not any(torch.equal(passes[:, a], passes[:, b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert torch.allclose(passes, alone, atol=1e-3)
    expected = passes.mean(1).argmax(1)
    assert torch.equal(defence(x, keys), expected)
    scores = defence.scores(x, keys)
    with monkeypatch.context() as patched:
        patched.setattr(defence, "passes_of", lambda *given: passes.flip(1))
        assert torch.equal(defence(x, keys), expected)
        assert torch.allclose(defence.scores(x, keys), scores, atol=1e-5)
        patched.setattr(defence, "passes_of", lambda *given: passes[:, :1])  # one draw alone says something else
        assert not torch.allclose(defence.scores(x, keys), scores, atol=1e-5)
    assert defence.combine == "logits"
    assert (defence.random, defence.differentiable, defence.passes) == (True, True, 3 * (2 * 4 + 1))
    (step,) = defence.describe()["members"]
    assert step["purifier"]["net"]["objective"] == "dsm"
    assert (step["purifier"]["noise"], step["purifier"]["steps"]) == (0.25, 4)


@pytest.mark.slow
def test_an_attackers_gradient_goes_through_the_defence(defence: Defence, data: TrainingData) -> None:
    x = (data.take(data.held_out[:2]).float() / 255).requires_grad_()
    keys = [stream_key(0, str(i), "test") for i in range(2)]
    (slope,) = torch.autograd.grad(defence.scores(x, keys)[:, 0].sum(), x)
    assert slope.isfinite().all()
    assert slope.flatten(1).norm(dim=1).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("noise=-1", "expected noise from 0"),
        ("quiet=2", "quiet in"),
        ("steps=0", "expected a whole number from 1"),
        ("steps=2.5", "steps=2.5; expected a whole number"),
        ("threshold=high", "threshold=high; expected a number"),
        ("noise=0:draws=1.5", "draws=1.5; expected a whole number"),
        ("kind=uniform", "expected one of gaussian, sign"),
        ("step=0", "expected numbers above 0"),
        ("combine=sum", "expected one of vote, logits, probabilities"),
        ("sigma=1", "has no option 'sigma'"),
    ],
)
def test_bad_options(options: str, message: str, weights: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=message):
        build_defence(f"ebm:weights={weights['score']}:{options}", load_classifier("digits"))


@pytest.mark.slow
def test_without_noise_one_draw_is_enough(weights: dict[str, Path]) -> None:
    assert build_defence(f"ebm:weights={weights['energy']}:noise=0", load_classifier("digits")).draws == 1


def test_score_matching_needs_a_score(data: TrainingData, tmp_path: Path) -> None:
    with (
        options_in_messages(),
        pytest.raises(UserError, match=r"needs a network with a score \(--denoiser score or energy\), not UNet"),
    ):
        run("unet", data, tmp_path, Recipe("dsm"))


def test_the_moving_average_by_hand() -> None:
    """Batch statistics are averaged too; the network's own weights are restored afterwards."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = make_average(net, 0.5)
    assert average is not None
    expected = None
    for step in range(12):
        with torch.no_grad():
            net[0].weight.fill_(float(step**2))
            net[1].running_mean.fill_(float(step))
        average.update_parameters(net)
        decay = min(0.5, (1 + step) / (10 + step))
        now = torch.tensor([step**2, float(step)])
        expected = now if expected is None else decay * expected + (1 - decay) * now
    with averaged(net, average):
        assert expected is not None
        assert net[0].weight[0, 0].item() == pytest.approx(expected[0].item(), rel=1e-6)
        assert net[1].running_mean[0].item() == pytest.approx(expected[1].item(), rel=1e-6)
    assert net[0].weight[0, 0].item() == 121
    assert make_average(net, 0.0) is None


@pytest.mark.slow
def test_a_killed_training_ends_with_the_same_averaged_weights(data: TrainingData, tmp_path: Path) -> None:
    recipe = Recipe("dsm", (0.01, 1.0), True, epochs=0.3, ema=0.9)
    whole = run("score", data, tmp_path / "whole", recipe, validations=2)
    part = run("score", data, tmp_path / "parts", recipe, validations=2, checkpoint_seconds=0.0, stop_after=2)
    assert not part.finished
    resumed = run("score", data, tmp_path / "parts", recipe, validations=2, checkpoint_seconds=0.0)
    assert (resumed.steps, resumed.best) == (whole.steps, whole.best)
    a, b = (read_denoiser(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    assert a.card.sha256 == b.card.sha256
    assert a.card.training["ema"] == 0.9
    last = read_state_dict(tmp_path / "whole" / "checkpoint" / "model.safetensors")  # training resumes from these
    assert not any(torch.equal(value, last[key]) for key, value in a.net.state_dict().items())


@pytest.mark.parametrize("ema", [1.0, -0.1, math.nan])
def test_an_invalid_decay_is_an_error(ema: float) -> None:
    with pytest.raises(UserError, match=r"ema.*expected a decay from 0 \(no average\) to below 1"):
        Recipe(ema=ema)
