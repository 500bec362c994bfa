"""The routes, and what stands around them: log, key, errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response

from dist_vlm.server import tokenization
from dist_vlm.server.access_log import ID_HEADER, AccessLog
from dist_vlm.server.auth import OPEN_PATHS, Authentication
from dist_vlm.server.chat import read_chat
from dist_vlm.server.completions import read_completion
from dist_vlm.server.document import body_of_kind, describe, error_responses
from dist_vlm.server.errors import ApiError
from dist_vlm.server.event_stream import ClientGoneError, unless_gone
from dist_vlm.server.fields import ChatFields, CompletionFields, DetokenizeFields, Fields, TokenizeFields
from dist_vlm.server.generating import Reader, body_of, checked, generate
from dist_vlm.server.page import add_page
from dist_vlm.server.services import Services
from dist_vlm.version import __version__

# nginx's word for a client that left; nobody reads it.
_GONE = 499


def make_app(services: Services) -> FastAPI:
    """The ASGI application over what the endpoints share, which the caller starts and ends."""
    app = FastAPI(
        title="dist-vlm",
        version=__version__,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses=error_responses(),
    )
    _add_errors(app)
    _add_state_routes(app, services)
    _add_model_routes(app, services)
    _add_generating_routes(app, services)
    if not services.config.disable_page:
        add_page(app)
    describe(app)
    _add_middleware(app, services)
    return app


def _add_middleware(app: FastAPI, services: Services) -> None:
    """The last one added sees a request first."""
    config = services.config
    if config.api_key is not None:
        open_paths = [prefix + path for prefix in {"", config.root_path} for path in OPEN_PATHS]
        app.add_middleware(Authentication, api_key=config.api_key, open_paths=open_paths)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
        )
    paths = frozenset(route.path for route in app.routes if hasattr(route, "path"))
    app.add_middleware(AccessLog, metrics=services.metrics, paths=paths, quiet=config.disable_access_log)


def _add_errors(app: FastAPI) -> None:
    async def of_api(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status, headers=error.headers)

    async def of_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = {404: "there is nothing at this path", 405: f"{request.method} is not served at this path"}
        answer = ApiError(error.status_code, text.get(error.status_code, error.detail))
        return JSONResponse(answer.body, answer.status, headers=error.headers)

    async def of_leaving(request: Request, error: Exception) -> Response:
        return Response(status_code=_GONE)

    async def of_defect(request: Request, error: Exception) -> Response:
        answer = ApiError(500, f"the server failed ({type(error).__name__}); its log has more", code="internal_error")
        # Made outside of the access log, which gives the others their id.
        return JSONResponse(answer.body, answer.status, headers={ID_HEADER: request.state.request_id})

    app.add_exception_handler(ApiError, of_api)
    app.add_exception_handler(HTTPException, of_route)
    app.add_exception_handler(ClientGoneError, of_leaving)
    app.add_exception_handler(Exception, of_defect)


def _add_state_routes(app: FastAPI, services: Services) -> None:
    @app.get("/health", summary="200 while every rank is alive, else 503 with the cause")
    async def health() -> Response:
        return _state(services.health.problem())

    @app.get("/ready", summary="200 while new requests are taken, else 503 with the cause")
    async def ready() -> Response:
        draining = "the server is shutting down" if services.admission.is_draining else None
        return _state(draining or services.health.problem())

    @app.get("/metrics", summary="Prometheus series", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(services.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", summary="this server's version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _state(problem: str | None) -> Response:
    if problem is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse(ApiError(503, problem, code="not_ready").body, 503)


def _add_model_routes(app: FastAPI, services: Services) -> None:
    card = {
        "id": services.model,
        "object": "model",
        "created": services.created,
        "owned_by": "dist-vlm",
        "max_model_len": services.max_model_len,
    }

    @app.get("/v1/models", summary="the served model")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}", summary="the served model, by its name")
    async def model(name: str) -> dict[str, Any]:
        services.check_model(name)
        return card


def _add_generating_routes(app: FastAPI, services: Services) -> None:
    def add(path: str, reader: Reader, kind: type[Fields], summary: str) -> None:
        async def endpoint(request: Request) -> Response:
            return await generate(request, services, reader)

        kinds: dict[str, Any] = {"description": "The answer, or its events", "content": {"text/event-stream": {}}}
        _add_post(app, path, endpoint, kind=kind, summary=summary, responses={200: kinds})

    def add_plain(path: str, work: Callable[..., Awaitable[dict[str, Any]]], kind: type[Fields], summary: str) -> None:
        async def endpoint(request: Request) -> Response:
            with services.admission.enter():
                async with body_of(request, services) as body:
                    return JSONResponse(await unless_gone(request, checked(work(body, services))))

        _add_post(app, path, endpoint, kind=kind, summary=summary)

    add("/v1/chat/completions", read_chat, ChatFields, "continues a conversation")
    add("/v1/completions", read_completion, CompletionFields, "continues texts or tokens")
    add_plain("/tokenize", tokenization.tokenize, TokenizeFields, "the tokens of a prompt or of messages")
    add_plain("/detokenize", tokenization.detokenize, DetokenizeFields, "the text of tokens")


def _add_post(
    app: FastAPI,
    path: str,
    endpoint: Callable[..., Awaitable[Response]],
    *,
    kind: type[Fields],
    summary: str,
    responses: dict[int | str, dict[str, Any]] | None = None,
) -> None:
    extra = {"requestBody": body_of_kind(kind)}
    app.add_api_route(path, endpoint, methods=["POST"], summary=summary, openapi_extra=extra, responses=responses)
