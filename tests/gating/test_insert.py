import copy
import itertools
from dataclasses import replace

import pytest
import torch
from networks import CASES, GATABLE, Basic, images, make
from torch import nn

import gatefit
from gatefit.errors import ConversionError, GatefitError, RecipeError
from gatefit.gating.gates import PREFIX, gates_of, outputs_of
from gatefit.gating.info import info_of
from gatefit.gating.verify import verify
from gatefit.graph import channels
from gatefit.graph.blocks import MaskPoint

KINDS = list(itertools.product(["lc", "l", "c"], [False, True]))


def test_a_network_without_gates_is_refused_in_words():
    with pytest.raises(GatefitError, match=r"has no gates; call gatefit\.retrofit"):
        gatefit.evaluate(make("basic"), (images(4), torch.zeros(4)))


def _conversions():
    """Each network with each kind of gates; the quick set has each network once, the kinds in turn."""
    for i, name in enumerate(GATABLE):
        for j, (gates, compensation) in enumerate(KINDS):
            marks = [] if j == i % len(KINDS) or name == "basic" else [pytest.mark.slow]
            yield pytest.param(name, gates, compensation, marks=marks)


@pytest.mark.parametrize(("name", "gates", "compensation"), _conversions())
def test_identity_and_removability(name, gates, compensation):
    model = make(name)
    if gates == "c" and not any(CASES[name].units):
        pytest.skip("no channel gate")
    gated = gatefit.retrofit(model, images(), gates, compensation=compensation)
    checked = info_of(gated).verification
    assert torch.equal(model(images(5)), gated(images(5)))
    assert checked.closed_units == (sum(u // 2 for u in CASES[name].units) if "c" in gates else 0)
    assert (checked.closed_blocks > 0) == ("l" in gates)


@pytest.mark.parametrize("name", ["basic", "bottleneck", "inverted", "squeeze-excite", "grouped"])
def test_a_mask_before_batch_norm_is_refused(name, monkeypatch):
    """bn(0) is a constant: the corruption test has to see that such a channel is not dead."""
    right = channels._mask_nodes

    def too_early(walk, start):
        right(walk, start)
        return [start]

    monkeypatch.setattr(channels, "_mask_nodes", too_early)
    with pytest.raises(ConversionError, match="closed channels still change"):
        gatefit.retrofit(make(name), images())


def test_a_conversion_that_changes_outputs_is_refused(monkeypatch):
    model = make("basic")
    gated = gatefit.retrofit(model, images())
    gates_of(gated)["blocks.0"].block.bias.data.fill_(0.999)
    with pytest.raises(ConversionError, match="differs from the original"):
        verify(model, gated, images())


def test_a_wrong_claim_is_caught():
    """Claiming one slice too many makes the corruption test fail."""
    model = make("basic")
    gated = gatefit.retrofit(model, images())
    gate = gates_of(gated)["blocks.0"]
    extra = replace(gate.of.channel_units.slices[0], tensor="blocks.0.conv2.weight")
    gate.of = replace(
        gate.of, channel_units=replace(gate.of.channel_units, slices=(*gate.of.channel_units.slices, extra))
    )
    with pytest.raises(ConversionError, match="closed channels"):
        verify(model, gated, images())


@pytest.mark.parametrize("name", GATABLE)
def test_the_original_is_untouched(name):
    model = make(name).train()
    calls = []
    layer = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    layer.register_forward_hook(lambda *_: calls.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inplace = [getattr(m, "inplace", None) for m in model.modules()]
    gated = gatefit.retrofit(model, images())
    assert model.training and gated.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [getattr(m, "inplace", None) for m in model.modules()] == inplace
    assert len(layer._forward_hooks) == 1
    with torch.no_grad():
        for p in gated.parameters():
            p.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", GATABLE)
def test_state_dict_keys_are_kept_and_new_ones_are_prefixed(name):
    model = make(name)
    gated = gatefit.retrofit(model, images())
    old, new = set(model.state_dict()), set(gated.state_dict())
    assert old <= new and all(k.startswith(f"{PREFIX}.") for k in new - old)
    assert {k for k, _ in model.named_parameters()} <= {k for k, _ in gated.named_parameters()}
    other = gatefit.retrofit(make(name, seed=3), images())
    other.load_state_dict(gated.state_dict())
    assert torch.equal(other(images()), gated(images()))


def test_dropout_follows_the_mode():
    gated = gatefit.retrofit(make("functional dropout"), images())
    assert torch.equal(gated(images()), gated(images()))
    gated.train()
    assert not torch.equal(gated(images()), gated(images()))


def test_batch_norm_follows_the_mode():
    model = make("basic")
    gated = gatefit.retrofit(model, images())
    gated.train()
    model.train()
    assert torch.allclose(gated(images()), model(images()), atol=1e-6)
    assert torch.equal(gated.get_submodule("stem.1").running_mean, model.stem[1].running_mean)
    gated.eval()
    before = gated.state_dict()["blocks.0.bn1.running_mean"].clone()
    gated(images())
    assert torch.equal(before, gated.state_dict()["blocks.0.bn1.running_mean"])


def test_frozen_batch_norm_stays_frozen():
    model = make("basic").train()
    model.blocks[0].bn1.eval()
    gated = gatefit.retrofit(model, images())
    assert not gated.get_submodule("blocks.0.bn1").training and gated.get_submodule("blocks.0.bn2").training


@pytest.mark.parametrize("name", ["basic", "inverted", "grouped"])
@pytest.mark.parametrize("form", ["relu1", "step"])
def test_gates_and_backbone_get_finite_gradients(name, form):
    gated = gatefit.retrofit(make(name).train(), images(), form=form)
    gated(images()).square().sum().backward()
    gates = [p for g in gates_of(gated).values() for p in g.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gated.parameters())
    assert any(p.grad.abs().max() > 0 for p in gates)


@pytest.mark.parametrize("form", ["relu1", "step"])
def test_deepcopy_after_a_forward(form):
    gated = gatefit.retrofit(make("basic").train(), images(), form=form)
    gated(images())
    twin = copy.deepcopy(gated)
    gated.eval(), twin.eval()
    assert torch.equal(twin(images()), gated(images()))
    assert list(gates_of(twin)) == list(gates_of(gated))


def test_amp_and_channels_last():
    gated = gatefit.retrofit(make("basic"), images())
    x = images().to(memory_format=torch.channels_last)
    last = copy.deepcopy(gated).to(memory_format=torch.channels_last)
    assert torch.allclose(last(x), gated(images()), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gated(images())
    assert all(o.channel.dtype == torch.float32 for _, o in outputs_of(gated))
    assert torch.allclose(mixed.float(), gated(images()), atol=0.2)


def test_compile():
    gated = gatefit.retrofit(make("basic"), images())
    compiled = torch.compile(gated, backend="aot_eager")
    assert torch.allclose(compiled(images()), gated(images()), atol=1e-5)


def test_other_image_and_batch_sizes():
    model = make("squeeze-excite")
    gated = gatefit.retrofit(model, images())
    for x in (images(1, 8), images(3, 16), images(2, 11)):
        assert torch.equal(model(x), gated(x))


def test_half_precision_network():
    model = make("basic").to(torch.bfloat16)
    gated = gatefit.retrofit(model, images().bfloat16())
    assert torch.equal(model(images().bfloat16()), gated(images().bfloat16()))


def test_the_users_own_loop_needs_one_call():
    gated = gatefit.retrofit(make("basic").train(), images())
    optimizer = torch.optim.SGD(gated.parameters(), 0.05)
    before = float(gatefit.salience_penalty(_ran(gated)).detach())
    for _ in range(20):
        gated(images())
        optimizer.zero_grad()
        (0.05 * gatefit.salience_penalty(gated)).backward()
        optimizer.step()
    assert float(gatefit.salience_penalty(_ran(gated)).detach()) < 0.9 * before


def test_the_penalty_is_never_negative():
    """In training the leaky ReLU-1 gives closed gates negative saliences; a norm counts their size."""
    gated = gatefit.retrofit(make("basic").train(), images())
    for gate in gates_of(gated).values():
        for fc in gate.layers:
            fc.bias.data.fill_(-100)
    assert float(gatefit.salience_penalty(_ran(gated), "plain").detach()) == pytest.approx(26)
    gatefit.salience_penalty(gated).backward()
    assert all(bool((fc.bias.grad < 0).all()) for gate in gates_of(gated).values() for fc in gate.layers)


def test_penalty_counts_saliences():
    gated = gatefit.retrofit(make("basic").train(), images())
    gated(images())
    assert float(gatefit.salience_penalty(gated, "plain").detach()) == pytest.approx(2 + 8 + 16)
    with pytest.raises(GatefitError, match="has not run"):
        gatefit.salience_penalty(copy.deepcopy(gated))
    with pytest.raises(GatefitError, match="no gates"):
        gatefit.salience_penalty(make("basic"))


@pytest.mark.parametrize("options", [{"gates": "x"}, {"form": "sigmoid"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(RecipeError):
        gatefit.retrofit(make("basic"), images(), **options)


def test_names_that_differ_in_dots_alone():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.a_b = nn.Conv2d(3, 8, 1), nn.Module(), Basic(8, 8)
            self.a.b = Basic(8, 8)

        def forward(self, x):
            return self.a_b(self.a.b(self.stem(x)))

    gated = gatefit.retrofit(Named().eval(), images())
    assert list(gates_of(gated)) == ["a.b", "a_b"]


def test_what_a_graph_cannot_hold_is_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x, y):
            return self.fc(x) + y

    class Writing(Two):
        def forward(self, x):
            y = self.fc(x)
            y.zero_()
            return y

    with pytest.raises(ConversionError, match=r"more than one input \(y\)"):
        gatefit.find_blocks(Two(), torch.zeros(2, 3))
    with pytest.raises(ConversionError, match="writes into a tensor"):
        gatefit.find_blocks(Writing(), torch.zeros(2, 3))
    gated = gatefit.retrofit(make("basic"), images())
    with pytest.raises(ConversionError, match="already"):
        gatefit.retrofit(gated, images())


def test_untraced_parameters_have_a_message():
    with pytest.raises(ConversionError, match="no parameters"):
        gatefit.retrofit(nn.ReLU(), images())


def test_mask_points_stand_behind_the_activation():
    found = gatefit.find_blocks(make("basic"), images())
    assert found.blocks[0].channel_units.masks == (MaskPoint("relu", 1, 1),)


def _ran(gated):
    gated(images())
    return gated


class Scaled(nn.Module):
    """Numbers that are computed from sizes: whole ones and others."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.last = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))

    def forward(self, x):
        x = self.stem(x)
        height, width = x.shape[2:]
        scale = (height * width) ** -0.5 * (2 * (1 / width**0.5) + float(height) / width)
        assert isinstance(scale, float) and isinstance(height, int) and {int: True}[type(x.dim())]
        x = x + self.last(torch.relu(self.first(x))) * scale
        return x.reshape(len(x), 2**3, -1).mean(2) + int(height**1.5)


def test_numbers_computed_from_sizes_follow_them():
    network = Scaled().eval()
    gated = gatefit.retrofit(network, torch.zeros(2, 3, 8, 8)).eval()
    for shape in ((3, 3, 8, 8), (2, 3, 16, 12)):
        x = torch.randn(shape)
        assert torch.equal(gated(x), network(x))


class Positional(nn.Module):
    """A branch with layers that read weights alone, as relative positions do; or one that reads parts of a split."""

    def __init__(self, split):
        super().__init__()
        self.split, self.place = split, nn.Parameter(torch.randn(1, 64, 2))
        self.first, self.second = nn.Linear(2, 16), nn.Linear(16, 8)
        self.stem, self.inner, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        if self.split:
            a, b = x.chunk(2, 1)
            return a + self.last(torch.relu(self.inner(a * 2 + b)))
        bias = self.second(torch.relu(self.first(self.place)))
        return x + self.last(torch.relu(self.inner(x))) * bias


def test_layers_that_read_weights_alone_have_no_gate():
    found = gatefit.find_blocks(Positional(False), torch.zeros(2, 3, 8, 8))
    assert [b.channel_units.target for b in found.blocks] == ["inner"]
    gated = gatefit.retrofit(Positional(False), torch.zeros(2, 3, 8, 8))
    gated(torch.randn(5, 3, 8, 8)).sum().backward()


def test_a_branch_that_reads_parts_of_a_split_is_refused():
    [skipped] = [
        s for s in gatefit.find_blocks(Positional(True), torch.zeros(2, 3, 8, 8)).skipped if "last" in s.reason
    ]
    assert "reads 2 tensors" in skipped.reason
