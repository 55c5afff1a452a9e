"""``certify train``: a denoiser for a frozen classifier, or a classifier under noise."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from certify.cli import options
from certify.cli.load import classifier_from, device_from, surrogate_from
from certify.errors import RunFault, UserError

if TYPE_CHECKING:
    from certify.classifiers import Classifier
    from training.loop import Conduct, Outcome
    from training.recipe import Recipe


class LevelsOption(options.ParamType):
    """Noise levels: one, several with commas between them, or LOW:HIGH."""

    name = "numbers|LOW:HIGH"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[tuple[float, ...], bool]:
        """``"0.1:1"`` to ``((0.1, 1.0), True)``."""
        if isinstance(value, tuple):
            return value
        ranged = ":" in str(value)
        try:
            numbers = tuple(float(v) for v in str(value).split(":" if ranged else ","))
            wrong = ranged and not (len(numbers) == 2 and 0 < numbers[0] < numbers[1])
            if wrong or not all(0 <= v < float("inf") for v in numbers):
                raise ValueError
        except (ValueError, IndexError):
            self.fail(f"{value!r}; expected levels in [0, 1] pixels: 0.25, or 0.12,0.25,0.5, or 0.1:1", param, ctx)
        return numbers, ranged


@click.command(short_help="Train a denoiser for a frozen classifier.")
@click.option("--denoiser", metavar="ARCHITECTURE", help="What to train (`certify list architectures`).")
@click.option("--train-classifier", metavar="MODEL", help="Train this classifier instead, from --weights or afresh.")
@click.option("--option", "extra", multiple=True, metavar="KEY=VALUE", help="Option of the architecture; repeatable.")
@click.option("--objective", help="What it is trained for (`certify list objectives`; default: mse).")
@click.option(
    "--sigma",
    type=LevelsOption(),
    help="Standard deviation of the noise in [0, 1] pixels, where the objective has any: 0.25; 0.12,0.25; 0.1:1.",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Setting of the objective; repeatable.")
@click.option(
    "--classifier", "--model", metavar="MODEL", help="The frozen classifier; with --surrogate the target, never used."
)
@options.input_options
@click.option(
    "--surrogate", multiple=True, metavar="MODEL[=FILE]", help="Query access: train through this one; repeatable."
)
@click.option("--init", metavar="DENOISER", help="Start from these weights (MSE first, then --objective stability).")
@click.option(
    "--train-only",
    metavar="PARTS",
    help="Train these parts alone, by the beginnings of their parameters' names: up,tail. The others stay frozen.",
)
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
@click.option("--epochs", type=float, default=10.0, show_default=True, help="Passes over the images; may be 0.5.")
@click.option("--batch-size", type=options.Count("a batch size"), default=64, show_default=True, help="Images a step.")
@click.option("--optimizer", default="adam", show_default=True, help="Optimizer: adam, sgd, adam-then-sgd, muon.")
@click.option(
    "--rate",
    type=options.Positive("a rate above 0"),
    default=1e-3,
    show_default=True,
    help="Learning rate at its peak.",
)
@click.option("--weight-decay", type=float, default=1e-4, show_default=True, help="L2 penalty.")
@click.option(
    "--schedule", default="one-cycle", show_default=True, help="Schedule of the rate: one-cycle, step, constant."
)
@click.option("--switch-at", type=float, help="Share of the steps that are Adam's, for adam-then-sgd (default: 50/90).")
@click.option(
    "--sgd-rate",
    type=options.Positive("a rate above 0"),
    default=1e-3,
    show_default=True,
    help="Learning rate of SGD, for adam-then-sgd.",
)
@click.option(
    "--first-share",
    type=float,
    default=0.5,
    show_default=True,
    help="Share of the steps that are mse's, for mse+stability.",
)
@click.option(
    "--temperature",
    type=float,
    default=1.0,
    show_default=True,
    help="Number that the frozen classifier's logits are divided by.",
)
@click.option(
    "--queries",
    type=options.Count("queries"),
    default=20,
    show_default=True,
    help="Queries an image and step, for zeroth-order.",
)
@click.option(
    "--ema",
    type=float,
    default=0.0,
    show_default=True,
    help="Decay of a running average of the weights, which is then kept; 0: none.",
)
@click.option("--no-augment", is_flag=True, help="Do not move and mirror the images.")
@click.option(
    "--seed",
    type=options.Count("a seed", least=0),
    default=0,
    show_default=True,
    help="Seed of everything that is drawn.",
)
@click.option("--device", default="auto", show_default=True, help="Device: cpu, cuda; auto takes an accelerator.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Arithmetic; auto takes bfloat16 where the machine multiplies it faster.",
)
@click.option(
    "--compile", type=click.Choice(["on", "off"]), default="off", show_default=True, help="Compile the network."
)
@click.option(
    "--validations",
    type=options.Count("a number"),
    default=20,
    show_default=True,
    help="How often the held-out images are looked at.",
)
@click.option(
    "--store",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Type of the stored numbers.",
)
@click.option("--licence", default="MIT", show_default=True, help="Licence of the weights, for the card.")
@click.option("--out", metavar="DIR", required=True, help="Folder for weights, checkpoint and metrics.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option("--quiet", is_flag=True, help="No plan and no progress on stderr.")
def train(**o: Any) -> None:
    """Train a denoiser D so that f(D(x + noise)) is right; f stays frozen.

    Salman et al. (2020). mse needs no classifier; stability and classification send gradients through --classifier, or
    through one or many --surrogate (query access: the target itself is never used). The same command goes on where it
    stopped. The result, OUT/denoiser.safetensors, goes to `certify --denoiser`; weights of a purifier (objectives dsm,
    context, restore, complete, atop) go to `certify compare --defences NAME:weights=FILE`.
    """
    from training.losses import phases

    if (o["denoiser"] is None) == (o["train_classifier"] is None):
        raise UserError("expected --denoiser ARCHITECTURE or --train-classifier MODEL, one of the two")
    o["objective"] = o["objective"] or ("classification" if o["train_classifier"] else "mse")
    o["sigma"] = o["sigma"] or ((), False)
    phases(o["objective"])
    _refuse_unused(o)
    if o["denoiser"]:
        from denoisers import ARCHITECTURES

        ARCHITECTURES.get(o["denoiser"])
        if o["sigma"][0] and min(o["sigma"][0]) <= 0:
            raise UserError("--sigma 0: a denoiser needs noise; expected levels above 0")
    outcome = _train(o)
    if int(os.environ.get("RANK", "0")) == 0:  # of several processes one speaks
        _report(outcome, o)


def _train(o: dict[str, Any]) -> Outcome:
    import torch
    from tqdm import tqdm

    from training.data import View, count_classes, load_training_data
    from training.loop import Conduct, make_accelerator
    from training.losses import make_objective, phases

    say = _silent if o["quiet"] or o["as_json"] or int(os.environ.get("RANK", "0")) else _say
    recipe = _recipe(o)
    driver = make_accelerator(device_from(o["device"]).partition(":")[0], _precision(o), o["out"])
    target = _target(o)
    surrogates = [surrogate_from(s) for s in o["surrogate"]]
    needs = [make_objective(name, recipe.settings) for name in phases(recipe.objective)]
    hidden = say is _silent
    say(f"data       reading {o['data']} ...")
    spec = None
    viewer: Any = surrogates[0] if surrogates else target
    if o["train_classifier"]:
        from certify.hub import UNTRAINED
        from training.classifier import architecture

        torch.manual_seed(recipe.seed)
        classes = count_classes(o["data"], o["root"], o["download"])
        spec = architecture(o["train_classifier"], o["num_classes"] or classes, o["weights"] or UNTRAINED)
        viewer = View(spec.input, o["num_classes"] or classes, spec.class_names)
    data = load_training_data(
        o["data"],
        viewer,
        size=o["input_size"],
        labelled=spec is not None or any(need.labels for need in needs),
        held_out=o["held_out"],
        max_images=o["max_images"],
        root=o["root"],
        download=o["download"],
    )
    steps = recipe.steps(len(data.train))
    about = f"{len(data.train):,} images of {'x'.join(map(str, data.image))}, {len(data.held_out):,} held out"
    say(f"data       {data.about['name']}: {about}")
    say(f"training   {recipe.objective}, {steps:,} steps of {recipe.batch_size}, on {driver.device}, {_precision(o)}")
    with tqdm(
        total=steps * recipe.batch_size, unit=" images", disable=hidden or None, leave=False, file=sys.stderr
    ) as bar:

        def progress(images: int, loss: float) -> None:
            bar.update(images)
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)

        conduct = Conduct(
            driver,
            compile=o["compile"] == "on",
            validations=o["validations"],
            progress=progress,
            command=options.command_line(),
            licence=o["licence"],
        )
        try:
            return _run(o, data, recipe, spec, target, surrogates, conduct)
        except KeyboardInterrupt:
            fault = RunFault(f"stopped; the same command goes on from the last checkpoint in {o['out']}")
            fault.exit_code = 130
            raise fault from None


def _recipe(o: dict[str, Any]) -> Recipe:
    from training.recipe import Recipe

    return Recipe(
        objective=o["objective"],
        sigmas=o["sigma"][0],
        continuous=o["sigma"][1],
        epochs=o["epochs"],
        batch_size=o["batch_size"],
        optimizer=o["optimizer"],
        rate=o["rate"],
        weight_decay=o["weight_decay"],
        schedule=o["schedule"],
        augment=not o["no_augment"],
        switch_at=50 / 90 if o["switch_at"] is None else o["switch_at"],
        sgd_rate=o["sgd_rate"],
        first_share=o["first_share"],
        temperature=o["temperature"],
        queries=o["queries"],
        ema=o["ema"],
        only=tuple(part for part in (o["train_only"] or "").split(",") if part),
        seed=o["seed"],
        settings=_key_values("--set", o["settings"]),
    )


def _run(
    o: dict[str, Any],
    data: Any,
    recipe: Recipe,
    spec: Any,
    target: Classifier | None,
    surrogates: list[Classifier],
    conduct: Conduct,
) -> Outcome:
    if spec is not None:
        from training.classifier import train_classifier

        return train_classifier(o["train_classifier"], spec, data, recipe, o["out"], conduct)
    from training.denoiser import train_denoiser
    from training.guides import Guides
    from training.losses import make_objective, phases

    given = surrogates or ([target] if target is not None else [])
    needed = any(make_objective(name, recipe.settings).classifier for name in phases(recipe.objective))
    guides = Guides(given if needed else [], target if surrogates and needed else None, surrogates=bool(surrogates))
    watched = [] if needed else given  # denoisers are shown with their accuracy; nothing of them goes into the weights
    return train_denoiser(
        o["denoiser"],
        data,
        recipe,
        o["out"],
        conduct,
        guides=guides,
        watched_by=watched,
        options=_key_values("--option", o["extra"]),
        init=o["init"],
        stored=o["store"],
    )


def _refuse_unused(o: dict[str, Any]) -> None:
    """Refuse options that would change nothing."""
    from training.losses import make_objective, phases

    settings = _key_values("--set", o["settings"])
    needs = [make_objective(name, settings) for name in phases(o["objective"])]
    of = {
        "temperature": (any(n.classifier for n in needs) and o["denoiser"], "an objective with a classifier"),
        "sigma": (any(n.noise for n in needs), "an objective that trains under noise"),
        "queries": (o["objective"] == "zeroth-order", "--objective zeroth-order"),
        "first_share": (o["objective"] == "mse+stability", "--objective mse+stability"),
        "switch_at": (o["optimizer"] == "adam-then-sgd", "--optimizer adam-then-sgd"),
        "sgd_rate": (o["optimizer"] == "adam-then-sgd", "--optimizer adam-then-sgd"),
        **dict.fromkeys(("classifier", "surrogate", "init", "extra", "store"), (o["denoiser"], "--denoiser")),
    }
    for name, (used, where) in of.items():
        if options.given_by_user(name) and not used:
            spelled = "option" if name == "extra" else name.replace("_", "-")
            raise UserError(f"--{spelled} belongs to {where}; leave it out here")
    if o["objective"] == "zeroth-order" and o["surrogate"]:
        raise UserError(
            "--objective zeroth-order asks the target itself; leave --surrogate out, or train for stability"
        )


def _target(o: dict[str, Any]) -> Classifier | None:
    """The classifier that is named, with the user's settings in place of its own."""
    if o["classifier"]:
        return classifier_from(o["classifier"], o)
    own = ("input_size", "num_classes", "weights") if o["train_classifier"] else ("input_size",)
    alone = next((name for name in _OF_A_CLASSIFIER if o[name] is not None and name not in own), None)
    if alone is not None:
        raise UserError(f"--{alone.replace('_', '-')} without --classifier: there is nothing it could be of")
    return None


_OF_A_CLASSIFIER = ("weights", "input_size", "mean", "std", "num_classes")


def _precision(o: dict[str, Any]) -> str:
    """The arithmetic: what was asked, or bfloat16 where products of it are faster."""
    if o["precision"] != "auto":
        return str(o["precision"])
    import torch

    if o["device"] != "cpu" and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return "bfloat16" if has_tiles else "float32"


def _key_values(spelled: str, given: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in given:
        key, _, text = item.partition("=")
        if not (key and text):
            raise UserError(f"{spelled} {item!r}: expected KEY=VALUE, such as channels=96")
        try:
            found[key] = json.loads(text)
        except ValueError:  # a word, such as transform=rt2
            found[key] = text
    return found


def _report(outcome: Outcome, o: dict[str, Any]) -> None:
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
        click.echo(json.dumps(found))
        return
    figures = ", ".join(f"{k} {v:.4g}{' (lower is better)' if k == 'score' else ''}" for k, v in outcome.best.items())
    click.echo(f"{path}: chosen at step {outcome.best_step:,} of {outcome.steps:,}; held-out images: {figures}")
    purifier = read_card(path).purifier if o["denoiser"] and path.is_file() else ""
    if purifier:
        click.echo(f"a purifier, not for --denoiser: certify compare ... --defences {purifier}:weights={path}")


def _say(text: str) -> None:
    click.echo(text, err=True)


def _silent(text: str) -> None:
    pass
