"""Save and load a gated network: safetensors weights and a config.json that says how to build it."""

import hashlib
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import fx, nn

from gatefit.errors import CheckpointError, GatefitError
from gatefit.files import read_json, read_tensors, write_json, write_tensors
from gatefit.gating.gates import gates_of
from gatefit.gating.info import info_of, set_info
from gatefit.gating.insert import rewrite
from gatefit.inputs.models import InputSpec, ModelReference, build

FORMAT = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def save(gated: fx.GraphModule, folder: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Write a gated network into `folder` as `model.safetensors` and `config.json`.

    `extra` is kept in the config. A network that gatefit did not build itself is recognised where timm or
    torchvision has it; any other needs `gatefit.load(folder, model=...)` to be read back.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    gates = gates_of(gated)
    first = next(iter(gates.values()))
    reference = info_of(gated).reference
    write_tensors(folder / WEIGHTS, gated.state_dict())
    config = {
        "format": FORMAT,
        "model": asdict(reference) if reference else None,
        "input": asdict(info_of(gated).input),
        "gates": info_of(gated).gates,
        "form": first.form,
        "compensation": info_of(gated).compensation,
        "blocks": [{"name": n, "features": g.of.features, "units": g.of.units} for n, g in gates.items()],
        "architecture": _architecture(gated),
        "sha256": _digest(folder / WEIGHTS),
        "versions": {
            "torch": torch.__version__,
            "timm": timm.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
        **(extra or {}),
    }
    write_json(folder / CONFIG, config)


def load(folder: str | Path, model: nn.Module | None = None) -> fx.GraphModule:
    """Read a gated network that `save` wrote, in eval mode; its outputs are the same to the bit.

    Args:
        folder: where it was saved.
        model: the original architecture (any weights), for networks that neither timm nor torchvision has.

    Raises:
        CheckpointError: the folder is incomplete, truncated, tampered with, or does not fit the network.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_tensors(folder / WEIGHTS)
    if _digest(folder / WEIGHTS) != config["sha256"]:
        raise CheckpointError(f"{folder / WEIGHTS} is not the file that {CONFIG} was written for; write it anew")
    own = model
    try:
        if model is None:
            if config["model"] is None:
                raise CheckpointError(
                    f"{folder} was saved from a network of your own; call gatefit.load(folder, model=...)"
                )
            model = build(ModelReference(**config["model"]))
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["input"].items()}
        spec = InputSpec(**given)
        gated = rewrite(
            model.eval(), torch.zeros(2, *spec.shape), config["gates"], config["form"], config["compensation"]
        )
        blocks = [{"name": n, "features": g.of.features, "units": g.of.units} for n, g in gates_of(gated).items()]
        if blocks != config["blocks"]:
            raise CheckpointError(f"{folder}: its gates do not fit the network that {CONFIG} names")
        if own is None and _architecture(gated) != config["architecture"]:
            raise CheckpointError(
                f"{folder}: {config['model']['name']} as built here is not the network that was saved (other "
                "arguments, or another version of its library); call gatefit.load(folder, model=...)"
            )
        gated.load_state_dict(tensors)
    except GatefitError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder} does not fit its network: {str(error).splitlines()[0]}") from error
    set_info(gated, input=spec)
    set_info(gated, reference=ModelReference(**config["model"]) if config["model"] else None)
    return gated.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a saved folder.

    Raises:
        CheckpointError: it is missing, damaged, or of another format.
    """
    config = read_json(folder / CONFIG)
    needed = {"format", "model", "input", "gates", "form", "compensation", "blocks", "architecture", "sha256"}
    if not isinstance(config, dict) or not needed <= set(config):
        raise CheckpointError(f"{folder / CONFIG} is not one that gatefit wrote: keys are missing")
    if config["format"] != FORMAT:
        raise CheckpointError(f"{folder / CONFIG} has format {config['format']}; this gatefit reads {FORMAT}")
    return config


def _architecture(gated: fx.GraphModule) -> str:
    """Digest of what is computed: the graph's code and the settings of all modules."""
    return hashlib.sha256(f"{gated.code}{gated}".encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
