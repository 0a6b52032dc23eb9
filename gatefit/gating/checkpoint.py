"""Save and load a gated network: safetensors weights and a config.json that says how to build it."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatefit.errors import CheckpointError, GatefitError, first_line
from gatefit.files import digest, read_tensors, relative_to, write_tensors
from gatefit.folder import CONFIG, ORIGINAL, WEIGHTS, Config, Figures, read_config, write_config
from gatefit.gating.gates import PREFIX, Gate, gates_of
from gatefit.gating.info import info_of, set_info
from gatefit.gating.insert import rewrite
from gatefit.graph.example import Example
from gatefit.inputs.models import InputSpec, ModelReference, build, from_registry, load_weights


def save(
    gated: fx.GraphModule, folder: str | Path, *, classes: Sequence[str] | None = None, figures: Figures | None = None
) -> None:
    """Write a gated network into `folder` as `model.safetensors` and `config.json`.

    A network that gatefit did not build itself is recognised where timm or torchvision has it; any other needs
    `gatefit.load(folder, model=...)` to be read back. Where `original.safetensors` lies in the folder, its hash is
    kept too.

    Args:
        gated: from `retrofit`, `finetune` or `load`.
        folder: made where it is missing.
        classes: class names in the order of the outputs.
        figures: what an evaluation found.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    write_tensors(folder / WEIGHTS, gated.state_dict())
    files = [name for name in (WEIGHTS, ORIGINAL) if (folder / name).is_file()]
    config = Config(
        kind="gated",
        model=_written(info_of(gated).reference, folder),
        input=asdict(info_of(gated).input),
        part={
            "gates": info_of(gated).gates,
            "form": next(iter(gates_of(gated).values())).form,
            "compensation": info_of(gated).compensation,
            "blocks": _blocks(gated),
            "architecture": _architecture(gated),
        },
        files={name: digest(folder / name) for name in files},
        classes=tuple(classes) if classes else None,
        figures=figures,
    )
    write_config(folder, config)


def load(folder: str | Path, model: nn.Module | None = None, example: Example | None = None) -> fx.GraphModule:
    """Read a gated network that `save` wrote, in eval mode; its outputs are the same to the bit.

    Args:
        folder: where it was saved.
        model: the original architecture (any weights), for networks that neither timm nor torchvision has.
        example: what `retrofit` was given, for networks of several inputs.

    Raises:
        CheckpointError: the folder is incomplete, truncated, tampered with, or does not fit the network.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_tensors(folder / WEIGHTS)
    config.check_file(folder, WEIGHTS)
    reference = _read_reference(config, folder)
    own, part = model, config.part
    try:
        if model is None:
            if reference is None:
                raise CheckpointError(
                    f"{folder} was saved from a network of your own; call gatefit.load(folder, model=...)"
                )
            _need_file(reference, folder)
            model = build(reference)
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.input.items()}
        spec = InputSpec(**given)
        example = torch.zeros(2, *spec.shape) if example is None else example
        gated = rewrite(model.eval(), example, part["gates"], part["form"], part["compensation"])
        if _blocks(gated) != part["blocks"]:
            raise CheckpointError(f"{folder}: its gates do not fit the network that {CONFIG} names")
        architecture = _architecture(gated) if config.format > 1 else _architecture_of_format_1(gated)
        if own is None and architecture != part["architecture"]:
            raise CheckpointError(
                f"{folder}: {reference} as built here is not the network that was saved (other "
                "arguments, or another version of its library); call gatefit.load(folder, model=...)"
            )
        gated.load_state_dict(tensors if config.format > 1 else _from_format_1(tensors))
    except GatefitError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder} does not fit its network: {first_line(error)}") from error
    set_info(gated, input=spec, reference=reference)
    return gated.eval()


def load_original(folder: Path) -> nn.Module | None:
    """Read the original network of a folder, in eval mode; None where the folder does not hold its weights.

    Raises:
        GatefitError: its weights are not those that were saved, or the network cannot be built.
    """
    if not (folder / ORIGINAL).is_file():
        return None
    config = read_config(folder)
    if config.format > 1:  # format 1 kept no hash of it
        config.check_file(folder, ORIGINAL)
    reference = _read_reference(config, folder)
    if reference is None:
        return None
    original = build(reference)
    load_weights(original, folder / ORIGINAL)
    return original.eval()


def record_file(folder: Path, name: str) -> None:
    """Keep the hash of one more file that decides an answer in the folder's config, unless it lies elsewhere.

    Raises:
        CheckpointError: the file or the config cannot be read, or the config cannot be written.
    """
    config = read_config(folder)
    if config.format > 1 and not name.startswith("../"):
        write_config(folder, replace(config, files={**config.files, name: digest(folder / name)}))


def _written(reference: ModelReference | None, folder: Path) -> dict[str, Any] | None:
    """Write a reference as `config.json` keeps it: one that needs no network, its file as seen from the folder."""
    if reference is None:
        return None
    written = asdict(from_registry(reference))
    if reference.source == "file":
        path, function = reference.name.rsplit(":", 1)
        written["name"] = f"{relative_to(folder, Path(path))}:{function}"
    return written


def _read_reference(config: Config, folder: Path) -> ModelReference | None:
    if config.model is None:
        return None
    try:
        reference = ModelReference(**config.model)
        if reference.source != "file":
            return reference
        path, function = reference.name.rsplit(":", 1)
        file = (folder.resolve() / path).resolve()
        return ModelReference("file", f"{file}:{function}", reference.arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not one that gatefit wrote: {error}") from error


def _need_file(reference: ModelReference, folder: Path) -> None:
    file = reference.name.rpartition(":")[0]
    if reference.source == "file" and not Path(file).is_file():
        raise CheckpointError(
            f"no file '{file}', which builds the network of {folder}; put it there, or call "
            "gatefit.load(folder, model=...)"
        )


def _blocks(gated: fx.GraphModule) -> list[dict[str, Any]]:
    return [{"name": n, "features": g.of.features, "units": g.of.units} for n, g in gates_of(gated).items()]


def _architecture(gated: fx.GraphModule) -> str:
    """Digest of what is computed: each node's function or module with its settings, and what it reads.

    Nodes are counted, not named, and gates are described by `blocks`: what a later version calls them does not count.
    """
    numbers = {node: i for i, node in enumerate(gated.graph.nodes)}
    lines = []
    for node in gated.graph.nodes:
        what: Any = node.target
        if node.op == "call_module":
            module = gated.get_submodule(str(node.target))
            what = "gate" if isinstance(module, Gate) else f"{node.target} {module}"
        elif node.op == "call_function":
            home = str(getattr(what, "__module__", ""))
            what = f"{'gatefit' if home.startswith('gatefit.') else home}.{getattr(what, '__name__', '')}"
        lines.append(f"{node.op} {what} {fx.map_arg((node.args, node.kwargs), lambda n: f'#{numbers[n]}')}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _architecture_of_format_1(gated: fx.GraphModule) -> str:
    """Compute the digest that format 1 kept, which hung on the names of its time."""
    text = f"{gated.code}{gated}"
    for now, then in (
        ("gatefit_graph_ops_", "gatefit_gates_"),
        ("add_compensation", "add_fill"),
        ("(compensation)", "(fill)"),
    ):
        text = text.replace(now, then)
    return hashlib.sha256(text.encode()).hexdigest()


def _from_format_1(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename what format 1 called otherwise: a gate's `fill` and `lowered`."""
    return {
        key.replace(".fill.weight", ".compensation.weight").replace(".lowered", ".threshold")
        if key.startswith(f"{PREFIX}.")
        else key: value
        for key, value in tensors.items()
    }
