"""Options that several verbs share: one spelling everywhere."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Collection
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NoReturn

import click

from certify.errors import UserError
from certify.smoothing.rounding import exact

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:  # generic only since click 8.5
    ParamType = click.ParamType


def number(text: str) -> float:
    """A number, or a fraction as the field writes them: ``64/255``.

    Raises:
        ValueError: neither.
    """
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ZeroDivisionError, OverflowError):
        raise ValueError(f"{text} is not finite") from None


class Numbers(ParamType):
    """Numbers separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """``"0,0.25"`` to ``[0.0, 0.25]``."""
        if isinstance(value, list):
            return value
        try:
            return [number(v) for v in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r}; expected numbers separated by commas, such as 0,0.25,0.5", param, ctx)


class Size(ParamType):
    """Channels, height and width."""

    name = "CxHxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        """``"3x224x224"`` to ``(3, 224, 224)``."""
        if isinstance(value, tuple):
            return value
        parts = str(value).lower().split("x")
        if len(parts) != 3 or not all(p.isdecimal() and int(p) > 0 for p in parts):
            self.fail(f"{value!r}; expected channels x height x width, such as 3x224x224", param, ctx)
        return int(parts[0]), int(parts[1]), int(parts[2])


TYPED = "certify.typed"
"""Where a context keeps the arguments as they were typed."""


class OneNumber(ParamType):
    """A number of which a run has one; several separated by commas are an error that names a command for the first."""

    def read(self, text: str) -> Any:
        """Text to the number.

        Raises:
            ValueError: no such number.
        """
        raise NotImplementedError

    def refuse(self, value: Any, expected: str, param: click.Parameter | None, ctx: click.Context | None) -> NoReturn:
        """Raise the error of a value that is no such number."""
        parts = str(value).split(",")
        with contextlib.suppress(ValueError, OverflowError):
            if len(parts) > 1 and param is not None and ctx is not None and [self.read(part) for part in parts]:
                named = any(word.partition("=")[0] == "--out" for word in ctx.meta.get(TYPED, ()))
                also = " and another --out" if named else ""
                self.fail(
                    f"{value!r} are {len(parts)} values; expected one in each run: first run "
                    f"`{_with_value(param, str(value), parts[0], ctx)}`, then the same with {parts[1]}{also}",
                    param,
                    ctx,
                )
        self.fail(f"{value!r}; expected {expected}", param, ctx)


def _with_value(param: click.Parameter, old: str, new: str, ctx: click.Context) -> str:
    """The command as it was typed, but for the value of one option."""
    words = ["certify", *ctx.meta.get(TYPED, ())]
    for i, word in enumerate(words):
        name, sign, text = word.partition("=")
        if name in param.opts and sign and text == old:
            words[i] = f"{name}={new}"
        elif word == old and words[i - 1] in param.opts:
            words[i] = new
    return shlex.join(words)


class Count(OneNumber):
    """A whole number from 1; 1e5 and 100_000 are understood."""

    name = "integer"

    def __init__(self, what: str, least: int = 1) -> None:
        self.what, self.least = what, least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Text to a whole number in range."""
        with contextlib.suppress(ValueError, OverflowError):
            return self.read(value)
        self.refuse(value, f"{self.what}, a whole number from {self.least}", param, ctx)

    def read(self, text: str) -> int:
        """Text to a whole number in range."""
        try:
            number = int(text)
        except ValueError:  # 1e5, which is exact only as far as floating point is
            number = int(float(text)) if float(text).is_integer() else self.least - 1
        if number < self.least:
            raise ValueError
        return number


class Positive(OneNumber):
    """A finite number above 0, and below ``below`` if given."""

    name = "number"

    def __init__(self, advice: str, below: float = float("inf")) -> None:
        self.advice, self.below = advice, below

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Text to a number in range."""
        with contextlib.suppress(ValueError):
            return self.read(str(value))
        self.refuse(value, self.advice, param, ctx)

    def read(self, text: str) -> float:
        """Text to a number in range."""
        found = number(text)
        if not 0.0 < found < self.below:
            raise ValueError
        return found


def check_radii(radii: list[float] | None, option: str = "--radii") -> None:
    """Refuse negative and infinite radii."""
    if radii is not None and not all(0 <= r < float("inf") for r in radii):
        raise UserError(f"{option} {','.join(map(exact, radii))}: expected numbers from 0")


def command_line() -> str:
    """Return this command as it was typed, for the record, without passwords, queries and fragments of URLs."""
    from certify.blackbox.client.credentials import public

    return "certify " + " ".join(shlex.quote(public(word)) for word in sys.argv[1:])


def given_by_user(name: str) -> bool:
    """Whether an option was given, rather than left to its default."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, click.core.ParameterSource.DEFAULT)


class BatchSize(Count):
    """A number of samples, or ``auto`` (None)."""

    name = "auto|integer"

    def __init__(self) -> None:
        super().__init__("auto or a batch size")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """``auto`` to None, other text to a whole number."""
        return None if value == "auto" else super().convert(value, param, ctx)


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator, in this order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


sigma = click.option(
    "--sigma",
    type=Positive("a number above 0, in [0, 1] pixels (0.25, not 64 of 255)"),
    required=True,
    help="Standard deviation of the noise, in pixels of images scaled to [0, 1].",
)

noise_options = together(
    sigma,
    click.option("--noise", default="gaussian", help="Smoothing distribution (`certify list noises`)."),
    click.option("--round", "rounded", is_flag=True, help="With --noise exact: round images to the 8-bit grid first."),
)

_MODEL = (
    "The frozen classifier: digits, cifar_resnet56, any timm or torchvision name, hf-hub:OWNER/NAME, "
    "a TorchScript or ONNX file, a folder that timm saved, or package.module:callable."
)

model_if_any = click.option("--model", help=f"{_MODEL} Without one: no accuracies.")

trust_code = click.option(
    "--trust-code",
    is_flag=True,
    help="Run the program in a TorchScript file (model or denoiser); it can do anything that you can.",
)

input_options = together(
    click.option(
        "--weights",
        metavar="FILE[::PART]",
        help="Its checkpoint (.pth .pt .th .ckpt .safetensors), if not the published one; PART of several in it.",
    ),
    click.option("--input-size", type=Size(), metavar="CxHxW", help="Its input, in place of its own setting."),
    click.option("--mean", type=Numbers(), help="Mean that it subtracts, per channel, in place of its own."),
    click.option(
        "--std", type=Numbers(), help="Standard deviation that it divides by, per channel, in place of its own."
    ),
    click.option(
        "--num-classes", type=Count("the number of classes"), help="Number of classes, where the model does not say."
    ),
    trust_code,
)

classifier_options = together(click.option("--model", required=True, help=_MODEL), input_options)

image_options = together(
    click.option(
        "--data",
        help="Images: a dataset's name (`certify list datasets`), an image, folder, .zip (or a folder in it: "
        "x.zip/test) or .npz.",
    ),
    click.option("--root", metavar="DIR", help="Folder of torchvision's datasets (default: ./data)."),
    click.option("--download", is_flag=True, help="Download a missing torchvision dataset to --root."),
    click.option(
        "--skip", type=Count("K to take every K-th image"), default=1, help="Take every K-th image, from --start."
    ),
    click.option(
        "--start", type=Count("the first image's place", least=0), default=0, help="Place of the first image, from 0."
    ),
    click.option("--max", "max_images", type=Count("the most images to take"), help="Take at most so many images."),
    click.option(
        "--ids", help="Take only these images: ids separated by commas; double quotes around one that holds a comma."
    ),
)

data_options = together(
    image_options,
    click.option(
        "--labels", metavar="FILE", help="CSV of file,label for images without class folders; 'none' ignores labels."
    ),
    click.option("--class-map", metavar="FILE", help="CSV or JSON from class folder to the classifier's class."),
    click.option("--strict", is_flag=True, help="Stop at the first image that cannot be read."),
)

PROBABILITY = Positive("a probability strictly between 0 and 1, such as 0.001", below=1.0)
SHARE = Positive("a share between 0 and 1, such as 0.1", below=1.0)

_WRONG = "Probability that the statement about an image is wrong, at most"
alpha = click.option("--alpha", type=PROBABILITY, default=0.001, help=f"{_WRONG}.")
bound = click.option("--bound", default="clopper-pearson", help="Confidence bound (`certify list bounds`).")
rule = click.option("--rule", help="Stopping rule of --radius (`certify list rules`; default: one-sided).")


def alpha_and_bound(default: str) -> Decorator:
    """Another alpha and another bound than those of what is read, ``default``."""
    return together(
        click.option("--alpha", type=PROBABILITY, help=f"{_WRONG} (default: {default})."),
        click.option("--bound", help=f"Confidence bound (`certify list bounds`; default: {default})."),
    )


n0 = click.option("--n0", type=Count("a number of samples"), default=100, help="Selection samples an image.")

n = click.option(
    "--n",
    type=Count("a number of samples"),
    default=100_000,
    help="Estimation samples an image; the most of them with --radius (default there: 20000) and --tolerance.",
)

engine_options = together(
    click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        help="Inference dtype; auto takes bfloat16 on hardware with instructions for it, else float32.",
    ),
    click.option(
        "--compile",
        type=click.Choice(["auto", "on", "off"]),
        default="auto",
        help="Compile the base classifier; auto does so where the run is long enough for it to pay.",
    ),
    click.option(
        "--batch-size",
        type=BatchSize(),
        default="auto",
        metavar="N",
        help="Samples per forward pass; does not affect the noise.",
    ),
)

device = click.option("--device", default="auto", help="Device: cpu, cuda, cuda:1, mps; auto takes an accelerator.")


def seed(of: str) -> Decorator:
    """The seed of what is drawn: noise, or everything."""
    return click.option("--seed", type=Count("a seed", least=0), default=0, help=f"Seed of {of}.")


def as_json(of: str) -> Decorator:
    """The choice of JSON in place of a table or a text."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print one JSON object instead of {of}.")


quiet = click.option("--quiet", is_flag=True, help="No plan and no progress on stderr.")

denoiser = click.option("--denoiser", default="none", help="Denoiser in front (`certify list denoisers`).")

trust_identity = click.option(
    "--trust-identity",
    is_flag=True,
    help="Resume a file that cannot prove that its Python model is still the same (written without a fingerprint).",
)

compute_options = together(
    denoiser,
    seed("all noise; secret if an adversary may choose images"),
    device,
    engine_options,
    click.option("--out", metavar="PATH", help="Run file (.jsonl), or a folder for it (default: runs/)."),
    trust_identity,
    as_json("the table"),
    quiet,
)


runs_argument = click.argument("runs", nargs=-1, required=True, metavar="RUN...")

envelope_option = click.option(
    "--envelope",
    is_flag=True,
    help="One line a method: at each radius the best of its runs over sigma, chosen on the images they share.",
)


name_option = click.option(
    "--name", "given", multiple=True, metavar="TEXT", help="What to call a run; once for each, in their order."
)


FOR_CERTIFICATES = "is for runs of certificates; leave it out for"
"""The reason of :func:`refuse_given` where something else is shown."""


def refuse_beside_comparison(paths: tuple[str, ...], names: tuple[str, ...]) -> None:
    """A comparison is shown alone, and options for certificates say nothing about it."""
    if len(paths) > 1:
        raise UserError(f"{len(paths)} files, a comparison among them: a comparison is shown alone; name one")
    refuse_given(names, f"{FOR_CERTIFICATES} a comparison")


def refuse_given(names: Collection[str], why: str) -> None:
    """Refuse options of this command that were given and would change nothing, by their spelling and ``why``."""
    for option in click.get_current_context().command.params:
        if option.name in names and given_by_user(option.name):
            raise UserError(f"{option.opts[0]} {why}")
