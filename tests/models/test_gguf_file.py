"""The GGUF reader: equal to the gguf package's own reader, and unharmed by damaged files."""

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from gguf_helpers import write_gguf
from helpers import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polybatch.errors import ModelError
from polybatch.models.gguf_file import SUPPORTED_TYPES, GgufFile
from polybatch.models.gguf_model import open_gguf
from polybatch.models.gguf_tokenizer import tokenizer_from_gguf


def write_every_type(path: Path) -> Path:
    """A file with metadata of every type and, for every supported tensor type, random blocks."""
    writer = GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -5)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -300)
    writer.add_uint64("a.u64", 2**40)
    writer.add_int64("a.i64", -(2**40))
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "naïve 🦜\n")
    writer.add_array("a.texts", ["", "Ġthe", "日本"])
    writer.add_array("a.floats", [0.5, -1.25])
    writer.add_array("a.flags", [True, False])
    random = np.random.default_rng(0)
    for name in SUPPORTED_TYPES:
        kind = GGMLQuantizationType[name]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        row = 512 // block * block_bytes
        blocks = random.integers(0, 256, (2, 3, row // block_bytes, block_bytes), dtype=np.uint8)
        # Scales lie in the first or last four bytes; below 60, every float made of them is finite.
        narrow = slice(None) if block == 1 else [0, 1, 2, 3, -2, -1]
        blocks[..., narrow] %= 60
        blocks = blocks.reshape(2, 3, row)
        if name == "F32":
            writer.add_tensor(name, blocks.view(np.float32))
        elif name == "F16":
            writer.add_tensor(name, blocks.view(np.float16))
        else:
            writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_equals_reader(path: Path) -> None:
    ours, theirs = GgufFile(path), GGUFReader(path)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, field in fields.items():
        assert ours.metadata[key] == field.contents(), key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.type_name == tensor.tensor_type.name
        assert found.shape == tuple(reversed(tensor.shape.tolist()))
        assert (found.offset, found.num_bytes) == (tensor.data_offset, tensor.n_bytes)


def test_every_value_and_tensor_type_reads_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path = write_every_type(tmp_path / "all.gguf")
    assert_equals_reader(path)
    file = GgufFile(path)
    for tensor in GGUFReader(path).tensors:
        expected = dequantize(tensor.data, tensor.tensor_type)
        read = file.read(tensor.name)
        assert read.shape == (2, 3, 512)
        assert np.isfinite(expected).all()
        assert torch.equal(read.float(), torch.tensor(expected).reshape(read.shape)), tensor.name


def test_16_and_32_bit_tensors_keep_their_type(tmp_path: Path) -> None:
    file = GgufFile(write_every_type(tmp_path / "all.gguf"))
    kinds = {name: file.read(name).dtype for name in ("F32", "F16", "BF16", "Q4_0")}
    assert kinds == {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "Q4_0": torch.float32,
    }


def test_the_real_model_reads_as_the_gguf_package_reads_it(real_model: Path) -> None:
    assert_equals_reader(real_model)


def test_an_unsupported_tensor_type_is_refused_by_name(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "q5.gguf", "llama")
    writer.add_tensor("w", np.zeros((2, 22), np.uint8), raw_dtype=GGMLQuantizationType.Q5_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'w' has the type Q5_0"):
        GgufFile(tmp_path / "q5.gguf").read("w")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, tiny_model("llama")).read_bytes()


def open_fully(path: Path) -> None:
    """All that loading a model does with a file, every tensor read."""
    file = GgufFile(path)
    weights = open_gguf(file)
    for index in range(weights.spec.num_layers):
        weights.layer(index)
    tokenizer_from_gguf(file.metadata, str(path))


function_scoped = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@function_scoped
@given(st.data())
def test_every_truncation_is_a_model_error(tiny: bytes, tmp_path: Path, data: st.DataObject) -> None:
    keep = data.draw(st.one_of(st.integers(0, 64), st.integers(0, 4000), st.integers(0, len(tiny) - 1)))
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny[:keep])
    with pytest.raises(ModelError):
        open_fully(path)


@function_scoped
@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_headers_load_or_are_model_errors(
    tiny: bytes, tmp_path: Path, damage: list[tuple[int, int]]
) -> None:
    data = bytearray(tiny)
    for position, value in damage:
        data[position] = value
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with contextlib.suppress(ModelError):
        open_fully(path)


HUGE = 2**63 + 5


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "cannot read"),
        (b"GGML" + bytes(28), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE), "metadata keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, HUGE) + bytes(20), "characters"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, HUGE), "strings"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 5, 2**61), "array elements"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "unknown type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sII", 3, 0, 1, 1, b"\xff", 4, 1), "not UTF-8"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 9) + bytes(96), "9 dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 0, 0, 0), "empty shape"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 8, 99, 0), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 31, 2, 0), "whole Q4_0 blocks"),
        (b"GGUF" + struct.pack("<IQQQ1sIQQIQ", 3, 1, 0, 1, b"t", 2, 2**62, 2**62, 0, 0), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 8, 0, HUGE), "truncated"),
    ],
)  # fmt: skip
def test_hostile_headers_are_refused_before_they_are_believed(
    data: bytes, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=complaint):
        GgufFile(path)


def test_a_folder_or_a_missing_file_is_a_model_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ModelError, match="cannot read"):
            GgufFile(path)
