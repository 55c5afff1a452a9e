"""``certify audit``: certify a black-box API by queries."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from certify.cli.audit_attacks import AuditAttackOptions, attack_service, check_attacks, most_queries
from certify.cli.audit_messages import print_attacks, print_outcome, show_plan, warn_of_drift, warn_of_probe
from certify.cli.console import progress_bar, say, silent, speaker, tell, warn
from certify.cli.load import denoiser_for, device_from, load_image_set, procedure_from
from certify.cli.option_groups import (
    DeviceOptions,
    ImageOptions,
    InputOptions,
    NoiseOptions,
    OutputOptions,
    StatisticsOptions,
)
from certify.cli.options import command, command_line, flag, option, overridden
from certify.cli.parameter_types import Count, Positive
from certify.cli.service_options import ServiceOptions, query_limits, service_from
from certify.errors import UserError

if TYPE_CHECKING:
    from certify.blackbox.ledger import Ledger
    from certify.blackbox.ledger_contents import LedgerContents
    from certify.blackbox.plan import Audit, AuditPlan
    from certify.blackbox.service_spec import ServiceSpec
    from certify.blackbox.types import Answer, Client
    from certify.cli.load import AnyProcedure
    from certify.images.dataset import ImageSet

SEQUENTIAL_N = 1000
"""Samples per image at most, with --radius and --tolerance."""


class AuditServiceOptions(ServiceOptions):
    """The service, and limits on its requests."""

    protocol: str = overridden(ServiceOptions, "protocol", required=True)
    concurrency: int = option(type=Count("requests at a time"), default=4, help="Maximum number of requests in flight.")
    timeout: float = option(
        type=Positive("seconds above 0"),
        default=60.0,
        help="Seconds per request; for rekognition, seconds to connect and seconds without a byte.",
    )
    budget: int = option(
        type=Count("a number of requests", least=0),
        required=True,
        help="Maximum number of requests with an image in total, retries included; never exceeded.",
    )
    price_per_1000: float | None = option(
        type=Positive("a price above 0"), help="Price of 1,000 requests, to state the cost."
    )


class AuditNoiseOptions(NoiseOptions):
    """Smoothing distribution, denoiser and seed."""

    trust_code: bool = overridden(InputOptions, "trust_code")


class AuditImageOptions(ImageOptions):
    """Images and reference labels."""

    input_size: tuple[int, int, int] | None = overridden(
        InputOptions, "input_size", help="Resize images to this size (default: as they are)."
    )
    reference: str = option(
        type=click.Choice(["own", "given"]),
        default="own",
        help="Reference label: the service's own answer to the clean image, or the data's label.",
    )
    labels: str | None = option(metavar="FILE", help="CSV of file,label, for --reference given without class folders.")
    class_map: str | None = option(
        metavar="FILE", help="CSV or JSON that maps the service's labels to classes; other labels count for none."
    )


class AuditStatistics(StatisticsOptions):
    """The question about each image, and the determinism probe."""

    n0: int = overridden(StatisticsOptions, "n0", default=20)
    n: int = overridden(
        StatisticsOptions,
        "n",
        default=100,
        help="Noise samples per image used to estimate the class probability; the maximum with --radius and "
        f"--tolerance (default there: {SEQUENTIAL_N}).",
    )
    repeat_clean: int = option(
        type=Count("repetitions", least=0),
        default=3,
        help="Repeated queries of one clean image at the start, which show whether the service is deterministic.",
    )


class AuditOutput(OutputOptions):
    """Folder of the audit and terminal output."""

    out: str = overridden(
        OutputOptions,
        "out",
        required=True,
        metavar="DIR",
        help="Folder of the audit; the same command resumes an unfinished one.",
    )
    dry_run: bool = flag(help="Print the plan and stop; nothing is sent.")


@dataclass(frozen=True)
class AuditRequest:
    """Options of an audit, checked."""

    service: AuditServiceOptions
    images: AuditImageOptions
    noise: AuditNoiseOptions
    procedure: AnyProcedure
    repeat_clean: int
    attacks: AuditAttackOptions
    compute: DeviceOptions
    output: AuditOutput


@command(
    "Certify a black-box API by queries; every reply is logged.",
    main=("endpoint", "protocol", "extra", "api_key_env", "data", "sigma", "budget", "out"),
)
def audit(
    service: AuditServiceOptions,
    images: AuditImageOptions,
    noise: AuditNoiseOptions,
    statistics: AuditStatistics,
    attacks: AuditAttackOptions,
    compute: DeviceOptions,
    output: AuditOutput,
) -> None:
    """Certify a black-box API by queries: the API as a function, behind noise and perhaps a denoiser.

    Each request counts against --budget and is written to OUT/ledger.jsonl before it is sent; each reply before it is
    used, so nothing that was paid for is lost or sent twice. A query without an answer is a failed trial. The plan
    comes first; --dry-run stops there. Certificates are in OUT/run.jsonl, the report in OUT/report.html; `certify
    replay OUT` recomputes the certificates from the logged replies. With --defences, the service is then attacked by
    queries within the same budget (OUT/comparison.jsonl).
    """
    from certify.blackbox.ledger_contents import read_header
    from certify.blackbox.service_spec import open_sender

    if Path(output.out).exists() and not Path(output.out).is_dir():
        raise UserError(f"--out {output.out}: it is a file; expected a folder for the audit")
    procedure = procedure_from(statistics, SEQUENTIAL_N)
    check_attacks(attacks)
    spec = service_from(service)
    if images.data is None:
        raise UserError("--data is missing: expected images, such as a folder, a .zip or an .npz")
    spec = spec.as_recorded(read_header(Path(output.out) / "ledger.jsonl"))
    show = speaker(quiet=output.quiet or output.as_json)
    request = AuditRequest(service, images, noise, procedure, statistics.repeat_clean, attacks, compute, output)
    if output.dry_run:
        job, plan = _plan_audit(request, spec)
        show_plan(job, plan, show)
        _check_folder(job, request, show)
        if spec.needs_metadata:
            show("metadata   one request for the model's metadata, before the first query and not counted")
        tell(json.dumps({"plan": asdict(plan)}) if output.as_json else "dry run: nothing was sent")
        return
    connection = open_sender(
        spec, insecure=service.insecure, timeout=service.timeout, connections=service.concurrency + 1
    )
    with connection as (send, spec):
        job, plan = _plan_audit(request, spec)
        show_plan(job, plan, show)

        @contextlib.contextmanager
        def open_client(ledger: Ledger, budget: int) -> Iterator[Client]:
            from certify.blackbox.client.query_client import QueryClient

            limits = query_limits(service, concurrency=service.concurrency, timeout=service.timeout)
            yield QueryClient(send, spec.format, ledger, budget=budget, limits=limits, tell=say)

        about = _run(request, job, plan, open_client, spec, show)
    warn_of_drift(about)
    print_outcome(job.folder, about, as_json=output.as_json)
    if attacks.defences is not None and not output.as_json:
        print_attacks(job.folder)


def _plan_audit(request: AuditRequest, spec: ServiceSpec) -> tuple[Audit, AuditPlan]:
    """Load images and denoiser; return the audit and its plan, before any query."""
    import torch

    from certify.blackbox.label_index import read_class_map
    from certify.blackbox.plan import Audit, Service, plan
    from certify.images.dataset import InputOnly
    from certify.runs.config import Settings
    from certify.smoothing.noise import make_noise

    service, noise, data = request.service, request.noise, request.images
    images = load_image_set(data, InputOnly.at(data.input_size))
    class_map = read_class_map(data.class_map) if data.class_map else None
    device = torch.device(device_from(request.compute.device))
    denoiser = None
    if noise.denoiser != "none":
        denoiser = denoiser_for(noise.denoiser, noise.sigma, images.first_shape(), trust_code=noise.trust_code).eval()
    form = spec.format
    target = Service(spec.endpoint, form.name, form.about, str(form.about.get("encoding", "png")), data.input_size)
    target.probe_size = data.input_size or images.first_shape()
    settings = {
        "sigma": noise.sigma,
        "seed": noise.seed,
        "retries": service.retries,
        "timeout": service.timeout,
        "repeat_clean": request.repeat_clean,
        "input_size": data.input_size,
        "sdk": service.sdk,
    }
    job = Audit(
        Path(request.output.out),
        target,
        images,
        Settings(request.procedure, noise.seed),
        make_noise(noise.noise, noise.sigma, rounded=noise.rounded),
        service.budget,
        denoiser,
        _reference_labels(data, images, class_map),
        class_map,
        request.repeat_clean,
        service.concurrency,
        {"settings": settings},
        device,
        request.output.trust_identity,
    )
    attack_queries = most_queries(request.attacks, len(images))
    return job, plan(job, price=service.price_per_1000, rate=service.rate, attacks=attack_queries)


def _check_folder(job: Audit, request: AuditRequest, show: Callable[[str], None]) -> None:
    """For a dry run: refuse a folder that belongs to another audit, and show what was spent in it."""
    from certify.blackbox.ledger_contents import read_ledger
    from certify.blackbox.plan import existing_header, make_header
    from certify.blackbox.results import LEDGER

    existing_header(job, make_header(job, data=str(request.images.data), denoiser=request.noise.denoiser, command=""))
    job.check_denoiser()
    if (job.folder / LEDGER).exists():
        spent = read_ledger(job.folder / LEDGER).spent
        show(f"ledger     {job.folder / LEDGER}: {spent:,} requests are spent already")


def _reference_labels(
    data: AuditImageOptions, images: ImageSet, class_map: Mapping[str, str] | None
) -> dict[str, str] | None:
    """Return the data's label of each image by id; None where the service's own answers are the reference.

    Raises:
        UserError: an image without a label, or a label that the class map does not have.
    """
    from certify.models.labels import match_labels

    if data.reference == "own":
        if data.labels:
            raise UserError("--labels without --reference given: the service's own answers are the labels")
        return None
    ids = [item.id for item in images.items]
    if data.labels:
        labels, _ = match_labels(data.labels, ids)
    else:
        labels = {item.id: item.name for item in images.items if item.name is not None}
    without = [i for i in ids if i not in labels]
    if without:
        raise UserError(f"--reference given: no label for {without[0]!r}; pass --labels FILE with lines file,label")
    classes = sorted(set((class_map or {}).values()))
    unknown = sorted(set(labels.values()).difference(classes)) if class_map else []
    if unknown:
        known = ", ".join(map(repr, classes[:3]))
        raise UserError(
            f"--class-map has no class {unknown[0]!r}, a label of the data; add it to those it has: {known}"
        )
    return labels


def _run(
    request: AuditRequest,
    job: Audit,
    plan: AuditPlan,
    open_client: Callable[[Ledger, int], contextlib.AbstractContextManager[Client]],
    spec: ServiceSpec,
    show: Callable[[str], None],
) -> Mapping[str, Any]:
    """Run the audit with a progress bar and warnings."""
    from certify.blackbox.audit import run_audit
    from certify.blackbox.audit_loop import AuditClient
    from certify.blackbox.client.credentials import redactor_for
    from certify.blackbox.determinism import probes

    typed, redactor = command_line(), redactor_for(spec.credential)
    typed = typed if redactor is None else redactor.text(typed)
    quiet = show is silent
    with progress_bar(len(job.images), "images", hidden=quiet) as bar:

        def attack(client: Client, answers: Mapping[str, Answer]) -> None:
            bar.close()
            attack_service(
                request.attacks,
                job,
                AuditClient(client),
                answers,
                data=str(request.images.data),
                trust_code=request.noise.trust_code,
                quiet=quiet,
                command=typed,
            )

        return run_audit(
            job,
            plan,
            spec,
            open_client,
            data=str(request.images.data),
            denoiser=request.noise.denoiser,
            command=typed,
            opened=lambda ledger: show(
                f"ledger     {ledger.path}: {ledger.spent:,} of {job.budget:,} requests are spent"
            ),
            progress=bar.update,
            probed=lambda answers: warn_of_probe(probes(answers, job.class_map)),
            attack=attack if request.attacks.defences is not None else None,
            report=_write_report,
        )


def _write_report(folder: Path, ledger: LedgerContents) -> None:
    from analysis.report.page import try_report

    try_report(folder, ledger, warn)
