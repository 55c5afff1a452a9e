"""Attacks against known margins: none finds an image nearer than there is one; what counts is measured by us."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

import analysis.attacks
from analysis.attacks import (
    ATTACKS,
    CLASSIFIER,
    SCORES,
    SURROGATES,
    AttackSettings,
    check_attacks,
    check_surrogates,
    crafter,
    find_attack,
)
from analysis.attacks.gradients import _expected, differentiable
from analysis.comparison.attacked import SLACK, Attacked, Proposal, Task, _measured, attack, seeded
from certify import load_classifier, load_images
from certify.errors import UserError
from certify.models.classifier import Classifier, ClassifierSpec, InputSpec
from certify.models.defence import Defence, Member
from certify.models.query_access import QueryAccess
from certify.smoothing.rng import stream_key
from denoisers.jpeg import jpeg
from denoisers.randomness import Generators, normal, per_image

SHAPE = (1, 8, 8)
WEIGHT = torch.randn(64, generator=torch.Generator().manual_seed(3))
MARGIN = {"l2": 0.3, "linf": 0.3 * float(WEIGHT.norm() / WEIGHT.abs().sum())}
"""Distance of the grey image from the linear classifier's boundary: known."""

GREY = torch.full((2, *SHAPE), 0.5)
ZERO = torch.tensor([0, 0])
IDS = ["a", "b"]


def linear(weight: Tensor = WEIGHT, offset: float | None = None, name: str = "linear") -> Classifier:
    """Class 1 where ``weight . (x - 0.5) > offset``; both classes' scores are needed, and it is not saturated."""
    offset = 0.3 * float(weight.norm()) if offset is None else offset
    layer = nn.Linear(weight.numel(), 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([-weight / 2, weight / 2]))
        bias = float(weight.sum()) / 2 + offset
        layer.bias.copy_(torch.tensor([bias / 2, -bias / 2]))
    return Classifier(name, ClassifierSpec(nn.Sequential(nn.Flatten(), layer), InputSpec(SHAPE)), 2)


def asked(target: Any, answers: Any, budget: int | None, count: int = 2) -> list[QueryAccess]:
    return [QueryAccess(target, answers, budget=budget, key=stream_key(0, str(i), "q")) for i in range(count)]


class Jitter(nn.Module):
    """Adds noise, and writes down the first number of each draw."""

    random = True

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Generators = None) -> Tensor:
        noise = 0.02 * normal(images, generator)
        self.drawn += noise[:, 0, 0, 0].tolist()
        return (images + noise).clamp(0, 1)


class Pooled(nn.Module):
    """The mean of each 2x2 block: takes the finest pattern out altogether."""

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: object = None) -> Tensor:
        return avg_pool2d(images, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)


class Rounded(nn.Module):
    """Eighths: autograd gives zeros."""

    def __init__(self, honest: bool) -> None:
        super().__init__()
        self.differentiable = not honest

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: object = None) -> Tensor:
        return (images * 8).round() / 8


class Lucky(nn.Module):
    """One answer in twenty is about another image, of class 1."""

    random = True

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Generators = None) -> Tensor:
        wrong = [float(torch.rand(1, generator=g)) < 0.05 for g in per_image(generator, len(images))]
        push = WEIGHT.sign().view(SHAPE)
        return torch.stack([x + push if w else x for x, w in zip(images, wrong, strict=True)])


class Fold(nn.Module):
    """Removes what moved farther than ``width``, after ``inner``; the gradient taken for its own passes through."""

    differentiable = False

    def __init__(self, width: float, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.width, self.inner, self.random = width, inner, inner is not None

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Generators = None) -> Tensor:
        near = (images - 0.5).abs().amax((1, 2, 3), keepdim=True) < self.width
        seen = torch.where(near, images, torch.full_like(images, 0.5))
        return seen if self.inner is None else self.inner(seen, generator=generator)


class Reversed(nn.Module):
    """The negative: the identity's gradient leads away, and its differentiable twin knows better."""

    def __init__(self, differentiable: bool) -> None:
        super().__init__()
        self.differentiable = differentiable

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: object = None) -> Tensor:
        return 1 - (images if self.differentiable else (images * 255).round() / 255)

    def twin(self) -> Reversed:
        return Reversed(differentiable=True)


def behind(purifier: nn.Module | None, classifier: Classifier, **how: Any) -> Defence:
    return Defence("test", [Member(purifier, classifier)], **how)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_hopskipjump_approaches_the_margin_from_above(norm: str) -> None:
    access = asked(linear(), "labels", 1500)
    found = attack("hopskipjump", GREY, ZERO, IDS, norm=norm, access=access)
    assert all(found.success)
    for distance in found.distance:
        assert MARGIN[norm] * (1 - 1e-5) < distance < 1.15 * MARGIN[norm]
    assert found.queries == tuple(a.spent for a in access)
    assert max(found.queries) <= 1500
    assert linear()(found.images).tolist() == [1, 1]
    assert 0 <= found.images.min() <= found.images.max() <= 1


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", ["blind-pgd", "adaptive-pgd", "transfer", "square"])
def test_attacks_in_a_ball_succeed_only_beyond_the_margin(name: str, norm: str) -> None:
    net = linear()
    near, far = 0.98 * MARGIN[norm], (2.0 if name == "square" else 1.02) * MARGIN[norm]
    for eps in (near, far):
        found = attack(
            name,
            GREY[:1],
            ZERO[:1],
            IDS[:1],
            norm=norm,
            eps=eps,
            access=asked(net, "scores", 300, 1),
            classifier=None if name == "transfer" else net,
            defence=behind(None, linear(1.01 * WEIGHT) if name == "transfer" else net),
            surrogates=[net],
            **({"diversity": 0.0} if name == "transfer" else {}),
        )
        assert found.success == (eps > MARGIN[norm],)
        assert found.success[0] == bool(net(found.images)[0] == 1)
        assert found.distance[0] <= eps + SLACK
        assert "zero" not in found.notes[0]


def test_a_spent_budget_gives_the_best_image_so_far() -> None:
    """The same attack for longer goes the same way for longer."""
    nearest = []
    for budget in (20, 150, 600):
        access = asked(linear(), "labels", budget, 1)
        found = attack("hopskipjump", GREY[:1], ZERO[:1], IDS[:1], norm="l2", access=access)
        assert found.queries[0] <= budget
        assert found.success == (True,)
        nearest.append(found.l2[0])
    assert nearest[0] > nearest[1] > nearest[2]
    nothing = attack("hopskipjump", GREY, ZERO, IDS, norm="l2", access=asked(linear(), "labels", 1))
    assert nothing.success == (False, False)
    assert nothing.queries == (1, 1)
    assert nothing.notes == ("no wrong answer found",) * 2
    assert torch.equal(nothing.images, GREY)


@pytest.mark.parametrize(("name", "answers"), [("hopskipjump", "labels"), ("square", "scores")])
def test_a_misclassified_clean_image_ends_the_attack(name: str, answers: Any) -> None:
    found = attack(name, GREY, ZERO + 1, IDS, norm="l2", eps=0.5, access=asked(linear(), answers, 100))
    assert (found.success, found.queries, found.l2) == ((True, True), (1, 1), (0.0, 0.0))


@pytest.mark.parametrize(("name", "answers"), [("hopskipjump", "labels"), ("square", "scores")])
@pytest.mark.parametrize("norm", ["l2", pytest.param("linf", marks=pytest.mark.slow)])
def test_one_chance_error_of_a_random_target_does_not_end_the_attack(name: str, answers: Any, norm: str) -> None:
    """Below the margin there is nothing to find, and above it what is found is really wrong."""
    ids, budget = [str(i) for i in range(6)], 150
    images, labels = GREY[:1].expand(6, *SHAPE), torch.zeros(6, dtype=torch.long)
    target = behind(Lucky(), linear())
    keys = [stream_key(0, "x", "judge")]

    def run(eps: float) -> Attacked:
        return attack(name, images, labels, ids, norm=norm, eps=eps, access=asked(target, answers, budget, 6))

    below, above = run(0.5 * MARGIN[norm]), run(6 * MARGIN[norm])
    assert sum(below.success) == 0  # three wrong answers in five by chance are rare
    assert min(below.queries) > budget / 3
    assert all("mostly answered wrongly" in note for note in below.notes)
    assert name != "square" or min(below.distance) > 0
    assert sum(above.success) >= 4
    for image in above.images[torch.tensor(above.success)]:
        assert sum(int(target(image[None], keys, turn)) for turn in range(20)) >= 15


def test_square_returns_the_lowest_margin_of_a_random_target() -> None:
    net = linear()
    found = attack("square", GREY, ZERO, IDS, norm="l2", eps=0.2, access=asked(behind(Jitter(), net), "scores", 150))
    assert found.success == (False, False)
    assert min(found.l2) > 0.19
    assert (net.logits(found.images).diff(dim=1) > net.logits(GREY).diff(dim=1)).all()


def test_a_random_target_that_is_mostly_wrong_needs_no_attack() -> None:
    access = asked(behind(Lucky(), linear()), "labels", 100)
    found = attack("hopskipjump", GREY, ZERO + 1, IDS, norm="l2", eps=0.5, access=access)
    assert (found.success, found.l2) == ((True, True), (0.0, 0.0))
    assert max(found.queries) <= 6 + 1


def test_hopskipjump_stops_at_the_ball() -> None:
    free = attack("hopskipjump", GREY, ZERO, IDS, norm="l2", access=asked(linear(), "labels", 1000))
    ball = attack("hopskipjump", GREY, ZERO, IDS, norm="l2", eps=0.6, access=asked(linear(), "labels", 1000))
    assert all(ball.success)
    assert max(ball.l2) <= 0.6 + SLACK
    assert max(ball.queries) < min(free.queries)
    small = attack("hopskipjump", GREY, ZERO, IDS, norm="l2", eps=0.29, access=asked(linear(), "labels", 300))
    assert small.success == (False, False)
    assert torch.equal(small.images, GREY)
    assert "outside the ball of 0.29" in small.notes[0]


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", list(ATTACKS))
def test_every_attack_fulfils_its_contract_in_any_batch(name: str, norm: str) -> None:
    """In the ball and in [0, 1] by our own measure; an image gets the same alone; global generators are put back."""
    digits = load_classifier("digits")
    chosen = load_images("digits", digits, skip=100)
    images = torch.stack([chosen.load(i) for i in (0, 1)])
    labels = torch.tensor([chosen.labels[i] for i in (0, 1)])
    defence = behind(Jitter(), digits)
    eps = 1.5 if norm == "l2" else 0.3
    found = find_attack(name, norm)
    answers = "scores" if found.needs == SCORES else "labels"
    numbers = {k: v for k, v in {"steps": 4, "eot": 2}.items() if k in found.options}
    spent: list[tuple[int, ...]] = []

    def run(rows: list[int]) -> Attacked:
        access = [asked(defence, answers, 120)[r] for r in rows]
        attacked = attack(
            name,
            images[rows],
            labels[rows],
            [IDS[r] for r in rows],
            norm=norm,
            eps=eps,
            access=access,
            classifier=digits if found.needs == CLASSIFIER else None,
            defence=defence if found.needs != SURROGATES else None,
            surrogates=[digits],
            **numbers,
        )
        spent.append(tuple(one.spent for one in access))
        return attacked

    state = np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()  # noqa: NPY002
    both, second = run([0, 1]), run([1])
    after = np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert state == after
    assert torch.equal(both.images[1], second.images[0])
    assert (both.success[1], both.queries[1], both.notes[1]) == (second.success[0], second.queries[0], second.notes[0])
    assert 0 <= both.images.min() <= both.images.max() <= 1
    moved = (both.images - images).double().flatten(1)
    assert both.l2 == pytest.approx(moved.norm(dim=1).tolist())
    assert both.linf == pytest.approx(moved.abs().amax(1).tolist())
    assert max(both.distance) <= eps + SLACK
    if found.by_queries:
        assert [both.queries, second.queries] == spent  # what it says it asked is what was asked
        assert max(both.queries) <= 120
    else:
        assert spent == [(0, 0), (0,)]
    assert found.groups


def test_proposals_outside_ball_or_range_fail() -> None:
    clean = GREY[:1].expand(4, *SHAPE)
    proposed = [clean[0] + 0.1, clean[0] + 0.2, clean[0] + 0.6, clean[0] * float("nan")]
    proposals = [Proposal(image, 1, 7) for image in proposed]
    found = _measured("x", "linf", 0.15, clean, torch.zeros(4, dtype=torch.long), proposals)
    assert found.success == (True, False, False, False)
    assert "linf 0.200000, outside the ball of 0.15" in found.notes[1]
    assert found.notes[2] == found.notes[3] == "proposed values outside [0, 1]"
    assert torch.equal(found.images[1:], clean[1:])
    assert found.linf == pytest.approx((0.1, 0, 0, 0))


def test_knowing_the_purifier_helps() -> None:
    """The bare classifier mostly looks at a checkerboard, which pooling takes out; what remains suffices."""
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    weight = ((-1.0) ** (rows + columns) + 0.2).flatten()
    net = linear(weight, 0.5)
    defence = behind(Pooled(), net)
    keys = [stream_key(0, "x", "judge")]
    blind = attack("blind-pgd", GREY[:1], ZERO[:1], IDS[:1], norm="linf", eps=0.1, classifier=net)
    assert blind.success == (True,)
    assert defence(blind.images, keys).tolist() == [0]
    adaptive = attack("adaptive-pgd", GREY[:1], ZERO[:1], IDS[:1], norm="linf", eps=0.1, defence=defence)
    assert adaptive.success == (True,)
    assert defence(adaptive.images, keys).tolist() == [1]


def test_purifiers_without_gradients_get_that_of_the_identity() -> None:
    net = linear(offset=0.05 * float(WEIGHT.abs().sum()))
    given = {"norm": "linf", "eps": 0.1, "steps": 10}
    plain = attack("adaptive-pgd", GREY, ZERO, IDS, defence=behind(Rounded(honest=False), net), **given)
    assert plain.success == (False, False)
    assert plain.notes == ("all 10 gradients were zero",) * 2
    past = attack("adaptive-pgd", GREY, ZERO, IDS, defence=behind(Rounded(honest=True), net), **given)
    assert past.success == (True, True)
    assert past.notes == ("", "")


def test_a_purifier_with_a_twin_gets_the_twins_gradients() -> None:
    net = linear(offset=0.05 * float(WEIGHT.abs().sum()))
    exact = behind(Reversed(differentiable=False), net)
    found = attack("adaptive-pgd", GREY, ZERO, IDS, norm="linf", eps=0.1, steps=10, defence=exact)
    assert found.success == (True, True)
    assert exact(found.images, [stream_key(0, i, "judge") for i in IDS]).tolist() == [1, 1]
    soft = differentiable(behind(jpeg(60), net))
    assert soft.differentiable
    images = torch.rand((2, *SHAPE), generator=torch.Generator().manual_seed(0))
    assert torch.equal(soft.purify(images), jpeg(60).twin()(images))


@pytest.mark.parametrize("inner", [None, Jitter()])
def test_the_best_image_on_the_path_is_kept(inner: nn.Module | None) -> None:
    """The steps go on past where the defence answers wrongly, to where it takes the whole perturbation out."""
    net = linear(offset=0.03 * float(WEIGHT.abs().sum()))
    defence = behind(Fold(0.06, inner), net)
    found = attack("adaptive-pgd", GREY, ZERO, IDS, norm="linf", eps=0.1, steps=10, random_start=False, defence=defence)
    assert found.success == (True, True)
    assert found.linf == pytest.approx((0.05, 0.05), abs=1e-5)
    assert defence(found.images, [stream_key(0, i, "judge") for i in IDS]).tolist() == [1, 1]


@pytest.mark.parametrize("combine", ["vote", "logits", "probabilities"])
def test_the_objective_is_the_logarithm_of_the_expected_scores(combine: str) -> None:
    digits = load_classifier("digits")
    defence = Defence("test", [Member(p, digits) for p in (Pooled(), None)], combine=combine)
    images = torch.rand((3, *SHAPE), generator=torch.Generator().manual_seed(0))
    scores = defence.scores(images, [stream_key(0, str(i), "t") for i in range(3)])
    assert torch.allclose(_expected(defence, b"", 1)(images).exp(), scores, atol=1e-6)


@pytest.mark.parametrize(("draws", "members", "passes"), [(100, 1, 10), (1, 1, 10), (4, 1, 12), (1, 3, 12), (9, 4, 12)])
def test_the_passes_of_a_gradient_are_bounded(draws: int, members: int, passes: int) -> None:
    """A hundred votes are not drawn ten times over for one gradient."""
    jitter, steps = Jitter(), 3
    defence = Defence("test", [Member(jitter, linear())] * members, draws=draws)
    attack("adaptive-pgd", GREY[:1], ZERO[:1], IDS[:1], norm="l2", eps=0.1, defence=defence, steps=steps)
    gradients, rest = divmod(len(jitter.drawn) - draws * members, passes)  # without the judge's
    assert rest == 0
    assert steps <= gradients <= steps + 2  # the library asks about the last image again


@pytest.mark.parametrize("name", list(ATTACKS))
def test_an_attack_gets_only_what_it_needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, seen = find_attack(name, "l2"), []

    def look(image: Tensor, label: int, task: Task) -> Proposal:
        seen.append(task)
        return Proposal(image, label, 0)

    module, _, function = found.run.partition(":")
    monkeypatch.setattr(f"{module}.{function}", look)
    net = linear()
    attack(
        name,
        GREY,
        ZERO,
        IDS,
        norm="l2",
        eps=0.5,
        access=asked(net, "scores", 10),
        classifier=net,
        defence=behind(None, net),
        surrogates=[linear(2 * WEIGHT)],
    )
    assert len(seen) == 2
    for task in seen:
        given = {
            "asks": task.access is not None,
            "gradients of the classifier": task.classifier is not None,
            "gradients of the defence": task.defence is not None,
            "surrogates": task.surrogates != (),
        }
        assert [what for what, there in given.items() if there] == ["asks" if found.by_queries else found.needs]


@pytest.mark.parametrize("combine", ["vote", "logits", "probabilities"])
def test_differentiable_preserves_the_answers(combine: str) -> None:
    digits = load_classifier("digits")
    members = [Member(p, digits) for p in (Rounded(honest=True), Jitter(), None)]
    defence = Defence("test", members, draws=2, combine=combine)
    images = torch.rand((3, *SHAPE), generator=torch.Generator().manual_seed(0))
    keys = [stream_key(0, str(i), "t") for i in range(3)]
    assert torch.equal(differentiable(defence).passes_of(images, keys, 4), defence.passes_of(images, keys, 4))
    found = attack(
        "adaptive-pgd", images, ZERO[:1].expand(3), "xyz", norm="l2", eps=0.5, defence=defence, steps=2, eot=2
    )
    assert found.notes == ("",) * 3


def test_expectation_uses_new_draws_at_every_step() -> None:
    jitter = Jitter()
    found = attack(
        "adaptive-pgd",
        GREY[:1],
        ZERO[:1],
        IDS[:1],
        norm="l2",
        eps=0.1,
        defence=behind(jitter, linear()),
        steps=5,
        eot=3,
    )
    assert len(jitter.drawn) == found.queries[0] + 1  # and one for the judge
    assert len(set(jitter.drawn)) == len(jitter.drawn) >= 5 * 3 + 1


def test_a_second_library_agrees() -> None:
    """Foolbox, on the same classifier: PGD crosses at the same radius, and its HopSkipJump ends where ours does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fb = pytest.importorskip("foolbox")
    net = linear()
    model = fb.PyTorchModel(net.net.eval(), bounds=(0, 1), device="cpu")
    for norm, pgd in (("l2", fb.attacks.L2PGD), ("linf", fb.attacks.LinfPGD)):
        radii = [0.98 * MARGIN[norm], 1.02 * MARGIN[norm]]
        _, _, broken = pgd(rel_stepsize=0.25, steps=40)(model, GREY[:1], ZERO[:1], epsilons=radii)
        ours = [
            attack("blind-pgd", GREY[:1], ZERO[:1], IDS[:1], norm=norm, eps=eps, classifier=net).success[0]
            for eps in radii
        ]
        assert broken[:, 0].tolist() == ours == [False, True]
    with seeded(stream_key(0, "foolbox", "test")):
        theirs, _, _ = fb.attacks.HopSkipJumpAttack(steps=5, max_gradient_eval_steps=300)(
            model, GREY[:1], ZERO[:1], epsilons=None
        )
    ours = attack("hopskipjump", GREY[:1], ZERO[:1], IDS[:1], norm="l2", access=asked(net, "labels", 1500, 1))
    assert float((theirs - GREY[:1]).norm()) == pytest.approx(ours.l2[0], rel=0.15)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sqare", {}, "unknown attack 'sqare'; nearest: square"),
        ("square", {"norm": "l1"}, "norm 'l1'; expected one of linf, l2"),
        ("square", {"access": ("labels", 10)}, "needs scores, but this access returns labels; .* hopskipjump"),
        ("square", {}, r"needs scores: 0 accesses for 2 images; .*QueryAccess\(defence, 'scores', budget=1000\)"),
        ("square", {"access": ("scores", None)}, "needs a query budget"),
        ("hopskipjump", {"access": ("labels", None)}, "needs a query budget"),
        ("square", {"eps": None, "access": ("scores", 10)}, "works within a ball; pass eps="),
        ("blind-pgd", {}, "needs gradients of the classifier; pass classifier="),
        ("adaptive-pgd", {}, "needs gradients of the defence; pass defence="),
        ("transfer", {}, "needs surrogates; pass surrogates="),
        ("transfer", {"classifier": linear(), "surrogates": [linear()]}, "a surrogate is the target itself"),
        (
            "blind-pgd",
            {"classifier": linear(), "stepz": 3},
            "no option 'stepz'; its options: steps, step, random_start",
        ),
        ("blind-pgd", {"classifier": linear(), "steps": 0}, "steps 0, step 0.25: expected 1 or more"),
        ("adaptive-pgd", {"defence": behind(None, linear()), "eot": 0}, "eot 0"),
        ("blind-pgd", {"classifier": linear(), "eps": -1.0}, "eps -1.0; expected a number above 0"),
    ],
)
def test_mistakes_are_named(name: str, given: dict[str, Any], message: str) -> None:
    if "access" in given:
        given = given | {"access": asked(linear(), *given["access"])}
    with pytest.raises(UserError, match=message):
        attack(name, GREY, ZERO, IDS, **({"norm": "l2", "eps": 0.5} | given))


def test_models_without_gradients_are_refused() -> None:
    class Detached(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.detach().flatten(1)[:, :2]

    runtime = Classifier("runtime", ClassifierSpec(Detached(), InputSpec(SHAPE)), 2)
    with pytest.raises(UserError, match=r"gives no gradients .* hopskipjump"):
        attack("blind-pgd", GREY, ZERO, IDS, norm="l2", eps=0.5, classifier=runtime)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_square_refuses_logits(norm: str) -> None:
    """Logits in place of probabilities: their logarithms are all the same, and nothing would ever move."""
    access = [QueryAccess(linear().logits, "scores", budget=100, num_classes=2) for _ in IDS]
    with pytest.raises(UserError, match="expected probabilities"):
        attack("square", GREY, ZERO, IDS, norm=norm, eps=0.5, access=access)
    nameless = [QueryAccess(linear().logits, "scores", budget=100) for _ in IDS]
    with pytest.raises(UserError, match="num_classes=K"):
        attack("square", GREY, ZERO, IDS, norm=norm, eps=0.5, access=nameless)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis.attacks.importlib.util, "find_spec", lambda name: None)
    for call in (
        lambda: attack("blind-pgd", GREY, ZERO, IDS, norm="l2", eps=0.5, classifier=linear()),
        lambda: check_attacks(["square"], norm="l2"),
    ):
        with pytest.raises(UserError, match=r"pip install 'certify-toolkit\[attacks\]'"):
            call()


def test_the_crafter_runs_every_attack() -> None:
    with pytest.raises(UserError, match="transfer needs surrogates"):
        check_attacks(["blind-pgd", "transfer"], norm="linf")
    check_attacks(["blind-pgd", "transfer"], norm="linf", surrogates=1)

    class Condition:
        def __init__(self, name: str) -> None:
            self.name = name

    net = linear()
    craft = crafter(net, AttackSettings((), 2 * MARGIN["linf"], "linf", queries=200, steps=5, eot=2, seed=0))
    for name in ("hopskipjump", "square", "blind-pgd", "adaptive-pgd"):
        found = craft(Condition(name), behind(Jitter(), net), GREY[:1], ZERO[:1], IDS[:1])
        assert found.name == name
        assert found.images.shape == (1, *SHAPE)
        assert found.queries[0] <= 200


def test_surrogates_of_another_task_are_refused_at_once() -> None:
    net, settings = linear(), AttackSettings((), 0.1, "linf", queries=9, steps=5, eot=2, seed=0)
    check_surrogates(net, [linear(2 * WEIGHT)])
    large = Classifier(
        "large", ClassifierSpec(nn.Sequential(nn.AvgPool2d(2), *linear().net), InputSpec((1, 16, 16))), 2
    )
    many = Classifier("many", ClassifierSpec(nn.Flatten(), InputSpec(SHAPE)), 64)
    with pytest.raises(UserError, match=r"surrogate large: input size \(1, 16, 16\); expected \(1, 8, 8\)"):
        crafter(net, replace(settings, surrogates=[linear(2 * WEIGHT), large]))
    with pytest.raises(UserError, match="surrogate many: classes 64; expected 2"):
        crafter(net, replace(settings, surrogates=[many]))
