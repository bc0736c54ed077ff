"""The dashboard: its data, who may see it, and the page itself in a browser."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_helpers import RunningServer

from polybatch.engine.step_log import RequestTrace
from polybatch.server.dashboard_data import story
from polybatch.server.routes.dashboard import FILES

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGE = Path(__file__).parents[2] / "polybatch" / "server" / "dashboard"


@pytest.fixture(scope="module")
def busy() -> Iterator[RunningServer]:
    with RunningServer("stub:step_s=0.005", adapters={"red": "red", "blue": "blue"}) as running:
        for model in ("base", "red", "blue", "red"):
            running.complete(model=model, prompt="x" * 40, max_tokens=10, ignore_eos=True)
        yield running


def data(server: RunningServer, **params: Any) -> Any:
    """What the page is told, of a moment after this call."""
    asked_s = time.monotonic()
    while True:
        response = server.client.get("/dashboard/data", params=params)
        assert response.status_code == 200
        found = response.json()
        if found["engine"] is None or found["engine"]["now"] >= asked_s:
            return found
        time.sleep(0.05)


def test_the_data_tell_what_was_served(busy: RunningServer) -> None:
    found = data(busy)
    engine = found["engine"]
    assert (found["model"], found["state"], found["is_ready"]) == ("base", "ready", True)
    assert sum(found["ttft"]["counts"]) >= 4
    assert engine["stats"]["num_output_tokens"] >= 40
    assert sum(sum(step["decode"].values()) for step in engine["steps"]) >= 36
    assert {adapter["name"]: adapter["is_resident"] for adapter in engine["adapters"]} == {
        "red": True, "blue": True
    }  # fmt: skip
    assert sum(engine["pages"]["runs"][1::2]) * engine["pages"]["pages_per_cell"] >= 32_768
    assert [request["adapter"] for request in engine["requests"][:4]] == [None, "red", "blue", "red"]
    assert "40 prompt tokens" not in engine["requests"][0]["story"]
    assert "10 tokens in" in engine["requests"][0]["story"]


def test_a_prediction_is_absent_until_there_is_something_to_go_by(busy: RunningServer) -> None:
    engine = data(busy)["engine"]
    assert all("predicted_s" not in step for step in engine["steps"][:16])
    late = engine["steps"][17:]
    assert late
    assert all(step["predicted_s"] > 0 for step in late)
    assert engine["costs"]["num_steps"] == sum("predicted_s" in step for step in engine["steps"])
    assert not engine["costs"]["is_calibrated"]
    assert 0 < engine["costs"]["median_error"] <= engine["costs"]["p95_error"]


def test_only_steps_that_are_new_are_sent(busy: RunningServer) -> None:
    steps = data(busy)["engine"]["steps"]
    assert data(busy, after=steps[-1]["index"])["engine"]["steps"] == []
    assert data(busy, after=steps[-3]["index"])["engine"]["steps"] == steps[-2:]


@pytest.mark.parametrize("after", ["x", "-2", "1.5", "9" * 30])
def test_a_bad_step_number_is_refused(busy: RunningServer, after: str) -> None:
    response = busy.client.get("/dashboard/data", params={"after": after})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "after"


def test_requests_bear_the_id_that_their_client_knows(busy: RunningServer) -> None:
    body = {"model": "base", "prompt": "hi", "max_tokens": 2}
    response = busy.client.post("/v1/completions", json=body, headers={"X-Request-Id": "mine-1"})
    assert response.status_code == 200
    assert data(busy)["engine"]["requests"][-1]["id"] == "mine-1"


def test_without_an_engine_the_data_say_so() -> None:
    with RunningServer() as server:
        server.run(server.llm.close())
        found = data(server)
        assert (found["engine"], found["is_ready"], found["state"]) == (None, False, "closed")


def test_all_files_of_the_page_are_served_and_nothing_else(busy: RunningServer) -> None:
    shipped = {str(path.relative_to(PAGE)) for path in PAGE.rglob("*") if path.is_file()}
    assert shipped == set(FILES)
    for name in FILES:
        response = busy.client.get(f"/dashboard/{name}")
        assert response.status_code == 200, name
        assert response.content == (PAGE / name).read_bytes()
    for name in ("nothing.js", "..%2Fapp.py", "%2e%2e/app.py", "vendor/../../app.py"):
        assert busy.client.get(f"/dashboard/{name}").status_code == 404


def test_the_page_fetches_nothing_from_elsewhere_and_runs_nothing_inline(busy: RunningServer) -> None:
    response = busy.client.get("/dashboard")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "unsafe" not in response.headers["content-security-policy"]
    ours = [path for path in PAGE.glob("*") if path.is_file()]
    assert not any(re.search(r"https?://|innerHTML|\bonclick=", path.read_text()) for path in ours)


@pytest.fixture(scope="module")
def locked() -> Iterator[RunningServer]:
    config = {"api_keys": ("one", "two"), "admin_api_keys": ("boss",)}
    with RunningServer(config=config) as running:
        for key in ("one", "two", "two"):
            response = running.client.post(
                "/v1/completions",
                json={"model": "base", "prompt": "hi", "max_tokens": 2},
                headers={"Authorization": f"Bearer {key}"},
            )
            assert response.status_code == 200
        running.until_idle()
        yield running


def ask(server: RunningServer, path: str, key: str) -> httpx.Response:
    return server.client.get(path, auth=("anybody", key))


def test_the_page_asks_a_browser_for_the_key(locked: RunningServer) -> None:
    for path in ("/dashboard", "/dashboard/data", "/dashboard/app.js"):
        refused = locked.client.get(path)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic ")
        assert ask(locked, path, "wrong").status_code == 401
        assert ask(locked, path, "one").status_code == 200
        assert locked.client.get(path, headers={"Authorization": "Bearer one"}).status_code == 200
    for broken in ("Basic", "Basic %%%", "Basic b25l", "Basic /////w=="):
        assert locked.client.get("/dashboard", headers={"Authorization": broken}).status_code == 401


def test_a_browsers_password_opens_nothing_else(locked: RunningServer) -> None:
    for path in ("/metrics", "/v1/models", "/dashboards"):
        assert ask(locked, path, "one").status_code == 401


def test_a_tenant_sees_only_its_own_requests(locked: RunningServer) -> None:
    seen = {
        key: len(ask(locked, "/dashboard/data", key).json()["engine"]["requests"])
        for key in ("one", "two", "boss")
    }
    assert seen == {"one": 1, "two": 2, "boss": 3}


def trace(**changes: Any) -> RequestTrace:
    fields = {
        "request_id": "r", "tenant": "", "adapter": "sql", "status": "running", "num_prompt": 100,
        "num_cached": 0, "num_chunks": 3, "num_output": 7, "num_preemptions": 1, "arrival_s": 1.0,
        "adapter_load_s": 1.02, "first_scheduled_s": 1.04, "first_token_s": 1.1, "finished_s": None,
    }  # fmt: skip
    return RequestTrace(**(fields | changes))


def test_a_story_tells_what_befell_a_request() -> None:
    told = ", ".join(story(trace(), 2.1))
    assert told == (
        "queued 40 ms, adapter sql loaded meanwhile, prefilled in 3 chunks 60 ms, preempted once, "
        "7 tokens in 1,000 ms"
    )
    waiting = trace(status="waiting", first_scheduled_s=None, first_token_s=None, adapter_load_s=None)
    assert list(story(waiting, 1.5)) == ["queued 500 ms"]
    over = trace(
        status="length", finished_s=2.0, predicted_ttft_s=0.08, predicted_e2e_s=0.9, kept=["ttft"],
        missed=["tpot", "e2e"],
    )  # fmt: skip
    parts = list(story(over, 2.1))
    assert parts[0] == "told 80 ms to the first token, 900 ms to the last"
    assert parts[-3:] == ["ended by length", "in time: first token", "late: pace of tokens and last token"]
    failed = trace(status="error", finished_s=1.09, first_token_s=None, num_cached=64)
    assert "64 of 100 prompt tokens from cache" in story(failed, 9.0)
    assert list(story(failed, 9.0))[-1] == "ended by error"


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_the_engine_in_a_browser(busy: RunningServer, scheme: str) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    errors: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1200, "height": 900})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(f"{busy.url}/dashboard")
        api.expect(page.locator("#state")).to_have_text("ready")
        api.expect(page.locator("#requests li").first).to_contain_text("tokens in")
        assert page.locator(".uplot").count() == 5
        page.click("#by-adapter")
        api.expect(page.locator("#steps-legend")).to_contain_text("red")
        page.click("#by-phase")
        api.expect(page.locator("#steps-legend")).to_contain_text("decode")
        page.click("#since-start")
        api.expect(page.locator("#ttft-quantiles")).to_contain_text("p95")
        assert busy.complete(max_tokens=2, deadlines={"ttft_ms": 60_000, "e2e_ms": 0.01}).status_code == 200
        api.expect(page.locator("#deadlines tbody tr")).to_have_text(
            [re.compile(r"first token[12]0100 %"), re.compile(r"last token0[12]0 %")]
        )
        api.expect(page.locator("#requests .mark.missed").first).to_be_visible()
        page.click("#show-live")
        api.expect(page.locator("#requests li")).to_have_count(0)
        page.click("#show-finished")
        page.click("#pause")
        api.expect(page.locator("#pause")).to_have_text("Resume")
        num_shown = page.locator("#requests li").count()
        busy.complete(max_tokens=2)
        page.wait_for_timeout(1200)
        assert page.locator("#requests li").count() == num_shown
        page.click("#pause")
        api.expect(page.locator("#requests li")).to_have_count(num_shown + 1)
        page.set_viewport_size({"width": 420, "height": 800})
        page.wait_for_function("document.documentElement.scrollWidth <= 420")
        label = page.locator("#pages").get_attribute("aria-label")
        assert label is not None
        assert "free" in label
        browser.close()
    assert errors == []
