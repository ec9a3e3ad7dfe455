"""The routes of the server, in OpenAI's shapes: what is asked becomes a job, its pieces become the answer."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from typing_extensions import TypedDict

import foreword
from foreword.engine import Request as EngineRequest
from foreword.engine import Sampling
from foreword.server.admin import admin_routes
from foreword.server.answers import ClientLeft, answer
from foreword.server.completions import Job
from foreword.server.errors import add_handlers, bad_request, unavailable
from foreword.server.formats import ChatAnswer, ChatFormat, CompletionAnswer, CompletionFormat, ErrorAnswer, Head
from foreword.server.guard import Guard
from foreword.server.schemas import (
    KNOWN_FIELDS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    TokenizeRequest,
)
from foreword.server.service import Model, Service

__all__ = ["create_app"]

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "The request cannot be served as it is.",
        401: "The key is missing or not valid.",
        404: "There is no such model.",
        408: "The body did not come in time.",
        413: "The body is too large.",
        429: "Too much is asked at once; see Retry-After.",
        500: "The server had an error.",
        503: "The server takes no requests; see Retry-After.",
        504: "The request took too long.",
    }.items()
}
# With `stream`: chunks of the same shape, each behind `data: `, the last is `[DONE]`.
_STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}


class ModelCard(TypedDict):
    """One model that a key may use."""

    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(TypedDict):
    """All models that a key may use."""

    object: str
    data: list[ModelCard]


class Tokens(TypedDict):
    """Token ids of a text."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(TypedDict):
    """The text of token ids."""

    prompt: str


class State(TypedDict):
    """How the server is."""

    status: str


class Version(TypedDict):
    """Which Foreword this is."""

    version: str


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service. It begins to serve when its lifespan does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield

    app = FastAPI(
        title="Foreword", version=foreword.__version__, lifespan=lifespan, redirect_slashes=False, docs_url=None,
        redoc_url=None,
    )  # fmt: skip
    key = Depends(HTTPBearer(auto_error=False))  # for the OpenAPI document; the guard has checked it before
    app.include_router(_model_routes(service), dependencies=[key], responses=_ERRORS)
    app.include_router(_text_routes(service), dependencies=[key], responses=_ERRORS)
    app.include_router(admin_routes(service), dependencies=[key], responses=_ERRORS)
    app.include_router(_state_routes(service))
    add_handlers(app, KNOWN_FIELDS)

    @app.exception_handler(ClientLeft)
    async def on_left(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    app.add_middleware(Guard, service=service)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the answer that FastAPI would give where this server answers 400."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema


def _state_routes(service: Service) -> APIRouter:
    router = APIRouter()
    unwell: dict[int | str, dict[str, Any]] = {503: _ERRORS[503]}

    @router.get("/health", response_model=State, responses=unwell)
    async def health() -> JSONResponse:
        """Whether the process and its engine live."""
        if not service.runner.alive:
            raise unavailable("The engine has stopped.", "engine_stopped")
        return JSONResponse({"status": "ok"})

    @router.get("/ready", response_model=State, responses=unwell)
    async def ready() -> JSONResponse:
        """Whether requests are taken."""
        if service.draining or not service.runner.alive:
            raise unavailable("The server is stopping.", "stopping")
        return JSONResponse({"status": "ready"})

    @router.get("/version", response_model=Version)
    async def version() -> JSONResponse:
        """Which Foreword this is."""
        return JSONResponse({"version": foreword.__version__})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """What Prometheus reads."""
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _model_routes(service: Service) -> APIRouter:
    router = APIRouter()

    def card(model: Model) -> ModelCard:
        created = 0 if model.prefix is None else int(model.prefix.created_seconds)
        parent = None if model.prefix is None else service.name
        return {
            "id": model.id, "object": "model", "created": created, "owned_by": "foreword", "root": service.name,
            "parent": parent, "max_model_len": service.room(model),
        }  # fmt: skip

    @router.get("/v1/models", response_model=ModelList)
    async def models(request: Request) -> JSONResponse:
        """The base model and the prefixes that the key may use."""
        found = await asyncio.to_thread(service.models, request.state.caller)  # there may be many thousands
        return JSONResponse({"object": "list", "data": [card(model) for model in found]})

    @router.get("/v1/models/{model:path}", response_model=ModelCard)
    async def model(model: str, request: Request) -> JSONResponse:
        """One model."""
        return JSONResponse(card(service.resolve(model, request.state.caller)))

    return router


def _text_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", response_model=CompletionAnswer, responses={200: _STREAM})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a text, or several."""
        model = service.resolve(body.model, request.state.caller)
        if body.best_of not in (None, 1, body.n):
            raise bad_request("`best_of` is not supported.", "best_of")
        if body.echo and body.logprobs is not None:
            raise bad_request("`echo` with `logprobs` is not supported: prompts are not scored.", "echo")
        prompts = await _prompts(service, body)
        job = _job(service, request, body, model, prompts, body.max_tokens or 16, body.logprobs, "prompt")
        usage = _wants_usage(body)
        echoes = [text for text in _texts(service, body) for _ in range(body.n or 1)] if body.echo else []
        head = _head(service, model, "cmpl")
        form = CompletionFormat(service.codec, head, body.logprobs is not None, usage, echoes)
        return await answer(service, request, job, form, stream=bool(body.stream), include_usage=usage)

    @router.post("/v1/chat/completions", response_model=ChatAnswer, responses={200: _STREAM})
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer in a conversation."""
        model = service.resolve(body.model, request.state.caller)
        if body.top_logprobs is not None and not body.logprobs:
            raise bad_request("`top_logprobs` needs `logprobs`.", "top_logprobs")
        ids = await service.encode_chat(_conversation(body.messages))
        left = service.room(model) - len(ids)
        asked = body.max_completion_tokens or body.max_tokens or max(left, 1)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        job = _job(service, request, body, model, [ids], asked, logprobs, "messages")
        usage = _wants_usage(body)
        form = ChatFormat(service.codec, _head(service, model, "chatcmpl"), bool(body.logprobs), usage)
        return await answer(service, request, job, form, stream=bool(body.stream), include_usage=usage)

    @router.post("/tokenize", response_model=Tokens)
    async def tokenize(body: TokenizeRequest, request: Request) -> JSONResponse:
        """Token ids of a text or of a conversation."""
        model = service.resolve(body.model or service.name, request.state.caller)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("Give one of `prompt` and `messages`.", "prompt")
        if body.messages is not None:
            ids = await service.encode_chat(_conversation(body.messages))
        else:
            (ids,) = await service.encode([body.prompt or ""], body.add_special_tokens)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.room(model)})

    @router.post("/detokenize", response_model=Text)
    async def detokenize(body: DetokenizeRequest, request: Request) -> JSONResponse:
        """The text of token ids, special ones included."""
        service.resolve(body.model or service.name, request.state.caller)
        _check_ids(service, [body.tokens], "tokens")
        return JSONResponse({"prompt": await service.decode(body.tokens)})

    return router


def _head(service: Service, model: Model, kind: str) -> Head:
    """What every object of an answer begins with; the fingerprint changes with the model and the prefix's version."""
    content = "" if model.prefix is None else f"-{model.prefix.object_id[:12]}"
    return {
        "id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model.id,
        "system_fingerprint": f"fw-{service.fingerprint[:12]}{content}",
    }  # fmt: skip


def _job(
    service: Service,
    request: Request,
    body: CompletionRequest | ChatRequest,
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    logprobs: int | None,
    param: str,
) -> Job:
    """The requests to the engine. Raises `ApiError` 400 for what does not fit."""
    choices, caller = body.n or 1, request.state.caller
    _check_size(service, model, prompts, choices, max_tokens, param)
    sampling = [_sampling(service, body, logprobs, choice) for choice in range(choices)]
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    requests = [
        EngineRequest(
            tuple(ids), max_tokens, prefix=None if model.prefix is None else model.prefix.object_id,
            tenant=caller.tenant.name, sampling=each,
            stop_tokens=frozenset() if body.ignore_eos else service.end_tokens,
        )
        for ids in prompts for each in sampling
    ]  # fmt: skip
    return Job(requests, stop, sum(map(len, prompts)), model.id)


def _check_size(
    service: Service, model: Model, prompts: Sequence[Sequence[int]], choices: int, max_tokens: int, param: str
) -> None:
    sequences, most = len(prompts) * choices, service.options.max_sequences
    if sequences > most:
        raise bad_request(f"{sequences} sequences in one request; at most {most} are allowed.", "n")
    room = service.room(model)
    for ids in prompts:
        if not ids:
            raise bad_request("The prompt is empty; send at least one token.", param)
        if len(ids) + max_tokens > room:
            raise bad_request(
                f"This model takes {room} tokens: the prompt has {len(ids)}, and {max_tokens} are asked for. "
                "Shorten the prompt or ask for fewer.",
                param, "context_length_exceeded",
            )  # fmt: skip


def _sampling(service: Service, body: CompletionRequest | ChatRequest, logprobs: int | None, choice: int) -> Sampling:
    """How the tokens of one choice are chosen; choices differ in their seeds."""
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    _check_ids(service, [list(bias)], "logit_bias")
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    return Sampling(
        temperature=0.0 if top_p == 0 else temperature,  # no mass at all leaves the likeliest
        top_p=top_p or 1.0,
        top_k=body.top_k or 0,
        seed=None if body.seed is None else (body.seed + choice) % (1 << 63),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=bias,
        logprobs=logprobs,
    )


async def _prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    """The prompts of a completion as token ids."""
    given: Any = body.prompt
    if isinstance(given, str):
        return await service.encode([given])
    if isinstance(given[0], str):
        return await service.encode(given)
    ids: list[list[int]] = [given] if isinstance(given[0], int) else given
    _check_ids(service, ids, "prompt")
    return ids


def _texts(service: Service, body: CompletionRequest) -> list[str]:
    """The prompts of a completion as text."""
    given: Any = body.prompt
    if isinstance(given, str) or isinstance(given[0], str):
        return [given] if isinstance(given, str) else given
    return [service.codec.decode(ids) for ids in ([given] if isinstance(given[0], int) else given)]


def _check_ids(service: Service, rows: Sequence[Sequence[int]], param: str) -> None:
    size = service.codec.vocabulary_size
    largest = max((max(row, default=0) for row in rows), default=0)
    if largest >= size:
        raise bad_request(f"Token id {largest} is not in the vocabulary of {size}.", param)


def _conversation(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as chat templates know them."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        for message in messages
    ]


def _wants_usage(body: CompletionRequest | ChatRequest) -> bool:
    if body.stream_options is not None and not body.stream:
        raise bad_request("`stream_options` needs `stream`.", "stream_options")
    return bool(body.stream_options and body.stream_options.include_usage)
