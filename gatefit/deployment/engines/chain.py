"""Blocks in one call: gates, the choice of units and branches that are chains of convolutions, all compiled.

A `ChainBlock` is a gated block, a `PlainBlock` is what lies between two of them, and `ChainBlocks` runs several of both
one behind the other. All describe themselves to the kernels by the structs of `gatefit.deployment.kernels.abi`.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from gatefit.deployment.dynamic import Saliences
from gatefit.deployment.engines.gathered import OPEN, UNBOUNDED, GatheredConv, gathered_variant, need_kernels
from gatefit.deployment.kernels.abi import (
    CONVOLUTION,
    DEPTHWISE,
    MAX_POOLING,
    BlockStruct,
    StepStruct,
    pack_weight,
)
from gatefit.deployment.kernels.native import Kernels, threads
from gatefit.deployment.plan import BlockPlan, never_closes
from gatefit.deployment.region import SHORTCUT, Region
from gatefit.errors import DeployError
from gatefit.gating.gates import Gate
from gatefit.graph.activations import activation_of
from gatefit.graph.ops import add_compensation
from gatefit.graph.trace import module_of

Shape = tuple[int, int, int]
"""(C, H, W)"""
_SUMS = (torch.add, operator.add)


class Structs(NamedTuple):
    """A layer, or a block, as the kernels take it for inputs of one shape."""

    struct: Any
    """A `StepStruct`, an array of them, or a `BlockStruct`."""
    owned: Any
    """Everything that the struct points to: to be kept while a kernel may read it."""
    shape: Shape
    """Of the result."""


@dataclass
class Step:
    """A convolution in a chain, and what happens to its result."""

    conv: GatheredConv
    open_oc: bool
    """Whether its output channels are the open units of the block; else it computes all."""
    open_ic: bool
    """Whether its input channels are the open units; else it reads all."""
    bounds: tuple[float, float]
    """Lowest and highest value: the activation."""
    compensated: bool = False
    """Whether something stands in its bias for the closed units."""

    def to_structs(self, run: Kernels, shape: Shape) -> Structs:
        """Describe the step for inputs of a shape.

        Raises:
            DeployError: it cannot run on this shape.
        """
        conv = self.conv
        weight, bias = conv.weight, conv.bias
        packed_weight = self._packed_weight() if run.narrow(shape[2]) else None
        oc_total, ic_total, kernel = weight.shape[:3]
        struct = StepStruct(
            weight=weight.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            packed_weight=None if packed_weight is None else packed_weight.data_ptr(),
            oc_total=oc_total,
            ic_total=ic_total,
            kernel=kernel,
            stride=conv.stride,
            padding=conv.padding,
            kind=DEPTHWISE if conv.depthwise else CONVOLUTION,
            open_oc=self.open_oc,
            open_ic=self.open_ic,
            compensated=self.compensated,
            lowest=self.bounds[0],
            highest=self.bounds[1],
        )
        return Structs(struct, packed_weight, _shape_after(struct, shape))

    def _packed_weight(self) -> Tensor | None:
        """Pack the weight of a 3 x 3 convolution, see `pack_weight`; None for all that the kernels read unpacked."""
        conv = self.conv
        if conv.depthwise or (*conv.weight.shape[2:], conv.stride, conv.padding) != (3, 3, 1, 1):
            return None
        return pack_weight(conv.weight.detach())


@dataclass
class Pooling:
    """Max pooling in a chain."""

    kernel: int
    stride: int
    padding: int

    def to_structs(self, run: Kernels, shape: Shape) -> Structs:
        """Describe the pooling for inputs of a shape, as `Step.to_structs` does."""
        struct = StepStruct(
            oc_total=shape[0],
            ic_total=shape[0],
            kernel=self.kernel,
            stride=self.stride,
            padding=self.padding,
            kind=MAX_POOLING,
            lowest=UNBOUNDED[0],
            highest=UNBOUNDED[1],
        )
        return Structs(struct, None, _shape_after(struct, shape))


def _shape_after(step: StepStruct, shape: Shape) -> Shape:
    """Compute the shape that a step gives for inputs of a shape; DeployError where it cannot run on them."""
    channels = step.oc_total if step.kind == DEPTHWISE else step.ic_total
    if shape[0] != channels:
        raise DeployError(f"a layer for {channels} channels is given {shape[0]}; check the images' shape")
    height, width = ((s + 2 * step.padding - step.kernel) // step.stride + 1 for s in shape[1:])
    if min(height, width) < 1:
        raise DeployError(f"images are too small for this network: nothing is left of {shape[1]} x {shape[2]} pixels")
    return step.oc_total, height, width


def _steps_to_structs(steps: Sequence[Step | Pooling], run: Kernels, shape: Shape) -> Structs:
    """Describe steps one behind the other as an array of structs."""
    array = (StepStruct * len(steps))()
    packed_weights = []
    for i, step in enumerate(steps):
        array[i], packed_weight, shape = step.to_structs(run, shape)
        packed_weights.append(packed_weight)
    return Structs(array, (array, packed_weights), shape)


class PlainBlock(nn.Module):
    """Convolutions without gates and max pooling, one behind the other, between blocks with gates."""

    adds_input = False
    """Whether the result is added to the input, or to a shortcut that is given."""

    def __init__(self, steps: Iterable[Step | Pooling]) -> None:
        super().__init__()
        self.steps = list(steps)
        self.convs = nn.ModuleList(step.conv for step in self.steps if isinstance(step, Step))

    def to_structs(self, run: Kernels, shape: Shape) -> Structs:
        """Describe the block for inputs of a shape, as `Step.to_structs` does."""
        steps, owned, result = _steps_to_structs(self.steps, run, shape)
        struct = BlockStruct(
            channels=shape[0],
            n_steps=len(self.steps),
            adds_input=self.adds_input,
            steps=steps,
            lowest=UNBOUNDED[0],
            highest=UNBOUNDED[1],
        )
        return Structs(struct, owned, result)


class ChainBlock(nn.Module):
    """A block with step gates whose branch is a chain of convolutions, as the kernels need to know it.

    Raises:
        DeployError: it is no such block.
    """

    def __init__(self, gated: fx.GraphModule, gate: Gate, region: Region, plan: BlockPlan) -> None:
        super().__init__()
        if gate.form != "step":
            raise DeployError("its gates are not steps")
        self.saliences = Saliences(gate, replace(plan, skip=True, codebook=None))
        variant = gathered_variant(gated, gate, region)
        self.has_shortcut = gate.of.has_shortcut
        self.steps = _chain(variant, self.has_shortcut)
        self.open = never_closes(gate)
        """Whether nothing ever closes: then there is nothing to ask the gates for."""
        if self.open:
            self.steps = [replace(step, open_oc=False, open_ic=False, compensated=False) for step in self.steps]
        self.convs = nn.ModuleList(step.conv for step in self.steps)
        self.compensation = None if gate.compensation is None else variant.get_submodule("compensation")
        self.bounds = (0.0 if region.relu is not None else -math.inf, math.inf)
        self.projection: PlainBlock | None = None
        """Makes the shortcut of the block's input; None: the shortcut is the input itself, or given."""

    @property
    def adds_input(self) -> bool:
        """See `PlainBlock.adds_input`."""
        return self.has_shortcut and self.projection is None

    def to_structs(self, run: Kernels, shape: Shape) -> Structs:
        """Describe the block for inputs of a shape, as `Step.to_structs` does."""
        gate, fc = self.saliences.gate, self.saliences.fc
        steps, owned, result = _steps_to_structs(self.steps, run, shape)
        projection = projection_owned = None
        if self.projection is not None:
            projection, projection_owned, shortcut = _steps_to_structs(self.projection.steps, run, shape)
            need_shape(result, shortcut)
        compensation = None
        if self.compensation is not None:
            compensation = self.compensation.get_parameter("weight").flatten(1).T.contiguous()
        struct = BlockStruct(
            gate_weight=None if self.open else fc.weight.data_ptr(),
            gate_bias=fc.bias.data_ptr(),
            compensation=None if compensation is None else compensation.data_ptr(),
            threshold=None if compensation is None else gate.threshold.data_ptr(),
            channels=fc.in_features,
            has_block=self.saliences.skip,
            n_units=fc.out_features - int(gate.block is not None),
            n_steps=len(self.steps),
            adds_input=self.adds_input,
            steps=steps,
            projection=projection,
            lowest=self.bounds[0],
            highest=self.bounds[1],
        )
        return Structs(struct, (owned, projection_owned, compensation), result)


@dataclass(frozen=True)
class _Prepared:
    """Blocks as the kernels take them, for images of one shape."""

    image_shape: torch.Size
    blocks: Any
    """An array of `BlockStruct`."""
    owned: list[Any]
    """What the structs point to."""
    shortcut_shape: Shape | None
    """Of the shortcut that the first block is given; None: it needs none."""
    result_shape: Shape


class ChainBlocks(nn.Module):
    """Blocks one behind the other, in one call: (input, shortcut of the first if it needs one) -> result of the last.

    All others make their shortcuts themselves. An image goes through as many of them as it can while it is in a cache.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self._prepared: _Prepared | None = None

    @property
    def first(self) -> "ChainBlock | PlainBlock":
        """Return the block that the input goes to."""
        first = self.blocks[0]
        assert isinstance(first, ChainBlock | PlainBlock)
        return first

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Run x, (B, C, H, W) float32, through the first block, its result through the next, and so on.

        Raises:
            DeployError: the blocks cannot run on x, or x does not fit the shortcut.
        """
        run = need_kernels(x)
        if x.dim() != 4:
            raise DeployError(f"images must be a batch (B, C, H, W), not {tuple(x.shape)}")
        prepared = self._prepared  # this call's own, whatever other threads do: the kernel reads what it owns
        if prepared is None or prepared.image_shape != x.shape[1:]:
            prepared = self._prepared = self._prepare(run, x)
        if prepared.shortcut_shape is None:
            shortcut = None  # a pair of layers is given its input in place of one
        else:
            need_shape(prepared.shortcut_shape, () if shortcut is None else tuple(shortcut.shape[1:]))
        x, shortcut = x.contiguous(), None if shortcut is None else shortcut.contiguous()
        result = x.new_empty(len(x), *prepared.result_shape)
        addresses = (x.data_ptr(), None if shortcut is None else shortcut.data_ptr(), result.data_ptr())
        run.blocks(prepared.blocks, len(self.blocks), *addresses, len(x), *x.shape[2:], threads())
        return result

    def _prepare(self, run: Kernels, x: Tensor) -> _Prepared:
        """Describe all blocks to the kernels, for inputs of the shape of x."""
        array = (BlockStruct * len(self.blocks))()
        owned, shapes = [], [(x.shape[1], x.shape[2], x.shape[3])]
        for i, block in enumerate(self.blocks):
            assert isinstance(block, ChainBlock | PlainBlock)
            array[i], owned_by_block, shape = block.to_structs(run, shapes[-1])
            if i and block.adds_input:
                need_shape(shape, shapes[-1])
            owned.append(owned_by_block)
            shapes.append(shape)
        return _Prepared(x.shape[1:], array, owned, shapes[1] if self.first.adds_input else None, shapes[-1])

    def _apply(self, fn: Any, recurse: bool = True) -> "ChainBlocks":
        self._prepared = None  # the weights may lie elsewhere now
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Addresses hold for these weights alone.
        return {**self.__dict__, "_prepared": None}


def need_shape(branch: Shape, shortcut: tuple[int, ...]) -> None:
    """Raise DeployError unless both are alike."""
    if branch != shortcut:
        raise DeployError(f"a branch that gives {branch} cannot be added to a shortcut of {shortcut}")


def _chain(variant: fx.GraphModule, has_shortcut: bool) -> list[Step]:
    """List the convolutions of a gathered variant in order, if it is nothing else but what adds its shortcut.

    Example: conv1 -> ReLU -> conv2 -> + shortcut -> ReLU gives two steps, both with the bounds (0, inf). The first one
    has `open_oc`, the second `open_ic`.

    Raises:
        DeployError: it is something else.
    """
    inputs = {n.target: n for n in variant.graph.nodes if n.op == "placeholder"}
    current, open_units, shortcut = inputs["entry"], inputs[OPEN], inputs[SHORTCUT]
    compensations = {n for n in variant.graph.nodes if n.op == "call_module" and n.target == "compensation"}
    steps: list[Step] = []
    added = False  # whether the shortcut has been
    for node in variant.graph.nodes:
        module = module_of(variant, node)
        if node.op == "placeholder" or node in compensations:
            continue
        if node.op == "output" and node.args[0] is current and added == has_shortcut and not steps[-1].conv.depthwise:
            return steps
        if added and activation_of(variant, node) != "relu":
            break
        others = [n for n in node.all_input_nodes if n is not current and n is not open_units]
        if isinstance(module, GatheredConv) and node.args[0] is current and isinstance(module.after, nn.Identity):
            reads_open = (node.kwargs.get("oc") is open_units, node.kwargs.get("ic") is open_units)
            steps.append(Step(module, *reads_open, module.bounds))
            added = others == [shortcut]
            if others and not added:
                break
        elif steps and node.target is add_compensation and set(others) <= compensations:
            steps[-1].compensated = True
        elif steps and node.target in _SUMS and others == [shortcut]:
            added = True
        elif steps and activation_of(variant, node) == "relu" and not others:
            steps[-1].bounds = (0.0, math.inf)
        else:
            break
        if steps[-1].bounds != UNBOUNDED and node.target in (add_compensation, *_SUMS):
            break  # the activation comes before this sum, and the kernels apply it behind
        current = node
    raise DeployError("its branch is no chain of convolutions")
