"""Every error that Polybatch raises on purpose, split by whose fault it is.

    PolybatchError
    ├── RequestError     the request is wrong; it alone fails (HTTP 4xx, or that row's error line)
    │   └── DeadlineError its deadlines cannot be met at this load (HTTP 429)
    ├── ConfigError      a flag, a config field or a combination of them is wrong; nothing starts
    │   ├── ModelError   the checkpoint cannot be served: missing, malformed or unsupported
    │   └── AdapterError the adapter cannot be served; the base model and other adapters can
    └── EngineError      our fault, or the machine's: a law of the engine was broken

A message names the field, the value, the limit and the way out.
"""


class PolybatchError(Exception):
    """Base of all errors raised on purpose."""


class RequestError(PolybatchError):
    """One request is invalid.

    field: the name of the offending parameter, as the user wrote it, or None.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class DeadlineError(RequestError):
    """The request is right, but its deadlines cannot be met now; the same may be possible later.

    wait_s: about how long there is to do before it, in seconds.
    """

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message, "deadlines")
        self.wait_s = wait_s


class ConfigError(PolybatchError):
    """A configuration value, or a combination of values, cannot work."""


class ModelError(ConfigError):
    """A checkpoint is missing, malformed or of an unsupported kind."""


class AdapterError(ConfigError):
    """An adapter is missing, malformed or uses something that is not supported."""


class EngineError(PolybatchError):
    """A law of the engine itself was broken, or the machine failed it."""
