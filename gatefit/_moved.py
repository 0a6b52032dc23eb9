"""Modules of gatefit 0.1 by their old names: `import gatefit.surgery` gives `gatefit.gating.insert`, with a warning."""

import importlib
import importlib.util
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "blocks": "graph.blocks",
    "channels": "graph.channels",
    "cli": "commands.cli",
    "control": "gating.threshold",
    "convert": "commands.convert",
    "cost": "gating.cost",
    "coverage": "commands.coverage",
    "data": "inputs.data",
    "display": "commands.display",
    "distill": "training.objective",
    "fold": "graph.fold",
    "gates": "gating.gates",
    "models": "inputs.models",
    "penalty": "gating.penalty",
    "refit": "gating.reconstruct",
    "report": "commands.report",
    "start": "gating.initialise",
    "store": "gating.checkpoint",
    "surgery": "gating.insert",
    "tracer": "graph.tracer",
    "units": "formats",
    "verify": "gating.verify",
}
"""Old and new names, below `gatefit`."""


class _Alias(Loader):
    """Gives an old name the content of the new module."""

    def __init__(self, new: str) -> None:
        self.new = new

    def exec_module(self, module: ModuleType) -> None:
        new = vars(importlib.import_module(self.new))
        vars(module).update({k: v for k, v in new.items() if not k.startswith("__")})


class Finder(MetaPathFinder):
    """Finds modules by their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        package, _, old = fullname.partition(".")
        if package != "gatefit" or old not in MOVED:
            return None
        new = f"gatefit.{MOVED[old]}"
        warnings.warn(f"{fullname} is now {new}", FutureWarning, stacklevel=2)
        return importlib.util.spec_from_loader(fullname, _Alias(new))
