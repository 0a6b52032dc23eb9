"""Proof that a conversion is right: identity to the bit, and closed units that are dead to the bit."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from gatefit.errors import ConversionError
from gatefit.gating.gates import Gate, gates_of
from gatefit.graph.accept import of_library
from gatefit.graph.example import Example, call
from gatefit.graph.trace import call_counts


@dataclass(frozen=True)
class Verification:
    """What was checked of a conversion; it is only returned if all of it held."""

    outputs: int
    """Output values that were compared to the bit."""
    closed_units: int
    """Channel units that were closed and overwritten with noise."""
    closed_blocks: int
    """Blocks that were closed and overwritten with noise."""


@torch.no_grad()
def verify(model: nn.Module, gated: fx.GraphModule, image: Example, seed: int = 0) -> Verification:
    """Check a fresh conversion in eval mode on the example `image`; both networks stay as they are.

    Purity: a second call of `model` gives the same, and none changes a buffer. Identity: all outputs of `gated` equal
    those of `model` to the bit. Corruption: with half of the units and half of the blocks closed, overwriting
    everything that is claimed dead changes no bit of the outputs.

    Raises:
        ConversionError: one of them does not hold, or the outputs are not finite.
    """
    with _reproducible():
        before = _pure_outputs(model, image)
        _check_training(model, gated, image)
        subject = copy.deepcopy(gated).eval()
        if not _equal(before, _outputs(subject, image)):
            raise ConversionError("refused: with all gates open the converted network differs from the original")
        generator = torch.Generator().manual_seed(seed)
        units, blocks = 0, 0
        state = subject.state_dict()
        wide, deep = [], []
        for gate in gates_of(subject).values():
            if gate.compensation is not None:
                gate.compensation.weight.copy_(
                    _noise(list(gate.compensation.weight.shape), gate.compensation.weight, generator)
                )
            if gate.channel is not None:
                closed = _close_half(gate.channel, generator)
                units += int(closed.sum())
                wide.append((gate, closed))
        outputs = _outputs(subject, image)
        for gate, closed in wide:
            _corrupt_units(state, gate, closed, generator)
        if not _equal(outputs, _outputs(subject, image)):
            raise ConversionError("refused: closed channels still change the converted network's outputs")
        for index, gate in enumerate(gates_of(subject).values()):
            if gate.block is not None and index % 2 == seed % 2:
                gate.block.bias.fill_(-1)
                blocks += 1
                deep.append(gate)
        outputs = _outputs(subject, image)
        only = {name for name, count in call_counts(gated).items() if count == 1}
        for gate in deep:
            _corrupt_block(state, gate, only, generator)
        if not _equal(outputs, _outputs(subject, image)):
            raise ConversionError("refused: skipped blocks still change the converted network's outputs")
    return Verification(sum(t.numel() for t in before), units, blocks)


def _pure_outputs(model: nn.Module, image: Example) -> list[Tensor]:
    """Give the original's outputs in eval mode, if calls leave no trace: a graph would not keep what they change."""
    original = copy.deepcopy(model).eval()
    before = _buffers(original)
    outputs = _outputs(original, image)
    if not all(bool(t.isfinite().all()) for t in outputs):
        raise ConversionError("the original network's outputs on random images are not finite; check its weights")
    if changed := _changed(original, before):
        raise ConversionError(
            f"forward changes the buffer {_listed(changed)} in eval mode too, which a gated copy would not do; "
            "change it outside forward"
        )
    if not _equal(outputs, _outputs(original, image)):
        raise ConversionError(
            "a second call on the same images gives other outputs (a counter, a moving average, or chance in eval "
            "mode), which a gated copy would not do; take it out of forward"
        )
    return outputs


def _check_training(model: nn.Module, gated: fx.GraphModule, image: Example) -> None:
    """Refuse a network of which code of its own changes buffers in train mode, if the gated copy does not."""
    modules = {path: m for path, m in model.named_modules() if not of_library(type(m).__module__)}
    own = {f"{path}.{name}" if path else name for path, m in modules.items() for name in m._buffers}
    if not own:
        return
    changes = []
    for network in (model, gated):
        trained = copy.deepcopy(network).train()
        before = _buffers(trained)
        try:
            call(trained, image)
        except Exception:  # that two random images can be trained on was not asked for
            return
        changes.append(_changed(trained, before) & own)
    if lost := changes[0] - changes[1]:
        raise ConversionError(
            f"forward changes the buffer {_listed(lost)} in train mode, which a gated copy would not do; "
            "change it in a module of its own without convolutions, or outside forward"
        )


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def _changed(network: nn.Module, before: dict[str, Tensor]) -> set[str]:
    now = dict(network.named_buffers())
    return {name for name, value in before.items() if name not in now or not torch.equal(now[name], value)}


def _listed(names: set[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names)[:3])


def _outputs(network: nn.Module, image: Example) -> list[Tensor]:
    return [t for t in tree_flatten(call(network, image))[0] if isinstance(t, Tensor)]


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _close_half(fc: nn.Linear, generator: torch.Generator) -> Tensor:
    closed = torch.randperm(fc.out_features, generator=generator) < fc.out_features // 2
    fc.bias.copy_(torch.where(closed, -1.0, 1.0))
    return closed


def _corrupt_units(state: dict[str, Tensor], gate: Gate, closed: Tensor, generator: torch.Generator) -> None:
    assert gate.of.channel_units is not None
    for piece in gate.of.channel_units.slices:
        tensor = state[piece.tensor]
        index = closed.repeat_interleave(piece.per_unit).nonzero()[:, 0].to(tensor.device)
        shape = list(tensor.shape)
        shape[piece.axis] = len(index)
        tensor.index_copy_(piece.axis, index, _noise(shape, tensor, generator))


def _corrupt_block(state: dict[str, Tensor], gate: Gate, only: set[str], generator: torch.Generator) -> None:
    for layer in gate.of.layers:
        weight = state.get(f"{layer.name}.weight")
        if weight is not None and layer.name in only:  # weights that other blocks share are not dead
            weight.copy_(_noise(list(weight.shape), weight, generator))


def _noise(shape: list[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw positive noise, so that it is also a valid variance, and of the size that it replaces."""
    size = like.abs().float().mean() + 0.1
    return (torch.rand(shape, generator=generator).to(like.device) * 2 * size).to(like.dtype)


@contextmanager
def _reproducible() -> Iterator[None]:
    """Use the same kernels in every run, as bit-for-bit comparisons need; leave the random state alone."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with torch.random.fork_rng():
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
