"""``certify train``: train a denoiser for a frozen classifier, or a classifier under noise."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certify.cli.console import speaker, tell
from certify.cli.load import check_data, classifier_from, device_from, surrogate_from
from certify.cli.options import command, command_line, refuse_given
from certify.cli.training_options import (
    FrozenOptions,
    NetworkOptions,
    RecipeOptions,
    TrainingCompute,
    TrainingDataOptions,
    TrainingOutput,
    recipe_from,
    refuse_unused,
)
from certify.errors import Stopped, UserError
from certify.text import progress_bar

if TYPE_CHECKING:
    from certify.models.classifier import Classifier
    from training.data import TrainingData
    from training.loop import TrainerConfig, TrainingResult
    from training.recipe import Recipe


@command(
    "Train a denoiser for a frozen classifier.",
    main=("denoiser", "sigma", "objective", "classifier", "surrogate", "data", "epochs", "out"),
)
def train(
    network: NetworkOptions,
    training: RecipeOptions,
    frozen: FrozenOptions,
    data: TrainingDataOptions,
    compute: TrainingCompute,
    output: TrainingOutput,
) -> None:
    """Train a denoiser D so that f(D(x + noise)) is right, with the classifier f frozen (Salman et al., 2020).

    mse needs no classifier. stability and classification send gradients through --classifier, or through one or more
    --surrogate, if the target may only be queried. The same command resumes an interrupted training. The result,
    OUT/denoiser.safetensors, is for `certify --denoiser`; weights of a purifier (objectives dsm, context, restore,
    complete, atop) are for `certify compare --defences NAME:weights=FILE`.
    """
    if (network.denoiser is None) == (network.train_classifier is None):
        raise UserError("expected --denoiser ARCHITECTURE or --train-classifier MODEL, one of the two")
    recipe = recipe_from(training, training.objective or ("classification" if network.train_classifier else "mse"))
    refuse_unused(recipe, network, frozen)
    if network.denoiser:
        from denoisers import ARCHITECTURES

        ARCHITECTURES.get(network.denoiser)
        if recipe.sigmas and min(recipe.sigmas) <= 0:
            raise UserError("--sigma 0: a denoiser needs noise; expected levels above 0")
    from certify.smoothing.noise import warn_of_units

    warn_of_units(max(recipe.sigmas, default=0.0))
    if ":" in compute.device:
        raise UserError(f"--device {compute.device}: expected cuda; CUDA_VISIBLE_DEVICES chooses which")
    check_data(data.data, data.root)
    result = _train(recipe, network, training, frozen, data, compute, output)
    if _is_first_process():
        _report(result, network, output)


def _is_first_process() -> bool:
    """Return True in the one of several training processes that prints."""
    return int(os.environ.get("RANK", "0")) == 0


def _train(
    recipe: Recipe,
    network: NetworkOptions,
    training: RecipeOptions,
    frozen: FrozenOptions,
    data: TrainingDataOptions,
    compute: TrainingCompute,
    output: TrainingOutput,
) -> TrainingResult:
    import torch

    from certify.images.dataset import InputOnly
    from training.data import count_classes, load_training_data
    from training.loop import TrainerConfig, make_accelerator

    hidden = output.quiet or output.as_json or not _is_first_process()
    say = speaker(quiet=hidden)
    precision = _precision(compute)
    accelerator = make_accelerator(device_from(compute.device).partition(":")[0], precision, output.out)
    target = _target(network, frozen)
    surrogates = [surrogate_from(text, trust_code=frozen.trust_code) for text in frozen.surrogate]
    if network.denoiser:
        from training.denoiser import check_objective

        check_objective(recipe, len(surrogates) or int(target is not None))  # before minutes of reading
    say(f"data       reading {data.data} ...")
    spec = None
    viewer: Any = surrogates[0] if surrogates else target
    if network.train_classifier:
        from certify.models.resolve import UNTRAINED
        from training.classifier import architecture

        torch.manual_seed(recipe.seed)
        classes = frozen.num_classes or count_classes(data.data, data.root, data.download)
        spec = architecture(network.train_classifier, classes, frozen.weights or UNTRAINED)
        viewer = InputOnly(spec.input, classes, spec.class_names)
    images = load_training_data(
        data.data,
        viewer,
        size=frozen.input_size,
        labelled=spec is not None or any(objective.labels for objective in recipe.objectives),
        held_out=data.held_out,
        max_images=data.max_images,
        root=data.root,
        download=data.download,
    )
    steps = recipe.steps(len(images.train))
    about = f"{len(images.train):,} images of {'x'.join(map(str, images.image))}, {len(images.held_out):,} held out"
    say(f"data       {images.about['name']}: {about}{images.omissions}")
    where = f"on {accelerator.device}, {precision}"
    say(f"training   {recipe.objective}, {steps:,} steps of {recipe.batch_size}, {where}")
    with progress_bar(steps * recipe.batch_size, "images", hidden=hidden) as bar:

        def progress(images: int, loss: float) -> None:
            bar.update(images)
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)

        config = TrainerConfig(
            accelerator,
            compile=compute.compile == "on",
            validations=training.validations,
            progress=progress,
            command=command_line(),
            licence=output.licence,
            trust_identity=output.trust_identity,
        )
        try:
            if spec is not None and network.train_classifier:
                from training.classifier import train_classifier

                return train_classifier(network.train_classifier, spec, images, recipe, output.out, config)
            return _train_denoiser(recipe, network, images, target, surrogates, config, output, frozen.trust_code)
        except KeyboardInterrupt:
            raise Stopped(f"stopped; the same command resumes from the last checkpoint in {output.out}") from None


def _train_denoiser(
    recipe: Recipe,
    network: NetworkOptions,
    images: TrainingData,
    target: Classifier | None,
    surrogates: list[Classifier],
    config: TrainerConfig,
    output: TrainingOutput,
    trust_code: bool,
) -> TrainingResult:
    from denoisers.names import key_values
    from training.denoiser import train_denoiser
    from training.frozen_classifiers import FrozenClassifiers

    assert network.denoiser is not None
    available = surrogates or ([target] if target is not None else [])
    needed = any(objective.classifier for objective in recipe.objectives)
    for_target = target if surrogates and needed else None
    classifiers = FrozenClassifiers(available if needed else [], for_target, surrogates=bool(surrogates))
    evaluators = [] if needed else available  # report accuracy behind the denoiser; no influence on the weights
    return train_denoiser(
        network.denoiser,
        images,
        recipe,
        output.out,
        config,
        classifiers=classifiers,
        evaluators=evaluators,
        options=key_values("--option", network.extra),
        init=network.init,
        trust_code=trust_code,
        stored=output.store,
    )


def _target(network: NetworkOptions, frozen: FrozenOptions) -> Classifier | None:
    """Load the frozen classifier; without one, refuse the options that apply to it."""
    if frozen.classifier:
        return classifier_from(frozen.classifier, frozen)
    own = {"input_size", "num_classes", "weights"} if network.train_classifier else {"input_size"}
    of_a_classifier = {"weights", "input_size", "mean", "std", "num_classes"}
    refuse_given(of_a_classifier - own, "without --classifier: there is no classifier to apply it to")
    return None


def _precision(compute: TrainingCompute) -> str:
    """Return the dtype; ``auto`` is bfloat16 where the hardware accelerates it, otherwise float32."""
    if compute.precision != "auto":
        return compute.precision
    import torch

    if compute.device != "cpu" and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    cpu = torch.cpu
    fast = (getattr(cpu, name, lambda: False)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return "bfloat16" if any(fast) else "float32"


def _report(result: TrainingResult, network: NetworkOptions, output: TrainingOutput) -> None:
    from denoisers.weights import read_card
    from training import classifier, denoiser

    path = Path(output.out) / (classifier.WEIGHTS if network.train_classifier else denoiser.WEIGHTS)
    summary = {
        "weights": str(path),
        "steps": result.steps,
        "chosen_at_step": result.best_step,
        "images_per_second": round(result.images_per_second, 1),
        "held_out": result.best,
    }
    if output.as_json:
        tell(json.dumps(summary))
        return
    figures = ", ".join(f"{k} {v:.4g}{' (lower is better)' if k == 'score' else ''}" for k, v in result.best.items())
    tell(f"{path}: chosen at step {result.best_step:,} of {result.steps:,}; held-out images: {figures}")
    purifier = read_card(path).purifier if network.denoiser and path.is_file() else ""
    if purifier:
        tell(f"a purifier, not for --denoiser: certify compare ... --defences {purifier}:weights={path}")
