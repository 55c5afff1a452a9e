"""Attacks by name, and what each may use; listing them imports neither torch nor an attack library.

An attack only proposes images. They are measured in :mod:`analysis.comparison.attacked`.
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
    """An attack and its requirements; a call runs it on one image.

    Attributes:
        run: ``module:function``, ``(image (C, H, W), label, task, **options)`` to a proposal.
        needs: queries for ``LABELS`` or ``SCORES``, or ``CLASSIFIER``, ``DEFENCE`` or ``SURROGATES``.
        groups: ``blind`` if it can attack the classifier without purifier, ``adaptive`` if it can attack the whole
            defended classifier; attacks by queries can do both.
        norms: supported norms.
        ball: True if it needs a ball; otherwise it can also find the nearest misclassified image.
        library: True if it needs adversarial-robustness-toolbox.
    """

    run: str
    needs: str
    groups: tuple[str, ...]
    norms: tuple[str, ...] = NORMS
    ball: bool = True
    library: bool = True

    def __call__(self, *given: Any, **options: Any) -> Any:
        """Attack one image; see :mod:`analysis.comparison.attacked`."""
        return self.function(*given, **options)

    @property
    def function(self) -> Any:
        """The function that ``run`` names."""
        return pkgutil.resolve_name(self.run)

    @property
    def options(self) -> list[str]:
        """Names of the attack's options."""
        return list(inspect.signature(self.function).parameters)[3:]

    @property
    def by_queries(self) -> bool:
        """True if it works by queries alone."""
        return self.needs in (LABELS, SCORES)


BOTH = ("blind", "adaptive")
ATTACKS = Registry("attack", "certify.attacks")
ATTACKS.add(
    "hopskipjump",
    Attack("analysis.attacks.queries:hopskipjump", LABELS, BOTH, ball=False),
    "labels only, finds the nearest misclassified image; Chen, Jordan, Wainwright 2020",
)
ATTACKS.add(
    "square",
    Attack("analysis.attacks.queries:square", SCORES, BOTH),
    "scores only, random squares; Andriushchenko et al. 2020",
)
ATTACKS.add(
    "transfer",
    Attack("analysis.attacks.gradients:transfer", SURROGATES, ("blind",)),
    "momentum over an ensemble of surrogates, diverse inputs; Dong et al. 2018, Xie et al. 2019",
)
ATTACKS.add(
    "blind-pgd",
    Attack("analysis.attacks.gradients:blind_pgd", CLASSIFIER, ("blind",)),
    "gradients of the classifier, without knowledge of a defence; Madry et al. 2018",
)
ATTACKS.add(
    "adaptive-pgd",
    Attack("analysis.attacks.gradients:adaptive_pgd", DEFENCE, ("adaptive",)),
    "gradients of the whole defence, averaged over its draws; BPDA if it has none; Athalye et al. 2018",
)


def find_attack(name: str, norm: str | None = None) -> Attack:
    """Return an attack by name.

    Raises:
        UserError: no such attack, or it does not support the norm (None: any).
    """
    attack = ATTACKS.get(name)
    assert isinstance(attack, Attack)
    if norm is not None and norm not in attack.norms:
        raise UserError(f"attack {name}: norm {norm!r}; expected one of {', '.join(attack.norms)}")
    return attack


def check_attacks(names: Sequence[str], *, norm: str, surrogates: int = 0) -> None:
    """Refuse unknown attacks, unsupported norms, missing surrogates or a missing library, before anything is loaded.

    Raises:
        UserError: any of these.
    """
    for name in names:
        if find_attack(name, norm).needs == SURROGATES and not surrogates:
            raise UserError(f"attack {name} needs surrogates: other classifiers of the same task")
    for name in names:
        need_extra(name)


def check_surrogates(classifier: Classifier, surrogates: Sequence[Classifier]) -> None:
    """Refuse surrogates of another task than the classifier's.

    Raises:
        UserError: another number of classes or another input size.
    """
    for one in surrogates:
        for what, own, expected in (
            ("classes", one.num_classes, classifier.num_classes),
            ("input size", one.input.size, classifier.input.size),
        ):
            if own != expected and None not in (own, expected):  # None: any size
                raise UserError(
                    f"surrogate {one.name}: {what} {own}; expected {expected}, like {classifier.name}: a classifier of "
                    "the same task"
                )


def need_extra(name: str) -> None:
    """Refuse an attack whose library is not installed.

    Raises:
        UserError: with the command that installs it.
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
    """Return a function that runs attacks with fixed parameters, for a table of defences.

    Args:
        classifier: without its purifier.
        eps: radius of the ball in [0, 1] pixels.
        norm: ``linf`` or ``l2``.
        queries: query budget per image.
        steps: of attacks by gradients.
        eot: forward passes per gradient of a random defence.
        seed: of all attacks.
        surrogates: for transfer.

    Returns:
        ``craft(condition, target, images, labels, ids)``, which returns an ``Attacked``. ``condition.name`` names the
        attack; ``target`` is the attacked defence (the classifier alone for a blind attack).

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
        chosen = find_attack(name, norm)
        access = []
        if chosen.by_queries:
            answers: Answers = "labels" if chosen.needs == LABELS else "scores"
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
            **{option: value for option, value in numbers.items() if option in chosen.options},
        )

    return craft
