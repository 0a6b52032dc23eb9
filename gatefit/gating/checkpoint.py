"""Save and load a gated network: safetensors weights and a config.json that says how to build it."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, fx, nn

from gatefit.errors import CheckpointError, GatefitError, first_line
from gatefit.files import digest, plain_tensors, read_tensors, replacing
from gatefit.folder import CONFIG, ORIGINAL, WEIGHTS, Config, Figures, read_config, this_versions, to_text, write_config
from gatefit.gating.architecture import architecture_of, architecture_of_format_1, blocks_of
from gatefit.gating.gates import PREFIX, gates_of
from gatefit.gating.info import info_of, set_info
from gatefit.gating.insert import rewrite
from gatefit.gating.original import build_original, read_reference, read_spec, written_reference
from gatefit.graph.example import Example


def save(
    gated: fx.GraphModule, folder: str | Path, *, classes: Sequence[str] | None = None, figures: Figures | None = None
) -> None:
    """Write a gated network into `folder` as `model.safetensors` and `config.json`, both or neither.

    A network that gatefit did not build itself is recognised where timm or torchvision has it; any other needs
    `gatefit.load(folder, model=...)` to be read back. Where `original.safetensors` lies in the folder, its hash is
    kept too.

    Args:
        gated: from `retrofit`, `finetune` or `load`.
        folder: made where it is missing.
        classes: class names in the order of the outputs.
        figures: what an evaluation found.

    Raises:
        GatefitError: the network has no gates, `classes` are no names, or the folder cannot be written; what was in
            it before is as it was.
    """
    folder, info = Path(folder), info_of(gated)
    if classes is not None and (isinstance(classes, str) or not all(isinstance(name, str) for name in classes)):
        raise CheckpointError('classes must be a list of names, such as ["cat", "dog"]')
    config = Config(
        kind="gated",
        model=written_reference(info.reference, folder),
        input=asdict(info.input),
        part={
            "gates": info.gates,
            "form": next(iter(gates_of(gated).values())).form,
            "compensation": info.compensation,
            "blocks": blocks_of(gated),
            "architecture": architecture_of(gated),
        },
        files={},
        classes=tuple(classes) if classes else None,
        figures=figures,
    )
    with replacing(folder / WEIGHTS, folder / CONFIG) as (weights, text):
        safetensors.torch.save_file(plain_tensors(gated.state_dict()), weights)
        files = {WEIGHTS: digest(weights)}
        if (folder / ORIGINAL).is_file():
            files[ORIGINAL] = digest(folder / ORIGINAL)
        text.write_text(to_text(replace(config, files=files)), encoding="utf-8")


def load(
    folder: str | Path, model: nn.Module | None = None, example: Example | None = None, *, trust_code: bool = False
) -> fx.GraphModule:
    """Read a gated network that `save` wrote, in eval mode; its outputs are the same to the bit.

    Args:
        folder: where it was saved.
        model: the original architecture (any weights), for networks that neither timm nor torchvision has.
        example: what `retrofit` was given, for networks of several inputs.
        trust_code: build the network as `config.json` says without `model` too: run the function in a Python file that
            it names, or fetch what it names from the Hugging Face Hub. Only for folders that you trust as programs.

    Raises:
        CheckpointError: the folder is incomplete, truncated, tampered with, does not fit the network, or needs `model`
            or your word.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_tensors(folder / WEIGHTS)
    config.check_file(folder, WEIGHTS)
    if config.format > 1 and (folder / ORIGINAL).is_file():
        config.check_file(folder, ORIGINAL)
    reference, spec, part = read_reference(config, folder), read_spec(config, folder), config.part
    if model is not None and not isinstance(model, nn.Module):
        raise CheckpointError(f"model must be the original network, a torch.nn.Module, not {type(model).__name__}")
    network = build_original(config, folder, trust_code) if model is None else model
    try:
        example = torch.zeros(2, *spec.shape) if example is None else example
        gated = rewrite(network.eval(), example, part["gates"], part["form"], part["compensation"])
        if blocks_of(gated) != part["blocks"]:
            raise CheckpointError(f"{folder}: its gates do not fit the network that {CONFIG} names")
        gated.load_state_dict(tensors if config.format > 1 else _from_format_1(tensors))
    except GatefitError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder} does not fit its network: {first_line(error)}") from error
    _check_architecture(gated, config, folder, str(reference) if model is None else "")
    set_info(gated, input=spec, reference=reference)
    return gated.eval()


def record_file(folder: Path, name: str) -> None:
    """Keep the hash of one more file that decides an answer in the folder's config, unless it lies elsewhere.

    Raises:
        CheckpointError: the file or the config cannot be read, or the config cannot be written.
    """
    config = read_config(folder)
    if config.format > 1 and not name.startswith("../"):
        write_config(folder, replace(config, files={**config.files, name: digest(folder / name)}))


def _check_architecture(gated: fx.GraphModule, config: Config, folder: Path, built: str) -> None:
    """Refuse a network that computes otherwise than the one that was saved, or warn where a library may be why.

    Keys and shapes do not tell ReLU from GELU. Libraries change how they describe their layers now and then: a network
    that the user gives is taken in spite of that, where they are of other versions than when it was saved.
    """
    architecture = architecture_of(gated) if config.format > 1 else architecture_of_format_1(gated)
    if architecture == config.part["architecture"]:
        return
    if built:
        raise CheckpointError(
            f"{folder}: {built} as built here is not the network that was saved (other "
            "arguments, or another version of its library); call gatefit.load(folder, model=...)"
        )
    now = this_versions()
    saved = {name: config.versions.get(name, "unknown") for name in now if name not in ("python", "gatefit")}
    changed = [f"{name} {then}, now {now[name]}" for name, then in saved.items() if then != now[name]]
    if not changed:
        raise CheckpointError(
            f"{folder}: the network given is not the one that was saved: its keys and shapes fit, what it computes "
            "does not (another activation, layer setting or order of layers); give the same network"
        )
    warnings.warn(
        f"{folder}: the network given is not described as the one that was saved; it may compute something else, or "
        f"libraries describe it otherwise (saved with {'; '.join(changed)}): compare its outputs with the original's",
        stacklevel=3,
    )


def _from_format_1(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename what format 1 called otherwise: a gate's `fill` and `lowered`."""
    return {
        key.replace(".fill.weight", ".compensation.weight").replace(".lowered", ".threshold")
        if key.startswith(f"{PREFIX}.")
        else key: value
        for key, value in tensors.items()
    }
