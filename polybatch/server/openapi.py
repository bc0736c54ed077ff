"""The OpenAPI document, exact enough to be tested against: bodies and answers from the types in `interface`,
every status that a route may answer with, and which key it needs.

FastAPI collects the routes; what it would guess of them wrongly is replaced here.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from polybatch.jobs.schema import FIXED_FIELDS, LABELS
from polybatch.server.batches.objects import CreateBatch
from polybatch.server.interface import answers, requests

REF = "#/components/schemas/"
ABOUT = (
    "OpenAI's interface for one base model, its adapters and many tenants. Every answer has the header "
    "`X-Request-Id`; a request may choose it by the same header. Whatever the route, headers over 64 KiB are "
    "answered with 431, slow ones with 408, and connections beyond the limit with 503."
)
TAGS = {
    "generation": "Text from prompts and conversations.",
    "batches": "Files of requests, answered by a deadline. Only with `--data-dir`.",
    "models": "What is served.",
    "adapters": "For administrators.",
    "tokens": "Text to token ids and back.",
    "health": "For load balancers.",
    "operations": "For operators.",
}
STATUSES = {
    400: "The request is malformed or a field is wrong, which `param` names.",
    401: "The key is missing or wrong.",
    403: "Not with this key, or not under this host name.",
    404: "There is no such thing; `code` says which.",
    408: "The body took too long to arrive.",
    409: "The batch is over, or nearly so.",
    413: "The body or the file is too large, or the files are too many.",
    429: "Too much at once, of this tenant or in all.",
    500: "The engine or the server failed this request; others are not affected.",
    503: "The engine is being restarted, or the server shuts down.",
    507: "The disk is full.",
}
WITH_RETRY_AFTER = (429, 503)
BODY_ERRORS = (400, 408, 413, 429)
OPEN_PATH, BROWSER_PATH = "/health", "/dashboard"

_BODIES = (
    requests.ChatCompletionRequest, requests.CompletionRequest, requests.TokenizeRequest,
    requests.DetokenizeRequest, requests.LoadAdapterRequest, requests.UnloadAdapterRequest, CreateBatch,
)  # fmt: skip
_ANSWERS = (
    answers.Error, answers.ChatCompletion, answers.Completion, answers.ModelList, answers.Tokens,
    answers.Text, answers.FileList, answers.DeletedFile, answers.BatchList, answers.Health, answers.Readiness,
    answers.Version,
)  # fmt: skip
_GENERATIONS = ("ChatCompletionRequest", "CompletionRequest")

_TEXT = {"schema": {"type": "string"}}
EVENTS = {"text/event-stream": _TEXT}
PLAIN_TEXT = {"text/plain": _TEXT}


def describe(
    answer: type[msgspec.Struct] | None = None,
    *errors: int,
    body: type[msgspec.Struct] | None = None,
    parameters: list[dict[str, Any]] | None = None,
    also: dict[str, Any] | None = None,
    form: dict[str, Any] | None = None,
    headers: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Keyword arguments for the decorator of a route.

    answer: of status 200, as JSON. errors: statuses besides 401 and 403, and besides what reading a body may
    end with. also: other media types of status 200. form: schema of a form that is uploaded. headers: that an
    answer of status 200 may have.
    """
    content = {"application/json": {"schema": _ref(answer)}} if answer is not None else {}
    responses: dict[int, dict[str, Any]] = {
        200: {
            "description": "Success.",
            "content": content | (also or {}),
            "headers": _headers(200) | (headers or {}),
        }
    }
    reading = BODY_ERRORS if body is not None or form is not None else ()
    for status in sorted({*errors, *reading, 403}):
        responses[status] = _failure(status)
    extra: dict[str, Any] = {}
    if body is not None:
        extra["requestBody"] = _request_body("application/json", _ref(body))
    if form is not None:
        extra["requestBody"] = _request_body("multipart/form-data", form)
    if parameters is not None:
        extra["parameters"] = parameters
    return {"responses": responses, "openapi_extra": extra}


def also_as(kind: type[msgspec.Struct], description: str) -> dict[str, Any]:
    """A failure with a body of its own."""
    content = {"application/json": {"schema": _ref(kind)}}
    return {"description": description, "content": content, "headers": _headers(503)}


def parameter(name: str, description: str, schema: dict[str, Any], where: str = "query") -> dict[str, Any]:
    """An optional one. where: "query" or "header"."""
    return {"name": name, "in": where, "description": description, "schema": schema}


class DocumentedAPI(FastAPI):
    """A FastAPI whose document is made here. has_keys: whether calls need one."""

    def __init__(self, *, has_keys: bool, **settings: Any) -> None:
        super().__init__(**settings, generate_unique_id_function=lambda route: route.name)
        self._has_keys = has_keys

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            tags = [{"name": name, "description": text} for name, text in TAGS.items()]
            document = get_openapi(
                title=self.title, version=self.version, description=ABOUT, routes=self.routes, tags=tags
            )
            self.openapi_schema = _completed(document, self._has_keys)
        return self.openapi_schema


def _completed(document: dict[str, Any], has_keys: bool) -> dict[str, Any]:
    bearer = {"type": "http", "scheme": "bearer", "description": "An API key, where the server has any."}
    basic = {"type": "http", "scheme": "basic", "description": "For browsers: any user, the key as password."}
    document["components"] = {
        "schemas": _schemas(),
        "securitySchemes": {"key": bearer, "password": basic},
    }
    free: list[dict[str, list[str]]] = [] if has_keys else [{}]
    document["security"] = [{"key": []}, *free]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            # FastAPI assumes its own validation, of which there is none.
            operation["responses"].pop("422", None)
            if path == OPEN_PATH:
                operation["security"] = []
                continue
            operation["responses"]["401"] = _failure(401)
            if path.startswith(BROWSER_PATH):
                operation["security"] = [{"key": []}, {"password": []}, *free]
    return document


def _schemas() -> dict[str, Any]:
    _, schemas = msgspec.json.schema_components((*_BODIES, *_ANSWERS), ref_template=REF + "{name}")
    for name in _GENERATIONS:
        known = schemas[name]["properties"]
        for label in LABELS:
            known.setdefault(label, {"description": "A label or a hint; changes nothing."})
        for field, values in FIXED_FIELDS.items():
            only = " or ".join(msgspec.json.encode(value).decode() for value in values)
            known.setdefault(field, {"enum": [*values, None], "description": f"Only {only} is supported."})
    return schemas


def _ref(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": REF + kind.__name__}


def _request_body(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {media_type: {"schema": schema}}}


def _failure(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(answers.Error)}}
    return {"description": STATUSES[status], "content": content, "headers": _headers(status)}


def _headers(status: int) -> dict[str, Any]:
    headers = {"X-Request-Id": {"schema": {"type": "string"}, "required": True}}
    if status in WITH_RETRY_AFTER:
        headers["Retry-After"] = {
            "schema": {"type": "integer", "minimum": 1}, "required": True,
            "description": "Seconds after which to try again.",
        }  # fmt: skip
    return headers
