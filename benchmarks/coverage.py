"""Match, and with --check also convert and train for one step, every network of timm and torchvision.

    python benchmarks/coverage.py                    # all names: writes docs/coverage.md and docs/coverage.json
    python benchmarks/coverage.py resnet --check     # names that contain "resnet", with all checks

Each network has a process of its own, so that one that crashes or hangs does not end the run. What is known so far
is kept beside the output (docs/coverage.part.jsonl): a run that was broken off goes on from there.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.progress import Progress
from torch import fx, nn
from torch.utils._pytree import tree_leaves

import gatefit
from gatefit.commands.coverage import Coverage, cover, kind_of
from gatefit.files import write_atomically, write_json
from gatefit.gating.gates import gates_of
from gatefit.inputs.models import ModelReference, build, input_spec, names_like, parse_reference

SECONDS = 300
SIDE = 64
LARGEST = 1_100_000_000
"""Parameters of the largest networks that are checked: a check holds four copies of the weights."""
ALONE = 366_000_000
"""Networks above are checked one at a time, after all others."""
ONE_SIZE = "passed at one size"
"""Networks that go another way for other sizes are converted for the way of the example's size alone."""
SMALL = 1e-2
"""Layer scales below are made larger: they would hide what goes wrong in a branch."""
WAITS = "waits until it is alone"
DOCS = Path(__file__).parent.parent / "docs"


@dataclass(frozen=True)
class Outcome:
    """What became of one network."""

    coverage: Coverage
    seconds: float
    checked: str = ""
    """"passed", or why not; empty: not asked for."""


def check(name: str) -> str:
    """Convert a network with random weights, run another size, train for a step; "passed", `ONE_SIZE` and the error
    at another size, or the reason why not.

    Small images where the network takes them or can be built for them: what is checked does not depend on their size.
    """
    torch.manual_seed(0)
    try:
        network, gated, shape = _convert(parse_reference(name))
    except gatefit.GatefitError as error:
        return str(error)
    other = check_other_size(network, gated, shape)
    if other and not other.startswith(ONE_SIZE):
        return other
    optimizer = torch.optim.SGD(gated.train().parameters(), lr=1e-3)
    outputs = [t for t in tree_leaves(gated(torch.randn(shape))) if isinstance(t, torch.Tensor)]
    loss = sum(t.float().square().mean() for t in outputs) + gatefit.salience_penalty(gated)
    loss.backward()
    gates = [p for g in gates_of(gated).values() for fc in g.layers for p in fc.parameters()]
    given = [p.grad for p in gated.parameters() if p.grad is not None]
    if not all(bool(g.isfinite().all()) for g in given) or any(p.grad is None for p in gates):
        return "gradients are missing or not finite"
    optimizer.step()
    return other or "passed"


def _convert(reference: ModelReference) -> tuple[nn.Module, fx.GraphModule, tuple[int, ...]]:
    """A network, its conversion, and the shape of the example: small images if it takes them or is built for them."""
    for small in (reference, replace(reference, arguments={"img_size": SIDE})):
        with suppress(gatefit.GatefitError):
            return _convert_at(small, SIDE)
    return _convert_at(reference, sys.maxsize)


def _convert_at(reference: ModelReference, side: int) -> tuple[nn.Module, fx.GraphModule, tuple[int, ...]]:
    network = build(reference)
    for parameter in network.parameters():
        if parameter.dim() == 1 and 0 < parameter.abs().max() < SMALL:
            nn.init.uniform_(parameter, 0.5, 1.0)
    channels, *sides = input_spec(network).shape
    shape = (2, channels, *(min(side, s) for s in sides))
    example = torch.zeros(shape)
    pairs = not any(block.has_shortcut for block in gatefit.find_blocks(network, example).blocks)
    return network, gatefit.retrofit(network, example, "c" if pairs else "lc"), shape


@torch.no_grad()
def check_other_size(network: nn.Module, gated: nn.Module, shape: tuple[int, ...]) -> str:
    """What goes wrong on larger images and batches than `shape`; empty: nothing, or the network takes no others.

    Larger by a multiple of what networks divide by: those that fit other sizes by resizing do so by another path.
    """
    batch, channels, height, width = shape
    x = torch.randn(batch + 1, channels, height + SIDE, width + SIDE)
    try:
        wanted = network.eval()(x)
    except Exception:
        return ""
    try:
        given = gated.eval()(x)
    except Exception as error:
        return f"{ONE_SIZE}: {type(error).__name__}: {error}"[:300]
    pairs = zip(tree_leaves(given), tree_leaves(wanted), strict=True)
    return "" if all(torch.allclose(a, b, 1e-4, 1e-5, equal_nan=True) for a, b in pairs) else "differs at another size"


def main() -> None:
    """Run, show the totals, write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=[""])
    parser.add_argument("--check", action="store_true", help="convert and take a training step too")
    parser.add_argument("--largest", type=float, default=LARGEST, help="parameters of the largest that are checked")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=DOCS / "coverage.md")
    options = parser.parse_args()
    names = list(dict.fromkeys(n for p in options.patterns for n in names_like(p)))
    kept = options.out.with_suffix(".part.jsonl")
    outcomes = run(names, options.largest if options.check else 0, options.jobs, kept)
    write_json(options.out.with_suffix(".json"), {"networks": [asdict(o) for o in outcomes]})
    write_atomically(options.out, lambda file: file.write_text(report(outcomes)))
    kept.unlink()
    Console().print(totals(outcomes), markup=False)


def run(names: list[str], largest: float, jobs: int, kept: Path) -> list[Outcome]:
    """One process for each name, `jobs` at a time; those that stand in `kept` already are not run again.

    Checked are networks of up to `largest` parameters; 0: none.
    """
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # a third of the time was page faults
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gatefit.commands.coverage", "gatefit.gating.insert"])
    done = _kept(kept, largest > 0)
    waiting, large, running = [n for n in reversed(names) if n not in done], list[str](), {}
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("networks", total=len(waiting))

        def note(name: str, outcome: Outcome, final: bool = True) -> None:
            done[name] = outcome
            if final:
                with kept.open("a") as file:
                    file.write("\n" + json.dumps(asdict(outcome)))
            if outcome.checked not in ("", "passed"):
                bar.console.print(f"{name}: {outcome.checked}", markup=False)
            bar.advance(task)

        while waiting or running or large:
            if not (waiting or running):
                waiting, large, jobs = large, [], 1
            while waiting and len(running) < jobs:
                name = waiting.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(name, largest, jobs == 1, sender))
                process.start()
                sender.close()
                running[receiver] = (name, process, time.monotonic())
            for receiver in multiprocessing.connection.wait(list(running), timeout=1):
                name, process, began = running.pop(receiver)
                try:
                    outcome = receiver.recv()
                    if outcome.checked == WAITS:
                        large.append(name)
                    else:
                        note(name, outcome)
                except EOFError:
                    process.join()
                    note(name, _failed(name, f"its process ended with code {process.exitcode}", began), final=False)
            for receiver, (name, process, began) in list(running.items()):
                if time.monotonic() - began > SECONDS:
                    process.kill()
                    del running[receiver]
                    note(name, _failed(name, f"took more than {SECONDS} s", began), final=False)
    return [done[n] for n in names]


def _kept(file: Path, checked: bool) -> dict[str, Outcome]:
    """What an earlier run found out; of a run without checks nothing is of use to one with them."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        with suppress(ValueError):  # the last line of a run that was killed
            rows.append(json.loads(line))
    outcomes = [Outcome(**{**row, "coverage": Coverage(**row["coverage"])}) for row in rows]
    return {o.coverage.name: o for o in outcomes if not checked or o.checked or not o.coverage.blocks}


def _work(name: str, largest: float, alone: bool, sender: Connection) -> None:
    began = time.monotonic()
    torch.set_num_threads(os.cpu_count() or 1 if alone else 1)
    try:
        coverage = cover(name)
    except Exception as error:
        coverage = Coverage(name, "", reason=f"{type(error).__name__}: {error}"[:300])
    outcome = Outcome(coverage, time.monotonic() - began)
    if coverage.parameters > largest > 0:
        outcome = replace(outcome, checked=f"not checked: {coverage.parameters / 1e6:.0f} M parameters")
    elif largest and coverage.blocks and coverage.parameters > ALONE and not alone:
        outcome = replace(outcome, checked=WAITS)
    elif largest and coverage.blocks:
        try:
            outcome = replace(outcome, checked=check(name))
        except Exception as error:
            outcome = replace(outcome, checked=f"{type(error).__name__}: {error}"[:300])
    sender.send(outcome)


def _failed(name: str, reason: str, began: float) -> Outcome:
    return Outcome(Coverage(name, "", reason=reason), time.monotonic() - began)


def totals(outcomes: list[Outcome]) -> str:
    """The figures of the whole run."""
    lines = []
    for source in ("timm", "torchvision"):
        some = [o.coverage for o in outcomes if o.coverage.name.startswith(f"{source}/")]
        if some:
            branches, gated = sum(c.convolutional for c in some), sum(c.convolutional_gated for c in some)
            lines.append(
                f"{source}: {len(some)} networks, {sum(c.block_share > 0 for c in some)} with a block gate, "
                f"{sum(c.channel_blocks > 0 for c in some)} with a channel gate; "
                f"{gated} of {branches} convolutional branches with a channel gate"
            )
    checks = [o.checked for o in outcomes if o.checked]
    if checks:
        lines.append(
            f"converted, run at another size and trained for one step: {checks.count('passed')} of {len(checks)}"
        )
        lines += sorted(f"{o.coverage.name}: {o.checked}" for o in outcomes if o.checked not in ("", "passed"))
    return "\n".join(lines)


def report(outcomes: list[Outcome]) -> str:
    """docs/coverage.md: one line for each family."""
    families: dict[tuple[str, str], list[Coverage]] = defaultdict(list)
    for outcome in outcomes:
        families[outcome.coverage.name.partition("/")[0], outcome.coverage.family].append(outcome.coverage)
    rows = []
    for (source, family), some in sorted(families.items()):
        gated = [c for c in some if c.blocks]
        reasons = sorted({kind_of(c.reason)[:160] for c in some if not c.blocks})
        rows.append(
            f"| {source} | {family} | {len(some)} | {sum(c.block_share > 0 for c in some)} "
            f"| {sum(c.channel_blocks > 0 for c in some)} "
            f"| {_span([c.blocks for c in gated])} | {_span([c.units for c in gated])} "
            f"| {_percent([c.block_share for c in gated])} | {_percent([c.channel_share for c in gated])} "
            f"| {'; '.join(reasons).replace('|', '/')} |"
        )
    head = (
        "# Which networks can be gated\n\nThis page is written by `python benchmarks/coverage.py`. It tries "
        "every network of timm and torchvision. The list comes first: totals, and the networks that were not "
        "checked, or failed a check, each with the reason. The table has a line for each family. Its shares of "
        "MACs are means over the names that can be gated; a block gate can skip the first share, a channel gate "
        "can shrink the second.\n\n"
        + "\n".join(f"- {line}" for line in totals(outcomes).splitlines())
        + "\n\n| from | family | names | block gate | channel gate | blocks | channel units | MACs under block gates "
        "| under channel gates | the others, because |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
    return head + "\n".join(rows) + "\n"


def _span(values: list[int]) -> str:
    if not values:
        return "-"
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _percent(values: list[float]) -> str:
    return f"{100 * mean(values):.0f} %" if values else "-"


if __name__ == "__main__":
    main()
