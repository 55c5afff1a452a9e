"""Audit a black-box classifier from Python: a function, or an HTTP API."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from certify.api import DataOptions, check_options, chosen_options, collect_images, procedure_for, progress_bar
from certify.blackbox.audit import run_audit
from certify.blackbox.client.query_client import QueryClient
from certify.blackbox.client.rate_limit import QueryLimits
from certify.blackbox.function_service import function_name
from certify.blackbox.ledger_contents import LedgerContents, read_header
from certify.blackbox.plan import Audit, Service, plan
from certify.blackbox.results import LEDGER, RUN
from certify.blackbox.service_spec import ServiceSpec, checked_service, open_sender
from certify.engine.hardware import find_device
from certify.errors import CertifyWarning, UserError
from certify.images.dataset import ImageSet, InputOnly, load_images
from certify.results import Run
from certify.runs.config import Settings
from certify.smoothed_classifier import find_denoiser
from certify.smoothing.noise import make_noise
from certify.smoothing.stopping_rules import DEFAULT_RULE

if TYPE_CHECKING:
    import torch
    from torch import nn

    from certify.blackbox.ledger import Ledger
    from certify.blackbox.types import Client

Size = tuple[int, int, int]


def audit(
    ask: Any,
    images: Any,
    labels: Sequence[str] | None = None,
    *,
    sigma: float,
    budget: int,
    out: str | Path,
    n0: int = 20,
    n: int | None = None,
    alpha: float = 0.001,
    bound: str | None = None,
    radius: float | Iterable[float] | None = None,
    tolerance: float | None = None,
    rule: str = DEFAULT_RULE,
    noise: str = "gaussian",
    denoiser: nn.Module | Callable[..., Any] | str | None = None,
    seed: int = 0,
    concurrency: int = 1,
    repeat_clean: int = 3,
    device: str | torch.device = "auto",
    protocol: str | None = None,
    protocol_options: Mapping[str, Any] | None = None,
    api_key_env: str | None = None,
    rate: float | None = None,
    retries: int = 4,
    timeout: float = 60.0,
    progress: bool = True,
    **options: Unpack[DataOptions],
) -> Run:
    """Certify a black-box classifier by queries alone, within a budget; every reply is logged before it is used.

    The same call resumes an interrupted audit in ``out`` and repeats no answered query. The folder holds the ledger,
    the run file, ``audit.json`` and an HTML report, as after ``certify audit``; ``certify replay`` recomputes the
    certificates from the ledger. For each image separately, with probability at least 1 - alpha over the noise draws,
    its certificate is true or an abstention, provided that the classifier is a fixed function of the image; clean
    images are queried repeatedly to detect one that is not.

    Args:
        ask: a function of one 8-bit image, uint8 ``(H, W, C)``, that returns a label, labels (best first), or a mapping
            from labels to scores (an exception is a failed trial); or the URL of an HTTP API.
        images: as for :func:`certify`; they are sent as they are.
        labels: N reference labels, as the classifier names them; None takes its own answers to the clean images.
        sigma: standard deviation of the noise, in [0, 1] pixels.
        budget: queries in total, retries included; never exceeded.
        out: folder of the audit.
        n0: as for :func:`certify`.
        n: as for :func:`certify`; 100 unless given, 1,000 at most with ``radius`` or ``tolerance``.
        alpha: failure probability per image.
        bound: as for :func:`certify`.
        radius: as for :func:`certify`.
        tolerance: as for :func:`certify`.
        rule: as for :func:`certify`.
        noise: name of a smoothing distribution.
        denoiser: name, module or function, between noise and classifier.
        seed: of all noise; secret if an adversary may choose images.
        concurrency: queries at a time; above 1 a function must be safe to call from several threads.
        repeat_clean: repetitions of one clean image at the start.
        device: of noise and denoiser.
        protocol: of the API (``certify list protocols``); required with a URL.
        protocol_options: of the protocol, such as ``{"labels": "labels"}``.
        api_key_env: environment variable that holds the API's key.
        rate: requests per second at most.
        retries: of a request to an API that fails or is declined; each counts against the budget.
        timeout: seconds per request to an API.
        progress: show a progress bar.
        **options: ``skip``, ``start``, ``max_images``, ``ids``, and with a name or path ``root``, ``download``.

    Returns:
        The run; ``run.partial`` is true if the budget was spent before its end.

    Raises:
        UserError: arguments out of range or a folder that belongs to another audit.
        RunFault: the classifier does not answer.
    """
    check_options(DataOptions, options)
    sequential = radius is not None or tolerance is not None
    samples_each = (1000 if sequential else 100) if n is None else n
    procedure = procedure_for(
        n0=n0, n=samples_each, alpha=alpha, bound=bound, radius=radius, tolerance=tolerance, rule=rule
    )
    if callable(ask):
        spec = ServiceSpec(function_name(ask), "python", {}, function=ask)
    elif protocol is None:
        raise UserError("protocol is missing: expected the name of the API's protocol (`certify list protocols`)")
    else:
        spec = checked_service(ask, protocol, protocol_options or {}, api_key_env=api_key_env)
    spec = spec.as_recorded(read_header(Path(out) / LEDGER))
    chosen, size, given = _load(images, labels, options)
    cleaner = find_denoiser(denoiser, sigma, size)
    limits = QueryLimits(concurrency, rate, 1 if callable(ask) else retries + 1, grace=timeout + 5)
    with open_sender(spec, timeout=timeout, connections=concurrency + 1) as (send, spec):
        encoding = str(spec.format.about.get("encoding", "png"))
        service = Service(spec.endpoint, spec.format.name, spec.format.about, encoding)
        service.probe_size = size
        job = Audit(
            Path(out),
            service,
            chosen,
            Settings(procedure, seed),
            make_noise(noise, sigma),
            budget,
            None if cleaner is None else cleaner.eval(),
            given,
            repeat_clean=repeat_clean,
            concurrency=concurrency,
            device=find_device(device),
        )

        @contextlib.contextmanager
        def open_client(ledger: Ledger, budget: int) -> Iterator[Client]:
            yield QueryClient(send, spec.format, ledger, budget=budget, limits=limits)

        with progress_bar(len(chosen), 0, " images", shown=progress) as advance:
            about = run_audit(
                job,
                plan(job, rate=rate),
                spec,
                open_client,
                data=chosen.name,
                denoiser=job.pipeline.denoiser_name,
                command="certify.audit",
                progress=advance,
                report=_write_report,
            )
    if about["fixed_function"] is False:
        warnings.warn(
            "some clean images got other labels at its end: the certificates hold for no single function",
            CertifyWarning,
            stacklevel=2,
        )
    return Run.read(Path(out) / RUN, allow_partial=True)


def _load(
    images: Any, labels: Sequence[str] | None, options: Mapping[str, Any]
) -> tuple[ImageSet, Size | None, dict[str, str] | None]:
    """Return the images as they are sent, the shape of the first usable one, and the reference labels by id."""
    of_data = chosen_options(DataOptions, options)
    collection = collect_images(images, None, of_data)
    view = InputOnly.at(None)
    if collection is None:
        chosen = load_images(str(images), view, labels="none", **of_data)
        order = [item.id for item in chosen.items]
    else:
        chosen = collection.without_labels().image_set(view.input, 0, **of_data)
        order = [item.id for item in collection.items]
    size = chosen.first_shape()
    if labels is None:
        return chosen, size, None
    labels = labels.tolist() if hasattr(labels, "tolist") else labels  # of a tensor or array
    if len(labels) != len(order):
        raise UserError(f"{len(labels)} labels for {len(order)} images; expected one reference label per image")
    given = {name: str(label) for name, label in zip(order, labels, strict=True)}
    return chosen, size, {item.id: given[item.id] for item in chosen.items}


def _write_report(folder: Path, ledger: LedgerContents) -> None:
    from analysis.report.page import try_report

    try_report(folder, ledger, lambda text: warnings.warn(text, CertifyWarning, stacklevel=2))
