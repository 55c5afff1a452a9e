"""The transaction of an audit: lock the ledger, query within the budget, and conclude whatever ends the queries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from certify.blackbox.audit_loop import send_queries
from certify.blackbox.ledger import Ledger
from certify.blackbox.ledger_contents import LedgerContents, ledger_header
from certify.blackbox.plan import Audit, AuditPlan, make_header, prepare
from certify.blackbox.remote_classifier import LedgerBudgetSpent, ServiceSilent
from certify.blackbox.results import LEDGER, SPENT, STOPPED, conclude
from certify.blackbox.service_spec import ServiceSpec
from certify.blackbox.types import Answer, Client
from certify.errors import CertifyError, RunFault, Stopped

OpenClient = Callable[[Ledger, int], AbstractContextManager[Client]]
"""Opens a client that logs to this ledger and sends at most this many requests in all."""


def run_audit(
    audit: Audit,
    plan: AuditPlan,
    service: ServiceSpec,
    open_client: OpenClient,
    *,
    data: str,
    denoiser: str,
    command: str,
    opened: Callable[[Ledger], None] = lambda ledger: None,
    progress: Callable[[int], None] = lambda images: None,
    probed: Callable[[Mapping[str, Answer]], None] = lambda answers: None,
    attack: Callable[[Client, Mapping[str, Answer]], None] | None = None,
    report: Callable[[Path, LedgerContents], None] = lambda folder, ledger: None,
) -> Mapping[str, Any]:
    """Start or resume an audit in its folder.

    Run file and ``audit.json`` are written from the recorded answers however the queries end: finished, budget spent,
    interrupted, or a fault. Queries that are answered in the ledger are not sent again.

    Args:
        audit: what is certified, and the budget.
        plan: of :func:`certify.blackbox.plan.plan`.
        service: where queries go.
        open_client: opens a query client.
        data: name of the images, for the run file.
        denoiser: name of the denoiser, for the run file.
        command: for the record; without secrets.
        opened: called once the ledger is open.
        progress: called with the number of further finished images.
        probed: called with the answers once the determinism probe is over, before most of the budget is spent.
        attack: called after the certificates with a client and the answers; spends from the same budget.
        report: called at the end with the folder and the contents of the ledger.

    Returns:
        The contents of ``audit.json``.

    Raises:
        RunFault: the service does not answer.
        Stopped: Ctrl-C.
        UserError: the folder belongs to another audit.
    """
    path = audit.folder / LEDGER
    with Ledger(path, ledger_header(service.endpoint, service.format, encoding=audit.service.encoding)) as ledger:
        # The lock comes first: nothing that another process writes here may be overwritten.
        header, about = prepare(audit, make_header(audit, data=data, denoiser=denoiser, command=command), plan)
        status, reason = STOPPED, "the command was stopped"
        opened(ledger)
        try:
            ended = send_queries(
                audit, header, about, functools.partial(open_client, ledger), progress=progress, probed=probed
            )
            if attack is not None:
                with open_client(ledger, audit.budget) as client:
                    attack(client, ledger.contents.answers)
            status, reason = ended, ""
        except LedgerBudgetSpent:
            status, reason = SPENT, ""
        except ServiceSilent as error:
            reason = str(error)
            raise RunFault(reason) from None
        except KeyboardInterrupt:
            raise Stopped(f"stopped; every answer is kept in {path}; the same command resumes there") from None
        except CertifyError as error:
            reason = str(error)
            raise
        finally:
            contents = ledger.contents
            sent = contents.spent, contents.queries
            about = conclude(audit.folder, header, about, contents.answers, status=status, reason=reason, sent=sent)
            report(audit.folder, contents)
    return about
