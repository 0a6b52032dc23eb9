"""How long work tells where it stands: one record, and one kind of callback for all of gatefit."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

SECONDS = 10.0
"""Between two lines of one stage, at least; its first and last step have lines of their own."""


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

    def figures(self) -> str:
        """Write what a training has measured; empty where it has not."""
        figures = [] if self.loss is None else [f"loss {self.loss:.3f}"]
        if self.accuracy is not None:
            figures.append(f"acc {100 * self.accuracy:.1f} %")
        if self.share is not None:
            figures.append(f"MACs {100 * self.share:.1f} %")
        return "  ".join(figures)


OnProgress = Callable[[Progress], None]
"""Called after each step of long work, and with each message."""


def silent(progress: Progress) -> None:
    """Ignore all progress: the default where nobody watches."""


def to_stderr(line: str) -> None:
    """Write one line to stderr at once."""
    print(line, file=sys.stderr, flush=True)


@dataclass
class Lines:
    """Writes progress as plain lines, for pipes and notebooks: messages, and of each stage a step now and then."""

    write: Callable[[str], None] = to_stderr
    clock: Callable[[], float] = time.monotonic
    """Tells the seconds."""
    _due: dict[str, float] = field(default_factory=dict)
    """When each stage gets its next line."""

    def __call__(self, progress: Progress) -> None:
        """Write the line that a record asks for, if any is due."""
        if progress.message:
            self.write(progress.message)
        now, last = self.clock(), progress.step >= progress.steps
        if not progress.steps or (now < self._due.get(progress.stage, 0.0) and not last):
            return
        self._due[progress.stage] = now + SECONDS
        self.write(f"{progress.stage} {progress.step}/{progress.steps}  {progress.figures()}".rstrip())
        if last:
            del self._due[progress.stage]
