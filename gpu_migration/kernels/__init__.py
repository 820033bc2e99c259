"""The kernels' source, for whoever compiles it."""

from pathlib import Path

SOURCE = Path(__file__).with_name("pages.cu")
NAMES = ("scan_pages", "rank_pages", "scan_counts", "gather_pages", "scatter_pages", "copy_pages")
"""The kernels in it."""
