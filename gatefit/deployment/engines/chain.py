"""Blocks in one call: gates, the choice of units and branches that are chains of convolutions, all compiled."""

import ctypes
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatefit.deployment.dynamic import Saliences
from gatefit.deployment.engines.gathered import OPEN, GatheredConv, gathered_variant, need_kernels
from gatefit.deployment.kernels.native import NUMBER, POINTER, REAL, Kernels, threads
from gatefit.deployment.plan import BlockPlan, never_closes
from gatefit.deployment.region import SHORTCUT, Region
from gatefit.errors import DeployError
from gatefit.gating.gates import Gate
from gatefit.graph.activations import activation_of
from gatefit.graph.ops import add_compensation
from gatefit.graph.trace import module_of

LANES = 16
"""Floats of a register, where weights are packed."""
CONVOLUTION, DEPTHWISE, MAX_POOLING = 0, 1, 2
"""Kinds of `Step` of gathered.cpp."""
Shape = tuple[int, int, int]
"""(C, H, W)"""


class StepStruct(ctypes.Structure):
    """`Step` of gathered.cpp."""

    _fields_ = (
        *((name, POINTER) for name in ("weight", "bias", "narrow")),
        *((name, NUMBER) for name in ("rows", "columns", "kernel", "stride", "padding", "kind")),
        *((name, NUMBER) for name in ("open_rows", "open_columns", "filled")),
        *((name, REAL) for name in ("lowest", "highest")),
    )


class _Block(ctypes.Structure):
    """`Block` of gathered.cpp."""

    _fields_ = (
        *((name, POINTER) for name in ("gate_weight", "gate_bias", "compensation", "threshold")),
        *((name, NUMBER) for name in ("features", "has_block", "units", "steps", "adds")),
        *((name, ctypes.POINTER(StepStruct)) for name in ("step", "aside")),
        *((name, REAL) for name in ("lowest", "highest")),
    )


@dataclass
class Step:
    """A convolution in a chain, and what is done with its result."""

    conv: GatheredConv
    open_rows: bool
    open_columns: bool
    bounds: tuple[float, float]
    compensated: bool = False

    def to_structs(self, run: Kernels, shape: Shape) -> tuple[StepStruct, Tensor | None, Shape]:
        """The step in the kernels' words for inputs of a shape, what it points to, and its result's shape."""
        conv = self.conv
        weight, bias = conv.weight, conv.bias
        narrow = self._narrow() if run.narrow(shape[2]) else None
        step = StepStruct(
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if narrow is None else narrow.data_ptr(),
            *weight.shape[:3],
            conv.stride,
            conv.padding,
            DEPTHWISE if conv.depthwise else CONVOLUTION,
            *(int(b) for b in (self.open_rows, self.open_columns, self.compensated)),
            *self.bounds,
        )
        return step, narrow, _behind(step, shape)

    def _narrow(self) -> Tensor | None:
        """The weight in the order of `NarrowConvolution` (narrow.h); None where it cannot be."""
        weight, conv = self.conv.weight.detach(), self.conv
        out, into, *size = weight.shape
        plain = not conv.depthwise and (*size, conv.stride, conv.padding) == (3, 3, 1, 1)
        if not plain or out % LANES:
            return None
        return weight.view(-1, LANES, into, 9).permute(2, 0, 3, 1).contiguous()


@dataclass
class Pooling:
    """Max pooling in a chain."""

    kernel: int
    stride: int
    padding: int

    def to_structs(self, run: Kernels, shape: Shape) -> tuple[StepStruct, None, Shape]:
        """As `Step.to_structs`."""
        sizes = (*shape[:1] * 2, self.kernel, self.stride, self.padding)
        step = StepStruct(None, None, None, *sizes, MAX_POOLING, 0, 0, 0, -math.inf, math.inf)
        return step, None, _behind(step, shape)


def _behind(step: StepStruct, shape: Shape) -> Shape:
    if shape[0] != step.columns * (step.rows if step.kind == DEPTHWISE else 1):
        raise DeployError(f"a layer for {step.columns} channels is given {shape[0]}; check the images' shape")
    height, width = ((s + 2 * step.padding - step.kernel) // step.stride + 1 for s in shape[1:])
    if min(height, width) < 1:
        raise DeployError(f"images are too small for this network: nothing is left of {shape[1]} x {shape[2]} pixels")
    return step.rows, height, width


Told = tuple[_Block, Any, Shape]
"""A block in the kernels' words for inputs of a shape, what it points to, and its result's shape."""


class PlainBlock(nn.Module):
    """Convolutions that are not gated and max pooling, one behind the other, between blocks that are gated."""

    def __init__(self, links: Iterable[Step | Pooling]) -> None:
        super().__init__()
        self.links = list(links)
        self.convs = nn.ModuleList(link.conv for link in self.links if isinstance(link, Step))

    adds = False
    """Whether what it gives is added to its input, or to a shortcut that is given."""

    def to_structs(self, run: Kernels, shape: Shape) -> Told:
        """See `Told`."""
        steps, pointed, result = _steps(self.links, run, shape)
        gates = (None,) * 4
        block = _Block(*gates, shape[0], 0, 0, len(steps), 0, steps, None, -math.inf, math.inf)
        return block, pointed, result


def _steps(links: Sequence[Step | Pooling], run: Kernels, shape: Shape) -> tuple[Any, Any, Shape]:
    """The steps in the kernels' words for inputs of a shape, what they point to, and the last one's shape."""
    steps = (StepStruct * len(links))()
    packed = []
    for i, link in enumerate(links):
        steps[i], narrow, shape = link.to_structs(run, shape)
        packed.append(narrow)
    return steps, (steps, packed), shape


class ChainBlock(nn.Module):
    """What the kernels need to know of a block with step gates whose branch is a chain of convolutions.

    Raises:
        DeployError: it is no such block.
    """

    def __init__(self, gated: fx.GraphModule, gate: Gate, region: Region, plan: BlockPlan) -> None:
        super().__init__()
        if gate.form != "step":
            raise DeployError("its gates are not steps")
        self.saliences = Saliences(gate, replace(plan, skip=True, codebook=None))
        variant = gathered_variant(gated, gate, region)
        self.links = _chain(variant)
        self.open = never_closes(gate)
        """Then there is nothing to ask the gates for."""
        if self.open:
            self.links = [replace(link, open_rows=False, open_columns=False, compensated=False) for link in self.links]
        self.convs = nn.ModuleList(link.conv for link in self.links)
        self.compensation = None if gate.compensation is None else variant.get_submodule("compensation")
        self.bounds = (0.0 if region.relu is not None else -math.inf, math.inf)
        self.projection: PlainBlock | None = None
        """Makes the shortcut of the block's input; None: that is the input itself, or given."""

    @property
    def adds(self) -> bool:
        """See `PlainBlock.adds`."""
        return self.projection is None

    def to_structs(self, run: Kernels, shape: Shape) -> Told:
        """See `Told`."""
        gate, fc = self.saliences.gate, self.saliences.fc
        steps, pointed, result = _steps(self.links, run, shape)
        projection = kept = None
        if self.projection is not None:
            projection, kept, made = _steps(self.projection.links, run, shape)
            need_shape(result, made)
        compensation = (
            None if self.compensation is None else self.compensation.get_parameter("weight").flatten(1).T.contiguous()
        )
        block = _Block(
            None if self.open else fc.weight.data_ptr(),
            fc.bias.data_ptr(),
            None if compensation is None else compensation.data_ptr(),
            None if compensation is None else gate.threshold.data_ptr(),
            fc.in_features,
            int(self.saliences.skip),
            fc.out_features - int(gate.block is not None),
            len(self.links),
            int(self.adds),
            steps,
            projection,
            *self.bounds,
        )
        return block, (pointed, kept, compensation), result


class ChainBlocks(nn.Module):
    """Blocks one behind the other, in one call: (input, shortcut of the first if it needs one) -> result of the last.

    All others make their shortcuts themselves. An image goes through as many as can be while it is in the cache.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self._told: tuple[Any, ...] | None = None

    @property
    def first(self) -> "ChainBlock | PlainBlock":
        """The block that the input goes to."""
        first = self.blocks[0]
        assert isinstance(first, ChainBlock | PlainBlock)
        return first

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Run x, (B, C, H, W) float32, through the first block, what it gives through the next, and so on."""
        run = need_kernels(x)
        if x.dim() != 4:
            raise DeployError(f"images must be a batch (B, C, H, W), not {tuple(x.shape)}")
        to_structs = self._told  # kept while the kernel reads it, whatever other threads do
        if to_structs is None or to_structs[1] != x.shape[1:]:
            to_structs = self._told = self._tell(run, x)
        if to_structs[2] is not None:
            need_shape(to_structs[2], () if shortcut is None else tuple(shortcut.shape[1:]))
        x, shortcut = x.contiguous(), None if shortcut is None else shortcut.contiguous()
        result = x.new_empty(len(x), *to_structs[3])
        regions = (x.data_ptr(), None if shortcut is None else shortcut.data_ptr(), result.data_ptr())
        run.blocks(to_structs[0], len(self.blocks), *regions, len(x), *x.shape[2:], threads())
        return result

    def _tell(self, run: Kernels, x: Tensor) -> tuple[Any, ...]:
        """All blocks in the kernels' words for inputs like x, its shape, the shape of a shortcut if one is needed, the
        result's, and what they point to."""
        blocks = (_Block * len(self.blocks))()
        kept, shapes = [], [(x.shape[1], x.shape[2], x.shape[3])]
        for i, block in enumerate(self.blocks):
            assert isinstance(block, ChainBlock | PlainBlock)
            blocks[i], pointed, shape = block.to_structs(run, shapes[-1])
            if i and block.adds:
                need_shape(shape, shapes[-1])
            kept.append(pointed)
            shapes.append(shape)
        return blocks, x.shape[1:], shapes[1] if self.first.adds else None, shapes[-1], kept

    def _apply(self, fn: Any, recurse: bool = True) -> "ChainBlocks":
        self._told = None  # the weights may lie elsewhere now
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Addresses hold for these weights alone.
        return {**self.__dict__, "_told": None}


def need_shape(branch: Shape, shortcut: tuple[int, ...]) -> None:
    """Raise DeployError unless both are alike."""
    if branch != shortcut:
        raise DeployError(f"a branch that gives {branch} cannot be added to a shortcut of {shortcut}")


def _chain(variant: fx.GraphModule) -> list[Step]:
    """The convolutions of a gathered way in order, if it is nothing else.

    Raises:
        DeployError: it is something else.
    """
    names = {n.target: n for n in variant.graph.nodes if n.op == "placeholder"}
    now, opened = names["entry"], names[OPEN]
    compensated = {n for n in variant.graph.nodes if n.op == "call_module" and n.target == "compensation"}
    links: list[Step] = []
    added = False
    for node in variant.graph.nodes:
        module = module_of(variant, node)
        if node.op == "placeholder" or node in compensated:
            continue
        if node.op == "output" and node.args[0] is now and added and not links[-1].conv.depthwise:
            return links
        if added and activation_of(variant, node) != "relu":
            break
        others = [n for n in node.all_input_nodes if n is not now and n is not opened]
        if isinstance(module, GatheredConv) and node.args[0] is now and isinstance(module.after, nn.Identity):
            roles = (node.kwargs.get("rows") is opened, node.kwargs.get("columns") is opened)
            links.append(Step(module, *roles, module.bounds))
            added = others == [names[SHORTCUT]]
            if others and not added:
                break
        elif links and node.target is add_compensation and set(others) <= compensated:
            links[-1].compensated = True
        elif links and node.target in (torch.add, operator.add) and others == [names[SHORTCUT]]:
            added = True
        elif links and activation_of(variant, node) == "relu" and not others:
            links[-1].bounds = (0.0, math.inf)
        else:
            break
        if any(link.bounds != (-math.inf, math.inf) for link in links[-1:]) and node.target in (
            add_compensation,
            torch.add,
        ):
            break  # cut at the bounds before it
        now = node
    raise DeployError("its branch is no chain of convolutions")
