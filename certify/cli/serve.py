"""``certify serve``: a server in front of a classifier that answers with smoothed labels and certificates."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from certify.cli import options
from certify.cli.console import say, warn
from certify.cli.load import check_first, denoiser_for, load_smoothed
from certify.cli.service_options import Wanted, open_service, protocol_options, query_limits, wanted_service
from certify.errors import UserError

if TYPE_CHECKING:
    import socket

    import numpy as np
    from starlette.requests import Request

    from certify.models.classifier import InputSpec
    from certify.serve.admission import Limits
    from certify.serve.batching import Defaults, Service
    from certify.smoothed_classifier import SmoothedClassifier


_CLASSES = 1000  # labels of a service that are told apart, unless --num-classes says otherwise
_LONGEST = 20  # times its shorter side may an image file's longer side be
_OF_MODELS = ("weights", "mean", "std", "precision", "compile")
_OF_SERVICES = (  # each is ignored on the other side, which nobody would notice
    *("protocol", "extra", "encoding", "sdk", "api_key_env", "auth_header", "auth_query", "insecure", "rate"),
    *("retries", "query_concurrency", "query_timeout", "budget"),
)


@click.command(short_help="Serve smoothed labels with certificates over HTTP.")
@click.option("--model", help="The frozen classifier (as for `certify run`); this or --endpoint.")
@options.input_options
@click.option(
    "--endpoint", metavar="URL", help="In place of --model: a service that is asked; known for some of --protocol."
)
@click.option("--protocol", help="How the service is asked and answers (`certify list protocols`).")
@protocol_options
@click.option(
    "--query-concurrency",
    type=options.Count("requests at a time"),
    default=4,
    help="Requests to the service under way at a time.",
)
@click.option(
    "--query-timeout",
    type=options.Positive("seconds above 0"),
    default=20.0,
    help="Seconds for one request to the service, as `certify audit --timeout`; --timeout is for one to this server.",
)
@click.option(
    "--budget", type=options.Count("requests"), help="Requests to the service in all; then it answers no more."
)
@options.noise_options
@options.denoiser
@options.n0
@click.option(
    "--n",
    type=options.Count("a number of samples"),
    default=1000,
    help="Estimation samples an image; the most of them with --radius.",
)
@options.alpha
@click.option(
    "--radius",
    type=options.Positive("a radius in [0, 1] pixels"),
    help="Only decide whether an image is robust at this radius, with as few samples as that takes (--n at most).",
)
@click.option(
    "--samples-per-request",
    type=options.Count("a number of samples"),
    default=100_000,
    help="Noise samples that one request may take, all its images together.",
)
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65_535), default=8080, help="Port to listen on; 0: a free one.")
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="Host name by which it is reached, such as a proxy's; repeatable. Addresses, localhost and this machine's "
    "name need none. Pages of other sites may not ask.",
)
@click.option("--name", help="The model's name in URLs (default: from --model).")
@click.option(
    "--max-bytes", type=options.Count("a number of bytes"), default=16 * 2**20, help="Longest body of a request."
)
@click.option(
    "--max-pixels",
    type=options.Count("a number of pixels"),
    default=16_000_000,
    help="Pixels of all images of a request, and of an image file before it is decoded.",
)
@click.option(
    "--concurrency",
    type=options.Count("a number of requests"),
    default=32,
    help="Requests of one client address in work at a time, and twice as many of all; more get 429 with Retry-After.",
)
@click.option(
    "--timeout",
    type=options.Positive("seconds above 0"),
    default=60.0,
    help="Seconds for a request, from its head to its answer; also the longest wait at the end.",
)
@click.option("--seed", type=options.Count("a seed", least=0), help="Seed of all noise (default: a secret one).")
@options.device
@options.engine_options
def serve(**o: Any) -> None:
    """Serve the smoothed classifier by the Open Inference Protocol v2, with a page at / and metrics at /metrics.

    Existing clients of the classifier go on as they are: images as FP32 in [0, 1] or UINT8 go in, labels come out, with
    their certificate in the parameters. A request may ask for its own `radius` or `samples`. SIGTERM or Ctrl-C ends
    the server when everything it accepted is answered.
    """
    _check_extra()
    wanted = _check_first(o)
    name = o["name"] or re.sub(r"[^A-Za-z0-9._-]+", "-", o["model"] or wanted.protocol).strip("-")  # type: ignore[union-attr]
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name):
        raise UserError(f"--name {name!r}: expected letters, digits, '.', '_' and '-', such as resnet50")
    from certify.serve.admission import Limits
    from certify.serve.app import site_check
    from certify.serve.server import listen

    check = site_check(o["allow_host"])
    limits = Limits(o["max_bytes"], o["max_pixels"], o["samples_per_request"], o["concurrency"], o["timeout"])
    with listen(o["host"], o["port"]) as listening, _classifier(o, wanted) as (smoothed, names):
        _serve(o, name, limits, listening, check, smoothed, names)


def _check_first(o: dict[str, Any]) -> Wanted | None:
    """Everything that can be refused before torch is imported; the service, if it is one."""
    if o["model"] is not None:
        if o["endpoint"] is not None:
            raise UserError("certify serve: expected --model NAME or --endpoint URL, one of them")
        options.refuse_given(_OF_SERVICES, "without --endpoint: a model is not asked over the network; leave it out")
        check_first({**o, "radius": None})
        return None
    if o["endpoint"] is None and o["protocol"] is None:
        raise UserError("certify serve: expected --model NAME or --endpoint URL, one of them")
    for option in ("protocol", "input_size"):
        if o[option] is None:
            raise UserError(f"--endpoint without --{option.replace('_', '-')}: expected how it is asked, about what")
    options.refuse_given(_OF_MODELS, "without --model: it is about a model of this machine; leave it out")
    from certify.smoothing.noise import make_noise
    from denoisers.names import require_trusted

    make_noise(o["noise"], o["sigma"], rounded=o["rounded"])
    if o["denoiser"] != "none":
        require_trusted(o["denoiser"], trust_code=o["trust_code"])
    return wanted_service(o)


@contextlib.contextmanager
def _classifier(o: dict[str, Any], wanted: Wanted | None) -> Iterator[tuple[SmoothedClassifier, Callable[[int], str]]]:
    """The smoothed classifier, and what its classes are called."""
    from certify.serve.batching import class_names

    if wanted is None:
        smoothed = load_smoothed(o)
        yield smoothed, class_names(smoothed.classifier.class_names)  # type: ignore[attr-defined]
        return
    from certify.blackbox.client.query_client import QueryClient
    from certify.blackbox.ledger import InMemoryLog
    from certify.cli.load import device_from
    from certify.serve.endpoint import BATCH, Endpoint
    from certify.smoothed_classifier import SmoothedClassifier

    theirs = {**o, "concurrency": o["query_concurrency"], "timeout": o["query_timeout"]}
    with open_service(wanted, theirs) as (send, found):
        client = QueryClient(send, found.format, InMemoryLog(), budget=o["budget"], limits=query_limits(theirs))
        about = {"endpoint": found.endpoint, "format": found.format.name, **found.format.about}
        endpoint = Endpoint(client, o["input_size"], o["num_classes"] or _CLASSES, about)
        denoiser = None
        if o["denoiser"] != "none":
            denoiser = denoiser_for(o["denoiser"], o["sigma"], o["input_size"], trust_code=o["trust_code"])
        smoothed = SmoothedClassifier(
            endpoint,
            o["sigma"],
            denoiser=denoiser,
            noise=o["noise"],
            rounded=o["rounded"],
            device=device_from(o["device"]),
            batch_size=o["batch_size"] or BATCH,
        )
        yield smoothed, endpoint.name_of


def _serve(
    o: dict[str, Any],
    name: str,
    limits: Limits,
    listening: socket.socket,
    check: Callable[[Request], None],
    smoothed: SmoothedClassifier,
    names: Callable[[int], str],
) -> None:
    from certify.cli.plan import show_engine
    from certify.serve.admission import Admission
    from certify.serve.app import build_app
    from certify.serve.batching import Service
    from certify.serve.endpoint import Endpoint
    from certify.serve.request_handler import Metrics, RequestHandler
    from certify.serve.server import is_loopback, serve, url_of

    if not is_loopback(listening):
        warn(f"--host {o['host']}: anybody who reaches this address may ask; put TLS and authentication in front")
    spec: InputSpec = smoothed.classifier.input  # type: ignore[attr-defined]
    if spec.size is None:
        raise UserError(
            f"model {o['model']!r} takes any size; a server needs one: pass --input-size, such as 3x224x224"
        )
    metrics, admission = Metrics(), Admission(limits)
    service = Service(smoothed, spec.size, _defaults(o), limits, names, on_samples=metrics.samples.inc)
    if isinstance(endpoint := smoothed.classifier, Endpoint):
        metrics.beyond.set_function(lambda: endpoint.beyond)
    about = {
        "sigma": o["sigma"],
        "noise": smoothed.noise.name,
        "norm": service.stated.norm,
        "alpha": o["alpha"],
        "denoiser": smoothed.base.denoiser_name,
        "input": "x".join(map(str, spec.size)),
    }
    handler = RequestHandler(
        service, name, lambda content: _picture(content, spec, limits.max_pixels), metrics, admission, about
    )
    _show(o, name, service)
    with service:
        if smoothed.execution is not None:
            show_engine(smoothed.execution, smoothed, say)
        app = build_app(handler, check)
        serve(app, admission, listening, lambda: say(f"serving    {url_of(listening)}  (Ctrl-C ends it)"), _stopped)


def _stopped(unanswered: int) -> None:
    lost = f"{unanswered} requests were not answered" if unanswered else "everything that was accepted is answered"
    say(f"stopped    {lost}")


def _defaults(o: dict[str, Any]) -> Defaults:
    from certify.serve.batching import Defaults
    from certify.smoothing.stopping_rules import DEFAULT_CAP

    n = DEFAULT_CAP if o["radius"] is not None and not options.given_by_user("n") else o["n"]
    seeded = {"seed": o["seed"]} if o["seed"] is not None else {}
    return Defaults(o["n0"], n, o["alpha"], o["radius"], **seeded)


def _show(o: dict[str, Any], name: str, service: Service) -> None:
    """What is served, and what it can claim at most."""
    from certify.engine.contract import QUERIES
    from certify.serve.protocol import RequestOptions
    from certify.smoothing.certificates import largest_radius
    from certify.smoothing.norms import DECIMALS
    from certify.smoothing.rounding import ceil_to, exact

    defaults = service.defaults
    where = "" if o["model"] is not None else " at most, behind a service"
    size = "x".join(map(str, service.size))
    say(f"model      {name}: {service.smoothed.num_classes:,} classes{where}, input {size}")
    noise = f"{service.smoothed.noise.name} noise, sigma = {o['sigma']:g} in [0, 1] pixels, denoiser: {o['denoiser']}"
    if o["model"] is None:
        say(f"queries    at most {defaults.cost(RequestOptions()):,} requests to the service per image, before retries")
        say(f"           {QUERIES} more about the first image: whether repeated queries return the same label")
        if o["budget"] is None:
            warn("no --budget: whoever asks this server makes requests to the service without end")
    if defaults.radius is not None:
        how = f"decide at {exact(defaults.radius)}, n = {defaults.n:,} at most"
        say(f"procedure  {how}, alpha = {exact(defaults.alpha)}, {noise}")
        return
    say(f"procedure  n0 = {defaults.n0:,}, n = {defaults.n:,}, alpha = {exact(defaults.alpha)}, {noise}")
    cap = largest_radius(service.stated, defaults.n, defaults.alpha)
    say(f"radius     at most {ceil_to(cap, DECIMALS[service.stated.norm])} ({service.stated.norm}) at this n and alpha")
    if cap == 0.0:
        warn(f"n = {defaults.n} can certify nothing at alpha = {exact(defaults.alpha)}: every image will abstain")


def _picture(content: bytes, spec: InputSpec, max_pixels: int) -> np.ndarray:
    """Bytes of an image file as the classifier wants to see them, ``(C, H, W)`` in [0, 1]."""
    from certify.images.dataset import fitted
    from certify.images.decode import DecodeLimits, decode

    limits = DecodeLimits(max_pixels, max_aspect=_LONGEST)
    return fitted(decode(content, spec.size[0] if spec.size is not None else 3, limits), spec, limits).numpy()


def _check_extra() -> None:
    import importlib.util

    from certify.cli.info import EXTRAS

    missing = [name for name in EXTRAS["serve"] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"certify serve needs {', '.join(missing)}; pip install 'certify-toolkit[serve]'")
