"""``certify train``: a denoiser for a frozen classifier, or a classifier under noise."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from certify.cli import options
from certify.cli.console import progress_bar, speaker, tell, warn_of_units
from certify.cli.load import check_data, classifier_from, device_from, surrogate_from
from certify.cli.training_options import recipe_from, recipe_options, refuse_unused
from certify.errors import Stopped, UserError

if TYPE_CHECKING:
    from certify.models.classifier import Classifier
    from training.loop import TrainerConfig, TrainingResult
    from training.recipe import Recipe


@click.command(short_help="Train a denoiser for a frozen classifier.")
@click.option("--denoiser", metavar="ARCHITECTURE", help="What to train (`certify list architectures`).")
@click.option("--train-classifier", metavar="MODEL", help="Train this classifier instead, from --weights or afresh.")
@click.option("--option", "extra", multiple=True, metavar="KEY=VALUE", help="Option of the architecture; repeatable.")
@click.option(
    "--classifier", "--model", metavar="MODEL", help="The frozen classifier; with --surrogate the target, never used."
)
@options.input_options
@click.option(
    "--surrogate", multiple=True, metavar="MODEL[=FILE]", help="Query access: train through this one; repeatable."
)
@click.option("--init", metavar="DENOISER", help="Start from these weights (MSE first, then --objective stability).")
@recipe_options
@click.option("--data", required=True, help="Training images: a dataset's name, a folder, .zip or .npz.")
@click.option("--root", metavar="DIR", help="Folder of torchvision's datasets (default: ./data).")
@click.option("--download", is_flag=True, help="Download a missing torchvision dataset to --root.")
@click.option(
    "--max",
    "max_images",
    type=options.Count("the most images to take"),
    help="Use at most so many images, spread over the data.",
)
@click.option(
    "--held-out",
    type=options.Count("a number of images"),
    help="Images held out to choose weights by (default: a tenth).",
)
@click.option("--device", default="auto", help="Device: cpu, cuda; auto takes an accelerator.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Arithmetic; auto takes bfloat16 where the machine multiplies it faster.",
)
@click.option("--compile", type=click.Choice(["on", "off"]), default="off", help="Compile the network.")
@click.option(
    "--validations", type=options.Count("a number"), default=20, help="How often the held-out images are looked at."
)
@click.option(
    "--store", type=click.Choice(["float32", "float16"]), default="float32", help="Type of the stored numbers."
)
@click.option("--licence", default="MIT", help="Licence of the weights, for the card.")
@click.option("--out", metavar="DIR", required=True, help="Folder for weights, checkpoint and metrics.")
@options.trust_identity
@options.as_json("the text")
@options.quiet
def train(**o: Any) -> None:
    """Train a denoiser D so that f(D(x + noise)) is right; f stays frozen.

    Salman et al. (2020). mse needs no classifier; stability and classification send gradients through --classifier, or
    through one or many --surrogate (query access: the target itself is never used). The same command goes on where it
    stopped. The result, OUT/denoiser.safetensors, goes to `certify --denoiser`; weights of a purifier (objectives dsm,
    context, restore, complete, atop) go to `certify compare --defences NAME:weights=FILE`.
    """
    if (o["denoiser"] is None) == (o["train_classifier"] is None):
        raise UserError("expected --denoiser ARCHITECTURE or --train-classifier MODEL, one of the two")
    o["objective"] = o["objective"] or ("classification" if o["train_classifier"] else "mse")
    o["sigma"] = o["sigma"] or ((), False)
    recipe = recipe_from(o)
    refuse_unused(o, recipe.objectives)
    if o["denoiser"]:
        from denoisers import ARCHITECTURES

        ARCHITECTURES.get(o["denoiser"])
        if o["sigma"][0] and min(o["sigma"][0]) <= 0:
            raise UserError("--sigma 0: a denoiser needs noise; expected levels above 0")
    warn_of_units(max(o["sigma"][0], default=0.0))
    if ":" in o["device"]:
        raise UserError(f"--device {o['device']}: expected cuda; CUDA_VISIBLE_DEVICES chooses which")
    check_data(o)
    outcome = _train(o, recipe)
    if int(os.environ.get("RANK", "0")) == 0:  # of several processes one speaks
        _report(outcome, o)


def _train(o: dict[str, Any], recipe: Recipe) -> TrainingResult:
    import torch

    from certify.images.dataset import View
    from training.data import count_classes, load_training_data
    from training.loop import TrainerConfig, make_accelerator

    hidden = bool(o["quiet"] or o["as_json"] or int(os.environ.get("RANK", "0")))
    say = speaker(quiet=hidden)
    accelerator = make_accelerator(device_from(o["device"]).partition(":")[0], _precision(o), o["out"])
    target = _target(o)
    surrogates = [surrogate_from(s, trust_code=o["trust_code"]) for s in o["surrogate"]]
    if o["denoiser"]:
        from training.denoiser import check_objective

        check_objective(recipe, len(surrogates) or int(target is not None))  # before minutes of reading
    say(f"data       reading {o['data']} ...")
    spec = None
    viewer: Any = surrogates[0] if surrogates else target
    if o["train_classifier"]:
        from certify.models.resolve import UNTRAINED
        from training.classifier import architecture

        torch.manual_seed(recipe.seed)
        classes = count_classes(o["data"], o["root"], o["download"])
        spec = architecture(o["train_classifier"], o["num_classes"] or classes, o["weights"] or UNTRAINED)
        viewer = View(spec.input, o["num_classes"] or classes, spec.class_names)
    data = load_training_data(
        o["data"],
        viewer,
        size=o["input_size"],
        labelled=spec is not None or any(objective.labels for objective in recipe.objectives),
        held_out=o["held_out"],
        max_images=o["max_images"],
        root=o["root"],
        download=o["download"],
    )
    steps = recipe.steps(len(data.train))
    about = f"{len(data.train):,} images of {'x'.join(map(str, data.image))}, {len(data.held_out):,} held out"
    say(f"data       {data.about['name']}: {about}{data.omissions}")
    where = f"on {accelerator.device}, {_precision(o)}"
    say(f"training   {recipe.objective}, {steps:,} steps of {recipe.batch_size}, {where}")
    with progress_bar(steps * recipe.batch_size, "images", hidden=hidden) as bar:

        def progress(images: int, loss: float) -> None:
            bar.update(images)
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)

        config = TrainerConfig(
            accelerator,
            compile=o["compile"] == "on",
            validations=o["validations"],
            progress=progress,
            command=options.command_line(),
            licence=o["licence"],
            trust_identity=o["trust_identity"],
        )
        try:
            return _run(o, data, recipe, spec, target, surrogates, config)
        except KeyboardInterrupt:
            raise Stopped(f"stopped; the same command goes on from the last checkpoint in {o['out']}") from None


def _run(
    o: dict[str, Any],
    data: Any,
    recipe: Recipe,
    spec: Any,
    target: Classifier | None,
    surrogates: list[Classifier],
    config: TrainerConfig,
) -> TrainingResult:
    if spec is not None:
        from training.classifier import train_classifier

        return train_classifier(o["train_classifier"], spec, data, recipe, o["out"], config)
    from denoisers.names import key_values
    from training.denoiser import train_denoiser
    from training.frozen_classifiers import FrozenClassifiers

    given = surrogates or ([target] if target is not None else [])
    needed = any(objective.classifier for objective in recipe.objectives)
    for_target = target if surrogates and needed else None
    frozen = FrozenClassifiers(given if needed else [], for_target, surrogates=bool(surrogates))
    watched = [] if needed else given  # denoisers are shown with their accuracy; nothing of them goes into the weights
    return train_denoiser(
        o["denoiser"],
        data,
        recipe,
        o["out"],
        config,
        classifiers=frozen,
        evaluators=watched,
        options=key_values("--option", o["extra"]),
        init=o["init"],
        trust_code=o["trust_code"],
        stored=o["store"],
    )


def _target(o: dict[str, Any]) -> Classifier | None:
    """The classifier that is named, with the user's settings in place of its own."""
    if o["classifier"]:
        return classifier_from(o["classifier"], o)
    own = ("input_size", "num_classes", "weights") if o["train_classifier"] else ("input_size",)
    of_a_classifier = {"weights", "input_size", "mean", "std", "num_classes"}
    options.refuse_given(of_a_classifier.difference(own), "without --classifier: there is nothing it could be of")
    return None


def _precision(o: dict[str, Any]) -> str:
    """The arithmetic: what was asked, or bfloat16 where products of it are faster."""
    if o["precision"] != "auto":
        return str(o["precision"])
    import torch

    if o["device"] != "cpu" and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    cpu = torch.cpu
    fast = (getattr(cpu, name, lambda: False)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return "bfloat16" if any(fast) else "float32"


def _report(outcome: TrainingResult, o: dict[str, Any]) -> None:
    from denoisers.weights import read_card
    from training import classifier, denoiser

    path = Path(o["out"]) / (classifier.WEIGHTS if o["train_classifier"] else denoiser.WEIGHTS)
    found = {
        "weights": str(path),
        "steps": outcome.steps,
        "chosen_at_step": outcome.best_step,
        "images_per_second": round(outcome.images_per_second, 1),
        "held_out": outcome.best,
    }
    if o["as_json"]:
        tell(json.dumps(found))
        return
    figures = ", ".join(f"{k} {v:.4g}{' (lower is better)' if k == 'score' else ''}" for k, v in outcome.best.items())
    tell(f"{path}: chosen at step {outcome.best_step:,} of {outcome.steps:,}; held-out images: {figures}")
    purifier = read_card(path).purifier if o["denoiser"] and path.is_file() else ""
    if purifier:
        tell(f"a purifier, not for --denoiser: certify compare ... --defences {purifier}:weights={path}")
