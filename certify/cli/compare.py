"""``certify compare``: compare defences without attack, under blind and adaptive attacks, and with certificates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from certify.cli.attack_context import load_attack_context
from certify.cli.console import say, speaker, stoppable, tell, tell_dry_run
from certify.cli.option_groups import (
    TABLE_FORMATS,
    DataOptions,
    GradientAttackOptions,
    ModelOptions,
    OutputOptions,
    SampleOptions,
)
from certify.cli.options import Options, command, command_line, option, overridden
from certify.cli.parameter_types import Count
from certify.runs.progress import progress_bar

if TYPE_CHECKING:
    from certify.runs.comparison_records import ComparisonHeader


class ComparisonOptions(Options, section="Defences"):
    """Defences and how they are compared."""

    defences: str = option(
        default="none,gs,median,bits,jpeg,tv",
        help="NAME:KEY=VALUE:..., separated by commas (`certify list defences`, `certify list denoisers`).",
    )
    group: str = option(
        type=click.Choice(["both", "blind", "adaptive"]),
        default="both",
        help="Attack the classifier alone (blind), the whole defence (adaptive), or both; adaptive queries take the "
        "defence's time.",
    )
    repeats: int = option(type=Count("repeats"), default=5, help="Answers of a random defence per image.")
    eot: int = option(
        type=Count("draws"),
        default=10,
        help="Forward passes per gradient of adaptive-pgd (EOT), where a defence is random.",
    )


class CertifiedColumn(Options, section="Statistics"):
    """Sampling for the certified column."""

    certify_n: int = option(
        type=Count("samples", least=0),
        default=1000,
        help="Maximum number of noise samples per image for the certified column; 0 leaves the column out.",
    )
    alpha: float = overridden(SampleOptions, "alpha")


class ComparisonOutput(OutputOptions):
    """File of the outcomes, table and figure."""

    out: str | None = overridden(OutputOptions, "out", help="File of outcomes (.jsonl), or a folder (default: runs/).")
    style: str = option("--format", type=TABLE_FORMATS, default="text", help="Format of the table.")
    figure: str | None = option(metavar="FILE", help="Figure to write: .png, .svg or .pdf.")
    quiet: bool = overridden(OutputOptions, "quiet", help="Print no progress on stderr.")


@command(
    "Compare defences under attacks, next to certificates.",
    main=("model", "data", "max_images", "defences", "attacks", "eps", "norm", "out"),
)
def compare(
    model: ModelOptions,
    data: DataOptions,
    defences: ComparisonOptions,
    attack: GradientAttackOptions,
    certified: CertifiedColumn,
    output: ComparisonOutput,
) -> None:
    """Compare defences of a frozen classifier on the same images.

    One table: accuracy on clean images, under random noise of the same size, under attacks that do not know the
    defence (blind), under attacks on the whole defended classifier (adaptive), and certified accuracy for denoised
    smoothing. Accuracy under an attack is an upper bound on robust accuracy; only the certified column is a guarantee.

    The same command resumes an interrupted comparison; `certify table` and `certify plot` show its file again.
    """
    if output.figure:
        from analysis.figures import check_format

        check_format(output.figure)
    path = _run_comparison(model, data, defences, attack, certified, output)
    if path is None:
        return
    from analysis.comparison.tables import records, tabulate_comparison
    from analysis.runs import read_comparison

    comparison = read_comparison(path)
    if output.as_json:
        tell(json.dumps({"run_file": str(path), "results": records(comparison)}))
    else:
        tell(tabulate_comparison(comparison, output.style))
    comparison.require_sound()
    if output.figure:
        from analysis.comparison.plot import draw_comparison

        draw_comparison(comparison, output.figure)
        if not output.as_json:
            say(f"wrote {output.figure}")


def _run_comparison(
    model: ModelOptions,
    data: DataOptions,
    options: ComparisonOptions,
    attack: GradientAttackOptions,
    certified: CertifiedColumn,
    output: ComparisonOutput,
) -> Path | None:
    """Run or resume the comparison; return the file of its outcomes, or None after a dry run."""
    from analysis.comparison.plan import Plan, make_header
    from analysis.comparison.runner import compare as run
    from certify.runs.files import output_path
    from certify.runs.run_file import ComparisonFile

    group, eot = options.group, options.eot
    context = load_attack_context(model, data, attack, options.defences, group=group, eot=eot, quiet=output.silent)
    context.check_defences()
    n, alpha = certified.certify_n, certified.alpha
    plan = Plan.of(context, group, repeats=options.repeats, certify_n=n, alpha=alpha)
    header = make_header(plan, context, model=model.model, data=data.data or "digits", command=command_line())
    path = output_path(output.out, _file_words(header), header)
    if output.dry_run:
        queries, images = plan.attacks.queries, len(context.images)
        speaker(quiet=output.silent)(
            f"cost       {header.expected:,} outcomes of {images:,} images; up to {queries:,} queries per image of an "
            f"attack by queries, {plan.attacks.steps:,} steps of one by gradients"
        )
        tell_dry_run(f"{path} is not written", output, outcomes=header.expected, images=images, queries=queries)
        return None
    with ComparisonFile(path, header, trust_identity=output.trust_identity) as file:
        present = f": {len(file.done):,} of {header.expected:,} outcomes are there already" if file.resumed else ""
        speaker(quiet=output.silent)(f"outcomes   {path}{present}")
        with (
            progress_bar(header.expected, "outcomes", shown=output.shown) as bar,
            stoppable(file, header.expected, "outcomes"),
        ):
            run(context, plan, file, bar.update)
    return path


def _file_words(header: ComparisonHeader) -> list[str]:
    """Return the words of the file's name."""
    return ["compare", Path(header.model).stem, Path(header.data).stem, header.norm, header.eps_text]
