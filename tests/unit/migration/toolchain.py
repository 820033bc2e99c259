"""NVIDIA's compilers, where they are: nvcc of an installed toolkit, or NVRTC and ptxas of the wheels of the extra `kernels`. None of them needs a GPU."""

import ctypes
import ctypes.util
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

COMPILE_S = 120


@dataclass(frozen=True, slots=True)
class Resources:
    """Of a kernel, as ptxas counts them."""

    registers: int
    shared: int
    stack: int
    spilled: int


def resources(source: Path, architecture: str, folder: Path) -> dict[str, Resources]:
    """Compile for a machine (its number, as 90); what each kernel takes. Raises CalledProcessError or ValueError where it is no CUDA."""
    cubin = str(folder / "kernels.cubin")
    if shutil.which("nvcc"):
        command = ["nvcc", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", "-o", cubin, str(source)]
    else:
        ptx = folder / "kernels.ptx"
        ptx.write_bytes(nvrtc(source.read_text(), f"compute_{architecture}"))
        command = [str(_ptxas()), f"-arch=sm_{architecture}", "-v", "-o", cubin, str(ptx)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S, check=True)
    found = {}
    for part in done.stderr.split("Compiling entry function '")[1:]:
        stack, stores, loads = (int(re.search(rf"(\d+) bytes {what}", part)[1]) for what in ("stack frame", "spill stores", "spill loads"))  # type: ignore[index]
        shared = re.search(r"(\d+) bytes smem", part)
        found[part.partition("'")[0]] = Resources(int(re.search(r"Used (\d+) registers", part)[1]), int(shared[1]) if shared else 0, stack, stores + loads)  # type: ignore[index]
    return found


WHEELS = Path(sysconfig.get_paths()["purelib"]) / "nvidia"


def _ptxas() -> Path | None:
    return next(iter(sorted(WHEELS.glob("**/bin/ptxas"))), None)


def _nvrtc_library() -> str | None:
    for place in (WHEELS, Path("/usr/local/cuda")):
        for found in sorted(place.glob("**/libnvrtc.so.*")):
            return str(found)
    return ctypes.util.find_library("nvrtc")


def nvrtc(source: str, architecture: str) -> bytes:
    """PTX of the source. Raises ValueError with the compiler's words."""
    library = ctypes.CDLL(_nvrtc_library())
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"pages.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture={architecture}".encode(), b"--std=c++17")
    try:
        status = library.nvrtcCompileProgram(program, 2, options)
        what = "ProgramLog" if status else "PTX"
        assert getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
        text = ctypes.create_string_buffer(size.value)
        assert getattr(library, f"nvrtcGet{what}")(program, text) == 0
        if status:
            raise ValueError(text.value.decode())
        return text.value
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


_INSTALL = "install NVIDIA's CUDA toolkit, or pip install 'novacron[kernels]' (125 MiB); neither needs a GPU"
needs_assembler = pytest.mark.skipif(not shutil.which("nvcc") and (_nvrtc_library() is None or _ptxas() is None), reason=f"no nvcc: {_INSTALL}")
needs_nvrtc = pytest.mark.skipif(_nvrtc_library() is None, reason=f"no NVRTC: {_INSTALL}")
