"""`python -m gpu_migration`."""

import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads for matrices, of which there are none here, take processor time and memory at the start

from .cli import main

sys.exit(main())
