"""Progress as lines, for pipes and files: the first at once, then one now and then, and the last."""

import io

import pytest
import torch
from networks import images, make
from rich.console import Console

import gatefit
from gatefit.commands.display import TrainingBar
from gatefit.progress import SECONDS, Lines, Progress, silent
from gatefit.recipe import FinetunePart


def test_a_stage_has_a_line_at_once_then_now_and_then_and_at_its_end():
    lines, now = [], [0.0]
    show = Lines(lines.append, lambda: now[0])
    for step in range(1, 31):
        show(Progress("fine-tune", step, 30, 0.5, 0.25, 0.125))
        now[0] += SECONDS / 10
    assert [line.split()[1] for line in lines] == ["1/30", "11/30", "21/30", "30/30"]
    assert lines[0] == "fine-tune 1/30  loss 0.500  acc 25.0 %  MACs 12.5 %"
    show(Progress("evaluate", 5, 100))
    show(Progress("evaluate", message="almost there"))
    assert lines[4:] == ["evaluate 5/100", "almost there"]


def test_a_bar_without_a_terminal_writes_lines_while_the_work_goes_on():
    stream = io.StringIO()
    with TrainingBar(Console(file=stream, markup=False)) as bar:
        bar(Progress("fine-tune", 1, 1000, 0.5))
        assert stream.getvalue() == "fine-tune 1/1000  loss 0.500\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_finetune_tells_where_it_stands(quiet, capsys):
    gated = gatefit.retrofit(make("basic"), images(), "lc", "step")
    data, settings = (images(8), torch.arange(8) % 10), FinetunePart(epochs=1, batch_size=4, flip=False)
    how = {"on_progress": silent} if quiet else {}
    gatefit.finetune(gated, data, make("basic"), target=0.8, settings=settings, **how)
    assert ("fine-tune 1/2" in capsys.readouterr().err) != quiet
