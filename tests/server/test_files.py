"""Uploads, downloads, quotas and expiry of files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from batch_helpers import begin, jsonl, row, until, upload
from server_helpers import RunningServer

from polybatch.errors import ConfigError
from polybatch.server.batches.store import Store

LIMIT = 300_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    config = {"data_dir": tmp_path_factory.mktemp("data"), "max_file_bytes": LIMIT}
    with RunningServer(config=config) as running:
        yield running


def form(parts: dict[str, str], content: bytes | None = b"{}\n", boundary: str = "b") -> bytes:
    """A form by hand, its file last."""
    pieces = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in parts.items()
    ]
    if content is not None:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        pieces.append(head.encode() + content + b"\r\n")
    return b"".join(pieces) + f"--{boundary}--\r\n".encode()


def post(server: RunningServer, body: bytes, kind: str = "multipart/form-data; boundary=b") -> httpx.Response:
    return server.client.post("/v1/files", content=body, headers={"Content-Type": kind})


def test_a_file_comes_back_byte_by_byte(server: RunningServer) -> None:
    content = jsonl([row(f"r{i}", prompt="ünïcode \r\n--b" * 9) for i in range(300)])
    made = server.openai.files.create(file=("../../in.jsonl", content), purpose="batch")
    assert (made.filename, made.bytes, made.purpose, made.status) == (
        "in.jsonl", len(content), "batch", "processed",
    )  # fmt: skip
    assert made.expires_at == made.created_at + 30 * 86_400
    assert server.openai.files.retrieve(made.id).bytes == len(content)
    assert server.openai.files.content(made.id).read() == content


def test_a_deleted_file_is_gone_from_the_disk(server: RunningServer) -> None:
    service = server.state.batches
    assert service is not None
    file_id = upload(server.openai, [row("a")])
    assert service.store.path_of(file_id).exists()
    assert server.openai.files.delete(file_id).deleted
    assert not service.store.path_of(file_id).exists()
    for call in (server.openai.files.retrieve, server.openai.files.content, server.openai.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(file_id)


def test_files_are_listed_page_by_page_in_either_order(server: RunningServer) -> None:
    made = [upload(server.openai, [row("a")]) for _ in range(3)]
    assert [file.id for file in server.openai.files.list(limit=3).data] == made[::-1]
    page = server.openai.files.list(limit=1, order="asc", after=made[0])
    assert ([file.id for file in page.data], page.has_more) == ([made[1]], True)
    assert server.openai.files.list(purpose="batch_output").data == []
    assert server.client.get("/v1/files", params={"order": "up"}).json()["error"]["param"] == "order"


def test_an_upload_that_is_too_large_leaves_nothing_behind(server: RunningServer) -> None:
    service = server.state.batches
    assert service is not None
    with pytest.raises(openai.APIStatusError) as caught:
        server.openai.files.create(file=("a", b"x" * (LIMIT + 1)), purpose="batch")
    assert caught.value.status_code == 413
    assert list(service.store.work.glob("upload-*")) == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (form({"purpose": "fine-tune"}), "purpose"),
        (form({}), "purpose"),
        (form({"purpose": "batch"}, None), "no part called 'file'"),
        (form({"purpose": "batch"}, b""), "empty"),
        (form({"purpose": "batch", "colour": "red"}), "unknown field 'colour'"),
        (form({"purpose": "batch", "expires_after[seconds]": "soon"}), "must be a number"),
        (form({"purpose": "batch", "expires_after[seconds]": "9"}), "3,600"),
        (form({"purpose": "batch", "x": "y" * 5_000}), "4,096 bytes"),
        (form({f"f{i}": "" for i in range(20)}), "16 fields"),
        (form({"purpose": "batch"})[:-6], "closing boundary"),
        (form({"purpose": "batch"}, boundary="other"), "malformed"),
        (b"--b\r\n" + b"X: " + b"y" * 20_000, "header"),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n", "no name"),
        (form({"purpose": "batch"})[:-7] + b"\r\n" + form({}), "two files"),
        (b"", "closing boundary"),
    ],
)
def test_a_malformed_upload_is_refused_and_leaves_nothing_behind(
    server: RunningServer, body: bytes, said: str
) -> None:
    service = server.state.batches
    assert service is not None
    before = len(server.openai.files.list().data)
    response = post(server, body)
    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]
    assert len(server.openai.files.list().data) == before
    assert list(service.store.work.glob("upload-*")) == []


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", ""])
def test_an_upload_must_be_a_form(server: RunningServer, kind: str) -> None:
    assert post(server, b"{}", kind).status_code == 400


def test_a_quota_holds_for_all_files_of_a_tenant(tmp_path: Path) -> None:
    config = {"data_dir": tmp_path, "api_keys": ("one", "two"), "max_tenant_file_bytes": 1_000}
    with RunningServer(config=config) as running:
        one = running.openai.with_options(api_key="one")
        kept = one.files.create(file=("a", b"x" * 900), purpose="batch")
        with pytest.raises(openai.APIStatusError) as caught:
            one.files.create(file=("a", b"x" * 200), purpose="batch")
        assert caught.value.status_code == 413
        running.openai.with_options(api_key="two").files.create(file=("a", b"x" * 900), purpose="batch")
        one.files.delete(kept.id)
        one.files.create(file=("a", b"x" * 200), purpose="batch")


def test_a_batch_is_not_begun_without_room_for_its_results(tmp_path: Path) -> None:
    config = {"data_dir": tmp_path, "max_tenant_file_bytes": 300}
    with RunningServer(config=config) as running:
        done = until(running.openai, begin(running.openai, [row("a")]).id)
        assert done.status == "completed"
        with pytest.raises(openai.APIStatusError) as caught:
            running.openai.batches.create(
                input_file_id=done.input_file_id, endpoint="/v1/completions", completion_window="24h"
            )
        assert caught.value.status_code == 413


def test_expired_files_are_not_found_and_then_deleted(server: RunningServer) -> None:
    service = server.state.batches
    assert service is not None
    expiring = {"anchor": "created_at", "seconds": 3_600}
    file_id = upload(server.openai, [row("a")], expires_after=expiring)
    file = service.file(file_id, "")
    assert file.expires_s == file.created_s + 3_600
    later = time.time() + 3_601
    assert service.store.file(file_id, "", later) is None
    kept = upload(server.openai, [row("a")])
    assert service.store.delete_expired(later) == 1
    assert not service.store.path_of(file_id).exists()
    assert service.store.path_of(kept).exists()


def test_a_server_without_a_data_folder_says_so(tmp_path: Path) -> None:
    with RunningServer() as running:
        for path in ("/v1/files", "/v1/batches", "/v1/batches/x"):
            response = running.client.get(path)
            assert response.status_code == 404
            assert "--data-dir" in response.json()["error"]["message"]


def test_a_data_folder_belongs_to_one_server(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ConfigError, match="in use"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


def test_rubbish_of_a_crash_is_removed_at_the_next_start(tmp_path: Path) -> None:
    Store(tmp_path).close()
    (tmp_path / "files" / "file-half").write_bytes(b"x")
    (tmp_path / "work" / "upload-half").write_bytes(b"x")
    (tmp_path / "work" / "batch_half").mkdir()
    Store(tmp_path).close()
    assert not list((tmp_path / "files").iterdir())
    assert not list((tmp_path / "work").iterdir())
