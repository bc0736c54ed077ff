"""vLLM's CPU build, engine in the same process. Precision: bfloat16 (the default), float32, or int8 for a
checkpoint that is quantised so. Options: kv_gib=1, eager=0|1, prefix=1, batched_tokens, threads_bind.
"""

import os
import time

from . import UnsupportedError

DTYPES = {"": "bfloat16", "bfloat16": "bfloat16", "float32": "float32", "int8": "bfloat16"}


class Engine:
    def __init__(self, config):
        if config["precision"] not in DTYPES:
            raise UnsupportedError(
                f"precision {config['precision']!r} is not one of {', '.join(filter(None, DTYPES))}"
            )
        options = config["options"]
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = options.get("kv_gib", "1")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if "threads_bind" in options:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = options["threads_bind"]
        import torch
        import vllm
        from vllm.lora.request import LoRARequest

        self.vllm = vllm
        arguments = {}
        if "batched_tokens" in options:
            arguments["max_num_batched_tokens"] = int(options["batched_tokens"])
        if config["adapters"]:
            count = len(config["adapters"])
            arguments |= {"enable_lora": True, "max_loras": count, "max_cpu_loras": count}
            arguments["max_lora_rank"] = max(8, *config["ranks"].values())
        self.llm = vllm.LLM(
            model=config["model"],
            dtype=DTYPES[config["precision"]],
            max_model_len=config["max_tokens"],
            max_num_seqs=64,
            enforce_eager=options.get("eager") == "1",
            enable_prefix_caching=options.get("prefix", "1") == "1",
            disable_log_stats=True,
            **arguments,
        )
        self.version = (
            f"vllm {vllm.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"
        )
        self.adapters = {
            name: LoRARequest(name, i, path) for i, (name, path) in enumerate(config["adapters"].items(), 1)
        }
        for adapter in self.adapters.values():
            self.llm.llm_engine.add_lora(adapter)

    def _params(self, request):
        return self.vllm.SamplingParams(
            temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False
        )

    def stream(self, request):
        engine = self.llm.llm_engine
        tokens, stamps = [], []
        start = time.perf_counter()
        prompt = {"prompt_token_ids": request["token_ids"]}
        adapter = self.adapters.get(request["adapter"])
        engine.add_request(f"stream-{start}", prompt, self._params(request), lora_request=adapter)
        while engine.has_unfinished_requests():
            for output in engine.step():
                new = list(output.outputs[0].token_ids)[len(tokens) :]
                stamps += [time.perf_counter() - start] * len(new)
                tokens += new
        return tokens, stamps

    def batch(self, requests):
        outputs = self.llm.generate(
            [{"prompt_token_ids": request["token_ids"]} for request in requests],
            [self._params(request) for request in requests],
            lora_request=[self.adapters.get(request["adapter"]) for request in requests]
            if self.adapters
            else None,
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self):
        pass
