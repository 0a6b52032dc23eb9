"""Time a deployed network beside the dense one in its fastest engines."""

import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, fx

from gatefit.deployment.bench.timing import times
from gatefit.deployment.engines.pytorch import Run
from gatefit.deployment.engines.registry import Backend, Dense, available_engines
from gatefit.deployment.plan import Latency
from gatefit.gating.remove import without_gates
from gatefit.graph.fold import fold_in_place
from gatefit.mode import evaluating

ROUNDS = 12
"""Of timing the deployed network beside the dense one."""


@torch.no_grad()
def latency_of(
    deployed: Run,
    gated: fx.GraphModule,
    batches: Sequence[Tensor],
    backend: Backend,
    say: Callable[[str], None] = lambda line: None,
) -> Latency | None:
    """Time a deployed network beside the same network without gates, in each engine of the backend that can be made.

    Args:
        deployed: made of `gated`.
        gated: its dense form, without the gates, is what is compared with.
        batches: of one size, (B, C, H, W) each.
        backend: of the deployment.
        say: told each step.

    Returns:
        The fastest engine beside it; None where no engine can be made: a deployment stands without.
    """
    dense = dict[str, Run]()
    with suppress(Exception), evaluating(gated):
        network = Dense(gated, fold_in_place(without_gates(gated).eval()).requires_grad_(False), batches[0])
        for engine in available_engines(backend):
            say(f"making the dense network in {engine.name}, to compare with")
            with suppress(Exception):
                dense[engine.name] = engine.prepare(network)()
    if not dense:
        return None
    say(f"timing the deployed network beside {', '.join(dense)}")
    measured = times({"deployed": deployed, **dense}, batches, ROUNDS)
    medians = {name: statistics.median(times_ms) for name, times_ms in measured.items()}
    fastest = min(dense, key=lambda name: medians[name])
    return Latency(len(batches[0]), medians["deployed"], medians[fastest], fastest)
