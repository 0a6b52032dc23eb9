"""What a gated network knows of itself: one typed record on its graph."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx, nn

from gatefit.errors import GatefitError
from gatefit.gating.gates import GateForm
from gatefit.gating.verify import Verification
from gatefit.inputs.models import InputSpec, ModelReference

GateKinds = Literal["lc", "l", "c"]
"""Which gates each block gets: block gates (L-Net), channel gates (C-Net), or both."""
_KEY = "gatefit"


@dataclass(frozen=True)
class GatedInfo:
    """How a gated network was made, and what its input looks like."""

    gates: GateKinds
    form: GateForm
    compensation: bool
    """Whether closed channels leave their prediction behind."""
    input: InputSpec
    reference: ModelReference | None = None
    """How the original is built by name; None: a network of the user's own."""
    verification: Verification | None = None
    """What the proof of the conversion checked; None: it was not run (the network was loaded)."""


def info_of(gated: nn.Module) -> GatedInfo:
    """Return the record of a gated network.

    Raises:
        GatefitError: `retrofit` or `load` did not make the network.
    """
    info = getattr(gated, _notes(gated), {}).get(_KEY)
    if not isinstance(info, GatedInfo):
        raise GatefitError("this network has no gates; call gatefit.retrofit(model) first")
    return info


def set_info(gated: nn.Module, info: GatedInfo | None = None, **changes: Any) -> None:
    """Give a gated network its record, or change fields of the one that it has."""
    record = info if info is not None else replace(info_of(gated), **changes)
    setattr(gated, _notes(gated), {**getattr(gated, _notes(gated), {}), _KEY: record})


def _notes(gated: nn.Module) -> str:
    """Name the attribute that keeps the record: a graph's own, or one that no network of another kind has."""
    return "meta" if isinstance(gated, fx.GraphModule) else "_gatefit_notes"
