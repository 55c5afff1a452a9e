"""Training through queries: estimates against analytic and autograd gradients, queries counted, no autograd inside."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scipy.fft import dctn
from small_networks import network, trained
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from certify.errors import RunFault, UserError
from certify.models.query_access import QueryAccess
from training.zeroth_order import estimate_gradient, lowest_frequencies, stability, surrogate_loss

SHAPE = (2, 6, 5)
PIXELS = 60


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny queries: threads that wait for each other on a busy machine take longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ask(target: Any) -> QueryAccess:
    return QueryAccess(target, "scores", bounded=False)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


class Quadratic:
    """x' A x / 2 + b' x for each image: gradient A x + b, second derivative A, both known."""

    def __init__(self, curved: bool = True) -> None:
        root = normal(PIXELS, PIXELS, seed=1)
        self.second = root @ root.T / PIXELS if curved else torch.zeros(PIXELS, PIXELS, dtype=torch.float64)
        self.first = normal(PIXELS, seed=2)

    def __call__(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        return ((x @ self.second) * x).sum(1) / 2 + x @ self.first

    def gradient(self, images: Tensor) -> Tensor:
        return (images.flatten(1) @ self.second + self.first).view_as(images)


def small_cnn() -> nn.Module:
    """RGB to 5 scores, in float64, smooth, its parameters waiting for gradients."""
    net = trained(network()).double().eval()
    for i, layer in enumerate(net):
        if isinstance(layer, nn.ReLU):
            net[i] = nn.SiLU()
    return net.requires_grad_(True)


def random_images(count: int, *shape: int) -> Tensor:
    return torch.rand((count, *shape), generator=seeded(3), dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 3, 5, 6, 99])
def test_basis_is_orthonormal_and_the_dct(size: int) -> None:
    basis = lowest_frequencies(SHAPE, size, torch.float64)
    rows, columns = min(size, 6), min(size, 5)
    assert basis.shape == (2, rows, columns)
    assert basis.dimensions == 2 * rows * columns
    units = torch.eye(basis.dimensions, dtype=torch.float64).view(-1, *basis.shape)
    vectors = basis.synthesise(units).flatten(1)
    assert torch.allclose(vectors @ vectors.T, torch.eye(basis.dimensions, dtype=torch.float64), atol=1e-12)
    images = normal(4, *SHAPE)
    truth = torch.tensor(dctn(images.numpy(), axes=(2, 3), norm="ortho"))[:, :, :rows, :columns]
    assert torch.allclose(basis.analyse(images), truth, atol=1e-12)


def test_coordinates_on_a_quadratic() -> None:
    """Projected gradient plus mu / 2 times the diagonal of the second derivative: nothing else is wrong by design."""
    loss, images, step = Quadratic(), normal(3, *SHAPE), 1e-2
    found = estimate_gradient(loss, images, method="coordinate", queries=1, step=step, size=3, generator=seeded())
    basis = lowest_frequencies(SHAPE, 3, torch.float64)
    vectors = basis.synthesise(torch.eye(18, dtype=torch.float64).view(-1, *basis.shape)).flatten(1)
    curvature = ((vectors @ loss.second) * vectors).sum(1).view(1, *basis.shape)
    truth = basis.synthesise(basis.analyse(loss.gradient(images)) + step / 2 * curvature)
    assert torch.allclose(found, truth, atol=1e-10)


def test_random_directions_are_unbiased() -> None:
    """On a quadratic the smoothed loss has the loss's own gradient, at any step: within 4 standard errors of it."""
    loss, many = Quadratic(), 20_000
    image = normal(1, *SHAPE)
    draws = estimate_gradient(
        loss, image.expand(many, *SHAPE), method="random", queries=2, step=0.3, size=3, generator=seeded()
    )
    basis = lowest_frequencies(SHAPE, 3, torch.float64)
    assert torch.allclose(basis.synthesise(basis.analyse(draws)), draws, atol=1e-10)  # nothing outside the subspace
    draws, truth = basis.analyse(draws), basis.analyse(loss.gradient(image))[0]
    error = (draws.mean(0) - truth) / (draws.std(0) / many**0.5)
    assert error.abs().max() < 4


@pytest.mark.parametrize("queries", [1, 4, 16])
def test_variance_falls_like_one_over_q(queries: int) -> None:
    """Linear loss: E|estimate - g|^2 = (d - 1) / q |g|^2, from E[u u'] = 1/d; within 4 standard errors."""
    loss, many = Quadratic(curved=False), 8000
    basis = lowest_frequencies(SHAPE, 3, torch.float64)
    truth = basis.analyse(loss.gradient(normal(1, *SHAPE)))
    images = normal(1, *SHAPE).expand(many, *SHAPE)
    found = estimate_gradient(loss, images, method="random", queries=queries, step=0.1, size=3, generator=seeded())
    squares = (basis.analyse(found) - truth).pow(2).sum((1, 2, 3))
    expected = (basis.dimensions - 1) / queries * truth.pow(2).sum()
    assert (squares.mean() - expected).abs() < 4 * squares.std() / many**0.5


def test_full_basis_is_autograd() -> None:
    """All 192 coordinates of a CNN's cross entropy, and through the chain rule a denoiser's parameters.

    The error is the curvature times mu / 2: a tenth of the step, a tenth of it.
    """
    net, images = small_cnn(), random_images(2, 3, 8, 8)
    target = torch.tensor([0, 3])
    denoiser = nn.Conv2d(3, 3, 3, padding=1).double()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(0.3 * normal(*parameter.shape))
    x = denoiser(images).detach().requires_grad_(True)
    (truth,) = torch.autograd.grad(cross_entropy(net(x), target, reduction="sum"), x)
    whole = torch.autograd.grad(cross_entropy(net(denoiser(images)), target), list(denoiser.parameters()))

    black_box = ask(net)
    denoised = denoiser(images)
    errors, found = [], torch.empty(0)
    for step in (1e-4, 1e-5):
        found = estimate_gradient(
            lambda y: stability(black_box(y), target),
            denoised,
            method="coordinate",
            queries=1,
            step=step,
            size=8,
            generator=seeded(),
        )
        errors.append(float((found - truth).norm() / truth.norm()))
    assert errors[1] < 1e-4
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.05)
    surrogate_loss(denoised, found).backward()
    for parameter, gradient in zip(denoiser.parameters(), whole, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert black_box.spent == 2 * 2 * 193


def test_surrogate_has_the_gradient_of_the_mean() -> None:
    images, gradient = normal(4, *SHAPE).requires_grad_(True), normal(4, *SHAPE, seed=5).requires_grad_(True)
    surrogate_loss(images, gradient).backward()
    assert torch.equal(images.grad, gradient.detach() / 4)
    assert gradient.grad is None


def test_each_image_has_directions_of_its_own() -> None:
    """Two copies of one image get two estimates; the same seed gives the same ones."""
    settings: dict[str, Any] = {"method": "random", "queries": 1, "step": 0.1, "size": 3}
    images = normal(1, *SHAPE).expand(2, *SHAPE)
    first = estimate_gradient(Quadratic(), images, **settings, generator=seeded())
    assert not torch.allclose(first[0], first[1])
    assert torch.equal(first, estimate_gradient(Quadratic(), images, **settings, generator=seeded()))


class Watchful(nn.Module):
    """Fails where autograd or autocast is on; the answer would carry a history, were it not cut."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(PIXELS, 3)
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert not images.requires_grad
        self.batches.append(len(images))
        with torch.enable_grad():
            answer: Tensor = self.linear(images.flatten(1))
        return answer


@pytest.mark.parametrize(("method", "cost"), [("random", 8), ("coordinate", 19)])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_autograd_and_exact_counts(method: Any, cost: int, autocast: bool) -> None:
    net = Watchful()
    black_box = ask(net)
    images = normal(5, *SHAPE).float().requires_grad_(True)
    target = black_box(images).argmax(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = estimate_gradient(
            lambda x: stability(black_box(x), target),
            images,
            method=method,
            queries=7,
            step=1e-2,
            size=3,
            generator=seeded(),
        )
    assert not found.requires_grad
    assert found.dtype == torch.float32
    assert not black_box(images).requires_grad
    assert black_box.spent == sum(net.batches) == 5 * (cost + 2)
    surrogate_loss(images, found).backward()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_losses() -> None:
    """Known values."""
    scores, target = normal(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = [float(row.logsumexp(0) - row[t]) for row, t in zip(scores, target, strict=True)]
    assert stability(scores, target).tolist() == pytest.approx(expected)


def test_training_through_queries() -> None:
    """A denoiser of two parameters, contrast and brightness, both set wrong, in front of a frozen classifier.

    Coordinate-wise, the path is that of exact gradients to within the finite differences; with random directions it
    ends where the loss is lower by more than half.
    """

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.contrast, self.brightness = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(1.0))

        def forward(self, noisy: Tensor) -> Tensor:
            return self.contrast * noisy + self.brightness

    clean = torch.zeros(16, 1, 4, 4, dtype=torch.float64)
    clean[:8] = 0.25
    clean[8:] = 0.75  # dark or bright: the mean says which
    noisy = clean + 0.25 * normal(*clean.shape)

    def scores(images: Tensor) -> Tensor:
        mean = images.mean((1, 2, 3))
        return 12 * torch.stack([0.5 - mean, mean - 0.5], 1)

    black_box = ask(scores)
    target = black_box(clean).argmax(1)
    start = Denoiser()
    ends = {}
    for method in ("exact", "coordinate", "random"):
        denoiser, generator = copy.deepcopy(start), seeded(1)
        for _ in range(30):
            denoiser.zero_grad()
            images = denoiser(noisy)
            if method == "exact":
                cross_entropy(scores(images), target).backward()
            else:
                gradient = estimate_gradient(
                    lambda x: stability(black_box(x), target),
                    images,
                    method=method,
                    queries=4,
                    step=1e-4,
                    size=2,
                    generator=generator,
                )
                surrogate_loss(images, gradient).backward()
            with torch.no_grad():
                for parameter in denoiser.parameters():
                    parameter -= 0.02 * parameter.grad
        ends[method] = float(stability(black_box(denoiser(noisy)), target).mean())
    before = float(stability(black_box(start(noisy)), target).mean())
    assert ends["coordinate"] == pytest.approx(ends["exact"], rel=1e-3)
    assert ends["random"] < before / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "newton"}, "method 'newton': expected 'random' or 'coordinate'"),
        ({"queries": 0}, "queries 0"),
        ({"step": 0.0}, "step 0.0"),
        ({"step": float("nan")}, "step nan"),
        ({"size": 0}, "size 0"),
        ({"loss": lambda x: x.mean()}, "loss returned \\(\\) for 2 images"),
    ],
)
def test_mistakes_in_settings(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"loss": Quadratic(), "method": "random", "queries": 1, "step": 0.1, "size": 2} | change
    with pytest.raises(UserError, match=message):
        estimate_gradient(settings.pop("loss"), normal(2, *SHAPE), **settings, generator=seeded())


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda x: x.flatten(1).argmax(1), UserError, "it returns labels only"),
        (lambda x: x.flatten(1)[:1], UserError, "expected scores \\(B, K\\)"),
        (lambda x: x.flatten(1) * float("nan"), RunFault, "not finite"),
    ],
)
def test_mistakes_in_answers(answer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ask(answer)(normal(2, *SHAPE))
