"""What runs networks: plain PyTorch, PyTorch compiled, ONNX Runtime."""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatefit.deployment.dynamic import DynamicBlock
from gatefit.deployment.plan import BlockPlan
from gatefit.errors import DeployError
from gatefit.fold import fold_batch_norms

Run = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) to predictions (B, classes)."""


def has_onnx() -> bool:
    """Whether ONNX files can be written and run here."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def need_onnx() -> None:
    """Raise DeployError where they cannot."""
    if not has_onnx():
        raise DeployError("the onnx backend needs onnx, onnxscript and onnxruntime: pip install 'gatefit[onnx]'")


def session(model: bytes) -> Callable[..., Tensor]:
    """ONNX Runtime on the CPU with as many threads as torch has; takes the model's inputs in their order."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    running = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in running.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        given = {name: x.contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(running.run(None, given)[0])

    return run


def torch_blocks(blocks: list[DynamicBlock], inputs: list[tuple[Tensor, Tensor]]) -> list[Callable[..., Any]]:
    """Blocks as they are."""
    return list(blocks)


def onnx_blocks(blocks: list[DynamicBlock], inputs: list[tuple[Tensor, Tensor]]) -> list[Callable[..., Any]]:
    """A session for each block."""
    from gatefit.deployment.onnx_file import blocks_to_onnx

    return [session(model.SerializeToString()) for model in blocks_to_onnx(blocks, inputs)]


class OnnxNetwork:
    """A deployed network in ONNX Runtime: images (B, C, H, W) float32, run one by one, to predictions (B, classes).

    Args:
        model: the file's content.
        plans: what was made of each block, where it is known.
    """

    def __init__(self, model: bytes, plans: tuple[BlockPlan, ...] = ()) -> None:
        self.model, self.plans = model, plans
        self._run = session(model)

    def __call__(self, images: Tensor) -> Tensor:
        """Run a batch."""
        return torch.cat([self._run(image) for image in images.split(1)])


def onnx_network(deployed: fx.GraphModule, image: Tensor) -> OnnxNetwork:
    """From `gatefit.deployment.dynamic.assemble`, for images of the shape of `image` (1, C, H, W)."""
    from gatefit.deployment.onnx_file import to_onnx

    return OnnxNetwork(to_onnx(deployed, image).SerializeToString(), deployed.meta["plans"])


def dense_engines(original: nn.Module, images: Tensor) -> dict[str, Run]:
    """The original's fastest forms for batches of the shape of `images`, by name."""
    folded = fold_batch_norms(original, images).eval().requires_grad_(False)
    engines: dict[str, Run] = {
        "torch": copy.deepcopy(folded).to(memory_format=torch.channels_last),
        "inductor": _compiled(folded),
    }
    if has_onnx():
        program = torch.onnx.export(folded, (images,), dynamo=True, verbose=False)
        assert program is not None
        engines["onnxruntime"] = session(program.model_proto.SerializeToString())
    return engines


def _compiled(network: nn.Module) -> Run:
    from torch._inductor import config

    compiled = torch.compile(copy.deepcopy(network), dynamic=False)

    def run(x: Tensor) -> Tensor:
        with config.patch(freezing=True):
            result: Tensor = compiled(x)
        return result

    return run
