"""Write files so that nothing half-written is ever left behind."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from gatefit.errors import CheckpointError


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it.

    Raises:
        CheckpointError: the disk is full or the place cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}; free some space or choose another folder") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write_text(text))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: it is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"no file '{path}'; is '{path.parent}' a folder that gatefit wrote?") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); write it anew") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, with text beside them where given, atomically."""
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    write_atomically(path, lambda file: safetensors.torch.save_file(plain, file, metadata))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: it is missing, truncated or no safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"no file '{path}'; is '{path.parent}' a folder that gatefit wrote?")
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); write it anew") from error


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise CheckpointError(f"no file '{path}'; is '{path.parent}' a folder that gatefit wrote?") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, in hexadecimal; order of keys and white space do not count.

    >>> json_digest({"a": 1, "b": [2]}) == json_digest({"b": [2], "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def relative_to(folder: Path, path: Path) -> str:
    """Write `path` as seen from `folder`, with "/" between its parts, so that both can move together.

    Raises:
        CheckpointError: there is no such way, as between two drives.
    """
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError as error:
        raise CheckpointError(
            f"'{path}' is on another drive than '{folder}'; choose a place on the same one"
        ) from error


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
