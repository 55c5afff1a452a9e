"""``certify serve``: an HTTP server in front of a classifier that answers with smoothed labels and certificates."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from certify.cli.console import say, show_engine, warn
from certify.cli.info import EXTRAS
from certify.cli.load import check_classifier, check_noise, denoiser_for, device_from, load_smoothed
from certify.cli.option_groups import ComputeOptions, InputOptions, NoiseOptions, SampleOptions, StatisticsOptions
from certify.cli.options import Options, command, given_by_user, option, overridden, refuse_given
from certify.cli.parameter_types import Count, Positive
from certify.cli.service_options import ServiceOptions, query_limits, service_from
from certify.errors import UserError

if TYPE_CHECKING:
    import socket

    from starlette.requests import Request

    from certify.blackbox.service_spec import ServiceSpec
    from certify.models.classifier import InputSpec
    from certify.serve.admission import Limits
    from certify.serve.batching import Served, Service
    from certify.smoothed_classifier import SmoothedClassifier

_CLASSES = 1000  # labels of a service that are told apart, unless --num-classes says otherwise
_OF_MODELS = ("weights", "mean", "std", "precision", "compile")
_OF_SERVICES = (
    *("protocol", "extra", "encoding", "sdk", "api_key_env", "auth_header", "auth_query", "insecure", "rate"),
    *("retries", "query_concurrency", "query_timeout", "budget"),
)
_ONE_OF = "certify serve: expected --model NAME or --endpoint URL, one of them"


class ServedModelOptions(InputOptions):
    """The frozen classifier, unless a service is one."""

    model: str | None = option(help="Frozen classifier (as for `certify run`); this or --endpoint.")


class ServedServiceOptions(ServiceOptions):
    """A black-box API as the classifier."""

    endpoint: str | None = overridden(
        ServiceOptions,
        "endpoint",
        help="URL of a black-box API, in place of --model; not needed for protocols with a fixed URL.",
    )
    protocol: str = overridden(
        ServiceOptions,
        "protocol",
        default="v2",
        help="Protocol of the API (`certify list protocols`); v2 reads its options from the server.",
    )
    query_concurrency: int = option(
        type=Count("requests at a time"), default=4, help="Maximum number of requests to the API in flight."
    )
    query_timeout: float = option(
        type=Positive("seconds above 0"),
        default=20.0,
        help="Seconds per request to the API, as `certify audit --timeout`; --timeout is per request to this server.",
    )
    budget: int | None = option(
        type=Count("requests"), help="Maximum number of requests to the API; afterwards images get no answer."
    )


class ServerNoiseOptions(NoiseOptions):
    """Smoothing distribution, denoiser and seed."""

    seed: int | None = option(  # type: ignore[assignment]
        type=Count("a seed", least=0), help="Seed of all noise (default: a secret random one)."
    )


class ServerStatistics(SampleOptions):
    """The question about each image, unless its request asks another one."""

    n0: int = overridden(StatisticsOptions, "n0")
    n: int = overridden(
        SampleOptions,
        "n",
        default=1000,
        help="Noise samples per image used to estimate the class probability; the maximum with --radius (default "
        "there: 20000).",
    )
    samples: int | None = option(
        type=click.IntRange(1, 1),
        help="Answer from one fresh noisy copy of the image (1), at the cost of one forward pass and without "
        "certificates; `certify accuracy` bounds the accuracy of such answers under attack.",
    )
    radius: float | None = option(
        type=Positive("a radius in [0, 1] pixels"),
        help="Decide only whether an image is robust at this radius, from as few samples as possible (at most --n).",
    )
    samples_per_request: int = option(
        type=Count("a number of samples"),
        default=100_000,
        help="Maximum number of noise samples per request, all its images together.",
    )


class ServerOptions(Options, section="Server"):
    """Address and limits of the server."""

    host: str = option(default="127.0.0.1", help="Address to listen on.")
    port: int = option(type=click.IntRange(0, 65_535), default=8080, help="Port to listen on; 0: a free one.")
    allow_host: tuple[str, ...] = option(
        default=(),
        metavar="NAME",
        help="Host name by which it is reached, such as a proxy's; repeatable. Addresses, localhost and this machine's "
        "name need none. Pages of other sites may not ask.",
    )
    example: str | None = option(
        metavar="FILE",
        help="Image that the page at / offers to try (default: a handwritten digit, or a drawn landscape).",
    )
    name: str | None = option(help="Model name in URLs (default: from --model).")
    max_bytes: int = option(
        type=Count("a number of bytes"), default=16 * 2**20, help="Maximum size of a request's body in bytes."
    )
    max_pixels: int = option(
        type=Count("a number of pixels"),
        default=16_000_000,
        help="Maximum number of pixels of all images of a request, and of an image file before it is decoded.",
    )
    concurrency: int = option(
        type=Count("a number of requests"),
        default=32,
        help="Maximum number of requests in progress per client address, and twice that in total; more get 429 with "
        "Retry-After.",
    )
    timeout: float = option(
        type=Positive("seconds above 0"),
        default=60.0,
        help="Seconds per request, from its head to its answer; also the longest wait at shutdown.",
    )


@command(
    "Serve smoothed labels with certificates over HTTP.",
    main=("model", "endpoint", "protocol", "sigma", "denoiser", "n", "host", "port"),
)
def serve(
    model: ServedModelOptions,
    service: ServedServiceOptions,
    noise: ServerNoiseOptions,
    statistics: ServerStatistics,
    server: ServerOptions,
    compute: ComputeOptions,
) -> None:
    """Serve the smoothed classifier by the Open Inference Protocol v2, with a page at / and metrics at /metrics.

    Existing clients of the classifier need no change: images as FP32 in [0, 1] or UINT8 go in, labels come out, with
    their certificates in the parameters. A request may ask for its own `radius` or `samples`. SIGTERM or Ctrl-C stops
    the server after every accepted request is answered.
    """
    _require_extra()
    if statistics.samples is not None:
        if noise.seed is not None:
            raise UserError(
                f"--seed {noise.seed} with --samples 1: noise that can be repeated voids the statement about such "
                "answers; leave it out, every answer has fresh noise"
            )
        refuse_given(("n0", "n", "alpha", "radius"), "is for certificates; leave it out with --samples 1")
    spec = _check_options(model, service, noise)
    name = server.name or re.sub(r"[^A-Za-z0-9._-]+", "-", model.model or service.protocol).strip("-")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name):
        raise UserError(f"--name {name!r}: expected letters, digits, '.', '_' and '-', such as resnet50")
    from certify.serve.admission import Limits
    from certify.serve.app import site_check
    from certify.serve.server import listen

    check = site_check(server.allow_host)
    limits = Limits(
        server.max_bytes, server.max_pixels, statistics.samples_per_request, server.concurrency, server.timeout
    )
    procedure = _procedure(statistics)
    with (
        listen(server.host, server.port) as listening,
        _open_classifier(spec, model, service, noise, compute) as (smoothed, class_name),
    ):
        _serve(name, limits, procedure, listening, check, smoothed, class_name, noise, server, budget=service.budget)


def _check_options(
    model: ServedModelOptions, service: ServedServiceOptions, noise: ServerNoiseOptions
) -> ServiceSpec | None:
    """Refuse what can be refused without importing torch; return the API, or None for a model of this machine."""
    if model.model is not None:
        if service.endpoint is not None:
            raise UserError(_ONE_OF)
        refuse_given(_OF_SERVICES, "without --endpoint: it applies to an API, not to a model; leave it out")
        check_noise(noise)
        check_classifier(model.model, model, noise.denoiser)
        return None
    if service.endpoint is None and not given_by_user("protocol"):
        raise UserError(_ONE_OF)
    if model.input_size is None:
        raise UserError("--endpoint without --input-size: expected the input size of the API, such as 3x224x224")
    refuse_given(_OF_MODELS, "without --model: it applies to a model of this machine; leave it out")
    from denoisers.names import require_trusted

    check_noise(noise)
    if noise.denoiser != "none":
        require_trusted(noise.denoiser, trust_code=model.trust_code)
    return service_from(service)


@contextlib.contextmanager
def _open_classifier(
    spec: ServiceSpec | None,
    model: ServedModelOptions,
    service: ServedServiceOptions,
    noise: ServerNoiseOptions,
    compute: ComputeOptions,
) -> Iterator[tuple[SmoothedClassifier, Callable[[int], str]]]:
    """Yield the smoothed classifier, and a function from its labels to class names."""
    from certify.serve.batching import class_names

    if model.model is not None:
        smoothed = load_smoothed(model.model, model, noise, compute)
        yield smoothed, class_names(smoothed.classifier.class_names)  # type: ignore[attr-defined]
        return
    from certify.blackbox import service_spec
    from certify.blackbox.client.query_client import QueryClient
    from certify.blackbox.ledger import InMemoryLog
    from certify.serve.endpoint import BATCH, Endpoint
    from certify.smoothed_classifier import SmoothedClassifier

    limits = query_limits(service, concurrency=service.query_concurrency, timeout=service.query_timeout)
    assert spec is not None
    assert model.input_size is not None
    with service_spec.open_sender(spec, timeout=service.query_timeout, connections=limits.concurrency + 1) as (
        send,
        described,
    ):
        client = QueryClient(send, described.format, InMemoryLog(), budget=service.budget, limits=limits)
        about = {"endpoint": described.endpoint, "format": described.format.name, **described.format.about}
        endpoint = Endpoint(client, model.input_size, model.num_classes or _CLASSES, about)
        denoiser = None
        if noise.denoiser != "none":
            denoiser = denoiser_for(noise.denoiser, noise.sigma, model.input_size, trust_code=model.trust_code)
        smoothed = SmoothedClassifier(
            endpoint,
            noise.sigma,
            denoiser=denoiser,
            noise=noise.noise,
            rounded=noise.rounded,
            device=device_from(compute.device),
            batch_size=compute.batch_size or BATCH,
        )
        yield smoothed, endpoint.name_of


def _serve(
    name: str,
    limits: Limits,
    procedure: Served,
    listening: socket.socket,
    check: Callable[[Request], None],
    smoothed: SmoothedClassifier,
    class_name: Callable[[int], str],
    noise: ServerNoiseOptions,
    server: ServerOptions,
    *,
    budget: int | None,
) -> None:
    from certify.serve.admission import Admission
    from certify.serve.app import build_app
    from certify.serve.batching import Service
    from certify.serve.endpoint import Endpoint
    from certify.serve.pictures import example_picture, read_picture
    from certify.serve.protocol import STATEMENT, Stated
    from certify.serve.request_handler import Metrics, RequestHandler
    from certify.serve.server import is_loopback, serve, url_of
    from certify.smoothing.procedures import Accuracy

    if not is_loopback(listening):
        warn(f"--host {server.host}: anyone who reaches this address may send requests; add TLS and authentication")
    spec: InputSpec = smoothed.classifier.input  # type: ignore[attr-defined]
    if spec.size is None:
        raise UserError(f"model {name!r} takes any size; a server needs one: pass --input-size, such as 3x224x224")
    metrics, admission = Metrics(), Admission(limits)
    service = Service(smoothed, spec.size, procedure, limits, class_name, metrics.samples.inc, noise.seed)
    if isinstance(endpoint := smoothed.classifier, Endpoint):
        metrics.beyond.set_function(lambda: endpoint.beyond)
    size = "x".join(map(str, spec.size))
    one_copy = isinstance(procedure, Accuracy)
    about = Stated(
        noise.sigma,
        smoothed.noise.name,
        service.stated.norm,
        None if one_copy else procedure.alpha,
        smoothed.base.denoiser_name,
        size,
        STATEMENT if one_copy else "",
    )

    read = functools.partial(read_picture, spec=spec, max_pixels=limits.max_pixels)
    digits = smoothed.classifier.describe().get("name") == "digits"
    example = example_picture(server.example, spec.size, read, digits=digits)
    handler = RequestHandler(service, name, read, metrics, admission, about, example)
    _show(name, service, noise, remote=isinstance(smoothed.classifier, Endpoint), budget=budget)
    with service:
        if smoothed.execution is not None:
            show_engine(smoothed.execution, smoothed, say)
        app = build_app(handler, check)
        serve(app, admission, listening, lambda: say(f"serving    {url_of(listening)}  (Ctrl-C ends it)"), _stopped)


def _stopped(unanswered: int) -> None:
    lost = f"{unanswered} requests were not answered" if unanswered else "everything that was accepted is answered"
    say(f"stopped    {lost}")


def _procedure(statistics: ServerStatistics) -> Served:
    from certify.smoothing.procedures import Accuracy, Certify, Decide
    from certify.smoothing.stopping_rules import DEFAULT_CAP

    if statistics.samples is not None:
        return Accuracy(statistics.samples)
    if statistics.radius is None:
        return Certify(statistics.n0, statistics.n, statistics.alpha)
    return Decide((statistics.radius,), statistics.n if given_by_user("n") else DEFAULT_CAP, statistics.alpha)


def _show(name: str, service: Service, noise: NoiseOptions, *, remote: bool, budget: int | None) -> None:
    """Show what is served and the largest radius that it can certify."""
    from certify.engine.contract import QUERIES
    from certify.smoothing.certificates import largest_radius
    from certify.smoothing.norms import DECIMALS
    from certify.smoothing.procedures import Accuracy, Decide, samples
    from certify.smoothing.rounding import ceil_to, exact

    procedure, alpha = service.procedure, exact(service.procedure.alpha)
    where = " at most, by an API" if remote else ""
    size = "x".join(map(str, service.size))
    say(f"model      {name}: {service.smoothed.num_classes:,} classes{where}, input {size}")
    how = f"{service.smoothed.noise.name} noise, sigma = {noise.sigma:g} in [0, 1] pixels, denoiser: {noise.denoiser}"
    if remote:
        say(f"queries    at most {samples(procedure):,} requests to the service per image, before retries")
        say(f"           {QUERIES} more about the first image: whether repeated queries return the same label")
        if budget is None:
            warn("no --budget: anyone who queries this server causes requests to the service without limit")
    if isinstance(procedure, Accuracy):
        say(f"procedure  one fresh noisy copy of each image, {how}")
        say("statement  none about a single answer; `certify accuracy` bounds their expected accuracy under attack")
        return
    if isinstance(procedure, Decide):
        decide = f"decide at {exact(procedure.radii[0])}, n = {procedure.n:,} at most"
        say(f"procedure  {decide}, alpha = {alpha}, {how}")
        return
    say(f"procedure  n0 = {procedure.n0:,}, n = {procedure.n:,}, alpha = {alpha}, {how}")
    cap = largest_radius(service.stated, procedure.n, procedure.alpha)
    say(f"radius     at most {ceil_to(cap, DECIMALS[service.stated.norm])} ({service.stated.norm}) at this n and alpha")
    if cap == 0.0:
        warn(f"n = {procedure.n} can certify nothing at alpha = {alpha}: every image will abstain")


def _require_extra() -> None:
    missing = [name for name in EXTRAS["serve"] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"certify serve needs {', '.join(missing)}; pip install 'certify-toolkit[serve]'")
