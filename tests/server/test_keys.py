"""The key file, the command that fills it, and its reloading."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
from server_helpers import RunningServer
from typer.testing import CliRunner

from polybatch.cli.main import app
from polybatch.errors import ConfigError
from polybatch.server import auth
from polybatch.server.auth import Keys
from polybatch.server.errors import HttpError
from polybatch.server.key_file import Role, add_key, read_keys
from polybatch.server.run import reload_tenants


def test_a_new_key_is_printed_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    outputs = [
        CliRunner().invoke(app, ["keys", "new", "--tenant", "acme", "--file", str(path), *more])
        for more in ([], ["--admin"], ["--metrics"])
    ]
    assert [output.exit_code for output in outputs] == [0, 0, 0]
    keys = [output.stdout.strip() for output in outputs]
    assert len(set(keys)) == 3
    assert all(len(key) > 40 and key not in path.read_text() for key in keys)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [record.digest for record in read_keys(path)] == [
        hashlib.sha256(key.encode()).digest() for key in keys
    ]
    found = Keys(file=path)
    assert [found.caller_of(f"Bearer {key}").tenant for key in keys] == ["acme"] * 3
    roles = [found.caller_of(f"Bearer {key}").role for key in keys]
    assert roles == [Role.TENANT, Role.ADMIN, Role.METRICS]
    assert not found.is_open


@pytest.mark.parametrize(
    "line",
    ["acme", "acme secret", "acme sha256:12", f"a/b sha256:{'0' * 64}", f"acme sha256:{'0' * 64} boss",
     f"admin sha256:{'0' * 64}", f"acme sha256:{'0' * 64} admin more", f"acme sha256:{'1' * 64}"],
)  # fmt: skip
def test_a_bad_line_is_named_and_not_shown(tmp_path: Path, line: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(f"# keys\nacme sha256:{'1' * 64}\n\n{line}\n")
    with pytest.raises(ConfigError, match="line 4") as caught:
        read_keys(path)
    assert "secret" not in str(caught.value)


def test_a_file_without_keys_closes_nothing_by_accident(tmp_path: Path) -> None:
    for content in ("", "# nobody\n"):
        (tmp_path / "keys.txt").write_text(content)
        with pytest.raises(ConfigError, match="no keys"):
            Keys(file=tmp_path / "keys.txt")
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys(file=tmp_path / "none.txt")


@pytest.mark.parametrize("tenant", ["", "a/b", "-a", "a b", "admin", "x" * 65, "ä"])
def test_a_key_needs_a_tenants_name(tmp_path: Path, tenant: str) -> None:
    with pytest.raises(ConfigError):
        add_key(tmp_path / "keys.txt", tenant)
    assert not (tmp_path / "keys.txt").exists()


def test_the_time_of_a_look_up_says_nothing_about_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keyed hash of this process finds the entry, compare_digest confirms it; nothing else is compared."""
    keys, compared = Keys(["one", "two"], ["boss"]), []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    assert not {hashlib.sha256(key).digest() for key in (b"one", b"two", b"boss")} & keys._callers.keys()
    assert not Keys(["one"])._callers.keys() & Keys(["one"])._callers.keys()
    assert keys.caller_of("Bearer boss").is_admin
    assert compared == [(hashlib.sha256(b"boss").digest(),) * 2]
    for wrong in ("tw", "twoo", "TWO", "", "two\0"):
        with pytest.raises(HttpError):
            keys.caller_of(f"Bearer {wrong}")


def test_reloading_takes_keys_in_and_out_and_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    old = add_key(path, "acme")
    config = {"api_keys_file": path, "api_keys": ("flag",)}
    with RunningServer("stub:step_s=0.02", config=config) as server:

        def status(key: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            return server.client.get("/v1/models", headers=headers).status_code

        async def reload() -> None:
            reload_tenants(server.state)

        assert [status(key) for key in (old, "flag", "none")] == [200, 200, 401]
        body = {"model": "base", "prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True}
        headers = {"Authorization": f"Bearer {old}"}
        with server.client.stream("POST", "/v1/completions", json=body, headers=headers) as stream:
            lines = stream.iter_lines()
            next(lines)
            path.write_text("")
            new = add_key(path, "acme")
            server.run(reload())
            assert [status(key) for key in (old, new, "flag")] == [401, 200, 200]
            rest = list(lines)
        assert rest[-2] == "data: [DONE]", "a request in flight was dropped"
        path.write_text("nonsense")
        server.run(reload())
        assert [status(key) for key in (old, new)] == [401, 200]


def test_a_key_of_a_flag_may_not_stand_in_the_file(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.txt", "acme")
    with pytest.raises(ConfigError, match="flag"):
        Keys([key], file=tmp_path / "keys.txt")
