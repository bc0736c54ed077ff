"""Make the checkpoints that other engines need from one GGUF file, so that all run the same weights.

    python -m benchmarks.cpu.prepare hf MODEL.gguf OUT      bfloat16 Hugging Face folder (transformers, vllm)
    python -m benchmarks.cpu.prepare gguf MODEL.gguf OUT    OUT/q4_0.gguf, q8_0.gguf, bf16.gguf (llama.cpp)
    python -m benchmarks.cpu.prepare w8a8 HF_FOLDER OUT     int8 weights, dynamic int8 activations (vllm)
    python -m benchmarks.cpu.prepare adapters MODEL OUT     the LoRAs of W4 and W5, as PEFT and as GGUF

An OpenVINO folder comes from optimum-intel's own exporter:

    optimum-cli export openvino --model HF_FOLDER --task text-generation-with-past --weight-format int8 OUT
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.cpu.gguf_lora import write_gguf_lora
from polybatch.bench import workloads
from polybatch.bench.random_adapters import write_adapters
from polybatch.bench.runner import model_spec

GGUF_TYPES = {
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "bf16": gguf.GGMLQuantizationType.BF16,
}
FILE_TYPES = {
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
}
VOCABULARY_TENSORS = ("token_embd.weight", "output.weight")


def load_transformers(model: Path, dtype: torch.dtype) -> Any:
    """A transformers model from a Hugging Face folder, or from a GGUF file, dequantised."""
    import transformers

    arguments: dict[str, Any] = {"dtype": dtype}
    if model.is_dir():
        return transformers.AutoModelForCausalLM.from_pretrained(model, **arguments).eval()
    arguments["gguf_file"] = model.name
    if hasattr(transformers, "GgufConfig"):
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(model.parent, **arguments).eval()


def write_hf(model: Path, out: Path) -> None:
    """Dequantise a GGUF file into a bfloat16 Hugging Face folder with its tokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
    loaded = load_transformers(model, torch.bfloat16)
    # The weights are plain now; a saved quantisation would make readers unpack them again.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    loaded.hf_quantizer = None
    loaded.is_quantized = False
    loaded.config.architectures = [type(loaded).__name__]
    loaded.save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_gguf_variant(model: Path, out: Path, name: str) -> None:
    """The same model with all matrices in another type; with q4_0 the vocabulary's table stays at 8 bits."""
    reader = gguf.GGUFReader(model)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(out, architecture)
    skipped = ("general.architecture", "general.file_type", "general.quantization_version")
    for key, entry in reader.fields.items():
        if key.startswith("GGUF.") or key in skipped:
            continue
        element_type = entry.types[-1] if len(entry.types) > 1 else None
        writer.add_key_value(key, entry.contents(), entry.types[0], sub_type=element_type)
    writer.add_file_type(FILE_TYPES[name])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values.astype(np.float32))
            continue
        kind = "q8_0" if name == "q4_0" and tensor.name in VOCABULARY_TENSORS else name
        packed = gguf.quants.quantize(values.astype(np.float32), GGUF_TYPES[kind])
        writer.add_tensor(tensor.name, packed, raw_dtype=GGUF_TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_w8a8(source: Path, out: Path) -> None:
    """Round linears to int8 per output channel, in the compressed-tensors layout; activations are dynamic."""
    out.mkdir(parents=True, exist_ok=True)
    for file in [*source.glob("*.json"), *source.glob("*.jinja")]:
        shutil.copy(file, out)
    packed: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            packed[name] = weight
            continue
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        packed[name] = (weight.float() / scale).round().to(torch.int8)
        packed[name.removesuffix("weight") + "weight_scale"] = scale.to(torch.bfloat16)
    save_file(packed, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
            }
        },
    }
    (out / "config.json").write_text(json.dumps(config, indent=1))


def write_all_adapters(model: str, out: Path, names: list[str]) -> None:
    """The adapters of these workloads in both formats, side by side."""
    spec = model_spec(model)
    for name in names:
        ranks = workloads.make(name).adapters
        for folder in write_adapters(spec, ranks, out).values():
            write_gguf_lora(spec, folder, folder.with_suffix(".gguf"))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("hf", "gguf", "w8a8", "adapters"))
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    parser.add_argument("--types", default="q4_0,q8_0,bf16", help="of the GGUF files")
    parser.add_argument("--workloads", default="W4,W5", help="whose adapters to write")
    arguments = parser.parse_args()
    if arguments.what == "hf":
        write_hf(Path(arguments.source), arguments.out)
    elif arguments.what == "w8a8":
        write_w8a8(Path(arguments.source), arguments.out)
    elif arguments.what == "adapters":
        write_all_adapters(arguments.source, arguments.out, arguments.workloads.split(","))
    else:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name in arguments.types.split(","):
            write_gguf_variant(Path(arguments.source), arguments.out / f"{name}.gguf", name)


if __name__ == "__main__":
    main()
