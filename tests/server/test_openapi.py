"""The OpenAPI document: it says what the server does, and a tool that attacks by it finds nothing.

Source: Hatfield-Dodds and Dygalo 2022 (schemathesis).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from server_helpers import RunningServer

from polybatch.jobs.schema import LABELS, USED_FIELDS, Endpoint

TENANT, ADMIN = "pb-of-a-tenant", "pb-of-an-administrator"


def everything(root: Path) -> dict[str, Any]:
    """A configuration with all routes open to the administrator."""
    return {
        "served_model_names": ("base",), "api_keys": (TENANT,), "admin_api_keys": (ADMIN,),
        "adapter_roots": (root,), "data_dir": root / "data",
    }  # fmt: skip


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    config = everything(tmp_path_factory.mktemp("full"))
    with RunningServer(adapters={"red": "red"}, config=config) as running:
        running.client.headers["Authorization"] = f"Bearer {ADMIN}"
        yield running


def attack(server: RunningServer, max_examples: int) -> Counter[int]:
    """Send what the document allows and what it forbids to every operation; returns statuses.

    Fails where an answer is none that the document names, or a forbidden request is accepted.
    """
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis import checks

    headers = {"Authorization": f"Bearer {ADMIN}"}
    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
    api.validate()
    # Types cannot say all that makes a body wrong: what they allow may be refused, but never with 5xx.
    excluded = [checks.CHECKS.get_one("positive_data_acceptance")]
    statuses: Counter[int] = Counter()
    labels = []
    for found in api.get_all_operations():
        operation = found.ok()
        labels.append(operation.label)
        for mode in schemathesis.GenerationMode:
            if mode is schemathesis.GenerationMode.NEGATIVE and not _can_be_wrong(operation):
                continue

            @settings(
                max_examples=max_examples, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck), phases=[Phase.generate],
            )  # fmt: skip
            @given(operation.as_strategy(generation_mode=mode), st.booleans())
            def send(case: Any, is_known: bool) -> None:
                model = case.body.get("model") if isinstance(case.body, dict) else None
                if is_known and isinstance(model, str) and model:
                    # Else nearly all would end at a model that is not served.
                    case.body["model"] = "base"
                # What is sent as nothing at all cannot be refused.
                assume(all(value not in (None, [], {}) for value in (case.query or {}).values()))
                response = case.call(headers=headers, timeout=60)
                statuses[response.status_code] += 1
                case.validate_response(response, headers=headers, excluded_checks=excluded)

            send()
    assert len(labels) == len(set(labels)) > 15
    return statuses


def _can_be_wrong(operation: Any) -> bool:
    return bool(operation.body or operation.query or operation.path_parameters)


def test_no_request_that_the_document_describes_or_forbids_makes_the_server_fail(full: RunningServer) -> None:
    statuses = attack(full, max_examples=7)
    assert {200, 400, 404} <= statuses.keys()
    assert full.llm.num_in_flight == 0
    assert full.llm.num_restarts == 0


@pytest.mark.slow
def test_no_long_attack_makes_the_server_fail(full: RunningServer) -> None:
    assert {200, 400, 404} <= attack(full, max_examples=150).keys()
    assert full.llm.num_restarts == 0


@pytest.mark.slow
def test_no_attack_makes_a_real_engine_fail(tmp_path: Path) -> None:
    with RunningServer("smollm2-135m-instruct", config=everything(tmp_path), max_model_len=64) as running:
        assert {200, 400, 404} <= attack(running, max_examples=25).keys()
        assert running.llm.num_restarts == 0


def test_every_operation_says_what_it_is_and_which_key_it_needs(full: RunningServer) -> None:
    document = full.client.get("/openapi.json").json()
    ids = []
    for path, operations in document["paths"].items():
        for operation in operations.values():
            ids.append(operation["operationId"])
            assert operation["description"], path
            assert operation["tags"][0] in [tag["name"] for tag in document["tags"]]
            assert "422" not in operation["responses"], "nothing answers so"
            is_open = path == "/health"
            assert (operation.get("security", document["security"]) == []) == is_open
            assert ("401" in operation["responses"]) != is_open
            for status in {"429", "503"} & operation["responses"].keys():
                assert "Retry-After" in operation["responses"][status]["headers"]
    assert len(ids) == len(set(ids))
    schemas = document["components"]["schemas"]
    assert all("description" in schema for schema in schemas.values())
    with RunningServer() as unlocked:
        assert {} in unlocked.client.get("/openapi.json").json()["security"]


@pytest.mark.parametrize(
    ("path", "name", "good"),
    [
        ("/v1/completions", "CompletionRequest", {"prompt": "x"}),
        ("/v1/chat/completions", "ChatCompletionRequest", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_the_document_names_every_field_and_no_other(
    full: RunningServer, path: str, name: str, good: dict[str, Any]
) -> None:
    schema = full.client.get("/openapi.json").json()["components"]["schemas"][name]
    fields = schema["properties"].keys()
    endpoint = Endpoint(path)
    assert USED_FIELDS[endpoint] <= fields
    assert schema["additionalProperties"] is False
    body = {"model": "base", "max_tokens": 1} | good
    strange = [{"strange": 1}]
    for field in fields - body.keys():
        # Wrong as its value is, the field itself is known.
        answer = full.client.post(path, json=body | {field: strange})
        message = "" if answer.status_code == 200 else answer.json()["error"]["message"]
        assert "unknown field" not in message, message
        assert "does not belong" not in message, message
        assert "is not supported: remove it" not in message, message
        assert (answer.status_code == 200) == (field in LABELS), (field, answer.text)
