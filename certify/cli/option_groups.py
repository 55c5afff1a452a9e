"""Option groups that several commands share: model, noise, data, statistics, compute, output."""

from __future__ import annotations

import click

from certify.cli.options import Options, flag, option
from certify.cli.parameter_types import (
    PROBABILITY,
    SHARE,
    BatchSize,
    Count,
    Distance,
    DistanceType,
    Numbers,
    Positive,
    Size,
)

PRECISIONS = click.Choice(["auto", "float32", "bfloat16", "float16"])
TABLE_FORMATS = click.Choice(["text", "markdown", "latex", "csv"])
_MODEL = (
    "Frozen classifier: digits, cifar_resnet56, a timm or torchvision name, hf-hub:OWNER/NAME, a TorchScript or ONNX "
    "file, a folder saved by timm, or package.module:callable."
)
_ALPHA = "Failure probability per image (confidence 1 - alpha)"
_BOUND = "Confidence bound on the class probability (`certify list bounds`"
SEED_ADVICE = "keep it secret if an adversary may choose the images"


class InputOptions(Options, section="Model"):
    """Weights and input of a frozen classifier, in place of its own settings."""

    weights: str | None = option(
        metavar="FILE[::PART]",
        help="Checkpoint (.pth .pt .th .ckpt .safetensors) in place of the published weights; PART selects one of "
        "several sets of weights in it.",
    )
    input_size: tuple[int, int, int] | None = option(
        type=Size(), metavar="CxHxW", help="Input size, in place of the model's own."
    )
    mean: list[float] | None = option(type=Numbers(), help="Mean per channel for normalisation, in place of its own.")
    std: list[float] | None = option(
        type=Numbers(), help="Standard deviation per channel for normalisation, in place of its own."
    )
    num_classes: int | None = option(
        type=Count("the number of classes"), help="Number of classes, if the model does not state it."
    )
    trust_code: bool = flag(
        help="Run the code in a TorchScript file (model or denoiser); it can do anything that you can do."
    )


class ModelOptions(InputOptions):
    """A frozen classifier."""

    model: str = option(required=True, help=_MODEL)


class OptionalModelOptions(InputOptions):
    """A frozen classifier, or none."""

    model: str | None = option(help=f"{_MODEL} Without it: no accuracies.")


class DenoiserOptions(Options, section="Noise"):
    """Noise level and denoiser."""

    sigma: float = option(
        type=Positive("a number above 0, in [0, 1] pixels (0.25, not 64 of 255)"),
        required=True,
        help="Standard deviation of the noise, in pixels of images scaled to [0, 1].",
    )
    denoiser: str = option(
        default="none", help="Denoiser between noise and classifier; auto chooses one (`certify list denoisers`)."
    )


class NoiseOptions(DenoiserOptions):
    """Smoothing distribution, denoiser and seed."""

    noise: str = option(default="gaussian", help="Smoothing distribution (`certify list noises`).")
    rounded: bool = flag("--round", help="Round images to the 8-bit grid first; for --noise exact.")
    seed: int = option(type=Count("a seed", least=0), default=0, help=f"Seed of all noise; {SEED_ADVICE}.")


class ImageOptions(Options, section="Data"):
    """Images, and which of them to take."""

    data: str | None = option(
        help="Images: a dataset (`certify list datasets`), an image, a folder, a .zip (or a folder in it: x.zip/test) "
        "or an .npz file."
    )
    root: str | None = option(metavar="DIR", help="Folder of torchvision's datasets (default: ./data).")
    download: bool = flag(help="Download a missing torchvision dataset to --root.")
    skip: int = option(type=Count("K to take every K-th image"), default=1, help="Take every K-th image.")
    start: int = option(
        type=Count("the first image's place", least=0), default=0, help="Index of the first image, from 0."
    )
    max_images: int | None = option(
        "--max", type=Count("the most images to take"), help="Maximum number of images (default: all)."
    )
    ids: str | None = option(
        help="Take only these images: ids separated by commas, in double quotes where an id contains a comma."
    )


class DataOptions(ImageOptions):
    """Labelled images."""

    labels: str | None = option(
        metavar="FILE", help="CSV of file,label for images that are not in class folders; none ignores labels."
    )
    class_map: str | None = option(metavar="FILE", help="CSV or JSON that maps class folders to the model's classes.")
    strict: bool = flag(help="Stop at the first image that cannot be read, instead of leaving it out.")


class SampleOptions(Options, section="Statistics"):
    """Number of noise samples and failure probability."""

    n: int = option(
        type=Count("a number of samples"),
        default=100_000,
        help="Noise samples per image used to estimate the class probability; the maximum with --radius (default "
        "there: 20000) and --tolerance.",
    )
    alpha: float = option(type=PROBABILITY, default=0.001, help=f"{_ALPHA}.")


class StatisticsOptions(SampleOptions):
    """The question about each image: a radius, a decision at given radii, or a radius to a tolerance."""

    n0: int = option(
        type=Count("a number of samples"), default=100, help="Noise samples per image used to choose the class."
    )
    bound: str = option(default="clopper-pearson", help=f"{_BOUND}).")
    radius: list[float] | None = option(
        type=Numbers(),
        help="Decide only whether each image is robust at these radii, from as few samples as possible (at most --n).",
    )
    tolerance: float | None = option(
        type=SHARE, help="Stop each image once its radius is known to this relative tolerance, at most --n samples."
    )
    rule: str | None = option(help="Sequential test of --radius (`certify list rules`; default: one-sided).")


class RecomputeOptions(Options, section="Statistics"):
    """Another alpha or bound for votes that are there already."""

    alpha: float | None = option(type=PROBABILITY, help=f"{_ALPHA} (default: the run's).")
    bound: str | None = option(help=f"{_BOUND}; default: the run's).")


class AttackOptions(Options, section="Attacks"):
    """Attacks and their norm ball."""

    attacks: str = option(
        default="blind-pgd,square", help="Attacks, separated by commas; none for no attack (`certify list attacks`)."
    )
    eps: Distance = option(
        type=DistanceType(), default=Distance(8 / 255, "8/255"), help="Radius of the norm ball in [0, 1] pixels."
    )
    norm: str = option(type=click.Choice(["linf", "l2"]), default="linf", help="Norm of --eps.")
    queries: int = option(
        type=Count("queries"), default=1000, help="Maximum number of queries per image for each attack."
    )


class GradientAttackOptions(AttackOptions):
    """Attacks by queries, gradients or surrogates."""

    surrogate: tuple[str, ...] = option(
        default=(), metavar="MODEL[=FILE]", help="Surrogate classifier for --attacks transfer; repeatable."
    )
    steps: int = option(type=Count("steps"), default=40, help="Steps of gradient attacks.")
    seed: int = option(type=Count("a seed", least=0), default=0, help="Seed of everything random.")


class DeviceOptions(Options, section="Compute"):
    """Device."""

    device: str = option(
        default="auto", help="Device: cpu, cuda, cuda:1, mps, or auto for an accelerator where there is one."
    )


class ComputeOptions(DeviceOptions):
    """Device and execution of the base classifier."""

    precision: str = option(
        type=PRECISIONS,
        default="auto",
        help="Inference dtype; auto takes bfloat16 on hardware with instructions for it, else float32.",
    )
    compile: str = option(
        type=click.Choice(["auto", "on", "off"]),
        default="auto",
        help="Compile the base classifier; auto compiles when the run is long enough to benefit.",
    )
    batch_size: int | None = option(
        type=BatchSize(), metavar="N", help="Samples per forward pass; does not affect the noise (default: auto)."
    )


class ClusterOptions(ComputeOptions):
    """Device and execution, on this machine or on a cluster."""

    cluster: str | None = option(
        metavar="WHERE",
        help="Run on the workers of a Ray cluster: local[:K] (K on this machine), auto, or ray://HOST:PORT.",
    )
    shard: str | None = option(
        metavar="I/N", help="Process only part I of N of the images, into a file of its own (see `certify merge`)."
    )


class JsonOptions(Options, section="Output"):
    """Form of the result on stdout."""

    as_json: bool = flag("--json", help="Print one JSON object instead of text.")


class ProgressOptions(JsonOptions):
    """Form of the result on stdout, and progress on stderr."""

    progress: float | None = option(
        type=Positive("a number of seconds"),
        metavar="SECONDS",
        help="Print a line of progress every so many seconds (default: a bar in a terminal; elsewhere a line after 1, "
        "2, 5 and 10 minutes, then every 10).",
    )

    @property
    def silent(self) -> bool:
        """True if no plan is shown."""
        return self.as_json

    @property
    def shown(self) -> bool | float:
        """Display of progress, as for :func:`certify.runs.progress.progress_bar`."""
        return self.progress or not self.silent


class OutputOptions(ProgressOptions):
    """Run file and terminal output."""

    out: str | None = option(metavar="PATH", help="Run file (.jsonl), or a folder for it (default: runs/).")
    trust_identity: bool = flag(
        help="Resume a file written without a fingerprint, which cannot show that the Python model is still the same."
    )
    quiet: bool = flag(help="Print no plan and no progress on stderr.")
    dry_run: bool = flag(help="Do everything up to the estimate of the cost, write nothing, and stop.")

    @property
    def silent(self) -> bool:
        """True if no plan is shown."""
        return self.quiet or self.as_json


class RadiiOptions(Options, section="Output"):
    """Radii of a table."""

    radii: list[float] | None = option(
        type=Numbers(), help="Radii of the table, separated by commas (default: round numbers)."
    )


class CurveOptions(Options, section="Output"):
    """Lines of a figure or table of several runs."""

    envelope: bool = flag(
        help="One line per method: at each radius the best of its runs over sigma, chosen on the images they share."
    )
    names: tuple[str, ...] = option(
        "--name",
        default=(),
        metavar="TEXT",
        help="Name of a run in table or legend; once for each run, in their order.",
    )
