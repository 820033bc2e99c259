"""NVIDIA's compilers, where they are: nvcc of an installed toolkit, NVRTC of a toolkit or of the wheel nvidia-cuda-nvrtc. Neither needs a GPU."""

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
    """Compile for a machine; what each kernel takes. Raises CalledProcessError."""
    done = subprocess.run(
        ["nvcc", f"-arch={architecture}", "-Xptxas", "-v", "-cubin", "-o", str(folder / "kernels.cubin"), str(source)], capture_output=True, text=True, timeout=COMPILE_S, check=True
    )
    found = {}
    for part in done.stderr.split("Compiling entry function '")[1:]:
        stack, stores, loads = (int(re.search(rf"(\d+) bytes {what}", part)[1]) for what in ("stack frame", "spill stores", "spill loads"))  # type: ignore[index]
        shared = re.search(r"(\d+) bytes smem", part)
        found[part.partition("'")[0]] = Resources(int(re.search(r"Used (\d+) registers", part)[1]), int(shared[1]) if shared else 0, stack, stores + loads)  # type: ignore[index]
    return found


def _nvrtc_library() -> str | None:
    places = [Path(sysconfig.get_paths()["purelib"]) / "nvidia", Path("/usr/local/cuda")]
    for place in places:
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


needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc: install NVIDIA's CUDA toolkit (it needs no GPU)")
needs_nvrtc = pytest.mark.skipif(_nvrtc_library() is None, reason="no NVRTC: pip install nvidia-cuda-nvrtc-cu12 (85 MiB, needs no GPU)")
