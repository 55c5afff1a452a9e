"""The application's routes: protocol, page and metrics. Requests from pages of other sites are refused first."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import json
import re
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from urllib.parse import urlsplit

import numpy as np
import torch
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from certify.blackbox.encoding import encode_base64, to_pictures
from certify.errors import UserError
from certify.serve.admission import Refused
from certify.serve.protocol import (
    VERSION,
    InferenceRequest,
    model_metadata,
    parse_options,
    read_request,
    server_metadata,
    write_response,
)
from certify.serve.request_handler import MetricsMiddleware, RequestHandler
from certify.smoothing.norms import DECIMALS
from certify.smoothing.rounding import exact, floor_to
from certify.text import printable

_SHOWN = 10  # classes on the page
_MAX_PICTURE = 2**20  # maximum pixels of an image in a response
_MESSAGE_TYPES = ("application/json", "application/octet-stream")
_PAGE = (resources.files("certify.serve") / "page.html").read_text(encoding="utf-8")


def build_app(handler: RequestHandler, check: Callable[[Request], None]) -> FastAPI:
    """Build the application: routes, error handlers and metrics.

    Args:
        handler: answers the requests.
        check: called first with every request; may raise ``Refused``.
    """

    async def check_first(request: Request) -> None:
        check(request)

    app = FastAPI(  # FastAPI's own pages load scripts from other sites
        docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(check_first)]
    )
    app.add_middleware(MetricsMiddleware, metrics=handler.metrics)

    def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        handler.metrics.rejected.labels(error.kind).inc()
        headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else None
        return JSONResponse({"error": printable(error.why)}, error.status, headers)  # it may quote the request

    def refuse_path(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refuse(request, Refused(error.status_code, f"{request.method} {request.url.path[:60]}: {error.detail}"))

    def report_fault(request: Request, error: Exception) -> Response:  # uvicorn logs the error
        return refuse(request, Refused(500, "internal error; see the log of the server", "fault"))

    app.add_exception_handler(Exception, report_fault)
    app.add_exception_handler(Refused, refuse)
    app.add_exception_handler(HTTPException, refuse_path)
    _add_protocol(app, handler)
    _add_page(app, handler)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(handler.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _add_protocol(app: FastAPI, handler: RequestHandler) -> None:
    """Add the routes of the Open Inference Protocol v2."""
    model, service = handler.model, handler.service

    def check_name(name: str, version: str) -> None:
        if name != model or version != VERSION:
            raise Refused(404, f"model {name[:60]!r}, version {version[:20]!r}: this server has {model!r}, {VERSION!r}")

    def readiness(**named: str) -> Response:
        return JSONResponse({**named, "ready": handler.ready}, 200 if handler.ready else 503)

    @app.get("/v2")
    @app.get("/v2/")
    async def server() -> Response:
        return JSONResponse(server_metadata())

    @app.get("/v2/health/live")
    async def live() -> Response:
        return JSONResponse({"live": True})

    @app.get("/v2/health/ready")
    async def ready() -> Response:
        return readiness()

    @app.post("/v2/repository/index")
    async def index() -> Response:
        """List the single model (Triton's extension), so that clients find its name."""
        state = "READY" if handler.ready else "UNAVAILABLE"
        return JSONResponse([{"name": model, "version": VERSION, "state": state}])

    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str = VERSION) -> Response:
        check_name(name, version)
        return readiness(name=model)

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    async def metadata(name: str, version: str = VERSION) -> Response:
        check_name(name, version)
        return JSONResponse(model_metadata(model, service.size, service.smoothed.num_classes, handler.about))

    @app.post("/v2/models/{name}/infer")
    @app.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(request: Request, name: str, version: str = VERSION) -> Response:
        check_name(name, version)
        _check_content(request, lambda kind: kind in ("", *_MESSAGE_TYPES), " or ".join(_MESSAGE_TYPES))

        def parse(body: bytes) -> InferenceRequest:
            return read_request(body, request.headers, service.size, service.limits)

        parsed, answers = await handler.answer(request, parse)
        if "votes" in parsed.outputs:  # large for many classes: not on the event loop
            content, headers = await asyncio.to_thread(write_response, model, parsed, answers, handler.about)
        else:
            content, headers = write_response(model, parsed, answers, handler.about)
        return Response(content, headers=headers)


def _add_page(app: FastAPI, handler: RequestHandler) -> None:
    """Add the page and the routes it uses."""
    decided = handler.service.procedure.radii
    shown_first = {"example": handler.example is not None, "decides": exact(decided[0]) if decided else None}
    html, page_headers = page({"model": handler.model, **handler.about.parameters(), **shown_first}), _page_headers()

    @app.get("/")
    async def home() -> Response:
        return HTMLResponse(html, headers=page_headers)

    @app.get("/example")
    async def example() -> Response:
        """Return the example image of the page."""
        if handler.example is None:
            raise Refused(404, "this server has no example image")
        return Response(handler.example, media_type="image/png")

    @app.post("/classify")
    async def classify(request: Request) -> Response:
        """Answer for an image file."""
        _check_content(
            request,
            lambda kind: kind.startswith("image/") or kind == "application/octet-stream",
            "image/png, image/jpeg, ... or application/octet-stream: the bytes of one image file",
        )
        options = parse_options(request.query_params)

        picture = None

        def parse(body: bytes) -> InferenceRequest:
            nonlocal picture
            try:
                image = handler.decode_picture(body)
            except UserError as error:
                raise Refused(400, f"the image {error}") from None
            picture = _as_png(image)
            return InferenceRequest(image[None], options)

        _, (answer,) = await handler.answer(request, parse)
        shown = {
            "picture": picture,  # at the classifier's input size
            "name": printable(answer.name),
            "radius_text": floor_to(answer.radius, DECIMALS[handler.service.stated.norm]),  # as the page displays it
            "votes": _top_classes(answer.votes, handler.service.class_name),
            "votes_cast": max(1, sum(answer.votes)),
        }
        return JSONResponse({**handler.about.parameters(), **asdict(answer), **shown})


def _check_content(request: Request, fits: Callable[[str], bool], expected: str) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not fits(kind):
        raise Refused(415, f"content type {kind[:40]!r}: expected {expected}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "compressed bodies are not accepted: send it without Content-Encoding")


def _as_png(image: np.ndarray) -> str | None:
    """Return an image ``(C, H, W)`` in [0, 1] as PNG in base64; None if it is large, or neither grey nor colour."""
    channels, height, width = image.shape
    if channels not in (1, 3) or height * width > _MAX_PICTURE:
        return None
    return encode_base64(to_pictures(torch.from_numpy(image)[None])[0])


def _top_classes(votes: Sequence[int], class_name: Callable[[int], str]) -> list[dict[str, int | str]]:
    """Return the classes with the most votes, in descending order, with printable names."""
    order = sorted((c for c in range(len(votes)) if votes[c]), key=lambda c: (-votes[c], c))[:_SHOWN]
    return [{"label": c, "name": printable(class_name(c)), "votes": votes[c]} for c in order]


def page(shown: Mapping[str, float | str | bool | None]) -> str:
    """Return the page at ``/`` with its settings, one file that loads nothing from other sites."""
    data = json.dumps(shown).replace("<", "\\u003c")  # so that no name can close the element
    return _PAGE.replace("{{about}}", data)


def _page_headers() -> dict[str, str]:
    """Return headers with which the browser enforces that the page loads nothing else."""

    def digest(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", _PAGE, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; img-src blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {"content-security-policy": policy, "referrer-policy": "no-referrer"}


def site_check(names: Collection[str] = ()) -> Callable[[Request], None]:
    """Return a check that raises ``Refused`` on a request sent by another site's page.

    A request with a foreign ``Origin`` comes from another site. A page whose host name resolves to this server (DNS
    rebinding) has the server's origin, but its ``Host`` is that name; therefore the host must be an IP address,
    ``localhost``, this machine's name or one of ``names``, whatever address the server listens on.

    Args:
        names: further host names of the server, such as that of a reverse proxy.

    Raises:
        UserError: not a host name.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise UserError(f"--allow-host {name!r}: expected a host name without scheme and port, such as api.example")
    allowed = frozenset(name.lower() for name in names)
    known = allowed | {"localhost", socket.gethostname().lower()} - {""}

    def check(request: Request) -> None:
        host = request.headers.get("host", "")
        name = _split_url(f"//{host}")[0]
        if name.rstrip(".") not in known and not _is_address(name):
            expected = "an IP address, localhost, or a name given by --allow-host"
            raise Refused(403, f"host {host[:60]!r}: expected {expected}", "foreign")
        if (origin := request.headers.get("origin")) is None:
            return
        name, authority = _split_url(origin)
        if (authority != host.lower() or not authority) and name not in allowed:
            raise Refused(
                403, f"a page of {origin[:60]!r} may not use this server; --allow-host permits more hosts", "foreign"
            )

    return check


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _split_url(url: str) -> tuple[str, str]:
    """Return the host, and the host with the port, of a URL in lower case; empty if it has none."""
    try:
        parts = urlsplit(url)
        return parts.hostname or "", parts.netloc.lower()
    except ValueError:
        return "", ""
