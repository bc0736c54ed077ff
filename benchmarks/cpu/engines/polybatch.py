"""Polybatch in process. Precision: float32, bfloat16, int8, int4. Options: any keyword of `LLM`, as JSON."""

import importlib.metadata
import json
import time

from . import UnsupportedError

DTYPES = {"": "auto", "float32": "float32", "bfloat16": "bfloat16"}
QUANTIZATIONS = ("int8", "int4")


class Engine:
    def __init__(self, config):
        if config["precision"] not in (*DTYPES, *QUANTIZATIONS):
            raise UnsupportedError(f"precision {config['precision']!r} is not one of Polybatch's")
        import torch

        from polybatch import LLM, SamplingParams

        quantization = config["precision"] if config["precision"] in QUANTIZATIONS else None
        options = {"max_num_seqs": 64, "max_model_len": config["max_tokens"], "threads": config["threads"]}
        options |= {key: json.loads(value) for key, value in config["options"].items()}
        self.llm = LLM(
            config["model"],
            adapters=config["adapters"],
            dtype=DTYPES.get(config["precision"], "auto"),
            quantization=quantization,
            **options,
        )
        self.sampling_params = SamplingParams
        self.version = f"polybatch {importlib.metadata.version('polybatch')}, torch {torch.__version__}"

    def _params(self, request):
        return self.sampling_params(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True)

    def stream(self, request):
        tokens, stamps = [], []
        start = time.perf_counter()
        for output in self.llm.stream(
            request["token_ids"], self._params(request), adapter=request["adapter"]
        ):
            new = output.outputs[0].token_ids[len(tokens) :]
            stamps += [time.perf_counter() - start] * len(new)
            tokens += new
        return tokens, stamps

    def batch(self, requests):
        outputs = self.llm.generate(
            [request["token_ids"] for request in requests],
            [self._params(request) for request in requests],
            adapter=[request["adapter"] for request in requests],
        )
        return [output.outputs[0].token_ids for output in outputs]

    def close(self):
        self.llm.close()
