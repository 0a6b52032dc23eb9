"""Join the blocks, convolutions and poolings of a deployed network that can run in one call."""

from torch import fx, nn

from gatefit.deployment.engines.activation import kernel_activation
from gatefit.deployment.engines.chain import ChainBlock, ChainBlocks, PlainBlock, Pooling, Step
from gatefit.deployment.engines.gathered import ChannelsLastPool, GatheredConv, with_gathered_convs
from gatefit.graph.trace import module_of


def join_chains(network: fx.GraphModule) -> fx.GraphModule:
    """Run each convolution that the kernels know as a `ChainBlocks`, and join all that follow each other; in place.

    Two of them are joined if nothing else reads the value between them, except the convolution that makes the second
    one's shortcut. Activations behind them join too. Example: conv -> ReLU -> pooling -> block -> SiLU -> block becomes
    one `ChainBlocks` of three blocks: conv and pooling make one `PlainBlock`.
    """
    with_gathered_convs(network)
    for node in network.graph.nodes:
        step = _step(module_of(network, node))
        if step is not None and len(node.args) == 1:
            node.target = f"{node.target}_{node.name}"  # a module that is called twice becomes two steps
            network.add_submodule(node.target, ChainBlocks([PlainBlock([step])]))
    _absorb_activations(network)
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
            block = ChainBlocks(block.blocks)  # the former one may have been prepared without projection
            network.set_submodule(str(node.target), block)
            node.args = (before,)
            network.graph.erase_node(shortcuts[0])
        if isinstance(former, ChainBlocks) and len(before.users) == 1:
            network.set_submodule(str(node.target), _joined(former, block))
            node.args = before.args
            network.graph.erase_node(before)
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _absorb_activations(network: fx.GraphModule) -> None:
    """Run each activation right behind a chain, which nothing else reads, as a part of it."""
    for node in list(network.graph.nodes):
        activation = kernel_activation(network, node)
        before = node.all_input_nodes[0] if activation is not None else node
        chain = module_of(network, before)
        if activation is None or not isinstance(chain, ChainBlocks) or len(before.users) > 1:
            continue
        if chain.absorb(activation):
            node.replace_all_uses_with(before)
            network.graph.erase_node(node)


def _step(module: nn.Module | None) -> Step | Pooling | None:
    """Make a step of a chain of a convolution or pooling; None for a module that the kernels do not know."""
    if isinstance(module, GatheredConv):
        return Step(module, False, False, module.activation)
    if type(module) not in (nn.MaxPool2d, ChannelsLastPool) or module.ceil_mode or module.return_indices:  # type: ignore[union-attr]
        return None
    assert isinstance(module, nn.MaxPool2d)
    sizes = [(s, s) if isinstance(s, int) else tuple(s) for s in (module.kernel_size, module.stride, module.padding)]
    square = all(h == w for h, w in sizes) and module.dilation in (1, (1, 1))
    return Pooling(*(h for h, _ in sizes)) if square else None


def _joined(former: ChainBlocks, latter: ChainBlocks) -> ChainBlocks:
    """Put two chains one behind the other; two `PlainBlock` that meet become one."""
    last, first = former.blocks[-1], latter.first
    if isinstance(last, PlainBlock) and isinstance(first, PlainBlock):
        return ChainBlocks((*former.blocks[:-1], PlainBlock((*last.steps, *first.steps)), *latter.blocks[1:]))
    return ChainBlocks((*former.blocks, *latter.blocks))


def _projection(network: fx.GraphModule, node: fx.Node) -> PlainBlock | None:
    """Find the layer that makes the shortcut of a chain's first block from that block's input; None: there is none."""
    before, shortcut = node.args
    if not isinstance(shortcut, fx.Node) or shortcut.args != (before,) or len(shortcut.users) > 1:
        return None
    chain = module_of(network, shortcut)
    if not isinstance(chain, ChainBlocks) or len(chain.blocks) > 1:
        return None
    return chain.first if isinstance(chain.first, PlainBlock) and len(chain.first.steps) == 1 else None
