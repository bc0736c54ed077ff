"""llama.cpp's own server over loopback HTTP. The model is a GGUF file and brings its precision.

Adapters are NAME.gguf beside their PEFT directories (`prepare.py adapters` writes both).
Options: bin=path of llama-server (else taken from PATH), slots=64, ubatch=512, batch=2048, flags=further
flags.
"""

import http.client
import json
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import UnsupportedError

START_S = 120


class Engine:
    def __init__(self, config):
        options = config["options"]
        binary = shutil.which(options.get("bin", "llama-server"))
        if binary is None:
            raise UnsupportedError("llama-server was not found; give its path with the option bin")
        if not config["model"].endswith(".gguf"):
            raise UnsupportedError("the model must be a GGUF file")
        slots = int(options.get("slots", "64"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        threads = str(config["threads"])
        command = [binary, "-m", config["model"], "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["-t", threads, "-tb", threads, "-np", str(slots), "-c", str(slots * config["max_tokens"])]
        command += ["-ub", options.get("ubatch", "512"), "-b", options.get("batch", "2048"), "--no-warmup"]
        command += ["-lv", "1", *self._adapter_flags(config["adapters"]), *options.get("flags", "").split()]
        self.adapter_ids = {name: i for i, name in enumerate(config["adapters"])}
        self.version = self._read_version(binary)
        self.process = subprocess.Popen(command, stdout=sys.stderr, stderr=sys.stderr)
        self._wait()

    @staticmethod
    def _adapter_flags(adapters):
        files = [Path(folder).with_suffix(".gguf") for folder in adapters.values()]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise UnsupportedError(f"{len(missing)} adapters have no GGUF file: {missing[0]}, ...")
        return ["--lora", ",".join(map(str, files)), "--lora-init-without-apply"] if files else []

    @staticmethod
    def _read_version(binary):
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
        lines = [line for line in (said.stdout + said.stderr).splitlines() if "version" in line]
        return "llama.cpp " + (lines[0].partition("version:")[2].strip() if lines else "unknown")

    def _wait(self):
        for _ in range(START_S * 10):
            if self.process.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self.process.returncode}; see the log")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                # Not listening yet.
                pass
            time.sleep(0.1)
        raise RuntimeError(f"llama-server was not ready after {START_S} s")

    def _post(self, request, *, stream):
        body = {
            "prompt": request["token_ids"],
            "n_predict": request["max_tokens"],
            "ignore_eos": True,
            "samplers": ["top_k"],
            "top_k": 1,
            "temperature": 0,
            "cache_prompt": True,
            "return_tokens": True,
            "stream": stream,
        }
        if self.adapter_ids:
            # An empty list means every adapter at once; one at scale 0 means none.
            name = request["adapter"]
            used = {"id": 0, "scale": 0.0} if name is None else {"id": self.adapter_ids[name], "scale": 1.0}
            body["lora"] = [used]
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1800)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse()

    def stream(self, request):
        tokens, stamps = [], []
        start = time.perf_counter()
        for line in self._post(request, stream=True):
            if not line.startswith(b"data: ") or b"[DONE]" in line:
                continue
            event = json.loads(line[6:])
            new = [] if event.get("stop") else event.get("tokens", [])
            tokens += new
            stamps += [time.perf_counter() - start] * len(new)
        return tokens, stamps

    def batch(self, requests):
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(self._complete, requests))

    def _complete(self, request):
        answer = json.loads(self._post(request, stream=False).read())
        if "tokens" not in answer:
            raise RuntimeError(f"llama-server answered {answer}")
        return answer["tokens"]

    def close(self):
        self.process.terminate()
        self.process.wait(20)
