"""The one clock of tuning and benchmark."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key")

TURN_MS = 5.0
"""A turn of a network that takes less counts several runs, so that tiny networks are timed as surely as large ones."""
MOST_RUNS = 10
"""That a turn counts."""
TRIAL_ROUNDS = 2
"""After these, a form that is `LOST` times slower than the fastest is timed no more."""
LOST = 1.25


def run_ms(run: Callable[..., object], *inputs: object) -> float:
    """Time one run in milliseconds."""
    began = time.perf_counter()
    run(*inputs)
    return 1000 * (time.perf_counter() - began)


def second_run_ms(run: Callable[..., object], *inputs: object) -> float:
    """Run twice and time the second run, with weights and inputs at hand: milliseconds."""
    run(*inputs)
    return run_ms(run, *inputs)


def turn_ms(run: Callable[..., object], *inputs: object) -> list[float]:
    """Time all runs of a turn but its first, which fetches weights and inputs: one, or several short ones."""
    first = second_run_ms(run, *inputs)
    more = min(MOST_RUNS, int(TURN_MS / max(first, 1e-3))) - 1
    return [first, *(run_ms(run, *inputs) for _ in range(more))]


def still_racing(means_ms: Mapping[Key, float], done: int) -> list[Key]:
    """List the runs that may still win after some rounds, from the mean time of each."""
    best = min(means_ms.values())
    return [key for key, ms in means_ms.items() if done < TRIAL_ROUNDS or ms <= LOST * best]


def mean_of_medians(times_ms: Sequence[Sequence[float]]) -> float:
    """Compute the mean over inputs of the median over rounds."""
    return statistics.mean(statistics.median(one) for one in times_ms)
