"""Prepare a comparison: the defences of a classifier, the conditions, and the file's header."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from analysis.attacks import GROUPS, AttackSettings, crafter, find_attack
from analysis.comparison.results import Condition
from certify.engine.contract import breakage_left, check_defence
from certify.errors import UserError, first_line, warn
from certify.images.dataset import ImageSet
from certify.models.classifier import Classifier
from certify.models.defence import Defence, Member
from certify.runs.comparison_records import ComparisonHeader, ConditionRecord, DefenceRecord
from certify.runs.config import versions
from certify.runs.records import SCHEMA
from certify.smoothing.certificates import check_counts
from certify.smoothing.noise import Gaussian
from certify.smoothing.numeric import as_int
from certify.smoothing.procedures import Decide
from certify.smoothing.rng import stream_key
from denoisers.adapters import Adapted, adapt
from denoisers.defences import Noisy, undefended
from denoisers.defences import build_defence as build

if TYPE_CHECKING:
    from analysis.comparison.runner import Craft

CLEAN = Condition("clean", "plain")
RANDOM = Condition("random noise", "plain")
SMOOTHING = Condition("smoothing", "certified")


@dataclass(frozen=True)
class AttackContext:
    """A classifier, the images to attack, and its defences.

    Attributes:
        classifier: the frozen classifier.
        images: readable images with labels.
        defences: defences by name, or the reason why one could not be built.
        attacks: settings of the attacks.
        craft: runs an attack under a condition (:func:`analysis.attacks.crafter`).
    """

    classifier: Classifier
    images: ImageSet
    defences: Mapping[str, Defence | str]
    attacks: AttackSettings
    craft: Craft

    @cached_property
    def bare(self) -> Defence:
        """The classifier alone, which blind attacks target."""
        return undefended(self.classifier)

    def check_defences(self) -> None:
        """Check each defence on the first image; one that raises an error fails its own column later.

        Raises:
            ContractError: a denoiser or classifier is not a fixed function of one image.
        """
        for defence in (self.bare, *self.defences.values()):
            if isinstance(defence, Defence):
                with breakage_left():
                    key = stream_key(self.attacks.seed, self.images.items[0].id, "contract")
                    check_defence(defence, self.images.load(0), key)


def attack_context(
    classifier: Classifier,
    images: ImageSet,
    defences: Mapping[str, Any],
    attacks: AttackSettings,
    *,
    trust_code: bool = False,
    warn: Callable[[str], None],
) -> AttackContext:
    """Build the defences of a classifier, and the function that attacks them.

    Args:
        classifier: the frozen classifier.
        images: readable images.
        defences: texts, modules, functions or ``Defence`` objects, by the name in the table.
        attacks: settings of the attacks.
        trust_code: whether to run code in model files.
        warn: called with the reason if a defence cannot be built.

    Raises:
        UserError: images without labels or of several sizes, a mistake in the options of a defence, or surrogates of
            another task.
    """
    if classifier.input.size is None:  # attacks take batches
        one_size(f"the images of {images.name}", {tuple(images.load(i).shape) for i in range(len(images))})
    if not images.labelled:
        raise UserError(
            f"{images.name} has no labels, and accuracies need them; expected labels, or a folder for each class"
        )
    built = {
        name: build_defence(name, one, classifier, trust_code=trust_code, warn=warn) for name, one in defences.items()
    }
    return AttackContext(classifier, images, built, attacks, crafter(classifier, attacks))


def one_size(images: str, sizes: Collection[tuple[int, ...]]) -> tuple[int, int, int]:
    """Return the common size (C, H, W) of the images; images of several sizes do not fit into a batch."""
    if len(sizes) != 1:
        raise UserError(f"{images} have {len(sizes)} sizes; expected one: pass --input-size CxHxW")
    ((channels, height, width),) = sizes
    return channels, height, width


def build_defence(
    name: str, defence: Any, classifier: Classifier, *, trust_code: bool = False, warn: Callable[[str], None]
) -> Defence | str:
    """Return a defence of the classifier, or the reason why it cannot be built, which fails only its own row.

    Raises:
        UserError: a mistake in the name or its options.
    """
    if isinstance(defence, Defence):
        return defence
    if not isinstance(defence, str) and (not callable(defence) or isinstance(defence, type)):
        raise UserError(
            f"defence {name}: expected a name, a module or a function of images, not {type(defence).__name__}"
        )
    try:
        if isinstance(defence, str):
            return build(defence, classifier, trust_code=trust_code)
        module = adapt(defence)
        if isinstance(module, Adapted) and module.level is not None:
            raise UserError(
                f"defence {name} needs the noise level, and no noise is added; expected a function of images"
            )
        return Defence(name, [Member(module, classifier)])
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        warn(f"defence {name}: {reason}; its row is left without figures")
        return reason


def smoothing_of(defence: Defence | str) -> Noisy | None:
    """Return noise and denoiser of a defence that is a smoothed classifier, otherwise None."""
    if isinstance(defence, str) or len(defence.purifiers) != 1 or defence.combine != "vote":
        return None
    (purifier,) = defence.purifiers
    return purifier if isinstance(purifier, Noisy) else None


def applies(defence: Defence | str, condition: Condition) -> bool:
    """True if a defence is evaluated under a condition: certificates exist for smoothing only."""
    return condition.group != "certified" or smoothing_of(defence) is not None


@dataclass(frozen=True)
class Plan:
    """Conditions and parameters of a comparison.

    Attributes:
        conditions: in the order of the table.
        attacks: parameters of the attacks, and the seed.
        repeats: answers per image of a random defence.
        certify_n: maximum number of samples per image for the certified column; 0 omits the column.
        alpha: failure probability of each certificate.
    """

    conditions: Sequence[Condition]
    attacks: AttackSettings
    repeats: int = 5
    certify_n: int = 1000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        _, repeats, alpha = check_counts(1, self.repeats, self.alpha)
        n = as_int(self.certify_n, "certify_n")
        if n < 0:
            raise UserError(f"certify_n = {n}: expected a whole number from 0")
        for name, value in (("certify_n", n), ("repeats", repeats), ("alpha", alpha)):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, context: AttackContext, group: str, *, repeats: int, certify_n: int, alpha: float) -> Plan:
        """Return the plan with all conditions that apply.

        Args:
            context: defences and attacks.
            group: group of attacks: ``"both"``, ``"blind"`` or ``"adaptive"``.
            repeats: as the attribute.
            certify_n: as the attribute.
            alpha: as the attribute.
        """
        conditions = [CLEAN, RANDOM]
        for one in GROUPS[group]:
            conditions += [Condition(name, one) for name in context.attacks.names if one in find_attack(name).groups]
        if certify_n and any(applies(defence, SMOOTHING) for defence in context.defences.values()):
            conditions.append(SMOOTHING)
        plan = cls(conditions, context.attacks, repeats, certify_n, alpha)
        if SMOOTHING in conditions:
            plan._warn_of_reach(context)
        return plan

    def _warn_of_reach(self, context: AttackContext) -> None:
        """Warn, before any attack, about defences whose certified column can only be 0 within ``certify_n``."""
        radius = self.l2_radius(context.images.load(0).numel())
        for name, defence in context.defences.items():
            smoothing = smoothing_of(defence)
            if smoothing is None:
                continue
            try:
                prospects = Decide((radius,), self.certify_n, self.alpha).prospects(Gaussian(smoothing.sigma))
                reasons = [text.replace("--n", "--certify-n") for text in prospects.warnings]
            except UserError as error:  # the noise cannot certify it with any number of samples
                reasons = [str(error)]
            for reason in reasons:
                warn(f"defence {name}: {reason}, or the certified column is 0")

    def l2_radius(self, values: int) -> float:
        """Return the l2 radius that contains the ball of the attacks, for images of so many values."""
        return self.attacks.eps * (1.0 if self.attacks.norm == "l2" else values**0.5)


def make_header(plan: Plan, context: AttackContext, *, model: str, data: str, command: str = "") -> ComparisonHeader:
    """Return the header of the file: everything that determines the results, and the expected number of lines."""
    images, attacks, defences = context.images, plan.attacks, context.defences
    described = [
        {"named": named, **(d.describe() if isinstance(d, Defence) else {"frozen": True, "built": False})}
        for named, d in defences.items()
    ]
    cells = sum(applies(d, c) for d in defences.values() for c in plan.conditions)
    settings = ComparisonHeader.from_json({"expected": cells * len(images), **attacks.record()}, "the comparison")
    return settings.replace(
        schema=SCHEMA,
        model=model,
        data=data,
        norm=attacks.norm,
        eps=attacks.eps,
        l2_radius=plan.l2_radius(math.prod(images.input.size or images.first_shape() or ())),
        repeats=plan.repeats,
        seed=attacks.seed,
        certify_n=plan.certify_n,
        alpha=plan.alpha,
        conditions=[ConditionRecord(name=c.name, group=c.group) for c in plan.conditions],
        defences=[DefenceRecord.from_json(one) for one in described],
        images={**images.describe(), "chosen": len(images)},
        versions=versions(),
        command=command,
    )
