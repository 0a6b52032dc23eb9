"""Gated networks whose gates open and close at random, and what compares them with their deployed forms."""

import contextlib

import torch
from networks import images, make
from torch.utils.flop_counter import FlopCounterMode

import gatefit
from gatefit.deployment.engines.native_network import gathered_network
from gatefit.deployment.plan import observe, plan_block
from gatefit.gating.gates import gates_of

FORMS = ["relu1", "step"]


def gated_network(name, form="step", compensation=False, spread=1.0):
    """A small network whose gates open and close at random, image by image."""
    gated = gatefit.retrofit(make(name), images(), "lc", form, compensation)
    torch.manual_seed(2)
    for gate in gates_of(gated).values():
        for fc in gate.layers:
            torch.nn.init.normal_(fc.weight, std=3.0)
            torch.nn.init.normal_(fc.bias, std=spread)
        if gate.compensation is not None:
            torch.nn.init.normal_(gate.compensation.weight, std=0.1)
    return gated.eval()


def plans_for(gated, x):
    return {n: plan_block(gated, gates_of(gated)[n], seen, 4) for n, seen in observe(gated, [x]).items()}


def in_our_kernels(network, *shape):
    """A gated network whose gates open and close at random, six images, its plans, and deployed."""
    torch.manual_seed(0)
    gated = gatefit.retrofit(network(), torch.zeros(2, *shape), "lc", "step", compensation=True).eval()
    for gate in gates_of(gated).values():
        torch.nn.init.normal_(gate.channel.weight, std=3.0)
        torch.nn.init.normal_(gate.block.weight, std=3.0)
    x = torch.randn(6, *shape)
    plans = plans_for(gated, x)
    return gated, x, plans, gathered_network(gated, plans, [x])


def set_all(gated, value):
    with torch.no_grad():
        for gate in gates_of(gated).values():
            for fc in gate.layers:
                fc.weight.zero_()
                fc.bias.fill_(value)


def same(a, b):
    largest = float(b.abs().max()) if len(b) else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5 * largest)


@contextlib.contextmanager
def running_on(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def macs(network):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):  # it does not know packed ones
        network(images(1))
    return counter.get_total_flops() // 2
