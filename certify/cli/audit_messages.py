"""Terminal output of an audit: plan, warnings and results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certify.cli.console import clock, tell, warn
from certify.cli.plan import show_prospects
from certify.cli.summary import title
from certify.smoothing.rounding import exact

if TYPE_CHECKING:
    from certify.blackbox.determinism import Probed
    from certify.blackbox.plan import Audit, AuditPlan
    from certify.blackbox.replay import Replayed
    from certify.runs.run_file import Run


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
        if not plan.covers and not early:
            warn(
                f"--budget {audit.budget} finishes no image: one takes {plan.least:,} requests, probes included; "
                "replies are kept, and a larger --budget resumes in the same folder"
            )
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
        say(f"time       {long} {clock(plan.seconds)} without retries, at {plan.rate:g} requests per second")


def warn_of_probe(probes: Sequence[Probed]) -> None:
    """Warn if the determinism probe shows a service that is not deterministic."""
    for probe in probes:
        if len(probe.labels) > 1:
            answers = ", ".join(f"{label} {count} times" for label, count in probe.labels.items())
            warn(
                f"NON-DETERMINISTIC: repeated queries of image {probe.id} returned different labels: {answers}. "
                "A certificate presupposes a fixed function; these do not hold for this service"
            )
        elif probe.spread:
            warn(f"the scores of one image vary by {probe.spread:.3g} between repeated queries; its label does not")


def warn_of_drift(about: Mapping[str, Any]) -> None:
    """Warn if the service changed during the audit."""
    from certify.blackbox.determinism import Drifted

    compared = [one for one in (Drifted(**d) for d in about["drift"]) if one.compared]
    changed = [one.id for one in compared if one.changed]
    if changed:
        warn(
            f"DRIFT: at the end the service returned other labels for {len(changed)} of {len(compared)} clean "
            f"images ({', '.join(changed[:3])}); the certificates do not hold for any single function"
        )


def print_outcome(folder: Path, about: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the table, the counts and the paths, or one JSON object."""
    from certify.runs.run_file import read_run

    run = read_run(folder / "run.jsonl", allow_partial=True)
    if as_json:
        tell(json.dumps({"folder": str(folder), "audit": about, "images": [row.to_json() for row in run.images]}))
        return
    tell(_table(run))
    queried, plan = about["asked"], about["plan"]
    failed = sum(queried["failures"].values())
    tell(
        f"requests           {queried['requests']:,} of a budget of {plan['budget']:,}: {queried['retries']:,} of them "
        f"retries; {failed:,} queries failed"
    )
    if queried["cost"] is not None:
        tell(f"cost               {queried['cost']:.2f}, at {plan['price_per_1000']:g} per 1,000 requests")
    if queried["seconds"]:
        times = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in queried["seconds"].items())
        tell(f"response times     {times}")
    outside = sum(row.outside or 0 for row in run.usable)
    if outside:
        tell(f"outside class map  {outside:,} noisy copies without a label of the class map")
    tell(f"deterministic      {_determinism(about)}")
    if about["status"] != "finished":
        tell(f"unfinished         {about['status']}: a larger --budget resumes in the same folder")
    tell(f"\nrun file   {folder / 'run.jsonl'}\nreport     {folder / 'report.html'}\nreplay     {about['replay']}")


def print_attacks(folder: Path) -> None:
    """Print the table of the attacks, if any were run."""
    from analysis.comparison.tables import tabulate_comparison
    from analysis.runs import read_comparison
    from certify.cli.audit_attacks import COMPARISON

    if (folder / COMPARISON).is_file():
        comparison = read_comparison(folder / COMPARISON)
        tell(f"\n{tabulate_comparison(comparison, 'text')}\n\nattacks    {folder / COMPARISON}")


def _determinism(about: Mapping[str, Any]) -> str:
    """Return the results of determinism probe and drift check in one line."""
    from certify.blackbox.determinism import Drifted, Probed

    probes, drifts = [Probed(**d) for d in about["determinism"]], [Drifted(**d) for d in about["drift"]]
    again = sum(sum(probe.labels.values()) for probe in probes)
    agree = all(len(probe.labels) == 1 for probe in probes)
    first = f"{again} queries of one clean image {'agree' if agree else 'DIFFER'}" if probes else "not probed"
    drift = [one for one in drifts if one.compared]
    moved = sum(one.changed for one in drift)
    if not drift:
        return f"{first}; no check at the end"
    return f"{first}; at the end {len(drift) - moved} of {len(drift)} clean images have the same label"


def print_replay(replayed: Replayed, *, anew: bool) -> None:
    """Print the table, and whether it equals that of the run file."""
    tell(_table(replayed.run))
    if anew:
        header = replayed.run.header
        tell(f"recomputed from the ledger at alpha = {exact(header.alpha)}, {header.bound}")
    elif not replayed.differing:
        tell(f"equal: all {len(replayed.run.images)} certificates are those of {replayed.run.path}")


def _table(run: Run) -> str:
    """Return the table of certified accuracy over radius."""
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
