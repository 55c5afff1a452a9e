"""Query-only access: exact budgets, new draws, no path to the parameters."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from small_networks import classifier
from torch import Tensor, nn

from certify import load_classifier
from certify.errors import BudgetSpent, RunFault, UserError
from certify.models.defence import Defence, Member
from certify.models.query_access import QueryAccess
from certify.smoothing.rng import stream_key
from denoisers.randomness import Generators, normal

IMAGES = torch.rand((6, 1, 8, 8), generator=torch.Generator().manual_seed(0))
KEY = stream_key(0, "image", "test")


class Jitter(nn.Module):
    """Noise so large that two draws never give the same scores."""

    random = True

    def forward(self, images: Tensor, sigma: float | None = None, *, generator: Generators = None) -> Tensor:
        return images + 0.3 * normal(images, generator)


def jittered() -> Defence:
    return Defence("jitter", [Member(Jitter(), load_classifier("digits"))])


class Counting:
    """Sends back the pixel sum, and knows which images it ever saw."""

    num_classes = 3

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.batches.append(len(images))
        return images.flatten(1)[:, :3]


def test_budget_is_exact_for_any_batching() -> None:
    """A batch beyond the rest is refused whole; what is left can still be spent, and nothing beyond it is computed."""
    target = Counting()
    access = QueryAccess(target, "scores", budget=10)
    access(IMAGES)
    with pytest.raises(BudgetSpent, match="6 of 10 queries are spent and 6 more were requested; none of them was sent"):
        access(IMAGES)
    assert access.spent == 6
    access(IMAGES[:3])
    access(IMAGES[:1])
    for _ in range(3):
        with pytest.raises(BudgetSpent) as caught:
            access(IMAGES[:1])
        assert (caught.value.spent, caught.value.budget, caught.value.requested) == (10, 10, 1)
    assert target.batches == [6, 3, 1]
    assert access.spent == access.budget == 10
    assert isinstance(caught.value, RunFault)


def test_spent_queries_resume_and_failures_count() -> None:
    def broken(images: Tensor) -> Tensor:
        raise OSError("gone")

    access = QueryAccess(broken, "labels", budget=30, spent=20)
    with pytest.raises(OSError, match="gone"):
        access(IMAGES)
    assert access.spent == 26


def test_every_query_is_a_new_draw_for_any_batching() -> None:
    same = IMAGES[:1].expand(6, -1, -1, -1)
    together = QueryAccess(jittered(), "scores", key=KEY)(same)
    one_by_one = QueryAccess(jittered(), "scores", key=KEY)
    alone = torch.cat([one_by_one(IMAGES[:1]) for _ in range(6)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert len({tuple(row) for row in together.tolist()}) == 6
    other = QueryAccess(jittered(), "scores", key=stream_key(1, "image", "test"))(same)
    assert not torch.allclose(together, other)


def test_answers_are_those_of_the_target() -> None:
    digits = load_classifier("digits")
    assert torch.equal(QueryAccess(digits, "labels")(IMAGES), digits(IMAGES))
    assert torch.allclose(QueryAccess(digits, "scores")(IMAGES), digits.logits(IMAGES).softmax(1))
    plain = Defence("none", [Member(None, digits)])
    assert torch.equal(QueryAccess(plain, "labels")(IMAGES), digits(IMAGES))
    assert torch.allclose(QueryAccess(plain, "scores")(IMAGES), digits.logits(IMAGES).softmax(1))
    assert QueryAccess(plain, "labels").num_classes == 10
    assert not QueryAccess(plain, "labels").random
    assert QueryAccess(jittered(), "labels").random
    assert QueryAccess(lambda x: x.flatten(1), "labels")(IMAGES).tolist() == IMAGES.flatten(1).argmax(1).tolist()
    assert QueryAccess(lambda x: torch.full((len(x),), -1), "labels")(IMAGES).tolist() == [-1] * 6


@pytest.mark.parametrize("answers", ["labels", "scores"])
def test_answers_have_no_autograd_history(answers: Any) -> None:
    """No autograd history though the images ask for one; labels are whole numbers, so no score is left in them."""
    asked = IMAGES.clone().requires_grad_(True)
    for target in (load_classifier("digits"), jittered(), lambda x: (2 * x).flatten(1)):
        found = QueryAccess(target, answers, key=KEY)(asked)
        assert (found.requires_grad, found.grad_fn, found.device.type) == (False, None, "cpu")
        assert (found.dtype == torch.int64 and found.ndim == 1) == (answers == "labels")
    assert asked.grad is None


_INNER = (
    "__closure__",
    "__defaults__",
    "__kwdefaults__",
    "__func__",
    "__self__",
    "__wrapped__",
    "__dict__",
    "__call__",
)


def reachable(start: object) -> Iterator[object]:
    """Everything that attributes, slots, closures, defaults, containers and bound objects lead to.

    Not followed: modules and the globals of functions, through which Python leads everywhere.
    """
    seen: dict[int, object] = {}
    queue: list[object] = [start]
    while queue:
        here = queue.pop()
        if id(here) in seen or isinstance(here, types.ModuleType | type | str | bytes | int | float | type(None)):
            continue
        seen[id(here)] = here
        yield here
        if isinstance(here, Tensor):
            continue
        if isinstance(here, dict | types.MappingProxyType):
            queue += [*here.keys(), *here.values()]
        elif isinstance(here, list | tuple | set | frozenset):
            queue += list(here)
        elif isinstance(here, types.CellType):
            queue.append(here.cell_contents)
        names = {name for name in dir(here) if not name.startswith("__")} | set(_INNER)
        if isinstance(here, types.MethodWrapperType | types.BuiltinMethodType):
            names = {"__self__"}
        for name in names:
            with suppress(Exception):
                queue.append(getattr(here, name))


def parameters_within(start: object) -> int:
    return sum(isinstance(found, nn.Module | nn.Parameter | torch.Tensor) for found in reachable(start))


def test_no_attribute_leads_to_a_parameter() -> None:
    net = classifier()
    naked = types.SimpleNamespace(ask=lambda images: net(images))
    assert parameters_within(naked) > 3  # the search itself finds what a closure holds
    for target in (net, jittered(), naked.ask, net.forward):
        access = QueryAccess(target, "scores", budget=5)
        assert parameters_within(access) == 0
    assert not hasattr(access, "__dict__")
    with pytest.raises(AttributeError):
        access.target = net  # type: ignore[attr-defined]


def test_access_cannot_be_copied_and_ends_with_its_owner() -> None:
    access = QueryAccess(Counting(), "scores", budget=5)
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="its budget would be copied"):
            way(access)
    from certify.models import query_access as module

    token = access._token
    assert token in module._TABLE
    del access
    assert token not in module._TABLE


@pytest.mark.parametrize(
    ("target", "answers", "images", "error", "message"),
    [
        (lambda x: x.flatten(1).argmax(1), "scores", IMAGES, UserError, "it returns labels only"),
        (lambda x: x.flatten(1)[:1], "scores", IMAGES, UserError, r"returned \(1, 64\) torch.float32 for 6 images"),
        (lambda x: x.flatten(1)[:, 0], "labels", IMAGES, UserError, "expected whole-number labels"),
        (lambda x: x.flatten(1)[:1], "labels", IMAGES, UserError, "expected whole-number labels"),
        (lambda x: x.flatten(1) * float("nan"), "scores", IMAGES, RunFault, "not finite"),
        (Counting(), "scores", IMAGES + 0.5, UserError, r"outside \[0, 1\]"),
        (Counting(), "scores", IMAGES * float("nan"), UserError, r"outside \[0, 1\]"),
        (Counting(), "scores", IMAGES[0], UserError, r"expected \(B, C, H, W\)"),
        (Counting(), "logits", IMAGES, UserError, "expected 'labels' or 'scores'"),
    ],
)
def test_mistakes(target: Any, answers: Any, images: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QueryAccess(target, answers)(images)


def test_a_refused_image_is_not_counted() -> None:
    access = QueryAccess(Counting(), "scores", budget=6)
    with pytest.raises(UserError):
        access(IMAGES + 0.5)
    assert access.spent == 0
    with pytest.raises(UserError, match="budget -1"):
        QueryAccess(Counting(), "scores", budget=-1)
    loose = QueryAccess(Counting(), "scores", bounded=False)
    assert loose(IMAGES + 0.5).shape == (6, 3)
