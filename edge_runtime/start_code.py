"""The byte code of a start in one file, for machines whose image was built with it (`firmware_images`).

Python looks for each module in several folders, and opens, measures, reads and closes a file of its own for each: ten questions to the kernel and some hundred lines of importlib, for a hundred and thirty modules. Here one file is read
once. What is not in it is found as ever; so is everything where there is no such file, or one of another Python.

Format, of this house: TAG and a newline; the length of the index, 4 bytes, least first; the index (`marshal`: name of a module -> path of its source, whether it is a package, where its byte code begins behind the index, its length); the byte
code (`marshal`, as in a .pyc behind its header).
"""

import marshal
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec, SourceFileLoader


def tag(python: str, optimize: int) -> bytes:
    """What a file begins with: byte code is of one version (`sys.implementation.cache_tag`) and one level of optimisation."""
    return f"novacron start code 1 {python} {optimize}".encode()


TAG = tag(sys.implementation.cache_tag, sys.flags.optimize)
"""That of this interpreter."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import CodeType

    Index = dict[str, tuple[str, bool, int, int]]


def pack(begin: bytes, modules: "Iterable[tuple[str, str, bool, bytes]]") -> bytes:
    """The file for these modules: name, path of the source, whether it is a package, byte code."""
    index: Index = {}
    codes = []
    at = 0
    for name, source, package, code in modules:
        index[name] = (source, package, at, len(code))
        codes.append(code)
        at += len(code)
    told = marshal.dumps(index)
    return b"".join([begin, b"\n", len(told).to_bytes(4, "little"), told, *codes])


class _Finder:
    """Finds what is in the file (PEP 451)."""

    def __init__(self, index: "Index", codes: memoryview) -> None:
        self.index, self.codes = index, codes

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """As importlib asks."""
        found = self.index.get(name)
        if found is None:
            return None
        source, package, _, _ = found
        spec = ModuleSpec(name, _Loader(name, source, self), origin=source, is_package=package)
        spec.has_location = True  # so that the module has a `__file__`
        if package:
            spec.submodule_search_locations = [source.rpartition("/")[0]]
        return spec


class _Loader(SourceFileLoader):
    """As for a module with a file of its own, whose byte code comes from here."""

    def __init__(self, name: str, source: str, finder: _Finder) -> None:
        super().__init__(name, source)
        self._finder = finder

    def get_code(self, fullname: str) -> "CodeType | None":
        """The byte code; of a module that is asked for again, from its own file."""
        found = self._finder.index.pop(fullname, None)
        if found is None:
            return super().get_code(fullname)
        code: CodeType = marshal.loads(self._finder.codes[found[2]:found[2] + found[3]])
        return code


def use(path: str) -> bool:
    """Look for modules in the file at `path` from now on, before any folder. Returns whether it is one for this interpreter."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = memoryview(file.read())
        begin = len(TAG) + 5
        size = int.from_bytes(data[begin - 4:begin], "little")
        if data[:len(TAG) + 1] != TAG + b"\n" or not 0 < size <= len(data) - begin:
            return False
        finder = _Finder(marshal.loads(data[begin:begin + size]), data[begin + size:])
    except (OSError, ValueError, EOFError, TypeError):
        return False
    # Behind what is built into the interpreter, which comes before all else, and before what looks into folders.
    sys.meta_path.insert(next((at for at, other in enumerate(sys.meta_path) if getattr(other, "__name__", "") == "PathFinder"), len(sys.meta_path)), finder)  # type: ignore[arg-type]
    return True


def forget() -> None:
    """The start is over: what is left of the file is given up."""
    for finder in [finder for finder in sys.meta_path if isinstance(finder, _Finder)]:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        finder.index, finder.codes = {}, memoryview(b"")
