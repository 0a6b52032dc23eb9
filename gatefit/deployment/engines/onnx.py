"""Networks, and blocks of them, in ONNX Runtime on the CPU."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatefit.deployment.dynamic import DynamicBlock, assemble
from gatefit.deployment.info import Images, deployed_info
from gatefit.deployment.plan import BlockPlan, Latency, plans_without_codebooks
from gatefit.errors import DeployError, first_line


def has_onnx() -> bool:
    """Tell whether ONNX files can be written and run here."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def need_onnx() -> None:
    """Refuse to go on where they cannot.

    Raises:
        DeployError: a package is missing; the message says how to install it.
    """
    if not has_onnx():
        raise DeployError("the onnx backend needs onnx, onnxscript and onnxruntime: pip install 'gatefit[onnx]'")


class Session:
    """Runs an ONNX model on the CPU with as many threads as torch has; takes the model's inputs in their order.

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
            raise DeployError(f"ONNX Runtime cannot read the file ({first_line(error)[:120]}); deploy anew") from error
        self.inputs = {i.name: tuple(i.shape) for i in self._session.get_inputs()}
        """Shapes by name."""

    def __deepcopy__(self, memo: Any) -> "Session":
        return self  # nothing in it changes

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run once; give the first output."""
        return self.all(*inputs)[0]

    def all(self, *inputs: Tensor) -> list[Tensor]:
        """Run once; give all outputs."""
        given = {name: x.contiguous().numpy() for name, x in zip(self.inputs, inputs, strict=True)}
        return [torch.from_numpy(x) for x in self._session.run(None, given)]


def onnx_blocks(blocks: list[DynamicBlock], inputs: list[tuple[Tensor, Tensor]]) -> list[Callable[..., Any]]:
    """Make a session for each block."""
    from gatefit.deployment.engines.onnx_file import blocks_to_onnx

    return [Session(model.SerializeToString()) for model in blocks_to_onnx(blocks, inputs)]


class OnnxNetwork:
    """A deployed network in ONNX Runtime: images (B, C, H, W) float32, run one by one, to predictions (B, classes).

    Args:
        model: the file's content.
        plans: what was made of each block, where it is known.
        latency: milliseconds beside the dense network, where it was timed.
        weights: see `gatefit.deployment.info.DeployedInfo`.
    """

    def __init__(
        self, model: bytes, plans: tuple[BlockPlan, ...] = (), latency: Latency | None = None, weights: str = ""
    ) -> None:
        self.model, self.plans, self.latency, self.weights = model, plans, latency, weights
        self._run = Session(model)
        self._images = Images(tuple(next(iter(self._run.inputs.values()))[1:]))

    def __call__(self, images: Tensor) -> Tensor:
        """Run a batch.

        Raises:
            DeployError: it is no batch of images of the size that the file was made for.
        """
        self._images.check(images, torch.device("cpu"))
        if tuple(images.shape[1:]) != self._images.shape:
            shape = self._images.shape
            raise DeployError(f"this file takes images of shape {shape}, not {tuple(images.shape[1:])}; deploy anew")
        images = images.detach()
        if not len(images):
            return self._run(images.new_zeros(1, *images.shape[1:]))[:0]
        return torch.cat([self._run(image) for image in images.split(1)])


def onnx_network(deployed: fx.GraphModule, image: Tensor) -> OnnxNetwork:
    """Make a file of an assembled network, for images of the shape of `image`, (1, C, H, W)."""
    from gatefit.deployment.engines.onnx_file import to_onnx

    return OnnxNetwork(to_onnx(deployed, image).SerializeToString(), deployed_info(deployed).plans)


def masked_onnx(gated: fx.GraphModule, image: Tensor) -> bytes:
    """Make a file in which gates multiply and nothing is skipped, for engines without control flow."""
    from gatefit.deployment.engines.onnx_file import to_onnx

    model: bytes = to_onnx(assemble(gated, plans_without_codebooks(gated, skip=False)), image).SerializeToString()
    return model


def export(network: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> bytes:
    """Export a network to the content of an ONNX file.

    Raises:
        DeployError: it cannot be exported.
    """
    try:
        program = torch.onnx.export(network, inputs, dynamo=True, verbose=False, **options)
    except Exception as error:
        raise DeployError(f"the network cannot be exported to ONNX: {first_line(error)}") from error
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content
