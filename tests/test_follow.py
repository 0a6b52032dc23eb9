"""Gates that follow what their units do while the network trains."""

import copy
import math

import pytest
import torch
from networks import Basic, Bottleneck, Network, images, make

import gatefit
from gatefit.distill import with_outputs_of
from gatefit.follow import WARM_UP, Follower
from gatefit.gates import gates_of
from gatefit.start import Start

BATCHES = math.ceil(WARM_UP / 64)


@pytest.mark.parametrize("name", ["basic", "bottleneck", "grouped", "inverted"])
def test_the_student_says_what_open_and_closed_units_do(name):
    gated = gatefit.retrofit(make(name), images(), "lc", "step", fill=True).eval()
    gate = gates_of(gated)["blocks.0"]
    with torch.no_grad():
        (*_, before), block = with_outputs_of(gated, ())(images(5)), make(name).eval().blocks[0]
        gate.channel.bias.data[::2] = -1
        *_, after = with_outputs_of(gated, ())(images(5))
        given = after["blocks.0"]
        assert torch.equal(given, before["blocks.0"]) and given[:, ::2].any()
        assert given.shape == (5, gate.of.units)
        if name == "basic":
            seen = {}
            gated.get_submodule("blocks.0.conv1").register_forward_hook(lambda m, args, out: seen.update(x=out))
            gated(images(5))
            assert torch.allclose(given, block.bn1(seen["x"]).relu().mean((2, 3)), atol=1e-6)


def followed():
    """A network, what its start would have said, and a follower of it."""
    torch.manual_seed(0)
    network = Network(Basic(8, 8), Bottleneck(8, 6)).eval()
    gated = gatefit.retrofit(network, images(), "lc", "step", True).eval()
    gates = gates_of(gated)
    start = Start(
        1.0,
        {n: torch.rand(g.of.units).double() + 1 for n, g in gates.items()},
        {n: (torch.randn(1, 8).double(), torch.randn(1).double()) for n, g in gates.items()},
    )
    follower = Follower(gated)
    follower.begin(start)
    return gated, start, follower


def show(gated, follower, truth, batches, seed=0):
    """Let the follower see batches whose units do what `truth` says, a linear function of what each gate reads."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        with torch.no_grad():
            gated(torch.randn(64, 3, 8, 8, generator=random))
        seen = {n: g.outputs.pooled for n, g in gates_of(gated).items()}
        follower.note({n: truth[n](x) for n, x in seen.items()})


def truths(gated, seed):
    torch.manual_seed(seed)
    linears = {n: torch.nn.Linear(8, g.of.units).requires_grad_(False) for n, g in gates_of(gated).items()}
    return linears


def test_a_gate_says_what_its_units_do_times_their_worth():
    gated, start, follower = followed()
    truth = truths(gated, 1)
    for gate in gates_of(gated).values():
        gate.channel.bias.data -= 0.25  # the loop has lowered the threshold since the start
    show(gated, follower, truth, BATCHES - 1)
    untouched = [g.channel.weight.clone() for g in gates_of(gated).values()]
    follower.apply()
    assert all(torch.equal(g.channel.weight, w) for g, w in zip(gates_of(gated).values(), untouched, strict=True))
    show(gated, follower, truth, 1)
    follower.apply()
    follower.apply()  # the threshold is not lowered twice
    gated(images(16, seed=4))
    for name, gate in gates_of(gated).items():
        seen = gate.outputs.pooled
        weight, bias = start.hardness[name]
        wanted = start.scales[name] * truth[name](seen) + seen @ weight[0].float()[:, None] + bias - 0.25
        error = (gate.outputs.channel - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean()
        assert error < 1e-3


def test_what_units_did_long_ago_is_forgotten():
    gated, _, follower = followed()
    show(gated, follower, truths(gated, 1), 100)
    follower.apply()
    long_ago = {n: g.channel.weight.clone() for n, g in gates_of(gated).items()}
    now = truths(gated, 2)
    show(gated, follower, now, 300, seed=1)  # 19,200 images, 4.4 half-lives
    other, _, fresh = followed()
    show(other, fresh, now, 300, seed=1)
    follower.apply()
    fresh.apply()
    for name, gate in gates_of(gated).items():
        wanted = gates_of(other)[name].channel.weight
        assert 0 < (gate.channel.weight - wanted).norm() < 0.1 * (long_ago[name] - wanted).norm()


def test_a_follower_goes_on_where_it_was():
    gated, _, follower = followed()
    show(gated, follower, truths(gated, 1), BATCHES)
    again = copy.deepcopy(gated)
    second = Follower(again)
    second.restore(follower.state())
    for network, one in ((gated, follower), (again, second)):
        show(network, one, truths(network, 2), 7, seed=3)
        one.apply()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in gated.state_dict().items())
