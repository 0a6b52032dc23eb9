"""The pictures of a report, as matplotlib figures: figures of a run in, nothing drawn to a screen."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from torch import Tensor

from gatefit.commands.report.result import Result
from gatefit.inputs.data import ImageSet
from gatefit.training.evaluate import Evaluation

BLUE, ORANGE, GREEN, GREY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#777777", "#CC79A7"
"""Of Okabe and Ito's palette, which the colour-blind can tell apart."""
OTHERS = ("#E69F00", "#56B4E9", GREEN, PURPLE, "#000000")
HEAT = "cividis"
CHANNELS = 50
"""Columns of the heat map of channels, as in the paper."""
ROW = 8
"""Images in a row of extremes."""
PUBLISHED = {
    "cifar10": {
        "ResNet-18, dense": (0.55e9, 0.9302),
        "ResNet-50, dense": (1.29e9, 0.9362),
        "ResNet-101, dense": (2.50e9, 0.9375),
        "LC-Net, from scratch": (0.33e9, 0.9525),
        "LC-Net, parallel": (0.19e9, 0.9327),
        "LC-Net, sequential": (0.06e9, 0.9327),
    },
    "imagenet": {"ResNet-50, dense": (4.09e9, 0.753), "LC-Net (ResNet-50)": (2.89e9, 0.741)},
}
"""By name of the data, MACs and accuracy of Table I of the paper, arXiv 2007.15151."""


def accuracy_against_macs(result: Result, others: list[Result]) -> Figure:
    """Draw the dense network, this result, others, and what the paper published on the same data."""
    figure, axes = _figure(8, 4.6)
    _original(axes, result, "black", "original")
    names = _names([result, *others])
    for i, (name, shown) in enumerate(zip(names, [result, *others], strict=True)):
        gated = shown.report["gated"]
        if gated["accuracy"] is None:
            continue
        colour = BLUE if shown is result else OTHERS[(i - 1) % len(OTHERS)]
        both = [gated["macs_sequential"], gated["macs_parallel"]]
        axes.plot(both, [gated["accuracy"]] * 2, "-", color=colour, lw=1)
        axes.plot(both[:1], [gated["accuracy"]], "o", color=colour, ms=10 if shown is result else 7, label=name)
        axes.plot(both[1:], [gated["accuracy"]], "o", color=colour, mfc="white", ms=7)
        if shown.report["dense"] != result.report["dense"]:
            _original(axes, shown, colour, f"original of {name}")
    points = PUBLISHED.get(_data_name(result).lower().replace("-", "").removesuffix("1k"))
    if points is not None:
        _published(axes, points)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
    axes.xaxis.set_major_formatter(lambda macs, _: f"{macs / 1e6:,.4g} M")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.12, 0.15)
    _end_at_one(axes)
    axes.set_xlabel("MACs per image")
    axes.set_ylabel("accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, 1))
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _names(results: list[Result]) -> list[str]:
    """Name results apart by their folders' names, the data where it is other than the first one's, a number."""
    data = [_data_name(r) for r in results]
    names = [r.name + (f" (on {d})" if d != data[0] else "") for r, d in zip(results, data, strict=True)]
    return [n if names.count(n) == 1 else f"{n}, {names[: i + 1].count(n)}" for i, n in enumerate(names)]


def _data_name(result: Result) -> str:
    return Path(result.report["data"]).name.split(".")[0]


def _original(axes: Axes, result: Result, colour: str, label: str) -> None:
    dense = result.report["dense"]
    if dense["accuracy"] is not None:
        axes.plot(dense["macs"], dense["accuracy"], "s", color=colour, ms=9, label=label)


def _published(axes: Axes, points: dict[str, tuple[float, float]]) -> None:
    ordered = sorted(points.items(), key=lambda point: point[1])
    label = "published (Table I of the paper)"
    axes.plot([x for _, (x, _) in ordered], [y for _, (_, y) in ordered], "x", color=GREY, ms=7, label=label)
    for i, (name, position) in enumerate(ordered):  # above and below in turn: neighbours stand close
        offset = (0, -13 if i % 2 else 8)
        axes.annotate(name, position, offset, textcoords="offset points", ha="center", fontsize=7, color=GREY)


def histogram(evaluation: Evaluation) -> Figure:
    """Draw how many images take how many MACs."""
    figure, axes = _figure(8, 3.2)
    macs = evaluation.macs / 1e6
    low, high = float(macs.min()), float(macs.max())
    axes.hist(macs.numpy(), bins=40 if high - low > 1e-6 * high else 1, color=BLUE)
    axes.axvline(float(macs.mean()), color=ORANGE, lw=2, label=f"mean {float(macs.mean()):,.2f} M")
    dense = evaluation.dense_macs / 1e6
    axes.axvline(dense, color="black", ls="--", label=f"original {dense:,.2f} M")
    axes.set_xlabel("MACs per image, millions (sequential placement, gates included)")
    axes.set_ylabel("images")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(frameon=False, fontsize=9)
    return figure


def extremes(evaluation: Evaluation, images: ImageSet) -> Figure:
    """Draw the images with the fewest MACs, above, and with the most, below."""
    order = evaluation.macs.argsort(stable=True).tolist()
    row = min(ROW, max(1, len(order) // 2))
    figure = Figure(figsize=(9, 3.3), layout="constrained")
    shown = [("fewest", order[:row]), ("most", order[::-1][:row])]
    for i, (what, chosen) in enumerate(shown):
        for j, index in enumerate(chosen):
            axes = figure.add_subplot(len(shown), row, i * row + j + 1)
            axes.imshow(images.__getitems__([index])[0][0].permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            macs = f"{float(evaluation.macs[index]) / 1e6:,.1f} M"
            axes.set_title(f"{macs}\n{_caption(evaluation, images, index)}", fontsize=7)
            if not j:
                axes.set_ylabel(what, fontsize=9)
    return figure


def lives(evaluation: Evaluation) -> Figure:
    """Draw for each block the shares of its units that are always open, sometimes, and never."""
    gates = evaluation.gates
    figure, axes = _figure(8, 1.3 + 0.22 * len(gates))
    total = torch.tensor([max(1, g.units) for g in gates], dtype=torch.float)
    always = torch.tensor([g.always if g.units else g.block_open == 1 for g in gates]) / total
    never = torch.tensor([g.never if g.units else g.block_open == 0 for g in gates]) / total
    parts = (
        ("always open", always, BLUE),
        ("sometimes open", 1 - always - never, "#E69F00"),
        ("never open", never, GREY),
    )
    left = torch.zeros(len(gates))
    for label, part, colour in parts:
        axes.barh(range(len(gates)), part.tolist(), left=left.tolist(), color=colour, label=label, height=0.8)
        left = left + part
    axes.plot(_open(evaluation), range(len(gates)), "k|", ms=8, mew=2, label="mean share open")
    _block_ticks(axes, [g.name for g in gates])
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("units of the block's channel gate (a block gate alone: the block)")
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    return figure


def are_skipped(evaluation: Evaluation) -> bool:
    """Tell whether some image skips some block whole."""
    return any(bool((~mask[:, 0]).any()) for mask in evaluation.masks.values())


def blocks_by_class(evaluation: Evaluation, labels: Tensor, classes: tuple[str, ...]) -> Figure:
    """Draw per block and class the share of images that run it (or of channels, if all blocks always run)."""
    skipped = are_skipped(evaluation)
    shares = {n: (m[:, :1] if skipped else _units(m)).float().mean(1) for n, m in evaluation.masks.items()}
    present = labels.unique().tolist()
    table = torch.stack([torch.stack([s[labels == c].mean() for c in present]) for s in shares.values()])
    figure, axes = _figure(9, 1.6 + 0.22 * len(shares))
    _heat(figure, axes, table, "images that run the block" if skipped else "channels open")
    _block_ticks(axes, list(shares))
    _class_ticks(axes.xaxis, present, classes)
    return figure


def channels_by_class(evaluation: Evaluation, labels: Tensor, classes: tuple[str, ...], block: str) -> Figure:
    """Draw a heat map: per class and channel of a block, the share of images that open it."""
    mask = evaluation.masks[block][:, 1 : 1 + CHANNELS].float()
    present = labels.unique().tolist()
    table = torch.stack([mask[labels == c].mean(0) for c in present])
    figure, axes = _figure(9, 1.6 + 0.25 * min(len(present), 24))
    _heat(figure, axes, table, "images that open it")
    _class_ticks(axes.yaxis, present, classes)
    units = evaluation.masks[block].shape[1] - 1
    axes.set_xlabel(f"channel of {block}" + (f" (the first {CHANNELS} of {units})" if units > CHANNELS else ""))
    axes.xaxis.set_major_locator(MaxNLocator(20, integer=True))
    return figure


def most_varied(evaluation: Evaluation) -> str:
    """Find the block whose units differ most from image to image; empty: there are no units."""
    units = {name: mask[:, 1:].float() for name, mask in evaluation.masks.items() if mask.shape[1] > 1}
    spread = {name: float(mask.var(0, correction=0).mean()) for name, mask in units.items()}
    return max(spread, key=spread.__getitem__) if spread else ""


def training(history: list[dict[str, Any]]) -> Figure:
    """Draw loss, accuracy and share of MACs by epoch."""
    parts = [("loss", BLUE), ("accuracy", GREEN), ("share", ORANGE)]
    titles = {"loss": "loss", "accuracy": "accuracy (training images)", "share": "share of the original's MACs"}
    shown = [(k, c) for k, c in parts if history[0][k] is not None]
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    for i, (key, colour) in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), i + 1)
        axes.plot([e["epoch"] for e in history], [e[key] for e in history], "o-", color=colour, ms=4)
        axes.set_title(titles[key], fontsize=9)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(True, alpha=0.2)
        if key != "loss":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            _end_at_one(axes)
        _plain(axes)
    return figure


def time(rows: list[dict[str, Any]]) -> Figure:
    """Draw the share of the MACs beside the share of the time, for each engine and batch size."""
    figure, axes = _figure(8, 1.2 + 0.5 * len(rows))
    positions = range(len(rows))
    axes.barh([p - 0.2 for p in positions], [r["macs_share"] for r in rows], 0.38, color=BLUE, label="share of MACs")
    axes.barh([p + 0.2 for p in positions], [r["time_share"] for r in rows], 0.38, color=ORANGE, label="share of time")
    axes.axvline(1, color="black", ls="--", lw=1)
    names = [f"{r['engine']}, batch {r['batch']}, threads {r['threads']}" for r in rows]
    axes.set_yticks(list(positions), names, fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("of the original in its fastest form")
    axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _plain(axes)
    return figure, axes


def _end_at_one(axes: Axes) -> None:
    """End the vertical axis at 100 %, and draw the marks that stand there whole."""
    axes.set_ylim(top=min(1.0, axes.get_ylim()[1]))
    for line in axes.lines:
        line.set_clip_on(False)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _heat(figure: Figure, axes: Axes, table: Tensor, label: str) -> None:
    picture = axes.imshow(table.numpy(), cmap=HEAT, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    figure.colorbar(picture, ax=axes, label=label, format=PercentFormatter(1))


def _block_ticks(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8 if len(names) < 30 else 6)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _class_ticks(axis: Any, present: list[int], classes: tuple[str, ...]) -> None:
    """Label up to 24 classes by name; more by number, and not all."""
    if len(present) > 24:
        axis.set_major_locator(MaxNLocator(12, integer=True))
        axis.set_major_formatter(lambda at, _: str(present[int(at)]) if 0 <= at < len(present) else "")
        axis.set_label_text("number of the class")
        return
    names = [_class_name(classes, c) for c in present]
    axis.set_ticks(range(len(names)), names, fontsize=8)
    if axis.axis_name == "x" and max(map(len, names)) > 4:
        for label in axis.get_ticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")


def _class_name(classes: tuple[str, ...], index: int) -> str:
    return classes[index] if index < len(classes) else str(index)


def _caption(evaluation: Evaluation, images: ImageSet, index: int) -> str:
    if evaluation.labels is None:
        return ""
    truth, answer = int(evaluation.labels[index]), int(evaluation.answers[index])
    name = _class_name(images.classes, truth)[:14]
    return name if truth == answer else f"{name}\n(answer: {_class_name(images.classes, answer)[:14]})"


def _open(evaluation: Evaluation) -> list[float]:
    """Mean share of each block's units that is open."""
    return [float(_units(mask).float().mean()) for mask in evaluation.masks.values()]


def _units(mask: Tensor) -> Tensor:
    """Give the columns of the units, closed where the block is; of a block without units, the column of the block."""
    return mask[:, 1:] if mask.shape[1] > 1 else mask
