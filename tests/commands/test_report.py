import re
from dataclasses import replace

import pytest
import torch

from gatefit.commands.report import pictures
from gatefit.commands.report.result import Result
from gatefit.commands.report.write import write_report
from gatefit.inputs.data import ImageSet
from gatefit.training.evaluate import Evaluation, GateUse

TITLES = ["accuracy", "macs", "extremes", "gates", "classes", "channels", "training", "time"]
HISTORY = [{"epoch": e, "loss": 2.0 / e, "accuracy": 0.5 + 0.1 * e, "share": 0.6, "lr": 0.1} for e in (1, 2, 3)]
BENCH = [{"engine": "torch", "batch": 1, "threads": 2, "macs_share": 0.5, "time_share": 0.7}]


def case(blocks=8, classes=10, images=40, units=6, block_gates=True):
    """What an evaluation of a network would give, made up."""
    random = torch.Generator().manual_seed(0)
    masks = {f"layer{i}": torch.rand(images, 1 + units, generator=random) < 0.6 for i in range(blocks)}
    for mask in masks.values():
        mask[:, 0] |= not block_gates
        mask[:, 1:] &= mask[:, :1]
    labels = torch.arange(images) % classes
    evaluation = Evaluation(
        images=images, accuracy=0.75, agreement=0.8, dense_accuracy=0.9, dense_macs=1000, macs_sequential=600.0,
        macs_parallel=700.0, macs=400 + 400 * torch.rand(images, generator=random, dtype=torch.float64), paths=images,
        gates=tuple(GateUse(n, units, 0.6, 0.6, 20, 1, 2) for n in masks),
        answers=(labels + 1) % classes, labels=labels, masks=masks,
    )  # fmt: skip
    pixels = torch.randint(0, 256, (images, 3, 8, 8), generator=random, dtype=torch.uint8)
    data = ImageSet("made up", images, pixels.__getitem__, labels, tuple(f"class {c}" for c in range(classes)), pixels)
    return evaluation, data


def result(name="mine", history=HISTORY, bench=BENCH, data="cifar10", accuracy=0.75):
    report = {
        "model": "resnet<8>", "data": data, "seed": 0, "images": 40, "history": history,
        "dense": {"accuracy": 0.9, "macs": 1000},
        "gated": {"accuracy": accuracy, "agreement": 0.8, "macs_sequential": 600.0, "macs_parallel": 700.0},
    }  # fmt: skip
    return Result(name, report, bench)


def test_the_page_is_whole_and_needs_no_other_file(tmp_path):
    page = write_report(tmp_path, result(), [result("other")], *case()).read_text()
    assert re.findall(r'<img src="(data:image/png;base64),', page) == ["data:image/png;base64"] * len(TITLES)
    assert not re.search(r"(src|href)=.(?!data:)", page) and "resnet&lt;8&gt;" in page
    assert {f.name for f in tmp_path.iterdir()} == {"report.html", *(f"{t}.png" for t in TITLES)}


def test_what_is_missing_is_said(tmp_path):
    evaluation, data = case()
    evaluation = replace(evaluation, labels=None, accuracy=None, dense_accuracy=None)
    page = write_report(tmp_path, result(history=[], bench=[], accuracy=None), [], evaluation, data.unlabelled())
    words = page.read_text()
    for word in ("no accuracy without labels", "no labels that fit", "There was no training", "Not timed"):
        assert word in words
    assert {f.stem for f in tmp_path.glob("*.png")} == {"macs", "extremes", "gates"}


@pytest.mark.parametrize(("blocks", "classes", "images"), [(8, 10, 40), (54, 1000, 2000), (1, 2, 1)])
@pytest.mark.parametrize("block_gates", [True, False])
def test_any_number_of_blocks_and_classes(tmp_path, blocks, classes, images, block_gates):
    evaluation, data = case(blocks, classes, images, block_gates=block_gates)
    assert write_report(tmp_path, result(), [], evaluation, data).is_file()


def test_the_heat_maps_show_the_shares():
    evaluation, data = case(blocks=2)
    blocks = pictures.blocks_by_class(evaluation, data.labels, data.classes).axes[0]
    of_class_3 = evaluation.masks["layer1"][data.labels == 3]
    assert blocks.images[0].get_array()[1, 3] == pytest.approx(float(of_class_3[:, 0].float().mean()))
    assert [t.get_text() for t in blocks.get_xticklabels()] == list(data.classes)
    channels = pictures.channels_by_class(evaluation, data.labels, data.classes, "layer1").axes[0]
    assert channels.images[0].get_array()[3, 2] == pytest.approx(float(of_class_3[:, 3].float().mean()))


def test_blocks_that_always_run_are_shown_by_their_channels():
    evaluation, data = case(blocks=2, block_gates=False)
    shown = pictures.blocks_by_class(evaluation, data.labels, data.classes).axes[0].images[0].get_array()
    wanted = evaluation.masks["layer0"][data.labels == 0][:, 1:].float().mean()
    assert shown[0, 0] == pytest.approx(float(wanted))


def test_published_figures_stand_beside_the_same_data_alone():
    assert "published" in str([t.get_label() for t in pictures.accuracy_against_macs(result(), []).axes[0].lines])
    shown = pictures.accuracy_against_macs(result(data="digits"), [result("other")]).axes[0].lines
    assert "published" not in str([t.get_label() for t in shown])
    of_a_tar = pictures.accuracy_against_macs(result(data="/my/cifar10.tar"), []).axes[0].lines
    assert "published" in str([t.get_label() for t in of_a_tar])
    for data in ("torch/cifar100", "imagenette", "/my/cifar10/digits"):
        assert "published" not in str(
            [t.get_label() for t in pictures.accuracy_against_macs(result(data=data), []).axes[0].lines]
        )


def test_extremes_are_the_fewest_and_the_most():
    evaluation, data = case()
    shown = pictures.extremes(evaluation, data).axes
    order = evaluation.macs.argsort().tolist()
    for axes, index in zip(shown, order[: pictures.ROW] + order[::-1][: pictures.ROW], strict=True):
        assert torch.equal(torch.tensor(axes.images[0].get_array()), data.resident[index].permute(1, 2, 0))
        assert axes.get_title().split("\n")[1] == f"class {index % 10}"


def test_results_of_one_name_or_of_other_data_are_told_apart():
    figure = pictures.accuracy_against_macs(result("a"), [result("b"), result("b"), result("c", data="/x/digits.tar")])
    labels = [t.get_label() for t in figure.axes[0].lines]
    assert {"a", "b, 1", "b, 2", "c (on digits)"} <= set(labels)


def test_block_gates_alone_are_shown_as_blocks():
    evaluation, data = case(blocks=2, units=0, block_gates=False)
    shown = pictures.blocks_by_class(evaluation, data.labels, data.classes).axes[0].images[0].get_array()
    assert shown.min() == 1 and pictures.most_varied(evaluation) == ""


def test_pictures_of_an_earlier_page_go(tmp_path):
    write_report(tmp_path, result(), [], *case())
    write_report(tmp_path, result(bench=[]), [], *case())
    assert not (tmp_path / "time.png").exists() and (tmp_path / "macs.png").exists()
