"""A configuration's quick form: what its YAML says, as JSON beside it (`edge.yaml.json`), so that a start need not load PyYAML and read the text again.

It stands for exactly the text it was made from, which it has in it: a hash would need `hashlib`, and with that OpenSSL, before it is known whether this edge needs TLS (3.4 MB of memory). A file that was
changed since, or a quick form that is damaged, is read as YAML. What the configuration means is found out at each start, by the same code, from either.
"""

import json
import os
from pathlib import Path
from typing import Any

FORM = 1
"""Goes up where the same YAML would be read as something else."""


def path_of(path: Path) -> Path:
    """Where a configuration's quick form is."""
    return path.with_name(f"{path.name}.json")


def read(path: Path, raw: bytes) -> dict[str, Any] | None:
    """What the configuration at `path`, whose bytes are `raw`, says; None where there is no quick form of these bytes."""
    try:
        found = json.loads(path_of(path).read_bytes())
        values = found["values"] if found["form"] == FORM and found["text"].encode() == raw else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def write(path: Path, raw: bytes, values: dict[str, Any]) -> None:
    """Keep `values`, which the configuration at `path` with the bytes `raw` says. Where JSON cannot say the same (dates, keys that are no text), that is kept, and the YAML is read. Raises OSError."""
    target = path_of(path)

    def text(said: object) -> str:
        return json.dumps({"form": FORM, "text": raw.decode(), "values": said}, skipkeys=True, default=str)

    whole = text(values)
    if repr(json.loads(whole)["values"]) != repr(values):  # equal would not do: 1, 1.0 and true are
        whole = text(None)
    new = target.with_name(f"{target.name}.new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, path.stat().st_mode & 0o777), "w") as file:
        file.write(whole)
        file.flush()
        os.fsync(file.fileno())
    new.replace(target)
