import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("script", "says"),
    [
        pytest.param(
            "convert_in_python.py",
            r"-> 0\.9\d+ at 0\.[56]\d+ of the MACs(.|\n)*loaded again: True",
            marks=pytest.mark.slow,
        ),
        ("own_training.py", r"-> 0\.[89]\d+ at 0\.[0-8]\d+ of the MACs"),
        ("saliences.py", r"layer3.0 runs at 0\.\d+, [1-5]?\d of 64 channels open"),
    ],
)
def test_examples_run(script, says, tmp_path):
    command = [sys.executable, str(EXAMPLES / script), *([str(tmp_path / "out")] if "convert" in script else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and re.search(says, done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize("file", EXAMPLES.glob("*.py"), ids=lambda f: f.stem)
def test_examples_are_short(file):
    assert len(file.read_text().splitlines()) < 60
