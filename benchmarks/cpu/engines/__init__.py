"""Engines behind two calls, one module each. They run in the worker's interpreter, which may lack Polybatch.

A module has a class `Engine(config)`, where config has

    model      path or name, as the engine wants it
    precision  the part of the engine's name after the colon, such as "bfloat16", or ""
    threads    CPU threads to compute with
    adapters   name -> PEFT directory of the LoRAs to register, may be empty
    ranks      name -> rank of the same
    max_tokens longest prompt + output of the workload
    options    further settings, text -> text

and which offers `version`, `stream(request) -> (tokens, stamps)`, `batch(requests) -> list of token lists`
and `close()`. A request is a dict: token_ids, max_tokens, adapter (a name or None). Stamps are seconds from
the start. Requests are greedy, end-of-sequence is ignored. An engine that cannot do what config asks raises
`UnsupportedError`.
"""


class UnsupportedError(Exception):
    """The engine cannot run this workload or precision; the message says why."""
