"""What runs deployed networks: PyTorch, ONNX Runtime."""

import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from gatefit.deployment.dynamic import DynamicBlock, assemble
from gatefit.deployment.engines.prepack import prepack
from gatefit.deployment.plan import BlockPlan, plans_without_codebooks
from gatefit.errors import DeployError

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

    Args:
        model: a file's content.
        spins: let its threads wait for work without sleeping, which keeps the processor from other work.

    Raises:
        DeployError: the file is damaged, or needs a newer runtime.
    """

    def __init__(self, model: bytes, spins: bool = True) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise DeployError(f"ONNX Runtime cannot read the file ({str(error)[:120]}); deploy anew") from error
        self.inputs = {i.name: tuple(i.shape) for i in self._session.get_inputs()}
        """Shapes by name."""

    def __deepcopy__(self, memo: Any) -> "Session":
        return self  # nothing in it changes

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run once; the first output."""
        return self.all(*inputs)[0]

    def all(self, *inputs: Tensor) -> list[Tensor]:
        """Run once; all outputs."""
        given = {name: x.contiguous().numpy() for name, x in zip(self.inputs, inputs, strict=True)}
        return [torch.from_numpy(x) for x in self._session.run(None, given)]


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
    from gatefit.deployment.engines.onnx_file import blocks_to_onnx

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
    from gatefit.deployment.engines.onnx_file import to_onnx

    return OnnxNetwork(to_onnx(deployed, image).SerializeToString(), deployed.meta["plans"])


def masked_onnx(gated: fx.GraphModule, image: Tensor) -> bytes:
    """A file in which gates multiply and nothing is skipped, for engines without control flow; shapes as above."""
    from gatefit.deployment.engines.onnx_file import to_onnx

    model: bytes = to_onnx(assemble(gated, plans_without_codebooks(gated, skip=False)), image).SerializeToString()
    return model
