"""Show results to a person: tables, a histogram and progress, with rich."""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gatefit.commands.coverage import Coverage
from gatefit.deployment.bench.timing import Row, Timing
from gatefit.deployment.plan import Deployment
from gatefit.formats import mega, model_title, percent
from gatefit.graph.blocks import FoundBlocks, ResidualBlock
from gatefit.progress import Progress as Step


class TrainingBar(AbstractContextManager["TrainingBar"]):
    """Shows a progress bar with loss, accuracy, the share of MACs that really runs, and the time left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "TrainingBar":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def __call__(self, step: Step) -> None:
        """Show a step of any stage, or its message."""
        if step.message:
            self._progress.console.print(step.message, soft_wrap=True)
        if not step.steps:
            return
        if step.stage not in self._tasks:
            self._tasks[step.stage] = self._progress.add_task(step.stage, total=step.steps, figures="")
        figures = [] if step.loss is None else [f"loss {step.loss:.3f}"]
        if step.accuracy is not None:
            figures.append(f"acc {100 * step.accuracy:.1f} %")
        if step.share is not None:
            figures.append(f"MACs {100 * step.share:.1f} %")
        self._progress.update(self._tasks[step.stage], completed=step.step, figures="  ".join(figures))


def show_blocks(console: Console, model: str, found: FoundBlocks) -> None:
    """Print a table of every residual block, then every addition that is refused, with the reason."""
    kind = "residual blocks" if all(b.has_shortcut for b in found.blocks) else "pairs of layers"
    table = Table(
        title=f"{model_title(model)}: {len(found.blocks)} {kind}, {mega(found.macs)} MACs per image",
        title_justify="left",
    )
    for name, justify in (
        ("block", "left"), ("MACs", "right"), ("channel gate on", "left"), ("channels", "right"),
        ("units", "right"), ("MACs that shrink with them", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for block in found.blocks:
        scaled = sum(layer.macs for layer in block.layers if layer.scaled)
        gated = block.channel_units
        table.add_row(
            block.name,
            mega(block.macs),
            _channel_gate(block),
            str(block.channels or "-"),
            str(block.units or "-"),
            mega(scaled) if gated else "-",
        )
    console.print(table)
    console.print(
        f"under a block gate: {percent(found.block_share)} of the MACs; "
        f"under a channel gate: {percent(found.channel_share)}. These shrink in proportion to the open units; a block "
        "gate skips the branch whole"
    )
    if found.parts:
        console.print(
            f"traced in parts, as the whole cannot be: {', '.join(found.parts)}; such a network is not deployed, "
            "so its gates save no time",
            soft_wrap=True,
        )
    if found.skipped:
        refused = Table(title=f"{len(found.skipped)} additions refused", title_justify="left")
        refused.add_column("node")
        refused.add_column("reason", overflow="fold")
        for skipped in found.skipped:
            refused.add_row(skipped.node, skipped.reason)
        console.print(refused)


def _channel_gate(block: ResidualBlock) -> str:
    """Name the layer whose channels a block's gate closes, and say what it cannot reach, or why there is none."""
    if block.channel_units is None:
        return f"none: {block.no_channel_gate}"
    target = block.channel_units.target.removeprefix(f"{block.name}.")
    return f"{target}; not what reads it: {block.channel_limit}" if block.channel_limit else target


def show_coverage(console: Console, found: list[Coverage]) -> None:
    """Print one line for each network: what gates reach in it, or why they reach nothing."""
    table = Table()
    for name in ("network", "blocks", "with channel gate", "MACs", "under block gates", "under channel gates"):
        whole = name in ("network", "MACs")
        table.add_column(name, justify="left" if name == "network" else "right", overflow="fold", no_wrap=whole)
    for c in found:
        if c.blocks:
            shares = (percent(c.block_share), percent(c.channel_share))
            table.add_row(c.name, str(c.blocks), str(c.channel_blocks), mega(c.macs), *shares)
    refused = [c for c in found if not c.blocks]
    if len(refused) < len(found):
        console.print(table)
    for c in refused:
        console.print(f"{c.name}: not gated: {c.reason}", soft_wrap=True)
    console.print(f"{len(found) - len(refused)} of {len(found)} networks can be gated")


NOISE = 1.03
"""A ratio of two times up to this one counts as equal."""


def show_deployment(console: Console, deployment: Deployment) -> None:
    """Print what each block was turned into, and how long the deployed network and the original take."""
    table = Table(title="blocks as deployed", title_justify="left")
    for name in ("block", "skipped", "masks", "channels of each", "because"):
        table.add_column(name, justify="left" if name in ("block", "because") else "right", overflow="fold")
    beside = any(plan.parallel for plan in deployment.plans)
    for plan in deployment.plans:
        if plan.name in deployment.gathered:
            skipped = "yes" if deployment.gathered[plan.name] else "no"
            table.add_row(plan.name, skipped, "any", "-", "open units gathered for each image")
            continue
        sizes = [] if plan.codebook is None else plan.codebook.sum(1).tolist()
        first = "gates first: its first layer cannot run by itself" if beside and not plan.parallel else ""
        why = plan.reason or first or ("" if plan.dynamic else "no dynamic form of it was faster")
        entries = " ".join(str(s) for s in sizes)
        table.add_row(plan.name, "yes" if plan.skip else "no", str(len(sizes) or "-"), entries or "-", why)
    console.print(table)
    if deployment.agreement is not None:
        console.print(
            f"answers as before on {percent(deployment.agreement)} of images that did not choose the channels"
        )
    latency = deployment.latency
    if latency is None:
        console.print("not timed beside the original: it is missing, or does not run in these engines")
    else:
        images = "an image" if latency.batch == 1 else f"{latency.batch} images"
        console.print(
            f"{images}: {latency.deployed:.2f} ms, in the original {latency.original:.2f} ms ({latency.engine})",
            soft_wrap=True,
        )
        if latency.deployed > NOISE * latency.original:
            console.print(
                "note: slower than the original; convert with a lower --target, try the other --backend, or keep "
                "the original",
                soft_wrap=True,
            )


def show_bench(console: Console, timings: list[Timing], rows: list[Row]) -> None:
    """Print the times of every engine, then each dynamic engine beside the fastest dense one."""
    threads = timings[0].threads if timings else 0
    title = f"milliseconds per batch, {threads} thread{'' if threads == 1 else 's'}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("engine", "batch", "p50", "p95", "images/s", "difference", "MB"):
        table.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    for t in timings:
        what = f"{'gated' if t.dynamic else 'original'}, {t.engine}"
        figures = (f"{t.p50_ms:.2f}", f"{t.p95_ms:.2f}", f"{t.images_per_second:.1f}", f"{t.max_abs_diff:.1e}")
        table.add_row(what, str(t.batch), *figures, "-" if t.peak_mb is None else f"{t.peak_mb:.0f}")
    console.print(table)
    console.print("difference: largest, from the outputs due. MB: memory at its peak.")
    console.print()
    title = "each deployed form against the fastest form of the original"
    shares = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("engine", "batch", "fastest", "MACs", "time", "realised", "gates"):
        shares.add_column(name, justify="left" if name in ("engine", "fastest") else "right", no_wrap=True)
    for r in rows:
        realised = f"{r.realised:.2f}" if r.macs_share < 1 else "-"
        time, macs = percent(r.time_share), percent(r.macs_share)
        shares.add_row(r.engine, str(r.batch), r.dense_engine, macs, time, realised, f"{r.gates_ms:.2f}")
    console.print(shares)
    console.print(
        "time: below 100 % the network with gates is faster. realised: how much of the saved MACs shows on the clock, "
        "1 where all do. gates: milliseconds of the gates alone."
    )


PLACEMENTS = (
    "sequential: each gate runs before its block. parallel: beside the block's first layer, which then runs whole. "
    "agreement: images answered as the original does."
)
"""What the words in the table of a report mean."""


def show_report(console: Console, report: dict[str, Any]) -> None:
    """Print the figures before and after, the gates, and the histogram of MACs per image."""
    dense, gated = report["dense"], report["gated"]
    table = Table(title=f"{model_title(report['model'])} on {report['images']} images", title_justify="left")
    for name in ("", "accuracy", "agreement", "MACs per image", "share"):
        table.add_column(name, justify="left" if not name else "right")
    agreement = None if gated["agreement"] is None else 1.0
    table.add_row("original", percent(dense["accuracy"]), percent(agreement), mega(dense["macs"]), percent(1.0))
    for placement in ("sequential", "parallel"):
        macs = gated[f"macs_{placement}"]
        table.add_row(
            f"gated, {placement}",
            percent(gated["accuracy"]),
            percent(gated["agreement"]),
            mega(macs),
            percent(macs / dense["macs"]),
        )
    console.print(table)
    console.print(PLACEMENTS)
    blocks = Table(title="gates: how far they open, as means over images", title_justify="left")
    for name in ("block", "ran the block", "channels open", "units", "always open", "never open", "masks"):
        blocks.add_column(name, justify="left" if name == "block" else "right")
    for gate in report["gates"]:
        blocks.add_row(
            gate["name"],
            percent(gate["block_open"]),
            percent(gate["channel_open"]) if gate["units"] else "-",
            *(str(gate[k]) if gate["units"] else "-" for k in ("units", "always", "never")),
            str(gate["distinct"]),
        )
    console.print(blocks)
    show_histogram(console, report)


def show_histogram(console: Console, report: dict[str, Any], width: int = 40) -> None:
    """Print how many images take which share of the dense MACs."""
    edges, counts = report["histogram"]["edges"], report["histogram"]["counts"]
    gated = report["gated"]
    console.print(
        f"MACs per image (sequential): {mega(gated['macs_min'])} to {mega(gated['macs_max'])}, "
        f"standard deviation {mega(gated['macs_std'])}; {gated['paths']} different paths"
    )
    console.print("images by their share of the original's MACs:")
    highest = max(counts) or 1
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * round(width * count / highest)
        console.print(f"{100 * low:6.1f} - {100 * high:5.1f} %  {bar} {int(count)}", highlight=False)
