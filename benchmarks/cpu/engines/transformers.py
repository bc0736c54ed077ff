"""Hugging Face transformers, with PEFT for adapters. Precision: float32, bfloat16 (the default), float16.

The whole batch is one padded `generate` call; adapters are mixed within it by PEFT's `adapter_names`.
Options: lora=mixed (the default) or merge (one call per adapter with merged weights), attention=sdpa.
"""

import time

from . import UnsupportedError

PRECISIONS = ("float32", "bfloat16", "float16")


class _Clock:
    """A streamer that notes when tokens come; its first call carries the prompt."""

    def __init__(self):
        self.times, self.calls = [], 0

    def put(self, _value):
        self.calls += 1
        if self.calls > 1:
            self.times.append(time.perf_counter())

    def end(self):
        pass


class Engine:
    def __init__(self, config):
        precision = config["precision"] or "bfloat16"
        if precision not in PRECISIONS:
            raise UnsupportedError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
        import torch
        import transformers

        torch.set_num_threads(config["threads"])
        self.torch = torch
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        options = config["options"]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            config["model"],
            dtype=getattr(torch, precision),
            attn_implementation=options.get("attention", "sdpa"),
        ).eval()
        self.adapters = list(config["adapters"])
        self.merges = options.get("lora", "mixed") == "merge"
        if self.adapters:
            self._load_adapters(config["adapters"])
        self.arguments = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def _load_adapters(self, paths):
        import peft

        self.version += f", peft {peft.__version__}"
        first, *others = self.adapters
        self.model = peft.PeftModel.from_pretrained(self.model, paths[first], adapter_name=first)
        for name in others:
            self.model.load_adapter(paths[name], adapter_name=name)
        self.model.eval()

    def stream(self, request):
        clock = _Clock()
        with self.torch.inference_mode():
            start = time.perf_counter()
            tokens = self._generate([request], streamer=clock)
        return tokens[0], [at - start for at in clock.times]

    def batch(self, requests):
        with self.torch.inference_mode():
            if not self.adapters:
                return self._generate(requests)
            if self.merges:
                return self._merged(requests)
            names = [request["adapter"] or "__base__" for request in requests]
            return self._generate(requests, adapter_names=names)

    def _merged(self, requests):
        outputs = [None] * len(requests)
        for adapter in sorted({request["adapter"] or "" for request in requests}):
            rows = [i for i, request in enumerate(requests) if (request["adapter"] or "") == adapter]
            chosen = [requests[i] for i in rows]
            if not adapter:
                with self.model.disable_adapter():
                    tokens = self._generate(chosen)
            else:
                self.model.set_adapter(adapter)
                self.model.merge_adapter([adapter])
                tokens = self._generate(chosen)
                self.model.unmerge_adapter()
            for row, output in zip(rows, tokens, strict=True):
                outputs[row] = output
        return outputs

    def _generate(self, requests, **arguments):
        """One call, padded on the left."""
        width = max(len(request["token_ids"]) for request in requests)
        ids = self.torch.zeros((len(requests), width), dtype=self.torch.long)
        mask = self.torch.zeros_like(ids)
        for row, request in enumerate(requests):
            length = len(request["token_ids"])
            ids[row, width - length :] = self.torch.tensor(request["token_ids"])
            mask[row, width - length :] = 1
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(request["max_tokens"] for request in requests),
            **self.arguments,
            **arguments,
        )
        return output[:, width:].tolist()

    def close(self):
        pass
