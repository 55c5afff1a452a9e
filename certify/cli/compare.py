"""``certify compare``: defences side by side: without attack, under blind and adaptive ones, beside certificates."""

from __future__ import annotations

import dataclasses
import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from certify.cli import options
from certify.cli.files import output_path, stoppable
from certify.cli.load import chosen_images, classifier_from, surrogate_from
from certify.cli.summary import warn
from certify.errors import ImageError, UserError, first_line

if TYPE_CHECKING:
    from analysis.compare import Plan
    from certify.classifiers import Classifier
    from certify.defence import Defence
    from certify.images import ImageSet

DEFENCES_BY_DEFAULT = "none,gs,median,bits,jpeg,tv"
ATTACKS_BY_DEFAULT = "blind-pgd,square"


class Distance(options.ParamType):
    """A distance: 0.5, or a fraction such as 8/255."""

    name = "number|fraction"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, str]:
        """``"8/255"`` to ``(0.0313..., "8/255")``."""
        if isinstance(value, tuple):
            return value
        try:
            number = float(Fraction(str(value)))
            if not 0 < number < float("inf"):
                raise ValueError
        except (ValueError, ZeroDivisionError, OverflowError):
            self.fail(f"{value!r}; expected a distance above 0 in [0, 1] pixels, such as 8/255 or 0.5", param, ctx)
        return number, str(value)


@click.command(short_help="Compare defences under attacks and beside certificates.")
@options.classifier_options
@options.data_options
@click.option(
    "--defences",
    default=DEFENCES_BY_DEFAULT,
    show_default=True,
    help="NAME:KEY=VALUE:..., separated by commas (`certify list defences`, `denoisers`).",
)
@click.option(
    "--attacks", default=ATTACKS_BY_DEFAULT, show_default=True, help="Separated by commas (`certify list attacks`)."
)
@click.option("--eps", type=Distance(), default="8/255", show_default=True, help="Largest distance in [0, 1] pixels.")
@click.option("--norm", type=click.Choice(["linf", "l2"]), default="linf", show_default=True, help="Its norm.")
@click.option(
    "--queries", type=options.Count("queries"), default=1000, show_default=True, help="Of query attacks, an image."
)
@click.option("--surrogate", multiple=True, metavar="MODEL[=FILE]", help="For --attacks transfer; repeatable.")
@click.option(
    "--repeats", type=options.Count("repeats"), default=5, show_default=True, help="Answers of a random defence."
)
@click.option(
    "--eot",
    type=options.Count("draws"),
    default=10,
    show_default=True,
    help="Passes a gradient of adaptive-pgd, where a defence is random.",
)
@click.option("--steps", type=options.Count("steps"), default=40, show_default=True, help="Steps of gradient attacks.")
@click.option(
    "--certify-n",
    type=options.Count("samples", least=0),
    default=1000,
    show_default=True,
    help="Samples an image for the certified column, at most; 0: no such column.",
)
@options.alpha
@click.option(
    "--seed", type=options.Count("a seed", least=0), default=0, show_default=True, help="Of everything drawn."
)
@click.option("--out", metavar="PATH", help="File of the outcomes (.jsonl), or a folder for it (default: runs/).")
@click.option(
    "--format", "style", type=click.Choice(["text", "markdown", "latex", "csv"]), default="text", help="Of the table."
)
@click.option("--figure", metavar="FILE", help="Picture to write: .png, .svg or .pdf.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def compare(**o: Any) -> None:
    """Compare defences of a frozen classifier on the same images.

    One table: accuracy on clean images, under random noise of the same size, under attacks that do not know the
    purifier (blind), under attacks on the whole defended classifier (adaptive), and the certified share for denoised
    smoothing. An accuracy under attack is what this attack left, not a guarantee; only the certified column is one.
    The same command goes on where it stopped; `certify table` and `certify plot` show the file again.
    """
    from certify import hub

    if o["figure"]:
        from analysis.plots import check_format

        check_format(o["figure"])
    hub.require_weights(hub.find_source(o["model"], o["weights"]), o["weights"])
    named = _listed("--defences", o["defences"])
    attacks = _listed("--attacks", o["attacks"]) if o["attacks"] != "none" else []
    _check_names(named)
    if o["data"] is None:
        if o["model"] != "digits":
            raise UserError(
                "--data is missing: expected labelled images, such as a folder with a folder for each class"
            )
        o["data"] = "digits"
        o["max_images"] = o["max_images"] or 50
    path = _work(o, named, attacks)
    from analysis.comparison_tables import records, tabulate_comparison
    from analysis.runs import read_comparison

    found = read_comparison(path)
    if o["as_json"]:
        click.echo(json.dumps({"run_file": str(path), "results": records(found)}))
    else:
        click.echo(tabulate_comparison(found, o["style"]))
    found.require_sound()
    if o["figure"]:
        from analysis.comparison_plot import draw_comparison

        draw_comparison(found, o["figure"])


def _listed(option: str, text: str) -> list[str]:
    found: list[str] = []
    for part in text.split(","):
        if found and part[:1].isdigit():  # the value of an option goes on: levels=90,75
            found[-1] += f",{part.strip()}"
        else:
            found.append(part.strip())
    if "" in found or len(set(found)) < len(found):
        raise UserError(f"{option} {text!r}: expected names separated by commas, each once")
    return found


def _check_names(named: list[str]) -> None:
    """Refuse what is no defence before anything is loaded."""
    from denoisers import DEFENCES
    from denoisers.names import find_source

    for text in named:
        if text.partition(":")[0] not in DEFENCES:
            find_source(text)


def _work(o: dict[str, Any], named: list[str], attacks: list[str]) -> Path:
    """Build, compare, and say where the outcomes are."""
    from tqdm import tqdm

    from analysis.attacks import check_attacks, crafter
    from analysis.compare import compare as run_all
    from analysis.compare import make_header
    from certify.records import RunFile
    from denoisers.defences import undefended

    if o["surrogate"] and "transfer" not in attacks:
        raise UserError("--surrogate belongs to --attacks transfer; leave it out here")
    check_attacks(attacks, norm=o["norm"], surrogates=len(o["surrogate"]))
    classifier = classifier_from(o["model"], o)
    images = _readable(chosen_images(o, classifier), o["strict"])
    if not images.labelled:
        raise UserError(f"{images.name} has no labels, and accuracies need them: --labels FILE, or a folder a class")
    defences = {text: _build(text, classifier) for text in named}
    surrogates = [surrogate_from(s) for s in o["surrogate"]]
    plan = _plan(o, attacks, defences, [s.identity() for s in surrogates])
    header = make_header(plan, defences, images, model=o["model"], data=o["data"], command=options.command_line())
    path = output_path(o["out"], _words(header), header)
    craft = crafter(
        classifier,
        eps=plan.eps,
        norm=plan.norm,
        queries=o["queries"],
        steps=o["steps"],
        eot=o["eot"],
        seed=o["seed"],
        surrogates=surrogates,
    )
    say = not (o["quiet"] or o["as_json"])
    with RunFile(path, header) as file:
        if say:
            there = f": {len(file.done):,} of {header['expected']:,} outcomes are there already" if file.resumed else ""
            click.echo(f"outcomes   {path}{there}", err=True)
        with (
            tqdm(
                total=header["expected"],
                unit=" outcomes",
                disable=None if say else True,
                leave=False,
                file=sys.stderr,
            ) as bar,
            stoppable(file, header["expected"], "outcomes"),
        ):
            run_all(defences, undefended(classifier), images, plan, file, craft, bar.update)
    return path


def _build(text: str, classifier: Classifier) -> Defence | str:
    """The defence, or why there is none: a user's mistake stops the command, a fault of its own fails its row alone."""
    from denoisers.defences import build_defence

    try:
        return build_defence(text, classifier)
    except UserError:
        raise
    except Exception as error:
        warn(f"defence {text}: {type(error).__name__}: {first_line(error)}; its row is left without figures")
        return f"{type(error).__name__}: {first_line(error)}"


def _readable(images: ImageSet, strict: bool) -> ImageSet:
    """The images that can be read: all defences are judged on the same ones."""
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


def _plan(o: dict[str, Any], attacks: list[str], defences: dict[str, Any], surrogates: list[str]) -> Plan:
    from analysis.attacks import groups_of
    from analysis.compare import CLEAN, RANDOM, SMOOTHING, Plan, applies
    from analysis.comparison import Condition

    conditions = [CLEAN, RANDOM]
    for group in ("blind", "adaptive"):
        conditions += [Condition(name, group) for name in attacks if group in groups_of(name)]
    if o["certify_n"] and any(applies(d, SMOOTHING) for d in defences.values()):
        conditions.append(SMOOTHING)
    eps, text = o["eps"]
    settings = {
        "eps_text": text,
        "queries": o["queries"],
        "steps": o["steps"],
        "eot": o["eot"],
        "surrogates": surrogates,
    }
    return Plan(conditions, eps, o["norm"], o["repeats"], o["seed"], o["certify_n"], o["alpha"], settings)


def _words(header: dict[str, Any]) -> list[str]:
    """What the file is called, where only its folder is named."""
    return ["compare", Path(header["model"]).stem, Path(header["data"]).stem, header["norm"], header["eps_text"]]
