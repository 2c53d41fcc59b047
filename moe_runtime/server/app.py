"""make_app: the FastAPI application in front of an engine."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from moe_runtime import __version__
from moe_runtime.errors import MoeRuntimeError, did_you_mean
from moe_runtime.server import chat, completions
from moe_runtime.server.config import ServerConfig
from moe_runtime.server.engine_api import ServedEngine
from moe_runtime.server.errors import ApiError
from moe_runtime.server.http import error_answer, explain
from moe_runtime.server.middleware import Admitted, ApiKeys, BodyLimit, RequestScope
from moe_runtime.server.observability import ObservabilityRoutes
from moe_runtime.server.responses import handler as responses
from moe_runtime.server.state import ServerState
from moe_runtime.server.system import SystemRoutes
from moe_runtime.server.tokenization import detokenize, tokenize


def make_app(
    engine: ServedEngine | None,
    config: ServerConfig,
    *,
    extra_routers: Sequence[APIRouter] = (),
) -> FastAPI:
    """The application; `app.state.server` is its ServerState.

    Args:
        engine: None while it still starts: requests get 503 until `app.state.server.attach(engine)`.
        extra_routers: further routes, under the same keys and limits.
    """
    state = ServerState(config, engine)
    # Its documentation pages load scripts from elsewhere, and handlers read bodies themselves: none of it is used.
    app = FastAPI(
        title="moe_runtime",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        middleware=_middleware(config, state),
        redirect_slashes=False,
    )
    app.state.server = state
    for kind in (ApiError, MoeRuntimeError):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(HTTPException, _answer_no_route)
    routers = [_routes(SystemRoutes(state), ObservabilityRoutes(state)), *extra_routers]
    app.state.paths = [
        route.path for router in routers for route in router.routes if isinstance(route, APIRoute)
    ]
    for router in routers:
        app.include_router(router)
    return app


def _middleware(config: ServerConfig, state: ServerState) -> list[Middleware]:
    """Outermost first."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(config.allowed_origins),
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id"],
    )
    # What they raise has to become an answer inside CORS, or a browser would not show it to its page.
    return [
        *([cors] if config.allowed_origins else []),
        Middleware(RequestScope),
        *([Middleware(ApiKeys, keys=config.api_keys)] if config.api_keys else []),
        Middleware(Admitted, admission=state.admission),
        Middleware(BodyLimit, max_bytes=config.max_body_bytes),
    ]


def _routes(system: SystemRoutes, observability: ObservabilityRoutes) -> APIRouter:
    router = APIRouter()
    for path, handler in (
        ("/health", system.health),
        ("/version", system.version),
        ("/v1/models", system.models),
        ("/v1/models/{name:path}", system.model),
        ("/v1/ranks", system.ranks),
        ("/v1/load", observability.load),
        ("/metrics", observability.metrics),
    ):
        router.add_api_route(path, handler, methods=["GET", "HEAD"], response_class=Response)
    for path, handler in (
        (completions.ROUTE, completions.create_completion),
        (chat.ROUTE, chat.create_chat_completion),
        (responses.ROUTE, responses.create_response),
        ("/v1/embeddings", system.embeddings),
        ("/tokenize", tokenize),
        ("/detokenize", detokenize),
    ):
        router.add_api_route(path, handler, methods=["POST"], response_class=Response)
    return router


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_answer(explain(error, request.state.id))


async def _answer_no_route(request: Request, error: Exception) -> Response:
    """FastAPI's own errors: 404 for a path, 405 for a method."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == 404:
        message = f"there is no route {path:.200}{did_you_mean(path[:200], request.app.state.paths)}"
        return error_answer(ApiError(404, message, kind="not_found_error", code="unknown_url"))
    headers = error.headers or {}
    if error.status_code == 405:
        taken = ", ".join(sorted(headers.get("Allow", "").split(", ")))
        message = f"{path:.200} does not take {method:.20}; it takes {taken}"
        return error_answer(ApiError(405, message, code="method_not_allowed", headers=headers))
    return error_answer(ApiError(error.status_code, str(error.detail), headers=headers))
