"""What runs networks: plain PyTorch, PyTorch compiled, ONNX Runtime."""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from gatefit.deployment.branch import place_or_none
from gatefit.deployment.dynamic import DynamicBlock, assemble
from gatefit.deployment.gathered import with_gathered_convs
from gatefit.deployment.native import kernels
from gatefit.deployment.plan import BlockPlan
from gatefit.deployment.prepack import prepack
from gatefit.errors import DeployError
from gatefit.fold import fold_batch_norms
from gatefit.gates import gates_of

Network = TypeVar("Network", bound=nn.Module)
Run = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) to predictions (B, classes)."""


def has_onnx() -> bool:
    """Whether ONNX files can be written and run here."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def need_onnx() -> None:
    """Raise DeployError where they cannot."""
    if not has_onnx():
        raise DeployError("the onnx backend needs onnx, onnxscript and onnxruntime: pip install 'gatefit[onnx]'")


class Session:
    """ONNX Runtime on the CPU with as many threads as torch has; takes the model's inputs in their order.

    Raises:
        DeployError: the file is damaged, or needs a newer runtime.
    """

    def __init__(self, model: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise DeployError(f"ONNX Runtime cannot read the file ({str(error)[:120]}); deploy anew") from error
        self.inputs = {i.name: tuple(i.shape) for i in self._session.get_inputs()}
        """Shapes by name."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run once; the first output."""
        given = {name: x.contiguous().numpy() for name, x in zip(self.inputs, inputs, strict=True)}
        return torch.from_numpy(self._session.run(None, given)[0])


def torch_blocks(blocks: list[DynamicBlock], inputs: list[tuple[Tensor, Tensor]]) -> list[Callable[..., Any]]:
    """Blocks with their weights packed; inputs must be channels-last."""
    return [packed(block) for block in blocks]


def packed(network: Network) -> Network:
    """A deployed network, or a block of one, in PyTorch's fastest form; in place."""
    for part in list(network.modules()):
        if isinstance(part, fx.GraphModule):
            prepack(part)
    return network.to(memory_format=torch.channels_last)


def onnx_blocks(blocks: list[DynamicBlock], inputs: list[tuple[Tensor, Tensor]]) -> list[Callable[..., Any]]:
    """A session for each block."""
    from gatefit.deployment.onnx_file import blocks_to_onnx

    return [Session(model.SerializeToString()) for model in blocks_to_onnx(blocks, inputs)]


class OnnxNetwork:
    """A deployed network in ONNX Runtime: images (B, C, H, W) float32, run one by one, to predictions (B, classes).

    Args:
        model: the file's content.
        plans: what was made of each block, where it is known.
    """

    def __init__(self, model: bytes, plans: tuple[BlockPlan, ...] = ()) -> None:
        self.model, self.plans = model, plans
        self._run = Session(model)

    def __call__(self, images: Tensor) -> Tensor:
        """Run a batch. Raises DeployError for images of another size than the file was made for."""
        shape = next(iter(self._run.inputs.values()))[1:]
        if tuple(images.shape[1:]) != shape:
            raise DeployError(f"this file takes images of shape {shape}, not {tuple(images.shape[1:])}; deploy anew")
        return torch.cat([self._run(image) for image in images.split(1)])


def onnx_network(deployed: fx.GraphModule, image: Tensor) -> OnnxNetwork:
    """From `gatefit.deployment.dynamic.assemble`, for images of the shape of `image` (1, C, H, W)."""
    from gatefit.deployment.onnx_file import to_onnx

    return OnnxNetwork(to_onnx(deployed, image).SerializeToString(), deployed.meta["plans"])


def masked_onnx(gated: fx.GraphModule, image: Tensor) -> bytes:
    """A file in which gates multiply and nothing is skipped, for engines without control flow; shapes as above."""
    from gatefit.deployment.onnx_file import to_onnx

    plans = {name: (BlockPlan(name, False, None), place_or_none(gated, gate)) for name, gate in gates_of(gated).items()}
    model: bytes = to_onnx(assemble(gated, plans), image).SerializeToString()
    return model


def dense_engines(original: nn.Module, images: Tensor) -> dict[str, Run]:
    """The original's fastest forms for batches of the shape of `images`, by name."""
    folded = fold_batch_norms(original, images).eval().requires_grad_(False)
    engines: dict[str, Run] = {
        "torch": copy.deepcopy(folded).to(memory_format=torch.channels_last),
        "torch, packed": packed(copy.deepcopy(folded)),
        "inductor": _compiled(folded),
    }
    if kernels() is not None:
        engines["torch, gathered"] = with_gathered_convs(copy.deepcopy(folded))
    if has_onnx():
        program = torch.onnx.export(folded, (images,), dynamo=True, verbose=False)
        assert program is not None
        engines["onnxruntime"] = Session(program.model_proto.SerializeToString())
    return engines


def _compiled(network: nn.Module) -> Run:
    from torch._inductor import config

    compiled = torch.compile(copy.deepcopy(network), dynamic=False)

    def run(x: Tensor) -> Tensor:
        with config.patch(freezing=True):
            result: Tensor = compiled(x)
        return result

    return run
