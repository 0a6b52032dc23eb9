"""Several processes, or several passes for a step, reach the result of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import Biased
from torch import nn
from trained import SPEC, gate, short

import gatefit


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
    settings = short(target=None, l1=1e-4, epochs=2, min_open=0.0, **change)
    gated = gate(model)
    return [e.loss for e in gatefit.finetune(gated, digits, model, **settings)]


def test_accumulation_gives_the_same_losses(digits):
    assert plain_losses(digits, accumulate=2) == pytest.approx(plain_losses(digits), rel=1e-3)


WORKER = """
import json, sys, torch
sys.path[:0] = sys.argv[1].split(":")
torch.set_num_threads(1)
from dataclasses import replace
import gatefit
from trained import short, SPEC, gate, network
from test_processes import plain_losses
from gatefit.inputs.data import read_data
from safetensors.torch import load_file
from accelerate import PartialState
PartialState(cpu=True)
digits = read_data("digits", SPEC)
dense = network(); dense.load_state_dict(load_file(sys.argv[2])); dense.eval()
gated = gate(dense)
gatefit.finetune(gated, digits, dense, **short(epochs=3))
result = gatefit.evaluate(gated, digits, dense)
losses = plain_losses(digits)
if PartialState().is_main_process:
    out = {"world": PartialState().num_processes, "accuracy": result.accuracy, "share": result.share,
           "losses": losses}
    open(sys.argv[3], "w").write(json.dumps(out))
"""


@pytest.mark.slow
def test_two_processes_reach_the_result_of_one(dense, tmp_path):
    from safetensors.torch import save_file

    save_file(dense.state_dict(), tmp_path / "w.safetensors")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    here = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
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
