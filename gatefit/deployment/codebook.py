"""A few masks that stand for many: a mask may be replaced by a larger one, and no output changes.

A channel whose salience is 0 is multiplied by 0 where it is computed all the same. So the masks of a block that
images really ask for are covered by a small codebook, weights of each entry packed ahead, and an image takes the
cheapest entry that has all the channels it opens. The last entry has every channel that any image may open.
"""

import torch
from torch import Tensor

SWEEPS = 4
"""Passes of the search over all channels of all masks."""


def choose_codebook(opens: Tensor, masks: int, possible: Tensor | None = None) -> Tensor:
    """Search for the codebook with which the calibration images run at the least expected cost.

    Args:
        opens: which units each image opens, (N, units) bool.
        masks: entries of the codebook, at most; fewer where more do not pay.
        possible: units that any image may ever open, (units,) bool; None: all.

    Returns:
        (entries, units) bool, cheapest first; the last is `possible`.
    """
    units = opens.shape[1]
    whole = torch.ones(units, dtype=torch.bool) if possible is None else possible.cpu()
    opens = opens.cpu() & whole
    if masks < 2 or not len(opens):
        return whole[None]
    found = _starts(opens, masks - 1)
    for _ in range(SWEEPS):
        before = found.clone()
        for entry in range(len(found)):
            found[entry] = _improved(opens, found, entry, whole)
        if torch.equal(found, before):
            break
    found = found[found.any(1) & (found != whole).any(1)]  # a layer cannot have no channel at all
    entries = torch.unique(torch.cat([found, whole[None]]), dim=0)
    used = assign(opens, entries := entries[entries.sum(1).argsort(stable=True)])
    kept = torch.zeros(len(entries), dtype=torch.bool)
    kept[used] = True
    kept[-1] = True  # for what no calibration image asked for
    chosen: Tensor = entries[kept]
    return chosen


def most_frequent(opens: Tensor, masks: int, possible: Tensor) -> tuple[Tensor, float]:
    """Take the masks that images ask for most often as a codebook; tell the share of images that ask for one."""
    found, counts = torch.unique(opens.cpu() & possible, dim=0, return_counts=True)
    counts = counts * (found.any(1) & (found != possible).any(1))
    top = counts.argsort(descending=True, stable=True)[: masks - 1]
    top = top[counts[top] > 0]
    entries = found[top]
    entries = entries[entries.sum(1).argsort(stable=True)]
    return torch.cat([entries, possible[None]]), float(counts[top].sum()) / max(1, len(opens))


def assign(opens: Tensor, codebook: Tensor) -> Tensor:
    """Give each image the cheapest entry that has all the units it opens, else the last.

    Args:
        opens: (N, units) bool.
        codebook: (entries, units) bool, cheapest first.

    Returns:
        (N,) int64.
    """
    missing = opens.float() @ (~codebook[:-1]).float().T
    fits = torch.cat([missing == 0, torch.ones_like(opens[:, :1])], 1)
    return fits.int().argmax(1)


def expected_units(opens: Tensor, codebook: Tensor) -> float:
    """Mean number of units that are computed for an image."""
    return float(codebook.sum(1)[assign(opens, codebook)].double().mean())


def _starts(opens: Tensor, count: int) -> Tensor:
    """Sort images by how much they open, cut them into equal parts, and start from what half of each part opens."""
    order = opens.sum(1).argsort(stable=True)
    parts = [opens[p].float().mean(0) >= 0.5 for p in order.chunk(count)]
    return torch.stack(parts)


def _improved(opens: Tensor, masks: Tensor, entry: int, whole: Tensor) -> Tensor:
    """Mask `entry` with each unit set as costs least, the other masks as they are.

    For the images that it could serve better than any other mask does, growing it by a unit costs one more for all
    that it serves, and gains those that lacked only this unit.
    """
    others = torch.cat([masks[:entry], masks[entry + 1 :], whole[None]])
    others = others[others.sum(1).argsort(stable=True)]
    elsewhere = others.sum(1)[assign(opens, others)].double()
    mask = masks[entry].clone()
    lacking = (opens & ~mask).sum(1)
    order = opens.double().mean(0).argsort(descending=True)
    for unit in order.tolist():
        asks = opens[:, unit]
        with_unit = lacking - (asks & ~mask[unit]).long()
        without = lacking + (asks & mask[unit]).long()
        size = int(mask.sum()) - int(mask[unit])
        cost_with = torch.where(with_unit == 0, elsewhere.clamp_max(size + 1), elsewhere).sum()
        cost_without = torch.where(without == 0, elsewhere.clamp_max(size), elsewhere).sum()
        mask[unit] = bool(cost_with < cost_without)
        lacking = with_unit if mask[unit] else without
    return mask
