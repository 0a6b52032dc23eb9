"""What a gated network knows of itself: one typed record on its graph."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import fx, nn

from gatefit.errors import GatefitError
from gatefit.gating.gates import GateForm
from gatefit.gating.verify import Verification
from gatefit.graph.example import takes_one_tensor
from gatefit.inputs.models import InputSpec, ModelReference

GateKinds = Literal["lc", "l", "c"]
"""Which gates each block gets: block gates (L-Net), channel gates (C-Net), or both."""
_KEY = "gatefit"
DEPLOYED = "gatefit_deployed"
"""Where a deployed network keeps its record, see `gatefit.deployment.info`."""


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
        GatefitError: `retrofit` or `load` did not make the network, or it is deployed.
    """
    notes = getattr(gated, _notes(gated), None)
    if isinstance(notes, dict) and DEPLOYED in notes:
        raise GatefitError("this network is deployed, for running alone; pass the gated network it was made from")
    info = notes.get(_KEY) if isinstance(notes, dict) else None
    if not isinstance(info, GatedInfo):
        raise GatefitError("this network has no gates; call gatefit.retrofit(model) first")
    return info


def image_spec(gated: nn.Module) -> InputSpec:
    """Return what images a gated network takes.

    Raises:
        GatefitError: it takes something else than one batch of images (B, C, H, W), or it has no gates.
    """
    spec = info_of(gated).input
    if len(spec.shape) == 3 and _takes_one_tensor(gated):
        return spec
    shape = ", ".join(["B", *(str(size) for size in spec.shape)])
    what = f"inputs ({shape})" if _takes_one_tensor(gated) else "several inputs"
    raise GatefitError(
        f"this network takes {what}, and this part of gatefit knows batches of images (B, C, H, W) alone; train "
        "it in a loop of your own with gatefit.salience_penalty"
    )


def _takes_one_tensor(gated: nn.Module) -> bool:
    """Tell whether a gated network takes one tensor alone, as all do that are traced in parts."""
    return not isinstance(gated, fx.GraphModule) or takes_one_tensor(gated)


def set_info(gated: nn.Module, info: GatedInfo | None = None, **changes: Any) -> None:
    """Give a gated network its record, or change fields of the one that it has."""
    record = info if info is not None else replace(info_of(gated), **changes)
    setattr(gated, _notes(gated), {**getattr(gated, _notes(gated), {}), _KEY: record})


def _notes(gated: nn.Module) -> str:
    """Name the attribute that keeps the record: a graph's own, or one that no network of another kind has."""
    return "meta" if isinstance(gated, fx.GraphModule) else "_gatefit_notes"
