"""Keys, hosts and administrators."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server_helpers import RunningServer

from polybatch.errors import ConfigError
from polybatch.server.auth import Keys
from polybatch.server.config import ServerConfig
from polybatch.server.errors import HttpError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    (path / "green").mkdir()
    (path / "missing").mkdir()
    (path.parent / "outside").mkdir(exist_ok=True)
    (path / "link").symlink_to(path.parent / "outside")
    return path


@pytest.fixture(scope="module")
def locked(root: Path) -> Iterator[RunningServer]:
    keys = {
        "api_keys": ("one", "two"), "admin_api_keys": ("boss",), "metrics_api_keys": ("watcher",),
        "adapter_roots": (root,),
    }  # fmt: skip
    with RunningServer(adapters={"red": "red"}, config=keys) as running:
        yield running


def ask(server: RunningServer, method: str, path: str, key: str | None, **more: object) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return server.client.request(method, path, headers=headers, **more)  # type: ignore[arg-type]


def test_every_route_but_liveness_needs_a_key(locked: RunningServer) -> None:
    assert ask(locked, "GET", "/health", None).status_code == 200
    document = ask(locked, "GET", "/openapi.json", "one").json()
    paths = list(document["paths"])
    assert len(paths) > 8
    for path in [*paths, "/openapi.json", "/nowhere"]:
        if path == "/health":
            continue
        for key in (None, "three", "on", "ONE"):
            response = ask(locked, "GET", path.replace("{model}", "red"), key)
            assert response.status_code == 401, path
            scheme = "Basic" if path.startswith("/dashboard") else "Bearer"
            assert response.headers["www-authenticate"].split()[0] == scheme
            assert response.json()["error"]["code"] == "invalid_api_key"
    for key in ("one", "two", "boss"):
        assert ask(locked, "GET", "/v1/models", key).status_code == 200


def test_a_metrics_key_opens_the_metrics_alone(locked: RunningServer) -> None:
    for key, status in (("watcher", 200), ("boss", 200), ("one", 403), (None, 401)):
        response = ask(locked, "GET", "/metrics", key)
        assert response.status_code == status
        assert ("polybatch_engine_up" in response.text) == (status == 200)
    assert "--metrics-api-key" in ask(locked, "GET", "/metrics", "one").json()["error"]["message"]
    assert ask(locked, "GET", "/ready", "watcher").status_code == 200
    for path in ("/v1/models", "/dashboard", "/dashboard/data", "/openapi.json", "/nowhere"):
        assert ask(locked, "GET", path, "watcher").status_code == 403
    body = {"model": "base", "prompt": "x"}
    assert ask(locked, "POST", "/v1/completions", "watcher", json=body).status_code == 403


def test_adapters_come_and_go_by_the_admin_key_alone(locked: RunningServer, root: Path) -> None:
    body = {"lora_name": "green", "lora_path": str(root / "green")}
    use = {"model": "green", "prompt": "x", "max_tokens": 2}
    assert ask(locked, "POST", "/v1/load_lora_adapter", "one", json=body).status_code == 403
    assert ask(locked, "POST", "/v1/load_lora_adapter", None, json=body).status_code == 401
    assert ask(locked, "POST", "/v1/completions", "one", json=use).status_code == 404
    assert ask(locked, "POST", "/v1/load_lora_adapter", "boss", json=body).status_code == 200
    assert ask(locked, "POST", "/v1/completions", "one", json=use).status_code == 200
    assert ask(locked, "POST", "/v1/load_lora_adapter", "boss", json=body).status_code == 400
    again = body | {"load_inplace": True}
    assert ask(locked, "POST", "/v1/load_lora_adapter", "boss", json=again).status_code == 200
    gone = {"lora_name": "green"}
    assert ask(locked, "POST", "/v1/unload_lora_adapter", "one", json=gone).status_code == 403
    assert ask(locked, "POST", "/v1/unload_lora_adapter", "boss", json=gone).status_code == 200
    assert ask(locked, "POST", "/v1/unload_lora_adapter", "boss", json=gone).status_code == 404
    assert ask(locked, "POST", "/v1/completions", "one", json=use).status_code == 404


def test_adapters_come_from_allowed_folders_only(locked: RunningServer, root: Path) -> None:
    for path in ("/etc", str(root / ".." / "outside"), str(root / "link"), "relative"):
        body = {"lora_name": "x", "lora_path": path}
        assert ask(locked, "POST", "/v1/load_lora_adapter", "boss", json=body).status_code == 403, path
    body = {"lora_name": "x", "lora_path": "a\0b"}
    assert ask(locked, "POST", "/v1/load_lora_adapter", "boss", json=body).status_code == 400


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"lora_name": "base"}, "lora_name"),
        ({"lora_name": "red"}, "lora_name"),
        ({"lora_name": ""}, None),
        ({"lora_name": 3}, "lora_name"),
        ({"lora_path": None}, "lora_path"),
        ({"other": 1}, "other"),
        ({"lora_path": "missing"}, None),
    ],
)
def test_a_bad_adapter_changes_nothing(
    locked: RunningServer, root: Path, change: dict[str, object], param: str | None
) -> None:
    if change.get("lora_path") == "missing":
        change = {"lora_path": str(root / "missing")}
    body = {"lora_name": "new", "lora_path": str(root / "green")} | change
    response = ask(locked, "POST", "/v1/load_lora_adapter", "boss", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    models = ask(locked, "GET", "/v1/models", "one").json()["data"]
    assert [model["id"] for model in models] == ["base", "red"]


def test_tenants_do_not_share_cached_prefixes(locked: RunningServer) -> None:
    body = {"model": "base", "prompt": "the same long prompt for everybody, again and again", "max_tokens": 1}

    def cached(key: str, **more: str) -> int:
        usage = ask(locked, "POST", "/v1/completions", key, json=body | more).json()["usage"]
        count: int = usage["prompt_tokens_details"]["cached_tokens"]
        return count

    assert cached("one") == 0
    assert cached("one") > 0
    assert cached("two") == 0
    assert cached("one", cache_salt="mine") == 0
    assert cached("two", cache_salt="mine") == 0
    assert cached("two") > 0


def test_without_keys_nobody_administers(server: RunningServer) -> None:
    body = {"lora_name": "x", "lora_path": "/"}
    for key in (None, "boss"):
        response = ask(server, "POST", "/v1/load_lora_adapter", key, json=body)
        assert response.status_code == 403
        assert "--admin-api-key" in response.json()["error"]["message"]


def test_a_local_server_without_keys_answers_to_no_other_name(server: RunningServer) -> None:
    port = server.url.rpartition(":")[2]
    for host in ("localhost", f"127.0.0.1:{port}", "[::1]"):
        assert server.client.get("/ready", headers={"Host": host}).status_code == 200
    for host in ("evil.example", f"evil.example:{port}", "", "127.0.0.1.evil.example"):
        assert server.client.get("/ready", headers={"Host": host}).status_code == 403
    for origin, status in (("http://localhost:3000", 200), ("https://evil.example", 403), ("null", 403)):
        assert server.client.get("/ready", headers={"Origin": origin}).status_code == status


def test_keys_are_not_kept() -> None:
    keys = Keys(["secret-key"], ["admin-key"])
    assert "secret-key" not in repr(vars(keys))
    assert keys.caller_of("bearer secret-key").tenant != Keys(["other"]).caller_of("Bearer other").tenant
    assert keys.caller_of("Bearer admin-key").is_admin
    with pytest.raises(HttpError, match="wrong"):
        keys.caller_of("Bearer secret-ke")


@pytest.mark.parametrize(
    "bad",
    [
        {"served_model_names": ()},
        {"api_keys": ("",)},
        {"api_keys": ("a b",)},
        {"api_keys": ("a",), "admin_api_keys": ("a",)},
        {"admin_api_keys": ("a",), "metrics_api_keys": ("a",)},
        {"adapter_roots": (Path("/no/such/folder"),)},
        {"max_n": 0},
        {"send_timeout_s": -1.0},
    ],
)
def test_an_impossible_configuration_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ServerConfig(**({"served_model_names": ("base",)} | bad))  # type: ignore[arg-type]
