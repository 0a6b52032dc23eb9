"""Networks by name: timm, torchvision, or a function in the user's own file; and weights for them."""

import ast
import difflib
import fnmatch
import importlib.util
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from gatefit.errors import ModelError, first_line
from gatefit.inputs.spec import InputSpec
from gatefit.inputs.spec import input_spec as input_spec
from gatefit.mode import evaluating

HUB = "hf-hub:"
"""What timm's names of networks on the Hugging Face Hub begin with."""


@dataclass(frozen=True)
class ModelReference:
    """How to build a network again: source ("timm", "torchvision" or "file"), name and keyword arguments."""

    source: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def on_hub(self) -> bool:
        """Tell whether timm takes it from the Hugging Face Hub."""
        return self.source == "timm" and self.name.startswith(HUB)

    def __str__(self) -> str:
        return self.name if self.source == "file" or self.on_hub else f"{self.source}/{self.name}"


def parse_reference(text: str, base: Path | None = None) -> ModelReference:
    """Read "NAME", "timm/NAME", "torchvision/NAME", "hf-hub:USER/NAME" or "file.py:function" (relative to `base`).

    Raises:
        ModelError: no such model, with the nearest names; or no such file. Names on the Hub are looked up by `build`.
    """
    prefix, colon, repository = text.partition(":")
    if colon and prefix.replace("_", "-") + colon == HUB:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", repository):
            raise ModelError(f"'{text}' names no network on the Hugging Face Hub; write {HUB}USER/NAME")
        return ModelReference("timm", HUB + repository)
    if ".py:" in text and not text.endswith(".py:"):
        path, function = text.rsplit(":", 1)
        file = Path(path) if base is None or Path(path).is_absolute() else base / path
        if not file.is_file():
            raise ModelError(f"no file '{file}' for the model '{text}'")
        return ModelReference("file", f"{file}:{function}")
    if text.endswith((".py", ".py:")):
        raise ModelError(_function_missing(text.removesuffix(":")))
    source, _, name = text.rpartition("/")
    if source == "torchvision" or (not source and not timm.is_model(name) and name in _torchvision_names()):
        if name in _torchvision_names():
            return ModelReference("torchvision", name)
    elif source in ("", "timm") and timm.is_model(name):
        return ModelReference("timm", name)
    known = {"timm": timm.list_models(), "torchvision": _torchvision_names()}
    names = known.get(source) or [*known["timm"], *known["torchvision"]]
    near = list(dict.fromkeys(difflib.get_close_matches(name, names, n=3, cutoff=0.5)))
    hint = f"; did you mean {', '.join(near)}?" if near else "; see timm.list_models() and torchvision.models"
    raise ModelError(f"no model '{text}' in {source or 'timm or torchvision'}{hint}")


def _function_missing(text: str) -> str:
    """Say what a file offers, without running it, to a user who named none of it."""
    message = f"'{text}' is a file; name the function in it that builds the network"
    try:
        tree = ast.parse(Path(text).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return f"{message}: {text}:FUNCTION"
    kinds = ast.FunctionDef | ast.ClassDef
    names = [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    if not names:
        return f"{message}; it has none"
    return f"{message}: add :FUNCTION; it has {', '.join(names[:10])}"


def names_like(pattern: str) -> list[str]:
    """List names of timm and torchvision, qualified, that contain `pattern` or fit it as a shell pattern ("resnet*d").

    Raises:
        ModelError: there is none.
    """
    every = [f"timm/{n}" for n in timm.list_models()] + [f"torchvision/{n}" for n in _torchvision_names()]
    fitting = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    chosen = [n for n in every if fnmatch.fnmatch(n, fitting) or fnmatch.fnmatch(n.partition("/")[2], fitting)]
    if not chosen:
        raise ModelError(f"no model of timm or torchvision fits '{pattern}'")
    return chosen


def build(reference: ModelReference, pretrained: bool = False) -> nn.Module:
    """Build the network of a reference, in eval mode.

    Raises:
        ModelError: it cannot be built, or its weights cannot be fetched.
    """
    if reference.source == "file":
        if pretrained:
            raise ModelError(f"--pretrained is for timm and torchvision names; pass --weights FILE for {reference}")
        return _from_file(reference).eval()
    try:
        if reference.source == "timm":
            model = timm.create_model(reference.name, pretrained=pretrained, **reference.arguments)
        else:
            weights = "DEFAULT" if pretrained else None
            model = torchvision.models.get_model(reference.name, weights=weights, **reference.arguments)
    except Exception as error:
        if reference.on_hub:
            raise ModelError(
                f"{reference} could not be fetched from the Hugging Face Hub "
                f"({first_line(error)[:160].split('. ')[0]}); check its name and the network"
            ) from error
        if pretrained:
            raise ModelError(
                f"the pretrained weights of {reference} could not be fetched ({first_line(error)[:160]}); "
                "check the network, or pass --weights FILE (and --data DIR, or the images are fetched too)"
            ) from error
        raise ModelError(f"{reference} cannot be built: {first_line(error)[:160]}") from error
    return model.eval()


def from_registry(reference: ModelReference) -> ModelReference:
    """Return the architecture of a Hub name by its name in timm's own registry, which takes no download to build.

    Other references are returned as they are; so is a Hub name whose description cannot be fetched (again).
    """
    if not reference.on_hub:
        return reference
    try:
        config, name, arguments = timm.models.load_model_config_from_hf(reference.name.removeprefix(HUB))
    except Exception:
        return reference
    kept = {k: config[k] for k in ("num_classes", "global_pool") if config.get(k) is not None}
    return ModelReference("timm", name, {**kept, **(arguments or {}), **reference.arguments})


def skeleton(reference: ModelReference) -> nn.Module:
    """Build a network without numbers in it, on the meta device; or where it cannot be built there, as `build` does."""
    try:
        with torch.device("meta"):
            return build(reference)
    except Exception:
        return build(reference)


def recognise(model: nn.Module) -> ModelReference | None:
    """Find the reference that builds a network of this one's keys and shapes, if timm or torchvision has it."""
    home = type(model).__module__
    candidates: list[ModelReference] = []
    if home.startswith("timm."):
        name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
        if timm.is_model(name):
            candidates.append(ModelReference("timm", name, {"num_classes": getattr(model, "num_classes", 1000)}))
    elif home.startswith("torchvision."):
        heads = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        weight = heads[-1].weight if heads else torch.zeros(0)
        for name in _torchvision_names():
            if torchvision.models.get_model_builder(name).__module__ == home:
                candidates.append(ModelReference("torchvision", name, {"num_classes": weight.shape[0]}))
    wanted = {k: v.shape for k, v in model.state_dict().items()}
    for reference in candidates:
        try:
            with torch.device("meta"):
                built = build(reference)
        except (ModelError, RuntimeError):
            continue
        if {k: v.shape for k, v in built.state_dict().items()} == wanted:
            return reference
    return None


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a .safetensors file, or a torch checkpoint of plain tensors, into a network.

    Raises:
        ModelError: the file is missing, unreadable, or its keys or shapes do not fit (which are named).
    """
    state = read_weights(file)
    own = model.state_dict()
    wanted = {k for k in own if not k.endswith("num_batches_tracked")}
    wrong = [
        f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    missing = sorted(wanted - set(state))
    unknown = sorted(set(state) - set(own))
    for what, keys in (("do not fit in shape", wrong), ("are missing", missing), ("are unknown", unknown)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ModelError(f"{file}: these keys {what}: {', '.join(keys[:3])}{more}; is it for another model?")
    model.load_state_dict(state, strict=False)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a weight file by key; torch files are read with weights_only."""
    if not file.is_file():
        raise ModelError(f"no weight file '{file}'")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(f"{file} cannot be read as weights: {first_line(error)[:160]}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{file} holds no state dict")
    return {k.removeprefix("module."): v for k, v in state.items()}


@torch.no_grad()
def output_count(model: nn.Module, spec: InputSpec) -> int:
    """Count the classes that a network tells apart.

    Raises:
        ModelError: it does not take images of that size, or does not return logits (B, classes).
    """
    parameter = next(model.parameters(), torch.zeros(0))
    try:
        with evaluating(model):
            logits = model(torch.zeros(1, *spec.shape, device=parameter.device, dtype=parameter.dtype))
    except Exception as error:
        raise ModelError(
            f"the network does not take images of {'x'.join(map(str, spec.shape))} (channels, height, width) "
            f"({first_line(error)[:120]}); pass --image-size N (in a recipe model.image_size)"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ModelError("the network does not return one row of logits for each image")
    return logits.shape[1]


def _torchvision_names() -> list[str]:
    return list(torchvision.models.list_models(module=torchvision.models))


def _from_file(reference: ModelReference) -> nn.Module:
    path, function = reference.name.rsplit(":", 1)
    spec = importlib.util.spec_from_file_location(f"gatefit_user_{Path(path).stem}", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ModelError(f"no file '{path}' for the model '{reference}'")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that ends itself, as argparse does
        raise ModelError(f"{path} cannot be imported: {first_line(error)[:160]}") from error
    builder = getattr(module, function, None)
    if not callable(builder):
        names = [n for n, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == spec.name]
        near = difflib.get_close_matches(function, names, n=3, cutoff=0.4) or names[:3]
        raise ModelError(f"{path} has no function '{function}'; did you mean {', '.join(near) or 'another file'}?")
    try:
        model = builder(**reference.arguments)
    except (Exception, SystemExit) as error:
        raise ModelError(f"{reference} cannot be built: {first_line(error)[:160]}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{reference} returned {type(model).__name__}, not a torch module")
    return model
