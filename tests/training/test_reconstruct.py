"""Layers move to the least-squares answer for changed inputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import Basic, Network
from trained import SPEC, network, short

import gatefit
from gatefit.gating.gates import gates_of
from gatefit.gating.reconstruct import reconstruct


@pytest.mark.parametrize("compensation", [False, True])
def test_a_refit_mends_without_training(dense, digits, compensation):
    accuracies = []
    for images in (0, 500):
        gated = gatefit.retrofit(dense, torch.zeros(2, *SPEC.shape), "c", "step", compensation)
        gatefit.finetune(gated, digits, dense, **short(epochs=0, target=0.5, reconstruction_images=images))
        accuracies.append(gatefit.evaluate(gated, digits).accuracy)
    assert accuracies[1] > accuracies[0] + 0.05


def test_a_refit_changes_only_what_reads_changed_inputs(dense, digits):
    x = torch.randn(50, *SPEC.shape)
    gated = gatefit.retrofit(dense, torch.zeros(2, *SPEC.shape), "c", "step", True)
    before = copy.deepcopy(gated.state_dict())
    assert reconstruct(gated, [x]) == 0  # all gates are open
    list(gates_of(gated).values())[1].channel.bias.data[:4] = -1
    assert reconstruct(gated, [x]) > 0
    changed = {k for k, v in gated.state_dict().items() if not torch.equal(v, before[k])}
    assert not any(k.startswith(("stem", "blocks.0")) for k in changed)
    assert any(k.startswith("blocks.1") for k in changed) and "head.weight" in changed
    assert not any("running" in k for k in changed)


def test_a_refit_is_the_least_squares_answer(dense, digits):
    """A closed unit that is a copy of another costs nothing: the other takes over its weights."""
    torch.manual_seed(0)
    model = network().eval()
    first, second = model.blocks[1].conv1, model.blocks[1].conv2
    first.weight.data[0] = first.weight.data[1]
    for norm in (model.blocks[1].bn1,):
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            value.data[0] = value.data[1]
    gated = gatefit.retrofit(model, torch.zeros(2, *SPEC.shape), "c", "step")
    list(gates_of(gated).values())[1].channel.bias.data[0] = -1
    x = torch.randn(4000, *SPEC.shape)
    worst = (gated.eval()(x) - model(x)).abs().max()
    reconstruct(gated, [x])
    assert (gated(x) - model(x)).abs().max() < 0.1 * worst
    merged = second.weight[:, 0] + second.weight[:, 1]
    assert torch.allclose(gated.get_parameter("blocks.1.conv2.weight")[:, 1], merged, atol=0.05)


class ShortcutFirst(Basic):
    """The projection shortcut stands before the branch: the block's input is read no more behind conv1."""

    def forward(self, x):
        identity = self.down(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + identity)


def test_a_refit_of_a_block_that_computes_its_shortcut_first():
    torch.manual_seed(0)
    model = Network(ShortcutFirst(8, 16, 2)).eval()
    x = torch.randn(50, *SPEC.shape)
    gated = gatefit.retrofit(model, x[:2], "c", "step", True)
    gates_of(gated)["blocks.0"].channel.bias.data[:8] = -1
    worst = (gated.eval()(x) - model(x)).square().mean()
    assert reconstruct(gated, [x]) > 0
    assert (gated(x) - model(x)).square().mean() < 0.5 * worst


@pytest.mark.parametrize("compensation", [False, True])
def test_a_refit_leaves_frozen_weights_alone(compensation, dense):
    x = torch.randn(50, *SPEC.shape)
    gated = gatefit.retrofit(dense, x[:2], "c", "step", compensation)
    gate = list(gates_of(gated).values())[1]
    gate.channel.bias.data[:4] = -1
    if compensation:
        gate.threshold[:4] = 2
    frozen = {n: p for n, p in gated.named_parameters() if not n.startswith("gatefit.")}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    before = copy.deepcopy(gated.state_dict())
    assert (reconstruct(gated, [x]) > 0) == compensation  # the compensation is new, and moves
    changed = {k for k, v in gated.state_dict().items() if not torch.equal(v, before[k])}
    assert not changed & frozen.keys() and bool(changed) == compensation


def test_finetune_says_what_is_frozen(dense, digits):
    messages = []
    gated = gatefit.retrofit(dense, torch.zeros(2, *SPEC.shape), "c", "step")
    gated.get_parameter("head.weight").requires_grad_(False)
    before = gated.get_parameter("head.weight").clone()
    options = short(epochs=1, target=0.7)
    gatefit.finetune(gated, digits, dense, on_progress=lambda step: messages.append(step.message), **options)
    assert torch.equal(gated.get_parameter("head.weight"), before)
    assert any("1 of the network's" in m and "frozen" in m for m in messages if m)
