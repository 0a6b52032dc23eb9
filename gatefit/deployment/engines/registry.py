"""Engines that run a dense network, as one table: a new engine or precision is one class and one line.

Each engine is a frozen configuration with a name, whether it is there (`available`), whether it computes the same
function but for rounding (`exact`), and what makes it (`prepare`).
"""

import copy
import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, fx, nn

from gatefit.deployment.engines.native_network import gathered_network
from gatefit.deployment.engines.onnx import Session, export, has_onnx
from gatefit.deployment.engines.pytorch import Run, packed
from gatefit.deployment.info import need_whole_graph
from gatefit.deployment.kernels.native import kernels
from gatefit.deployment.plan import plans_without_codebooks
from gatefit.gating.insert import find_blocks, rewrite
from gatefit.graph.fold import fold_batch_norms

Backend = Literal["torch", "onnx"]
"""What a deployed network is: a PyTorch module, or one ONNX file."""


@dataclass(frozen=True)
class Dense:
    """A network whose every image runs everything, and the batch that it is to run."""

    original: nn.Module
    folded: fx.GraphModule
    """The same with batch norms folded, in eval mode."""
    images: Tensor
    """(B, C, H, W)"""


def dense(original: nn.Module, images: Tensor) -> Dense:
    """Fold the batch norms of a network, for batches of the shape of `images`."""
    return Dense(original, fold_batch_norms(original, images).eval().requires_grad_(False), images)


class Engine(Protocol):
    """A way to run a dense network."""

    @property
    def name(self) -> str:
        """Name the engine and its precision, as tables show them."""

    @property
    def exact(self) -> bool:
        """Tell whether it computes the same function but for rounding in fp32; others are timed for the record."""

    @property
    def backends(self) -> frozenset[Backend]:
        """List the backends of deployments that are made of the same parts, and so are compared with it."""

    def available(self) -> bool:
        """Tell whether the packages and the processor for it are here."""

    def prepare(self, network: Dense) -> Callable[[], Run]:
        """Do what is done once, such as exporting; return what makes the runnable network."""


@dataclass(frozen=True)
class Eager:
    """PyTorch as it is, channels last."""

    name: str = "torch"
    exact: bool = True
    backends: frozenset[Backend] = frozenset()

    def available(self) -> bool:
        """Tell that it always is."""
        return True

    def prepare(self, network: Dense) -> Callable[[], Run]:
        """See `Engine`."""
        return lambda: copy.deepcopy(network.folded).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Packed:
    """PyTorch with the weights packed for oneDNN."""

    name: str = "torch, packed"
    exact: bool = True
    backends: frozenset[Backend] = frozenset({"torch"})

    def available(self) -> bool:
        """Tell that it always is."""
        return True

    def prepare(self, network: Dense) -> Callable[[], Run]:
        """See `Engine`."""
        return lambda: packed(copy.deepcopy(network.folded))


@dataclass(frozen=True)
class Gathered:
    """gatefit's own kernels: the network as a gated one is deployed, with gates that never close, so none is left."""

    name: str = "torch, gathered"
    exact: bool = True
    backends: frozenset[Backend] = frozenset({"torch"})

    def available(self) -> bool:
        """Tell whether the kernels can be built."""
        return kernels() is not None

    def prepare(self, network: Dense) -> Callable[[], Run]:
        """See `Engine`."""

        def make() -> Run:
            pairs = not any(block.has_shortcut for block in find_blocks(network.original, network.images).blocks)
            gated = need_whole_graph(rewrite(network.original, network.images, "c" if pairs else "lc", "step").eval())
            return gathered_network(gated, plans_without_codebooks(gated, skip=True), [network.images])

        return make


@dataclass(frozen=True)
class Inductor:
    """torch.compile with frozen weights."""

    dtype: torch.dtype = torch.float32
    backends: frozenset[Backend] = frozenset()

    @property
    def name(self) -> str:
        """Name the compiler, and the precision where it is not fp32."""
        return "inductor" if self.exact else "inductor, bf16"

    @property
    def exact(self) -> bool:
        """Tell that only fp32 computes the same function."""
        return self.dtype == torch.float32

    def available(self) -> bool:
        """Tell that it always is; without a compiler making it fails."""
        return True

    def prepare(self, network: Dense) -> Callable[[], Run]:
        """See `Engine`."""
        return lambda: self._make(network)

    def _make(self, network: Dense) -> Run:
        compiled = _compiled(copy.deepcopy(network.folded).to(self.dtype))
        return compiled if self.exact else lambda x: compiled(x.to(self.dtype)).float()


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    name: str = "onnxruntime"
    exact: bool = True
    backends: frozenset[Backend] = frozenset({"torch", "onnx"})

    def available(self) -> bool:
        """Tell whether its packages are installed."""
        return has_onnx()

    def prepare(self, network: Dense) -> Callable[[], Run]:
        """Export the network now: what exporting leaves in memory is not the network's."""
        return functools.partial(Session, export(network.folded, (network.images,)))


@dataclass(frozen=True)
class OpenVino:
    """OpenVINO on the CPU, in fp32."""

    name: str = "openvino"
    exact: bool = True
    backends: frozenset[Backend] = frozenset()

    def available(self) -> bool:
        """Tell whether it is installed."""
        return importlib.util.find_spec("openvino") is not None

    def prepare(self, network: Dense) -> Callable[[], Run]:
        """See `Engine`."""
        return lambda: self._make(network)

    def _make(self, network: Dense) -> Run:
        import openvino

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = openvino.convert_model(network.folded, example_input=network.images)
        wishes = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        wishes["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
        request = openvino.Core().compile_model(model, "CPU", wishes).create_infer_request()
        return lambda x: torch.from_numpy(request.infer({0: x.contiguous().numpy()})[0].copy())


def _compiled(network: nn.Module) -> Run:
    from torch._inductor import config

    compiled = torch.compile(copy.deepcopy(network), dynamic=False)

    def run(x: Tensor) -> Tensor:
        with config.patch(freezing=True):
            result: Tensor = compiled(x)
        return result

    return run


ENGINES: tuple[Engine, ...] = (
    Eager(),
    Packed(),
    Inductor(),
    Gathered(),
    OnnxRuntime(),
    OpenVino(),
    Inductor(torch.bfloat16),
)
"""All engines, in the order of tables."""


def available_engines(backend: Backend | None = None) -> list[Engine]:
    """List the engines that are here, of one backend or of all."""
    return [e for e in ENGINES if (backend is None or backend in e.backends) and e.available()]
