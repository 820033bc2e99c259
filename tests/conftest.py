"""For every test: Hypothesis asserts on no wall time either (its default deadline of 200 ms fails on a busy machine)."""

from hypothesis import settings

settings.register_profile("novacron", deadline=None)
settings.load_profile("novacron")
