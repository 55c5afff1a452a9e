"""An audit in words: the plan before it, warnings, and what came out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from certify.cli.console import clock, tell, warn
from certify.cli.plan import show_prospects
from certify.cli.summary import table_radii, title
from certify.smoothing.rounding import exact

if TYPE_CHECKING:
    from certify.blackbox.determinism import Probed
    from certify.blackbox.plan import Audit
    from certify.blackbox.replay import Replayed
    from certify.runs.run_file import Run


def show_plan(audit: Audit, plan: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """What will be asked, what that can prove, what it costs and how long it takes."""
    procedure, noise = audit.settings.procedure, audit.noise
    early = procedure.sequential
    options = ", ".join(f"{k}={v}" for k, v in audit.service.options.items() if v not in ("", None, False))
    say(f"service    {audit.service.endpoint}: {audit.service.protocol} ({options})")
    size = "x".join(map(str, audit.service.size)) if audit.service.size else "as it is"
    count = f"{len(audit.images):,} of {audit.images.available:,}"
    say(f"images     {audit.images.name}: {count}, size {size}{audit.images.omissions}")
    behind = "" if audit.denoiser is None else "then the denoiser, "
    say(
        f"queries    {noise.name} noise, sigma = {noise.scale:g} in [0, 1] pixels, {behind}then clipped, rounded to 8 "
        f"bits and sent as {audit.service.encoding}"
    )
    show_prospects(procedure, noise, noise.scale, say)
    most = "at most " if early else ""
    parts = ", ".join(f"{count:,} {stage}" for stage, count in plan["queries"].items())
    say(f"plan       {most}{plan['most']:,} queries ({parts}); each may take retries, which count")
    if plan["most"] > audit.budget:
        sure = f"finishes {plan['covers']:,} of {plan['images']:,} images without retries"
        sure = f"about {plan['covers']:,} of {plan['images']:,} images if each takes {procedure.n:,}" if early else sure
        say(f"budget     {audit.budget:,} requests: {sure}")
        if not plan["covers"] and not early:
            warn(
                f"--budget {audit.budget} finishes no image: one takes {plan['least']:,} requests, probes included; "
                "what is asked now is kept, and a larger --budget goes on in the same folder"
            )
    else:
        say(f"budget     {audit.budget:,} requests, never exceeded")
    if plan["cost"] is not None:
        say(
            f"cost       {most}{plan['cost']:.2f} without retries, {plan['cost_most']:.2f} if they take up the budget; "
            f"at {plan['price_per_1000']:g} per 1,000 requests"
        )
    if plan["seconds"] is None:
        say(f"time       as fast as it answers, {plan['concurrency']} at a time (--rate limits it)")
    else:
        long = "at most about" if early else "at least"
        say(f"time       {long} {clock(plan['seconds'])} without retries, at {plan['rate']:g} requests a second")


def warn_of_probe(probes: Sequence[Probed]) -> None:
    """Whether the service is a fixed function, as soon as that is known."""
    for probe in probes:
        if len(probe.labels) > 1:
            answers = ", ".join(f"{label} {count} times" for label, count in probe.labels.items())
            warn(
                f"NO FIXED FUNCTION: asked about the same image {probe.id} again and again, the service answered "
                f"{answers}. A certificate presupposes a fixed function; these do not hold for a service that changes"
            )
        elif probe.spread:
            warn(f"the scores of one image vary by {probe.spread:.3g} between answers; its label did not")


def warn_of_drift(about: Mapping[str, Any]) -> None:
    """Whether it still is the function that it was."""
    from certify.blackbox.determinism import Drifted

    compared = [one for one in (Drifted(**d) for d in about["drift"]) if one.compared]
    changed = [one.id for one in compared if one.changed]
    if changed:
        warn(
            f"DRIFT: at the end the service answered otherwise about {len(changed)} of {len(compared)} clean "
            f"images ({', '.join(changed[:3])}); the certificates are about no one function"
        )


def tell_outcome(folder: Path, about: Mapping[str, Any], *, as_json: bool) -> None:
    """The table, the counts, and where everything is."""
    from certify.runs.run_file import read_run

    run = read_run(folder / "run.jsonl", allow_partial=True)
    if as_json:
        tell(json.dumps({"folder": str(folder), "audit": about, "images": run.images}))
        return
    tell(_table(run))
    asked, plan = about["asked"], about["plan"]
    failed = sum(asked["failures"].values())
    tell(
        f"requests           {asked['requests']:,} of a budget of {plan['budget']:,}: {asked['retries']:,} of them "
        f"retries; {failed:,} queries failed"
    )
    if asked["cost"] is not None:
        tell(f"cost               {asked['cost']:.2f}, at {plan['price_per_1000']:g} per 1,000 requests")
    if asked["seconds"]:
        times = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in asked["seconds"].items())
        tell(f"answers after      {times}")
    outside = sum(row.get("outside", 0) for row in run.usable)
    if outside:
        tell(f"not in the answer  {outside:,} noisy copies: none of their labels is in the class map")
    tell(f"fixed function     {_fixed(about)}")
    if about["status"] != "finished":
        tell(f"unfinished         {about['status']}: a larger --budget goes on in the same folder")
    tell(f"\nrun file   {folder / 'run.jsonl'}\nreport     {folder / 'report.html'}\nagain      {about['replay']}")


def tell_attacks(folder: Path) -> None:
    """The table of the attacks, as far as they came."""
    from analysis.comparison.tables import tabulate_comparison
    from analysis.runs import read_comparison
    from certify.cli.audit_attacks import COMPARISON

    if (folder / COMPARISON).is_file():
        found = read_comparison(folder / COMPARISON)
        tell(f"\n{tabulate_comparison(found, 'text')}\n\nattacks    {folder / COMPARISON}")


def _fixed(about: Mapping[str, Any]) -> str:
    """What probe and drift check found, in one line."""
    from certify.blackbox.determinism import Drifted, Probed

    probes, drifts = [Probed(**d) for d in about["determinism"]], [Drifted(**d) for d in about["drift"]]
    again = sum(sum(probe.labels.values()) for probe in probes)
    agree = all(len(probe.labels) == 1 for probe in probes)
    first = f"{again} answers about one clean image {'agree' if agree else 'DIFFER'}" if probes else "not probed"
    drift = [one for one in drifts if one.compared]
    moved = sum(one.changed for one in drift)
    if not drift:
        return f"{first}; not asked again at the end"
    return f"{first}; asked again at the end, {len(drift) - moved} of {len(drift)} clean images have the same answer"


def tell_replay(found: Replayed, *, anew: bool) -> None:
    """The table, and whether it is the run file's."""
    tell(_table(found.run))
    if anew:
        header = found.run.header
        tell(f"from the ledger's answers, at alpha = {exact(header['alpha'])}, {header['bound']}")
    elif not found.differing:
        tell(f"equal: all {len(found.run.images)} certificates are those of {found.run.path}")


def _table(run: Run) -> str:
    """Certified accuracy over radius, or what there is."""
    from analysis.curves import curves
    from analysis.tables import one_run

    header, rows = run.header, run.usable
    lines = [title(run)]
    left = int(header["expected"]) - len(rows)
    if left:
        lines.append(f"{left:,} images are left out: not asked about, unfinished, or without a reference label")
    if not rows:
        return "\n".join(lines)
    (found,) = curves([run])
    lines += ["", one_run(found, table_radii(run)), ""]
    right = "the service's own answer" if header["reference"]["labels"] == "service" else "the given label"
    lines.append(f"right is           {right}")
    lines.append(f"abstained          {sum(row['prediction'] < 0 for row in rows):,} of {len(rows):,}")
    queries = sum(row["queries"] for row in rows)
    lines.append(
        f"queries an image   {queries / len(rows):.1f} on average, {max(row['queries'] for row in rows):,} at most"
    )
    return "\n".join(lines)
