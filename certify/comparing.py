"""Compare defences of a frozen classifier under attacks, next to certificates; measure a denoiser.

:func:`compare` and :func:`evaluate_denoiser` are for scripts. The commands load the objects that their options name,
and take the same steps (:mod:`analysis.comparison.plan`, :mod:`analysis.comparison.runner`; :mod:`training.evaluate`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from certify.api import DataOptions, collect_images
from certify.errors import ImageError, UserError
from certify.errors import warn as _warn
from certify.registry import check_options, chosen_options
from certify.runs.progress import progress_bar
from certify.smoothed_classifier import ModelOptions, SmoothedClassifier, find_denoiser

if TYPE_CHECKING:
    import torch

    from analysis.comparison.results import Comparison
    from certify.images.dataset import ImageSet
    from certify.models.classifier import Classifier
    from training.evaluate import DenoiserReport

DEFENCES = ("none", "gs", "median", "bits", "jpeg", "tv")
ATTACKS = ("blind-pgd", "square")

Warn = Callable[[str], None]


class Options(ModelOptions, DataOptions, total=False):
    """Further options of a comparison or evaluation.

    Attributes:
        strict: stop at the first image that cannot be read, instead of leaving it out.
        trust_identity: resume a file that cannot prove that its models are still the same.
        progress: False shows nothing; a number prints a line every so many seconds instead of a bar.
    """

    strict: bool
    trust_identity: bool
    progress: bool | float


def compare(
    model: Any,
    images: Any,
    labels: Any = None,
    *,
    defences: Mapping[str, Any] | Sequence[Any] = DEFENCES,
    attacks: str | Sequence[str] = ATTACKS,
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
    a guarantee: each of its certificates is wrong with probability at most alpha over the noise draws. The
    options and the file are those of ``certify compare``.

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
    from analysis.comparison.plan import Plan, attack_context, make_header
    from analysis.comparison.runner import compare as run
    from analysis.runs import read_comparison
    from certify.models.load import as_classifier
    from certify.runs.run_file import ComparisonFile

    check_options(Options, options, compare)
    if isinstance(model, SmoothedClassifier):
        raise UserError("a SmoothedClassifier: expected its base classifier, and the defence denoised:sigma=SIGMA")
    attacks = [attacks] if isinstance(attacks, str) else list(attacks)
    settings = AttackSettings(attacks, eps, norm, queries, steps, eot, seed)
    check_attacks(attacks, norm=norm, group=group, surrogates=len(surrogates))
    named = name_defences(defences)
    classifier, chosen = _load(model, images, labels, options)
    if classifier is None:
        raise UserError("model = None: expected a classifier")
    chosen = readable_images(chosen, strict=options.get("strict", False), warn=_warn)
    size = classifier.input.size
    settings = dataclasses.replace(settings, surrogates=tuple(as_classifier(one, size) for one in surrogates))
    trust = options.get("trust_code", False)
    context = attack_context(classifier, chosen, named, settings, trust_code=trust, warn=_warn)
    context.check_defences()
    plan = Plan.of(context, group, repeats=repeats, certify_n=certify_n, alpha=alpha)
    data = str(images) if isinstance(images, str | Path) else chosen.name
    header = make_header(plan, context, model=classifier.name, data=data, command="certify.compare")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if out is None else None
        path = folder / "comparison.jsonl" if folder else Path(str(out))
        trusted = options.get("trust_identity", False)
        file = stack.enter_context(ComparisonFile(path, header, trust_identity=trusted))
        bar = progress_bar(header.expected, "outcomes", shown=options.get("progress", True))
        run(context, plan, file, stack.enter_context(bar).update)
        comparison = read_comparison(path)
    comparison.require_sound()
    return comparison


def evaluate_denoiser(
    denoiser: Any,
    images: Any,
    labels: Any = None,
    *,
    sigma: float,
    model: Any = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    **options: Unpack[Options],
) -> DenoiserReport:
    """Measure a denoiser on images plus Gaussian noise, one noise draw per image: PSNR, SSIM and accuracies.

    These are empirical figures, not certificates; they are those of ``certify evaluate-denoiser`` on the same images.

    Args:
        denoiser: name as of ``--denoiser``, module, or function of noisy images with or without the noise level.
        images: as for :func:`certify`.
        labels: as for :func:`certify`; used with a model only.
        sigma: standard deviation of the noise, in [0, 1] pixels.
        model: as for :func:`certify`; None measures images alone.
        seed: of the noise.
        device: of denoiser and classifier.
        **options: keyword arguments of :func:`load_images`, with a model those of :func:`load_classifier`, ``strict``,
            and ``progress`` (:class:`certify.comparing.Options`).

    Returns:
        PSNR in dB, SSIM (with scikit-image), and with a model its accuracy and its agreement with its labels of the
        clean images, for noisy and denoised images.

    Raises:
        UserError: an unknown name, sigma out of range, or images that cannot be used.
        ContractError: denoiser or classifier is not a fixed function of one image.
    """
    from certify.engine.hardware import find_device
    from training.evaluate import Example, measure, summarise

    check_options(Options, options, evaluate_denoiser)
    classifier, chosen = _load(model, images, labels, options)
    chosen = readable_images(chosen, strict=options.get("strict", False), warn=_warn)
    size = chosen.input.size or chosen.first_shape()
    identity = None if classifier is None else classifier.identity
    module = find_denoiser(denoiser, sigma, size, identity, trust_code=options.get("trust_code", False))
    if module is None:
        raise UserError(f"denoiser = {denoiser!r}: expected a denoiser to measure")
    where = str(find_device(device))
    with progress_bar(len(chosen), "images", shown=options.get("progress", True)) as bar:

        def examples() -> Iterator[Example]:
            for i, item in enumerate(chosen.items):
                yield Example(item.id, chosen.load(i), chosen.labels[i])
                bar.update()

        behind = None if classifier is None else classifier.to(where)
        outcomes = measure(module.eval().to(where), examples(), sigma, classifier=behind, seed=seed, device=where)
        return summarise(outcomes, sigma, seed)


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


def _load(model: Any, images: Any, labels: Any, options: Mapping[str, Any]) -> tuple[Classifier | None, ImageSet]:
    """Return the classifier and the images at its input; without a model, the images without labels."""
    from certify.images.dataset import InputOnly, load_images
    from certify.models.classifier import Classifier
    from certify.models.load import load_classifier

    of_data, of_model = chosen_options(DataOptions, options), chosen_options(ModelOptions, options)
    collection = collect_images(images, labels, of_data)
    if model is None:
        if given := sorted(of_model.keys() - {"input_size", "trust_code"}):
            raise UserError(f"{given[0]} without a model: leave it out, or pass the model")
        view = InputOnly.at(options.get("input_size"))
        if collection is None:
            return None, load_images(str(images), view, labels="none", **of_data)
        return None, collection.without_labels().image_set(view.input, 0, **of_data)
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
    return classifier, chosen


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
