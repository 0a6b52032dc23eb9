"""Networks that cannot be traced as a whole: their largest parts are, and the Python around them stays."""

import copy

import pytest
import torch
from networks import Basic, images
from torch import Tensor, nn

import gatefit
from gatefit.errors import ConversionError, DeployError, GatefitError
from gatefit.gating.cost import costs_of, decisions_of
from gatefit.gating.gates import gates_of, is_gate_key
from gatefit.gating.info import info_of
from gatefit.gating.initialise import initialise_from_data
from gatefit.gating.insert import find_blocks
from gatefit.gating.measure import measure
from gatefit.graph.partial import parts_of
from gatefit.inputs.data import as_images
from gatefit.recipe import ClosingPart, FinetunePart


class Branching(nn.Module):
    """An `if` on values stands between two residual stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Sequential(Basic(8, 8), Basic(8, 16, 2))
        self.second = nn.Sequential(Basic(16, 16), Basic(16, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        if x.mean() > -1e6:
            x = x / 2
        if x.abs().max() < 1e6:
            x = self.second(x)
        return self.head(x.mean((2, 3)))


class Options(Branching):
    """A stage is called with options, and the Python around it reads its attributes."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Basic(8, 8), Basic(8, 8)])
            self.width = 8

        def forward(self, size: int, x: Tensor, *rest: float, scale: float = 1.0, **options: bool) -> dict[str, Tensor]:
            for block in self.blocks:
                x = block(x) * scale
            return {"x": x * size}

    def __init__(self) -> None:
        super().__init__()
        self.stage = self.Stage()
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.stage(self.stage.width, self.stem(x), 1.0, scale=self.scale, flag=True)["x"]
        assert isinstance(self.stage, self.Stage)
        if y.mean() > 1e6:
            return y
        return self.head(torch.cat([y, y], 1).mean((2, 3)))


class Variadic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Sequential(Basic(8, 8), Basic(8, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.head(self.body(self.stem(args[0])).mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def _made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


PARTIAL = {Branching: ["first", "second"], Options: ["stage"]}


@pytest.mark.parametrize("kind", PARTIAL)
@pytest.mark.parametrize(("gates", "compensation"), [("lc", False), ("l", False), ("c", True)])
def test_the_largest_parts_are_traced_and_the_conversion_is_proved(kind, gates, compensation):
    model = _made(kind)
    x = images(5)
    gated = gatefit.retrofit(model, images(), gates, compensation=compensation).eval()
    assert list(parts_of(gated)) == PARTIAL[kind]
    assert type(gated) is kind and torch.equal(model(x), gated(x))
    assert info_of(gated).verification.outputs == 10
    assert {k for k in gated.state_dict() if not is_gate_key(k)} == set(model.state_dict())
    found = find_blocks(model, images())
    assert set(gates_of(gated)) == {b.name for b in found.blocks} and list(found.parts) == PARTIAL[kind]
    assert not any(type(m).__name__ == "Gate" for m in model.modules()) and "forward" not in model.__dict__


@pytest.mark.parametrize("kind", [Variadic, Encoder])
def test_what_torch_fx_alone_does_not_trace_is_traced_whole(kind):
    model = _made(kind)
    x = images(5)
    gated = gatefit.retrofit(model, images(), "lc").eval()
    assert isinstance(gated, torch.fx.GraphModule) and len(gates_of(gated)) == 2
    assert torch.allclose(model(x), gated(x), atol=1e-6)


def test_macs_are_those_of_the_whole_network():
    gated = gatefit.retrofit(_made(Branching), images(), "lc")
    whole = find_blocks(nn.Sequential(*[m for m in _made(Branching).children()][:3]), images())
    costs = costs_of(gated, (3, 8, 8))
    assert costs.dense == whole.macs + 16 * 5 == find_blocks(_made(Branching), images()).macs
    assert costs_of(gated, (3, 16, 16)).dense == 4 * whole.macs + 16 * 5
    gated(images(3))
    one = costs.per_image(decisions_of(gated))
    assert one.shape == (3,) and float(one[0]) == costs.dense + sum(b.gate for b in costs.blocks)


def test_gates_of_a_part_that_did_not_run_count_as_closed():
    gated = gatefit.retrofit(_made(Branching), images(), "lc").eval()
    gated(images(4))
    with torch.no_grad():
        gated.stem.weight.mul_(1e12)
    gated(images(3))
    decided = decisions_of(gated).blocks
    assert bool(decided["first.0"].runs.all()) and not bool(decided["second.0"].runs.any())
    assert decided["second.0"].runs.shape == (3,)


def test_copies_are_independent_and_follow_their_own_weights():
    gated = gatefit.retrofit(_made(Branching), images(), "lc").eval()
    twin = copy.deepcopy(gated).to(torch.float64)
    x = images(2)
    before = gated(x)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(gated(x), before) and not twin(x.double()).any()


def test_a_part_that_runs_twice_for_a_batch_is_refused():
    class Looping(Branching):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.stem(x))
            for _ in range(1 if x.abs().max() < 1e6 else 2):
                x = self.second(x)
            return self.head(x.mean((2, 3)))

    gated = gatefit.retrofit(_made(Looping), images(), "lc").eval()
    for _ in range(2):
        gated(images())
        gated.second(torch.zeros(1, 16, 4, 4))  # by itself it may run as often as one likes
    with pytest.raises(GatefitError, match="second runs more than once for a batch"):
        gated(images() * 1e9)
    gated(images())


def test_pickling_is_refused_with_the_call_that_works(tmp_path):
    with pytest.raises(GatefitError, match=r"call gatefit\.save"):
        torch.save(gatefit.retrofit(_made(Branching), images(), "lc"), tmp_path / "file")


def test_other_arguments_than_the_ones_it_was_traced_with_are_refused():
    gated = gatefit.retrofit(_made(Options), images(), "lc").eval()
    gated.scale = 3.0
    with pytest.raises(GatefitError, match="stage is called with other arguments"):
        gated(images())


def test_the_steps_of_a_conversion(tmp_path):
    model = _made(Branching)
    data = (torch.rand(64, 3, 8, 8), torch.randint(5, (64,)))
    gated = gatefit.retrofit(model, images(), "lc", form="step", compensation=True)
    settings = FinetunePart(epochs=1, batch_size=16, augment=False)
    closing = ClosingPart(target=0.7, reconstruction_images=32, ramp=0.0)
    gatefit.finetune(gated, data, model, settings=settings, closing=closing)
    result = gatefit.evaluate(gated, data, model)
    assert 0.5 < result.share < 0.9
    gatefit.save(gated, tmp_path / "run")
    again = gatefit.load(tmp_path / "run", model=_made(Branching))
    assert torch.equal(again(images(3)), gated(images(3)))
    with pytest.raises(DeployError, match="cannot be traced as a whole"):
        gatefit.deploy(gated, images(4))


def test_images_that_do_not_come_to_a_part_teach_its_gates_nothing():
    model = _made(Branching)
    pixels = images(48)
    pixels[16:32] = 0  # a batch of its own
    model.stem.bias.data.zero_()

    class Some(Branching):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(self.stem(x))
            return self.head((self.second(y) if x.std() > 0.5 else y).mean((2, 3)))

    model.__class__ = Some
    gated = gatefit.retrofit(model, images(), "lc", form="step", compensation=True).eval()
    data = as_images((pixels, torch.zeros(48, dtype=torch.long)), info_of(gated).input).train
    generator = torch.Generator().manual_seed(0)
    measures = measure(gated, data, [list(range(i, i + 16)) for i in (0, 16, 32)], generator)
    assert measures.reached["first.0"].sum() == len(data) == 48 and measures.reached["second.0"].sum() == 32
    assert len(measures.blocks["second.0"].pooled) == 32
    assert initialise_from_data(gated, data, 48, 16) > 0


def test_shared_submodules_are_left_alone():
    class Twice(Branching):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.stem(x))
            return self.head(self.second(self.second(x) if x.mean() < 1e6 else x).mean((2, 3)))

    gated = gatefit.retrofit(_made(Twice), images(), "lc")
    assert list(parts_of(gated)) == ["first"]


def test_a_network_without_any_part_is_refused_in_one_line():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x if x.mean() < 1e6 else -x).mean((2, 3)))

    with pytest.raises(ConversionError, match=r"cannot be traced by torch.fx.*nor has any part"):
        gatefit.retrofit(_made(Plain), images())
