"""Which blocks, convolutions and poolings of a deployed network run in one call."""

from torch import fx, nn

from gatefit.deployment.engines.chain import ChainBlock, ChainBlocks, PlainBlock, Pooling, Step
from gatefit.deployment.engines.gathered import ChannelsLastPool, GatheredConv, with_gathered_convs
from gatefit.graph.trace import module_of


def join_chains(network: fx.GraphModule) -> fx.GraphModule:
    """Run each convolution that the kernels know as a `ChainBlocks`, make one of all that follow each other; in place.

    Two do if nothing else reads what is between them, but for the convolution that makes the second one's shortcut.
    """
    with_gathered_convs(network)
    for node in network.graph.nodes:
        link = _plain(module_of(network, node))
        if link is not None and len(node.args) == 1:
            node.target = f"{node.target}_{node.name}"  # what is called twice is two parts of chains
            network.add_submodule(node.target, ChainBlocks([PlainBlock([link])]))
    for node in network.graph.nodes:
        block = module_of(network, node)
        if not isinstance(block, ChainBlocks):
            continue
        before, *shortcuts = node.args
        former = module_of(network, before)
        if shortcuts and shortcuts != [before]:
            projection = _projection(network, node)
            if projection is None:
                continue
            assert isinstance(block.first, ChainBlock)
            block.first.projection = projection
            block = ChainBlocks(block.blocks)  # the former one may have told the kernels of itself
            network.set_submodule(str(node.target), block)
            node.args, made = (before,), shortcuts[0]
            network.graph.erase_node(made)
        if isinstance(former, ChainBlocks) and len(before.users) == 1:
            network.set_submodule(str(node.target), _joined(former, block))
            node.args = before.args
            network.graph.erase_node(before)
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _plain(module: nn.Module | None) -> Step | Pooling | None:
    """A convolution, or pooling, as part of a chain; None for what the kernels do not know."""
    if isinstance(module, GatheredConv):
        return Step(module, False, False, module.bounds) if isinstance(module.after, nn.Identity) else None
    if type(module) not in (nn.MaxPool2d, ChannelsLastPool) or module.ceil_mode or module.return_indices:  # type: ignore[union-attr]
        return None
    assert isinstance(module, nn.MaxPool2d)
    sizes = [(s, s) if isinstance(s, int) else tuple(s) for s in (module.kernel_size, module.stride, module.padding)]
    square = all(h == w for h, w in sizes) and module.dilation in (1, (1, 1))
    return Pooling(*(h for h, _ in sizes)) if square else None


def _joined(former: ChainBlocks, latter: ChainBlocks) -> ChainBlocks:
    last, first = former.blocks[-1], latter.first
    if isinstance(last, PlainBlock) and isinstance(first, PlainBlock):
        return ChainBlocks((*former.blocks[:-1], PlainBlock((*last.links, *first.links)), *latter.blocks[1:]))
    return ChainBlocks((*former.blocks, *latter.blocks))


def _projection(network: fx.GraphModule, node: fx.Node) -> PlainBlock | None:
    """What makes the shortcut of a chain's first block of that block's input, and of nothing else."""
    before, made = node.args
    shortcut = module_of(network, made) if isinstance(made, fx.Node) else None
    if not isinstance(shortcut, ChainBlocks) or made.args != (before,) or len(made.users) > 1:  # type: ignore[union-attr]
        return None
    plain = len(shortcut.blocks) == 1 and isinstance(shortcut.first, PlainBlock) and len(shortcut.first.links) == 1
    return shortcut.first if plain else None  # type: ignore[return-value]
