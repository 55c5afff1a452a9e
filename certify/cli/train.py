"""``certify train``: train a denoiser for a frozen classifier, or a classifier under noise."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from certify.cli.console import speaker, tell, tell_dry_run
from certify.cli.load import check_data, classifier_from
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
from certify.errors import UserError

if TYPE_CHECKING:
    from certify.models.classifier import Classifier
    from training.api import TrainingJob
    from training.loop import TrainingResult


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
    refuse_unused(recipe, network)
    from denoisers.names import key_values

    if network.denoiser:
        from denoisers import ARCHITECTURES

        ARCHITECTURES.get(network.denoiser)
    check_data(data.data, data.root)
    from certify.models.load import as_classifier
    from training.api import TrainingJob, is_first_process
    from training.api import train as run_training

    first = is_first_process()
    job = TrainingJob(
        recipe=recipe,
        data=data.data,
        out=output.out,
        denoiser=network.denoiser,
        train_classifier=network.train_classifier,
        target=_target(network, frozen),
        surrogates=[as_classifier(text, trust_code=frozen.trust_code) for text in frozen.surrogate],
        options=key_values("--option", network.extra),
        init=network.init,
        stored=output.store,
        weights=frozen.weights,
        num_classes=frozen.num_classes,
        input_size=frozen.input_size,
        held_out=data.held_out,
        max_images=data.max_images,
        root=data.root,
        download=data.download,
        device=compute.device,
        precision=compute.precision,
        compile=compute.compile == "on",
        validations=training.validations,
        licence=output.licence,
        trust_code=frozen.trust_code,
        trust_identity=output.trust_identity,
        command=command_line(),
    )
    if output.dry_run:
        _rehearse(job, output, shown=first)
        return
    result = run_training(job, speaker(quiet=output.silent or not first), shown=first and output.shown)
    if first:
        _report(result, job, network, output)


def _rehearse(job: TrainingJob, output: TrainingOutput, *, shown: bool) -> None:
    """Take a few steps in a folder that is removed, and show the cost of the whole training."""
    from training.api import train as run_training
    from training.loop import COST_AFTER

    with tempfile.TemporaryDirectory() as folder:
        job = replace(job, out=folder, stop_after=COST_AFTER)
        result = run_training(job, speaker(quiet=output.silent or not shown), shown=False)
    seconds = result.of * job.recipe.batch_size / result.images_per_second
    if shown:
        tell_dry_run(f"nothing is written to {output.out}", output, steps=result.of, seconds=round(seconds, 1))


def _target(network: NetworkOptions, frozen: FrozenOptions) -> Classifier | None:
    """Load the frozen classifier; without one, refuse the options that apply to it."""
    if frozen.classifier:
        return classifier_from(frozen.classifier, frozen)
    own = {"input_size", "num_classes", "weights"} if network.train_classifier else {"input_size"}
    of_a_classifier = {"weights", "input_size", "mean", "std", "num_classes"}
    refuse_given(of_a_classifier - own, "without --classifier: there is no classifier to apply it to")
    return None


def _measured_with(job: TrainingJob, result: TrainingResult) -> str:
    """Name the classifiers that agreement and accuracy were measured with."""
    if not any(name.startswith(("agreement", "accuracy")) for name in result.best) or job.denoiser is None:
        return ""
    if job.surrogates:
        names = ", ".join(one.name for one in job.surrogates)
        many = "surrogates" if len(job.surrogates) > 1 else "surrogate"
        return f"; measured with the {many} {names}" + ("; the target was not queried" if job.target else "")
    return f"; measured with {job.target.name}" if job.target else ""


def _report(result: TrainingResult, job: TrainingJob, network: NetworkOptions, output: TrainingOutput) -> None:
    from denoisers.weights import read_card
    from training import classifier, denoiser
    from training.held_out import score_name

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
    figures = ", ".join(f"{name} {value:.4g}" for name, value in result.best.items() if name != "score")
    chosen = f"lowest {score_name(job.recipe)} ({result.best['score']:.4g}) on {result.held_out:,} held-out images"
    tell(f"{path}: weights of step {result.best_step:,} of {result.steps:,}, with the {chosen}")
    tell(f"on these images: {figures}{_measured_with(job, result)}")
    purifier = read_card(path).purifier if network.denoiser and path.is_file() else ""
    if purifier:
        tell(f"a purifier, not for --denoiser: certify compare ... --defences {purifier}:weights={path}")
