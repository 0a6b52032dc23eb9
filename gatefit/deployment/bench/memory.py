"""How much memory a network takes, as the operating system counts it."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Made = TypeVar("Made")
PROCESS = Path("/proc/self")
MEGA = 10**6


def held_by(make: Callable[[], Made]) -> tuple[Made, float | None]:
    """Make something; also how much memory the process holds for it then, in 10**6 bytes, None off Linux."""
    before = _settled()
    made = make()
    after = _settled()
    return made, None if before is None or after is None else max(0.0, (after - before) / MEGA)


def peak_of(run: Callable[[], object]) -> float | None:
    """Measure how much memory a call takes at most, beyond what is there, in 10**6 bytes; None: it is not known."""
    before = _settled()
    try:
        (PROCESS / "clear_refs").write_text("5")  # counts the peak anew
        run()
        return None if before is None else max(0.0, (_status("VmHWM") - before) / MEGA)
    except OSError:
        return None


def _settled() -> int | None:
    """Measure resident bytes, after all that is free was given back."""
    if not sys.platform.startswith("linux"):
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(f"{name}:"))
