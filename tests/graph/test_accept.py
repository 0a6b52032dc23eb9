"""What strangers pass in place of a plain network: taken, or refused in one line that names the cause."""

import pytest
import torch
from networks import Basic, Network, images, make
from torch import nn
from torch.nn.utils import prune

import gatefit
from gatefit.errors import ConversionError
from gatefit.gating.gates import gates_of
from gatefit.graph.trace import trace


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
def test_wrappers_are_looked_into(wrap):
    model = make("basic")
    gated = gatefit.retrofit(wrap(model), images())
    assert torch.equal(gated(images()), model(images()))
    assert set(model.state_dict()) <= set(gated.state_dict())
    assert len(gatefit.find_blocks(wrap(model), images()).blocks) == 2


def _exported():
    return torch.export.export(make("basic"), (images(),)).module()


def _weight_normed():
    model = make("basic")
    nn.utils.weight_norm(model.blocks[0].conv1)
    return model


def _pruned():
    model = make("basic")
    prune.l1_unstructured(model.blocks[0].conv1, "weight", 0.5)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: torch.jit.trace(make("basic"), images()), "pass what it was made from"),
        (_exported, "pass the network that was exported"),
        (lambda: "resnet18", "has to be a torch.nn.Module, not str"),
        (lambda: Network, r"pass a network that it makes, such as Network\(\)"),
        (lambda: make("basic").to("meta"), "has no weights"),
        (_weight_normed, "'blocks.0.conv1' computes its weight in a hook"),
        (_pruned, "'blocks.0.conv1' computes its weight in a hook"),
    ],
)
def test_what_cannot_be_gated_is_named(build, reason):
    with pytest.raises(ConversionError, match=reason):
        gatefit.retrofit(build(), images())


@pytest.mark.parametrize("where", ["", "blocks", "blocks.0"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_that_a_graph_would_lose_are_named(where, kind):
    model = make("basic")
    seen = []

    def capture(*arguments):
        seen.append(arguments)

    handle = getattr(model.get_submodule(where), f"register_{kind}_hook")(capture)
    with pytest.raises(ConversionError, match=rf"hooks on '{where or 'Network'}' \(.*capture\).*remove them"):
        gatefit.retrofit(model, images())
    assert not seen
    handle.remove()
    gatefit.retrofit(model, images())


def test_hooks_on_layers_are_kept():
    model = make("basic")
    model.blocks[0].conv1.register_forward_hook(lambda module, inputs, output: 2 * output)
    seen = []
    model.blocks[0].conv2.register_forward_hook(lambda *_: seen.append(1))
    gated = gatefit.retrofit(model, images())
    seen.clear()
    assert torch.equal(gated(images()), model(images())) and len(seen) == 2


class Changing(Network):
    """Its forward changes a buffer or an attribute, in one way or another."""

    def __init__(self, how):
        super().__init__(Basic(8, 8))
        self.how, self.calls = how, 0
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        y = super().forward(x)
        match self.how:
            case "in place":
                self.scale.add_(1)
            case "assigned":
                self.scale = self.scale + 1
            case "average":
                self.scale.mul_(0.9).add_(y.detach().mean(), alpha=0.1)
            case "number":
                self.calls += 1
            case "in training" if self.training:
                self.scale.add_(1)
        return y * self.scale + self.calls


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("in place", "changes the buffer 'scale' in eval mode"),
        ("assigned", "changes the buffer 'scale' in eval mode"),
        ("average", "changes the buffer 'scale' in eval mode"),
        ("number", "second call on the same images gives other outputs"),
        ("in training", "changes the buffer 'scale' in train mode"),
    ],
)
def test_a_forward_that_changes_the_network_is_refused(how, reason):
    with pytest.raises(ConversionError, match=reason):
        gatefit.retrofit(Changing(how).eval(), images())


class Average(nn.Module):
    """A module without layers of its own, which is kept as it is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(), alpha=0.1)
        return x - self.mean


def test_an_average_in_a_module_of_its_own_is_kept():
    gated = gatefit.retrofit(Network(Basic(8, 8), Average()).eval(), images()).train()
    gated(images())
    assert float(gated.get_buffer("blocks.1.mean")) != 0


class Hanging(Network):
    """What it runs hangs on values."""

    def __init__(self, how):
        super().__init__(Basic(8, 8))
        self.how = how

    def forward(self, x):
        y = super().forward(x)
        if self.how == "if":
            return y if y.sum() > 0 else -y
        return y * float(y.mean())


@pytest.mark.parametrize(("how", "line"), [("if", "return y if y.sum"), ("float", "float(y.mean())")])
def test_code_that_hangs_on_values_is_named_by_its_line(how, line):
    with pytest.raises(ConversionError) as caught:
        trace(Hanging(how), images())
    assert "at test_accept.py, line " in str(caught.value) and line in str(caught.value)
    assert "torch.where" in str(caught.value)
    gated = gatefit.retrofit(Hanging(how), images()).eval()  # its parts do not hang on values
    assert set(gates_of(gated)) == {"blocks.0"}


@pytest.mark.parametrize("name", ["tied", "shared weights"])
def test_shared_blocks_say_why_their_channels_have_no_gate(name):
    with pytest.raises(ConversionError, match=r"has no channels to gate.*more than once.*gates='l' gates whole blocks"):
        gatefit.retrofit(make(name), images(), gates="c")
    assert gates_of(gatefit.retrofit(make(name), images(), gates="l"))
