"""Time the original in its fastest forms beside the deployed network: same machine, same run, rounds interleaved."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from gatefit.deployment.bench.memory import held_by, peak_of
from gatefit.deployment.clock import second_run_ms
from gatefit.deployment.engines.pytorch import Run
from gatefit.deployment.engines.registry import available_engines, dense
from gatefit.deployment.plan import share_of
from gatefit.deployment.tune import milliseconds
from gatefit.gating.gates import before_gates

WARM_UP = 5
PAUSE = 0.1
"""Seconds before an engine's turn: threads go on spinning for a while after theirs, and take the next one's time."""
COMPARED = 8
"""Batches whose outputs are compared."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Timing:
    """One engine at one batch size."""

    engine: str
    dynamic: bool
    batch: int
    threads: int
    p50_ms: float
    p95_ms: float
    max_abs_diff: float
    """From what it has to compute: the original for dense engines, the gated network for dynamic ones."""
    peak_mb: float | None
    """Memory that it holds, and takes at most for a batch, 10**6 bytes; None: not known here."""

    @property
    def images_per_second(self) -> float:
        """Give the rate at the median time."""
        return 1000 * self.batch / self.p50_ms


@dataclass(frozen=True)
class Row:
    """A dynamic engine beside the fastest dense one."""

    engine: str
    batch: int
    threads: int
    dense_engine: str
    dense_ms: float
    dynamic_ms: float
    macs_share: float
    time_share: float
    realised: float
    """(1 - time share) / (1 - share of MACs): 1 where every MAC that is saved saves its time."""
    max_abs_diff: float
    gates_ms: float
    """What the gates alone take in PyTorch."""
    dense_peak_mb: float | None
    dynamic_peak_mb: float | None


@torch.no_grad()
def bench(
    original: nn.Module,
    gated: nn.Module,
    deployed: dict[str, Callable[[], Run]],
    images: Tensor,
    batch: int,
    rounds: int,
) -> tuple[list[Timing], list[Row]]:
    """Time all engines on batches of `images`, with torch's present number of threads.

    Args:
        original: the dense network; it is run in each of its fastest forms.
        gated: what the deployed networks have to equal.
        deployed: what makes them, by the name of their engine.
        images: normalised, (N, C, H, W).
        batch: images at once.
        rounds: in each, all engines take the same batch, one after another, each twice: the second one counts.

    Returns:
        Every engine; and each dynamic one beside the fastest dense one.
    """
    batches = [b.contiguous() for b in images.split(batch) if len(b) == batch]
    # By name, and whether it runs the deployed network.
    network, listed = dense(original, batches[0]), available_engines()
    makers = {(engine.name, False): engine.prepare(network) for engine in listed}
    makers |= {(name, True): make for name, make in deployed.items()}
    engines, peaks = dict[tuple[str, bool], Run](), dict[tuple[str, bool], float | None]()
    for key, make in makers.items():
        engines[key], held = held_by(make)
        more = peak_of(lambda: engines[key](batches[0]))  # noqa: B023
        peaks[key] = None if held is None or more is None else held + more
    timings = []
    for (name, dynamic), times_ms in times(engines, batches, rounds).items():
        wanted, run = (gated if dynamic else original), engines[name, dynamic]
        difference = max(float((run(b) - wanted(b)).abs().max()) for b in batches[:COMPARED])
        ordered = sorted(times_ms)
        p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
        median = statistics.median(ordered)
        peak = peaks[name, dynamic]
        timings.append(Timing(name, dynamic, batch, torch.get_num_threads(), median, p95, difference, peak))
    share = share_of(gated, batches)
    exact = {engine.name for engine in listed if engine.exact}
    fastest = min((t for t in timings if not t.dynamic and t.engine in exact), key=lambda t: t.p50_ms)
    gates = _gates_ms(gated, batches[0])
    return timings, [_row(t, fastest, share, gates) for t in timings if t.dynamic]


def _gates_ms(gated: nn.Module, batch: Tensor) -> float:
    """Time all gates alone in PyTorch, pooling and layers, one after another."""
    given: list[tuple[nn.Module, Tensor]] = []

    def note(gate: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given.append((gate, inputs[0]))

    before_gates(gated, batch, note)
    return milliseconds([lambda: [gate(x) for gate, x in given]], [()])[0]


def times(engines: dict[Key, Run], batches: list[Tensor], rounds: int) -> dict[Key, list[float]]:
    """Time each engine in each round; see `bench`."""
    for run in engines.values():
        for batch in batches[:WARM_UP]:
            run(batch)
    found: dict[Key, list[float]] = {key: [] for key in engines}
    for i in range(rounds):
        batch = batches[i % len(batches)]
        for key, run in engines.items():
            time.sleep(PAUSE)
            found[key].append(second_run_ms(run, batch))
    return found


def _row(dynamic: Timing, dense: Timing, share: float, gates: float) -> Row:
    time_share = dynamic.p50_ms / dense.p50_ms
    return Row(
        engine=dynamic.engine,
        batch=dynamic.batch,
        threads=dynamic.threads,
        dense_engine=dense.engine,
        dense_ms=dense.p50_ms,
        dynamic_ms=dynamic.p50_ms,
        macs_share=share,
        time_share=time_share,
        realised=(1 - time_share) / (1 - share) if share < 1 else 0.0,
        max_abs_diff=dynamic.max_abs_diff,
        gates_ms=gates,
        dense_peak_mb=dense.peak_mb,
        dynamic_peak_mb=dynamic.peak_mb,
    )
