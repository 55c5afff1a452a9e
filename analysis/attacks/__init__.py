"""Registry of attacks and their requirements; listing them imports neither torch nor an attack library.

An attack only proposes images. They are measured in :mod:`analysis.comparison.attacked`.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from certify.errors import UserError
from certify.registry import Registry, unknown_name
from certify.smoothing.numeric import as_float, as_int
from certify.smoothing.rounding import exact

if TYPE_CHECKING:
    from torch import Tensor

    from analysis.comparison.attacked import Attacked
    from analysis.comparison.results import Condition
    from analysis.comparison.runner import Craft
    from certify.models.classifier import Classifier
    from certify.models.defence import Defence
    from certify.models.query_access import Answers

_EPS = "a distance above 0 in [0, 1] pixels, such as 8/255 (linf) or 0.5 (l2)"
_LEAST = {"queries": 1, "steps": 0, "eot": 1, "seed": 0}

LABELS, SCORES = "labels", "scores"
CLASSIFIER, DEFENCE, SURROGATES = "gradients of the classifier", "gradients of the defence", "surrogates"
NORMS = ("linf", "l2")


@dataclass(frozen=True)
class Attack:
    """An attack and its requirements; a call runs it on one image.

    Attributes:
        run: ``module:function`` of the clean image ``(C, H, W)``, its true class, a
            :class:`~analysis.comparison.attacked.Task` and the attack's own options, which returns a
            :class:`~analysis.comparison.attacked.Proposal`.
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
        """True if it needs only queries."""
        return self.needs in (LABELS, SCORES)


BOTH = ("blind", "adaptive")
GROUPS = {"both": BOTH, "blind": ("blind",), "adaptive": ("adaptive",)}
"""Groups of conditions by the name of the option that selects them."""

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


@dataclass(frozen=True)
class AttackSettings:
    """Attacks and their parameters.

    Attributes:
        names: names of the attacks.
        eps: radius of the norm ball in [0, 1] pixels.
        norm: norm of the ball.
        queries: maximum number of queries per image for each attack.
        steps: gradient steps of gradient-based attacks.
        eot: forward passes per gradient of a random defence.
        seed: seed of all random numbers.
        surrogates: surrogates for the attack ``transfer``.
        eps_text: ``eps`` as the user wrote it; by default a short decimal, or a fraction of 255.
    """

    names: Sequence[str]
    eps: float
    norm: str
    queries: int
    steps: int
    eot: int
    seed: int
    surrogates: Sequence[Classifier] = ()
    eps_text: str = ""

    def __post_init__(self) -> None:
        eps = as_float(self.eps, "eps", _EPS)
        if not 0 < eps < math.inf:
            raise UserError(f"eps = {exact(eps)}: expected {_EPS}")
        if self.norm not in NORMS:
            raise UserError(f"norm {self.norm!r}; expected one of {', '.join(NORMS)}")
        checked: dict[str, float | str] = {"eps": eps, "eps_text": self.eps_text or _distance_text(eps)}
        for name, least in _LEAST.items():
            checked[name] = as_int(getattr(self, name), name)
            if checked[name] < least:  # type: ignore[operator]
                raise UserError(f"{name} = {checked[name]}: expected a whole number from {least}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def record(self) -> dict[str, object]:
        """Return the settings that the comparison's header records besides those of its plan."""
        surrogates = [one.identity() for one in self.surrogates]
        numbers = {"eps_text": self.eps_text, "queries": self.queries, "steps": self.steps, "eot": self.eot}
        record = {**numbers, "surrogates": surrogates}
        if any(not one.closed for one in self.surrogates):
            record["surrogate_records"] = [one.record() for one in self.surrogates]
        return record


def _distance_text(eps: float) -> str:
    """Format a distance without rounding it, as a fraction of 255 where that is shorter."""
    decimal, fraction = exact(eps), f"{round(255 * eps)}/255"
    return fraction if round(255 * eps) / 255 == eps and len(fraction) < len(decimal) else decimal


def check_attacks(names: Sequence[str], *, norm: str, group: str = "both", surrogates: int = 0) -> None:
    """Check, before anything is loaded, that attacks are known and can run.

    Args:
        names: names of the attacks.
        norm: norm of their ball.
        group: ``"both"``, ``"blind"`` or ``"adaptive"``.
        surrogates: number of surrogates.

    Raises:
        UserError: an unknown attack or group, an unsupported norm, missing or unused surrogates, a missing library.
    """
    if group not in GROUPS:
        raise unknown_name("group", group, GROUPS)
    if len(set(names)) < len(names):
        raise UserError(f"attacks {', '.join(names)}: expected each once")
    if surrogates and not any(find_attack(name).needs == SURROGATES for name in names):
        raise UserError("surrogates without the attack transfer: leave them out, or add transfer to the attacks")
    for name in names:
        attack = find_attack(name, norm)
        if not set(GROUPS[group]) & set(attack.groups):
            raise UserError(
                f"group {group}: attack {name} is {attack.groups[0]} only; leave out the attack or the group"
            )
        if attack.needs == SURROGATES and not surrogates:
            raise UserError(f"attack {name} needs surrogates: other classifiers of the same task")
    for name in names:
        need_extra(name)


def check_surrogates(classifier: Classifier, surrogates: Sequence[Classifier]) -> None:
    """Check that surrogates have the classifier's classes and input size.

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
    """Check that the library of an attack is installed.

    Raises:
        UserError: it is not; the message has the command that installs it.
    """
    if find_attack(name).library and importlib.util.find_spec("art") is None:
        raise UserError(
            f"attack {name} needs adversarial-robustness-toolbox, which is not installed; "
            "pip install 'certify-toolkit[attacks]'"
        )


def crafter(classifier: Classifier, settings: AttackSettings) -> Craft:
    """Return a function that runs attacks with these settings, for a table of defences.

    Args:
        classifier: the classifier without its purifier.
        settings: settings of all attacks.

    Returns:
        ``craft(condition, target, images, labels, ids)``, which returns an ``Attacked``. ``condition.name`` names the
        attack; ``target`` is the attacked defence (the classifier alone for a blind attack).

    Raises:
        UserError: surrogates of another task.
    """
    from analysis.comparison.attacked import attack
    from certify.models.query_access import QueryAccess
    from certify.smoothing.rng import stream_key

    check_surrogates(classifier, settings.surrogates)
    numbers = {"steps": settings.steps, "eot": settings.eot}

    def craft(condition: Condition, target: Defence, images: Tensor, labels: Tensor, ids: Sequence[str]) -> Attacked:
        name = condition.name
        chosen = find_attack(name, settings.norm)
        access = []
        if chosen.by_queries:
            answers: Answers = "labels" if chosen.needs == LABELS else "scores"
            keys = [stream_key(settings.seed, i, f"queries {name} {target.name}") for i in ids]
            access = [QueryAccess(target, answers, budget=settings.queries, key=key) for key in keys]
        return attack(
            name,
            images,
            labels,
            ids,
            norm=settings.norm,
            eps=settings.eps,
            seed=settings.seed,
            access=access,
            classifier=classifier,
            defence=target,
            surrogates=settings.surrogates,
            **{option: value for option, value in numbers.items() if option in chosen.options},
        )

    return craft
