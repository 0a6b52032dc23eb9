"""What decides during training is one of a list of controllers."""

import pytest
import torch
from torch import nn

import gatefit
from gatefit.errors import CheckpointError
from gatefit.inputs.data import read_data
from gatefit.inputs.models import InputSpec
from gatefit.recipe import FinetunePart
from gatefit.training.trainer import Trainer

SPEC = InputSpec((3, 8, 8), (0.3,) * 3, (0.35,) * 3)


class Counting:
    """Counts what it is asked, and keeps the count in checkpoints."""

    def __init__(self, penalty=None):
        self.begun = self.steps = 0
        self.term = penalty

    def begin(self):
        self.begun += 1

    def penalty(self):
        return self.term

    def step(self, step, steps, average):
        assert step == self.steps and average(2.0) == 2.0
        self.steps += 1

    def state(self):
        return {"steps": self.steps}

    def restore(self, state):
        self.steps = state["steps"]


@pytest.fixture(scope="module")
def images():
    return read_data("digits", SPEC).train.select(torch.arange(128))


def trained(images, controllers, epochs=1, share=None, **more):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    settings = FinetunePart(epochs=epochs, batch_size=64, augment=False)
    trainer = Trainer(model, images, SPEC, settings, stage="test", seed=0, controllers=controllers, share=share)
    return trainer.run(**more)


def test_each_controller_is_called_and_the_share_is_noted(images):
    controllers = [Counting(), Counting()]
    (epoch,) = trained(images, controllers, share=lambda: 0.25)
    assert [(c.begun, c.steps) for c in controllers] == [(1, 2)] * 2
    assert epoch.share == 0.25
    assert trained(images, [])[0].share == 1.0


def test_penalties_add_up(images):
    (plain,), (priced,) = (
        trained(images, [Counting(penalty=p), Counting(penalty=q)])
        for p, q in ((None, None), (torch.tensor(1.0), torch.tensor(2.0)))
    )
    assert priced.loss == pytest.approx(plain.loss + 3, rel=1e-5)


def test_each_state_is_restored(images, tmp_path):
    file = tmp_path / "c.safetensors"
    trained(images, [Counting(), Counting()], checkpoint=file)
    controllers = [Counting(), Counting()]
    trained(images, controllers, epochs=2, checkpoint=file, resume=True)
    assert [(c.begun, c.steps) for c in controllers] == [(0, 4)] * 2
    with pytest.raises(CheckpointError, match="damaged or of another run"):
        trained(images, [Counting()], epochs=2, checkpoint=file, resume=True)


def test_the_old_name_of_on_progress_works_with_a_note(images):
    from networks import Basic, Network

    torch.manual_seed(0)
    model = Network(Basic(8, 8)).eval()
    gated = gatefit.retrofit(model, torch.zeros(2, *SPEC.shape), "c", "step")
    stages = set()
    settings = FinetunePart(epochs=0, batch_size=64)
    with pytest.warns(FutureWarning, match="on_progress"):
        gatefit.finetune(gated, images, model, target=0.9, settings=settings, report=lambda p: stages.add(p.stage))
    assert {"initialise", "reconstruct"} <= stages
