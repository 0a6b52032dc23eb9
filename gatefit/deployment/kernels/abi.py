"""The Python side of `abi.h`: its constants and structs under the same names, and the check that both sides agree.

`abi.h` says what each field means, and explains the letters that shapes are given in.
"""

import ctypes
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from gatefit.errors import DeployError

ABI_VERSION = 2
"""Of `abi.h`. It changes with a meaning that no size shows."""
PACKED_OC = 16
"""Neighbouring output channels that lie side by side in a packed weight."""
CONVOLUTION, DEPTHWISE, MAX_POOLING = 0, 1, 2
"""Kinds of `StepStruct`."""
CLAMP, SILU, HARDSWISH, GELU, GELU_TANH, LEAKY_RELU, ELU = range(7)
"""Activations."""

POINTER, NUMBER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class StepStruct(ctypes.Structure):
    """One layer of a branch. Null pointers are None, yes and no are 1 and 0."""

    _fields_ = (
        ("weight", POINTER),  # (OC, IC, KH, KW)
        ("bias", POINTER),  # (OC,)
        ("packed_weight", POINTER),  # (IC, OC / PACKED_OC, KH * KW, PACKED_OC), see `pack_weight`
        ("oc_total", NUMBER),  # OC
        ("ic_total", NUMBER),  # IC; 1 for DEPTHWISE, OC for MAX_POOLING
        ("kernel", NUMBER),
        ("stride", NUMBER),
        ("padding", NUMBER),
        ("kind", NUMBER),  # CONVOLUTION, DEPTHWISE or MAX_POOLING
        ("open_oc", NUMBER),  # whether its output channels are the open units of the block
        ("open_ic", NUMBER),  # whether its input channels are
        ("compensated", NUMBER),  # whether its bias is the one that stands in for closed units
        ("activation", NUMBER),  # CLAMP or another; CLAMP is min(max(x, lowest), highest)
        ("parameter", REAL),
        ("lowest", REAL),
        ("highest", REAL),
    )


class BlockStruct(ctypes.Structure):
    """A block and its gates."""

    _fields_ = (
        ("gate_weight", POINTER),  # (has_block + U, C); None: nothing of the block ever closes
        ("gate_bias", POINTER),  # (has_block + U,)
        ("compensation", POINTER),  # (U, OC)
        ("threshold", POINTER),  # (U,)
        ("channels", NUMBER),  # C
        ("has_block", NUMBER),  # whether the first logit is the block gate's
        ("n_units", NUMBER),  # U
        ("n_steps", NUMBER),
        ("adds_input", NUMBER),  # whether the branch is added to the block's input
        ("steps", ctypes.POINTER(StepStruct)),  # (n_steps,)
        ("projection", ctypes.POINTER(StepStruct)),  # (1,), makes the residual of the input
        ("activation", NUMBER),  # of images that skip the branch
        ("parameter", REAL),
        ("lowest", REAL),
        ("highest", REAL),
    )


CONSTANTS: Mapping[str, int] = MappingProxyType(
    {
        "PACKED_OC": PACKED_OC,
        "CONVOLUTION": CONVOLUTION,
        "DEPTHWISE": DEPTHWISE,
        "MAX_POOLING": MAX_POOLING,
        "CLAMP": CLAMP,
        "SILU": SILU,
        "HARDSWISH": HARDSWISH,
        "GELU": GELU,
        "GELU_TANH": GELU_TANH,
        "LEAKY_RELU": LEAKY_RELU,
        "ELU": ELU,
    }
)
STRUCTS: Mapping[str, type[ctypes.Structure]] = MappingProxyType({"StepStruct": StepStruct, "BlockStruct": BlockStruct})


def pack_weight(weight: Tensor) -> Tensor | None:
    """Lay out the weight of a 3 x 3 convolution as `StepStruct.packed_weight` wants it.

    Example: with OC = 32 and IC = 2 the centre tap (tap 4 of 9) of `weight[17, 1]` becomes `packed[1, 1, 4, 1]`: input
    channel 1, second group of 16 output channels, tap 4, lane 1 of the register.

    Args:
        weight: (OC, IC, 3, 3) float32.

    Returns:
        (IC, OC / PACKED_OC, 9, PACKED_OC) float32, without gaps; None where OC is no multiple of PACKED_OC.
    """
    oc_total, ic_total = weight.shape[:2]
    if oc_total % PACKED_OC:
        return None
    return weight.reshape(-1, PACKED_OC, ic_total, 9).permute(2, 0, 3, 1).contiguous()


def layout_of(name: str, struct: type[ctypes.Structure]) -> dict[str, tuple[int, ...]]:
    """Describe a struct as the compiled library does.

    Example: `layout_of("StepStruct", StepStruct)` is `{"StepStruct": (120,), "StepStruct.weight": (0, 8), ...}`.

    Returns:
        The struct's size by its name; offset and size of each field by "struct.field"; in bytes.
    """
    layout: dict[str, tuple[int, ...]] = {name: (ctypes.sizeof(struct),)}
    for base in reversed(struct.__mro__):
        for field, *_ in vars(base).get("_fields_", ()):
            layout[f"{name}.{field}"] = (getattr(struct, field).offset, getattr(struct, field).size)
    return layout


def check_abi(library: ctypes.CDLL) -> None:
    """Compare the constants and structs of a compiled library with the ones of this file.

    Raises:
        DeployError: they differ, so that a call would read and write memory at wrong places.
    """
    try:
        library.gathered_abi_layout.restype, library.gathered_abi_version.restype = ctypes.c_char_p, NUMBER
        version, text = library.gathered_abi_version(), library.gathered_abi_layout().decode()
    except AttributeError as error:
        raise _refusal("they do not name their version") from error
    if version != ABI_VERSION:
        raise _refusal(f"they have version {version}, abi.py has version {ABI_VERSION}")
    compiled = {name: tuple(map(int, values)) for name, *values in map(str.split, text.splitlines())}
    expected: dict[str, tuple[int, ...]] = {name: (value,) for name, value in CONSTANTS.items()}
    for name, struct in STRUCTS.items():
        expected |= layout_of(name, struct)
    for name in (*expected, *compiled):  # sizes of structs come before their fields, and say more
        there, here = compiled.get(name), expected.get(name)
        if there == here:
            continue
        if name in STRUCTS and there is not None and here is not None:
            raise _refusal(f"{name} has {there[0]} bytes in C++ and {here[0]} bytes in abi.py")
        raise _refusal(f"{name} is {_words(there)} in C++ and {_words(here)} in abi.py")


def _words(values: tuple[int, ...] | None) -> str:
    if values is None:
        return "missing"
    return str(values[0]) if len(values) == 1 else f"at byte {values[0]} with {values[1]} bytes"


def _refusal(why: str) -> DeployError:
    return DeployError(f"gatefit's compiled kernels do not fit its Python code, please reinstall gatefit: {why}")
