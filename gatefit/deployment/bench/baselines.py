"""The original network in its fastest forms: what a deployed one is measured against."""

import copy
import functools
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gatefit.deployment.engines.native_network import gathered_network
from gatefit.deployment.engines.runtimes import Run, Session, has_onnx, packed
from gatefit.deployment.kernels.native import kernels
from gatefit.deployment.plan import plans_without_codebooks
from gatefit.gating.insert import rewrite
from gatefit.graph.fold import fold_batch_norms

BF16 = "inductor, bf16"
"""Computes something else, with less precision: it is timed for the record."""


def dense_engines(original: nn.Module, images: Tensor) -> dict[str, Callable[[], Run]]:
    """What makes the original's fastest forms for batches of the shape of `images`, by name."""
    folded = fold_batch_norms(original, images).eval().requires_grad_(False)
    engines: dict[str, Callable[[], Run]] = {
        "torch": lambda: copy.deepcopy(folded).to(memory_format=torch.channels_last),
        "torch, packed": lambda: packed(copy.deepcopy(folded)),
        "inductor": lambda: _compiled(folded),
    }
    if kernels() is not None:
        engines["torch, gathered"] = lambda: _in_our_kernels(original, images)
    if has_onnx():
        program = torch.onnx.export(folded, (images,), dynamo=True, verbose=False)
        assert program is not None
        # Written ahead: what exporting leaves in memory is not the network's.
        engines["onnxruntime"] = functools.partial(Session, program.model_proto.SerializeToString())
    if importlib.util.find_spec("openvino"):
        engines["openvino"] = lambda: _in_openvino(folded, images)
    engines[BF16] = lambda: _in_bf16(folded)
    return engines


def _in_bf16(network: nn.Module) -> Run:
    compiled = _compiled(copy.deepcopy(network).to(torch.bfloat16))
    return lambda x: compiled(x.to(torch.bfloat16)).float()


def _in_our_kernels(original: nn.Module, images: Tensor) -> Run:
    """As a gated network is deployed, with gates that never close: none is left."""
    gated = rewrite(original, images, "lc", "step").eval()
    return gathered_network(gated, plans_without_codebooks(gated, skip=True), [images])


def _in_openvino(network: nn.Module, images: Tensor) -> Run:
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(network, example_input=images)
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
