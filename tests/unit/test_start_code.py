"""The byte code of a start in one file: the same modules as from files of their own, and those where it cannot serve."""

import marshal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime import start_code

ROOT = Path(__file__).resolve().parents[2]

SOURCES = {
    "made": ("made/__init__.py", "from . import part\nNAME = part.name()\nfrom .deep import low\n"), "made.part": ("made/part.py", "import importlib.resources\ndef name():\n    return __name__\n"),
    "made.deep": ("made/deep/__init__.py", ""), "made.deep.low": ("made/deep/low.py", "from ..part import name\nfrom importlib import resources\nTEXT = resources.files('made').joinpath('words.txt').read_text()\n"),
    "alone": ("alone.py", "import made.deep.low as low\ndef fail():\n    raise KeyError(low.TEXT)\n"),
}


def laid_out(folder: Path) -> Path:
    """The modules as files whose sources say otherwise than their byte code in the one file."""
    modules = []
    for name, (path, text) in SOURCES.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.replace("import made.deep.low", "OTHER = True\nimport made.deep.low"))
        modules.append((name, str(target), path.endswith("__init__.py"), marshal.dumps(compile(text, str(target), "exec"))))
    (folder / "made" / "words.txt").write_text("words")
    (folder / "code").write_bytes(start_code.pack(start_code.TAG, modules))
    return folder / "code"


def said(folder: Path, code: str) -> str:
    begin = f"import sys\nsys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\nfrom edge_runtime import start_code\n"
    done = subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


LOOK = """
import alone, made, made.deep, made.part
print([(name, sys.modules[name].__file__, sys.modules[name].__package__, getattr(sys.modules[name], "__path__", None), sys.modules[name].__spec__.parent) for name in ("alone", "made", "made.part", "made.deep", "made.deep.low")])
print(made.NAME, alone.low.TEXT, alone.low.name())
try:
    alone.fail()
except KeyError:
    import traceback
    print(traceback.format_exc().splitlines()[-1:])
"""


def test_modules_are_what_they_are_from_files_of_their_own(tmp_path: Path) -> None:
    code = laid_out(tmp_path)
    ordinary = said(tmp_path, LOOK)
    assert "words" in ordinary and "Error" not in ordinary.replace("KeyError", "")
    assert said(tmp_path, f"assert start_code.use({str(code)!r})\n{LOOK}") == ordinary
    found = f"assert start_code.use({str(code)!r})\nimport alone\nprint(hasattr(alone, 'OTHER'))\nimport importlib\nimportlib.reload(alone)\nprint(hasattr(alone, 'OTHER'), alone.__loader__.get_source('alone')[:5])\n"
    assert said(tmp_path, found) == "False\nTrue OTHER\n", "the first time from the file, then from its own"


def test_it_is_given_up_when_the_start_is_over(tmp_path: Path) -> None:
    code = laid_out(tmp_path)
    words = f"before = list(sys.meta_path)\nassert start_code.use({str(code)!r}) and len(sys.meta_path) == len(before) + 1\nimport made.part\nstart_code.forget()\nprint(sys.meta_path == before)\nimport alone\nprint(alone.OTHER, made.part.name())\n"
    assert said(tmp_path, words) == "True\nTrue made.part\n"


def test_what_is_built_in_comes_first_and_what_is_not_in_it_is_found_as_ever(tmp_path: Path) -> None:
    bad = marshal.dumps(compile("raise SystemExit('not the built-in one')", "bad", "exec"))
    (tmp_path / "code").write_bytes(start_code.pack(start_code.TAG, [("_random", "/bad.py", False, bad), ("zipimport", "/bad.py", False, bad)]))
    assert said(tmp_path, f"assert start_code.use({str(tmp_path / 'code')!r})\nimport zipimport, colorsys\nprint(zipimport.__spec__.origin, colorsys.__file__ is not None)") == "frozen True\n"


@pytest.mark.parametrize("damage", ["none", "empty", "other python", "other optimisation", "not ours", "longer index"])
def test_a_file_that_cannot_serve_is_left(tmp_path: Path, damage: str) -> None:
    path = laid_out(tmp_path)
    whole = path.read_bytes()
    changed = {
        "none": None, "empty": b"", "other python": whole.replace(sys.implementation.cache_tag.encode(), b"cpython-399", 1), "other optimisation": whole.replace(b" 0\n", b" 2\n", 1), "not ours": b"#!/bin/sh\n" * 100,
        "longer index": whole[:len(start_code.TAG) + 1] + (1 << 30).to_bytes(4, "little") + whole[len(start_code.TAG) + 5:],
    }[damage]
    path.unlink()
    if changed is not None:
        assert changed != whole
        path.write_bytes(changed)
    assert said(tmp_path, f"print(start_code.use({str(path)!r}), [type(finder).__name__ for finder in sys.meta_path if type(finder).__name__ == '_Finder'])\nimport alone\nprint(alone.OTHER)") == "False []\nTrue\n"


def test_a_file_that_was_cut_is_left(tmp_path: Path) -> None:
    path = laid_out(tmp_path)
    whole = path.read_bytes()
    begin = len(start_code.TAG) + 5
    index = int.from_bytes(whole[begin - 4:begin], "little")
    words = f"whole = open({str(path)!r}, 'rb').read()\nfor size in range({begin + index}):\n    open({str(path)!r}, 'wb').write(whole[:size])\n    assert not start_code.use({str(path)!r}), size\nprint(len(sys.meta_path))\n"
    assert said(tmp_path, words) == said(tmp_path, "print(len(sys.meta_path))")
