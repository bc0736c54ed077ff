"""Machines to simulate: what a step costs on them, and how many pages they have. No torch.

A machine is a cost model, a page pool and the limits of its scheduler. Measured ones come from the JSON that
`polybatch calibrate` writes, the built-in ones, too. `scaled` derives another model size or tensor-parallel
degree: an estimate, and marked as one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from polybatch.config import PoolSpec
from polybatch.errors import ConfigError
from polybatch.scheduling.cost_profile import CostProfile, load_profile
from polybatch.scheduling.costs import CostModel, StepCosts, StepShape

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One engine: model, device and memory.

    costs: seconds of a step. pool: pages for KV and adapters; page_bytes is per layer.
    adapter_bytes_per_rank: of an adapter's rows, in all layers. link_bytes_per_s: at which KV leaves or
    reaches it. max_num_batched_tokens, max_num_seqs, max_model_len: as in `SchedulerConfig`.
    num_devices: by which goodput is divided. is_estimate: derived, not measured.
    """

    name: str
    costs: StepCosts
    pool: PoolSpec
    adapter_bytes_per_rank: float
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    max_model_len: int = 131_072
    link_bytes_per_s: float = 25e9
    num_devices: int = 1
    is_estimate: bool = False

    @property
    def kv_bytes_per_token(self) -> float:
        return self.pool.page_bytes * self.pool.num_layers / self.pool.page_size

    def adapter_pages(self, rank: int) -> int:
        """Pages that an adapter of this rank takes."""
        return max(
            1, round(self.adapter_bytes_per_rank * rank / (self.pool.page_bytes * self.pool.num_layers))
        )

    def prefill_s(self, num_tokens: int) -> float:
        """Time of a prompt alone, in steps as large as the token budget allows."""
        total, start = 0.0, 0
        while start < num_tokens:
            n_new = min(self.max_num_batched_tokens, num_tokens - start)
            total += self.costs.predict(
                StepShape(
                    num_tokens=n_new, num_prefill_tokens=n_new, num_logits=1, num_prefills=1,
                    prefill_context=start + n_new,
                    prefill_pairs=n_new * start + n_new * (n_new + 1) // 2,
                )
            )  # fmt: skip
            start += n_new
        return total

    def decode_s(self, batch: int, context: int) -> float:
        """Time of a step in which `batch` sequences of `context` tokens decode."""
        return self.costs.predict(
            StepShape(num_tokens=batch, num_decodes=batch, decode_context=batch * context, num_logits=batch)
        )

    def request_s(self, num_input: int, num_output: int, batch: int = 1) -> float:
        """Time that a request takes where `batch` others like it decode beside it."""
        context = num_input + num_output // 2
        return self.prefill_s(num_input) + (num_output - 1) * self.decode_s(batch, context)


def h100_8b() -> Machine:
    """Llama-3.1-8B in bfloat16 on one H100 of 80 GB, as `benchmarks.cuda.calibration` measured it.

    A page of 16 tokens is 2 MiB over 32 layers; 27,600 of them are left beside 16 GB of weights. Steps were
    measured up to contexts of 16,384; beyond, the model's straight lines go on.
    """
    found = _profiled("h100-8b")
    return replace(found, pool=replace(found.pool, num_pages=27_600), max_model_len=131_072)


def cpu_135m() -> Machine:
    """SmolLM2-135M with int4 weights on two cores of an AMD EPYC that others used as well."""
    return _profiled("cpu-135m")


def _profiled(name: str) -> Machine:
    """The machine of a profile that comes with the package."""
    path = Path(__file__).parent / "profiles" / f"{name}.json"
    return machine_of(load_profile(path), name)


BUILT_IN = {"h100-8b": h100_8b, "cpu-135m": cpu_135m}


def scaled(
    machine: Machine,
    *,
    parameters: float = 1.0,
    num_devices: int = 1,
    arithmetic: float = 1.0,
    bandwidth: float = 1.0,
) -> Machine:
    """An estimate of a larger model, of several devices that share one (tensor parallelism), or of others.

    parameters: the new model's size as a multiple of the old one's. Weights, arithmetic and adapters grow
    with it; KV per token with its square root, as depth and width both grow. Each of `num_devices` does its
    part of all that at 85 % efficiency, launches all of it, and holds its part of weights and pages; the
    memory that the weights do not take, and the cost of the sums between devices, are not known here: check
    pages and steps by hand. arithmetic, bandwidth: how many times as fast the other device computes and reads
    its memory; its host and its link are taken to be the same.
    """
    if parameters <= 0 or num_devices < 1 or arithmetic <= 0 or bandwidth <= 0:
        raise ConfigError(
            f"parameters is {parameters}, num_devices is {num_devices}, arithmetic is {arithmetic} and "
            f"bandwidth is {bandwidth}; they must be positive: give multiples of the measured machine"
        )
    costs = machine.costs
    if not isinstance(costs, CostModel):
        raise ConfigError(f"machine {machine.name} has no linear cost model to scale: name a calibrated one")
    share = 1.0 if num_devices == 1 else 1 / (0.85 * num_devices)
    wide, kv = parameters * share, parameters**0.5 * share
    factors = {
        **dict.fromkeys(("per_token", "per_token_beyond", "per_adapter_work"), wide / arithmetic),
        "per_pair": kv / arithmetic,
        **dict.fromkeys(("base", "per_head", "per_largest_page", "per_adapter_token"), wide / bandwidth),
        **dict.fromkeys(("per_context", "per_shared_context", "per_prefill_context"), kv / bandwidth),
        "per_adapter_page": share / bandwidth, "per_load_page": share,
    }  # fmt: skip
    # Up to the hinge, arithmetic hides behind memory.
    scaled_costs = replace(
        costs,
        hinge=round(costs.hinge * arithmetic / bandwidth),
        **{name: getattr(costs, name) * by for name, by in factors.items()},
    )
    pages = int(machine.pool.num_pages * num_devices / parameters**0.5)
    pool = replace(
        machine.pool, num_pages=max(1, pages), page_bytes=int(machine.pool.page_bytes * parameters**0.5)
    )
    return replace(
        machine, name=f"{machine.name}*{parameters:g}/tp{num_devices}", costs=scaled_costs, pool=pool,
        adapter_bytes_per_rank=machine.adapter_bytes_per_rank * parameters, num_devices=num_devices,
        is_estimate=True,
    )  # fmt: skip


def machine_named(name: str) -> Machine:
    """A built-in machine. Raises ConfigError for an unknown name."""
    if name not in BUILT_IN:
        raise ConfigError(
            f"machine is {name!r}; it must be a profile's JSON file or one of {', '.join(BUILT_IN)}: "
            "measure this one with polybatch calibrate"
        )
    return BUILT_IN[name]()


def load_machine(name: str) -> Machine:
    """A built-in machine, or a profile from a file. Raises ConfigError for neither."""
    path = Path(name)
    if name in BUILT_IN or not path.is_file():
        return machine_named(name)
    return machine_of(load_profile(path), path.stem)


def machine_of(profile: CostProfile, name: str) -> Machine:
    """The machine that a profile was measured on."""
    pool, limits = profile.pool, profile.limits
    return Machine(
        name=name,
        costs=profile.model,
        pool=PoolSpec(
            num_pages=pool.num_pages, page_size=pool.page_size, page_bytes=pool.page_bytes,
            num_layers=pool.num_layers,
        ),
        adapter_bytes_per_rank=profile.adapter_bytes_per_rank,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
        num_devices=profile.key.tensor_parallel_size,
    )  # fmt: skip
