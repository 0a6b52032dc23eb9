import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    """Weights and images that the project's developers have and its users do not."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs the developers' shared weights and images, which are not here")
    return path
