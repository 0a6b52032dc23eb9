"""What every command shares: first line, errors in one line, a clean stdout, memory and device."""

import ctypes
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from gatefit.errors import GatefitError, GatefitWarning

LARGEST_BATCH = 4096
PACKAGE = Path(__file__).parents[2]
TRACEBACK = "GATEFIT_TRACEBACK"
"""Environment variable with which errors that gatefit did not expect come with their traceback."""

Data = Annotated[str, typer.Option(help="Other images. Default: those of the conversion.")]
Device = Annotated[str, typer.Option(help="cpu or cuda. Default: cuda where there is one.")]
ImageSize = Annotated[int, typer.Option(help="Side of the input in pixels. 0: the network's own.")]
Mean = Annotated[
    str,
    typer.Option(
        metavar="X[,X,X]",
        help="Mean of the pixels, from 0 to 1, that the network was trained with: one value, or one for each channel. "
        "Default: the network's own.",
    ),
]
Std = Annotated[str, typer.Option(metavar="X[,X,X]", help="Standard deviation of the pixels, in the same way.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that gatefit convert wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-code", help="Run the Python file that the folder names, or fetch the network that it names."),
]
SkipCorrupt = Annotated[bool, typer.Option("--skip-corrupt", help="Skip images that cannot be read.")]


@contextmanager
def session(command: str, out: Path | None = None, position: Callable[[], str] = str) -> Iterator[TextIO]:
    """Run the body of a command; give the stream for its results.

    A first line says at once that the command is at work: importing PyTorch takes seconds. Whatever a library prints
    by itself goes to stderr, so that --json stays JSON. An error that the user can mend becomes one line and exit
    code 1; Ctrl-C becomes one line and exit code 130.

    Args:
        command: the command and what it works on, for the first line.
        out: the folder that a training writes its checkpoints to, if it does.
        position: tells where the training stands, such as "epoch 3 of 10"; empty: it has not begun.
    """
    if is_main():
        typer.echo(f"gatefit {command}: loading PyTorch ...", err=True)
    try:
        stdout = sys.stdout
        with redirect_stdout(sys.stderr), _notes():
            yield stdout
    except GatefitError as error:
        typer.echo(f"gatefit: {_one_line(error)}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if is_main():
            saved = out is not None and any(out.glob("checkpoint*.safetensors"))
            where = f" ({position()})" if position() else ""
            how = (
                f"Run the same command with --resume to continue from {out}{where}." if saved else "Nothing was saved."
            )
            typer.echo(f"Interrupted. {how}", err=True)
        raise typer.Exit(130) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        typer.echo(f"gatefit: {type(error).__name__}: {_one_line(error)[:300]}{_origin(error)}", err=True)
        raise typer.Exit(1) from None


def _origin(error: Exception) -> str:
    """Say where an error comes from that is no fault of the machine: in gatefit, or in the user's own network."""
    if isinstance(error, OSError | MemoryError):
        return ""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({Path(last.filename).name}, line {last.lineno}; {TRACEBACK}=1 shows all of it)"


@contextmanager
def _notes() -> Iterator[None]:
    """Show gatefit's own warnings, such as of old recipe keys or skipped images, as one line each."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Any, category: Any, filename: str, *more: Any, **named: Any) -> None:
            old_name = issubclass(category, FutureWarning) and Path(filename).is_relative_to(PACKAGE)
            if not (old_name or issubclass(category, GatefitWarning)):
                show(message, category, filename, *more, **named)
            elif is_main():
                typer.echo(f"note: {_one_line(message)}", err=True)

        warnings.showwarning = note
        warnings.filterwarnings("always", category=FutureWarning, module=r"gatefit\.")
        warnings.filterwarnings("always", category=GatefitWarning)
        yield


def _one_line(message: Any) -> str:
    return " ".join(str(message).split())


def say_input(folder: Path) -> None:
    """Say in one line what the network of a folder takes.

    Raises:
        GatefitError: the folder cannot be read.
    """
    from gatefit.commands.opened import input_of

    if is_main():
        typer.echo(str(input_of(folder)), err=True)


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Read the values of --mean or --std; nothing where it is not given.

    Raises:
        GatefitError: there is something else than numbers in it.
    """
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise GatefitError(
            f"{option} must be a number, or one for each channel such as 0.5,0.5,0.5: not '{text}'"
        ) from None


def print_json(stream: TextIO, value: Any) -> None:
    """Write plain values as indented JSON."""
    print(json.dumps(value, indent=2), file=stream)


def keep_memory() -> None:
    """Let glibc keep what the program has freed.

    By default it returns each large activation to the system and faults it in again, which took two thirds of the
    time of networks at 224 pixels.
    """
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 1 << 30)
    mallopt(top_pad, 1 << 26)


def choose_device(device: str) -> None:
    """Tell accelerate which device to take: it reads the environment before its first use.

    By itself it would take other accelerators than CUDA's too, of which some know no float64.

    Raises:
        GatefitError: the device is neither cpu nor cuda, or torch finds no CUDA device.
    """
    import torch

    if device == "cpu" or not (device or torch.cuda.is_available()):
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise GatefitError(f"--device {device}: torch finds no CUDA device here; use --device cpu")
        if ":" in device:
            os.environ["ACCELERATE_TORCH_DEVICE"] = device
    elif device:
        raise GatefitError(f"--device must be cpu or cuda, not '{device}'")


def is_main() -> bool:
    """Return whether this is the first of the processes that accelerate launched, or the only one."""
    return os.environ.get("RANK", "0") == "0"
