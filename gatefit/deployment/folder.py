"""A deployment beside the gated network that it was made from: `deployment.json`, and for ONNX the file itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from gatefit.convert import Opened
from gatefit.data import some_images
from gatefit.deployment import Backend, deploy
from gatefit.deployment.branch import Place, place_or_none
from gatefit.deployment.dynamic import assemble
from gatefit.deployment.engines import OnnxNetwork, masked_onnx, need_onnx, packed
from gatefit.deployment.native import processor
from gatefit.deployment.native_network import gathered_network
from gatefit.deployment.plan import BlockPlan
from gatefit.errors import CheckpointError, DeployError
from gatefit.files import read_json, write_atomically, write_json
from gatefit.gates import gates_of
from gatefit.store import load

FILE = "deployment.json"
FORMAT = 1
CALIBRATION = 256
"""Training images that masks are chosen by."""


@dataclass(frozen=True)
class Machine:
    """What a deployment was tuned for, in words."""

    processor: str
    threads: int
    torch: str


def this_machine() -> Machine:
    """The machine at hand."""
    return Machine(processor("model name"), torch.get_num_threads(), torch.__version__)


def write_deployment(
    folder: Path,
    plans: tuple[BlockPlan, ...],
    gathered: bool = False,
    model: bytes | None = None,
    onnx: Path | None = None,
) -> None:
    """Write `deployment.json` into the folder of the gated network, and an ONNX file.

    Raises:
        CheckpointError: they cannot be written.
    """
    if model is not None and onnx is not None:
        write_atomically(onnx, lambda file: file.write_bytes(model))
    machine = this_machine()
    blocks = [
        {
            "name": p.name,
            "skip": p.skip,
            "exact": p.exact,
            "reason": p.reason,
            "codebook": None if p.codebook is None else [e.nonzero()[:, 0].tolist() for e in p.codebook],
        }
        for p in plans
    ]
    content = {
        "format": FORMAT,
        "backend": "torch" if model is None else "onnx",
        "file": None if onnx is None else str(onnx.absolute()),
        "gathered": gathered,
        "machine": {"processor": machine.processor, "threads": machine.threads, "torch": machine.torch},
        "blocks": blocks,
    }
    write_json(folder / FILE, content)


def load_deployed(folder: str | Path) -> fx.GraphModule | OnnxNetwork:
    """Read a deployment back, in any process; outputs are the same to the bit on the same machine.

    Raises:
        CheckpointError: the folder holds no deployment, or it is damaged.
        DeployError: what runs it is not installed.
    """
    folder = Path(folder)
    content = read_json(folder / FILE)
    try:
        if content["format"] != FORMAT:
            raise CheckpointError(f"{folder / FILE} has format {content['format']}; this gatefit reads {FORMAT}")
        if content["backend"] == "onnx":
            need_onnx()
            return OnnxNetwork(Path(content["file"]).read_bytes())
        gated = load(folder)
        gates = gates_of(gated)
        plans: dict[str, tuple[BlockPlan, Place | None]] = {}
        for block in content["blocks"]:
            gate = gates[block["name"]]
            plan = BlockPlan(
                block["name"],
                block["skip"],
                _codebook(block["codebook"], gate.of.units),
                block["exact"],
                block["reason"],
            )
            plans[plan.name] = (plan, place_or_none(gated, gate))
        gathered = bool(content["gathered"])
        deployed = gathered_network(gated, plans) if gathered else packed(assemble(gated, plans))
        deployed.meta |= {"plans": tuple(plan for plan, _ in plans.values()), "gathered": gathered}
        return deployed
    except (KeyError, TypeError, IndexError, OSError) as error:
        raise CheckpointError(
            f"{folder / FILE} is damaged or does not fit its network: {error}; deploy anew"
        ) from error


def _codebook(entries: list[list[int]] | None, units: int) -> Any:
    if entries is None:
        return None
    codebook = torch.zeros(len(entries), units, dtype=torch.bool)
    for row, entry in zip(codebook, entries, strict=True):
        row[entry] = True
    return codebook


def deploy_folder(
    folder: Path, opened: Opened, backend: Backend, masks: int, harvest: bool, out: Path | None
) -> tuple[BlockPlan, ...]:
    """Deploy what `convert` wrote, and write the deployment beside it; returns what was made of each block.

    Beside the ONNX file stands one that ends in "-masked", see `gatefit.deployment.engines.masked_onnx`.
    """
    if out is not None and backend != "onnx":
        raise DeployError("--out names the ONNX file; it needs --backend onnx")
    images = some_images(opened.data.train, opened.gated.meta["input"], CALIBRATION)
    deployed = deploy(opened.gated, images, backend, masks, harvest=harvest)
    if isinstance(deployed, OnnxNetwork):
        file = out or folder / "model.onnx"
        masked = masked_onnx(opened.gated, images[:1])
        write_atomically(file.with_stem(f"{file.stem}-masked"), lambda temporary: temporary.write_bytes(masked))
        write_deployment(folder, deployed.plans, False, deployed.model, file)
        return deployed.plans
    write_deployment(folder, deployed.meta["plans"], deployed.meta["gathered"])
    return tuple(deployed.meta["plans"])
