"""Settings: every "auto" settled once, every impossible value refused with a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polybatch.engine.config import EngineConfig, adapter_bytes, available_memory, parse_bytes, resolve
from polybatch.engine.executors import settle
from polybatch.errors import ConfigError
from polybatch.execution.fake import fake_spec

GIB = 2**30


def resolved(page_bytes: int = 1024, available: int = 8 * GIB, **settings: Any) -> Any:
    return resolve(EngineConfig(**settings), fake_spec(), page_bytes, available)


@pytest.mark.parametrize(
    ("text", "count"),
    [(4096, 4096), ("4096", 4096), ("2GiB", 2 * GIB), ("1.5 KiB", 1536), ("3MB", 3_000_000), ("7B", 7)],
)
def test_memory_is_bytes_or_text_with_a_unit(text: int | str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("bad", ["2 gigs", "GiB", "-1GiB", "iB", 0, -5, True, 1.5, "2iB"])
def test_a_memory_that_is_no_size_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match="2GiB"):
        parse_bytes(bad)


def test_memory_left_open_is_a_quarter_of_what_is_free_or_what_can_be_used() -> None:
    assert resolved(available=4 * GIB, max_model_len=200_000).pool.total_bytes == GIB
    small = resolved(available=1000 * GIB, max_model_len=160, max_num_seqs=3)
    assert small.pool.num_pages == 3 * 10


def test_a_model_longer_than_the_pool_is_served_up_to_the_pool_unless_asked_for() -> None:
    assert resolved(memory=100 * 1024).scheduler.max_model_len == 1600
    with pytest.raises(ConfigError, match=r"1,600 tokens.*max_model_len 5,000.*raise memory"):
        resolved(memory=100 * 1024, max_model_len=5000)


def test_max_model_len_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="the model's limit is 1,048,576"):
        resolved(max_model_len=2**20 + 1)


def test_float16_is_for_the_gpu() -> None:
    assert resolved(dtype="float16", device="cuda").dtype == "float16"
    with pytest.raises(ConfigError, match="the cpu executor knows float32, bfloat16: use one of"):
        resolved(dtype="float16", device="cpu")


def test_a_share_of_a_gpus_memory_is_for_gpus_and_stands_alone() -> None:
    assert resolved(device="cuda", gpu_memory_utilization=1).executor == "cuda"
    with pytest.raises(ConfigError, match=r"is 0\.9, and the cpu executor uses no GPU: leave it out"):
        resolved(gpu_memory_utilization=0.9)
    with pytest.raises(ConfigError, match=r"0\.9 and memory is '2GiB': give one"):
        EngineConfig(gpu_memory_utilization=0.9, memory="2GiB")
    for bad in (0, -0.1, 1.01, 90, True, float("nan"), "0.9"):
        with pytest.raises(ConfigError, match="above 0 and at most 1"):
            EngineConfig(gpu_memory_utilization=bad)  # type: ignore[arg-type]


def test_known_times_of_stages_reach_the_scheduler_and_must_be_times() -> None:
    assert resolved(stage_times={"draft": 2, "check": 0.5}).scheduler.stage_times == (
        ("draft", 2), ("check", 0.5),
    )  # fmt: skip
    for bad in ({"": 1.0}, {"draft": 0}, {"draft": "2"}, {"draft": True}, {5: 1.0}):
        with pytest.raises(ConfigError, match="stage_times"):
            resolved(stage_times=bad)


def test_a_quantization_that_the_executor_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="the cpu executor knows None, 'int8', 'int4'"):
        resolved(quantization="fp8")
    with pytest.raises(ConfigError, match="the cuda executor knows None, 'int4'"):
        resolved(quantization="int8", device="cuda")


def test_a_gpu_takes_all_that_is_left_and_larger_steps() -> None:
    config = resolved(available=4 * GIB, device="cuda:1")
    assert (config.executor, config.device) == ("cuda", "cuda:1")
    assert config.pool.total_bytes == 4 * GIB
    assert config.max_num_tokens == 8192 + 256
    assert config.max_num_logits == 1024 + 256


def test_a_pool_larger_than_what_a_gpu_has_left_is_refused_before_it_is_taken() -> None:
    with pytest.raises(ConfigError, match=r"memory is '5GiB'.*room for pages of 4,294,967,296 bytes"):
        resolved(available=4 * GIB, device="cuda", memory="5GiB")


def test_a_pool_larger_than_the_free_memory_is_refused_before_it_is_taken() -> None:
    with pytest.raises(ConfigError, match=r"memory is '5GiB', but only 4,294,967,296 bytes are free"):
        resolved(available=4 * GIB, memory="5GiB")


def test_a_pool_of_less_than_two_pages_is_refused_by_the_size_of_a_page() -> None:
    with pytest.raises(ConfigError, match=r"1 pages of 1,024 bytes and 16 tokens each; two are the least"):
        resolved(memory=1024)


def test_what_an_executor_does_not_know_is_refused_before_its_pages_are_sized() -> None:
    with pytest.raises(ConfigError, match="the cpu executor knows float32, bfloat16"):
        settle(EngineConfig(dtype="float16", device="cpu"), fake_spec())


def test_auto_means_bfloat16_on_the_compiled_cpu_executor() -> None:
    config = resolved()
    assert (config.dtype, config.device, config.executor) == ("bfloat16", "cpu", "cpu")
    assert config.max_num_tokens == 2048 + 256


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "auto, cpu, cuda"),
        ({"device": "cuda:0", "executor": "cpu"}, "leave one of them out"),
        ({"dtype": "float8"}, "'bfloat16'"),
        ({"quantization": "int2"}, "'int8', 'int4'"),
        ({"executor": "gpu"}, "'eager'"),
        ({"seed": "x"}, "integer"),
        ({"threads": 0}, "positive integer or None"),
        ({"memory": "lots"}, "2GiB"),
        ({"max_model_len": 0}, "positive integer"),
        ({"max_num_batched_tokens": True}, "positive integer"),
        ({"max_num_seqs": -3}, "positive integer"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        EngineConfig(**settings)
    assert next(iter(settings)) in str(caught.value)


def test_available_memory_is_positive() -> None:
    assert available_memory() > 0


def test_the_default_pool_has_room_for_the_adapters_named_at_start(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(bytes(1000))
    needed = adapter_bytes([tmp_path / "a", tmp_path / "missing"], "float32")
    assert needed == 2500
    config, spec = EngineConfig(max_model_len=64, max_num_seqs=2), fake_spec()
    without = resolve(config, spec, 100, 2**30).pool.num_pages
    assert resolve(config, spec, 100, 2**30, needed).pool.num_pages == without + 25


def test_a_pool_sized_by_the_engine_keeps_half_for_sequences_and_one_of_a_given_size_nothing() -> None:
    spec = fake_spec()
    by_itself = resolve(EngineConfig(max_model_len=64, max_num_seqs=2), spec, 100, 2**30)
    assert by_itself.scheduler.reserve_pages == by_itself.pool.num_pages // 2
    given = resolve(EngineConfig(max_model_len=64, max_num_seqs=2, memory=10**6), spec, 100, 2**30)
    assert given.scheduler.reserve_pages == 0
