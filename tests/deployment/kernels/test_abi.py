"""Structs of Python that are not the ones of the compiled library are refused before a kernel reads them."""

import ctypes
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from gatefit.deployment.kernels import abi, native
from gatefit.deployment.kernels.abi import NUMBER, REAL, BlockStruct, StepStruct, check_abi
from gatefit.deployment.kernels.native import FILES, kernels
from gatefit.errors import DeployError

needs_compiler = pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
load = native.kernels.__wrapped__
"""Loads anew, whatever is cached."""


class Longer(StepStruct):
    _fields_ = (("dilation", NUMBER),)


class Swapped(ctypes.Structure):
    _fields_ = (*BlockStruct._fields_[:-2], ("highest", REAL), ("lowest", REAL))


class Renamed(ctypes.Structure):
    _fields_ = (*BlockStruct._fields_[:-1], ("above", REAL))


@needs_compiler
@pytest.mark.parametrize(
    ("name", "struct", "message"),
    [
        ("StepStruct", Longer, r"StepStruct has 120 bytes in C\+\+ and 128 bytes in abi\.py$"),
        ("BlockStruct", Swapped, r"BlockStruct\.highest is at byte 104 with 4 bytes in C\+\+ and at byte 100"),
        ("BlockStruct", Renamed, r"BlockStruct\.above is missing in C\+\+ and at byte 104"),
    ],
)
def test_structs_that_differ_are_refused(name, struct, message, monkeypatch):
    assert load() is not None
    monkeypatch.setattr(abi, "STRUCTS", {**abi.STRUCTS, name: struct})
    with pytest.raises(DeployError, match=message) as refusal:
        load()
    assert "\n" not in str(refusal.value)


@needs_compiler
def test_versions_and_constants_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(abi, "CONSTANTS", {**abi.CONSTANTS, "PACKED_OC": 8})
    with pytest.raises(DeployError, match=r"PACKED_OC is 16 in C\+\+ and 8 in abi\.py"):
        load()
    monkeypatch.setattr(abi, "ABI_VERSION", abi.ABI_VERSION + 1)
    with pytest.raises(DeployError, match=r"have version \d+, abi\.py has version \d+$"):
        load()


def test_a_library_without_version_is_refused():
    with pytest.raises(DeployError, match="do not name their version"):
        check_abi(ctypes.CDLL(None))


def test_all_sources_are_hashed_and_in_the_wheel():
    folder = Path(native.__file__).parent
    sources = {p.name for p in folder.iterdir() if p.suffix in (".cpp", ".h")}
    assert sources == set(FILES)
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["gatefit"]
    assert all(any(fnmatch(f"deployment/kernels/{name}", p) for p in patterns) for name in sources)
