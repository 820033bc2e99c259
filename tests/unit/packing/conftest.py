"""These tests run the kernels as plain Python, which needs no compiling; `test_compiled.py` holds the compiled ones to the same results."""

import os

os.environ.setdefault("NOVACRON_NUMBA", "off")
