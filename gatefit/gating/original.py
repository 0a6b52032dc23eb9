"""The original network of a saved folder: how `config.json` names it, and who may have it built."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
from torch import nn

from gatefit.errors import CheckpointError, first_line, shown
from gatefit.files import relative_to
from gatefit.folder import CONFIG, ORIGINAL, Config, read_config
from gatefit.inputs.models import ModelReference, build, from_registry, load_weights
from gatefit.inputs.spec import InputSpec

_UNTRUSTED = {
    "cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "weights",
    "weights_backbone",
}  # fmt: skip
"""Arguments of timm and torchvision that would read other files than the folder's, or the network."""


def written_reference(reference: ModelReference | None, folder: Path) -> dict[str, Any] | None:
    """Write a reference as `config.json` keeps it: one that needs no network, its file as seen from the folder."""
    if reference is None:
        return None
    written = asdict(from_registry(reference))
    if reference.source == "file":
        path, function = reference.name.rsplit(":", 1)
        written["name"] = f"{relative_to(folder, Path(path))}:{function}"
    return written


def read_reference(config: Config, folder: Path) -> ModelReference | None:
    """Read the reference that a config holds, its file made absolute; None: an own network.

    Raises:
        CheckpointError: it is none that gatefit wrote.
    """
    if config.model is None:
        return None
    try:
        reference = ModelReference(**config.model)
        if reference.source != "file":
            return reference
        path, function = reference.name.rsplit(":", 1)
        file = (folder.resolve() / path).resolve()
        return ModelReference("file", f"{file}:{function}", reference.arguments)
    except (TypeError, ValueError, AttributeError, OSError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not one that gatefit wrote: {first_line(error)[:160]}") from error


def read_spec(config: Config, folder: Path) -> InputSpec:
    """Read what the network of a config takes.

    Raises:
        CheckpointError: it is none that gatefit wrote.
    """
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.input.items()}
    try:
        return InputSpec(**values)
    except TypeError as error:
        raise CheckpointError(f"{folder / CONFIG} is not one that gatefit wrote: {first_line(error)[:160]}") from error


def reason_not_to_build(config: Config) -> str:
    """Say why the network that a config names is not built unasked; empty where timm or torchvision alone builds it."""
    if config.model is None:
        return ""
    source, name, arguments = (config.model.get(key) for key in ("source", "name", "arguments"))
    if source == "file":
        return f"names code, the function {shown(name)}, which gatefit does not run unasked"
    known = source == "torchvision" or (source == "timm" and timm.is_model(str(name)))
    if known and isinstance(arguments, dict) and not _UNTRUSTED & set(arguments):
        return ""
    return (
        f"names a network that gatefit does not build for it unasked, {source}/{str(name)[:60]} with {shown(arguments)}"
    )


def build_original(config: Config, folder: Path, trust_code: bool) -> nn.Module:
    """Build the network that a config names, with any weights; run no code that the folder names without the word.

    Raises:
        GatefitError: it names none, one that needs the user's word, or one that cannot be built.
    """
    reference = read_reference(config, folder)
    if reference is None:
        raise CheckpointError(f"{folder} was saved from a network of your own; call gatefit.load(folder, model=...)")
    file = Path(reference.name.rpartition(":")[0])
    if reference.source == "file" and not file.is_file():
        raise CheckpointError(
            f"no file '{file}', which builds the network of {folder}; put it there, or call "
            "gatefit.load(folder, model=...)"
        )
    reason = reason_not_to_build(config)
    if reason and not trust_code:
        raise CheckpointError(
            f"{folder} {reason}; if you trust it pass trust_code=True (--trust-code on the command line), or give the "
            "network: gatefit.load(folder, model=...)"
        )
    return build(reference)


def load_original(folder: Path, trust_code: bool = False) -> nn.Module | None:
    """Read the original network of a folder, in eval mode; None where the folder does not hold its weights.

    Raises:
        GatefitError: its weights are not those that were saved, or the network cannot be built, see `build_original`.
    """
    if not (folder / ORIGINAL).is_file():
        return None
    config = read_config(folder)
    if config.format > 1:  # format 1 kept no hash of it
        config.check_file(folder, ORIGINAL)
    if config.model is None:
        return None
    original = build_original(config, folder, trust_code)
    load_weights(original, folder / ORIGINAL)
    return original.eval()
