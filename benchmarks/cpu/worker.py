"""The process that holds one engine: reads one JSON command a line from stdin, answers one a line on stdout.

    {"op": "load", "kind": "vllm", "config": {...}}     -> {"version": ..., "load_s": ...}
    {"op": "stream", "requests": [request]}             -> {"total_s": ..., "tokens": [...], "stamps": [...]}
    {"op": "batch", "requests": [...], "prime": false}  -> {"total_s": ..., "tokens": [...], "stamps": []}
    {"op": "close"}

A failure answers {"error": ..., "unsupported": true | false}. Needs the standard library and the engine
alone, so that any interpreter can run it. What engines print goes to stderr.
"""

import importlib
import json
import os
import sys
import time
import traceback

from engines import UnsupportedError


def _timed(engine, command):
    requests = command["requests"]
    if command["op"] == "stream":
        start = time.perf_counter()
        tokens, stamps = engine.stream(requests[0])
        return {"total_s": time.perf_counter() - start, "tokens": [tokens], "stamps": stamps}
    start = time.perf_counter()
    # Priming puts a prefix in common into the cache with one request before the others come.
    head = 1 if command.get("prime") else 0
    tokens = engine.batch(requests[:head]) if head else []
    tokens += engine.batch(requests[head:])
    return {"total_s": time.perf_counter() - start, "tokens": tokens, "stamps": []}


def _answer(state, command):
    if command["op"] == "load":
        start = time.perf_counter()
        module = importlib.import_module(f"engines.{command['kind']}")
        state["engine"] = module.Engine(command["config"])
        return {"version": state["engine"].version, "load_s": time.perf_counter() - start}
    if command["op"] == "close":
        if "engine" in state:
            state["engine"].close()
        return {}
    return _timed(state["engine"], command)


def main():
    # The engines' own prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    state = {}
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = _answer(state, command)
        except Exception as error:  # noqa: BLE001 - whatever an engine raises is the answer
            traceback.print_exc()
            answer = {
                "error": f"{type(error).__name__}: {error}"[:2000],
                "unsupported": isinstance(error, UnsupportedError | ModuleNotFoundError),
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if command["op"] == "close":
            break


if __name__ == "__main__":
    main()
