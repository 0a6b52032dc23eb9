"""gatefit: turn a trained network into one that runs only the blocks and channels each image needs."""

import contextlib
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gatefit._moved import Finder
from gatefit.version import __version__

if TYPE_CHECKING:
    from gatefit.commands.deploy import load_deployed, save_deployed
    from gatefit.commands.hub import from_pretrained, push_to_hub, save_pretrained
    from gatefit.deployment.deploy import deploy
    from gatefit.errors import GatefitError
    from gatefit.gating.checkpoint import load, save
    from gatefit.gating.insert import find_blocks, retrofit
    from gatefit.gating.penalty import salience_penalty
    from gatefit.graph.blocks import FoundBlocks, ResidualBlock, Skipped
    from gatefit.training.evaluate import Evaluation, evaluate
    from gatefit.training.finetune import finetune

__all__ = [
    "Evaluation",
    "FoundBlocks",
    "GatefitError",
    "ResidualBlock",
    "Skipped",
    "__version__",
    "deploy",
    "evaluate",
    "find_blocks",
    "finetune",
    "from_pretrained",
    "load",
    "load_deployed",
    "push_to_hub",
    "retrofit",
    "salience_penalty",
    "save",
    "save_deployed",
    "save_pretrained",
]

_HOMES = {
    "Evaluation": "training.evaluate",
    "FoundBlocks": "graph.blocks",
    "GatefitError": "errors",
    "ResidualBlock": "graph.blocks",
    "Skipped": "graph.blocks",
    "deploy": "deployment.deploy",
    "evaluate": "training.evaluate",
    "find_blocks": "gating.insert",
    "finetune": "training.finetune",
    "from_pretrained": "commands.hub",
    "load": "gating.checkpoint",
    "load_deployed": "commands.deploy",
    "push_to_hub": "commands.hub",
    "retrofit": "gating.insert",
    "salience_penalty": "gating.penalty",
    "save": "gating.checkpoint",
    "save_deployed": "commands.deploy",
    "save_pretrained": "commands.hub",
}
"""Where each public name is defined. PyTorch is imported at the first use of one of them, not by `import gatefit`."""


sys.meta_path.append(Finder())


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gatefit' has no attribute '{name}'")
    with contextlib.redirect_stdout(sys.stderr):  # what libraries say when they are imported is no result
        module = import_module(f"gatefit.{_HOMES[name]}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
