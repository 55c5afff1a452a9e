"""``certify audit``: certify a black-box API by queries."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from certify.blackbox import N0, REPEAT_CLEAN, SEQUENTIAL_N, TIMEOUT, N
from certify.cli.accuracy import AccuracyStatistics
from certify.cli.audit_attacks import AuditAttackOptions, attack_service, check_attacks
from certify.cli.audit_messages import display, print_attacks, print_outcome
from certify.cli.console import speaker, tell
from certify.cli.load import denoiser_for, device_from, load_image_set, procedure_from
from certify.cli.option_groups import (
    DeviceOptions,
    ImageOptions,
    InputOptions,
    NoiseOptions,
    OutputOptions,
    StatisticsOptions,
)
from certify.cli.options import command, command_line, given_by_user, option, overridden, refuse_given
from certify.cli.parameter_types import Count, Positive
from certify.cli.service_options import ServiceOptions, query_limits, service_from
from certify.errors import UserError

if TYPE_CHECKING:
    from certify.blackbox.plan import Audit
    from certify.blackbox.service_spec import ServiceSpec
    from certify.smoothing.procedures.choose import AnyProcedure


class AuditServiceOptions(ServiceOptions):
    """The service, and limits on its requests."""

    protocol: str = overridden(
        ServiceOptions,
        "protocol",
        default="v2",
        help="Protocol of the service (`certify list protocols`); v2 reads its options from the server.",
    )
    concurrency: int = option(type=Count("requests at a time"), default=4, help="Maximum number of requests in flight.")
    timeout: float = option(
        type=Positive("seconds above 0"),
        default=TIMEOUT,
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
        metavar="FILE", help="CSV or JSON that maps the service's labels to classes; other labels vote for no class."
    )


class AuditStatistics(StatisticsOptions):
    """The question about each image or about all of them, and the determinism probe."""

    statement: str = option(
        type=click.Choice(["certificates", "accuracy"]),
        default="certificates",
        help="A certificate for each image, or the accuracy of all images together under attack, from one query each.",
    )
    draws: int = overridden(AccuracyStatistics, "draws", help="With --statement accuracy: noisy copies of each image.")
    population: bool = overridden(
        AccuracyStatistics,
        "population",
        help="With --statement accuracy: bound the accuracy over the population that the images are a sample of.",
    )
    n0: int = overridden(StatisticsOptions, "n0", default=N0)
    n: int = overridden(
        StatisticsOptions,
        "n",
        default=N,
        help="Noise samples per image used to estimate the class probability; the maximum with --radius and "
        f"--tolerance (default there: {SEQUENTIAL_N}).",
    )
    repeat_clean: int = option(
        type=Count("repetitions", least=0),
        default=REPEAT_CLEAN,
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
    dry_run: bool = overridden(OutputOptions, "dry_run", help="Print the plan and stop; nothing is sent.")


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
    from analysis.report.page import try_report
    from certify.blackbox.audit import rehearse, run_audit

    procedure = _procedure(statistics)
    check_attacks(attacks)
    spec = service_from(service)
    if images.data is None:
        raise UserError("--data is missing: expected images, such as a folder, a .zip or an .npz")
    show = speaker(quiet=output.silent)
    request = _audit(spec, service, images, noise, procedure, statistics.repeat_clean, compute, output)
    if attacks.defences is not None:
        attack = attack_service(attacks, len(request.images), trust_code=noise.trust_code, shown=output.shown)
        request = dataclasses.replace(request, attack=attack)
    if output.dry_run:
        with display(show, output.shown) as observer:
            planned = rehearse(request, observer)
        described = request.as_recorded().spec
        if described.needs_metadata:
            number = (
                "one request for the model's"
                if described.options.get("model")
                else "two requests for the model's name and"
            )
            show(f"metadata   {number} metadata, before the first query and not counted")
        tell(json.dumps({"plan": planned.to_json()}) if output.as_json else "dry run: nothing was sent")
        return
    with display(show, output.shown) as observer:
        record = run_audit(request, observer, try_report)
    print_outcome(request.folder, record, as_json=output.as_json)
    if attacks.defences is not None and not output.as_json:
        print_attacks(request.folder)


def _procedure(statistics: AuditStatistics) -> AnyProcedure:
    """Return the procedure that the options ask for."""
    if statistics.statement == "accuracy":
        refuse_given(("repeat_clean", "defences"), "is for certificates; leave it out with --statement accuracy")
    return procedure_from(
        statistics,
        SEQUENTIAL_N,
        statement=statistics.statement,
        draws=statistics.draws if given_by_user("draws") else None,
        population=statistics.population,
    )


def _audit(
    spec: ServiceSpec,
    service: AuditServiceOptions,
    images: AuditImageOptions,
    noise: AuditNoiseOptions,
    procedure: AnyProcedure,
    repeat_clean: int,
    compute: DeviceOptions,
    output: AuditOutput,
) -> Audit:
    """Load images and denoiser, and return the inputs of the audit; nothing is sent."""
    import torch

    from certify.blackbox.answers import read_class_map
    from certify.blackbox.client.credentials import redactor_for
    from certify.blackbox.plan import Audit, reference_labels
    from certify.images.dataset import InputOnly
    from certify.runs.config import Settings
    from certify.smoothing.noise import make_noise

    if images.labels and images.reference == "own":
        raise UserError("--labels without --reference given: the service's own answers are the labels")
    chosen = load_image_set(images, InputOnly.at(images.input_size))
    class_map = read_class_map(images.class_map) if images.class_map else None
    given = None if images.reference == "own" else reference_labels(chosen, images.labels, class_map)
    denoiser = None
    if noise.denoiser != "none":
        size = images.input_size or chosen.first_shape()
        denoiser = denoiser_for(noise.denoiser, noise.sigma, size, trust_code=noise.trust_code).eval()
    typed, redactor = command_line(), redactor_for(spec.credential)
    return Audit(
        Path(output.out),
        spec,
        chosen,
        Settings(procedure, noise.seed),
        make_noise(noise.noise, noise.sigma, rounded=noise.rounded),
        service.budget,
        denoiser,
        given,
        class_map,
        repeat_clean=repeat_clean,
        limits=query_limits(service, concurrency=service.concurrency, timeout=service.timeout),
        timeout=service.timeout,
        input_size=images.input_size,
        price_per_1000=service.price_per_1000,
        device=torch.device(device_from(compute.device)),
        trust_identity=output.trust_identity,
        data=str(images.data),
        denoiser_name=noise.denoiser,
        command=typed if redactor is None else redactor.text(typed),
    )
