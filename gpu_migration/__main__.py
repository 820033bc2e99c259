"""`python -m gpu_migration`."""

import sys

from .cli import main

sys.exit(main())
