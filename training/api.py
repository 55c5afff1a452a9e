"""Train from Python or by options: one transaction for :func:`train_denoiser` and the command ``certify train``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
from torch import nn

from certify.engine.hardware import detect_hardware, find_device
from certify.errors import UserError
from certify.images.dataset import InputOnly
from certify.registry import check_options, chosen_options
from certify.runs.progress import progress_bar
from certify.smoothing.noise import warn_of_units
from denoisers import ARCHITECTURES
from training.data import TrainingData, count_classes, load_training_data
from training.denoiser import WEIGHTS, check_objective
from training.denoiser import train_denoiser as fit_denoiser
from training.frozen_classifiers import FrozenClassifiers
from training.loop import TrainerConfig, TrainingResult, make_accelerator
from training.recipe import Recipe

if TYPE_CHECKING:
    from certify.images.in_memory import Collection
    from certify.models.classifier import Classifier
    from certify.smoothed_classifier import SmoothedClassifier
    from denoisers.weights import Trained


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """A training, before anything is read.

    Attributes:
        recipe: hyperparameters.
        data: images as Python objects, or a name or path.
        out: folder for weights, checkpoint and metrics.
        denoiser: architecture of the denoiser to train; None trains a classifier.
        train_classifier: name of the classifier to train; None trains a denoiser.
        target: the frozen classifier; with surrogates it is never called.
        surrogates: frozen classifiers in place of the target.
        options: of the architecture.
        init: a denoiser to start from, or its name or file.
        stored: type of the saved numbers.
        weights: to start the classifier from.
        num_classes: of the classifier to train; None counts those of the data.
        input_size: (C, H, W) for data whose images differ.
        held_out: number of held-out images; None: a tenth, at most 1,000.
        max_images: use at most this many, spread over the data.
        root: folder of torchvision's data sets.
        download: download a missing data set.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``auto`` is bfloat16 where the hardware accelerates it, else float32.
        compile: compile the network.
        validations: evaluations on the held-out images, by which weights are chosen.
        licence: of the weights, for their card.
        trust_code: run the program in a TorchScript file.
        trust_identity: resume though Python classifiers cannot prove that they are still the same.
        command: for the card.
        stop_after: stop after this many steps; None: train to the end.
    """

    recipe: Recipe
    data: str | Collection
    out: str | Path
    denoiser: str | None = None
    train_classifier: str | None = None
    target: Classifier | None = None
    surrogates: Sequence[Classifier] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    init: str | nn.Module | None = None
    stored: str = "float32"
    weights: str | None = None
    num_classes: int | None = None
    input_size: tuple[int, int, int] | None = None
    held_out: int | None = None
    max_images: int | None = None
    root: str | None = None
    download: bool = False
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    validations: int = 20
    licence: str = "MIT"
    trust_code: bool = False
    trust_identity: bool = False
    command: str = ""
    stop_after: int | None = None


def train(
    job: TrainingJob, say: Callable[[str], None] = lambda text: None, *, shown: bool | float = True
) -> TrainingResult:
    """Train, or resume the training in ``job.out``.

    Args:
        job: the training.
        say: prints one line about data and training.
        shown: as for :func:`certify.runs.progress.progress_bar`.

    Raises:
        UserError: data, classifiers or options that do not fit each other.
        RunFault: the loss is not finite, or the disk is full.
        Stopped: by Ctrl-C or SIGTERM, after a checkpoint.
    """
    if job.denoiser and min(job.recipe.sigmas, default=1.0) <= 0:
        raise UserError("--sigma 0: a denoiser needs noise; expected levels above 0")
    warn_of_units(max(job.recipe.sigmas, default=0.0))
    if ":" in job.device:
        raise UserError(f"--device {job.device}: expected cuda; CUDA_VISIBLE_DEVICES chooses which")
    device = str(find_device(job.device)).partition(":")[0]
    precision = job.precision
    if precision == "auto":
        precision = "bfloat16" if detect_hardware(torch.device(device)).bfloat16 else "float32"
    accelerator = make_accelerator(device, precision, job.out)
    if job.denoiser:
        # before minutes of reading
        several = len(job.surrogates)
        check_objective(job.recipe, several or int(job.target is not None), surrogates=several > 0)
    name = job.data if isinstance(job.data, str) else job.data.name
    say(f"data       reading {name} ...")
    viewer: Any = job.surrogates[0] if job.surrogates else job.target
    spec = None
    if job.train_classifier:
        from certify.models.resolve import UNTRAINED
        from training.classifier import architecture

        torch.manual_seed(job.recipe.seed)
        classes = job.num_classes or count_classes(job.data, job.root, job.download)
        spec = architecture(job.train_classifier, classes, job.weights or UNTRAINED)
        viewer = InputOnly(spec.input, classes, spec.class_names)
    images = load_training_data(
        job.data,
        viewer,
        size=job.input_size,
        labelled=spec is not None or any(objective.labels for objective in job.recipe.objectives),
        held_out=job.held_out,
        max_images=job.max_images,
        root=job.root,
        download=job.download,
    )
    count, steps = len(images.train), job.recipe.steps(len(images.train))
    about = f"{count:,} images of {'x'.join(map(str, images.image))}, {len(images.held_out):,} held out"
    say(f"data       {images.about['name']}: {about}{images.omissions}")
    where = f"on {accelerator.device}, {precision}"
    say(f"training   {job.recipe.objective}, {steps:,} steps of {job.recipe.batch_size}, {where}")
    with progress_bar(steps * job.recipe.batch_size, "images", shown=shown) as bar:

        def progress(images: int, loss: float) -> None:
            bar.update(images)
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)

        config = TrainerConfig(
            accelerator,
            compile=job.compile,
            validations=job.validations,
            stop_after=job.stop_after,
            progress=progress,
            say=say,
            command=job.command,
            licence=job.licence,
            trust_identity=job.trust_identity,
        )
        if spec is not None and job.train_classifier:
            from training.classifier import train_classifier

            return train_classifier(job.train_classifier, spec, images, job.recipe, job.out, config)
        return _train_denoiser(job, images, config)


def _train_denoiser(job: TrainingJob, images: TrainingData, config: TrainerConfig) -> TrainingResult:
    """Train the denoiser with the classifiers that its objective needs; others only evaluate it."""
    assert job.denoiser is not None
    available = list(job.surrogates) or ([job.target] if job.target is not None else [])
    needed = any(objective.classifier for objective in job.recipe.objectives)
    stands_for = job.target if job.surrogates and needed else None
    classifiers = FrozenClassifiers(available if needed else [], stands_for, surrogates=bool(job.surrogates))
    return fit_denoiser(
        job.denoiser,
        images,
        job.recipe,
        job.out,
        config,
        classifiers=classifiers,
        evaluators=[] if needed else available,
        options=dict(job.options),
        init=job.init,
        trust_code=job.trust_code,
        stored=job.stored,
    )


class RecipeOptions(TypedDict, total=False):
    """Further hyperparameters: fields of :class:`training.recipe.Recipe`."""

    optimizer: str
    weight_decay: float
    schedule: str
    switch_at: float
    sgd_rate: float
    first_share: float
    augment: bool
    temperature: float
    queries: int
    ema: float
    only: Sequence[str]
    settings: Mapping[str, Any]


class JobOptions(TypedDict, total=False):
    """Further options of a training: fields of :class:`TrainingJob`."""

    options: Mapping[str, Any]
    init: str | nn.Module | None
    stored: str
    input_size: tuple[int, int, int] | None
    held_out: int | None
    max_images: int | None
    root: str | None
    download: bool
    device: str
    precision: str
    compile: bool
    validations: int
    licence: str
    trust_code: bool
    trust_identity: bool


class Options(RecipeOptions, JobOptions, total=False):
    """Further options of :func:`train_denoiser`.

    Attributes:
        progress: False shows nothing; a number prints a line every so many seconds instead of a bar.
    """

    progress: bool | float


def train_denoiser(
    architecture: str,
    images: Any,
    labels: Any = None,
    *,
    sigma: float | Sequence[float] | None = None,
    out: str | Path,
    classifier: nn.Module | Callable[..., Any] | SmoothedClassifier | str | None = None,
    surrogates: Sequence[nn.Module | Callable[..., Any] | str] = (),
    objective: str = "mse",
    continuous: bool = False,
    epochs: float = 10.0,
    batch_size: int = 64,
    rate: float = 1e-3,
    seed: int = 0,
    **options: Unpack[Options],
) -> Trained:
    """Train a denoiser D so that f(D(x + noise)) is correct, with the classifier f frozen (Salman et al. 2020).

    The options and the weights are those of ``certify train``. Called again with the same arguments,
    it resumes an interrupted training, or returns the finished denoiser.

    Args:
        architecture: name of the network (``certify list architectures``).
        images: as for :func:`certify.certify`; all of one size.
        labels: N class indices, with images as Python objects; a name or path has its own. Needed by objectives that
            classify.
        sigma: noise level, or several, in [0, 1] pixels; with ``continuous`` the smallest and the largest; None for an
            objective without noise.
        out: folder for weights, checkpoint and metrics.
        classifier: the frozen classifier, for objectives that need one (all but ``mse``); with ``surrogates`` it is the
            target, which is never called. A name takes ``NAME=FILE``; :func:`certify.load_classifier` has all options.
        surrogates: classifiers to train through in place of the target (query access).
        objective: name (``certify list objectives``).
        continuous: train at all levels between the smallest and the largest.
        epochs: passes over the images; fractions are possible.
        batch_size: images per step.
        rate: peak learning rate.
        seed: of everything random.
        **options: fields of :class:`training.recipe.Recipe` and :class:`training.api.TrainingJob`
            (:class:`training.api.Options`).

    Returns:
        The denoiser with the best held-out score: a module ``forward(noisy, sigma)`` with its ``card``, to be passed as
        ``denoiser=``. Its file is ``out/denoiser.safetensors``, for ``certify --denoiser``.

    Raises:
        UserError: arguments that contradict each other, or data and classifiers that cannot be used.
        RunFault: the loss is not finite, or the disk is full.
        Stopped: by Ctrl-C or SIGTERM, after a checkpoint.
    """
    from certify.api import collect_images
    from certify.models.load import as_classifier
    from certify.smoothed_classifier import SmoothedClassifier
    from certify.smoothing.numeric import as_float
    from denoisers.weights import read_denoiser

    check_options(Options, options, train_denoiser)
    ARCHITECTURES.get(architecture)
    several = sigma if isinstance(sigma, Sequence) else [] if sigma is None else [sigma]
    levels = tuple(as_float(level, "sigma", "a noise level above 0, or several") for level in several)
    of_recipe = chosen_options(RecipeOptions, options)
    recipe = Recipe(
        objective=objective,
        sigmas=levels,
        continuous=continuous,
        epochs=epochs,
        batch_size=batch_size,
        rate=rate,
        seed=seed,
        **{**of_recipe, "only": tuple(of_recipe.get("only", ())), "settings": dict(of_recipe.get("settings", {}))},
    )
    given = {"sigma"} if levels else set()
    for name, where in recipe.unused().items():
        if name in given | options.keys():
            raise UserError(f"--{name.replace('_', '-')} belongs to {where}; leave it out here")
    collection = collect_images(images, labels, {})
    if collection is None and labels is not None:
        raise UserError(f"labels = {str(labels)!r} with a name or path of data: expected None, the data's own labels")
    size = options.get("input_size") or (None if collection is None else collection.first_shape())
    if isinstance(classifier, SmoothedClassifier):
        classifier = classifier.classifier
    of_job, trust = chosen_options(JobOptions, options), options.get("trust_code", False)
    job = TrainingJob(
        recipe=recipe,
        data=str(images) if collection is None else collection,
        out=out,
        denoiser=architecture,
        target=None if classifier is None else as_classifier(classifier, size, trust_code=trust),
        surrogates=[as_classifier(surrogate, size, trust_code=trust) for surrogate in surrogates],
        command="certify.train_denoiser",
        **of_job,
    )
    train(job, shown=is_first_process() and options.get("progress", True))
    return read_denoiser(Path(out) / WEIGHTS)


def is_first_process() -> bool:
    """Return True in the one of several training processes that prints."""
    return int(os.environ.get("RANK", "0")) == 0
