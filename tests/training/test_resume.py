"""A run that was broken off ends as if it had not been."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from trained import LOOP, SPEC, gate, short

import gatefit
from gatefit.errors import CheckpointError
from gatefit.training.finetune import train_dense
from gatefit.training.trainer import Trainer


def test_a_broken_run_ends_as_if_it_had_not_been(dense, digits, tmp_path):
    whole = gate(dense)
    gatefit.finetune(whole, digits, dense, **short(), seed=3)
    broken = gate(dense)

    class Killed(Exception):
        pass

    def kill(progress):
        if progress.stage == "fine-tune" and progress.step == 53:
            raise Killed

    with pytest.raises(Killed):
        gatefit.finetune(
            broken, digits, dense, **short(), seed=3, on_progress=kill, checkpoint=tmp_path / "c.safetensors"
        )
    again = gate(dense)
    steps = []
    history = gatefit.finetune(
        again, digits, dense, **short(), seed=3, checkpoint=tmp_path / "c.safetensors", resume=True,
        on_progress=lambda p: steps.append(p.step),
    )  # fmt: skip
    assert steps[0] == 45 and len(history) == 4
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_checkpoint_keeps_the_scale_of_the_loss(dense, digits, tmp_path):
    trainers = []
    for _ in range(2):
        trainer = Trainer(dense, digits.train, SPEC, LOOP, stage="baseline", seed=0, on_progress=lambda _: None)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # what fp16 on a GPU would have
        trainers.append(trainer)
    first, second = trainers
    first.accelerator.scaler.scale(torch.ones(()))
    first.accelerator.scaler.update(2.0)
    first._save(tmp_path / "c.safetensors")
    second._restore(tmp_path / "c.safetensors")
    assert second.accelerator.scaler.get_scale() == 2.0


def test_a_damaged_checkpoint_is_named(dense, digits, tmp_path):
    file = tmp_path / "c.safetensors"
    file.write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match="damaged or of another run"):
        gatefit.finetune(gate(dense), digits, dense, **short(), checkpoint=file, resume=True)


def test_processes_that_see_different_files_are_refused(dense, digits, monkeypatch, tmp_path):
    monkeypatch.setattr(Trainer, "_average", lambda self, value: 0.5)  # of two hosts one has the file
    with pytest.raises(CheckpointError, match="all hosts must share"):
        train_dense(copy.deepcopy(dense), digits.train, SPEC, LOOP, checkpoint=tmp_path / "c", resume=True)


def test_a_checkpoint_with_any_byte_changed_is_refused(dense, digits, tmp_path):
    file = tmp_path / "c.safetensors"
    train_dense(copy.deepcopy(dense), digits.train, SPEC, replace(LOOP, epochs=1), checkpoint=file)
    good = file.read_bytes()
    choose = random.Random(0)
    for _ in range(40):
        damaged = bytearray(good)
        for _ in range(choose.choice([1, 1, 8])):
            damaged[choose.randrange(len(good))] ^= 1 << choose.randrange(8)
        file.write_bytes(damaged)
        trainer = Trainer(copy.deepcopy(dense), digits.train, SPEC, LOOP, stage="baseline", seed=0)
        if bytes(damaged) != good:
            with pytest.raises(CheckpointError, match="damaged or of another run") as refused:
                trainer._restore(file)
            assert "\n" not in str(refused.value)


def test_the_start_is_not_done_again(dense, digits, tmp_path):
    """What the gates were set to before the first step is kept: a run that is broken off right behind it goes on."""
    whole, file = gate(dense), tmp_path / "c.safetensors"
    gatefit.finetune(whole, digits, dense, **short(), seed=3)

    def stop(progress):
        if progress.stage == "fine-tune":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gatefit.finetune(gate(dense), digits, dense, **short(), seed=3, on_progress=stop, checkpoint=file)
    again, stages = gate(dense), []
    gatefit.finetune(
        again, digits, dense, **short(), seed=3, checkpoint=file, resume=True,
        on_progress=lambda p: stages.append(p.stage),
    )  # fmt: skip
    assert stages[0] == "fine-tune"
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in again.state_dict().items())
