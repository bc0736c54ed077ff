"""`LLM`: the engine in this process, called synchronously.

    llm = LLM("smollm2-135m-instruct", adapters={"sql": "adapters/sql"})
    outputs = llm.generate(["Hello", "How many users?"], SamplingParams(max_tokens=32), adapter=[None, "sql"])

All prompts of a call share batches, whatever adapter and parameters each has. Not thread-safe.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from polybatch.adapters.store import AdapterStore
from polybatch.config import ModelSpec, ServiceLevels
from polybatch.engine.chat_templates import with_template
from polybatch.engine.config import EngineConfig, ResolvedConfig, adapter_bytes, resolve_dtype
from polybatch.engine.core import EngineCore
from polybatch.engine.cost_files import cost_key, costs_for
from polybatch.engine.executors import build_executor, settle
from polybatch.engine.heap import collector_paused, freeze_heap
from polybatch.engine.ports import TextTokenizer
from polybatch.engine.stats import EngineStats
from polybatch.errors import ConfigError, EngineError, RequestError
from polybatch.execution.executor import PackingExecutor
from polybatch.mixture import AdapterChoice, Mixture, choice_of, is_pairs
from polybatch.models.loader import load_model
from polybatch.request import AdapterRef, Request, RequestOutput, SamplingParams
from polybatch.scheduling.policies import BATCH_PRIORITY
from polybatch.scheduling.scheduler import Scheduler

logger = logging.getLogger("polybatch.engine")

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
Adapters = AdapterChoice | Sequence[AdapterChoice]


class LLM:
    """A base model with its adapters, ready to answer.

    model: built-in name, Hugging Face directory or hub name, GGUF file, or "random:<config>".
    adapters: name -> PEFT directory. tokenizer: instead of the checkpoint's. chat_template: the same, a file
        of Jinja or the text itself.
    memory: for KV and adapters together, in bytes or as text such as "2GiB"; the weights come on top. None
        takes a quarter of the memory that is free, but never more than max_num_seqs sequences can fill; on a
        GPU all that is left.
    The other settings are those of `EngineConfig`.

    Raises ConfigError, ModelError or AdapterError before anything runs.
    """

    def __init__(
        self,
        model: str,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        quantization: str | None = None,
        max_model_len: int | None = None,
        memory: int | str | None = None,
        max_num_batched_tokens: int | None = None,
        max_num_seqs: int = 256,
        enable_prefix_caching: bool = True,
        seed: int = 0,
        policy: str = "fcfs",
        service: ServiceLevels | Mapping[str, Any] | None = None,
        adapter_cluster: int | None = None,
        stage_times: Mapping[str, float] | None = None,
        executor: str = "auto",
        threads: int | None = None,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float | None = None,
        tokenizer: TextTokenizer | None = None,
        chat_template: str | None = None,
    ) -> None:
        config = EngineConfig(
            dtype=dtype, device=device, quantization=quantization, max_model_len=max_model_len,
            memory=memory, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs,
            enable_prefix_caching=enable_prefix_caching, seed=seed, policy=policy, executor=executor,
            service=service if isinstance(service, ServiceLevels) else ServiceLevels.of(service or {}),
            adapter_cluster=adapter_cluster, stage_times=stage_times or {},
            threads=threads, tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
        )  # fmt: skip
        loaded = load_model(str(model))
        tokenizer = with_template(tokenizer or loaded.tokenizer, chat_template)
        needed = adapter_bytes((adapters or {}).values(), resolve_dtype(config))
        self.config = settle(config, loaded.spec, needed)
        with collector_paused():
            runner = build_executor(loaded.weights, self.config, model=str(loaded.path or model))
        pack = runner.pack_adapter if isinstance(runner, PackingExecutor) else None
        store = AdapterStore(loaded.weights, runner.adapter_pages, pack)
        self.cost_key = cost_key(self.config, str(model), loaded.fingerprint)
        costs = costs_for(self.cost_key)
        # What is only learned on the way is planned by where somebody asks for promises.
        known = costs if costs.is_calibrated or self.config.scheduler.service != ServiceLevels() else None
        scheduler = Scheduler(self.config.scheduler, runner.pool, loaded.fingerprint, costs=known)
        self._attach(
            EngineCore(
                runner,
                scheduler,
                tokenizer,
                store,
                max_model_len=self.config.scheduler.max_model_len,
                seed=seed,
                costs=costs,
            ),
            str(model),
        )
        self._thaw = freeze_heap()
        try:
            for name, path in (adapters or {}).items():
                self.add_adapter(name, path)
        except BaseException:
            self.close()
            raise
        _log_summary(self.model, self.config, runner.describe(), len(store.list()))

    @classmethod
    def from_core(cls, core: EngineCore, model: str = "stub") -> LLM:
        """An LLM around an engine that was put together by hand, for stubs and tests."""
        llm = cls.__new__(cls)
        llm._attach(core, model)
        return llm

    def _attach(self, core: EngineCore, model: str) -> None:
        self.core = core
        self.model = model
        self._boxes: dict[str, list[RequestOutput]] = {}
        self._num_requests = 0
        self._is_closed = False
        self._thaw = lambda: None

    @property
    def spec(self) -> ModelSpec:
        return self.core.executor.spec

    @property
    def tokenizer(self) -> TextTokenizer | None:
        return self.core.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: Adapters = None,
        *,
        priority: int | Sequence[int] = 0,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts; one output per prompt, in their order.

        prompts: a text, a list of token ids, or a list of either.
        sampling_params, adapter, priority: one for all prompts or one for each. An adapter is a name, None
            for the base model, or a mixture: [("a", 0.7), ("b", 0.3)]. progress: show a bar.
        With policy "prefix_groups" several prompts are a job: planned as a whole, after what streams.
        Raises RequestError, before anything runs, that says which of several prompts is at fault.
        EngineError if a step fails. Nothing stays in the engine then, nor after an interrupt.
        """
        return self._run(_as_prompts(prompts), sampling_params, adapter, priority, progress)

    def chat(
        self,
        conversations: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: Adapters = None,
        *,
        priority: int | Sequence[int] = 0,
        progress: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, each a list of {"role", "content"} messages; see `generate`.

        chat_template_kwargs: further variables of the model's chat template.
        """
        is_one = bool(conversations) and isinstance(conversations[0], Mapping)
        listed: Sequence[Any] = [conversations] if is_one else conversations
        texts = []
        with _naming(len(listed)) as at:
            for at.index, messages in enumerate(listed):
                texts.append(self.core.door.render_chat(messages, **(chat_template_kwargs or {})))
        return self._run(texts, sampling_params, adapter, priority, progress, add_special_tokens=False)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, adapter: AdapterChoice = None
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, yielding all that there is after every step that adds to it.

        Raises RequestError at once. Leaving the loop aborts the request.
        """
        return self._stream(self._prepare([prompt], sampling_params, adapter, 0)[0])

    def add_adapter(self, name: str, path: str | Path) -> AdapterRef:
        """Register a PEFT directory under a name; a name in use gets the new weights.

        Raises AdapterError, changing nothing, if it cannot be served.
        """
        return self._store.register(name, path)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; requests that use it end undisturbed. Raises RequestError if unknown."""
        self._store.remove(name)

    def list_adapters(self) -> list[str]:
        return [ref.name for ref in self._store.list()]

    def stats(self) -> EngineStats:
        return self.core.stats()

    def close(self) -> None:
        """Stop threads and give memory back. Idempotent; nothing can be generated afterwards."""
        self._is_closed = True
        self.core.executor.close()
        self._thaw()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _store(self) -> AdapterStore:
        store = self.core.store
        if not isinstance(store, AdapterStore):
            raise ConfigError("this engine was put together without an adapter store")
        return store

    def _prepare(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: Adapters,
        priority: int | Sequence[int],
        add_special_tokens: bool = True,
    ) -> list[Request]:
        if self._is_closed:
            raise ConfigError("this LLM is closed: create another")
        params = _spread("sampling_params", sampling_params, len(prompts), (SamplingParams, type(None)))
        adapters = _spread("adapter", _choices(adapter), len(prompts), (str, Mixture, type(None)))
        priorities = _spread("priority", priority, len(prompts), (int,))
        if len(prompts) > 1 and self.core.scheduler.is_planning:
            priorities = [BATCH_PRIORITY] * len(prompts)
        requests = []
        with _naming(len(prompts)) as at:
            for at.index, prompt in enumerate(prompts):
                request = self.core.door.prepare(
                    f"llm-{self._num_requests}", prompt, params[at.index], adapters[at.index],
                    priority=priorities[at.index], add_special_tokens=add_special_tokens,
                )  # fmt: skip
                self._num_requests += 1
                requests.append(request)
        return requests

    def _run(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: Adapters,
        priority: int | Sequence[int],
        progress: bool,
        add_special_tokens: bool = True,
    ) -> list[RequestOutput]:
        done: list[RequestOutput] = []
        with contextlib.ExitStack() as stack:
            with collector_paused():
                requests = self._prepare(prompts, sampling_params, adapter, priority, add_special_tokens)
                stack.enter_context(self._open(requests, done, is_streamed=False))
            show = stack.enter_context(_bar(len(requests), progress))
            while len(done) < len(requests):
                self._step()
                show(len(done))
        order = {request.request_id: index for index, request in enumerate(requests)}
        return sorted(done, key=lambda output: order[output.request_id])

    def _stream(self, request: Request) -> Iterator[RequestOutput]:
        box: list[RequestOutput] = []
        with self._open([request], box, is_streamed=True):
            is_finished = False
            while not is_finished:
                if not box:
                    self._step()
                while box:
                    output = box.pop(0)
                    is_finished = output.finished
                    yield output

    @contextlib.contextmanager
    def _open(
        self, requests: Sequence[Request], box: list[RequestOutput], is_streamed: bool
    ) -> Iterator[None]:
        """Have the outputs of requests put in a box; on the way out none of them stays in the engine.

        On a device that works apart from Python the first step is started as soon as there is enough for it.
        """
        scheduler = self.core.scheduler
        num_first = scheduler.num_to_begin(requests) if self.core.can_work_ahead else len(requests)
        try:
            with _naming(len(requests)) as at:
                for at.index in range(num_first, len(requests)):
                    scheduler.check_request(requests[at.index])
                for at.index, request in enumerate(requests):
                    if at.index == num_first:
                        self._step()
                    self.core.submit(request, stream=is_streamed)
                    self._boxes[request.request_id] = box
            yield
        finally:
            for request in requests:
                self.core.abort(request.request_id)
                self._boxes.pop(request.request_id, None)

    def _step(self) -> None:
        """One step for all open calls; a stream may be read while `generate` is called in its loop."""
        if not self.core.has_work():
            raise EngineError("the engine has no work left, yet requests have no output")
        outputs: list[RequestOutput] = []
        try:
            outputs = self.core.step()
        except BaseException:
            outputs = self.core.drain()
            raise
        finally:
            for output in outputs:
                box = self._boxes.get(output.request_id)
                if box is not None:
                    box.append(output)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _choices(adapter: Adapters) -> Any:
    """Pairs made mixtures, be they one for all prompts or in a list with one entry per prompt."""
    if isinstance(adapter, (list, tuple)) and not is_pairs(adapter):
        return [choice_of(entry) for entry in adapter]
    return choice_of(adapter)  # type: ignore[arg-type]


def _spread(name: str, value: Any, count: int, kinds: tuple[type, ...]) -> Sequence[Any]:
    """One value per prompt: the only one repeated, or those of a list as long as the prompts."""
    if isinstance(value, kinds):
        return [value] * count
    if not isinstance(value, Sequence) or not all(isinstance(entry, kinds) for entry in value):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise RequestError(f"{name} is {value!r}; it must be {names}, or a list, one per prompt", field=name)
    if len(value) != count:
        raise RequestError(
            f"{name} has {len(value)} entries for {count} prompts: give one, or one for each", field=name
        )
    return value


@dataclass(slots=True)
class _Place:
    """Which of several prompts it is about."""

    index: int = 0


@contextlib.contextmanager
def _naming(count: int) -> Iterator[_Place]:
    """Say in a RequestError which of several prompts it is about: the one whose index was set last."""
    at = _Place()
    try:
        yield at
    except RequestError as error:
        if count == 1:
            raise
        raise RequestError(f"prompt {at.index} of {count}: {error}", field=error.field) from error


@contextlib.contextmanager
def _bar(total: int, is_shown: bool) -> Iterator[Callable[[int], None]]:
    if not is_shown:
        yield lambda done: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("requests", total=total)
        yield lambda done: bar.update(task, completed=done)


def _log_summary(model: str, config: ResolvedConfig, kernels: Mapping[str, str], num_adapters: int) -> None:
    pool = config.pool
    logger.info(
        "%s on %s: %s, %s; %d pages of %d tokens (%.2f GiB), max_model_len %d, %d adapters; %s",
        model,
        config.executor,
        config.dtype,
        config.quantization or "not quantised",
        pool.num_pages,
        pool.page_size,
        pool.total_bytes / 2**30,
        config.scheduler.max_model_len,
        num_adapters,
        ", ".join(f"{name}: {kernel}" for name, kernel in kernels.items()),
    )
