"""Compare defences of a frozen classifier: accuracies without attack and under attacks, beside certificates.

:func:`compare` is the function for scripts. ``certify compare`` and ``certify inspect`` load the objects that their
options name, and share the rest: :func:`attack_context` and :class:`PlannedComparison`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from certify.api import DataOptions, check_options, chosen_options, collect_images, progress_bar
from certify.errors import CertifyWarning, ImageError, UserError, first_line
from certify.smoothed_classifier import ModelOptions

if TYPE_CHECKING:
    from analysis.attacks import AttackSettings
    from analysis.comparison.results import Comparison
    from analysis.comparison.runner import Craft, Plan
    from certify.images.dataset import ImageSet
    from certify.models.classifier import Classifier
    from certify.models.defence import Defence
    from certify.runs.records import ComparisonHeader
    from certify.runs.run_file import ComparisonFile

DEFENCES = ("none", "gs", "median", "bits", "jpeg", "tv")
ATTACKS = ("blind-pgd", "square")

Warn = Callable[[str], None]


class Options(ModelOptions, DataOptions, total=False):
    """Further options of a comparison.

    Attributes:
        strict: stop at the first image that cannot be read, instead of leaving it out.
        trust_identity: resume a file that cannot prove that its models are still the same.
        progress: show a progress bar, in a terminal or notebook.
    """

    strict: bool
    trust_identity: bool
    progress: bool


def compare(
    model: Any,
    images: Any,
    labels: Any = None,
    *,
    defences: Mapping[str, Any] | Sequence[Any] = DEFENCES,
    attacks: Sequence[str] = ATTACKS,
    eps: float = 8 / 255,
    norm: str = "linf",
    group: str = "both",
    surrogates: Sequence[Any] = (),
    queries: int = 1000,
    steps: int = 40,
    eot: int = 10,
    repeats: int = 5,
    certify_n: int = 1000,
    alpha: float = 0.001,
    seed: int = 0,
    out: str | Path | None = None,
    **options: Unpack[Options],
) -> Comparison:
    """Compare defences of a frozen classifier on the same images, under the same attacks.

    Accuracy under an attack is an upper bound on robust accuracy; only the certified column, for denoised smoothing, is
    a guarantee: each of its certificates is wrong with probability at most alpha over the noise draws. The same call as
    ``certify compare``, option by option: its file is the same.

    Args:
        model: as for :func:`certify`.
        images: as for :func:`certify`; all of one size.
        labels: as for :func:`certify`; required unless the data has its own.
        defences: names as of ``--defences`` (``"none"`` is the classifier alone), modules or functions from images
            ``(B, C, H, W)`` to images, or :class:`certify.models.defence.Defence` objects; or a mapping from the names
            in the table to these.
        attacks: names (``certify list attacks``); empty for none.
        eps: radius of the attacks' norm ball, in [0, 1] pixels.
        norm: of the ball, ``"linf"`` or ``"l2"``.
        group: ``"blind"`` attacks the classifier alone, ``"adaptive"`` the whole defence, ``"both"`` does both.
        surrogates: classifiers for the attack ``transfer``: names, ``"NAME=WEIGHTS"``, modules or functions.
        queries: maximum number of queries per image for each attack.
        steps: of attacks by gradients.
        eot: forward passes per gradient of a random defence (expectation over transformation).
        repeats: answers of a random defence per image.
        certify_n: maximum number of noise samples per image for the certified column; 0 leaves the column out.
        alpha: failure probability of each certificate.
        seed: of everything random.
        out: file to write or resume (``.jsonl``); None keeps the comparison in memory.
        **options: keyword arguments of :func:`load_classifier` and :func:`load_images`, and ``strict``,
            ``trust_identity``, ``progress`` (:class:`certify.comparing.Options`).

    Returns:
        The comparison: ``table()``, ``plot()``, ``to_pandas()``, and a row per image, defence and condition.

    Raises:
        UserError: arguments out of range, unknown names, or images that cannot be used or have no labels.
        RunFault: an attack refutes a certificate.
    """
    from analysis.attacks import AttackSettings, check_attacks
    from analysis.runs import read_comparison
    from certify.runs.run_file import ComparisonFile

    check_options(Options, options)
    settings = AttackSettings(attacks, eps, norm, queries, steps, eot, seed)
    check_attacks(attacks, norm=norm, group=group, surrogates=len(surrogates))
    named = name_defences(defences)
    classifier, chosen, name = _load(model, images, labels, options)
    chosen = readable_images(chosen, strict=options.get("strict", False), warn=_warn)
    size = classifier.input.size
    settings = dataclasses.replace(settings, surrogates=tuple(_surrogate(one, size) for one in surrogates))
    trust = options.get("trust_code", False)
    context = attack_context(classifier, chosen, named, settings, trust_code=trust, warn=_warn)
    planned = PlannedComparison.of(
        context,
        group,
        repeats=repeats,
        certify_n=certify_n,
        alpha=alpha,
        model=name,
        data=str(images) if isinstance(images, str | Path) else chosen.name,
        command="certify.compare",
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if out is None else None
        path = folder / "comparison.jsonl" if folder else Path(str(out))
        trusted = options.get("trust_identity", False)
        file = stack.enter_context(ComparisonFile(path, planned.header, trust_identity=trusted))
        bar = progress_bar(planned.header.expected, 0, " outcomes", shown=options.get("progress", True))
        planned.run(file, stack.enter_context(bar))
        comparison = read_comparison(path)
    comparison.require_sound()
    return comparison


def name_defences(defences: Mapping[str, Any] | Iterable[Any]) -> dict[str, Any]:
    """Return defences by name, and refuse unknown names before anything is loaded.

    Raises:
        UserError: an unknown name, two defences of one name, or none.
    """
    from denoisers.names import check_defence

    if not isinstance(defences, Mapping):
        listed = [defences] if isinstance(defences, str) else list(defences)
        names = [one if isinstance(one, str) else _name_of(one) for one in listed]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"two defences named {twice}; expected a mapping from names to defences")
        defences = dict(zip(names, listed, strict=True))
    if not defences:
        raise UserError("no defences to compare; expected one or more, such as 'none', the classifier alone")
    for one in defences.values():
        if isinstance(one, str):
            check_defence(one)
    return dict(defences)


def _name_of(defence: Any) -> str:
    """Return the name of a defence that is an object: that of a function or class."""
    return str(getattr(defence, "name", None) or getattr(defence, "__name__", type(defence).__name__))


def _load(model: Any, images: Any, labels: Any, options: Mapping[str, Any]) -> tuple[Classifier, ImageSet, str]:
    """Return the classifier, the images at its input, and its name."""
    from certify.images.dataset import load_images
    from certify.models.classifier import Classifier
    from certify.models.load import load_classifier

    of_data, of_model = chosen_options(DataOptions, options), chosen_options(ModelOptions, options)
    collection = collect_images(images, labels, of_data)
    if isinstance(model, Classifier):
        if of_model:
            raise UserError(f"{min(of_model)} with a loaded classifier: expected it in load_classifier")
        classifier = model
    else:
        if collection is not None and not isinstance(model, str) and not hasattr(model, "input_size"):
            of_model.setdefault("input_size", collection.first_shape())
        classifier = load_classifier(model, **of_model)
    if collection is None:
        chosen = load_images(str(images), classifier, labels=labels, **of_data)
    else:
        chosen = collection.image_set(classifier.input, classifier.num_classes, **of_data)
    classifier.probe_size = classifier.probe_size or chosen.first_shape()
    return classifier, chosen, classifier.name


def _surrogate(model: Any, size: tuple[int, int, int] | None) -> Classifier:
    """Return a surrogate: a name, ``NAME=WEIGHTS``, or a module or function for images of this size."""
    from certify.models.classifier import Classifier
    from certify.models.load import load_classifier

    if isinstance(model, Classifier):
        return model
    if isinstance(model, str):
        name, _, weights = model.partition("=")
        return load_classifier(name, weights=weights or None)
    return load_classifier(model, input_size=size)


@dataclass(frozen=True)
class AttackContext:
    """A classifier, the images to attack, and its defences.

    Attributes:
        classifier: frozen.
        images: with labels; all of them can be read.
        defences: by name; a text is the reason why one could not be built.
        attacks: their settings.
        craft: runs an attack under a condition (:func:`analysis.attacks.crafter`).
    """

    classifier: Classifier
    images: ImageSet
    defences: Mapping[str, Defence | str]
    attacks: AttackSettings
    craft: Craft


def attack_context(
    classifier: Classifier,
    images: ImageSet,
    defences: Mapping[str, Any],
    attacks: AttackSettings,
    *,
    trust_code: bool = False,
    warn: Warn,
) -> AttackContext:
    """Build the defences of a classifier, and the function that attacks them.

    Args:
        classifier: frozen.
        images: that can be read (:func:`readable_images`).
        defences: by name (:func:`name_defences`).
        attacks: their settings.
        trust_code: run code in model files.
        warn: called with the reason if a defence cannot be built.

    Raises:
        UserError: images without labels or of several sizes, a mistake in the options of a defence, or surrogates of
            another task.
    """
    from analysis.attacks import crafter

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


def build_defence(
    name: str, defence: Any, classifier: Classifier, *, trust_code: bool = False, warn: Warn
) -> Defence | str:
    """Return a defence of the classifier, or why it cannot be built: then only its own row is left without figures.

    Args:
        name: in the table.
        defence: text, module, function or ``Defence``.
        classifier: frozen.
        trust_code: run code in model files.
        warn: called with the reason.

    Raises:
        UserError: a mistake in the name or its options.
    """
    from certify.models.defence import Defence, Member
    from denoisers.adapters import adapt
    from denoisers.defences import build_defence as build

    if isinstance(defence, Defence):
        return defence
    try:
        if isinstance(defence, str):
            return build(defence, classifier, trust_code=trust_code)
        return Defence(name, [Member(adapt(defence), classifier)])
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        warn(f"defence {name}: {reason}; its row is left without figures")
        return reason


@dataclass(frozen=True)
class PlannedComparison:
    """A comparison that is ready to run.

    Attributes:
        context: classifier, images, defences and attacks.
        plan: conditions and parameters.
        bare: the classifier alone, which blind attacks target.
        header: of its file.
    """

    context: AttackContext
    plan: Plan
    bare: Defence
    header: ComparisonHeader

    @classmethod
    def of(
        cls,
        context: AttackContext,
        group: str,
        *,
        repeats: int,
        certify_n: int,
        alpha: float,
        model: str,
        data: str,
        command: str,
    ) -> PlannedComparison:
        """Plan the comparison, and check each defence on the first image.

        Args:
            context: what is compared.
            group: of attacks: ``"both"``, ``"blind"`` or ``"adaptive"``.
            repeats: answers of a random defence per image.
            certify_n: maximum number of samples for the certified column; 0 leaves it out.
            alpha: failure probability of each certificate.
            model: name of the classifier, for the header.
            data: name of the images, for the header.
            command: for the header.

        Raises:
            ContractError: a denoiser or classifier is not a fixed function of one image.
        """
        from analysis.attacks import GROUPS, find_attack
        from analysis.comparison.results import Condition
        from analysis.comparison.runner import CLEAN, RANDOM, SMOOTHING, Plan, applies, check_defences, make_header
        from denoisers.defences import undefended

        attacks, defences, images = context.attacks, context.defences, context.images
        conditions = [CLEAN, RANDOM]
        for one in GROUPS[group]:
            conditions += [Condition(name, one) for name in attacks.names if one in find_attack(name).groups]
        if certify_n and any(applies(defence, SMOOTHING) for defence in defences.values()):
            conditions.append(SMOOTHING)
        plan = Plan(conditions, attacks.eps, attacks.norm, repeats, attacks.seed, certify_n, alpha, attacks.record())
        bare = undefended(context.classifier)
        check_defences({"": bare, **defences}, images, plan)
        header = make_header(plan, defences, images, model=model, data=data, command=command)
        return cls(context, plan, bare, header)

    def run(self, file: ComparisonFile, progress: Callable[[int], None]) -> None:
        """Run whatever is missing in the file; ``progress`` is called with the number of new outcomes."""
        from analysis.comparison.runner import compare as run_all

        context = self.context
        run_all(context.defences, self.bare, context.images, self.plan, file, context.craft, progress)


def one_size(images: str, sizes: Collection[tuple[int, ...]]) -> tuple[int, int, int]:
    """Return the size (C, H, W) that all of these images have; refuse several, which do not fit into a batch."""
    if len(sizes) != 1:
        raise UserError(f"{images} have {len(sizes)} sizes; expected one: pass --input-size CxHxW")
    ((channels, height, width),) = sizes
    return channels, height, width


def readable_images(images: ImageSet, *, strict: bool, warn: Warn) -> ImageSet:
    """Leave out images that cannot be read, so that everything is measured on the same ones.

    Raises:
        ImageError: one cannot be read, and ``strict``.
        UserError: none can be read.
    """
    kept = []
    for index, item in enumerate(images.items):
        try:
            images.load(index)
        except ImageError as error:
            if strict:
                raise ImageError(f"{item.id}: {error}") from None
            warn(f"{item.id}: {error}; it is left out")
        else:
            kept.append(index)
    if not kept:
        raise UserError(f"none of the {len(images)} images of {images.name} can be read; expected one or more")
    items, labels = [images.items[i] for i in kept], [images.labels[i] for i in kept]
    return dataclasses.replace(images, items=items, labels=labels)


def _warn(text: str) -> None:
    warnings.warn(text, CertifyWarning, stacklevel=4)
