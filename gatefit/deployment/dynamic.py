"""A deployed network in PyTorch: samples that need the same of a block run together, nothing else is computed."""

import copy

import torch
from torch import Tensor, fx, nn

from gatefit.deployment.branch import Place, cut
from gatefit.deployment.plan import BlockPlan
from gatefit.fold import fold_in_place
from gatefit.gates import Gate, gates_of

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
        self.skip, self.exact = plan.skip, plan.exact
        self.fc = nn.Linear(gate.of.features, sum(fc.out_features for fc in gate.layers))
        self.fc.weight.data = torch.cat([fc.weight.detach() for fc in gate.layers])
        self.fc.bias.data = torch.cat([fc.bias.detach() for fc in gate.layers])
        self.fitting = None if plan.codebook is None or len(plan.codebook) < 2 else _fitting(plan)

    def forward(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """For images whose block has the input x (B, ...).

        Returns:
            Whether the block runs, (B, 1) bool, None: always; which entries of the codebook but the last would do,
            (B, entries - 1) bool, None: there is but one; then saliences and what is left behind, see
            `gatefit.deployment.branch.INPUTS`.
        """
        gate = self.gate
        logits = self.fc(gate.pool(x))
        whole = channel = left = fits = runs = None
        if gate.block is not None:
            whole = gate.salience(logits[:, :1])
            runs = logits[:, :1] > 0 if self.skip else None
        if gate.channel is not None:
            logits = logits if gate.block is None else logits[:, 1:]
            channel = gate.salience(logits)
            left = None if gate.fill is None else (1 - channel) * gate.predicted(logits)
            if self.fitting is not None:
                fits = self.fitting((logits > 0).to(x.dtype)) < 0.5
        return runs, fits, whole, channel, left


@torch.no_grad()
def _fitting(plan: BlockPlan) -> nn.Linear:
    """From open units (0 or 1) to how many of them each entry lacks, or with `exact`, in how many it differs."""
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

    def __init__(self, gated: fx.GraphModule, gate: Gate, place: Place, plan: BlockPlan) -> None:
        super().__init__()
        self.saliences = Saliences(gate, plan)
        self.branches = nn.ModuleList(branches_of(gated, gate, place, plan))
        self.after = nn.ReLU() if place.relu is not None else nn.Identity()

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Add the branch of x, (B, ...), to the shortcut, (B, ...)."""
        result: Tensor
        runs, fits, *given = self.saliences(x)
        if runs is None and fits is None:
            result = self.after(shortcut + self.branches[0](x, *given))
            return result
        entry = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if fits is not None:
            entry = torch.where(fits.any(1), fits.int().argmax(1), len(self.branches) - 1)
        if runs is not None:
            entry = torch.where(runs[:, 0], entry, len(self.branches))
        result = self.after(self._sorted(entry, x, shortcut, given))
        return result

    def _sorted(self, entry: Tensor, x: Tensor, shortcut: Tensor, given: list[Tensor | None]) -> Tensor:
        """Run the samples of each entry together; one read-back for the whole batch."""
        wanted = entry.tolist()
        if len(set(wanted)) == 1:
            index = wanted[0]
            return shortcut if index == len(self.branches) else shortcut + self.branches[index](x, *given)
        result = shortcut.clone()
        order = entry.argsort(stable=True)
        start = 0
        for index, branch in enumerate(self.branches):
            count = wanted.count(index)
            if count:
                some = order[start : start + count]
                parts = [None if t is None else t.index_select(0, some) for t in (x, *given)]
                result.index_add_(0, some, branch(*parts))
            start += count
        return result


def branches_of(gated: fx.GraphModule, gate: Gate, place: Place, plan: BlockPlan) -> list[fx.GraphModule]:
    """The branch for each entry of the codebook, batch norms folded."""
    hard = gate.form == "step" and plan.skip  # the block's salience is then 1 where the branch runs
    if plan.codebook is None:
        return [fold_in_place(cut(gated, gate, place, block_mask=not hard))]
    branches = []
    for index, entry in enumerate(plan.codebook):
        exact = plan.exact and index < len(plan.codebook) - 1
        keep = None if entry.all() else entry.nonzero()[:, 0]
        branches.append(fold_in_place(cut(gated, gate, place, keep, not hard, not exact)))
    return branches


def assemble(gated: fx.GraphModule, plans: dict[str, tuple[BlockPlan, Place | None]]) -> fx.GraphModule:
    """The deployed network: a `DynamicBlock` for each block that can be cut out, all else with batch norms folded.

    Returns:
        (B, C, H, W) -> (B, classes), in eval mode; its weights are copies.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    root = nn.Module()
    holder = nn.Module()
    root.add_module(HOLDER, holder)
    places = {place.add: (gate, plan, place) for gate, plan, place in _placed(gated, plans)}
    regions = frozenset[fx.Node]().union(*(place.region for _, _, place in places.values()))
    relus = {place.relu: place.add for _, _, place in places.values() if place.relu is not None}
    for name, module in gated.named_children():
        root.add_module(name, module)
    for name, tensor in (*gated.named_parameters(recurse=False), *gated.named_buffers(recurse=False)):
        root.register_buffer(name, tensor.detach())
    for node in gated.graph.nodes:
        if node in regions:
            continue
        if node in relus:
            copied[node] = copied[relus[node]]
            continue
        if node not in places:
            copied[node] = graph.node_copy(node, copied.__getitem__)
            continue
        gate, plan, place = places[node]
        name = plan.name.replace(".", "_")
        holder.add_module(name, DynamicBlock(gated, gate, place, plan))
        given = (copied[place.entry], copied[place.shortcut])
        copied[node] = graph.call_module(f"{HOLDER}.{name}", given)
    deployed = fx.GraphModule(root, graph, class_name="Deployed")
    deployed.graph.eliminate_dead_code()
    deployed.delete_all_unused_submodules()
    deployed = copy.deepcopy(deployed)
    return fold_in_place(deployed.eval()).requires_grad_(False)


def _placed(
    gated: fx.GraphModule, plans: dict[str, tuple[BlockPlan, Place | None]]
) -> list[tuple[Gate, BlockPlan, Place]]:
    gates = gates_of(gated)
    return [(gates[name], plan, place) for name, (plan, place) in plans.items() if place is not None]
