"""The public names are complete, and the torch-free ones stay so."""

from __future__ import annotations

import subprocess
import sys

import pytest

import polybatch


def test_every_public_name_exists() -> None:
    for name in polybatch.__all__:
        assert getattr(polybatch, name).__name__ == name
    assert set(polybatch.__all__) <= set(dir(polybatch))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        polybatch.nonsense  # noqa: B018


def test_requests_and_parameters_are_imported_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import polybatch, polybatch.request, polybatch.scheduling.plan\n"
        "assert polybatch.SamplingParams(n=2).n == 2\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
