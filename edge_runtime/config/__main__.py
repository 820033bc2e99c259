"""`python -m edge_runtime.config doc [--check]`: writes or compares docs/edge-config.md."""

import sys
from pathlib import Path

from .document import markdown

TARGET = Path(__file__).resolve().parents[2] / "docs" / "edge-config.md"

if __name__ == "__main__":
    text = markdown()
    if "--check" in sys.argv:
        if not TARGET.exists() or TARGET.read_text() != text:
            sys.exit(f"{TARGET} is not what the code says: run python -m edge_runtime.config doc")
    else:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(text)
