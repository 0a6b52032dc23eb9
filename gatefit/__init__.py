"""gatefit: turn a trained network into one that runs only the blocks and channels each image needs."""

import contextlib
import sys

with contextlib.redirect_stdout(sys.stderr):  # what libraries say when they are imported is no result
    from gatefit.blocks import FoundBlocks, ResidualBlock, Skipped
    from gatefit.deployment import deploy
    from gatefit.errors import GatefitError
    from gatefit.evaluate import Evaluation, evaluate
    from gatefit.finetune import finetune
    from gatefit.penalty import salience_penalty
    from gatefit.store import load, save
    from gatefit.surgery import find_blocks, retrofit

__version__ = "0.1.0"
__all__ = [
    "Evaluation",
    "FoundBlocks",
    "GatefitError",
    "ResidualBlock",
    "Skipped",
    "deploy",
    "evaluate",
    "find_blocks",
    "finetune",
    "load",
    "retrofit",
    "salience_penalty",
    "save",
]
