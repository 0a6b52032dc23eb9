"""What lies between the blocks runs in the faster engine."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from deployed import gated_network, plans_for, running_on, same
from networks import images, make

import gatefit
from gatefit.commands.deploy import load_deployed, write_deployment
from gatefit.deployment.engines.native_network import gathered_blocks, gathered_network
from gatefit.deployment.engines.segments import ONNX, TORCH, OnnxSegment, TorchSegment
from gatefit.deployment.info import deployed_info
from gatefit.deployment.kernels.native import kernels, threads, torch_alone
from gatefit.gating.gates import gates_of


@pytest.mark.skipif(kernels() is None or sys.platform != "linux", reason="no C++ compiler, or OpenMP out of reach")
def test_pytorch_runs_on_one_thread_between_blocks_and_kernels_on_all():
    gated = gated_network("basic")
    plans = plans_for(gated, images(8))
    count = len(deployed_info(gathered_network(gated, plans, [images(1)])).engines)
    network = gathered_network(gated, plans, [images(1)], [TORCH] * count)
    seen = []
    for segment in network.modules():
        if isinstance(segment, TorchSegment):
            segment.segment.register_forward_hook(lambda *_: seen.append((torch.get_num_threads(), threads())))
    with torch.no_grad(), running_on(2):
        network(images(3))
        assert set(seen) == {(1, 2)}
        with pytest.raises(RuntimeError), torch_alone(), torch_alone():
            assert torch.get_num_threads() == 1
            with ThreadPoolExecutor(1) as other:
                assert other.submit(torch.get_num_threads).result() == 2
            raise RuntimeError
        assert torch.get_num_threads() == threads() == 2


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["basic", "inverted", "squeeze-excite"])
def test_what_lies_between_blocks_in_either_engine(name, tmp_path):
    pytest.importorskip("onnxruntime")
    gated = gated_network(name)
    plans = plans_for(gated, images(8))
    count = len(deployed_info(gathered_network(gated, plans, [images(1)])).engines)
    for engine in (TORCH, ONNX):
        deployed = gathered_network(gated, plans, [images(1)], [engine] * count)
        assert set(deployed_info(deployed).engines) == {engine}
        every = {n: True for n in gates_of(gated)}
        assert gathered_blocks(deployed) == ({} if name == "squeeze-excite" else every)  # codebooks serve that one
        assert sum(isinstance(m, OnnxSegment) for m in deployed.modules()) == (count if engine == ONNX else 0)
        for others in (images(9, seed=5), images(1, seed=6), torch.randn(2, 3, 24, 20)):
            with torch.no_grad():
                assert same(deployed(others), gated(others))
                assert same(copy.deepcopy(deployed)(others), gated(others))
    gatefit.save(gated, tmp_path)
    write_deployment(tmp_path, tuple(plan for plan, _ in plans.values()), deployed_info(deployed).engines)
    with torch.no_grad():
        assert torch.equal(load_deployed(tmp_path, make(name))(images(3)), deployed(images(3)))
