"""Write files so that nothing half-written is ever left behind."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import safetensors.torch
import torch
from torch import Tensor

from gatefit.errors import CheckpointError, GatefitError, first_line

_OF_OTHER_VERSIONS = ("required", "additionalProperties")


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Give a temporary file beside each path to be filled; all of them are renamed at the end, or after an error none.

    Raises:
        CheckpointError: the disk is full, a place cannot be written, or what was to be written cannot be; every path
            is as it was.
    """
    temporaries = [path.with_name(f".{path.name}.tmp") for path in paths]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporaries
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
    except BaseException as error:
        for temporary in temporaries:
            with suppress(OSError, ValueError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, GatefitError) or not isinstance(error, Exception):
            raise
        if isinstance(error, FileExistsError | NotADirectoryError):
            hint = "a part of its path is a file; choose another folder"
        elif isinstance(error, ValueError):
            hint = f"{first_line(error)}; choose another name"
        elif isinstance(error, OSError):
            hint = f"{error.strerror or first_line(error)}; free some space or choose another folder"
        else:
            hint = first_line(error)
        raise CheckpointError(f"cannot write {paths[0]}: {hint}") from error


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it.

    Raises:
        CheckpointError: as `replacing` does; `path` is as it was.
    """
    with replacing(path) as (temporary,):
        write(temporary)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically.

    Raises:
        CheckpointError: it cannot be written, or holds what JSON does not know.
    """
    write_atomically(path, lambda file: file.write_text(to_json(value), encoding="utf-8"))


def to_json(value: Any) -> str:
    """Write a value as indented JSON text.

    Raises:
        CheckpointError: it holds what JSON does not know, such as an object or a number that is not finite.
    """
    return _json_text(value, indent=2) + "\n"


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Give the content of a JSON file with a digest of itself.

    Raises:
        CheckpointError: it holds what JSON does not know.
    """
    return {**content, "digest": json_digest(content)}


def is_sealed(content: dict[str, Any]) -> bool:
    """Tell whether the content of a JSON file is what `sealed` gave.

    Raises:
        KeyError: it has no digest.
    """
    return bool(json_digest({k: v for k, v in content.items() if k != "digest"}) == content["digest"])


def _json_text(value: Any, **layout: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"this cannot be written as JSON: {first_line(error)}") from error


def read_json(path: Path, schema: str = "") -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        schema: name of the JSON Schema in the package that its values have to fit, such as "report"; keys that are
            missing, or more than it knows, are another version's and pass. Empty: any value.

    Raises:
        CheckpointError: it is missing or is not JSON, a number in it is not finite or needs more than 64 bits, or a
            value does not fit.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_int64)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"no file '{path}'; is '{path.parent}' a folder that gatefit wrote?") from error
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or first_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)[:160]}); write it anew") from error
    if schema:
        check_schema(path, value, schema)
    return value


def check_schema(path: Path, value: Any, schema: str) -> None:
    """Refuse values of a JSON file that do not fit its schema, see `read_json`.

    Raises:
        CheckpointError: one does not; the first is named.
    """
    content = json.loads(files("gatefit").joinpath("schemas", f"{schema}.schema.json").read_text(encoding="utf-8"))
    wrong = jsonschema.Draft202012Validator(content).iter_errors(value)
    misfit = jsonschema.exceptions.best_match(e for e in wrong if e.validator not in _OF_OTHER_VERSIONS)
    if misfit is not None:
        where = "".join(f"[{p!r}]" if isinstance(p, int) else f".{p}" for p in misfit.absolute_path)
        raise CheckpointError(
            f"{path} is not one that gatefit wrote: {where.lstrip('.') or 'its content'} does not fit "
            f"({first_line(ValueError(misfit.message))[:120]})"
        )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _int64(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**64:
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, with text beside them where given, atomically."""
    write_atomically(path, lambda file: safetensors.torch.save_file(plain_tensors(tensors), file, metadata))


def plain_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to where safetensors takes them: each contiguous, on the CPU, with memory of its own."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


def tensors_digest(tensors: dict[str, Tensor], text: str) -> str:
    """Return the SHA-256 of named tensors and a text, in hexadecimal: what a file that keeps both is checked by."""
    state = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


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
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise CheckpointError(f"no file '{path}'; is '{path.parent}' a folder that gatefit wrote?") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, in hexadecimal; order of keys and white space do not count.

    >>> json_digest({"a": 1, "b": [2]}) == json_digest({"b": [2], "a": 1})
    True
    """
    return hashlib.sha256(_json_text(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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
