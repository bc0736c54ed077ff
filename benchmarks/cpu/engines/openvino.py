"""OpenVINO GenAI's continuous batching. The model is an exported folder; its precision is the export's.

Adapters hold for a whole call, so that a batch with several becomes one call per adapter.
Options: inference=bf16|f32|f16, kv=u8|bf16|f16, cache_gib=1, batched_tokens=512, prefix=1.
"""

import time
from pathlib import Path

from . import UnsupportedError


class Engine:
    def __init__(self, config):
        if not (Path(config["model"]) / "openvino_model.xml").exists():
            raise UnsupportedError("the model must be an exported OpenVINO folder")
        import numpy
        import openvino
        import openvino_genai

        self.numpy, self.openvino, self.genai = numpy, openvino, openvino_genai
        self.version = f"openvino-genai {openvino_genai.__version__}"
        options = config["options"]
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = int(options.get("cache_gib", "1"))
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = int(options.get("batched_tokens", "512"))
        scheduler.enable_prefix_caching = options.get("prefix", "1") == "1"
        scheduler.dynamic_split_fuse = True
        properties = {
            "INFERENCE_NUM_THREADS": config["threads"],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        if "inference" in options:
            properties["INFERENCE_PRECISION_HINT"] = options["inference"]
        if "kv" in options:
            properties["KV_CACHE_PRECISION"] = options["kv"]
        self.adapters = {
            name: openvino_genai.Adapter(str(Path(folder) / "adapter_model.safetensors"))
            for name, folder in config["adapters"].items()
        }
        if self.adapters:
            registered = openvino_genai.AdapterConfig()
            for adapter in self.adapters.values():
                registered.add(adapter, 2.0)
            properties["adapters"] = registered
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            config["model"], scheduler, "CPU", properties
        )
        self.num_requests = 0

    def _generation(self, request):
        generation = self.genai.GenerationConfig()
        generation.max_new_tokens = generation.min_new_tokens = request["max_tokens"]
        generation.ignore_eos = True
        generation.do_sample = False
        if self.adapters:
            chosen = self.genai.AdapterConfig()
            if request["adapter"] is not None:
                chosen.add(self.adapters[request["adapter"]], 2.0)
            generation.adapters = chosen
        return generation

    def _prompt(self, request):
        return self.openvino.Tensor(self.numpy.array([request["token_ids"]], dtype=self.numpy.int64))

    def stream(self, request):
        tokens, stamps = [], []
        start = time.perf_counter()
        handle = self.pipeline.add_request(
            self.num_requests, self._prompt(request), self._generation(request)
        )
        self.num_requests += 1
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            if handle.can_read():
                for output in handle.read().values():
                    tokens += list(output.generated_ids)
                    stamps += [time.perf_counter() - start] * len(output.generated_ids)
        return tokens, stamps

    def batch(self, requests):
        outputs = [None] * len(requests)
        for adapter in dict.fromkeys(request["adapter"] for request in requests):
            rows = [i for i, request in enumerate(requests) if request["adapter"] == adapter]
            results = self.pipeline.generate(
                [self._prompt(requests[i]) for i in rows], [self._generation(requests[i]) for i in rows]
            )
            for row, result in zip(rows, results, strict=True):
                outputs[row] = list(result.m_generation_ids[0])
        return outputs

    def close(self):
        pass
