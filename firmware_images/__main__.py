"""`python -m firmware_images`."""

import sys

from .cli import main

sys.exit(main())
