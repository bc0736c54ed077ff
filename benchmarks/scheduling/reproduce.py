"""What the papers found, found again: each experiment states a claim and writes what came of it.

    python -m benchmarks.scheduling.reproduce [NAME ...] [--machine NAME|PROFILE]

Every result is a JSON file under benchmarks/results/scheduling/ with the claim, whether it holds, and all
numbers. Exit status 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.scheduling import (
    deadlines,
    distserve,
    groups,
    hexgen,
    live_deadlines,
    live_offline,
    sarathi,
    sarathi_capacity,
    slora,
)
from polybatch import __version__
from polybatch.simulate.machines import Machine, load_machine

RESULTS = Path(__file__).parents[1] / "results" / "scheduling"

EXPERIMENTS: dict[str, Callable[[Machine], dict[str, Any]]] = {
    "sarathi_long_prompts": sarathi.long_prompts,
    "sarathi_capacity": sarathi_capacity.capacity,
    "sarathi_a100": sarathi_capacity.on_a100,
    "slora_admission": slora.admission,
    "slora_adapters": slora.adapters,
    "deadline_overload": deadlines.overload,
    "deadline_traces": deadlines.on_traces,
    "live_deadlines": live_deadlines.attainment,
    "live_offline": live_offline.live_and_offline,
    "distserve_goodput": distserve.goodput,
    "hexgen_slo_scale": hexgen.slo_scale,
    "batchllm_groups": groups.shared_prefixes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Reproduce published orderings in the simulator.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}; default all")
    parser.add_argument("--machine", default="h100-8b", help="a built-in machine or a calibrated profile")
    args = parser.parse_args()
    names = args.names or [n for n in EXPERIMENTS if n != "deadline_traces" or deadlines.DATA.is_dir()]
    if unknown := set(names) - EXPERIMENTS.keys():
        parser.error(f"{sorted(unknown)[0]!r} is no experiment; there are {', '.join(EXPERIMENTS)}")
    machine = load_machine(args.machine)
    RESULTS.mkdir(parents=True, exist_ok=True)
    is_good = True
    for name in names:
        started = time.process_time()
        found = EXPERIMENTS[name](machine)
        content = {
            "experiment": name,
            **found,
            "command": f"python -m benchmarks.scheduling.reproduce {name}",
            "machine": machine.name,
            "version": __version__,
            "cpu_s": round(time.process_time() - started, 1),
        }
        (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
        print(
            json.dumps({key: content[key] for key in ("experiment", "claim", "holds", "cpu_s")}), flush=True
        )
        is_good &= bool(found["holds"])
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
