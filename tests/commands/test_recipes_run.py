"""Every recipe runs end to end on a few images, its networks with random weights."""

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from PIL import Image
from places import RECIPES

from gatefit.commands.convert import convert
from gatefit.inputs.models import build, parse_reference
from gatefit.recipe import read_recipe


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten classes of two images in each split."""
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "test"):
        for c in range(10):
            (folder / split / f"class{c}").mkdir(parents=True)
            for i in range(2):
                colour = (25 * c, 120 * i, 90 if split == "train" else 100)
                Image.new("RGB", (40, 40), colour).save(folder / split / f"class{c}" / f"{i}.png")
    return folder


QUICK = ("cifar10-resnet20", "cifar10-resnet20-faithful", "imagenet-efficientnet-lite0")


@pytest.mark.parametrize(
    "file", [pytest.param(f, id=f.stem, marks=[] if f.stem in QUICK else [pytest.mark.slow]) for f in RECIPES]
)
def test_every_recipe_runs(file, images, tmp_path):
    recipe = read_recipe(file)
    weights = ""
    if not recipe.baseline.epochs and "scratch" not in file.stem:
        weights = str(tmp_path / "weights.safetensors")
        safetensors.torch.save_file(build(parse_reference(recipe.model.name)).state_dict(), weights)
    short = replace(
        recipe,
        model=replace(
            recipe.model, weights=weights, pretrained=False, image_size=min(32, recipe.model.image_size or 32)
        ),
        data=replace(recipe.data, name=str(images)),
        baseline=replace(recipe.baseline, epochs=min(1, recipe.baseline.epochs), batch_size=10),
        finetune=replace(
            recipe.finetune,
            epochs=min(1, recipe.finetune.epochs),
            lr=1e-4,
            batch_size=10,
            compile=False,
        ),
        closing=replace(recipe.closing, bn_recalibration_images=10),
    )
    done = convert(short, tmp_path / "out")
    assert done.evaluation.images == 20 and torch.isfinite(torch.tensor(done.evaluation.macs_sequential))
    assert (tmp_path / "out" / "report.html").is_file()
