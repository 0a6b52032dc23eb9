"""The compiled kernels of `gathered.cpp`: built once with the machine's C++ compiler, kept in the cache."""

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

FILES = ("gathered.cpp", "narrow.h", "planes.h", "convolve.h", "threads.h")
SOURCES = tuple(Path(__file__).with_name(name) for name in FILES)
OPTIMISED = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp-simd")
FLAGS = (*OPTIMISED, "-pthread", "-fPIC", "-shared")
POINTER, NUMBER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


@dataclass(frozen=True)
class Kernels:
    """Functions of `gathered.cpp`, with its arguments."""

    conv: Callable[..., None]
    depthwise: Callable[..., None]
    blocks: Callable[..., None]
    narrow: Callable[[int], int]


@functools.cache
def kernels() -> Kernels | None:
    """The kernels, or None on a machine that cannot build them."""
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
    ends: list[Any] = [REAL, REAL, NUMBER]
    library.gathered_conv.argtypes = [POINTER] * 7 + [NUMBER] * 9 + ends
    library.gathered_depthwise.argtypes = [POINTER] * 5 + [NUMBER] * 7 + ends
    library.gathered_blocks.argtypes = [POINTER, NUMBER, *[POINTER] * 3, *[NUMBER] * 4]
    library.gathered_narrow.argtypes, library.gathered_narrow.restype = [NUMBER], NUMBER
    found = (library.gathered_conv, library.gathered_depthwise, library.gathered_blocks)
    for function in found:
        function.restype = None
    return Kernels(*found, library.gathered_narrow)


def _build(compiler: str, file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as region:
        built = Path(region) / "gathered.so"
        subprocess.run([compiler, *FLAGS, str(SOURCES[0]), "-o", str(built)], check=True, capture_output=True)
        built.replace(file)


class _Here(threading.local):
    """Of each of the caller's threads."""

    threads = 0
    """What PyTorch had before `torch_alone`; 0: it is not alone."""


_here = _Here()


def threads() -> int:
    """How many threads the kernels may use: as many as PyTorch has, or had before `torch_alone`."""
    return _here.threads or torch.get_num_threads()


@contextmanager
def torch_alone() -> Iterator[None]:
    """Meanwhile PyTorch runs on the caller's thread, the kernels on all.

    OpenMP's threads spin for milliseconds after their work, on processors that the kernels' threads need by then.
    Their number is set for the calling thread alone, unlike by `torch.set_num_threads`, which also sets it for threads
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
    """Of the libraries that PyTorch has loaded: OpenMP's, and MKL's, which returns what was set before."""
    found = []
    for file, name in ((None, "omp_set_num_threads"), (torch._C.__file__, "MKL_Set_Num_Threads_Local")):
        try:
            found.append(getattr(ctypes.CDLL(file), name))
        except (AttributeError, OSError, TypeError):
            found.append(None)
    return found[0], found[1]


def processor(what: str) -> str:
    """What the system says of its processor, such as "model name" or "flags"."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    found = (x.partition(":")[2].strip() for x in lines if x.startswith(what))
    return next(found, platform.processor())
