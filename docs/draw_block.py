"""Draw docs/block.svg: a residual block before and after the retrofit. Run: python docs/draw_block.py."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

GREY, BLUE, ORANGE = "#d9d9d9", "#9ecae1", "#fdbf6f"


def box(ax: Axes, x: float, y: float, text: str, colour: str = GREY, width: float = 1.5) -> None:
    """A labelled box with its centre at (x, y)."""
    shape = FancyBboxPatch((x - width / 2, y - 0.26), width, 0.52, boxstyle="round,pad=0.02", fc=colour, ec="black")
    ax.add_patch(shape)
    ax.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(ax: Axes, *points: tuple[float, float], colour: str = "black") -> None:
    """A line through points with a head at the last."""
    xs, ys = zip(*points, strict=True)
    ax.plot(xs[:-1], ys[:-1], color=colour, lw=1.4, solid_capstyle="round")
    ax.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.4})


def circle(ax: Axes, x: float, y: float, text: str) -> None:
    """An operation on two inputs."""
    ax.text(x, y, text, ha="center", va="center", fontsize=11, bbox={"boxstyle": "circle,pad=0.2", "fc": "white"})


def way(ax: Axes, start: float, end: float, y: float, gated: bool) -> None:
    """From one operation to the next at height y; gated: times a salience."""
    if not gated:
        arrow(ax, (start, y), (end, y))
        return
    arrow(ax, (start, y), (start + 0.5, y))
    circle(ax, start + 0.72, y, "\u00d7")
    arrow(ax, (start + 0.94, y), (end, y))


def branch(ax: Axes, y: float, gated: bool) -> None:
    """The residual block at height y; gated: with the gates above it."""
    ax.text(0.1, y, "x", fontsize=12, ha="center", va="center", style="italic")
    arrow(ax, (0.3, y), (1.25, y))
    box(ax, 2.0, y, "conv1, BN, ReLU")
    way(ax, 2.78, 4.22, y, gated)
    box(ax, 5.0, y, "conv2, BN")
    way(ax, 5.78, 7.28, y, gated)
    circle(ax, 7.5, y, "+")
    arrow(ax, (7.72, y), (8.5, y))
    arrow(ax, (0.7, y), (0.7, y - 0.75), (7.5, y - 0.75), (7.5, y - 0.24))
    ax.text(4.0, y - 0.95, "shortcut", ha="center", va="center", fontsize=8)


def main() -> None:
    """Write the picture beside this file."""
    mpl.rcParams["svg.fonttype"] = "none"  # letters, not outlines: a tenth of the size
    mpl.rcParams["svg.hashsalt"] = "block"  # the same picture gives the same file
    fig, ax = plt.subplots(figsize=(9, 5.2))
    branch(ax, 4.6, gated=False)
    ax.text(8.6, 4.6, "original", fontsize=10, va="center")
    branch(ax, 1.0, gated=True)
    ax.text(8.6, 1.0, "gated", fontsize=10, va="center")
    arrow(ax, (0.7, 1.0), (0.7, 2.3), (0.95, 2.3), colour="#08519c")
    box(ax, 1.6, 2.3, "GAP (shared)", BLUE, 1.25)
    arrow(ax, (2.25, 2.3), (2.75, 2.3), colour="#08519c")
    box(ax, 3.5, 2.3, "C-Net", BLUE, 1.4)
    arrow(ax, (3.5, 2.02), (3.5, 1.24), colour="#08519c")
    ax.text(3.4, 1.62, "$S_C$: one per channel", fontsize=8, va="center", ha="right")
    arrow(ax, (2.5, 2.3), (2.5, 2.95), (6.5, 2.95), (6.5, 2.58), colour="#08519c")
    box(ax, 6.5, 2.3, "L-Net", BLUE, 1.4)
    arrow(ax, (6.5, 2.02), (6.5, 1.24), colour="#08519c")
    ax.text(6.6, 1.62, "$S_L$: one per block", fontsize=8, va="center")
    arrow(ax, (3.95, 2.02), (5.0, 1.65), (5.0, 1.28), colour="#b35806")
    ax.text(4.62, 2.05, "compensation", fontsize=8, va="center", color="#b35806")
    ax.text(
        4.4,
        -0.55,
        "$S_C[k]=0$: row k of conv1, its BN and column k of conv2 are not computed.   $S_L=0$: the branch is skipped.",
        ha="center",
        fontsize=8.5,
    )
    ax.set_xlim(-0.1, 9.4)
    ax.set_ylim(-0.8, 5.1)
    ax.axis("off")
    fig.savefig(Path(__file__).with_name("block.svg"), bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
