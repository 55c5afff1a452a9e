"""Audit a black-box classifier from Python: a function, or an HTTP API."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from certify.api import collect_images
from certify.blackbox import N0, REPEAT_CLEAN, RETRIES, SEQUENTIAL_N, TIMEOUT, N
from certify.blackbox.answers import read_class_map
from certify.blackbox.audit import Observer, run_audit
from certify.blackbox.client.rate_limit import QueryLimits
from certify.blackbox.function_service import label_text
from certify.blackbox.plan import Audit, check_reference_labels, reference_labels
from certify.blackbox.record import RUN
from certify.blackbox.service_spec import ServiceSpec, checked_service, function_service
from certify.engine.hardware import find_device
from certify.errors import UserError
from certify.images.dataset import ImageSet, InputOnly, load_images
from certify.registry import check_options, chosen_options
from certify.results import Run
from certify.runs.config import Settings
from certify.runs.progress import progress_bar
from certify.smoothed_classifier import find_denoiser
from certify.smoothing.noise import make_noise
from certify.smoothing.procedures.choose import procedure_for

if TYPE_CHECKING:
    import torch
    from torch import nn

Size = tuple[int, int, int]


class ImageOptions(TypedDict, total=False):
    """Options of :func:`certify.load_images`; the last two are for names and paths alone."""

    skip: int
    start: int
    max_images: int | None
    ids: Sequence[str] | None
    root: str | Path | None
    download: bool


class ServiceOptions(TypedDict, total=False):
    """Options of an HTTP API.

    Attributes:
        protocol: of the API (``certify list protocols``); v2 unless given, which reads its options from the server.
        protocol_options: of the protocol, such as ``{"labels": "labels"}``.
        api_key_env: environment variable that holds the API's key.
        auth_header: ``NAME: VALUE`` with ``{key}`` in it, in place of the protocol's header.
        auth_query: ``NAME={key}``, to send the key in the URL's query instead.
        insecure: send the key over plain HTTP to another machine.
    """

    protocol: str
    protocol_options: Mapping[str, Any] | None
    api_key_env: str | None
    auth_header: str | None
    auth_query: str | None
    insecure: bool


class AuditOptions(ImageOptions, ServiceOptions, total=False):
    """Further options of an audit.

    Attributes:
        class_map: from the classifier's labels to classes, or a file of it (``label,class``, or JSON).
        input_size: (C, H, W) to which images are resized.
        rounded: round images to the 8-bit grid first; for the noise ``exact``.
        rate: requests per second at most.
        retries: of a request to an API that fails or is declined; each counts against the budget; 4 unless given.
        timeout: seconds per request to an API; 60 unless given.
        price_per_1000: price of 1,000 requests, to state the cost.
        trust_identity: resume although the folder does not prove that denoiser and function are still the same.
        observer: displays plan and progress, in place of a progress bar.
        statement: ``"certificates"``, or ``"accuracy"`` of all images together under attack, from ``draws`` queries per
            image and, without labels, one to the clean image; the result's ``accuracy_bound()`` has it. The arguments
            ``n0``, ``n``, ``bound``, ``radius``, ``tolerance``, ``rule`` and ``repeat_clean`` are for certificates.
        draws: see :func:`certify.accuracy`; 1 unless given.
        population: see :func:`certify.accuracy`.
    """

    class_map: Mapping[str, str] | str | Path | None
    input_size: Size | None
    rounded: bool
    rate: float | None
    retries: int
    timeout: float
    price_per_1000: float | None
    trust_identity: bool
    observer: Observer
    statement: Literal["certificates", "accuracy"]
    draws: int
    population: bool


def audit(
    ask: Any,
    images: Any,
    labels: Sequence[Any] | str | Path | None = None,
    *,
    sigma: float,
    budget: int,
    out: str | Path,
    n0: int | None = None,
    n: int | None = None,
    alpha: float = 0.001,
    bound: str | None = None,
    radius: float | Iterable[float] | None = None,
    tolerance: float | None = None,
    rule: str | None = None,
    noise: str = "gaussian",
    denoiser: nn.Module | Callable[..., Any] | str | None = None,
    seed: int = 0,
    concurrency: int = 1,
    repeat_clean: int = REPEAT_CLEAN,
    device: str | torch.device = "auto",
    progress: bool | float = True,
    **options: Unpack[AuditOptions],
) -> Run:
    """Certify a black-box classifier by queries alone, within a budget; every reply is logged before it is used.

    The same call resumes an interrupted audit in ``out`` and repeats no answered query, except that a Python function
    is called again for up to three clean images, to refuse another function of the same name. The folder holds the
    ledger, the run file, ``audit.json`` and an HTML report, as after ``certify audit``; ``certify replay`` recomputes
    the certificates from the ledger. For each image separately, with probability at least 1 - alpha over the noise
    draws, its certificate is true or an abstention, provided that the classifier is a fixed function of the image;
    clean images are queried repeatedly to detect one that is not.

    Args:
        ask: a function of one 8-bit image, uint8 ``(H, W, C)``, that returns a label, labels (best first), or a mapping
            from labels to scores (an exception is a failed trial); or the URL of an HTTP API.
        images: as for :func:`certify`; they are sent as they are.
        labels: N reference labels (names or class numbers), as the classifier returns them; a CSV of ``file,label``; or
            ``"given"`` for the data's own. None takes the classifier's answers to the clean images.
        sigma: standard deviation of the noise, in [0, 1] pixels.
        budget: queries in total, retries included; never exceeded.
        out: folder of the audit.
        n0: as for :func:`certify`; 20 unless given.
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
        progress: False shows nothing; a number prints a line every so many seconds instead of a bar.
        **options: of the images, of an HTTP API, and further ones (:class:`certify.auditing.AuditOptions`).

    Returns:
        The run; ``run.partial`` is true if the budget was spent before its end.

    Raises:
        UserError: arguments out of range, a folder that belongs to another audit, or another function than before.
        RunFault: the classifier does not answer.
    """
    check_options(AuditOptions, options, audit)
    procedure = procedure_for(
        n0=n0,
        n=n,
        alpha=alpha,
        bound=bound,
        radius=radius,
        tolerance=tolerance,
        rule=rule,
        default_n0=N0,
        default_n=N,
        sequential_n=SEQUENTIAL_N,
        statement=options.get("statement", "certificates"),
        draws=options.get("draws"),
        population=options.get("population", False),
    )
    spec = _service(ask, options)
    class_map = options.get("class_map")
    if isinstance(class_map, str | Path):
        class_map = read_class_map(class_map)
    chosen, order = _load_images(images, options)
    cleaner = find_denoiser(denoiser, sigma, options.get("input_size") or chosen.first_shape())
    timeout = options.get("timeout", TIMEOUT)
    attempts = 1 if callable(ask) else options.get("retries", RETRIES) + 1
    request = Audit(
        Path(out),
        spec,
        chosen,
        Settings(procedure, seed),
        make_noise(noise, sigma, rounded=options.get("rounded", False)),
        budget,
        None if cleaner is None else cleaner.eval(),
        _reference_labels(labels, chosen, order, class_map),
        class_map,
        repeat_clean=repeat_clean,
        limits=QueryLimits(concurrency, options.get("rate"), attempts, grace=timeout + 5),
        timeout=timeout,
        input_size=options.get("input_size"),
        price_per_1000=options.get("price_per_1000"),
        device=find_device(device),
        trust_identity=options.get("trust_identity", False),
        data=str(images) if isinstance(images, str | Path) else chosen.name,
        denoiser_name=denoiser if isinstance(denoiser, str) else "",
        command="certify.audit",
    )
    from analysis.report.page import try_report

    with progress_bar(len(chosen), "images", shown=False if "observer" in options else progress) as bar:
        run_audit(request, options.get("observer") or Observer(advanced=bar.update), try_report)
    return Run.read(request.folder / RUN, allow_partial=True)


def _service(ask: Any, options: AuditOptions) -> ServiceSpec:
    """Return the service that ``ask`` and the options name, checked without a query.

    Raises:
        UserError: neither a function nor a URL, or options that do not belong to it.
    """
    given = chosen_options(ServiceOptions, options)
    if callable(ask):
        if extra := sorted(given.keys() | options.keys() & {"retries", "timeout"}):
            raise UserError(f"{extra[0]} with a Python function: it is for the URL of an API; leave it out")
        return function_service(ask)
    if not isinstance(ask, str):
        raise UserError(f"ask is of type {type(ask).__name__}; expected a function of one image, or the URL of an API")
    return checked_service(ask, given.pop("protocol", "v2"), given.pop("protocol_options", None) or {}, **given)


def _load_images(images: Any, options: AuditOptions) -> tuple[ImageSet, list[str]]:
    """Return the images as they are sent, and the ids of all that were passed or named."""
    given = chosen_options(ImageOptions, options)
    view = InputOnly.at(options.get("input_size"))
    collection = collect_images(images, None, given)
    if collection is None:
        chosen = load_images(str(images), view, labels="none", **given)
        return chosen, [item.id for item in chosen.items]
    return collection.without_labels().image_set(view.input, 0, **given), [item.id for item in collection.items]


def _reference_labels(
    labels: Sequence[Any] | str | Path | None, chosen: ImageSet, order: list[str], class_map: Mapping[str, str] | None
) -> dict[str, str] | None:
    """Return the reference label of each chosen image by id; None for the classifier's own answers.

    Raises:
        UserError: not one label per image, or something that is no label, such as None.
    """
    if labels is None:
        return None
    if isinstance(labels, str | Path):
        return reference_labels(chosen, None if labels == "given" else labels, class_map)
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)  # of a tensor or array
    if len(values) != len(order):
        raise UserError(f"{len(values)} labels for {len(order)} images; expected one reference label per image")
    given: dict[str, str] = {}
    for name, value in zip(order, values, strict=True):
        text = label_text(value)
        if text is None:
            raise UserError(
                f"the label of image {name} is {value!r}; expected a name or a class number, or labels=None for the "
                "classifier's own answers"
            )
        given[name] = text
    wanted = {item.id: given[item.id] for item in chosen.items}
    check_reference_labels(wanted, class_map)
    return wanted
