"""The contract between what decides and everything that asks what was decided.

A *decider* is what chooses, for each image, the work that a network does: gates today, exits, network selection and
dials to come. Costs, evaluation, report and deployment ask two questions of it, and know nothing else about it: what
did each image of the last batch run (`Decisions`), and how many multiply-accumulates is that (`Costs`)?

Example: a network has one block of 100 MACs outside of all gates and 40 in its branch, half of which shrink with two
channel units. For a batch of two images, `BlockDecision(runs=[True, False], units=[[True, False], [True, True]])`
says that the first image runs the branch with one unit of two, and the second one skips it: 100 + 20 + 10 and 100
MACs, besides the gates' own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Placement = Literal["sequential", "parallel"]
"""sequential: the decider runs first, so all that is closed is saved. parallel: gates run beside the first layer of the
branch, which always runs whole; no latency is added."""


@dataclass(frozen=True)
class BlockDecision:
    """What each image of a batch runs of one block; at least one of both is given."""

    runs: Tensor | None
    """(B,) bool: whether the branch runs. None: it always does."""
    units: Tensor | None
    """(B, units) bool: which of its channel units are open. None: all of them."""

    @property
    def mask(self) -> Tensor:
        """Give both as one mask, (B, 1 + units) bool: whether the branch runs, then which of its units do."""
        given = self.runs if self.runs is not None else self.units
        assert given is not None
        runs = self.runs[:, None] if self.runs is not None else torch.ones_like(given[:, :1])
        units = runs[:, :0] if self.units is None else self.units & runs
        return torch.cat([runs, units], 1)


@dataclass(frozen=True)
class Decisions:
    """What each image of a batch runs."""

    blocks: Mapping[str, BlockDecision]
    """By block name."""


class Costs(Protocol):
    """Multiply-accumulates (MACs) of a network at one image size."""

    @property
    def dense(self) -> int:
        """Give the MACs of one image in the original network."""

    @property
    def parents(self) -> Mapping[str, str | None]:
        """Name each decided block and the block in whose branch it lies, outer blocks first."""

    def per_image(self, decisions: Decisions, placement: Placement = "sequential") -> Tensor:
        """Add up the MACs of each image, those of the deciders included: (B,) float64."""


class Decider(Protocol):
    """What decides in one network."""

    def costs(self, image_shape: tuple[int, ...]) -> Costs:
        """Compute the costs for images of shape (C, H, W)."""

    def decisions(self) -> Decisions:
        """Tell what the last forward decided."""
