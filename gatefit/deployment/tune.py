"""Choose each block's form by the clock: dynamic execution that does not pay on this machine is left out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from gatefit.decisions import Placement
from gatefit.deployment.clock import mean_of_medians, second_run_ms, still_racing
from gatefit.deployment.dynamic import DynamicBlock
from gatefit.deployment.plan import BlockPlan, Observed, plan_block
from gatefit.deployment.region import Region
from gatefit.gating.gates import gates_of

ROUNDS = 7
"""Of timing forms beside each other, at most."""
FEWEST_ROUNDS, ENOUGH_MS = 3, 1500.0
"""After so many, forms that have taken so long are timed no more: large networks are known well by then."""

BuildBlocks = Callable[[list[DynamicBlock], list[tuple[Tensor, Tensor]]], list[Callable[[Tensor, Tensor], object]]]
"""Makes runnable forms of blocks, for inputs of given shapes."""


@dataclass(frozen=True)
class Trial:
    """One form of one block, timed on the calibration images."""

    plan: BlockPlan
    milliseconds: float
    """Mean over images of the median over rounds."""


def forms_of(plan: BlockPlan) -> list[BlockPlan]:
    """List the forms that a block may take, from the most dynamic to the one that always runs whole."""
    last = None if plan.codebook is None else plan.codebook[-1:]
    whole = replace(plan, skip=False, codebook=last, exact=False)
    forms = [plan, replace(plan, codebook=last, exact=False), replace(plan, skip=False), whole]
    return [f for i, f in enumerate(forms) if not any(_same(f, g) for g in forms[:i])]


def _same(a: BlockPlan, b: BlockPlan) -> bool:
    entries = [1 if p.codebook is None else len(p.codebook) for p in (a, b)]
    return a.skip == b.skip and entries[0] == entries[1]


@torch.no_grad()
def tune(
    gated: fx.GraphModule,
    seen: dict[str, Observed],
    batches: Sequence[Tensor],
    build: BuildBlocks,
    masks: int,
    prune_unused: bool = False,
    placement: Placement = "sequential",
) -> dict[str, tuple[BlockPlan, Region | None, tuple[Trial, ...]]]:
    """Time every form of every block and keep the fastest.

    Args:
        gated: in eval mode.
        seen: what its gates gave on all calibration images.
        batches: some of them, (B, C, H, W) each.
        build: makes blocks runnable in the engine that is tuned for.
        masks: entries of a codebook, at most.
        prune_unused, placement: see `gatefit.deployment.plan.plan_block`.

    Returns:
        By block name: the plan, its place (None: it cannot be cut out), and all that was tried.
    """
    gates = gates_of(gated)
    planned = {
        name: plan_block(gated, gate, seen[name], masks, prune_unused, placement) for name, gate in gates.items()
    }
    inputs = _inputs(gated, {n: region for n, (_, region) in planned.items() if region is not None}, batches)
    forms = {n: forms_of(plan) for n, (plan, region) in planned.items() if region is not None}
    flat = [(n, form) for n, some in forms.items() for form in some]
    blocks = [DynamicBlock(gated, gates[n], planned[n][1], form) for n, form in flat]  # type: ignore[arg-type]
    runs = build([b.eval() for b in blocks], [inputs[n][0] for n, _ in flat])
    result: dict[str, tuple[BlockPlan, Region | None, tuple[Trial, ...]]] = {}
    for name, (plan, region) in planned.items():
        if region is None:
            result[name] = (plan, None, ())
            continue
        some = [(form, run) for (n, form), run in zip(flat, runs, strict=True) if n == name]
        times_ms = milliseconds([run for _, run in some], inputs[name])
        trials = tuple(Trial(form, t) for (form, _), t in zip(some, times_ms, strict=True))
        result[name] = (min(trials, key=lambda t: t.milliseconds).plan, region, trials)
    return result


def _inputs(
    gated: fx.GraphModule, regions: dict[str, Region], batches: Sequence[Tensor]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Run the network, and note what each block is given for each batch: its input and its shortcut."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in regions}
    for batch in batches:
        interpreter = fx.Interpreter(gated, garbage_collect_values=False)
        interpreter.run(batch)
        for name, region in regions.items():
            found[name].append((interpreter.env[region.entry], interpreter.env[region.shortcut]))
    return found


@torch.no_grad()
def milliseconds(runs: Sequence[Callable[..., object]], inputs: Sequence[tuple[Tensor, ...]]) -> list[float]:
    """Time each run with its weights at hand, rounds interleaved: the mean over inputs of the median over rounds.

    A run that is clearly slower than another after two rounds is timed no more, and large ones take fewer rounds.
    """
    times_ms: list[list[list[float]]] = [[[] for _ in inputs] for _ in runs]
    racing = list(range(len(runs)))
    for done in range(ROUNDS):
        for i, given in enumerate(inputs):
            for k in racing:
                times_ms[k][i].append(second_run_ms(runs[k], *given))
        racing = still_racing({k: mean_of_medians(times_ms[k]) for k in racing}, done + 1)
        if done + 1 >= FEWEST_ROUNDS and 2 * sum(sum(map(sum, one)) for one in times_ms) > ENOUGH_MS:
            break
    return [mean_of_medians(one) for one in times_ms]
