"""The pure rooms run where torch is not: in a simulator, a planner, a front end."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import importlib, pkgutil, sys

sys.modules["torch"] = None
names = ["polybatch.request", "polybatch.mixture", "polybatch.config", "polybatch.errors"]
for room in ("polybatch.scheduling", "polybatch.memory"):
    package = importlib.import_module(room)
    names += [f"{room}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
for name in names:
    importlib.import_module(name)
heavy = {"numpy", "numba", "transformers"} & set(sys.modules)
assert not heavy, heavy
print(len(names))
"""

SIMULATOR = """
import importlib, pkgutil, sys

sys.modules["torch"] = None
package = importlib.import_module("polybatch.simulate")
names = [module.name for module in pkgutil.walk_packages(package.__path__, "polybatch.simulate.")]
for name in names:
    importlib.import_module(name)
above = ("cli", "server", "jobs", "bench", "engine", "execution", "kernels", "sampling", "models")
found = [name for name in sys.modules if name.startswith(tuple(f"polybatch.{room}" for room in above))]
assert not found, found
print(len(names))
"""


def test_scheduling_memory_and_the_nouns_import_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 13


def test_the_simulator_imports_no_torch_and_only_scheduling_memory_and_the_nouns() -> None:
    done = subprocess.run([sys.executable, "-c", SIMULATOR], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 13
