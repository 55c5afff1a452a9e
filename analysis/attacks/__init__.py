"""Attacks by name, and what each may use; listing them imports neither torch nor a library of attacks.

An attack only proposes an image. What that image is worth is measured in :mod:`analysis.comparison.attacked`.
"""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from certify.errors import UserError
from certify.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from analysis.comparison.attacked import Attacked
    from certify.models.classifier import Classifier
    from certify.models.defence import Defence
    from certify.models.query_access import Answers

LABELS, SCORES = "labels", "scores"
CLASSIFIER, DEFENCE, SURROGATES = "gradients of the classifier", "gradients of the defence", "surrogates"
NORMS = ("linf", "l2")


@dataclass(frozen=True)
class Attack:
    """What an attack needs and knows; a call runs it on one image.

    Attributes:
        run: ``module:function``, ``(image (C, H, W), label, task, **options)`` to a proposal.
        needs: ``LABELS`` or ``SCORES`` of a target that is only asked, ``CLASSIFIER``, ``DEFENCE`` or ``SURROGATES``.
        groups: ``blind`` where it may be run without the purifier, ``adaptive`` where it may be run on the whole
            defended classifier; an attack that only asks may be either.
        norms: it can work in.
        ball: whether it works inside a ball; without one it looks for the nearest wrong image, if it is not given any.
        library: whether it needs the library of attacks.
    """

    run: str
    needs: str
    groups: tuple[str, ...]
    norms: tuple[str, ...] = NORMS
    ball: bool = True
    library: bool = True

    def __call__(self, *given: Any, **options: Any) -> Any:
        """Run it on one image; see :mod:`analysis.comparison.attacked`."""
        return self.function(*given, **options)

    @property
    def function(self) -> Any:
        """What ``run`` names."""
        return pkgutil.resolve_name(self.run)

    @property
    def options(self) -> list[str]:
        """Names of its own options."""
        return list(inspect.signature(self.function).parameters)[3:]

    @property
    def asks(self) -> bool:
        """Whether it works by queries alone."""
        return self.needs in (LABELS, SCORES)


BOTH = ("blind", "adaptive")
ATTACKS = Registry("attack", "certify.attacks")
ATTACKS.add(
    "hopskipjump",
    Attack("analysis.attacks.queries:hopskipjump", LABELS, BOTH, ball=False),
    "labels alone, the nearest wrong image; Chen, Jordan, Wainwright 2020",
)
ATTACKS.add(
    "square",
    Attack("analysis.attacks.queries:square", SCORES, BOTH),
    "scores alone, random squares; Andriushchenko et al. 2020",
)
ATTACKS.add(
    "transfer",
    Attack("analysis.attacks.gradients:transfer", SURROGATES, ("blind",)),
    "momentum over an ensemble of surrogates, diverse inputs; Dong et al. 2018, Xie et al. 2019",
)
ATTACKS.add(
    "blind-pgd",
    Attack("analysis.attacks.gradients:blind_pgd", CLASSIFIER, ("blind",)),
    "gradients of the classifier, which is all it knows; Madry et al. 2018",
)
ATTACKS.add(
    "adaptive-pgd",
    Attack("analysis.attacks.gradients:adaptive_pgd", DEFENCE, ("adaptive",)),
    "gradients of the whole defence, averaged over its draws; BPDA where it has none; Athalye et al. 2018",
)


def find_attack(name: str, norm: str | None = None) -> Attack:
    """The attack of this name, if it can work in this norm (None: in any).

    Raises:
        UserError: no such attack or norm.
    """
    found = ATTACKS.get(name)
    assert isinstance(found, Attack)
    if norm is not None and norm not in found.norms:
        raise UserError(f"attack {name}: norm {norm!r}; expected one of {', '.join(found.norms)}")
    return found


def check_attacks(names: Sequence[str], *, norm: str, surrogates: int = 0) -> None:
    """Refuse before anything is loaded: unknown attacks, a norm or surrogates that are missing, no library.

    Raises:
        UserError: any of these.
    """
    for name in names:
        if find_attack(name, norm).needs == SURROGATES and not surrogates:
            raise UserError(f"attack {name} needs surrogates: classifiers of the same task that stand for the target")
    for name in names:
        need_extra(name)


def check_surrogates(classifier: Classifier, surrogates: Sequence[Classifier]) -> None:
    """Refuse surrogates that cannot stand for this classifier.

    Raises:
        UserError: one of them knows another number of classes, or takes images of another size.
    """
    for one in surrogates:
        for what, found, wanted in (
            ("classes", one.num_classes, classifier.num_classes),
            ("input size", one.input.size, classifier.input.size),
        ):
            if found != wanted and None not in (found, wanted):  # None takes any size
                raise UserError(
                    f"surrogate {one.name}: {what} {found}; expected {wanted}, as {classifier.name} has: it must be a "
                    "classifier of the same task"
                )


def need_extra(name: str) -> None:
    """Refuse where the attack needs the library of attacks, and that is not installed.

    Raises:
        UserError: how to install it.
    """
    if find_attack(name).library and importlib.util.find_spec("art") is None:
        raise UserError(
            f"attack {name} needs adversarial-robustness-toolbox, which is not installed; "
            "pip install 'certify-toolkit[attacks]'"
        )


def crafter(
    classifier: Classifier,
    *,
    eps: float,
    norm: str,
    queries: int,
    steps: int,
    eot: int,
    seed: int = 0,
    surrogates: Sequence[Classifier] = (),
) -> Callable[[Any, Defence, Tensor, Tensor, Sequence[str]], Any]:
    """Attacks under one set of numbers, for a table of defences.

    Args:
        classifier: without its purifier.
        eps: radius of the ball in [0, 1] pixels.
        norm: ``linf`` or ``l2``.
        queries: images that an attack by queries may send, for each image.
        steps: of attacks by gradients.
        eot: passes a gradient, of a random defence.
        seed: of all attacks.
        surrogates: for transfer.

    Returns:
        ``craft(condition, target, images, labels, ids)``, where ``condition.name`` names the attack and ``target`` is
        the defence that it meets (the classifier alone where the attack is blind), to an ``Attacked``.

    Raises:
        UserError: surrogates of another task.
    """
    from analysis.comparison.attacked import attack
    from certify.models.query_access import QueryAccess
    from certify.smoothing.rng import stream_key

    check_surrogates(classifier, surrogates)
    numbers = {"steps": steps, "eot": eot}

    def craft(condition: Any, target: Defence, images: Tensor, labels: Tensor, ids: Sequence[str]) -> Attacked:
        name = condition.name
        found = find_attack(name, norm)
        access = []
        if found.asks:
            answers: Answers = "labels" if found.needs == LABELS else "scores"
            keys = [stream_key(seed, i, f"queries {name} {target.name}") for i in ids]
            access = [QueryAccess(target, answers, budget=queries, key=key) for key in keys]
        return attack(
            name,
            images,
            labels,
            ids,
            norm=norm,
            eps=eps,
            seed=seed,
            access=access,
            classifier=classifier,
            defence=target,
            surrogates=surrogates,
            **{option: value for option, value in numbers.items() if option in found.options},
        )

    return craft
