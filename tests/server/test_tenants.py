"""Limits of tenants, what they see of each other, and the file that says so."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_helpers import RunningServer

from polybatch.errors import ConfigError, RequestError
from polybatch.execution.fake import ByteTokenizer
from polybatch.server.admission import Admission
from polybatch.server.errors import HttpError
from polybatch.server.key_file import add_key
from polybatch.server.rates import TokenRates
from polybatch.server.tenants import SharedPrefix, SharedPrefixes, TenantLimits, read_tenants

SYSTEM = "You are the support desk of a shop that sells everything, patient and polite."

BOOK = f"""
default: {{max_reqs: 64}}
tenants:
  acme: {{adapters: ["red*"]}}
  slow: {{tokens_per_minute: 30}}
  small: {{max_reqs: 2}}
  free:
shared_prefixes:
  - {{system: "{SYSTEM}", tenants: [acme, slow, free]}}
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tenants")
    (folder / "tenants.yaml").write_text(BOOK)
    found = {
        tenant: add_key(folder / "keys.txt", tenant) for tenant in ("acme", "slow", "small", "free", "other")
    }
    return found | {"folder": str(folder)}


@pytest.fixture(scope="module")
def shared(keys: dict[str, str]) -> Iterator[RunningServer]:
    folder = Path(keys["folder"])
    config = {"api_keys_file": folder / "keys.txt", "tenants_file": folder / "tenants.yaml"}
    adapters: dict[str, str | Path] = {"red": "red", "red-2": "red-2", "blue": "blue"}
    with RunningServer("stub:step_s=0.01", adapters, config=config) as running:
        yield running


def ask(server: RunningServer, key: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    given = (
        {"model": "base", "max_tokens": 1} | ({"prompt": "hi"} if path == "/v1/completions" else {}) | body
    )
    return server.client.post(path, headers=headers, json=given)


def test_a_tenant_sees_and_uses_its_adapters_only(shared: RunningServer, keys: dict[str, str]) -> None:
    def models(tenant: str) -> list[str]:
        headers = {"Authorization": f"Bearer {keys[tenant]}"}
        return [m["id"] for m in shared.client.get("/v1/models", headers=headers).json()["data"]]

    assert models("acme") == ["base", "red", "red-2"]
    assert models("free") == ["base", "blue", "red", "red-2"]
    headers = {"Authorization": f"Bearer {keys['acme']}"}
    assert shared.client.get("/v1/models/blue", headers=headers).status_code == 404
    ways: list[dict[str, Any]] = [
        {"model": "blue"}, {"model": "base:blue"}, {"adapter_id": "blue"}, {"lora": [{"id": "blue"}]},
        {"lora": [{"id": "red"}, {"id": "blue", "scale": 0.5}]},
    ]  # fmt: skip
    for way in ways:
        refused, taken = ask(shared, keys["acme"], **way), ask(shared, keys["free"], **way)
        assert (refused.status_code, taken.status_code) == (refused.status_code, 200)
        assert refused.status_code in (400, 404), way
        # Just as for an adapter that does not exist.
        assert "known are" in refused.json()["error"]["message"]
        assert "blue" not in refused.json()["error"]["message"].partition("known are")[2]
    response = ask(shared, keys["acme"], "/tokenize", model="blue", prompt="x", max_tokens=None)
    assert response.status_code in (400, 404)
    assert ask(shared, keys["acme"], model="red").status_code == 200


def test_no_page_names_adapters_of_others(shared: RunningServer, keys: dict[str, str]) -> None:
    for model in ("blue", "red"):
        assert ask(shared, keys["free"], model=model, max_tokens=3).status_code == 200

    def page(tenant: str, path: str) -> httpx.Response:
        return shared.client.get(path, headers={"Authorization": f"Bearer {keys[tenant]}"})

    for tenant in ("acme", "free"):
        assert page(tenant, "/metrics").status_code == 403
        assert "blue" not in page(tenant, "/metrics").text
    deadline = time.monotonic() + 20
    while "blue" not in page("free", "/dashboard/data").text:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    mine = page("acme", "/dashboard/data")
    assert "blue" not in mine.text
    assert [entry["name"] for entry in mine.json()["engine"]["adapters"]][:1] == ["red"]
    steps = mine.json()["engine"]["steps"]
    assert any("(other)" in step["decode"] for step in steps)
    assert any("red" in step["decode"] for step in steps)


def test_a_tenant_that_used_its_minute_is_told_when_to_come_back(
    shared: RunningServer, keys: dict[str, str]
) -> None:
    assert ask(shared, keys["slow"], prompt="x" * 20, max_tokens=40, ignore_eos=True).status_code == 200
    response = ask(shared, keys["slow"])
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    assert 30 <= int(response.headers["retry-after"]) <= 65
    assert ask(shared, keys["free"]).status_code == 200


def test_a_tenant_has_only_so_many_requests_in_flight(shared: RunningServer, keys: dict[str, str]) -> None:
    response = ask(shared, keys["small"], n=3)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")
    long = {"max_tokens": 200, "ignore_eos": True, "stream": True, "model": "base", "prompt": "x"}
    headers = {"Authorization": f"Bearer {keys['small']}"}
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(shared.client.stream("POST", "/v1/completions", json=long, headers=headers))
        response = ask(shared, keys["small"])
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "tenant_limit"
        assert "retry-after" in response.headers
        assert ask(shared, keys["free"]).status_code == 200
    shared.until_idle()
    assert ask(shared, keys["small"]).status_code == 200


def cached(server: RunningServer, key: str, *messages: str, **more: Any) -> int:
    roles = ("system", "user")
    listed = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=True)]
    response = ask(server, key, "/v1/chat/completions", messages=listed, **more)
    assert response.status_code == 200, response.text
    count: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def test_a_granted_system_prompt_is_shared_and_the_conversation_is_not(
    shared: RunningServer, keys: dict[str, str]
) -> None:
    question = "my account number is 12345678 and I would like to know about my order"
    granted = len(f"system: {SYSTEM}\nuser: ") // 16 * 16
    assert cached(shared, keys["acme"], SYSTEM, question) == 0
    assert cached(shared, keys["free"], SYSTEM, question) == granted
    assert cached(shared, keys["free"], SYSTEM, question) > granted
    # Without the grant, and with a salt of one's own, nothing is shared.
    assert cached(shared, keys["other"], SYSTEM, question) == 0
    assert cached(shared, keys["free"], SYSTEM, question, cache_salt="mine") == 0
    # Nor is anything else.
    private = "another long system prompt that nobody granted to anybody else"
    assert cached(shared, keys["acme"], private, question) == 0
    assert cached(shared, keys["free"], private, question) == 0


def test_no_salt_of_a_client_reaches_another_tenants_prefixes(
    shared: RunningServer, keys: dict[str, str]
) -> None:
    secret = "a secret that is long enough to fill more than a page of the cache"
    ask(shared, keys["acme"], prompt=secret)
    ask(shared, keys["acme"], prompt=secret, cache_salt="x")
    for salt in ("", "acme", "acme/", "/acme/", "../acme/", "acme/x", "x", "shared:", "\0acme"):
        usage = ask(shared, keys["free"], prompt=secret, cache_salt=salt).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0, salt


def test_a_flood_of_one_tenant_leaves_room_in_the_queue_for_others() -> None:
    admission = Admission(1, 100, 8, 1000)
    admission.is_shared = True
    admission.enter(1, 10, "a")
    for _ in range(5):
        admission.enter(1, 10, "a")
    with pytest.raises(HttpError, match="this tenant") as caught:
        admission.enter(1, 10, "a")
    assert caught.value.code == "tenant_limit"
    for tenant in "bc":
        admission.enter(1, 10, tenant)


def test_a_tenants_waiting_tokens_are_bounded() -> None:
    admission, limits = Admission(1, 100, 100, 1000), TenantLimits(max_queued_tokens=50)
    admission.enter(1, 90, "a", limits)
    admission.enter(1, 90, "a", limits)
    with pytest.raises(HttpError, match="90 prompt tokens"):
        admission.enter(1, 1, "a", limits)
    admission.enter(1, 1, "b", limits)
    with pytest.raises(RequestError):
        admission.enter(3, 1, "b", TenantLimits(max_reqs=2))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc"), st.integers(1, 4), st.integers(1, 60))))
def test_what_is_counted_for_tenants_is_what_their_calls_hold(
    events: list[tuple[bool, str, int, int]],
) -> None:
    admission, tickets = Admission(4, 100, 10, 200), []
    admission.is_shared = True
    for is_new, tenant, num_seqs, num_tokens in events:
        if is_new:
            with contextlib.suppress(HttpError, RequestError):
                tickets.append(admission.enter(num_seqs, num_tokens, tenant, TenantLimits(max_reqs=8)))
        elif tickets:
            admission.leave(tickets.pop(num_tokens % len(tickets)))
        for name in "abc":
            mine = [ticket for ticket in tickets if ticket.tenant == name]
            assert admission._seqs_of[name] == sum(ticket.num_seqs for ticket in mine) <= 8
            waiting = [ticket for ticket in mine if not ticket.is_running]
            assert admission._queued_tokens_of[name] == sum(ticket.num_tokens for ticket in waiting)
            assert admission._queued_seqs_of[name] == sum(ticket.num_seqs for ticket in waiting)
    for ticket in tickets:
        admission.leave(ticket)
    assert not admission._seqs_of
    assert not admission._queued_tokens_of


def test_a_rate_is_kept_on_average_whatever_the_outputs() -> None:
    now = [0.0]
    rates = TokenRates(lambda: now[0])
    spent = 0
    for _ in range(2000):
        now[0] += 1.0
        with contextlib.suppress(HttpError):
            rates.enter("a", 30, 600)
            rates.charge("a", 70)
            spent += 100
    assert 19_000 <= spent <= 21_000
    rates.charge("nobody", 10)
    rates.enter("nobody", 10**9, None)


def test_a_prompt_shares_what_it_has_in_common_with_a_granted_text() -> None:
    granted = [
        SharedPrefix("abcdef", is_system=False, tenants=frozenset("x")),
        SharedPrefix("ab", is_system=False),
    ]
    shared = SharedPrefixes(granted, ByteTokenizer())
    ids = ByteTokenizer().encode("abcxyz", True)
    offset = len(ids) - 6
    assert shared.num_shared("x", ids) == offset + 3
    assert shared.num_shared("y", ids) == offset + 2
    assert shared.num_shared("x", ids[offset:]) in (0, 3)
    with pytest.raises(ConfigError):
        SharedPrefixes(granted, None)


@pytest.mark.parametrize(
    "content",
    ["[]", "default: 3", "tenants: [a]", "tenants: {a/b: {}}", "default: {max_reqs: 0}", "other: 1",
     "default: {other: 1}", "default: {max_reqs: true}", "tenants: {a: {adapters: red}}",
     "shared_prefixes: {}",
     "shared_prefixes: [{}]", "shared_prefixes: [{system: a, text: b}]", "shared_prefixes: [{text: ''}]",
     "shared_prefixes: [{text: a, tenants: b}]", "{", "default: {tokens_per_minute: -1}"],
)  # fmt: skip
def test_a_book_that_is_wrong_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tenants.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"--tenants|tenant is"):
        read_tenants(tmp_path / "tenants.yaml")


def test_a_tenants_entry_overrides_the_default_field_by_field(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text(
        "default: {max_reqs: 5, tokens_per_minute: 9}\ntenants: {a: {max_reqs: null}, b: {max_reqs: 7}}"
    )
    book = read_tenants(path)
    assert book.limits("a") == TenantLimits(tokens_per_minute=9)
    assert book.limits("b") == TenantLimits(max_reqs=7, tokens_per_minute=9)
    assert book.limits("c") == book.default == TenantLimits(max_reqs=5, tokens_per_minute=9)
    assert read_tenants(None).limits("a") == TenantLimits()


def test_a_flood_delays_its_sender_and_not_other_tenants() -> None:
    """The whole way: keys, queue and the fair policy of the engine."""
    config = {"api_keys": ("flood", "light")}
    with RunningServer("stub:step_s=0.005", policy="fair", max_num_seqs=2, config=config) as server:
        done: list[str] = []

        def one(key: str) -> None:
            ask(server, key, prompt="x" * 20, max_tokens=10, ignore_eos=True)
            done.append(key)

        threads = [threading.Thread(target=one, args=("flood",)) for _ in range(30)]
        for thread in threads:
            thread.start()
        while server.state.admission.num_queued_seqs < 20:
            time.sleep(0.005)
        light = [threading.Thread(target=one, args=("light",)) for _ in range(3)]
        for thread in light:
            thread.start()
        for thread in light:
            thread.join(60)
        assert done.count("flood") < 25
        for thread in threads:
            thread.join(60)
        assert done.count("flood") == 30
