"""Runs the server from start to shutdown.

SIGTERM or SIGINT: readiness turns false, no new work is taken, what runs may end within `drain_timeout_s`,
and what then still runs is told why it ends. SIGHUP: keys and tenants are read again. When the engine cannot
be brought back, the server ends as well.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from polybatch.engine.async_llm import AsyncLLM
from polybatch.engine.heap import freeze_heap
from polybatch.errors import ConfigError
from polybatch.server.app import create_app
from polybatch.server.batches.service import BatchService
from polybatch.server.config import ServerConfig
from polybatch.server.logs import report_status
from polybatch.server.protocol import limited_to
from polybatch.server.state import ServerState

logger = logging.getLogger("polybatch.server")

FLUSH_S = 5.0
"""For last events to reach their clients, after the requests have ended."""

FAILED_STATUS = 1
KEEP_ALIVE_S = 30


class DrainingServer(uvicorn.Server):
    """uvicorn, but requests in flight are ended with a reason rather than cancelled."""

    def __init__(self, state: ServerState) -> None:
        config = state.config
        if config.data_dir is not None:
            state.batches = BatchService(state, config.data_dir)
        super().__init__(
            uvicorn.Config(
                create_app(state), host=config.host, port=config.port,
                http=limited_to(config.max_connections), ws="none",
                loop="uvloop", lifespan="off", log_config=None, access_log=False, server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(config.drain_timeout_s + FLUSH_S) + 1,
            )
        )  # fmt: skip
        self._state = state

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain, another one ends it."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        config = self._state.config
        port = self.servers[0].sockets[0].getsockname()[1]
        address = f"http://{config.host}:{port}"
        logger.info(
            "serving %s on %s/v1, to watch at %s/dashboard", config.served_model_names[0], address, address
        )
        if self._state.batches is not None:
            self._state.batches.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self._drain())
        await super().shutdown(sockets)
        draining.cancel()
        if self._state.batches is not None:
            await self._state.batches.close()

    async def _drain(self) -> None:
        self._state.is_draining = True
        if self._state.batches is not None:
            await self._state.batches.stop()
        llm, limit_s = self._state.llm, self._state.config.drain_timeout_s
        logger.info("shutting down: %d requests may end within %g s", llm.num_in_flight, limit_s)
        try:
            async with asyncio.timeout(limit_s):
                await llm.wait_idle()
        except TimeoutError:
            logger.warning("shutting down: %d requests did not end in time", llm.num_in_flight)
            llm.fail_all(f"the server is shutting down, and this took longer than {limit_s:g} s more")


async def serve(llm: AsyncLLM, config: ServerConfig) -> int:
    """Start the engine, serve until told to stop; returns the exit status.

    Raises ConfigError, ModelError, AdapterError or EngineError if it cannot start.
    """
    # An address that is taken shall not be found out after minutes of loading.
    sockets = bind(config.host, config.port)
    # It would write a line for every malformed form.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    async with llm:
        state = ServerState.create(llm, config)
        if not config.is_local and state.keys.is_open:
            logger.warning(
                "listening on %s without API keys: anybody who can reach it may use it", config.host
            )
        server = DrainingServer(state)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload_tenants, state)
        failed = asyncio.create_task(_stop_when_failed(llm, server))
        reporting = asyncio.create_task(report_status(state.view))
        stop_tracing = _start_tracing(state)
        thaw = freeze_heap()
        await server.serve(sockets)
        thaw()
        is_failed = failed.done()
        failed.cancel()
        reporting.cancel()
        await asyncio.to_thread(stop_tracing)
    return FAILED_STATUS if is_failed else 0


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets of an address, which nobody can connect to yet. Raises ConfigError."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # A free port of the system's choice is one of one address.
        for family, kind, protocol, _, address in found if port else found[:1]:
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise ConfigError(
            f"--host {host} --port {port} cannot be listened on: {error.strerror}; choose others"
        ) from error
    return sockets


def reload_tenants(state: ServerState) -> None:
    """Take over what changed in the files; a file that is wrong is reported and the old content stays."""
    try:
        state.reload()
    except ConfigError as error:
        logger.error("keys and tenants stay as they were: %s", error)
    else:
        logger.info("keys of %d tenants were read", len(state.keys.tenants))


def _start_tracing(state: ServerState) -> Callable[[], None]:
    """Send spans of requests where the configuration says; returns what sends the last of them."""
    endpoint = state.config.otlp_traces_endpoint
    if endpoint is None:
        return lambda: None
    try:
        from polybatch.server.tracing import RequestTracer, open_provider

        provider = open_provider(endpoint, "polybatch")
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: pip install 'polybatch[tracing]'") from error
    model = state.config.served_model_names[0]
    state.llm.observer = RequestTracer(provider.get_tracer("polybatch"), model, state.meter)
    shutdown: Callable[[], None] = provider.shutdown
    return shutdown


async def _stop_when_failed(llm: AsyncLLM, server: uvicorn.Server) -> None:
    reason = await llm.wait_failed()
    logger.critical("the server ends, because the engine cannot be brought back: %s", reason)
    server.should_exit = True
