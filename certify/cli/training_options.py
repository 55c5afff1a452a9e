"""Options of ``certify train``, and the training recipe that they make."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from certify.cli.option_groups import PRECISIONS, DeviceOptions, ImageOptions, InputOptions, OutputOptions
from certify.cli.options import Options, flag, option, overridden, refuse_given
from certify.cli.parameter_types import Count, NoiseLevels, NoiseLevelsType, Positive

if TYPE_CHECKING:
    from training.recipe import Recipe


class NetworkOptions(Options, section="Network"):
    """The network to train."""

    denoiser: str | None = option(metavar="ARCHITECTURE", help="Denoiser to train (`certify list architectures`).")
    train_classifier: str | None = option(
        metavar="MODEL", help="Train this classifier instead, from --weights or from scratch."
    )
    extra: tuple[str, ...] = option(
        "--option", default=(), metavar="KEY=VALUE", help="Option of the architecture; repeatable."
    )
    init: str | None = option(
        metavar="DENOISER", help="Start from these weights (MSE first, then --objective stability)."
    )


class FrozenOptions(InputOptions, section="Frozen classifier"):
    """The frozen classifier, or surrogates for it."""

    classifier: str | None = option(
        "--classifier", "--model", metavar="MODEL", help="Frozen classifier; with --surrogate the target, unused."
    )
    surrogate: tuple[str, ...] = option(
        default=(), metavar="MODEL[=FILE]", help="Train through this classifier instead (query access); repeatable."
    )


class TrainingDataOptions(Options, section="Data"):
    """Training images."""

    data: str = option(required=True, help="Training images: a dataset, a folder, a .zip or an .npz file.")
    root: str | None = overridden(ImageOptions, "root")
    download: bool = overridden(ImageOptions, "download")
    max_images: int | None = overridden(
        ImageOptions, "max_images", help="Maximum number of images, spread over the data (default: all)."
    )
    held_out: int | None = option(
        type=Count("a number of images"), help="Number of images held out to choose the weights by (default: a tenth)."
    )


class RecipeOptions(Options, section="Training"):
    """Hyperparameters."""

    objective: str | None = option(help="Training objective (`certify list objectives`; default: mse).")
    sigma: NoiseLevels | None = option(
        type=NoiseLevelsType(),
        help="Standard deviation of the noise in [0, 1] pixels, for objectives with noise: 0.25; 0.12,0.25; 0.1:1.",
    )
    settings: tuple[str, ...] = option(
        "--set", default=(), metavar="KEY=VALUE", help="Setting of the objective; repeatable."
    )
    epochs: float = option(type=float, default=10.0, help="Passes over the images; fractions such as 0.5 are possible.")
    batch_size: int = option(type=Count("a batch size"), default=64, help="Images per step.")
    optimizer: str = option(default="adam", help="Optimizer: adam, sgd, adam-then-sgd, muon.")
    rate: float = option(type=Positive("a rate above 0"), default=1e-3, help="Peak learning rate.")
    weight_decay: float = option(type=float, default=1e-4, help="L2 penalty.")
    schedule: str = option(default="one-cycle", help="Learning rate schedule: one-cycle, step, constant.")
    switch_at: float | None = option(
        type=float, help="Fraction of the steps trained with Adam, for adam-then-sgd (default: 50/90)."
    )
    sgd_rate: float = option(
        type=Positive("a rate above 0"), default=1e-3, help="Learning rate of SGD, for adam-then-sgd."
    )
    first_share: float = option(
        type=float, default=0.5, help="Fraction of the steps trained for mse, for mse+stability."
    )
    temperature: float = option(
        type=float, default=1.0, help="Temperature by which the frozen classifier's logits are divided."
    )
    queries: int = option(type=Count("queries"), default=20, help="Queries per image and step, for zeroth-order.")
    ema: float = option(
        type=float, default=0.0, help="Decay of the moving average of the weights, which is then saved; 0: none."
    )
    train_only: str | None = option(
        metavar="PARTS", help="Train only parameters whose names begin with one of these: up,tail. Others stay frozen."
    )
    no_augment: bool = flag(help="Do not shift and flip the images.")
    validations: int = option(type=Count("a number"), default=20, help="Number of evaluations on the held-out images.")
    seed: int = option(type=Count("a seed", least=0), default=0, help="Seed of everything random.")


class TrainingCompute(Options, section="Compute"):
    """Device and precision."""

    device: str = overridden(
        DeviceOptions, "device", help="Device: cpu, cuda, or auto for an accelerator where there is one."
    )
    precision: str = option(
        type=PRECISIONS, default="auto", help="Training dtype; auto is bfloat16 where the hardware accelerates it."
    )
    compile: str = option(type=click.Choice(["on", "off"]), default="off", help="Compile the network.")


class TrainingOutput(OutputOptions):
    """Folder and card of the weights."""

    out: str = option(metavar="DIR", required=True, help="Folder for weights, checkpoint and metrics.")
    store: str = option(
        type=click.Choice(["float32", "float16"]), default="float32", help="Dtype of the saved weights."
    )
    licence: str = option(default="MIT", help="Licence of the weights, for their card.")


def recipe_from(options: RecipeOptions, objective: str) -> Recipe:
    """Return the recipe for an objective."""
    from denoisers.names import key_values
    from training.recipe import Recipe

    levels = options.sigma or NoiseLevels()
    return Recipe(
        objective=objective,
        sigmas=levels.values,
        continuous=levels.continuous,
        epochs=options.epochs,
        batch_size=options.batch_size,
        optimizer=options.optimizer,
        rate=options.rate,
        weight_decay=options.weight_decay,
        schedule=options.schedule,
        augment=not options.no_augment,
        switch_at=50 / 90 if options.switch_at is None else options.switch_at,
        sgd_rate=options.sgd_rate,
        first_share=options.first_share,
        temperature=options.temperature,
        queries=options.queries,
        ema=options.ema,
        only=tuple(part for part in (options.train_only or "").split(",") if part),
        seed=options.seed,
        settings=key_values("--set", options.settings),
    )


def refuse_unused(recipe: Recipe, network: NetworkOptions) -> None:
    """Refuse options that have no effect on this training."""
    of_denoisers = ("classifier", "surrogate", "init", "extra", "store", "train_only")
    others = {} if network.denoiser else dict.fromkeys((*of_denoisers, "temperature"), "--denoiser")
    for name, where in (recipe.unused() | others).items():
        refuse_given((name,), f"belongs to {where}; leave it out here")
