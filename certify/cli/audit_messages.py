"""Terminal output of an audit: plan, warnings and results."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certify.cli.console import say, show_prospects, tell
from certify.cli.summary import title
from certify.runs.progress import duration, progress_bar
from certify.smoothing.rounding import exact

if TYPE_CHECKING:
    from certify.blackbox.audit import Observer
    from certify.blackbox.plan import Audit
    from certify.blackbox.record import AuditPlan, AuditRecord
    from certify.blackbox.results import Replayed
    from certify.runs.run_file import Run


@contextlib.contextmanager
def display(show: Callable[[str], None], shown: bool | float) -> Iterator[Observer]:
    """Yield an observer that shows an audit in the terminal; its progress bar ends with the block.

    Args:
        show: prints a line, or nothing.
        shown: how progress is shown, as for :func:`certify.runs.progress.progress_bar`.
    """
    from certify.blackbox.audit import Observer

    with contextlib.ExitStack() as stack:
        bar: Any = None

        def start(images: int) -> None:
            nonlocal bar
            bar = stack.enter_context(progress_bar(images, "images", shown=shown))

        def advance(images: int) -> None:
            bar.update(images)

        yield Observer(
            planned=lambda audit, planned: show_plan(audit, planned, show),
            opened=lambda path, spent, budget: show(f"ledger     {path}: {spent:,} of {budget:,} requests are spent"),
            started=start,
            advanced=advance,
            attacking=stack.close,
            waiting=say,
        )


def show_plan(audit: Audit, plan: AuditPlan, say: Callable[[str], None]) -> None:
    """Show what will be queried, what it can certify, its cost and its duration."""
    procedure, noise = audit.settings.procedure, audit.noise
    early = procedure.sequential
    options = ", ".join(f"{k}={v}" for k, v in audit.service.options.items() if v not in ("", None, False))
    say(f"service    {audit.service.endpoint}: {audit.service.protocol} ({options})")
    size = "x".join(map(str, audit.service.size)) if audit.service.size else "unchanged"
    count = f"{len(audit.images):,} of {audit.images.available:,}"
    say(f"images     {audit.images.name}: {count}, size {size}{audit.images.omissions}")
    behind = "" if audit.denoiser is None else "then the denoiser, "
    say(
        f"queries    {noise.name} noise, sigma = {noise.scale:g} in [0, 1] pixels, {behind}then clipped, rounded to 8 "
        f"bits and sent as {audit.service.encoding}"
    )
    show_prospects(procedure, noise, noise.scale, say)
    most = "at most " if early else ""
    parts = ", ".join(f"{count:,} {stage}" for stage, count in plan.queries.items())
    say(f"plan       {most}{plan.most:,} queries ({parts}); each may take retries, which count")
    if plan.most > audit.budget:
        sure = f"finishes {plan.covers:,} of {plan.images:,} images without retries"
        sure = f"about {plan.covers:,} of {plan.images:,} images if each takes {procedure.n:,}" if early else sure
        say(f"budget     {audit.budget:,} requests: {sure}")
    else:
        say(f"budget     {audit.budget:,} requests, never exceeded")
    if plan.cost is not None:
        say(
            f"cost       {most}{plan.cost:.2f} without retries, {plan.cost_most:.2f} if they use up the budget; "
            f"at {plan.price_per_1000:g} per 1,000 requests"
        )
    if plan.seconds is None:
        say(f"time       limited by the service, {plan.concurrency} requests in flight (--rate limits them)")
    else:
        long = "at most about" if early else "at least"
        say(f"time       {long} {duration(plan.seconds)} without retries, at {plan.rate:g} requests per second")


def print_outcome(folder: Path, record: AuditRecord, *, as_json: bool) -> None:
    """Print the table, the counts and the paths, or one JSON object."""
    from analysis.accuracy_bound import accuracy_bound
    from certify.runs.run_file import read_run
    from certify.smoothing.procedures import needs_fixed_function

    run = read_run(folder / "run.jsonl", allow_partial=True)
    if as_json:
        rows = [row.to_json() for row in run.images]
        together = {"accuracy": accuracy_bound(run).to_dict()} if run.header.without_radii else {}
        tell(json.dumps({"folder": str(folder), "audit": record.to_json(), **together, "images": rows}))
        return
    tell(_table(run))
    spent, plan = record.asked, record.plan
    assert spent is not None
    failed = sum(spent.failures.values())
    tell(
        f"requests           {spent.requests:,} of a budget of {plan.budget:,}: {spent.retries:,} of them retries; "
        f"{failed:,} queries failed"
    )
    if spent.cost is not None:
        tell(f"cost               {spent.cost:.2f}, at {plan.price_per_1000:g} per 1,000 requests")
    if spent.seconds:
        times = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in spent.seconds.items())
        tell(f"response times     {times}")
    outside = sum(row.outside or 0 for row in run.usable)
    if outside:
        tell(f"no vote            {outside:,} noisy copies: the service abstained, or gave no label of the class map")
    if needs_fixed_function(run.header.procedure):
        tell(f"deterministic      {_determinism(record)}")
    if record.status != "finished":
        tell(f"unfinished         {record.status}: a larger --budget resumes in the same folder")
    tell(f"\nrun file   {folder / 'run.jsonl'}\nreport     {folder / 'report.html'}\nreplay     {record.replay}")


def print_attacks(folder: Path) -> None:
    """Print the table of the attacks, if any were run."""
    from analysis.comparison.tables import tabulate_comparison
    from analysis.runs import read_comparison
    from certify.cli.audit_attacks import COMPARISON

    if (folder / COMPARISON).is_file():
        comparison = read_comparison(folder / COMPARISON)
        tell(f"\n{tabulate_comparison(comparison, 'text')}\n\nattacks    {folder / COMPARISON}")


def _determinism(record: AuditRecord) -> str:
    """Return the results of determinism probe and drift check in one line."""
    again = sum(sum(probe.labels.values()) for probe in record.determinism)
    agree = all(len(probe.labels) == 1 for probe in record.determinism)
    first = f"{again} queries of one clean image {'agree' if agree else 'DIFFER'}" if again else "not probed"
    compared = [one for one in record.drift if one.compared]
    if not compared:
        return f"{first}; no check at the end"
    same = sum(not one.changed for one in compared)
    return f"{first}; at the end {same} of {len(compared)} clean images have the same label"


def print_replay(replayed: Replayed, *, anew: bool) -> None:
    """Print the table, and whether it equals that of the run file."""
    tell(_table(replayed.run))
    if anew:
        header = replayed.run.header
        tell(f"recomputed from the ledger at alpha = {exact(header.alpha)}, {header.bound}")
    elif not replayed.differing:
        what = "images have the votes" if replayed.run.header.without_radii else "certificates are those"
        tell(f"equal: all {len(replayed.run.images)} {what} of {replayed.run.path}")


def _table(run: Run) -> str:
    """Return the table of certified accuracy over radius, or of the accuracy of all images together."""
    if run.header.without_radii:
        from analysis.accuracy_bound import accuracy_bound
        from certify.cli.accuracy import describe

        return f"{describe(accuracy_bound(run))}\n"
    from analysis.curves import curves, table_radii
    from analysis.tables import one_run

    header, rows = run.header, run.usable
    lines = [title(run)]
    left = header.expected - len(rows)
    if left:
        lines.append(f"{left:,} images are left out: not queried, unfinished, or without a reference label")
    if not rows:
        return "\n".join(lines)
    (curve,) = curves([run])
    lines += ["", one_run(curve, table_radii(run)), ""]
    own = header.reference is None or header.reference.labels == "service"
    reference = "the service's own answer" if own else "the given label"
    lines.append(f"reference label    {reference}")
    lines.append(f"abstained          {sum(row.abstained for row in rows):,} of {len(rows):,}")
    queries = sum(row.queries or 0 for row in rows)
    lines.append(
        f"queries per image  {queries / len(rows):.1f} on average, {max(row.queries or 0 for row in rows):,} at most"
    )
    return "\n".join(lines)
