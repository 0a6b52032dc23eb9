import copy
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import Basic, Biased, Network
from torch import nn

import gatefit
from gatefit.errors import CheckpointError, RecipeError, TrainingError
from gatefit.gating.cost import costs_of, decisions_of
from gatefit.gating.gates import gates_of, outputs_of
from gatefit.gating.initialise import _guess, _ridge, initialise_from_data
from gatefit.gating.measure import Probe
from gatefit.gating.reconstruct import reconstruct
from gatefit.gating.threshold import price_threshold, threshold_for
from gatefit.inputs.data import as_images, read_data
from gatefit.inputs.loader import augment
from gatefit.inputs.models import InputSpec
from gatefit.recipe import FinetunePart
from gatefit.training.finetune import GateClosing, train_dense
from gatefit.training.trainer import Trainer, _optimizer, recalibrate

SPEC = InputSpec((3, 8, 8), (0.3,) * 3, (0.35,) * 3)
SHORT = FinetunePart(epochs=4, batch_size=64, target=0.6, flip=False, bn_recalibration_images=600)


@pytest.fixture(scope="module")
def digits():
    return read_data("digits", SPEC)


def network():
    net = Network(Basic(8, 8), Basic(8, 16, 2), Basic(16, 16))
    net.pretrained_cfg = {"input_size": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std}
    return net


@pytest.fixture(scope="module")
def dense(digits):
    torch.manual_seed(0)
    model = network()
    train_dense(model, digits.train, SPEC, FinetunePart(epochs=6, batch_size=64, lr=0.1, flip=False))
    return model


def gate(dense, gates="lc", form="step"):
    return gatefit.retrofit(dense, torch.zeros(2, *SPEC.shape), gates, form)


@pytest.mark.parametrize("target", [0.8, 0.5])
@pytest.mark.parametrize(("gates", "form"), [("c", "step"), ("lc", "step"), ("c", "relu1"), ("lc", "relu1")])
def test_the_closed_loop_ends_at_the_target(dense, digits, gates, form, target):
    gated = gate(dense, gates, form)
    history = gatefit.finetune(gated, digits, dense, target=target, settings=replace(SHORT, target=None))
    result = gatefit.evaluate(gated, digits, dense)
    assert result.share == pytest.approx(target, abs=0.02)
    assert result.accuracy > (0.9 if target == 0.8 else 0.3) and result.dense_accuracy > 0.95
    assert history[-1].share == pytest.approx(target, abs=0.1)
    assert not gated.training


def test_different_images_take_different_paths(dense, digits):
    gated = gate(dense)
    gatefit.finetune(gated, digits, dense, settings=SHORT)
    result = gatefit.evaluate(gated, digits)
    assert result.paths > 20 and float(result.macs.std()) > 0 and result.agreement is None
    assert max(g.distinct for g in result.gates) > 5


def test_gates_from_data_stay_unless_they_are_renewed_or_have_a_rate(dense, digits):
    weights = []
    for change in ({"epochs": 0}, {"gate_reinits": 0}, {"gate_reinits": 0, "gate_lr": 0.01}, {"gate_reinits": 2}):
        gated = gate(dense, "c")
        gatefit.finetune(gated, digits, dense, settings=replace(SHORT, **change))
        weights.append(gates_of(gated)["blocks.1"].channel.weight.detach().clone())
        assert all(p.requires_grad for p in gated.parameters())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[3])


def test_gates_are_renewed_in_the_first_two_thirds(dense, digits):
    steps = []
    gated = gate(dense, "c")
    gatefit.finetune(
        gated, digits, dense, settings=replace(SHORT, epochs=3, gate_reinits=2),
        report=lambda p: steps.append(p.step if p.stage == "fine-tune" else p.stage),
    )  # fmt: skip
    started = [steps[i - 1] for i, s in enumerate(steps) if s == "renew" and steps[i - 1] != "renew"]
    assert started == [21, 43]  # 66 steps, renewed after 22 and 44 and shown behind that
    assert gatefit.evaluate(gated, digits).share == pytest.approx(0.6, abs=0.02)


def test_renewed_gates_keep_to_the_ramp(dense, digits):
    gated = gate(dense, "c")
    history = gatefit.finetune(gated, digits, dense, settings=replace(SHORT, epochs=3, gate_reinits=2, ramp=0.9))
    assert history[1].share > 0.7  # 0.85 at its begin, 0.70 at its end


def test_a_start_measures_the_network_as_it_runs(dense, digits):
    gated = gatefit.retrofit(dense, torch.zeros(2, *SPEC.shape), "lc", "step", compensation=True)
    gatefit.finetune(gated, digits, dense, settings=replace(SHORT, epochs=0))
    x = _floats(digits, 0)
    probe = Probe(gated)
    assert torch.equal(probe.run(x), gated(x))
    assert min(float(s.detach().mean()) for both in probe.saliences.values() for s in both[:2]) < 1


def test_step_gates_send_no_gradient_into_the_backbone():
    gated = gate(network(), "c")
    seen = []
    gates_of(gated)["blocks.1"].register_forward_hook(lambda m, args, out: seen.append((args[0], out[1])))
    gated.train()(torch.randn(4, *SPEC.shape))
    entry, salience = seen[0]
    assert torch.autograd.grad(salience.sum(), entry, allow_unused=True) == (None,)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a compiler")
def test_compiled_training_gives_the_same(dense, digits):
    before = dense.get_submodule("blocks.0.conv1").weight
    results = []
    for compiled in (False, True):
        gated = gate(dense, "c")
        settings = replace(SHORT, epochs=1, compile=compiled, lr=0.001)
        history = gatefit.finetune(gated, digits, dense, settings=settings)
        results.append((history[0].loss, gated.get_submodule("blocks.0.conv1").weight.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=0.01)  # rounding moves steps across their edge
    moved = [weight - before for _, weight in results]
    assert (moved[0] - moved[1]).norm() < 0.1 * moved[0].norm()


def test_a_compiler_that_is_not_there(dense, digits, monkeypatch, tmp_path):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with pytest.raises(TrainingError, match=r"could not be compiled.*finetune\.compile = false"):
        gatefit.finetune(
            gate(dense, "c"), digits, dense, settings=replace(SHORT, epochs=1, compile=True, batch_size=48)
        )


def test_a_higher_l1_closes_more(dense, digits):
    shares = []
    for l1 in (1e-5, 1e-3, 1e-1):
        gated = gate(dense)
        gatefit.finetune(gated, digits, dense, l1=l1, settings=replace(SHORT, target=None, epochs=2))
        shares.append(gatefit.evaluate(gated, digits).share)
    assert shares[0] > shares[1] > shares[2]


def test_without_training_the_start_alone_closes(dense, digits):
    settings = replace(SHORT, target=None, epochs=0)
    for wanted in ({"l1": 1e-3}, {"target": 0.9}):
        gated = gate(dense, "c")
        assert gatefit.finetune(gated, digits, dense, settings=settings, **wanted) == []
        assert gatefit.evaluate(gated, digits).share < 0.99
    with pytest.raises(RecipeError, match="by training alone"):
        gatefit.finetune(gate(dense), digits, l1=1.0, settings=settings, start="identity")


def test_a_fill_keeps_accuracy_where_a_mask_alone_loses_it(dense, digits):
    accuracies = []
    for compensation in (False, True):
        gated = gatefit.retrofit(dense, torch.zeros(2, *SPEC.shape), "c", "step", compensation)
        gatefit.finetune(gated, digits, dense, settings=replace(SHORT, epochs=0, target=0.7, reconstruction_images=0))
        result = gatefit.evaluate(gated, digits)
        assert result.share == pytest.approx(0.7, abs=0.02)
        accuracies.append(result.accuracy)
    assert accuracies[1] > accuracies[0] + 0.02


@pytest.mark.parametrize("compensation", [False, True])
def test_a_refit_mends_without_training(dense, digits, compensation):
    accuracies = []
    for images in (0, 500):
        gated = gatefit.retrofit(dense, torch.zeros(2, *SPEC.shape), "c", "step", compensation)
        gatefit.finetune(
            gated, digits, dense, settings=replace(SHORT, epochs=0, target=0.5, reconstruction_images=images)
        )
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


def test_the_papers_form_closes_gates_too(dense, digits):
    """ReLU-1 from the identity with plain L1, no distillation: only the gradient closes gates."""
    gated = gate(dense, form="relu1")
    settings = replace(SHORT, target=None, l1=0.02, penalty="plain", distillation=0.0, gate_lr=0.05, epochs=6)
    gatefit.finetune(gated, digits, settings=settings, start="identity")
    result = gatefit.evaluate(gated, digits)
    assert result.share < 0.9 and result.accuracy > 0.8


def test_the_start_predicts_what_matters(dense, digits):
    """At the same share of MACs, closing by the data-driven start costs less than closing at random."""
    gated = gate(dense, "c")
    initialise_from_data(gated, digits.train, count=1000)
    costs = costs_of(gated, SPEC.shape)

    def accuracy_at_share(share):
        for _ in range(3):
            gated(torch.cat([_floats(digits, i) for i in range(0, 300, 100)]))
            shift = threshold_for(gated, costs, share)
            for g, _ in outputs_of(gated):
                g.channel.bias.data -= shift
        return gatefit.evaluate(gated, digits).accuracy

    informed = accuracy_at_share(0.8)
    for g in gates_of(gated).values():
        order = torch.randperm(g.of.units, generator=torch.Generator().manual_seed(0))
        g.channel.weight.data = g.channel.weight.data[order]
        g.channel.bias.data = g.channel.bias.data[order]
    assert informed > 0.8 and informed > accuracy_at_share(0.8) + 0.1


def _floats(digits, start):
    from gatefit.inputs.data import normalise

    return normalise(digits.train.__getitems__(list(range(start, start + 100)))[0], SPEC)


def test_a_guess_keeps_what_holds_for_other_images():
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 60, generator=random, dtype=torch.float64)
    noise = torch.randn(200, 1, generator=random, dtype=torch.float64)
    noise -= noise.mean()
    assert _guess(inputs, noise).weight.norm() < 0.5 * _ridge(inputs, noise).weight.norm()
    assert torch.allclose(
        _guess(inputs, inputs[:, :1]).weight, _ridge(inputs, inputs[:, :1]).weight, rtol=0.01, atol=0.01
    )


def test_threshold_meets_the_share_on_its_batch(dense, digits):
    gated = gate(dense, "lc").eval()
    initialise_from_data(gated, digits.train, count=600)
    costs = costs_of(gated, SPEC.shape)
    gated(_floats(digits, 0))
    shift = threshold_for(gated, costs, 0.7)
    for g, out in outputs_of(gated):
        g.outputs = type(out)(out.block - shift, out.channel - shift)
    assert float(costs.per_image(decisions_of(gated)).mean()) / costs.dense == pytest.approx(0.7, abs=0.02)


def test_the_guard_keeps_every_gate_alive(dense, digits):
    gated = gate(dense)
    gatefit.finetune(gated, digits, dense, l1=1e3, settings=replace(SHORT, target=None, min_open=0.25, epochs=2))
    for use in gatefit.evaluate(gated, digits).gates:
        assert use.block_open > 0.05 and use.channel_open > 0.05


def test_without_labels_distillation_trains(dense, digits):
    bare = replace(digits.train, labels=None, classes=())
    gated = gate(dense)
    history = gatefit.finetune(gated, bare, dense, settings=SHORT)
    assert history[0].accuracy is None
    assert gatefit.evaluate(gated, digits, dense).agreement > 0.9


def test_from_scratch(digits):
    """Backbone and gates together, no teacher."""
    gated = gate(network())
    gatefit.finetune(gated, digits, settings=replace(SHORT, lr=0.1, epochs=8, target=0.7))
    result = gatefit.evaluate(gated, digits)
    assert result.accuracy > 0.85 and result.share == pytest.approx(0.7, abs=0.02)


def test_a_broken_run_ends_as_if_it_had_not_been(dense, digits, tmp_path):
    whole = gate(dense)
    gatefit.finetune(whole, digits, dense, settings=SHORT, seed=3)
    broken = gate(dense)

    class Killed(Exception):
        pass

    def kill(progress):
        if progress.stage == "fine-tune" and progress.step == 53:
            raise Killed

    with pytest.raises(Killed):
        gatefit.finetune(
            broken, digits, dense, settings=SHORT, seed=3, report=kill, checkpoint=tmp_path / "c.safetensors"
        )
    again = gate(dense)
    steps = []
    history = gatefit.finetune(
        again, digits, dense, settings=SHORT, seed=3, checkpoint=tmp_path / "c.safetensors", resume=True,
        report=lambda p: steps.append(p.step),
    )  # fmt: skip
    assert steps[0] == 45 and len(history) == 4
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_checkpoint_keeps_the_scale_of_the_loss(dense, digits, tmp_path):
    trainers = []
    for _ in range(2):
        trainer = Trainer(dense, digits.train, SPEC, SHORT, stage="baseline", seed=0, report=lambda _: None)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # what fp16 on a GPU would have
        trainers.append(trainer)
    first, second = trainers
    first.accelerator.scaler.scale(torch.ones(()))
    first.accelerator.scaler.update(2.0)
    first._save(tmp_path / "c.safetensors")
    second._restore(tmp_path / "c.safetensors")
    assert second.accelerator.scaler.get_scale() == 2.0


def test_every_stage_tells_how_far_it_is(dense, digits):
    last = {}
    gatefit.finetune(
        gate(dense, "c"), digits, dense, settings=replace(SHORT, epochs=1),
        report=lambda p: last.update({p.stage: p}),
    )  # fmt: skip
    assert list(last) == ["start", "refit", "fine-tune", "renew"]
    assert all(p.step == p.steps for p in last.values())
    assert last["renew"].loss is None and last["fine-tune"].share < 1


def test_a_damaged_checkpoint_is_named(dense, digits, tmp_path):
    file = tmp_path / "c.safetensors"
    file.write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="damaged or of another run"):
        gatefit.finetune(gate(dense), digits, dense, settings=SHORT, checkpoint=file, resume=True)


def test_nan_is_refused(dense, digits):
    with pytest.raises(TrainingError, match="not finite at step"):
        gatefit.finetune(gate(dense), digits, dense, settings=replace(SHORT, lr=1e9))


def test_a_start_from_broken_weights_is_refused(dense, digits):
    gated = gate(dense, "c")
    gated.get_parameter("blocks.1.conv1.weight").data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="outputs are not finite; check its weights"):
        gatefit.finetune(gated, digits, dense, settings=SHORT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": None}, "give --l1 X or --target"),
        ({"target": 0.05}, "cannot be reached"),
        ({"batch_size": 5000}, "more than the 1437 training images"),
        ({"accumulate": 3}, "cannot be divided"),
        ({"penalty": "plain"}, "for gates that learn"),
    ],
)
def test_settings_that_cannot_work(dense, digits, change, message):
    with pytest.raises(RecipeError, match=message):
        gatefit.finetune(gate(dense), digits, dense, settings=replace(SHORT, **change))


@pytest.mark.parametrize(
    ("start", "change", "message"),
    [
        ("identity", {}, "with 'identity' use l1"),
        ("identity", {"target": None, "l1": 0.1, "epochs": 0}, "by training alone"),
        ("identity", {"target": None, "l1": 0.1, "gate_lr": 0.0}, "by training alone"),
        ("dta", {}, "must be 'data' or 'identity', not 'dta'"),
    ],
)
def test_starts_that_cannot_work(dense, digits, start, change, message):
    with pytest.raises(RecipeError, match=message):
        gatefit.finetune(gate(dense), digits, dense, settings=replace(SHORT, **change), start=start)


def test_blocks_teach_without_predictions(dense, digits):
    """The distance to the original's blocks counts where distillation has no weight too."""
    losses = []
    for features in (0.0, 5.0):
        settings = replace(SHORT, epochs=1, gate_reinits=0, distillation=0.0, feature_weight=features)
        losses.append(gatefit.finetune(gate(dense), digits, dense, settings=settings)[0].loss)
    assert losses[1] > losses[0] + 0.1


def test_processes_that_see_different_files_are_refused(dense, digits, monkeypatch, tmp_path):
    monkeypatch.setattr(Trainer, "_average", lambda self, value: 0.5)  # of two hosts one has the file
    with pytest.raises(CheckpointError, match="all hosts must share"):
        train_dense(copy.deepcopy(dense), digits.train, SPEC, SHORT, checkpoint=tmp_path / "c", resume=True)


class Plain(nn.Module):
    """No batch norm: what one image gives does not depend on its batch."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(Biased(8), Biased(8))
        self.head = nn.Linear(8, 10)
        self.pretrained_cfg = {"input_size": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std}

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def plain_losses(digits, **change):
    """Losses of a short training whose gates follow an L1 price, which needs no averages over a batch."""
    torch.manual_seed(0)
    model = Plain()
    settings = replace(SHORT, target=None, l1=1e-4, epochs=2, min_open=0.0, **change)
    gated = gate(model)
    return [e.loss for e in gatefit.finetune(gated, digits, model, settings=settings)]


def test_accumulation_gives_the_same_losses(digits):
    assert plain_losses(digits, accumulate=2) == pytest.approx(plain_losses(digits), rel=1e-3)


def test_gates_have_their_own_rate_and_no_decay(dense):
    gated = gate(dense)
    settings = FinetunePart(lr=0.5, gate_lr=0.25, weight_decay=0.1)
    backbone, gates = _optimizer(gated, settings).param_groups
    own = {id(p) for g in gates_of(gated).values() for p in g.parameters()}
    assert {id(p) for p in gates["params"]} == own
    assert (gates["weight_decay"], gates["peak"], backbone["weight_decay"], backbone["peak"]) == (0, 0.25, 0.1, 0.5)
    assert len(backbone["params"]) + len(gates["params"]) == len(list(gated.parameters()))
    assert len(_optimizer(gated, replace(settings, gate_lr=0.0)).param_groups) == 1


def test_rates_drop_to_a_tenth(dense, digits):
    settings = replace(SHORT, epochs=3, drop_every=2, lr=0.1)
    epochs = gatefit.finetune(gate(dense), digits, dense, settings=settings)
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
    closing = GateClosing(gate(dense), digits.train.select(torch.arange(101)), SHORT, "data", 0)
    assert [len(batch) for batch in closing._some(500)] == [51, 50]
    assert [len(batch) for batch in closing._some(100)] == [100]


def test_price_rises_with_l1():
    assert price_threshold(0, 4) == 0
    assert price_threshold(0.08, 2.0) == pytest.approx(0.8)


def test_teacher_is_untouched(dense, digits):
    before = copy.deepcopy(dense.state_dict())
    gatefit.finetune(gate(dense), digits, dense, settings=replace(SHORT, epochs=1))
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert all(p.requires_grad for p in dense.parameters())


WORKER = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from dataclasses import replace
import gatefit
from test_finetune import SHORT, SPEC, gate, network, plain_losses
from gatefit.inputs.data import read_data
from safetensors.torch import load_file
from accelerate import PartialState
PartialState(cpu=True)
digits = read_data("digits", SPEC)
dense = network(); dense.load_state_dict(load_file(sys.argv[2])); dense.eval()
gated = gate(dense)
gatefit.finetune(gated, digits, dense, settings=replace(SHORT, epochs=3))
result = gatefit.evaluate(gated, digits, dense)
losses = plain_losses(digits)
if PartialState().is_main_process:
    out = {"world": PartialState().num_processes, "accuracy": result.accuracy, "share": result.share,
           "losses": losses}
    open(sys.argv[3], "w").write(json.dumps(out))
"""


def test_two_processes_reach_the_result_of_one(dense, tmp_path):
    from safetensors.torch import save_file

    save_file(dense.state_dict(), tmp_path / "w.safetensors")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    here = str(Path(__file__).parent)
    results = []
    for world in (1, 2):
        out = tmp_path / f"{world}.json"
        workers = []
        for rank in range(world):
            env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
            if world > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
            command = [sys.executable, str(script), here, str(tmp_path / "w.safetensors"), str(out)]
            workers.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        errors = [w.communicate(timeout=240)[1] for w in workers]
        assert all(w.returncode == 0 for w in workers), errors
        results.append(json.loads(out.read_text()))
    one, two = results
    assert (one["world"], two["world"]) == (1, 2)
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=0.05)  # BN sees half a batch in each process
    assert two["share"] == pytest.approx(one["share"], abs=0.02)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3)


def test_tensors_are_data_too(dense, digits):
    pair = (torch.randn(128, 3, 8, 8), torch.randint(0, 10, (128,)))
    gated = gate(dense)
    gatefit.finetune(gated, pair, dense, settings=replace(SHORT, epochs=1, bn_recalibration_images=100))
    assert gatefit.evaluate(gated, as_images(pair, SPEC)).images == 128
