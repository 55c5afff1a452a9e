"""``certify audit`` and ``certify replay``: a service certified by queries alone, and its ledger read again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from certify.cli import options
from certify.cli.audit_attacks import attack, attack_options, check_attacks, most_queries
from certify.cli.audit_messages import show_plan, tell_attacks, tell_outcome, tell_replay, warn_of_drift, warn_of_probe
from certify.cli.console import progress_bar, say, silent, speaker, tell, warn
from certify.cli.load import check_procedure, chosen_images, denoiser_for, device_from, procedure_from
from certify.cli.plan import first_shape
from certify.cli.service_options import (
    Wanted,
    as_before,
    asks_for_metadata,
    open_service,
    query_limits,
    service_options,
    wanted_service,
)
from certify.errors import CertifyError, RunFault, Stopped, UserError, first_line

if TYPE_CHECKING:
    from certify.blackbox.ledger import Ledger
    from certify.blackbox.ledger_contents import LedgerContents
    from certify.blackbox.plan import Audit
    from certify.blackbox.types import Answer, Client
    from certify.images.dataset import ImageSet

N0, N, N_AT_MOST = 20, 100, 1000
"""The published protocol for services that cost; and the most samples where images stop by themselves."""


@click.command(short_help="Certify a service that can only be asked, and write everything down.")
@service_options
@options.image_options
@click.option("--input-size", type=options.Size(), metavar="CxHxW", help="Bring images to this size (default: as is).")
@options.noise_options
@options.denoiser
@options.trust_code
@click.option("--n0", type=options.Count("a number of samples"), default=N0, help="Selection samples an image.")
@click.option(
    "--n",
    type=options.Count("a number of samples"),
    default=N,
    help=f"Estimation samples an image; the most of them with --radius and --tolerance (default there: {N_AT_MOST}).",
)
@options.alpha
@options.bound
@click.option(
    "--radius", type=options.Numbers(), help="Only decide at these radii, each image with as few queries as it takes."
)
@click.option(
    "--tolerance", type=options.SHARE, help="Stop each image once its radius is known to this relative tolerance."
)
@options.rule
@click.option(
    "--budget",
    type=options.Count("a number of requests", least=0),
    required=True,
    help="Requests with a picture that may be sent in all, retries included; never exceeded.",
)
@click.option(
    "--reference",
    type=click.Choice(["own", "given"]),
    default="own",
    help="What is right: the service's own answer to the clean image, or the data's label.",
)
@click.option("--labels", metavar="FILE", help="CSV of file,label, for --reference given without class folders.")
@click.option(
    "--class-map", metavar="FILE", help="CSV or JSON from the service's labels to classes; other labels are nobody's."
)
@click.option(
    "--repeat-clean",
    type=options.Count("repetitions", least=0),
    default=3,
    help="How often one clean image is asked about again at the start.",
)
@click.option(
    "--price-per-1000", type=options.Positive("a price above 0"), help="Of 1,000 requests, to say what it costs."
)
@attack_options
@options.seed("all noise; secret if an adversary may choose images")
@click.option(
    "--device", default="auto", help="Device of noise and denoiser: cpu, cuda, cuda:1, mps; auto takes an accelerator."
)
@options.trust_identity
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; nothing is sent.")
@click.option("--out", metavar="DIR", required=True, help="Folder of the audit; the same command goes on in it.")
@options.as_json("the table")
@options.quiet
def audit(**o: Any) -> None:
    """Certify a service by queries alone: its own function, behind noise and perhaps a denoiser.

    Every query counts against --budget each time it is sent, and is written into OUT/ledger.jsonl before; every answer
    before it is used: nothing that was paid for is lost or asked twice. A query without an answer is a failed trial.
    First comes the plan; --dry-run stops there. The certificates are in OUT/run.jsonl, the report in OUT/report.html;
    `certify replay OUT` computes them again from the answers there. With --defences the service is then attacked by
    queries too, out of the same budget (OUT/comparison.jsonl).
    """
    from certify.blackbox.ledger_contents import read_header

    if Path(o["out"]).exists() and not Path(o["out"]).is_dir():
        raise UserError(f"--out {o['out']}: it is a file; expected a folder for the audit")
    for name in ("radius", "tolerance"):
        if o[name] is not None and not options.given_by_user("n"):
            o["n"] = N_AT_MOST
    check_procedure(o)
    check_attacks(o)
    wanted = wanted_service(o)
    if o["data"] is None:
        raise UserError("--data is missing: expected images, such as a folder, a .zip or an .npz")
    wanted = as_before(wanted, read_header(Path(o["out"]) / "ledger.jsonl"))
    speak = speaker(quiet=o["quiet"] or o["as_json"])
    if o["dry_run"]:
        job, plan = _planned(o, wanted)
        show_plan(job, plan, speak)
        _compare_with_folder(job, o, speak)
        if asks_for_metadata(wanted):
            speak("metadata   one request asks the model what it takes, before the first query and beside the budget")
        tell(json.dumps({"plan": plan}) if o["as_json"] else "dry run: nothing was sent")
        return
    with open_service(wanted, o) as (send, known):
        job, plan = _planned(o, known)
        show_plan(job, plan, speak)

        @contextlib.contextmanager
        def asking(ledger: Ledger, budget: int) -> Iterator[Client]:
            from certify.blackbox.client.query_client import QueryClient

            yield QueryClient(send, known.format, ledger, budget=budget, limits=query_limits(o), tell=say)

        about = _work(o, job, plan, asking, known, speak)
    tell_outcome(job.folder, about, as_json=o["as_json"])
    if o["defences"] is not None and not o["as_json"]:
        tell_attacks(job.folder)


def _compare_with_folder(job: Audit, o: dict[str, Any], say: Callable[[str], None]) -> None:
    """What a dry run can say of an audit that it would go on with, or why it could not."""
    from certify.blackbox.ledger_contents import read_ledger
    from certify.blackbox.plan import header_there, make_header
    from certify.blackbox.results import LEDGER

    header_there(job, make_header(job, data=o["data"], denoiser=o["denoiser"], command=""))
    job.check_denoiser()
    if (job.folder / LEDGER).exists():
        say(f"ledger     {job.folder / LEDGER}: {read_ledger(job.folder / LEDGER).spent:,} requests are spent already")


def _planned(o: dict[str, Any], wanted: Wanted) -> tuple[Audit, dict[str, Any]]:
    """Everything that is known before anything is asked."""
    import torch

    from certify.blackbox.label_index import read_class_map
    from certify.blackbox.plan import Audit, Service, plan
    from certify.images.dataset import View
    from certify.runs.config import Settings
    from certify.smoothing.noise import make_noise

    images = chosen_images({**o, "labels": "none", "class_map": None}, View.at(o["input_size"]))
    class_map = read_class_map(o["class_map"]) if o["class_map"] else None
    device = torch.device(device_from(o["device"]))
    denoiser = None
    if o["denoiser"] != "none":
        denoiser = denoiser_for(o["denoiser"], o["sigma"], first_shape(images), trust_code=o["trust_code"]).eval()
    form = wanted.format
    service = Service(wanted.endpoint, form.name, form.about, str(form.about.get("encoding", "png")), o["input_size"])
    service.probe_size = o["input_size"] or first_shape(images)
    job = Audit(
        Path(o["out"]),
        service,
        images,
        Settings(procedure_from("certify", o), o["seed"]),
        make_noise(o["noise"], o["sigma"], rounded=o["rounded"]),
        o["budget"],
        denoiser,
        _given(o, images, class_map),
        class_map,
        o["repeat_clean"],
        o["concurrency"],
        {"settings": {k: o[k] for k in ("sigma", "seed", "retries", "timeout", "repeat_clean", "input_size", "sdk")}},
        device,
        o["trust_identity"],
    )
    return job, plan(job, price=o["price_per_1000"], rate=o["rate"], attacks=most_queries(o, len(images)))


def _given(o: dict[str, Any], images: ImageSet, class_map: Mapping[str, str] | None) -> dict[str, str] | None:
    """The data's label of each image, by id; None where the service's own answers are the reference."""
    from certify.models.labels import match_labels

    if o["reference"] == "own":
        if o["labels"]:
            raise UserError("--labels without --reference given: the service's own answers are the labels")
        return None
    ids = [item.id for item in images.items]
    if o["labels"]:
        found, _ = match_labels(o["labels"], ids)
    else:
        found = {item.id: item.name for item in images.items if item.name is not None}
    without = [i for i in ids if i not in found]
    if without:
        raise UserError(f"--reference given: no label for {without[0]!r}; pass --labels FILE with lines file,label")
    classes = sorted(set((class_map or {}).values()))
    strange = sorted(set(found.values()).difference(classes)) if class_map else []
    if strange:
        there = ", ".join(map(repr, classes[:3]))
        raise UserError(
            f"--class-map has no class {strange[0]!r}, a label of the data; add it to those it has: {there}"
        )
    return found


def _work(
    o: dict[str, Any],
    job: Audit,
    plan: dict[str, Any],
    asking: Callable[[Ledger, int], contextlib.AbstractContextManager[Client]],
    wanted: Wanted,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Ask, conclude and report, whatever ends the asking."""
    from certify.blackbox.audit_loop import Patient, drive
    from certify.blackbox.client.credentials import redactor_for
    from certify.blackbox.determinism import probes
    from certify.blackbox.ledger import Ledger
    from certify.blackbox.ledger_contents import ledger_header
    from certify.blackbox.plan import make_header, prepare
    from certify.blackbox.remote_classifier import LedgerBudgetSpent, ServiceSilent
    from certify.blackbox.results import LEDGER, SPENT, STOPPED, conclude

    command, redactor = options.command_line(), redactor_for(wanted.credential)
    command = command if redactor is None else redactor.text(command)
    head = ledger_header(wanted.endpoint, wanted.format, encoding=job.service.encoding)
    path = job.folder / LEDGER
    with Ledger(path, head) as ledger:  # first of all: another process at work here must not be written over
        header, about = prepare(job, make_header(job, data=o["data"], denoiser=o["denoiser"], command=command), plan)
        status, reason = STOPPED, "the command was stopped"

        def probed(answers: Mapping[str, Answer]) -> None:
            warn_of_probe(probes(answers, job.class_map))

        try:
            with progress_bar(len(job.images), "images", hidden=say is silent) as bar:
                say(f"ledger     {path}: {ledger.spent:,} of {job.budget:,} requests are spent")
                opened = functools.partial(asking, ledger)
                ended = drive(job, header, about, opened, progress=bar.update, probed=probed)
                bar.close()
                if o["defences"] is not None:
                    with asking(ledger, job.budget) as ask:
                        attack(o, job, Patient(ask), ledger.contents.answers, say is silent, command)
                status, reason = ended, ""
        except LedgerBudgetSpent:
            status, reason = SPENT, ""
        except ServiceSilent as error:
            reason = str(error)
            raise RunFault(reason) from None
        except KeyboardInterrupt:
            raise Stopped(f"stopped; every answer is kept in {path}, the same command goes on from there") from None
        except CertifyError as error:
            reason = str(error)
            raise
        finally:
            log = ledger.contents
            sent = log.spent, log.queries
            about = conclude(job.folder, header, about, log.answers, status=status, reason=reason, sent=sent)
            _report(job.folder, log)
    warn_of_drift(about)
    return about


def _report(folder: Path, ledger: LedgerContents) -> None:
    """The page; whatever keeps it from being made must not take with it what was paid for."""
    from analysis.report.page import write_report

    try:
        write_report(folder, ledger=ledger)
    except Exception as error:
        warn(f"no report: {type(error).__name__}: {first_line(error)}; `certify report {folder}` tries again")


@click.command(short_help="Compute an audit's certificates again, from the answers in its folder.")
@click.argument("folder", metavar="RUN")
@options.alpha_and_bound("the audit's")
@click.option("--out", metavar="FILE", help="Also write the certificates as a run file (.jsonl).")
@options.as_json("the table")
def replay(folder: str, alpha: float | None, bound: str | None, out: str | None, as_json: bool) -> None:
    """Compute an audit's certificates again: no data, no model, no service.

    Says whether they equal those of RUN/run.jsonl. With another --alpha or --bound the same answers are counted anew;
    an image that had stopped by itself is settled with the answers that there are, or is undecided.
    """
    from certify.blackbox.replay import replay as read_again
    from certify.runs.run_file import new_run_file, write_derived

    target = None if out is None else new_run_file(out)
    found = read_again(folder, alpha=alpha, bound=bound, command=options.command_line(), warn=warn)
    if target is not None:
        found = dataclasses.replace(found, run=write_derived(target, found.run.header, found.run.images))
    if as_json:
        tell(json.dumps({"header": found.run.header, "images": found.run.images, "differing": found.differing}))
    else:
        tell_replay(found, anew=alpha is not None or bound is not None)
    if found.differing:
        raise RunFault(
            f"{len(found.differing)} of {len(found.run.images)} certificates differ from the run file's; first: "
            f"{found.differing[0]}: run.jsonl or ledger.jsonl was changed, or an audit was killed: its command goes on"
        )
