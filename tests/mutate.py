"""Seeded mutations of bytes, values and texts: what damage, a slip of the hand or ill will make of a file."""

import copy
import random

ODD = [
    None, True, False, 0, -1, 1, 3, 10**34, -(10**34), 10**400, 2**63, 0.0, -0.5, 1e-300, 1e308, float("inf"),
    float("-inf"), float("nan"), "", "x", "lc", "../x", "/", "~", "a\nb", "nul\0l", "é", "x" * 5000, [], [1], ["x"], {},
    {"a": 1}, [[]], [[0]],
]  # fmt: skip


def mutate_bytes(data: bytes, choose: random.Random) -> bytes:
    """Flip, cut, repeat, insert or blank some of the bytes."""
    out = bytearray(data)
    for _ in range(choose.choice([1, 1, 1, 2, 8])):
        at = choose.randrange(len(out) + 1)
        length = choose.choice([1, 1, 4, 16, 200])
        kind = choose.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << choose.randrange(8)
        elif kind == 1:
            del out[at : at + length]
        elif kind == 2:
            out[at:at] = out[at : at + length]
        elif kind == 3:
            out[at:at] = choose.randbytes(length)
        elif kind == 4:
            out[at : at + length] = b"\0" * len(out[at : at + length])
        else:
            del out[at:]
    return bytes(out)


def mutate_value(value, choose: random.Random):
    """Change one or two places of nested lists and dictionaries; the value itself stays as it is."""
    changed = copy.deepcopy(value)
    for _ in range(choose.choice([1, 1, 1, 2])):
        places = list(_places(changed))
        if not places:
            return choose.choice(ODD)
        holder, key = choose.choice(places)
        kind = choose.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 1:
            holder[f"{key}x"] = holder.pop(key)
        elif kind == 2 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = choose.choice([-1, 2, 1000, 0.5, 10**9]) * holder[key]
        else:
            holder[key] = copy.deepcopy(choose.choice(ODD))
    return changed


def _places(value):
    """Every place below a value that can be changed: what holds it, and its key there."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
