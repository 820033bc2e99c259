"""For every test: what Hypothesis may do.

It asserts on no wall time (its default deadline of 200 ms fails on a busy machine, and so does its health check of how long the drawing takes). The ordinary run draws the same examples each time, so that a change fails for what it changed;
`make fuzz` draws new ones, and more.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile("novacron", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fuzz", deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "novacron"))
