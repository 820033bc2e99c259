"""`python -m tools.novactl`."""

import sys

from .cli import main

sys.exit(main())
