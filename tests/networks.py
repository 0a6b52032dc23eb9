"""A table of small networks, one oddity each, that drives the tests of matching, surgery and costs."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn


def conv(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=bias)


class Basic(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(i, o, stride=stride), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = conv(o, o), nn.BatchNorm2d(o)
        self.down = nn.Sequential(conv(i, o, 1, stride), nn.BatchNorm2d(o)) if stride > 1 or i != o else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.down(x) if self.down else x))


class Bottleneck(nn.Module):
    def __init__(self, c: int, width: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(c, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, groups=groups), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, c, 1), nn.BatchNorm2d(c)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.act(self.bn2(self.conv2(y)))))
        y += x
        return self.act(y)


class Plain(nn.Module):
    """A small VGG: batch norm, ReLU and pooling between convolutions, and linear layers behind."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        widths = [3, 8, 12, 16, 16]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [conv(a, b, bias=not norm), *([nn.BatchNorm2d(b)] if norm else []), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if i in (1, 2) else []
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class SqueezeExcite(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(c, 4, 1), nn.Conv2d(4, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class Inverted(nn.Module):
    def __init__(self, c: int, width: int, se: bool = False) -> None:
        super().__init__()
        self.expand, self.bn1 = conv(c, width, 1), nn.BatchNorm2d(width)
        self.depthwise, self.bn2 = conv(width, width, groups=width), nn.BatchNorm2d(width)
        self.se = SqueezeExcite(width) if se else nn.Identity()
        self.project, self.bn3 = conv(width, c, 1), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn2(self.depthwise(F.relu6(self.bn1(self.expand(x))))))
        return x + self.bn3(self.project(self.se(y)))


class PreActivation(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), conv(i, o)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), conv(o, o)
        self.down = conv(i, o, 1) if i != o else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        shortcut = self.down(h) if self.down else x
        return self.conv2(F.relu(self.bn2(self.conv1(h)))) + shortcut


class Dropping(Basic):
    """Dropout written as a function, which a plain trace would freeze in the mode of the trace."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.dropout(F.relu(self.bn1(self.conv1(x))), 0.5, self.training)))
        return y + x


class SharedConv(nn.Module):
    """One convolution called twice: its rows cannot be removed for one call alone."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = conv(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(self.conv(x)))


class Biased(nn.Module):
    """Convolutions with bias and no normalisation."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(c, c, bias=True), conv(c, c, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x.add(self.conv2(torch.sigmoid(self.conv1(x))))


class Nested(nn.Module):
    """A residual block around another."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.inner, self.post = Basic(c, c), conv(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.post(self.inner(x))


class Tied(nn.Module):
    """One block called three times."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.block = Basic(c, c)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x


class Normed(nn.Module):
    """Weights that are computed from others."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1 = nn.utils.parametrizations.weight_norm(conv(c, c))
        self.conv2 = conv(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class Reparameterised(nn.Module):
    """RepVGG: two layers side by side, no branch."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv3, self.conv1 = conv(c, c), conv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv3(x) + self.conv1(x))


class UsedElsewhere(nn.Module):
    """The branch's output is also concatenated: skipping it would change what else reads it."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.branch, self.merge = conv(c, c), conv(2 * c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return self.merge(torch.cat([x + y, y], 1))


class HeavyShortcut(nn.Module):
    """Both sides are deep: neither is a shortcut."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.left = nn.Sequential(conv(c, c), nn.ReLU(), conv(c, c))
        self.right = nn.Sequential(conv(c, c), nn.ReLU(), conv(c, c))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class Unused(Basic):
    """A dead branch in forward, and parameters that forward never reads."""

    def __init__(self, c: int) -> None:
        super().__init__(c, c)
        self.spare = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.conv1(x)
        return super().forward(x)


class Res2(nn.Module):
    """Res2Net: channels in slices, each convolution also gets the one before's output."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(c, 12, 1), nn.BatchNorm2d(12)
        self.convs = nn.ModuleList(conv(4, 4) for _ in range(2))
        self.conv3, self.bn3 = conv(12, c, 1), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(F.relu(self.bn1(self.conv1(x))), 4, 1)
        outputs: list[Tensor] = []
        for i, layer in enumerate(self.convs):
            outputs.append(F.relu(layer(parts[i] + outputs[-1] if i else parts[i])))
        return F.relu(self.bn3(self.conv3(torch.cat([*outputs, parts[2]], 1))) + x)


class Ghost(nn.Module):
    """GhostNet: half of the hidden channels are made from the other half by a cheap depthwise convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.primary, self.bn1 = conv(c, 8, 1), nn.BatchNorm2d(8)
        self.cheap, self.bn2 = conv(8, 8, groups=8), nn.BatchNorm2d(8)
        self.project = conv(16, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.bn1(self.primary(x)))
        return x + self.project(torch.cat([first, F.relu(self.bn2(self.cheap(first)))], 1))


class Fuse(nn.Module):
    """HRNet: two resolutions exchange; the fusing additions are no blocks."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.high, self.low = Basic(c, c), Basic(c, 2 * c, 2)
        self.up, self.down = conv(2 * c, c, 1), conv(c, 2 * c, stride=2)
        self.merge = conv(3 * c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        high, low = self.high(x), self.low(x)
        fused_high = F.relu(high + F.interpolate(self.up(low), scale_factor=2))
        fused_low = F.relu(low + self.down(high))
        return self.merge(torch.cat([fused_high, F.interpolate(fused_low, scale_factor=2)], 1))


class Aggregation(nn.Module):
    """DLA: a root reads two blocks' outputs and adds the last of them."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.second = Basic(c, c), Basic(c, c)
        self.root, self.bn = conv(2 * c, c, 1), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(a)
        return F.relu(self.bn(self.root(torch.cat([b, a], 1))) + b)


class CrossStage(nn.Module):
    """CSP: blocks on one half of the channels, then a concatenation with the other half."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.expand, self.blocks = conv(c, 2 * c, 1), nn.Sequential(Basic(c, c), Basic(c, c))
        self.merge = conv(2 * c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = self.expand(x).chunk(2, 1)
        return self.merge(torch.cat([self.blocks(worked), kept], 1))


class ScaledAndDropped(nn.Module):
    """Layer scale, and one drop path module that is called by both branches."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.branch1 = nn.Sequential(conv(c, 6), nn.GELU(), conv(6, c))
        self.branch2 = nn.Sequential(conv(c, 5), nn.GELU(), conv(5, c))
        self.gamma = nn.Parameter(torch.full((c, 1, 1), 0.1))
        self.drop_path = DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma * self.branch1(x))
        return x + self.drop_path(self.gamma * self.branch2(x))


class ChannelsLast(nn.Module):
    """ConvNeXt: the MLP of the branch works on (B, H, W, C)."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.depthwise, self.norm = conv(c, c, groups=c), nn.LayerNorm(c)
        self.fc1, self.fc2 = nn.Linear(c, 3 * c), nn.Linear(3 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.fc2(F.gelu(self.fc1(y))).permute(0, 3, 1, 2)


class Response(ChannelsLast):
    """ConvNeXt V2: global response norm between, which adds a constant behind and needs zeros before."""

    def __init__(self, c: int) -> None:
        super().__init__(c)
        self.grn = GlobalResponseNorm(3 * c)
        nn.init.normal_(self.grn.weight)
        nn.init.normal_(self.grn.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.fc2(self.grn(F.gelu(self.fc1(y)))).permute(0, 3, 1, 2)


class InPlace(Basic):
    """Chains of in-place operations, on views of what is read later."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y))
        y += x
        return y.clamp_(min=0).mul_(2)


class AfterAdd(Basic):
    """Squeeze-and-excitation behind the addition."""

    def __init__(self, c: int) -> None:
        super().__init__(c, c)
        self.se = SqueezeExcite(c)

    def forward(self, x: Tensor) -> Tensor:
        return self.se(super().forward(x))


class TwoReaders(nn.Module):
    """The hidden channels are read by two layers, one of them behind a bias: a mask for each."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.bn = conv(c, 6), nn.BatchNorm2d(6)
        self.left, self.right = conv(6, c), conv(6, c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return x + (self.left(y) * self.right(self.bn(y)))


class Looping(Basic):
    """Control flow on shapes, and sizes computed from them."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.conv1(x).reshape(b, c // 2, 2, h * w).flatten(1, 2).view(b, c, h, w)
        for _ in range(h // 8):
            y = F.relu(self.bn1(y))
        grid = torch.arange(w, dtype=x.dtype, device=x.device).expand(b, c, h, w)
        return x + self.bn2(self.conv2(y)) + 0.01 * grid if x.size(-1) > 2 else x


def tied(*names: str) -> "Network":
    """Make a network of two blocks in which two layers have one weight."""
    network = Network(Basic(8, 8), Basic(8, 8))
    first, second = (network.get_submodule(name) for name in names)
    second.weight = first.weight
    return network


class Windows(nn.Module):
    """EfficientViT: layers of the branch run on windows, whose number is folded with the batch."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(c, c, 1), conv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = x.view(b, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(4 * b, c, h // 2, w // 2)
        y = self.conv2(F.relu(self.conv1(y))).view(b, 2, 2, c, h // 2, w // 2)
        return x + y.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


class GroupNormed(nn.Module):
    """Group norm mixes channels: closed ones save their own layer, but nothing behind the norm."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = conv(c, c), nn.GroupNorm(2, c), conv(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.norm(self.conv1(x))))


class Network(nn.Module):
    def __init__(self, *blocks: nn.Module, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(self.blocks(self.stem(torch.zeros(2, 3, 8, 8))).shape[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    units: tuple[int, ...]
    """Units of each block that should be found, in order; 0: no channel gate."""
    reason: str = ""
    """Part of the reason of the one addition that should be refused, or of the missing channel gate."""


CASES = {
    "basic": Case(lambda: Network(Basic(8, 8), Basic(8, 16, 2)), (8, 16)),
    "bottleneck": Case(lambda: Network(Bottleneck(8, 4)), (4,)),
    "grouped": Case(lambda: Network(Bottleneck(8, 16, groups=4)), (4,)),
    "inverted": Case(lambda: Network(Inverted(8, 24)), (24,)),
    "squeeze-excite": Case(lambda: Network(Inverted(8, 24, se=True)), (24,)),
    "pre-activation": Case(lambda: Network(PreActivation(8, 8), PreActivation(8, 16)), (8, 16)),
    "functional dropout": Case(lambda: Network(Dropping(8, 8)), (8,)),
    "biased": Case(lambda: Network(Biased(8)), (8,)),
    "unused state": Case(lambda: Network(Unused(8)), (8,)),
    "shared weights": Case(lambda: Network(SharedConv(8)), (0,), "more than once"),
    "nested": Case(lambda: Network(Nested(8)), (8, 0), "branch's own output"),
    "tied": Case(lambda: Network(Tied(8)), (0, 0, 0), "more than once"),
    "weight norm": Case(lambda: Network(Normed(8)), (0,), "its weight is computed"),
    "reparameterised": Case(lambda: Network(Reparameterised(8)), (), "side by side"),
    "used elsewhere": Case(lambda: Network(UsedElsewhere(8)), (), "used elsewhere"),
    "res2net": Case(lambda: Network(Res2(8)), (12,)),
    "ghost": Case(lambda: Network(Ghost(8)), (8,)),
    "hrnet": Case(lambda: Network(Fuse(8)), (8, 16), "does not start at"),
    "dla": Case(lambda: Network(Aggregation(8)), (8, 8), "instead of one"),
    "csp": Case(lambda: Network(CrossStage(8)), (8, 8)),
    "layer scale, drop path called twice": Case(lambda: Network(ScaledAndDropped(8)), (6, 5)),
    "nhwc": Case(lambda: Network(ChannelsLast(8)), (24,)),
    "global response norm": Case(lambda: Network(Response(8)), (24,)),
    "in place": Case(lambda: Network(InPlace(8, 8)), (8,)),
    "squeeze-excite after the add": Case(lambda: Network(AfterAdd(8)), (8,)),
    "two readers": Case(lambda: Network(TwoReaders(8)), (6,)),
    "looping": Case(lambda: Network(Looping(8, 8)), (8,), "does not depend on the input"),
    "windows": Case(lambda: Network(Windows(8)), (0,), "folded with another"),
    "group norm": Case(lambda: Network(GroupNormed(8)), (8,), "'blocks_0_norm' (GroupNorm), which may mix them"),
    "tied within a block": Case(lambda: tied("blocks.0.conv1", "blocks.0.conv2"), (0, 8), "used more than once"),
    "tied across blocks": Case(lambda: tied("blocks.0.conv1", "blocks.1.conv2"), (0, 8), "used more than once"),
    "tied norms": Case(lambda: tied("blocks.0.bn1", "blocks.1.bn1"), (8, 8), ""),
    "no residual": Case(lambda: Network(nn.Sequential(conv(8, 8), nn.ReLU())), ()),
    "heavy shortcut": Case(lambda: Network(HeavyShortcut(8)), (), "no shortcut"),
}
GATABLE = [name for name, case in CASES.items() if case.units]


def make(name: str, seed: int = 0) -> nn.Module:
    """A network of the table in eval mode, with statistics and affine parameters that are not trivial."""
    torch.manual_seed(seed)
    network = CASES[name].build()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def images(batch: int = 4, size: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
