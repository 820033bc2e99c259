"""`python -m hub`."""

import sys

from .cli import main

sys.exit(main())
