"""The routes: requests in, answers or refusals out. What is computed is the service's, what is read the protocol's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from certify.errors import UserError
from certify.serve.limits import Refused
from certify.serve.page import HEADERS, page
from certify.serve.protocol import (
    HEADER,
    VERSION,
    Asked,
    model_metadata,
    read_request,
    server_metadata,
    wishes_from,
    write_response,
)
from certify.serve.request_handler import Counted, Front
from certify.smoothing.norms import DECIMALS
from certify.smoothing.rounding import floor_to
from certify.text import printable

_SHOWN = 10  # classes on the page
_JSON = ("application/json", "application/octet-stream")


def build_app(front: Front, check: Callable[[Request], None]) -> FastAPI:
    """The server's application: refusals, metrics, and all routes.

    Args:
        front: what the routes share.
        check: looks at every request first and raises ``Refused``.
    """

    async def first(request: Request) -> None:
        check(request)

    app = FastAPI(  # FastAPI's own pages load scripts from elsewhere
        docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(first)]
    )
    app.add_middleware(Counted, metrics=front.metrics)

    def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        front.metrics.rejected.labels(error.kind).inc()
        headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else None
        return JSONResponse({"error": printable(error.why)}, error.status, headers)  # it may quote the request

    def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refuse(request, Refused(error.status_code, f"{request.method} {request.url.path[:60]}: {error.detail}"))

    def broken(request: Request, error: Exception) -> Response:  # and uvicorn logs it
        return refuse(request, Refused(500, "the server failed; its log says more", "fault"))

    app.add_exception_handler(Exception, broken)
    app.add_exception_handler(Refused, refuse)
    app.add_exception_handler(HTTPException, unknown)
    _add_protocol(app, front)
    _add_page(app, front)

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(front.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _add_protocol(app: FastAPI, front: Front) -> None:
    """The Open Inference Protocol v2."""
    model, service = front.model, front.service

    def check_name(name: str, version: str) -> None:
        if name != model or version != VERSION:
            raise Refused(404, f"model {name[:60]!r}, version {version[:20]!r}: this server has {model!r}, {VERSION!r}")

    def readiness(**said: Any) -> Response:
        return JSONResponse({**said, "ready": front.ready}, 200 if front.ready else 503)

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

    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str = VERSION) -> Response:
        check_name(name, version)
        return readiness(name=model)

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    async def metadata(name: str, version: str = VERSION) -> Response:
        check_name(name, version)
        return JSONResponse(model_metadata(model, service.size, service.smoothed.num_classes, front.about))

    @app.post("/v2/models/{name}/infer")
    @app.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(request: Request, name: str, version: str = VERSION) -> Response:
        check_name(name, version)
        _check_content(request, lambda kind: kind in ("", *_JSON), " or ".join(_JSON))

        def read(body: bytes) -> Asked:
            return read_request(body, request.headers.get(HEADER), service.size, service.limits)

        asked, answers = await front.answers(request, read)
        if "votes" in asked.outputs:  # long with many classes: not on the event loop
            content, headers = await asyncio.to_thread(write_response, model, asked, answers, front.about)
        else:
            content, headers = write_response(model, asked, answers, front.about)
        return Response(content, headers=headers)


def _add_page(app: FastAPI, front: Front) -> None:
    """The page, and what it asks."""
    html = page(front.model, front.about)

    @app.get("/")
    async def home() -> Response:
        return HTMLResponse(html, headers=HEADERS)

    @app.post("/classify")
    async def classify(request: Request) -> Response:
        """An image file in, everything about it out."""
        _check_content(
            request,
            lambda kind: kind.startswith("image/") or kind == "application/octet-stream",
            "image/png, image/jpeg, ... or application/octet-stream: the bytes of one image file",
        )
        wishes = wishes_from(request.query_params)

        def read(body: bytes) -> Asked:
            try:
                return Asked(front.picture(body)[None], wishes, None, {})
            except UserError as error:
                raise Refused(400, f"the image {error}") from None

        _, (answer,) = await front.answers(request, read)
        shown = {
            "name": printable(answer.name),
            "radius_text": floor_to(answer.radius, DECIMALS[front.service.stated.norm]),  # as the page displays it
            "votes": _most(answer.votes, front.service.name_of),
            "votes_cast": max(1, sum(answer.votes)),
        }
        return JSONResponse({**front.about, **asdict(answer), **shown})


def _check_content(request: Request, fits: Callable[[str], bool], expected: str) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not fits(kind):
        raise Refused(415, f"content type {kind[:40]!r}: expected {expected}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "compressed bodies are not taken: send it without Content-Encoding")


def _most(votes: Sequence[int], name_of: Callable[[int], str]) -> list[dict[str, Any]]:
    """Return the classes with most votes, most first, by names that can be displayed."""
    order = sorted((c for c in range(len(votes)) if votes[c]), key=lambda c: (-votes[c], c))[:_SHOWN]
    return [{"label": c, "name": printable(name_of(c)), "votes": votes[c]} for c in order]
