"""Settings of every test run; shared helpers are in `helpers.py`, beside this file."""

import os

# Tests work on tiny tensors, for which waking threads costs many times the work. Read when torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
