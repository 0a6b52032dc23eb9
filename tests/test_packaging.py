"""A wheel holds all that an installed gatefit needs, and its kernels are built where it runs."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROBE = """
import gatefit
from gatefit.deployment.kernels.native import kernels

print(gatefit.__file__)
assert kernels() is not None
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "gatefit", folder / "gatefit", ignore=shutil.ignore_patterns("__pycache__"))
    isolated = [] if importlib.util.find_spec("setuptools") is None else ["--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--quiet", *isolated]
    subprocess.run(command, cwd=folder, check=True)
    (file,) = folder.glob("*.whl")
    return file


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_the_package(wheel):
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "gatefit").rglob("*") if p.is_file()}
    needed = {f for f in files if "__pycache__" not in f}
    assert {"gatefit/py.typed", "gatefit/deployment/kernels/gathered.cpp"} <= needed
    assert needed <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_kernels_of_a_wheel_are_built_where_it_runs(wheel, tmp_path):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "TORCH_HOME": str(tmp_path / "cache" / "torch")}
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and str(tmp_path / "site") in done.stdout, done.stdout + done.stderr
    assert list((tmp_path / "cache").rglob("*.so"))
