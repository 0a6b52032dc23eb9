"""The loop: gradients, rates, augmentation, statistics."""

import copy
import shutil

import pytest
import torch
from torch import nn
from trained import CLOSING, LOOP, SPEC, gate, network, short

import gatefit
from gatefit.errors import TrainingError
from gatefit.gating.gates import gates_of
from gatefit.inputs.loader import augment
from gatefit.recipe import FinetunePart
from gatefit.training.gate_closing import GateClosing
from gatefit.training.trainer import _optimizer, recalibrate


def test_step_gates_send_no_gradient_into_the_backbone():
    gated = gate(network(), "c")
    seen = []
    gates_of(gated)["blocks.1"].register_forward_hook(lambda m, args, out: seen.append((args[0], out[1])))
    gated.train()(torch.randn(4, *SPEC.shape))
    entry, salience = seen[0]
    assert torch.autograd.grad(salience.sum(), entry, allow_unused=True) == (None,)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a compiler")
@pytest.mark.slow
def test_compiled_training_gives_the_same(dense, digits):
    before = dense.get_submodule("blocks.0.conv1").weight
    results = []
    for compiled in (False, True):
        gated = gate(dense, "c")
        settings = short(epochs=1, compile=compiled, lr=0.001)
        history = gatefit.finetune(gated, digits, dense, **settings)
        results.append((history[0].loss, gated.get_submodule("blocks.0.conv1").weight.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=0.01)  # rounding moves steps across their edge
    moved = [weight - before for _, weight in results]
    assert (moved[0] - moved[1]).norm() < 0.1 * moved[0].norm()


def test_a_compiler_that_is_not_there(dense, digits, monkeypatch, tmp_path):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with pytest.raises(TrainingError, match=r"could not be compiled.*finetune\.compile = false"):
        gatefit.finetune(gate(dense, "c"), digits, dense, **short(epochs=1, compile=True, batch_size=48))


def test_every_stage_tells_how_far_it_is(dense, digits):
    last = {}
    gatefit.finetune(
        gate(dense, "c"), digits, dense, **short(epochs=1),
        on_progress=lambda p: last.update({p.stage: p}),
    )  # fmt: skip
    assert list(last) == ["initialise", "reconstruct", "fine-tune", "reinitialise"]
    assert all(p.step == p.steps for p in last.values())
    assert last["reinitialise"].loss is None and last["fine-tune"].share < 1


def test_gates_have_their_own_rate_and_no_decay(dense):
    gated = gate(dense)
    settings = FinetunePart(lr=0.5, weight_decay=0.1)
    backbone, gates = _optimizer(gated, settings, 0.25).param_groups
    own = {id(p) for g in gates_of(gated).values() for p in g.parameters()}
    assert {id(p) for p in gates["params"]} == own
    assert (gates["weight_decay"], gates["peak"], backbone["weight_decay"], backbone["peak"]) == (0, 0.25, 0.1, 0.5)
    assert len(backbone["params"]) + len(gates["params"]) == len(list(gated.parameters()))
    assert len(_optimizer(gated, settings, 0.0).param_groups) == 1


def test_rates_drop_to_a_tenth(dense, digits):
    settings = short(epochs=3, drop_every=2, lr=0.1)
    epochs = gatefit.finetune(gate(dense), digits, dense, **settings)
    assert [e.lr for e in epochs] == pytest.approx([0.1, 0.1, 0.01])


def test_augmentation_depends_on_the_image_and_the_epoch_alone():
    x = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    index = torch.tensor([5, 2, 9, 7, 1, 0])
    whole = augment(x, index, 10, 0, 3, True)
    assert torch.equal(whole[2:4], augment(x[2:4], index[2:4], 10, 0, 3, True))
    assert not torch.equal(whole, augment(x, index, 10, 0, 4, True))
    assert whole.shape == x.shape


def test_recalibration_is_the_average_over_batches():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))
    batches = [torch.randn(50, 2) + 3, torch.randn(50, 2) - 1]
    recalibrate(net, iter(batches))
    assert torch.allclose(net[0].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0), atol=1e-6)
    assert net[0].momentum == 0.1 and not net[0].training


def test_batches_for_statistics_are_alike(dense, digits):
    """Each counts as much as the others, and batch norm cannot take one image alone."""
    closing = GateClosing(gate(dense), digits.train.select(torch.arange(101)), LOOP, CLOSING, "data", 0)
    assert [len(batch) for batch in closing._some(500)] == [51, 50]
    assert [len(batch) for batch in closing._some(100)] == [100]


def test_teacher_is_untouched(dense, digits):
    before = copy.deepcopy(dense.state_dict())
    gatefit.finetune(gate(dense), digits, dense, **short(epochs=1))
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert all(p.requires_grad for p in dense.parameters())
