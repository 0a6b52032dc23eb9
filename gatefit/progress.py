"""How long work tells where it stands: one record, and one kind of callback for all of gatefit."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a stage stands after a step, or one line that it has to say."""

    stage: str
    """Such as "initialise", "fine-tune" or "evaluate"."""
    step: int = 0
    steps: int = 0
    """Steps in all; 0: the record holds a message alone."""
    loss: float | None = None
    """Of training, like the next two: the mean over the epoch under way."""
    accuracy: float | None = None
    """Share of training images classified right."""
    share: float | None = None
    """Share of the dense MACs that really ran."""
    message: str = ""
    """One line for the user; empty: none."""


OnProgress = Callable[[Progress], None]
"""Called after each step of long work, and with each message."""


def silent(progress: Progress) -> None:
    """Ignore all progress: the default where nobody watches."""
