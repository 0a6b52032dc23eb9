"""A deployed network in PyTorch: samples that need the same of a block run together, nothing else is computed."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from gatefit.deployment.info import DeployedInfo, set_deployed_info
from gatefit.deployment.plan import BlockPlan, never_runs
from gatefit.deployment.region import INPUTS, Region, extract, extract_prefix
from gatefit.gating.gates import Gate, gates_of
from gatefit.graph.activations import activation_of
from gatefit.graph.fold import fold_in_place
from gatefit.graph.network import RewrittenNetwork

HOLDER = "gatefit_deployed"


class Saliences(nn.Module):
    """The gates of one block, and what they ask of it; both gates are one layer.

    Args:
        gate: of the block; copied.
        plan: of the block.
    """

    def __init__(self, gate: Gate, plan: BlockPlan) -> None:
        super().__init__()
        self.gate = copy.deepcopy(gate).eval()
        self.skip = plan.skip and gate.block is not None
        self.fc = nn.Linear(gate.of.features, sum(fc.out_features for fc in gate.layers))
        self.fc.weight.data = torch.cat([fc.weight.detach() for fc in gate.layers])
        self.fc.bias.data = torch.cat([fc.bias.detach() for fc in gate.layers])
        self.fitting = None if plan.codebook is None or len(plan.codebook) < 2 else _fitting(plan)
        self.entries = 1 if plan.codebook is None else len(plan.codebook)

    def logits(self, x: Tensor) -> Tensor:
        """Compute the pre-activations of both gates for inputs of the block, (B, ...): (B, [1 +] units)."""
        logits: Tensor = self.fc(self.gate.pool(x))
        return logits

    def chosen(self, logits: Tensor) -> list[int]:
        """Choose the variant of each image: an entry of the codebook, or `entries` for none; one read-back."""
        opened = (logits > 0).cpu()
        variants = torch.zeros(len(opened), dtype=torch.int64)
        if self.fitting is not None:
            fits = self._fits(opened)
            variants = torch.where(fits.any(1), fits.int().argmax(1), self.entries - 1)
        if self.skip:
            variants[~opened[:, 0]] = self.entries
        found: list[int] = variants.tolist()
        return found

    def given(self, logits: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Compute the saliences, and the predictions of closed units (see `gatefit.deployment.region.INPUTS`)."""
        gate = self.gate
        whole = None if gate.block is None else gate.salience(logits[:, :1])
        if gate.channel is None:
            return whole, None, None
        logits = logits if gate.block is None else logits[:, 1:]
        channel = gate.salience(logits)
        return whole, channel, None if gate.compensation is None else (1 - channel) * gate.predicted(logits)

    def forward(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """Give all as tensors, for graphs: whether the block runs, (B, 1) bool, None: always; which entries of the
        codebook but the last would do, (B, entries - 1) bool, None: there is but one; then as `given`."""
        logits = self.logits(x)
        opened = logits > 0
        runs = opened[:, :1] if self.skip else None
        return runs, None if self.fitting is None else self._fits(opened), *self.given(logits)

    def _fits(self, opened: Tensor) -> Tensor:
        assert self.fitting is not None
        units = opened if self.gate.block is None else opened[:, 1:]
        fits: Tensor = self.fitting(units.to(self.fitting.weight.dtype)) < 0.5
        return fits


@torch.no_grad()
def _fitting(plan: BlockPlan) -> nn.Linear:
    """Make a layer that counts, from open units (0 or 1), how many each entry lacks, or with `exact`, gets wrong."""
    assert plan.codebook is not None
    masks = plan.codebook[:-1].float()
    count = nn.Linear(masks.shape[1], len(masks))
    count.weight.copy_(1 - 2 * masks if plan.exact else 1 - masks)
    count.bias.copy_(masks.sum(1) if plan.exact else torch.zeros(len(masks)))
    return count


class DynamicBlock(nn.Module):
    """A block that runs, of its branch, what each image needs: (input, shortcut) -> shortcut + branch.

    Args:
        gated: the network that the block is in.
        gate: the block's.
        place: where its branch stands.
        plan: what to make of it.
    """

    def __init__(self, gated: fx.GraphModule, gate: Gate, region: Region, plan: BlockPlan) -> None:
        super().__init__()
        self.saliences = Saliences(gate, plan)
        variants = variants_of(gated, gate, region, plan)
        self.variants = nn.ModuleList(variants)
        self.bare = [not reads_saliences(variant) for variant in variants]
        self.after = nn.ReLU() if region.relu is not None else nn.Identity()
        """Behind the sum, for images that leave the branch out."""
        self.prefix = fold_in_place(extract_prefix(gated, region)) if plan.parallel else None
        """What runs beside the gates; None: nothing does."""

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Add the branch of x, (B, ...), to the shortcut, (B, ...), and apply what comes right behind."""
        if self.prefix is None:
            logits = self.saliences.logits(x)
            chosen = self.saliences.chosen(logits)
        else:
            logits, chosen, x = self._beside(self.prefix, x)
        return (
            self._sorted(chosen, logits, x, shortcut)
            if len(set(chosen)) > 1
            else self._run(chosen[0], logits, x, shortcut)
        )

    def _beside(self, prefix: fx.GraphModule, x: Tensor) -> tuple[Tensor, list[int], Tensor]:
        """Compute logits and choose variants, while the prefix makes of x what the variants are given."""
        if x.device.type != "cuda":
            entry = prefix(x)
            logits = self.saliences.logits(x)
            return logits, self.saliences.chosen(logits), entry
        here, beside = torch.cuda.current_stream(x.device), _side_stream(x.device)
        beside.wait_stream(here)  # for x, and not for what is made of it next
        entry = prefix(x)
        with torch.cuda.stream(beside):
            logits = self.saliences.logits(x)
            chosen = self.saliences.chosen(logits)  # waits for the gates alone
        here.wait_stream(beside)
        x.record_stream(beside)
        logits.record_stream(here)
        return logits, chosen, entry

    def _run(self, index: int, logits: Tensor, x: Tensor, shortcut: Tensor) -> Tensor:
        result: Tensor
        if index == len(self.variants):
            result = self.after(shortcut)
        else:
            given = (None, None, None) if self.bare[index] else self.saliences.given(logits)
            result = self.variants[index](x, shortcut, *given)
        return result

    def _sorted(self, chosen: list[int], logits: Tensor, x: Tensor, shortcut: Tensor) -> Tensor:
        """Run the samples of each variant together, and put them back in order."""
        order, results = [], []
        for index in sorted(set(chosen)):
            some = torch.tensor([i for i, variant in enumerate(chosen) if variant == index], device=x.device)
            parts = [t.index_select(0, some) for t in (logits, x, shortcut)]
            order.append(some)
            results.append(self._run(index, *parts))
        result = results[0].new_empty(len(x), *results[0].shape[1:])
        for some, part in zip(order, results, strict=True):
            result.index_copy_(0, some, part)
        return result


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Give the stream for the gates of all blocks, which take turns."""
    return torch.cuda.Stream(device)


def reads_saliences(variant: fx.GraphModule) -> bool:
    """Tell whether a variant needs the saliences, or the predictions of closed units."""
    return any(n.users for n in variant.graph.nodes if n.op == "placeholder" and n.target in INPUTS[2:])


def variants_of(gated: fx.GraphModule, gate: Gate, region: Region, plan: BlockPlan) -> list[fx.GraphModule]:
    """Extract the variant for each entry of the codebook, batch norms folded."""
    hard = gate.form == "step" and plan.skip  # the block's salience is then 1 where the branch runs
    if plan.codebook is None:
        return [fold_in_place(extract(gated, gate, region, block_mask=not hard, parallel=plan.parallel))]
    variants = []
    for index, entry in enumerate(plan.codebook):
        exact = plan.exact and index < len(plan.codebook) - 1
        keep = None if entry.all() else entry.nonzero()[:, 0]
        variants.append(fold_in_place(extract(gated, gate, region, keep, not hard, not exact, plan.parallel)))
    return variants


def assemble(
    gated: fx.GraphModule,
    plans: dict[str, tuple[BlockPlan, Region | None]],
    make_block: Callable[[fx.GraphModule, Gate, Region, BlockPlan], nn.Module] = DynamicBlock,
) -> fx.GraphModule:
    """Build the deployed network: a dynamic block for each that can be extracted, all else with batch norms folded.

    Of those, blocks that no image can open are gone.

    Returns:
        (B, C, H, W) -> (B, classes), in eval mode; its weights are copies.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    root = nn.Module()
    holder = nn.Module()
    root.add_module(HOLDER, holder)
    positive: set[fx.Node] = set()  # values behind a ReLU: another one changes nothing, and would part two blocks
    regions = {region.add: (gate, plan, region) for gate, plan, region in _with_regions(gated, plans)}
    all_nodes = frozenset[fx.Node]().union(*(region.nodes for _, _, region in regions.values()))
    relus = {region.relu: region.add for _, _, region in regions.values() if region.relu is not None}
    for name, module in gated.named_children():
        root.add_module(name, module)
    for name, tensor in (*gated.named_parameters(recurse=False), *gated.named_buffers(recurse=False)):
        root.register_buffer(name, tensor.detach())
    for node in gated.graph.nodes:
        if node in all_nodes:
            continue
        if node in relus:
            copied[node] = copied[relus[node]]
            positive.add(copied[node])
            continue
        if node not in regions:
            copied[node] = graph.node_copy(node, copied.__getitem__)
            if activation_of(gated, node) == "relu":
                positive.add(copied[node])
            continue
        gate, plan, region = regions[node]
        if never_runs(gate):
            kept = copied[region.shortcut]
            done = region.relu is None or kept in positive
            copied[node] = kept if done else graph.call_function(torch.relu, (kept,))
            continue
        name = plan.name.replace(".", "_")
        holder.add_module(name, make_block(gated, gate, region, plan))
        given = (copied[region.entry], copied[region.shortcut])
        copied[node] = graph.call_module(f"{HOLDER}.{name}", given)
    deployed: fx.GraphModule = RewrittenNetwork(root, graph, class_name="Deployed")
    deployed.graph.eliminate_dead_code()
    deployed.delete_all_unused_submodules()
    deployed = copy.deepcopy(deployed)
    deployed = fold_in_place(deployed.eval()).requires_grad_(False)
    set_deployed_info(deployed, DeployedInfo(tuple(plan for plan, _ in plans.values())))
    return deployed


def _with_regions(
    gated: fx.GraphModule, plans: dict[str, tuple[BlockPlan, Region | None]]
) -> list[tuple[Gate, BlockPlan, Region]]:
    gates = gates_of(gated)
    return [(gates[name], plan, region) for name, (plan, region) in plans.items() if region is not None]
