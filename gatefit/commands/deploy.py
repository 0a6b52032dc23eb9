"""A deployment beside the gated network that it was made from: `deployment.json`, and for ONNX the file itself."""

import statistics
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatefit.commands.opened import Opened
from gatefit.decisions import Placement
from gatefit.deployment.bench.timing import times
from gatefit.deployment.deploy import deploy, whole_batches
from gatefit.deployment.dynamic import assemble
from gatefit.deployment.engines.native_network import gathered_blocks, gathered_network
from gatefit.deployment.engines.onnx import OnnxNetwork, masked_onnx, need_onnx
from gatefit.deployment.engines.pytorch import Run, packed
from gatefit.deployment.engines.registry import Backend, available_engines, dense
from gatefit.deployment.info import deployed_info
from gatefit.deployment.kernels.native import processor
from gatefit.deployment.plan import BlockPlan, Deployment, Latency
from gatefit.deployment.region import Region, region_or_none
from gatefit.errors import CheckpointError, DeployError, first_line, shown
from gatefit.files import check_schema, digest, is_sealed, read_json, relative_to, sealed, write_atomically, write_json
from gatefit.folder import read_config
from gatefit.gating.checkpoint import load, record_file
from gatefit.gating.gates import gates_of
from gatefit.gating.info import info_of
from gatefit.inputs.data import some_images

FILE = "deployment.json"
FORMAT = 6
"""Format 5, which is read too, has no digest of its own; format 4 names the ONNX file by its absolute path and keeps
no hashes."""
CALIBRATION = 256
"""Training images that masks are chosen by; where unused channels are pruned, as many others are compared."""
ROUNDS = 12
"""Of timing the deployed network beside the original."""


@dataclass(frozen=True)
class Machine:
    """What a deployment was tuned for, in words."""

    processor: str
    threads: int
    torch: str


def this_machine() -> Machine:
    """Describe the machine at hand."""
    return Machine(processor("model name"), torch.get_num_threads(), torch.__version__)


def write_deployment(
    folder: Path,
    plans: tuple[BlockPlan, ...],
    engines: tuple[str, ...] | None = None,
    model: bytes | None = None,
    onnx: Path | None = None,
) -> None:
    """Write `deployment.json` into the folder of the gated network, and an ONNX file.

    Args:
        folder: of the gated network.
        plans: of its blocks.
        engines: of the segments of a gathered network, see `gatefit.deployment.engines.native_network`.
        model: the ONNX file's content.
        onnx: the ONNX file. It is kept by its way from the folder and by its hash.

    Raises:
        CheckpointError: the folder holds no network, or they cannot be written.
    """
    network = read_config(folder).network
    file = None
    if model is not None and onnx is not None:
        name = relative_to(folder, onnx)
        write_atomically(onnx, lambda temporary: temporary.write_bytes(model))
        file = {"name": name, "sha256": digest(onnx)}
        record_file(folder, name)
    machine = this_machine()
    blocks = [
        {
            "name": p.name,
            "skip": p.skip,
            "exact": p.exact,
            "reason": p.reason,
            "parallel": p.parallel,
            "codebook": None if p.codebook is None else [e.nonzero()[:, 0].tolist() for e in p.codebook],
        }
        for p in plans
    ]
    content = {
        "format": FORMAT,
        "backend": "torch" if model is None else "onnx",
        "network": network,
        "file": file,
        "engines": engines,
        "machine": {"processor": machine.processor, "threads": machine.threads, "torch": machine.torch},
        "blocks": blocks,
    }
    write_json(folder / FILE, sealed(content))


def load_deployed(
    folder: str | Path, model: nn.Module | None = None, *, trust_code: bool = False
) -> fx.GraphModule | OnnxNetwork:
    """Read a deployment back, in any process; outputs are the same to the bit on the same machine.

    Args:
        folder: of the gated network.
        model: the original architecture, for networks that neither timm nor torchvision has (see `gatefit.load`).
        trust_code: run what `config.json` names to build the network without `model` (see `gatefit.load`).

    Raises:
        CheckpointError: the folder holds no deployment, or it is damaged, or it was made from other weights.
        DeployError: what runs it is not installed.
    """
    folder = Path(folder)
    content = read_json(folder / FILE)
    try:
        if content["format"] not in (4, 5, FORMAT):
            raise CheckpointError(f"{folder / FILE} has format {shown(content['format'])}; this gatefit reads {FORMAT}")
        if content["format"] == FORMAT:
            if not is_sealed(content):
                raise CheckpointError(f"{folder / FILE} was changed after it was written; deploy anew")
            check_schema(folder / FILE, content, "deployment")
        if content["format"] > 4 and content["network"] != read_config(folder).network:
            raise CheckpointError(f"{folder / FILE} was made from other weights than {folder} holds now; deploy anew")
        if content["backend"] == "onnx":
            need_onnx()
            return OnnxNetwork(_onnx_file(folder, content).read_bytes())
        gated = load(folder, model, trust_code=trust_code)
        gates = gates_of(gated)
        plans: dict[str, tuple[BlockPlan, Region | None]] = {}
        for block in content["blocks"]:
            gate = gates[block["name"]]
            plan = BlockPlan(
                block["name"],
                block["skip"],
                _codebook(block["codebook"], gate.of.units),
                block["exact"],
                block["reason"],
                block["parallel"],
            )
            plans[plan.name] = (plan, region_or_none(gated, gate))
        if content["engines"] is None:
            deployed = packed(assemble(gated, plans))
        else:
            image = torch.zeros(1, *info_of(gated).input.shape)
            deployed = gathered_network(gated, plans, [image], content["engines"])
        return deployed
    except (KeyError, TypeError, ValueError, IndexError, OSError) as error:
        raise CheckpointError(
            f"{folder / FILE} is damaged or does not fit its network: {first_line(error)[:160]}; deploy anew"
        ) from error


def _onnx_file(folder: Path, content: dict[str, Any]) -> Path:
    """Find the ONNX file that a `deployment.json` names, and check that it is still the one that was written."""
    if content["format"] == 4:
        return Path(content["file"])
    file: Path = folder.resolve() / content["file"]["name"]
    if digest(file) != content["file"]["sha256"]:
        raise CheckpointError(f"{file} is not the file that {folder / FILE} was written for; deploy anew")
    return file


def _codebook(entries: list[list[int]] | None, units: int) -> Any:
    if entries is None:
        return None
    if not entries or any(not 0 <= unit < units for entry in entries for unit in entry):
        raise ValueError("a codebook is empty, or names units that its block has not")
    codebook = torch.zeros(len(entries), units, dtype=torch.bool)
    for row, entry in zip(codebook, entries, strict=True):
        row[entry] = True
    return codebook


def deploy_folder(
    folder: Path,
    opened: Opened,
    backend: Backend,
    masks: int,
    prune_unused: bool,
    batch: int,
    out: Path | None,
    placement: Placement,
) -> Deployment:
    """Deploy what `convert` wrote, and write the deployment beside it.

    Beside the ONNX file stands one that ends in "-masked", see `gatefit.deployment.engines.onnx.masked_onnx`.
    """
    if out is not None and backend != "onnx":
        raise DeployError("--out names the ONNX file; it needs --backend onnx")
    images = some_images(
        opened.data.train, info_of(opened.gated).input, 2 * CALIBRATION if prune_unused else CALIBRATION
    )
    images, others = images[:CALIBRATION], images[CALIBRATION:]
    if prune_unused and not len(others):
        raise DeployError(
            f"--prune-unused needs more than {CALIBRATION} training images, to see what it changes on others"
        )
    deployed = deploy(opened.gated, images, backend, masks, prune_unused=prune_unused, batch=batch, placement=placement)
    if isinstance(deployed, OnnxNetwork):
        file = out or folder / "model.onnx"
        masked, beside = masked_onnx(opened.gated, images[:1]), file.with_stem(f"{file.stem}-masked")
        write_atomically(beside, lambda temporary: temporary.write_bytes(masked))
        record_file(folder, relative_to(folder, beside))
        write_deployment(folder, deployed.plans, model=deployed.model, onnx=file)
        plans, batch = deployed.plans, 1
    else:
        info = deployed_info(deployed)
        write_deployment(folder, info.plans, info.engines)
        plans = info.plans
    agreement = _agreement(deployed, opened.gated, others)
    latency = None if opened.original is None else _latency(deployed, opened.original, images, batch, backend)
    gathered = gathered_blocks(deployed) if isinstance(deployed, fx.GraphModule) else {}
    return Deployment(plans, gathered, agreement, latency)


@torch.no_grad()
def _latency(deployed: Run, original: nn.Module, images: Tensor, batch: int, backend: Backend) -> Latency | None:
    """Time a deployed network beside the original in each engine of the same backend that can be made.

    Returns:
        The original's fastest engine beside it; None where no engine can be made: a deployment that is written stands
        without.
    """
    batches = whole_batches(images, batch, ROUNDS)
    originals = dict[str, Run]()
    with suppress(Exception):
        network = dense(original, batches[0])
        for candidate in available_engines(backend):
            with suppress(Exception):
                originals[candidate.name] = candidate.prepare(network)()
    if not originals:
        return None
    measured = times({"deployed": deployed, **originals}, batches, ROUNDS)
    medians = {name: statistics.median(times_ms) for name, times_ms in measured.items()}
    engine = min(originals, key=lambda name: medians[name])
    return Latency(batch, medians["deployed"], medians[engine], engine)


@torch.no_grad()
def _agreement(deployed: Run, gated: fx.GraphModule, images: Tensor) -> float | None:
    if not len(images):
        return None
    pairs = [(deployed(x).argmax(1), gated(x).argmax(1)) for x in images.split(32)]
    return float(torch.cat([a == b for a, b in pairs]).double().mean())
