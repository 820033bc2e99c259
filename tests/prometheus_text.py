"""A strict reader of the Prometheus text format 0.0.4; its negative controls are in unit/test_clock_metrics.py."""

import re

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\\\|\\"|\\n)*"'
_SAMPLE = re.compile(rf"({_NAME})((?:\{{{_LABEL}(?:,{_LABEL})*\}})?) ([+-]?(?:\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|[Ii]nf|NaN))\Z")


def parse_exposition(text: str) -> dict[str, dict[str, float]]:
    """Text format 0.0.4, strictly: metric to label text to value. Raises ValueError with the line that is wrong."""
    if not text.endswith("\n"):
        raise ValueError("the last line does not end")
    found: dict[str, dict[str, float]] = {}
    kinds: dict[str, str] = {}
    helped: set[str] = set()
    current = ""
    for line in text[:-1].split("\n"):
        words = line.split(" ", 3)
        if words[0] == "#":
            if len(words) < 4 or words[1] not in ("HELP", "TYPE") or not re.fullmatch(_NAME, words[2]):
                raise ValueError(line)
            name = words[2]
            if words[1] == "HELP":
                if name in helped or name in found or re.search(r"\\(?![\\n])", words[3]):
                    raise ValueError(line)
                helped.add(name)
            elif name in kinds or name in found or words[3] not in ("counter", "gauge", "histogram", "summary", "untyped"):
                raise ValueError(line)
            else:
                kinds[name] = words[3]
            current = name
            continue
        match = _SAMPLE.match(line)
        if match is None or match[1] != current or match[1] not in kinds or match[2] in found.get(match[1], {}):
            raise ValueError(line)
        if kinds[match[1]] == "counter" and not float(match[3]) >= 0:
            raise ValueError(line)
        found.setdefault(match[1], {})[match[2]] = float(match[3])
    return found
