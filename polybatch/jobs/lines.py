"""The lines of a batch file: read with bounded memory, taken apart, and written.

Input:  {"custom_id", "method": "POST", "url", "body"} per line; blank lines are skipped.
Output: {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error"} per line.
The `id` is "batch_req_" and the number of the input line, so an output file tells by itself which
lines it answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec

from polybatch.errors import RequestError
from polybatch.jobs.schema import Call, Endpoint, parse_call

MAX_LINE_BYTES = 64 << 20
ID_PREFIX = "batch_req_"

_envelope_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_KEYS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class Line:
    """One non-blank line. number: from 1, blank lines counted. data: None if it was too long."""

    number: int
    data: bytes | None


def read_lines(stream: BinaryIO, max_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Yield the non-blank lines of a stream; never holds more than one line of max_bytes."""
    number = 0
    while data := stream.readline(max_bytes + 1):
        number += 1
        if len(data) > max_bytes and not data.endswith(b"\n"):
            while data and not data.endswith(b"\n"):
                data = stream.readline(max_bytes)
            yield Line(number, None)
            continue
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if data.strip():
            yield Line(number, data)


def custom_id_of(line: Line) -> str | None:
    """The line's custom_id, or None where it has no usable one. Never raises."""
    try:
        return _custom_id(_envelope(line))
    except RequestError:
        return None


def parse_line(line: Line) -> Call:
    """Check a whole line. Raises RequestError that names the line's field, value and way out."""
    return parse_call(*parse_envelope(line))


def parse_envelope(line: Line) -> tuple[Endpoint, Any]:
    """Where a line goes and its body, decoded but unchecked. Raises RequestError as `parse_line` does."""
    fields = _envelope(line)
    _custom_id(fields)
    for name in fields:
        if name not in _KEYS:
            raise RequestError(f"unknown field {name!r}: a line has {', '.join(_KEYS)}", field=name)
    method = _decode(fields, "method")
    if method != "POST":
        raise RequestError(f"method is {method!r}; it must be 'POST'", field="method")
    url = _decode(fields, "url")
    endpoint = next((endpoint for endpoint in Endpoint if endpoint.value == url), None)
    if endpoint is None:
        known = " or ".join(endpoint.value for endpoint in Endpoint)
        raise RequestError(f"url is {url!r}; it must be {known}", field="url")
    return endpoint, _decode(fields, "body")


def _envelope(line: Line) -> dict[str, msgspec.Raw]:
    if line.data is None:
        raise RequestError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB: split the request")
    try:
        return _envelope_decoder.decode(line.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"not a JSON object: {error}") from error


def _decode(fields: dict[str, msgspec.Raw], name: str) -> Any:
    if name not in fields:
        raise RequestError(f"{name} is missing: a line has {', '.join(_KEYS)}", field=name)
    try:
        return msgspec.json.decode(fields[name])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"{name} is not valid JSON: {error}", field=name) from error


def _custom_id(fields: dict[str, msgspec.Raw]) -> str:
    value = _decode(fields, "custom_id")
    if not isinstance(value, str) or not value:
        raise RequestError(f"custom_id is {value!r}; it must be a non-empty string", field="custom_id")
    return value


def encode_output(
    number: int, custom_id: str | None, status: int, body: dict[str, Any], error: dict[str, Any] | None
) -> bytes:
    """One output line, newline included. status: HTTP status code; error: null beside a result."""
    line = {
        "id": f"{ID_PREFIX}{number}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{number}", "body": body},
        "error": error,
    }
    return msgspec.json.encode(line) + b"\n"


class _OutputBody(msgspec.Struct):
    system_fingerprint: str | None = None


class _OutputResponse(msgspec.Struct):
    status_code: int
    body: _OutputBody


class _OutputLine(msgspec.Struct):
    id: str
    custom_id: str | None
    response: _OutputResponse


@dataclass(frozen=True, slots=True)
class OutputRecord:
    """What a finished output line says about itself."""

    number: int
    custom_id: str | None
    is_error: bool
    fingerprint: str | None


_output_decoder = msgspec.json.Decoder(_OutputLine)


def decode_output(data: bytes) -> OutputRecord | None:
    """Read back a line of `encode_output`; None if it is none."""
    try:
        line = _output_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    digits = line.id.removeprefix(ID_PREFIX)
    if digits == line.id or not (digits.isascii() and digits.isdigit()):
        return None
    response = line.response
    return OutputRecord(
        int(digits), line.custom_id, response.status_code != 200, response.body.system_fingerprint
    )
