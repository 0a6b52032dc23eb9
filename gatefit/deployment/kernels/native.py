"""Build the kernels of `gathered.cpp` once with the machine's C++ compiler, keep them in the cache, and load them."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gatefit.deployment.kernels.abi import NUMBER, POINTER, REAL, BlockStruct, check_abi

FILES = ("gathered.cpp", "abi.h", "narrow.h", "planes.h", "convolve.h", "threads.h")
SOURCES = tuple(Path(__file__).with_name(name) for name in FILES)
OPTIMISED = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp-simd")
FLAGS = (*OPTIMISED, "-pthread", "-fPIC", "-shared")


@dataclass(frozen=True)
class Kernels:
    """The functions of the compiled library; `abi.h` says what they compute, and of which arguments."""

    conv: Callable[..., None]
    """`gathered_conv`: one convolution."""
    depthwise: Callable[..., None]
    """`gathered_depthwise`: one depthwise convolution."""
    blocks: Callable[..., None]
    """`gathered_blocks`: blocks, one behind the other."""
    narrow: Callable[[int], int]
    """`gathered_narrow`: whether weights should be packed for images of this width."""


@functools.cache
def kernels() -> Kernels | None:
    """Build the kernels if need be, and load them.

    Returns:
        None on a machine that cannot build or load them.

    Raises:
        DeployError: the structs of `abi.py` are not the ones of the library.
    """
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or platform.machine() != "x86_64":
        return None
    text = "\0".join((*(s.read_text() for s in SOURCES), compiler, *FLAGS, processor("flags"), torch.__version__))
    folder = Path(torch.hub.get_dir()).parent / "gatefit" / "native"
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    try:
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _build(compiler, file)
        library = ctypes.CDLL(str(file))
    except (OSError, subprocess.CalledProcessError):
        return None
    check_abi(library)
    return _functions(library)


def _functions(library: ctypes.CDLL) -> Kernels:
    """Declare the arguments of the exported functions, in the order of `abi.h`."""
    bounds_and_threads: list[Any] = [REAL, REAL, NUMBER]
    library.gathered_conv.argtypes = [POINTER] * 7 + [NUMBER] * 9 + bounds_and_threads
    library.gathered_depthwise.argtypes = [POINTER] * 5 + [NUMBER] * 7 + bounds_and_threads
    library.gathered_blocks.argtypes = [ctypes.POINTER(BlockStruct), NUMBER, *[POINTER] * 3, *[NUMBER] * 4]
    library.gathered_narrow.argtypes, library.gathered_narrow.restype = [NUMBER], NUMBER
    for function in (library.gathered_conv, library.gathered_depthwise, library.gathered_blocks):
        function.restype = None
    return Kernels(library.gathered_conv, library.gathered_depthwise, library.gathered_blocks, library.gathered_narrow)


def _build(compiler: str, file: Path) -> None:
    """Compile to a temporary file and move it, so that nobody loads half of it."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        built = Path(folder) / "gathered.so"
        subprocess.run([compiler, *FLAGS, str(SOURCES[0]), "-o", str(built)], check=True, capture_output=True)
        built.replace(file)


class _CallerThread(threading.local):
    """The state of one of the caller's threads."""

    threads = 0
    """How many threads PyTorch had before `torch_alone`; 0 outside of it."""


_here = _CallerThread()


def threads() -> int:
    """Return how many threads the kernels may use: as many as PyTorch has, or had before `torch_alone`."""
    return _here.threads or torch.get_num_threads()


@contextmanager
def torch_alone() -> Iterator[None]:
    """Run PyTorch on the caller's thread alone inside the context, while the kernels use all threads.

    OpenMP's threads spin for milliseconds after their work, on processors that the kernels' threads need by then.
    The context sets their number for the calling thread alone; `torch.set_num_threads` would also set it for threads
    that start later.
    """
    set_openmp, set_mkl = _setters()
    if set_openmp is None or _here.threads:
        yield
        return
    _here.threads = torch.get_num_threads()
    set_openmp(1)
    before = None if set_mkl is None else set_mkl(1)
    try:
        yield
    finally:
        set_openmp(_here.threads)
        if set_mkl is not None:
            set_mkl(before)
        _here.threads = 0


@functools.cache
def _setters() -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
    """Find the functions that set the number of threads in OpenMP and in MKL, as PyTorch has loaded them.

    MKL's returns the number that was set before. A library that is not there gives None.
    """
    setters = []
    for file, name in ((None, "omp_set_num_threads"), (torch._C.__file__, "MKL_Set_Num_Threads_Local")):
        try:
            setters.append(getattr(ctypes.CDLL(file), name))
        except (AttributeError, OSError, TypeError):
            setters.append(None)
    return setters[0], setters[1]


INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
    "amx_bf16": "AMX bf16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "bf16",
}
"""Sets of instructions that decide how fast networks run, by the system's names for them."""


@functools.cache
def instructions() -> tuple[str, ...]:
    """List those of `INSTRUCTIONS` that the processor has, as the system says; nothing where it says nothing."""
    flags = {*processor("flags").split(), *processor("Features").split()}
    return tuple(name for flag, name in INSTRUCTIONS.items() if flag in flags)


def processor(key: str) -> str:
    """Look up what the system says of its processor under a key such as "model name" or "flags"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(key))
    return next(values, platform.processor())
