"""Run an audit as a transaction: lock the ledger, query within the budget, and write results however it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certify.blackbox.audit_loop import AuditClient, send_queries
from certify.blackbox.client.query_client import QueryClient
from certify.blackbox.determinism import OtherFunction, drift_warnings
from certify.blackbox.function_service import function_fingerprint
from certify.blackbox.ledger import Ledger
from certify.blackbox.ledger_contents import LedgerContents, ledger_header, read_header, read_ledger
from certify.blackbox.plan import DENOISER_BATCH, Audit, plan
from certify.blackbox.record import (
    GIVEN,
    LEDGER,
    OWN,
    RUN,
    RUNNING,
    SPENT,
    STOPPED,
    AuditImage,
    AuditPlan,
    AuditRecord,
    read_about,
    write_about,
    write_rows,
)
from certify.blackbox.remote_classifier import LedgerBudgetSpent, ServiceSilent
from certify.blackbox.results import conclude
from certify.blackbox.service_spec import open_sender
from certify.blackbox.types import Client, Sender
from certify.engine.execution import Execution
from certify.engine.noisy_classifier import image_digest
from certify.errors import CertifyError, ImageError, RunFault, Stopped, UserError, warn
from certify.runs.config import make_header as run_header
from certify.runs.identity import refuse_other_run
from certify.runs.records import SCHEMA, Reference, RunHeader
from certify.runs.run_file import peek_header

Report = Callable[[Path, LedgerContents], None]
"""Function that writes the report of a folder from its ledger."""


def _ignore(*_: object) -> None:
    """Display nothing."""


@dataclass(frozen=True)
class Observer:
    """Callbacks that display the progress of an audit.

    Attributes:
        planned: called with the audit and its plan, before anything is sent.
        opened: called with the ledger's path, the number of requests sent in this folder so far, and the budget.
        started: called with the number of images, before the first query.
        advanced: called with the number of images finished since the last call.
        attacking: called when the certificates are finished and the attack begins.
        waiting: called with a message while the audit waits for requests in flight at its end.
    """

    planned: Callable[[Audit, AuditPlan], None] = _ignore
    opened: Callable[[Path, int, int], None] = _ignore
    started: Callable[[int], None] = _ignore
    advanced: Callable[[int], object] = _ignore
    attacking: Callable[[], None] = _ignore
    waiting: Callable[[str], None] = _ignore


def rehearse(audit: Audit, observer: Observer) -> AuditPlan:
    """Plan an audit, and check its folder and denoiser; nothing is sent or written.

    Raises:
        UserError: the folder belongs to another audit.
        ContractError: the denoiser is not a fixed function of one image.
    """
    audit = audit.as_recorded()
    planned = _announce(audit, observer)
    existing_header(audit, make_header(audit))
    audit.check_denoiser()
    ledger = audit.folder / LEDGER
    if ledger.exists():
        observer.opened(ledger, read_ledger(ledger).spent, audit.budget)
    return planned


def run_audit(audit: Audit, observer: Observer, report: Report = _ignore) -> AuditRecord:
    """Start or resume an audit in its folder.

    Run file and ``audit.json`` are written from the recorded answers however the queries end: finished, budget spent,
    interrupted, or with an error. Queries answered in the ledger are not sent again.

    Args:
        audit: the audit's inputs.
        observer: displays the plan and the progress.
        report: writes the report at the end.

    Returns:
        The content of ``audit.json``.

    Raises:
        RunFault: the service does not answer.
        Stopped: Ctrl-C.
        UserError: the folder belongs to another audit.
    """
    audit = audit.as_recorded()
    connections = audit.limits.concurrency + 1
    with open_sender(audit.spec, timeout=audit.timeout, connections=connections) as (send, spec):
        audit = dataclasses.replace(audit, spec=spec)
        planned = _announce(audit, observer)
        with _open_ledger(audit) as ledger:
            # The lock comes first: nothing that another process writes here may be overwritten.
            record = _run(audit, planned, send, ledger, observer, report)
    for text in drift_warnings(record.drift):
        warn(text)
    return record


def _run(
    audit: Audit, planned: AuditPlan, send: Sender, ledger: Ledger, observer: Observer, report: Report
) -> AuditRecord:
    """Query and conclude, with the ledger locked."""
    earlier = _earlier(audit)
    header, record = prepare(audit, planned)
    observer.opened(ledger.path, ledger.spent, audit.budget)
    observer.started(planned.images)

    def open_client(budget: int) -> Client:
        return QueryClient(send, audit.spec.format, ledger, budget=budget, limits=audit.limits, tell=observer.waiting)

    status, reason = STOPPED, "the command was stopped"
    try:
        ended = send_queries(audit, record, open_client, progress=observer.advanced)
        if audit.attack is not None:
            observer.attacking()
            audit.attack.run(audit, AuditClient(open_client(audit.budget)), ledger.contents.answers)
        status, reason = ended, ""
    except LedgerBudgetSpent:
        status, reason = SPENT, ""
    except ServiceSilent as error:
        reason = str(error)
        raise RunFault(reason) from None
    except KeyboardInterrupt:
        raise Stopped(f"stopped; every answer is kept in {ledger.path}; the same command resumes there") from None
    except OtherFunction:
        status, reason = earlier
        raise
    except CertifyError as error:
        reason = str(error)
        raise
    finally:
        contents = ledger.contents
        sent = contents.spent, contents.queries
        record = conclude(audit.folder, header, record, contents.answers, status=status, reason=reason, sent=sent)
        report(audit.folder, contents)
    return record


def _earlier(audit: Audit) -> tuple[str, str]:
    """Return status and reason of the audit to resume; they are kept if the function turns out to be another."""
    with contextlib.suppress(UserError):  # a new audit, or a damaged record, which is written anew
        record = read_about(audit.folder)
        return record.status or STOPPED, record.reason or ""
    return STOPPED, ""


def _announce(audit: Audit, observer: Observer) -> AuditPlan:
    """Return the plan; show it to the observer, and warn about a procedure or budget that certifies nothing."""
    planned = plan(audit)
    observer.planned(audit, planned)
    for text in audit.settings.procedure.prospects(audit.noise).warnings:
        warn(text)
    if planned.most > audit.budget and not planned.covers and not audit.settings.procedure.sequential:
        warn(
            f"a budget of {audit.budget} finishes no image: one takes {planned.least:,} requests, probes included; "
            "replies are kept, and a larger budget resumes in the same folder"
        )
    return planned


def _open_ledger(audit: Audit) -> Ledger:
    """Open the audit's ledger, which is tied to one service or Python function, format and encoding.

    Raises:
        UserError: the ledger belongs to another audit, is in use or damaged.
    """
    path = audit.folder / LEDGER
    settings: dict[str, Any] = {"encoding": audit.service.encoding}
    if audit.spec.function is not None:
        fingerprint = function_fingerprint(audit.spec.function)
        recorded = read_header(path) if audit.trust_identity else None
        settings["function"] = recorded.get("function") if recorded else fingerprint
    return Ledger(path, ledger_header(audit.spec.endpoint, audit.spec.format, **settings))


def make_header(audit: Audit) -> RunHeader:
    """Return the run file's header: everything that determines the certificates."""
    header = run_header(
        audit.settings,
        audit.noise,
        audit.noise.norm,
        audit.images,
        audit.pipeline,
        audit.device,
        Execution("float32", folded=False, compiled=False, batch_size=DENOISER_BATCH),
        {
            "model": audit.spec.endpoint,
            "data": audit.data or audit.images.name,
            "denoiser": audit.denoiser_name or audit.pipeline.denoiser_name,
            "command": audit.command,
        },
    )
    return header.replace(
        in_order=True,  # an unfinished run holds the first images, not the easiest
        reference=Reference(labels=OWN if audit.given is None else GIVEN, sha256=_digest(audit.given)),
        class_map=audit.class_map and dict(audit.class_map),
    )


def _digest(given: Mapping[str, str] | None) -> str | None:
    return None if given is None else hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


def existing_header(audit: Audit, header: RunHeader) -> RunHeader | None:
    """Return the header of the folder's run file, which must have the same settings; None if there is no run file.

    Raises:
        UserError: the folder holds an audit with other settings.
    """
    known = peek_header(audit.folder / RUN)
    if known is None:
        return None
    refuse_other_run(audit.folder / RUN, known, header, trust_identity=audit.trust_identity)
    assert isinstance(known, RunHeader)  # another kind of file differs
    return known


def prepare(audit: Audit, planned: AuditPlan) -> tuple[RunHeader, AuditRecord]:
    """Create the audit's folder with an empty run file and ``audit.json``, or resume an existing one.

    Returns:
        The run file's header, and the content of ``audit.json``.

    Raises:
        UserError: the folder holds an audit with other settings.
        ContractError: the denoiser is not a fixed function of one image; nothing is written.
        RunFault: the folder cannot be written.
    """
    header = make_header(audit)
    known = existing_header(audit, header)
    audit.check_denoiser()
    if known is not None:
        pipeline = known.pipeline if known.has("pipeline") else header.pipeline
        header = header.replace(created=known.created, pipeline=pipeline)
    images = [_image(audit, index) for index in range(len(audit.images))]
    sizes = {tuple(image.size) for image in images if not image.error}
    record = AuditRecord(
        schema=SCHEMA,
        created=header.created,
        finished=None,
        status=RUNNING,
        reason="",
        command=header.command,
        endpoint=audit.spec.endpoint,
        protocol=audit.service.protocol,
        format=audit.service.options,
        encoding=audit.service.encoding,
        size=list(sizes.pop()) if len(sizes) == 1 else None,
        denoiser=header.denoiser,
        pipeline=header.pipeline,
        labels=OWN if audit.given is None else GIVEN,
        class_map=header.class_map,
        vocabulary=[],
        plan=planned,
        images=images,
        fixed_function=None,
        determinism=[],
        drift=[],
        versions=header.versions,
        replay=f"certify replay {shlex.quote(str(audit.folder))}",
        settings={
            "sigma": audit.noise.scale,
            "seed": audit.settings.seed,
            "retries": audit.limits.attempts - 1,
            "timeout": audit.timeout,
            "repeat_clean": audit.repeat_clean,
            "input_size": audit.input_size and list(audit.input_size),
        },
    )
    if known is None:
        write_rows(audit.folder, header, [])
    write_about(audit.folder, record)
    return header, record


def _image(audit: Audit, index: int) -> AuditImage:
    name = audit.images.items[index].id
    image = AuditImage(
        id=name,
        pictures=f"{index:03d}",
        numel=None,
        image=None,
        error="",
        given=None if audit.given is None else audit.given[name],
        reference=None,
        answer=(),
        failure="",
    )
    try:
        pixels = audit.load(index)
    except ImageError as error:
        return image.replace(error=str(error))
    return image.replace(numel=pixels.numel(), image=image_digest(pixels), size=list(pixels.shape))
