"""Routes: HTTP requests to endpoints, and every failure to OpenAI's JSON form of an error."""

import hmac
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fireopd_jax.config import UserError
from fireopd_jax.serving.completions import chat, complete
from fireopd_jax.serving.errors import ApiError, bad_field
from fireopd_jax.serving.fields import (
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    TokenizeFields,
    parse,
)
from fireopd_jax.serving.service import Gone, Service

Fields = TypeVar("Fields")
LARGEST_BODY = 64 * 2**20
"""Bytes of the largest request."""


def make_app(service: Service) -> Starlette:
    """Return the application that answers for a model."""
    return Starlette(
        routes=[
            Route("/health", lambda request: Response(status_code=200)),
            Route("/v1/models", guarded(service, lambda request: models(service))),
            posted(service, "/v1/completions", CompletionFields, complete),
            posted(service, "/v1/chat/completions", ChatFields, chat),
            posted(service, "/tokenize", TokenizeFields, tokenize),
            posted(service, "/detokenize", DetokenizeFields, detokenize),
        ],
        exception_handlers={HTTPException: unknown_route},
    )


def posted(
    service: Service,
    path: str,
    fields: type[Fields],
    answer: Callable[[Service, Fields, Gone], Awaitable[dict[str, Any]]],
) -> Route:
    """Return the route of an endpoint whose requests have these fields."""

    async def handle(request: Request) -> dict[str, Any]:
        body = await read(request)
        return await answer(service, parse(fields, body), request.is_disconnected)

    return Route(path, guarded(service, handle), methods=["POST"])


def guarded(
    service: Service, handle: Callable[[Request], Awaitable[dict[str, Any]]]
) -> Callable[[Request], Awaitable[Response]]:
    """Return a handler that checks the key, and turns every failure into an answer."""

    async def answer(request: Request) -> Response:
        try:
            check_key(service, request)
            return JSONResponse(await handle(request))
        except ApiError as error:
            return failure(error)
        except UserError as error:
            return failure(ApiError(400, str(error)))
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            return failure(ApiError(500, f"{type(error).__name__}: {error}"))

    return answer


def failure(error: ApiError) -> JSONResponse:
    """Return the answer of an error."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def unknown_route(request: Request, error: Exception) -> Response:
    """Answer a path or method that does not exist."""
    status = getattr(error, "status_code", 500)
    return failure(ApiError(status, f"{request.method} {request.url.path}: {error}"))


def check_key(service: Service, request: Request) -> None:
    """Raise ApiError unless the request has the server's key."""
    if service.key is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind != "Bearer" or not hmac.compare_digest(given.encode(), service.key.encode()):
        raise ApiError(401, "the API key is wrong or missing", code="invalid_api_key")


async def read(request: Request) -> bytes:
    """Return the body of a request; raise ApiError for one over the limit."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise ApiError(413, f"the body has over {LARGEST_BODY // 2**20} MiB")
    return bytes(body)


async def models(service: Service) -> dict[str, Any]:
    """Answer `GET /v1/models`."""
    card = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "fireopd",
        "max_model_len": service.context,
    }
    return {"object": "list", "data": [card]}


async def tokenize(service: Service, fields: TokenizeFields, gone: Gone) -> dict[str, Any]:
    """Answer `POST /tokenize`."""
    service.check_model(fields.model)
    if (fields.prompt is None) == (fields.messages is None):
        raise bad_field("prompt", "expected either prompt or messages")
    if fields.prompt is None:
        ids = service.conversation(fields)
    else:
        ids = service.text_ids(fields.prompt, fields.add_special_tokens)
    texts = [service.token_text(each) for each in ids] if fields.return_token_strs else None
    return {
        "count": len(ids),
        "max_model_len": service.context,
        "tokens": list(ids),
        "token_strs": texts,
    }


async def detokenize(service: Service, fields: DetokenizeFields, gone: Gone) -> dict[str, Any]:
    """Answer `POST /detokenize`."""
    service.check_model(fields.model)
    ids = service.known("tokens", fields.tokens)
    return {"prompt": service.decoded(ids, skip_special=False)}
