"""An upload as multipart/form-data, written to disk piece by piece; only its small fields are held.

Source: RFC 7578; the field of the file is called `file`, as in OpenAI's interface.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from polybatch.errors import RequestError
from polybatch.server.errors import ClientGoneError, HttpError

FILE_FIELD = "file"
MAX_FIELDS = 16
MAX_FIELD_BYTES = 4_096
MAX_PART_HEADER_BYTES = 8_192
WRITE_BYTES = 1 << 20


class Upload:
    """What a form held. filename: of the file, its folders left out."""

    def __init__(self, max_bytes: int) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.size = 0
        self.is_whole = False
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []
        self._num_pending = 0
        self._name, self._is_file, self._num_parts = "", False, 0
        self._value = bytearray()
        self._header, self._header_value = bytearray(), bytearray()
        self._disposition = b""

    def callbacks(self) -> dict[str, Callable[..., None]]:
        """For `MultipartParser`."""
        return {
            "on_part_begin": self._on_part_begin,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_end": self._on_end,
        }

    def take(self, at_least: int) -> bytes:
        """Content that is not written yet, if it is so much."""
        if self._num_pending < at_least:
            return b""
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._num_pending = 0
        return data

    def _on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_FIELDS:
            raise RequestError(f"the form has more than {MAX_FIELDS} fields", field="body")
        self._name, self._is_file, self._disposition = "", False, b""
        self._value.clear()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._check_header()

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        if len(self._header) + len(self._header_value) > MAX_PART_HEADER_BYTES:
            raise RequestError(
                f"a header of the form has more than {MAX_PART_HEADER_BYTES:,} bytes", field="body"
            )

    def _on_header_end(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise RequestError("a part of the form has no name in its Content-Disposition", field="body")
        self._name = options[b"name"].decode("utf-8", "replace")
        self._is_file = self._name == FILE_FIELD
        if self._is_file:
            if self.filename is not None:
                raise RequestError("the form has two files: upload one at a time", field=FILE_FIELD)
            name = options.get(b"filename", b"").decode("utf-8", "replace")
            self.filename = name.replace("\\", "/").rsplit("/", 1)[-1][:255] or "upload.jsonl"

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._is_file:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise RequestError(
                    f"{self._name[:80]} has more than {MAX_FIELD_BYTES:,} bytes", field=self._name[:80]
                )
            return
        self.size += end - start
        if self.size > self._max_bytes:
            raise HttpError(
                413, f"the file is larger than {self._max_bytes:,} bytes: split it", param=FILE_FIELD,
                headers={"Connection": "close"},
            )  # fmt: skip
        self._pieces.append(data[start:end])
        self._num_pending += end - start

    def _on_part_end(self) -> None:
        if not self._is_file:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self.is_whole = True


async def receive(request: Request, path: Path, max_bytes: int, timeout_s: float) -> Upload:
    """Write the file of a form to `path` and return the rest of it.

    max_bytes: of the file. timeout_s: between two pieces. Raises RequestError for a malformed form,
    HttpError 413 or 408; what was written then stays behind for the caller to remove.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise RequestError(
            "Content-Type must be multipart/form-data with a boundary: upload the file as a form",
            field="body",
        )
    upload = Upload(max_bytes)
    with open(path, "wb") as content:
        try:
            parser = MultipartParser(options[b"boundary"], upload.callbacks())  # type: ignore[arg-type]
            await _feed(request, parser, upload, content, timeout_s)
            parser.finalize()
        except FormParserError as error:
            raise RequestError(f"the form is malformed: {error}", field="body") from error
        except ClientDisconnect as error:
            raise ClientGoneError from error
        except TimeoutError:
            raise HttpError(
                408, f"nothing more of the upload came for {timeout_s:g} s", headers={"Connection": "close"}
            ) from None
        await asyncio.to_thread(content.write, upload.take(0))
    if not upload.is_whole:
        raise RequestError("the form ends before its closing boundary", field="body")
    if upload.filename is None:
        raise RequestError("the form has no part called 'file'", field=FILE_FIELD)
    return upload


async def _feed(
    request: Request, parser: MultipartParser, upload: Upload, content: BinaryIO, timeout_s: float
) -> None:
    pieces = aiter(request.stream())
    while True:
        async with asyncio.timeout(timeout_s):
            piece = await anext(pieces, None)
        if piece is None:
            return
        parser.write(piece)
        if data := upload.take(WRITE_BYTES):
            await asyncio.to_thread(content.write, data)
