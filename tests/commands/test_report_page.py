"""The words and axes of report.html."""

import pytest

from gatefit.commands.report.page import render, without_folders
from gatefit.commands.report.pictures import accuracy_against_macs, training
from gatefit.commands.report.result import Result


def report(accuracy: float) -> dict:
    gated = {"accuracy": accuracy, "agreement": 1.0, "macs_sequential": 1e6, "macs_parallel": 2e6}
    dense = {"accuracy": accuracy, "macs": 3e6}
    return {
        "model": "/home/ada/nets/mine.py:build",
        "data": "/home/ada/photos",
        "seed": 0,
        "images": 10,
        "dense": dense,
        "gated": gated,
        "history": [{"epoch": e, "loss": 1.0, "accuracy": a, "share": s} for e, a, s in ((1, 0.9, 1.0), (2, 1.0, 0.6))],
    }


def test_the_page_names_no_folder_of_the_machine():
    page = render("mine", report(0.9), [])
    assert "<title>mine: mine.py:build</title>" in page and "10 images of photos" in page
    assert "/home" not in page


@pytest.mark.parametrize("name", ["resnet50", "timm/resnet50", "torch/cifar10", "digits"])
def test_names_that_are_no_paths_stay(name):
    assert without_folders(name) == name


@pytest.mark.parametrize("accuracy", [1.0, 0.99, 0.5])
def test_the_accuracy_axis_ends_at_100_percent(accuracy):
    figure = accuracy_against_macs(Result("mine", report(accuracy), []), [])
    low, high = figure.axes[0].get_ylim()
    assert low < accuracy <= high <= 1.0


def test_shares_by_epoch_end_at_100_percent():
    loss, *shares = training(report(0.9)["history"]).axes
    assert loss.get_ylim()[1] > 1.0
    assert len(shares) == 2 and all(axes.get_ylim()[1] <= 1.0 for axes in shares)
