"""The HTTP face: routes, and nothing that another face would need too."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Literal, TypedDict

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from nvila.errors import NotFound, NvilaError
from nvila.gateway import http_console, http_estimate, http_files, http_jobs, http_recordings, http_uploads, schema
from nvila.gateway.auth import ApiKeys
from nvila.gateway.chat import ChatResponse
from nvila.gateway.front import Front
from nvila.gateway.http_docs import add_docs
from nvila.gateway.http_errors import error_object, json_response, note_failure, to_response
from nvila.gateway.http_services import Having, HttpSettings, Services, Tenant
from nvila.gateway.middleware import BodyBounded, KeyNeeded, Named
from nvila.gateway.parse import read_json
from nvila.gateway.replies import ChatCompletion
from nvila.model.config import NvilaConfig
from nvila.telemetry.metrics import CONTENT_TYPE
from nvila.types import ModelCard

_FORM_BYTES = 64 << 10
"""What a multipart form may have besides its file."""


class State(TypedDict):
    services: Services


OpenServices = Callable[[], AbstractAsyncContextManager[Services]]


def create_app(keys: ApiKeys, settings: HttpSettings, open_services: OpenServices) -> FastAPI:
    """`open_services`: opened when the server starts, closed when it has drained."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        async with open_services() as services:
            yield State(services=services)

    def limit_bytes(path: str) -> int:
        if path == http_files.PATH:
            return settings.upload_bytes + _FORM_BYTES
        if path.startswith(f"{http_recordings.PATH}/") and path.endswith(http_recordings.FRAMES):
            return settings.push_bytes
        return settings.upload_bytes if path.startswith(f"{http_uploads.PATH}/") else settings.body_bytes

    app = FastAPI(
        title="nvila",
        description="Ask about images and videos, as OpenAI's chat API has it.",
        lifespan=lifespan,
        docs_url=None,
        openapi_url="/openapi.json" if settings.docs else None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(Named),
            Middleware(BodyBounded, limit_bytes=limit_bytes),
            Middleware(KeyNeeded, keys=keys),
        ],
        exception_handlers={NvilaError: _failed, HTTPException: _no_route, RequestValidationError: _bad_query},
    )
    app.router.route_class = _Route
    _add_chat(app, settings)
    http_files.add_files(app, settings)
    http_uploads.add_uploads(app)
    http_recordings.add_recordings(app)
    http_jobs.add_jobs(app, settings)
    _add_health(app)
    if settings.console:
        http_console.add_console(app)
    if settings.docs:
        add_docs(app)
    app.openapi_schema = _document(app)
    return app


class _Request(Request):
    async def json(self) -> Any:
        return read_json(await self.body())


class _Route(APIRoute):
    """Reads every JSON body as a chat request's is read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return handle_strictly


def _ref(model: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model}"}


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI does not see the chat request, which `parse.py` reads after its own checks."""
    document = app.openapi()
    asked = schema.ChatRequest.model_json_schema(ref_template=_ref("{model}")["$ref"])
    models = document["components"]["schemas"]
    models.update(asked.pop("$defs"), ChatRequest=asked)
    key = {"type": "http", "scheme": "bearer", "description": "An API key."}
    document["components"]["securitySchemes"] = {"key": key}
    document["security"] = [{"key": []}]
    return document


# -- chat and models


class Limits(BaseModel):
    """What one request may ask of the model."""

    max_frames: int
    max_media: int
    max_answer_tokens: int
    default_answer_tokens: int
    default_frames: int


class Model(BaseModel):
    """`is_random`: the weights are random and its words mean nothing."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nvila"
    max_model_len: int
    is_random: bool
    engine: str
    nvila: Limits


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


def _add_chat(app: FastAPI, settings: HttpSettings) -> None:
    started_at = int(time.time())

    def model(card: ModelCard, front: Front) -> Model:
        config, limits = NvilaConfig.from_json(card.config_json), front.limits
        return Model(
            id=card.name,
            created=started_at,
            max_model_len=card.max_model_len,
            is_random=card.is_random,
            engine=card.engine,
            nvila=Limits(
                max_frames=min(limits.frames, config.max_frames),
                max_media=limits.media,
                max_answer_tokens=limits.answer_tokens,
                default_answer_tokens=limits.default_answer_tokens,
                default_frames=config.default_frames,
            ),
        )

    body = {"required": True, "content": {"application/json": {"schema": _ref("ChatRequest")}}}

    @app.post(
        "/v1/chat/completions",
        tags=["chat"],
        openapi_extra={"requestBody": body},
        responses={200: {"model": ChatCompletion, "description": "An answer; server-sent events with `stream`."}},
    )
    async def chat(services: Having, tenant: Tenant) -> Response:
        """Ask about any number of images and videos."""
        return ChatResponse(services.front, tenant, body_s=settings.body_s, heartbeat_s=settings.heartbeat_s)

    http_estimate.add_estimate(app, settings, body)

    @app.get("/v1/models", tags=["models"])
    async def models(services: Having) -> ModelList:
        """The models that are served."""
        return ModelList(data=[model(await services.front.card(), services.front)])

    @app.get("/v1/models/{model_id:path}", tags=["models"])
    async def one_model(model_id: str, services: Having) -> Model:
        """One model."""
        card = await services.front.card()
        if model_id != card.name:
            raise NotFound(f"there is no model {model_id[:64]!r}; served is {card.name!r}", param="model")
        return model(card, services.front)


# -- health and metrics


def _add_health(app: FastAPI) -> None:
    async def live() -> dict[str, str]:
        """The event loop turns."""
        return {"status": "live"}

    async def ready(services: Having) -> Response:
        """The gateway can answer; else why not, with status 503."""
        reasons = list(services.health.reasons())
        return json_response(
            503 if reasons else 200, {"status": "not ready" if reasons else "ready", "reasons": reasons}
        )

    for path in ("/health", "/health/live", "/v1/health/live"):
        app.add_api_route(path, live, tags=["health"], operation_id=path.strip("/").replace("/", "_"))
    for path in ("/health/ready", "/v1/health/ready"):
        app.add_api_route(path, ready, tags=["health"], operation_id=path.strip("/").replace("/", "_"))

    @app.get("/metrics", tags=["health"])
    async def metrics(services: Having) -> Response:
        """For Prometheus."""
        return Response(services.metrics.render(), media_type=CONTENT_TYPE)


# -- errors


async def _failed(_: Request, error: Exception) -> Response:
    assert isinstance(error, NvilaError)
    note_failure(error)
    return to_response(error)


async def _no_route(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, NvilaError):  # raised while FastAPI read a body, which takes all errors for its own
        return await _failed(_, error.__cause__)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    content = error_object(error.status_code, message=f"{error.detail}", code=code)
    return json_response(error.status_code, content, dict(error.headers or {}))


async def _bad_query(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()[0]
    param = schema.field_path(tuple(found["loc"][1:]))
    content = error_object(422, message=f"{param}: {found['msg']}", code="invalid_request", param=param)
    return json_response(422, content)
