"""A deployment beside the gated network that it was made from: `deployment.json`, and for ONNX the file itself."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatefit.commands.opened import Opened
from gatefit.decisions import Placement
from gatefit.deployment.deploy import make_deployed
from gatefit.deployment.dynamic import assemble
from gatefit.deployment.engines.native_network import gathered_blocks, gathered_network
from gatefit.deployment.engines.onnx import OnnxNetwork, masked_onnx, need_onnx
from gatefit.deployment.engines.pytorch import Run, packed
from gatefit.deployment.engines.registry import Backend
from gatefit.deployment.info import Images, deployed_info, fingerprint
from gatefit.deployment.kernels.native import instructions, processor
from gatefit.deployment.network import DeployedNetwork, seal
from gatefit.deployment.plan import BlockPlan, Deployment, Latency
from gatefit.deployment.region import Region, region_or_none
from gatefit.errors import CheckpointError, DeployError
from gatefit.files import digest, read_json, read_tensors, relative_to, write_atomically, write_json, write_tensors
from gatefit.folder import WEIGHTS, read_config
from gatefit.gating.checkpoint import load, record_file
from gatefit.gating.gates import gates_of
from gatefit.gating.info import info_of
from gatefit.inputs.data import some_images
from gatefit.progress import OnProgress, silent

FILE = "deployment.json"
FORMAT = 6
"""Format 5, which is read too, keeps no segments and no times. Format 4, which is read too but for ONNX, names the
ONNX file by its absolute path and keeps no hashes."""
SEGMENTS = "deployment.safetensors"
"""The ONNX files of those segments of a PyTorch deployment that ONNX Runtime runs, as bytes."""
CALIBRATION = 256
"""Training images that masks are chosen by; where unused channels are pruned, as many others are compared."""


@dataclass(frozen=True)
class Machine:
    """What a deployment was tuned for, in words."""

    processor: str
    instructions: tuple[str, ...]
    """Sets of instructions that the processor has, such as AVX2."""
    threads: int
    torch: str


def this_machine() -> Machine:
    """Describe the machine at hand."""
    return Machine(processor("model name"), instructions(), torch.get_num_threads(), torch.__version__)


def write_deployment(
    folder: Path,
    plans: tuple[BlockPlan, ...],
    engines: tuple[str, ...] | None = None,
    model: bytes | None = None,
    onnx: Path | None = None,
    segments: tuple[bytes, ...] = (),
    latency: Latency | None = None,
) -> None:
    """Write `deployment.json` into the folder of the gated network, and what it was made of.

    Args:
        folder: of the gated network.
        plans: of its blocks.
        engines: of the segments of a gathered network, see `gatefit.deployment.engines.native_network`.
        model: the ONNX file's content.
        onnx: the ONNX file. It is kept by its relative path from the folder and by its hash.
        segments: the ONNX files of those segments that ONNX Runtime runs; they become one file, `SEGMENTS`.
        latency: of the network, where it was timed.

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
    elif segments:
        write_tensors(
            folder / SEGMENTS,
            {str(i): torch.frombuffer(bytearray(s), dtype=torch.uint8) for i, s in enumerate(segments)},
        )
        file = {"name": SEGMENTS, "sha256": digest(folder / SEGMENTS)}
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
        "machine": asdict(this_machine()),
        "latency": None if latency is None else asdict(latency),
        "blocks": blocks,
    }
    write_json(folder / FILE, content)
    if not segments:
        (folder / SEGMENTS).unlink(missing_ok=True)  # of an earlier deployment


def save_deployed(deployed: DeployedNetwork | OnnxNetwork, folder: str | Path) -> None:
    """Write a deployed network whole, beside the gated network that it was made from; `load_deployed` reads it.

    Args:
        deployed: from `deploy`.
        folder: where `save` wrote the gated network.

    Raises:
        CheckpointError: the folder holds no network or other weights, or it cannot be written.
    """
    folder = Path(folder)
    weights = deployed.weights if isinstance(deployed, OnnxNetwork) else deployed_info(deployed).weights
    if fingerprint(read_tensors(folder / WEIGHTS)) != weights:
        raise CheckpointError(
            f"{folder} holds other weights than this network was deployed from; call gatefit.save(gated, folder) first"
        )
    if isinstance(deployed, OnnxNetwork):
        write_deployment(
            folder, deployed.plans, model=deployed.model, onnx=folder / "model.onnx", latency=deployed.latency
        )
    else:
        info = deployed_info(deployed)
        write_deployment(folder, info.plans, info.engines, segments=info.segments, latency=info.latency)


def load_deployed(folder: str | Path, model: nn.Module | None = None) -> DeployedNetwork | OnnxNetwork:
    """Read a deployment back, in any process; outputs are the same to the bit on the same machine.

    Args:
        folder: of the gated network.
        model: the original architecture, for networks that neither timm nor torchvision has (see `gatefit.load`).

    Raises:
        CheckpointError: the folder holds no deployment, or it is damaged, or it was made from other weights.
        DeployError: what runs it is not installed.
    """
    folder = Path(folder)
    content = read_json(folder / FILE)
    try:
        if content["format"] not in (4, 5, FORMAT):
            raise CheckpointError(f"{folder / FILE} has format {content['format']}; this gatefit reads {FORMAT}")
        if content["format"] > 4 and content["network"] != read_config(folder).network:
            raise CheckpointError(f"{folder / FILE} was made from other weights than {folder} holds now; deploy anew")
        if content["format"] == 4 and content["backend"] == "onnx":
            raise CheckpointError(
                f"{folder / FILE} was written by an older gatefit, which did not keep whose file it runs; deploy anew"
            )
        if content["backend"] == "onnx":
            need_onnx()
            return OnnxNetwork(_file(folder, content).read_bytes(), latency=_latency(content))
        gated = load(folder, model)
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
        image = torch.zeros(1, *info_of(gated).input.shape, dtype=next(gated.parameters()).dtype)
        if content["engines"] is None:
            deployed = packed(assemble(gated, plans))
        else:
            deployed = gathered_network(gated, plans, [image], content["engines"], _segments(folder, content))
        images = Images(tuple(image.shape[1:]), image.dtype)
        return seal(deployed, images, _latency(content), fingerprint(gated.state_dict()))
    except (KeyError, TypeError, ValueError, IndexError, OSError) as error:
        raise CheckpointError(
            f"{folder / FILE} is damaged or does not fit its network: {error}; deploy anew"
        ) from error


def _segments(folder: Path, content: dict[str, Any]) -> tuple[bytes, ...]:
    """Read the ONNX files of segments; there are none where ONNX Runtime runs none, and in older formats."""
    if content["format"] < FORMAT or content["file"] is None:
        return ()
    tensors = read_tensors(_file(folder, content))
    return tuple(tensors[str(i)].numpy().tobytes() for i in range(len(tensors)))


def _latency(content: dict[str, Any]) -> Latency | None:
    """Read the times of a deployment; None where they were not measured, and in older formats."""
    kept = content.get("latency")
    return None if kept is None else Latency(**kept)


def _file(folder: Path, content: dict[str, Any]) -> Path:
    """Find the file that a `deployment.json` names, and check that it is still the one that was written."""
    file: Path = folder.resolve() / content["file"]["name"]
    if digest(file) != content["file"]["sha256"]:
        raise CheckpointError(f"{file} is not the file that {folder / FILE} was written for; deploy anew")
    return file


def _codebook(entries: list[list[int]] | None, units: int) -> Any:
    if entries is None:
        return None
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
    on_progress: OnProgress = silent,
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
    deployed = make_deployed(
        opened.gated,
        images,
        backend,
        masks,
        prune_unused=prune_unused,
        batch=batch,
        placement=placement,
        on_progress=on_progress,
    )
    if isinstance(deployed, OnnxNetwork):
        file = out or folder / "model.onnx"
        masked, beside = masked_onnx(opened.gated, images[:1]), file.with_stem(f"{file.stem}-masked")
        write_atomically(beside, lambda temporary: temporary.write_bytes(masked))
        record_file(folder, relative_to(folder, beside))
        write_deployment(folder, deployed.plans, model=deployed.model, onnx=file, latency=deployed.latency)
    else:
        save_deployed(deployed, folder)
    agreement = _agreement(deployed, opened.gated, others, batch)
    gathered = gathered_blocks(deployed) if isinstance(deployed, fx.GraphModule) else {}
    return Deployment(deployed.plans, gathered, agreement, deployed.latency)


@torch.no_grad()
def _agreement(deployed: Run, gated: fx.GraphModule, images: Tensor, batch: int) -> float | None:
    if not len(images):
        return None
    pairs = [(deployed(x).argmax(1), gated(x).argmax(1)) for x in images.split(batch)]
    return float(torch.cat([a == b for a, b in pairs]).double().mean())
