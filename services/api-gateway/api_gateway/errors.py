"""One table from the causes of refusals to HTTP statuses, and the problem documents that carry them (RFC 9457).

Services raise named errors and know no HTTP; nothing but this module decides what a caller sees of them.
"""

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from medhive.errors import MedHiveError
from medhive.version import PROBLEM_HEADER
from medhive.wire import Problem

TYPE_PREFIX = "urn:medhive:error:"
INTERNAL = "internal-error"
MEDIA_TYPE = "application/problem+json"
MAX_NAMED_FIELDS = 20  # of a body that is wrong in very many places

log = structlog.get_logger(__name__)


STATUS: Mapping[str, HTTPStatus] = MappingProxyType(
    {
        "error": HTTPStatus.BAD_REQUEST,
        "invalid-input": HTTPStatus.UNPROCESSABLE_ENTITY,
        "not-found": HTTPStatus.NOT_FOUND,
        "not-allowed": HTTPStatus.FORBIDDEN,
        "not-authenticated": HTTPStatus.UNAUTHORIZED,
        "conflict": HTTPStatus.CONFLICT,
        "illegal-transition": HTTPStatus.CONFLICT,
        "bad-signature": HTTPStatus.FORBIDDEN,
        "expired": HTTPStatus.GONE,
        "clock-skew": HTTPStatus.BAD_REQUEST,
        "incompatible-version": HTTPStatus.UPGRADE_REQUIRED,
        "too-large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "digest-mismatch": HTTPStatus.UNPROCESSABLE_ENTITY,
        "sealed-only": HTTPStatus.FORBIDDEN,
        "seal-broken": HTTPStatus.BAD_REQUEST,
        "unreachable": HTTPStatus.BAD_GATEWAY,
        "no-space": HTTPStatus.INSUFFICIENT_STORAGE,
        "too-slow": HTTPStatus.REQUEST_TIMEOUT,
        "too-many-attempts": HTTPStatus.TOO_MANY_REQUESTS,
        "unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
        # What the core's own modules raise about weights and strategies that were sent here.
        "corrupt-weights": HTTPStatus.UNPROCESSABLE_ENTITY,
        "wrong-layout": HTTPStatus.UNPROCESSABLE_ENTITY,
        "not-finite": HTTPStatus.UNPROCESSABLE_ENTITY,
        "norm-too-large": HTTPStatus.UNPROCESSABLE_ENTITY,
    }
)

HEADERS: Mapping[int, Mapping[str, str]] = MappingProxyType(
    {
        HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": "Bearer"},
        HTTPStatus.REQUEST_TIMEOUT: {"Connection": "close"},  # nobody waits for the rest of the body
    }
)
"""What HTTP wants to be said with a status."""

ROUTE_ERRORS: Mapping[int, str] = MappingProxyType(
    {
        HTTPStatus.NOT_FOUND: "not-found",
        HTTPStatus.METHOD_NOT_ALLOWED: "method-not-allowed",
        HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE: "range-not-satisfiable",
    }
)
"""What the router itself refuses, which has no error class."""


def known_code(kind: type[MedHiveError]) -> str:
    """The code that callers know an error by: its own, or that of the nearest cause that it is a kind of."""
    codes = (getattr(each, "code", "") for each in kind.__mro__)
    return next(code for code in codes if code in STATUS)


def problem(code: str, status: int, detail: str, data: Mapping[str, Any] | None = None) -> JSONResponse:
    """The problem document as an answer."""
    title = HTTPStatus(status).phrase
    body = Problem(type=TYPE_PREFIX + code, title=title, status=status, detail=detail, data=dict(data or {}))
    headers = dict(HEADERS.get(status, {}))
    return JSONResponse(body.model_dump(mode="json"), status_code=status, media_type=MEDIA_TYPE, headers=headers)


def problem_of(error: MedHiveError) -> JSONResponse:
    """The problem document of a refusal."""
    code = known_code(type(error))
    data = error.data if code == error.code else {"cause": error.code, **error.data}
    answer = problem(code, STATUS[code], str(error), data)
    answer.headers[PROBLEM_HEADER] = code
    return answer


def install(app: FastAPI) -> None:
    """Make every error of this application a problem document."""
    app.add_exception_handler(MedHiveError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _unrouted)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unexpected)


async def _refused(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MedHiveError)  # noqa: S101  (it is registered for nothing else)
    return problem_of(error)


async def _invalid(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    # Only where and what: the input itself is not sent back, it may hold a password.
    parts = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
    shown = "; ".join(parts[:MAX_NAMED_FIELDS])
    return problem("invalid-input", HTTPStatus.UNPROCESSABLE_ENTITY, f"The request does not fit: {shown}.")


async def _unrouted(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101
    if isinstance(error.__cause__, MedHiveError):  # the framework wraps what reading a body raises
        return problem_of(error.__cause__)
    code = ROUTE_ERRORS.get(error.status_code, "error")
    answer = problem(code, error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
    answer.headers.update(error.headers or {})
    return answer


async def _gone(request: Request, _error: Exception) -> JSONResponse:
    log.info("http.caller-gone", method=request.method, path=request.url.path)
    return problem("error", HTTPStatus.BAD_REQUEST, "The caller went away before its body had arrived.")


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("http.failed", method=request.method, path=request.url.path, exc_info=error)
    return problem(
        INTERNAL,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "The gateway failed at this; its log names the cause.",
    )
