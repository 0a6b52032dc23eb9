"""Write files so that nothing half-written is ever left behind."""

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


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
