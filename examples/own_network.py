"""A home-made residual network with twists. Try: gatefit inspect examples/own_network.py:build

- `Twin` adds two branches to its input: both are blocks.
- `Dense` concatenates instead of adding: refused, there is no addition; what follows it is not disturbed.
- `Late` has its squeeze-and-excitation behind the addition: the block is found, the squeeze runs for every image.
"""

import torch
from torch import Tensor, nn


def unit(i: int, o: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Twin(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(unit(c, 2 * c, 1), unit(2 * c, c))
        self.deep = nn.Sequential(unit(c, c), unit(c, c), unit(c, c))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.wide(x) + self.deep(x)


class Dense(nn.Module):
    def __init__(self, c: int, more: int) -> None:
        super().__init__()
        self.grow = unit(c, more)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.grow(x)], 1)


class Late(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(unit(c, c), nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, 4, 1), nn.ReLU(), nn.Conv2d(4, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x + self.branch(x))
        return y * self.squeeze(y).sigmoid()


def build(classes: int = 10) -> nn.Module:
    network = nn.Sequential(
        unit(3, 16), Twin(16), Dense(16, 16), nn.MaxPool2d(2), Late(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, classes),
    )  # fmt: skip
    network.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return network
