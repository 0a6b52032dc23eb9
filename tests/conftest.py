import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core to itself, and so have the processes that it starts
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run 25 times as many mutated cases (tests/test_fuzz.py)")
