"""The options that shape trained weights, and the recipe they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from certify.cli import options
from certify.errors import UserError

if TYPE_CHECKING:
    from training.losses import Objective
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
            numbers = tuple(options.number(v) for v in str(value).split(":" if ranged else ","))
            wrong = ranged and not (len(numbers) == 2 and 0 < numbers[0] < numbers[1])
            if wrong or not all(0 <= v < float("inf") for v in numbers):
                raise ValueError
        except (ValueError, IndexError):
            self.fail(f"{value!r}; expected levels in [0, 1] pixels: 0.25, or 0.12,0.25,0.5, or 0.1:1", param, ctx)
        return numbers, ranged


recipe_options = options.together(
    click.option("--objective", help="What it is trained for (`certify list objectives`; default: mse)."),
    click.option(
        "--sigma",
        type=LevelsOption(),
        help="Standard deviation of the noise in [0, 1] pixels, where the objective has any: 0.25; 0.12,0.25; 0.1:1.",
    ),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Setting of the objective; repeatable."),
    click.option("--epochs", type=float, default=10.0, help="Passes over the images; may be 0.5."),
    click.option("--batch-size", type=options.Count("a batch size"), default=64, help="Images a step."),
    click.option("--optimizer", default="adam", help="Optimizer: adam, sgd, adam-then-sgd, muon."),
    click.option("--rate", type=options.Positive("a rate above 0"), default=1e-3, help="Learning rate at its peak."),
    click.option("--weight-decay", type=float, default=1e-4, help="L2 penalty."),
    click.option("--schedule", default="one-cycle", help="Schedule of the rate: one-cycle, step, constant."),
    click.option(
        "--switch-at", type=float, help="Share of the steps that are Adam's, for adam-then-sgd (default: 50/90)."
    ),
    click.option(
        "--sgd-rate",
        type=options.Positive("a rate above 0"),
        default=1e-3,
        help="Learning rate of SGD, for adam-then-sgd.",
    ),
    click.option(
        "--first-share", type=float, default=0.5, help="Share of the steps that are mse's, for mse+stability."
    ),
    click.option(
        "--temperature", type=float, default=1.0, help="Number that the frozen classifier's logits are divided by."
    ),
    click.option(
        "--queries", type=options.Count("queries"), default=20, help="Queries an image and step, for zeroth-order."
    ),
    click.option(
        "--ema", type=float, default=0.0, help="Decay of a running average of the weights, which is then kept; 0: none."
    ),
    click.option(
        "--train-only",
        metavar="PARTS",
        help="Train these parts alone, by the beginnings of their parameters' names: up,tail. The others stay frozen.",
    ),
    click.option("--no-augment", is_flag=True, help="Do not move and mirror the images."),
    options.seed("everything that is drawn"),
)


def recipe_from(o: dict[str, Any]) -> Recipe:
    """The recipe that these options make."""
    from denoisers.names import key_values
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
        settings=key_values("--set", o["settings"]),
    )


def refuse_unused(o: dict[str, Any], objectives: Sequence[Objective]) -> None:
    """Refuse options that would change nothing in a training for these objectives."""
    by_classifier = o["denoiser"] and any(objective.classifier for objective in objectives)
    of = {
        "temperature": (by_classifier, "an objective with a classifier"),
        "sigma": (any(objective.noise for objective in objectives), "an objective that trains under noise"),
        "queries": (o["objective"] == "zeroth-order", "--objective zeroth-order"),
        "first_share": (o["objective"] == "mse+stability", "--objective mse+stability"),
        "switch_at": (o["optimizer"] == "adam-then-sgd", "--optimizer adam-then-sgd"),
        "sgd_rate": (o["optimizer"] == "adam-then-sgd", "--optimizer adam-then-sgd"),
        **dict.fromkeys(
            ("classifier", "surrogate", "init", "extra", "store", "train_only"), (o["denoiser"], "--denoiser")
        ),
    }
    for name, (used, where) in of.items():
        if not used:
            options.refuse_given((name,), f"belongs to {where}; leave it out here")
    if o["objective"] == "zeroth-order" and o["surrogate"]:
        raise UserError(
            "--objective zeroth-order asks the target itself; leave --surrogate out, or train for stability"
        )
