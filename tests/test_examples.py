import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("convert_in_python.py", "the same to the bit when loaded again: True"),
        ("own_training.py", "of the MACs"),
        ("saliences.py", "channels open"),
    ],
)
def test_examples_run(script, words, tmp_path):
    command = [sys.executable, str(EXAMPLES / script), *([str(tmp_path / "out")] if "convert" in script else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and words in done.stdout, done.stderr


@pytest.mark.parametrize("file", EXAMPLES.glob("*.py"), ids=lambda f: f.stem)
def test_examples_are_short(file):
    assert len(file.read_text().splitlines()) < 60
