"""``certify compare``: defences side by side: without attack, under blind and adaptive ones, beside certificates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from certify.cli import options
from certify.cli.attack_options import Scene, attack_options, attacks_wanted, set_scene
from certify.cli.console import progress_bar, say, speaker, tell
from certify.cli.output_files import output_path, stoppable
from certify.errors import UserError

if TYPE_CHECKING:
    from analysis.comparison.runner import Plan

DEFENCES_BY_DEFAULT = "none,gs,median,bits,jpeg,tv"


@click.command(short_help="Compare defences under attacks and beside certificates.")
@options.classifier_options
@options.data_options
@click.option(
    "--defences",
    default=DEFENCES_BY_DEFAULT,
    help="NAME:KEY=VALUE:..., separated by commas (`certify list defences`, `denoisers`).",
)
@attack_options
@click.option(
    "--group",
    type=click.Choice(["both", "blind", "adaptive"]),
    default="both",
    help="Run attacks blind, on whole defences, or both where they can be: adaptive queries cost the defence's time.",
)
@click.option("--repeats", type=options.Count("repeats"), default=5, help="Answers of a random defence.")
@click.option(
    "--eot",
    type=options.Count("draws"),
    default=10,
    help="Passes a gradient of adaptive-pgd, where a defence is random.",
)
@click.option(
    "--certify-n",
    type=options.Count("samples", least=0),
    default=1000,
    help="Samples an image for the certified column, at most; 0: no such column.",
)
@options.alpha
@click.option("--out", metavar="PATH", help="File of the outcomes (.jsonl), or a folder for it (default: runs/).")
@options.trust_identity
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "markdown", "latex", "csv"]),
    default="text",
    help="Form of the table.",
)
@click.option("--figure", metavar="FILE", help="Picture to write: .png, .svg or .pdf.")
@options.as_json("the table")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def compare(**o: Any) -> None:
    """Compare defences of a frozen classifier on the same images.

    One table: accuracy on clean images, under random noise of the same size, under attacks that do not know the
    purifier (blind), under attacks on the whole defended classifier (adaptive), and the certified share for denoised
    smoothing. An accuracy under attack is what this attack left, not a guarantee; only the certified column is one.
    The same command goes on where it stopped; `certify table` and `certify plot` show the file again.
    """
    if o["figure"]:
        from analysis.figures import check_format

        check_format(o["figure"])
    path = _work(o)
    from analysis.comparison.tables import records, tabulate_comparison
    from analysis.runs import read_comparison

    found = read_comparison(path)
    if o["as_json"]:
        tell(json.dumps({"run_file": str(path), "results": records(found)}))
    else:
        tell(tabulate_comparison(found, o["style"]))
    found.require_sound()
    if o["figure"]:
        from analysis.comparison.plot import draw_comparison

        draw_comparison(found, o["figure"])
        if not o["as_json"]:
            say(f"wrote {o['figure']}")


def _work(o: dict[str, Any]) -> Path:
    """Build, compare, and say where the outcomes are."""
    from analysis.comparison.runner import check_defences, make_header
    from analysis.comparison.runner import compare as run_all
    from certify.runs.run_file import RunFile
    from denoisers.defences import undefended

    _check_groups(o)
    scene = set_scene(o, digits=50, eot=o["eot"])
    plan = _plan(o, scene)
    bare = undefended(scene.classifier)
    check_defences({"": bare, **scene.defences}, scene.images, plan)
    header = make_header(
        plan, scene.defences, scene.images, model=o["model"], data=o["data"], command=options.command_line()
    )
    path = output_path(o["out"], _words(header), header)
    quiet = o["quiet"] or o["as_json"]
    with RunFile(path, header, trust_identity=o["trust_identity"]) as file:
        there = f": {len(file.done):,} of {header['expected']:,} outcomes are there already" if file.resumed else ""
        speaker(quiet=quiet)(f"outcomes   {path}{there}")
        with (
            progress_bar(header["expected"], "outcomes", hidden=quiet) as bar,
            stoppable(file, header["expected"], "outcomes"),
        ):
            run_all(scene.defences, bare, scene.images, plan, file, scene.craft, bar.update)
    return path


def _groups(o: dict[str, Any]) -> tuple[str, ...]:
    from analysis.attacks import BOTH

    return BOTH if o["group"] == "both" else (o["group"],)


def _check_groups(o: dict[str, Any]) -> None:
    """Refuse attacks that ``--group`` leaves nothing to do, before anything is loaded."""
    from analysis.attacks import find_attack

    for name in attacks_wanted(o):
        groups = find_attack(name).groups
        if not set(_groups(o)) & set(groups):
            raise UserError(f"--group {o['group']}: attack {name} is {groups[0]} only; leave it or --group out")


def _plan(o: dict[str, Any], scene: Scene) -> Plan:
    from analysis.attacks import find_attack
    from analysis.comparison.results import Condition
    from analysis.comparison.runner import CLEAN, RANDOM, SMOOTHING, Plan, applies

    conditions = [CLEAN, RANDOM]
    for group in _groups(o):
        conditions += [Condition(name, group) for name in scene.attacks if group in find_attack(name).groups]
    if o["certify_n"] and any(applies(d, SMOOTHING) for d in scene.defences.values()):
        conditions.append(SMOOTHING)
    eps, text = o["eps"]
    settings = {
        "eps_text": text,
        "queries": o["queries"],
        "steps": o["steps"],
        "eot": o["eot"],
        "surrogates": [s.identity() for s in scene.surrogates],
    }
    if any(not s.closed for s in scene.surrogates):
        settings["surrogate_records"] = [s.record() for s in scene.surrogates]
    return Plan(conditions, eps, o["norm"], o["repeats"], o["seed"], o["certify_n"], o["alpha"], settings)


def _words(header: dict[str, Any]) -> list[str]:
    """What the file is called, where only its folder is named."""
    return ["compare", Path(header["model"]).stem, Path(header["data"]).stem, header["norm"], header["eps_text"]]
