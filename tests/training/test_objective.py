import torch
from networks import Basic, Network
from torch import nn

import gatefit
from gatefit.gating.gates import gates_of
from gatefit.training.objective import Teacher, feature_distance, with_outputs_of

IMAGES = torch.zeros(2, 3, 8, 8)


def network(channels=16):
    torch.manual_seed(0)
    return Network(Basic(8, 8), Basic(8, channels, 2), Basic(channels, channels)).eval()


def test_the_original_teaches_its_blocks_outputs():
    model = network()
    gated = gatefit.retrofit(model, IMAGES, "c", "step")
    teacher = Teacher(model, gated, features=True)
    student = with_outputs_of(gated, teacher.blocks)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        logits, outputs = student(x)
        wanted, wanted_outputs = teacher(x)
    assert len(teacher.blocks) == len(outputs) == 3
    assert torch.allclose(logits, wanted, atol=1e-4) and float(feature_distance(outputs, wanted_outputs)) < 1e-8
    gates_of(gated)["blocks.1"].channel.bias.data[:8] = -1
    with torch.no_grad():
        _, closed = student(x)
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(closed, wanted_outputs, strict=True)]
    assert same == [True, False, False] and float(feature_distance(closed, wanted_outputs)) > 1e-4


def test_the_distance_is_a_mean_over_images_in_units_of_variance():
    wanted = torch.randn(6, 4, 5, 5)
    off = wanted + 2 * wanted.flatten(1).std(1, correction=0)[:, None, None, None]
    assert torch.isclose(feature_distance((off,), (wanted,)), torch.tensor(4.0), rtol=1e-3)
    halves = [feature_distance((a,), (b,)) for a, b in zip(off.chunk(2), wanted.chunk(2), strict=True)]
    assert torch.isclose(sum(halves) / 2, feature_distance((off,), (wanted,)), rtol=1e-5)


def test_another_network_teaches_predictions_alone():
    gated = gatefit.retrofit(network(), IMAGES, "c", "step")
    untraceable = Untraceable()
    for other in (network(32), untraceable):
        teacher = Teacher(other, gated, features=True)
        assert teacher.blocks == () and teacher(torch.randn(2, 3, 8, 8))[1] == ()
    assert Teacher(network(), gated, features=False).blocks == ()


def test_the_student_shares_its_weights():
    gated = gatefit.retrofit(network(), IMAGES, "c", "step")
    student = with_outputs_of(gated, ())
    assert {id(p) for p in student.parameters()} == {id(p) for p in gated.parameters()}
    student.train()
    assert gates_of(gated)["blocks.1"].training


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, x):
        return self.fc(x.mean((2, 3))) if x.sum() > -1e9 else x


def test_of_many_blocks_some_are_compared_and_the_last_always():
    torch.manual_seed(0)
    model = Network(*(Basic(8, 8) for _ in range(20))).eval()
    gated = gatefit.retrofit(model, IMAGES, "c", "step")
    adds = [gate.of.add for gate in gates_of(gated).values()]
    assert Teacher(model, gated, features=True).blocks == tuple(adds[1::3]) and adds[1::3][-1] == adds[-1]
