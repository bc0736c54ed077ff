"""docs/serving.md names every route and every flag, and only tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "serving.md").read_text()


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_fault_names_tests_that_exist() -> None:
    rows = [line for line in section("Faults").splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, f"no test holds: {row}"
        for path, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name}"


def test_every_route_is_listed_and_no_other() -> None:
    pytest.importorskip("fastapi")
    from fastapi.routing import APIRoute

    from polybatch.server.app import ROUTERS

    routes = {
        f"{method} {re.sub(r':path}', '}', route.path)}"
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    listed = set(re.findall(r"`((?:GET|POST|DELETE) [^`]+)`", section("Endpoints")))
    assert listed - {"GET /openapi.json"} == routes


def test_every_flag_of_serve_itself_is_mentioned_and_every_one_mentioned_exists() -> None:
    from typer.main import get_command

    from polybatch.cli.main import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    options = [p for p in commands["serve"].params if p.opts[0].startswith("--")]
    known = {name for p in options for name in (*p.opts, *p.secondary_opts)}
    own = {p.opts[0] for p in options if p.rich_help_panel in ("HTTP", "Access", "Limits")}
    mentioned = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", PAGE))
    assert own <= mentioned
    assert mentioned - known <= {"--tenant", "--file", "--admin", "--metrics"}, "of polybatch keys new"
