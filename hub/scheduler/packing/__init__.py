"""Packing: pure algorithms on arrays. Backlogs on groups of nodes, bins for vectors, pods on GPUs, and how far each is from the best possible."""

from .backlogs import Backlog, backlog
from .gpus import Bad
from .patterns import Prices, prices, problem
from .vector import Packing, pack

__all__ = ["Backlog", "Bad", "Packing", "Prices", "backlog", "pack", "prices", "problem"]
