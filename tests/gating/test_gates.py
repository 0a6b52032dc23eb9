import pytest
import torch

from gatefit.gating.gates import LEAK, relu1, step
from gatefit.graph.ops import scale


def slope(function, at):
    x = torch.tensor(at, requires_grad=True)
    function(x).backward()
    return float(x.grad)


def test_relu1_values():
    x = torch.tensor([-2.0, 0.0, 0.25, 1.0, 3.0])
    assert relu1(x).tolist() == [0, 0, 0.25, 1, 1]
    assert relu1(x, LEAK).tolist() == pytest.approx([-0.02, 0, 0.25, 1, 1.02])


def test_relu1_is_leaky_outside_and_whole_at_the_corner():
    leaky = [slope(lambda x: relu1(x, LEAK), at) for at in (-1.0, 0.5, 1.0, 2.0)]
    assert leaky == pytest.approx([LEAK, 1, 1, LEAK])
    assert [slope(relu1, at) for at in (-1.0, 0.5, 2.0)] == [0, 1, 0]


def test_step_is_hard_forward_and_soft_backward():
    x = torch.tensor([-0.5, 0.0, 0.1, 4.0])
    assert step(x).tolist() == [0, 0, 1, 1]
    assert [slope(step, at) for at in (-2.0, -0.5, 0.5, 2.0)] == [0, 0.5, 0.5, 0]


def test_scale_covers_units_of_several_channels():
    value = torch.ones(2, 6, 3, 3)
    salience = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 0.0]])
    scaled = scale(value, salience, 1, 2)
    assert scaled[:, :, 0, 0].tolist() == [[0, 0, 0.5, 0.5, 1, 1], [1, 1, 1, 1, 0, 0]]
    last = scale(value.permute(0, 2, 3, 1), salience, 3, 2)
    assert torch.equal(last.permute(0, 3, 1, 2), scaled)
