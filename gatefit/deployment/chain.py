"""Blocks in one call: gates, the choice of units and branches that are chains of convolutions, all compiled."""

import ctypes
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatefit.deployment.branch import SHORTCUT, Place
from gatefit.deployment.dynamic import Saliences
from gatefit.deployment.gathered import OPEN, GatheredConv, gathered_way, need_kernels
from gatefit.deployment.native import NUMBER, POINTER, REAL, Kernels, threads
from gatefit.deployment.plan import BlockPlan
from gatefit.deployment.prepack import activation_of
from gatefit.errors import DeployError
from gatefit.gates import Gate, add_fill
from gatefit.graph import module_of

LANES = 16
"""Floats of a register, where weights are packed."""


class _Step(ctypes.Structure):
    """`Step` of gathered.cpp."""

    _fields_ = (
        *((name, POINTER) for name in ("weight", "bias", "narrow")),
        *((name, NUMBER) for name in ("rows", "columns", "kernel", "stride", "padding", "depthwise")),
        *((name, NUMBER) for name in ("open_rows", "open_columns", "filled")),
        *((name, REAL) for name in ("lowest", "highest")),
    )


class _Block(ctypes.Structure):
    """`Block` of gathered.cpp."""

    _fields_ = (
        *((name, POINTER) for name in ("gate_weight", "gate_bias", "fill", "lowered")),
        *((name, NUMBER) for name in ("features", "has_block", "units", "steps")),
        ("step", ctypes.POINTER(_Step)),
        *((name, REAL) for name in ("lowest", "highest")),
    )


@dataclass
class Link:
    """A convolution of the chain, and what is done with its result."""

    conv: GatheredConv
    open_rows: bool
    open_columns: bool
    bounds: tuple[float, float]
    filled: bool = False

    def narrow(self) -> Tensor | None:
        """The weight in the order of `NarrowConvolution` (narrow.h); None where it cannot be."""
        weight, conv = self.conv.weight.detach(), self.conv
        out, into, *size = weight.shape
        plain = not conv.depthwise and (*size, conv.stride, conv.padding) == (3, 3, 1, 1)
        if not plain or self.open_rows or out % LANES:
            return None
        return weight.view(-1, LANES, into, 9).permute(2, 0, 3, 1).contiguous()


class ChainBlock(nn.Module):
    """What the kernels need to know of a block with step gates whose branch is a chain of convolutions.

    Raises:
        DeployError: it is no such block.
    """

    def __init__(self, gated: fx.GraphModule, gate: Gate, place: Place, plan: BlockPlan) -> None:
        super().__init__()
        if gate.form != "step":
            raise DeployError("its gates are not steps")
        self.saliences = Saliences(gate, replace(plan, skip=True, codebook=None))
        way = gathered_way(gated, gate, place)
        self.links = _chain(way)
        self.convs = nn.ModuleList(link.conv for link in self.links)
        self.fill = None if gate.fill is None else way.get_submodule("fill")
        self.bounds = (0.0 if place.relu is not None else -math.inf, math.inf)

    def told(self, run: Kernels, height: int, width: int) -> tuple[_Block, Any, tuple[int, int, int]]:
        """The block in the kernels' words for inputs of a size, what it points to, and its branch's (C, H, W)."""
        gate, fc = self.saliences.gate, self.saliences.fc
        steps = (_Step * len(self.links))()
        packed = []
        for i, link in enumerate(self.links):
            weight, bias, stride, padding = link.conv.weight, link.conv.bias, link.conv.stride, link.conv.padding
            narrow = link.narrow() if run.narrow(width) else None
            packed.append(narrow)
            steps[i] = _Step(
                weight.data_ptr(),
                None if bias is None else bias.data_ptr(),
                None if narrow is None else narrow.data_ptr(),
                *weight.shape[:3],
                stride,
                padding,
                *(int(b) for b in (link.conv.depthwise, link.open_rows, link.open_columns, link.filled)),
                *link.bounds,
            )
            height, width = ((s + 2 * padding - weight.shape[2]) // stride + 1 for s in (height, width))
        fill = None if self.fill is None else self.fill.get_parameter("weight").flatten(1).T.contiguous()
        packed.append(fill)
        block = _Block(
            fc.weight.data_ptr(),
            fc.bias.data_ptr(),
            None if fill is None else fill.data_ptr(),
            None if fill is None else gate.lowered.data_ptr(),
            fc.in_features,
            int(self.saliences.skip),
            fc.out_features - int(gate.block is not None),
            len(self.links),
            steps,
            *self.bounds,
        )
        return block, (steps, packed), (self.links[-1].conv.weight.shape[0], height, width)


class ChainBlocks(nn.Module):
    """Blocks one behind the other, in one call: (input, shortcut) -> result of the last.

    All but the first have their input for a shortcut. An image goes through all of them while it is in the cache.
    """

    def __init__(self, blocks: Iterable[ChainBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self._told: tuple[Any, ...] | None = None

    @property
    def works_in_place(self) -> bool:
        """Whether the input has been read for good when the result begins to take its place."""
        return all(len(block.links) > 1 for block in self.blocks if isinstance(block, ChainBlock))

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Run x, (B, C, H, W) float32, through the first branch, add it to the shortcut, and so on."""
        run = need_kernels(x)
        told = self._told  # kept while the kernel reads it, whatever other threads do
        if told is None or told[1] != x.shape[2:]:
            told = self._told = self._tell(run, x)
        if shortcut.shape[1:] != told[2]:
            given = tuple(shortcut.shape[1:])
            raise DeployError(f"a branch that gives {told[2]} cannot be added to a shortcut of {given}")
        x, shortcut = x.contiguous(), shortcut.contiguous()
        result = torch.empty_like(shortcut)
        places = (x.data_ptr(), shortcut.data_ptr(), result.data_ptr())
        total = shortcut.numel() // max(1, len(x))
        run.blocks(told[0], len(self.blocks), *places, len(x), *x.shape[2:], total, threads())
        return result

    def _tell(self, run: Kernels, x: Tensor) -> tuple[Any, ...]:
        """All blocks in the kernels' words for inputs like x, its size, the result's shape, and what they point to."""
        blocks = (_Block * len(self.blocks))()
        kept = []
        shape = (x.shape[1], x.shape[2], x.shape[3])
        for i, block in enumerate(self.blocks):
            assert isinstance(block, ChainBlock)
            blocks[i], pointed, shape = block.told(run, *shape[1:])
            kept.append(pointed)
        return blocks, x.shape[2:], shape, kept

    def _apply(self, fn: Any, recurse: bool = True) -> "ChainBlocks":
        self._told = None  # the weights may lie elsewhere now
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Addresses hold for these weights alone.
        return {**self.__dict__, "_told": None}


def join_chains(network: fx.GraphModule) -> fx.GraphModule:
    """Make one of each `ChainBlocks` and another that takes its result, and nothing else, for input and shortcut.

    Its branch must be more than one convolution: it works in place.
    """
    for node in network.graph.nodes:
        block = module_of(network, node)
        before = node.args[0] if isinstance(block, ChainBlocks) else None
        if not isinstance(before, fx.Node) or node.args[1] is not before or len(before.users) > 1:
            continue
        former = module_of(network, before)
        if isinstance(block, ChainBlocks) and isinstance(former, ChainBlocks) and block.works_in_place:
            network.set_submodule(str(node.target), ChainBlocks((*former.blocks, *block.blocks)))  # type: ignore[arg-type]
            node.args = before.args
            network.graph.erase_node(before)
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _chain(way: fx.GraphModule) -> list[Link]:
    """The convolutions of a gathered way in order, if it is nothing else.

    Raises:
        DeployError: it is something else.
    """
    names = {n.target: n for n in way.graph.nodes if n.op == "placeholder"}
    now, opened = names["entry"], names[OPEN]
    filled = {n for n in way.graph.nodes if n.op == "call_module" and n.target == "fill"}
    links: list[Link] = []
    added = False
    for node in way.graph.nodes:
        module = module_of(way, node)
        if node.op == "placeholder" or node in filled:
            continue
        if node.op == "output" and node.args[0] is now and added and not links[-1].conv.depthwise:
            return links
        if added and activation_of(way, node) != "relu":
            break
        others = [n for n in node.all_input_nodes if n is not now and n is not opened]
        if isinstance(module, GatheredConv) and node.args[0] is now and isinstance(module.after, nn.Identity):
            roles = (node.kwargs.get("rows") is opened, node.kwargs.get("columns") is opened)
            links.append(Link(module, *roles, module.bounds))
            added = others == [names[SHORTCUT]]
            if others and not added:
                break
        elif links and node.target is add_fill and set(others) <= filled:
            links[-1].filled = True
        elif links and node.target in (torch.add, operator.add) and others == [names[SHORTCUT]]:
            added = True
        elif links and activation_of(way, node) == "relu" and not others:
            links[-1].bounds = (0.0, math.inf)
        else:
            break
        if any(link.bounds != (-math.inf, math.inf) for link in links[-1:]) and node.target in (add_fill, torch.add):
            break  # cut at the bounds before it
        now = node
    raise DeployError("its branch is no chain of convolutions")
