"""The digits, and a small network trained on them once for all tests."""

import sys
from pathlib import Path

import pytest
import torch

from gatefit.inputs.data import read_data
from gatefit.recipe import FinetunePart
from gatefit.training.finetune import train_dense

sys.path.insert(0, str(Path(__file__).parent))

from trained import SPEC, network


@pytest.fixture(scope="session")
def digits():
    return read_data("digits", SPEC)


@pytest.fixture(scope="session")
def dense(digits):
    torch.manual_seed(0)
    model = network()
    train_dense(model, digits.train, SPEC, FinetunePart(epochs=6, batch_size=64, lr=0.1, flip=False))
    return model
