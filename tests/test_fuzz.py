"""Mutated recipes, folders, images and calls: a GatefitError of one line, or what is right; nothing else.

`pytest tests/test_fuzz.py` runs some 2,000 cases, with `--long` 50,000. A case hangs on its number alone: the failure
names it, and `case(number)` of the test makes it again.
"""

import json
import random
import shutil
import tomllib
import warnings
from dataclasses import asdict
from io import BytesIO

import numpy as np
import pytest
import torch
from mutate import ODD, mutate_bytes, mutate_value
from networks import images, make
from PIL import Image

import gatefit
from gatefit.commands.deploy import load_deployed, write_deployment
from gatefit.commands.report.result import read_result
from gatefit.deployment.info import deployed_info
from gatefit.errors import GatefitError
from gatefit.files import json_digest, write_tensors
from gatefit.gating.original import load_original
from gatefit.inputs.data import read_data
from gatefit.inputs.loader import loader
from gatefit.inputs.models import InputSpec
from gatefit.recipe import Recipe, portable, read_recipe, recipe_from, with_settings, write_recipe

LONG = 25
"""How many times as many cases `--long` runs."""


def run(case, count, request):
    """Run `case` for each number; whatever is raised but a GatefitError of one line is a failure with its number."""
    times = LONG if request.config.getoption("--long") else 1
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count * times):
            try:
                case(random.Random(number))
            except GatefitError as error:
                text = str(error)
                if "\n" in text or not 10 < len(text) < 1500:
                    raise AssertionError(f"case {number}: {text[:300]!r}, {len(text)} characters") from None
                refused += 1
            except BaseException as error:
                raise AssertionError(f"case {number}: {type(error).__name__}: {str(error)[:300]}") from error
    return refused, count * times


def test_recipes(tmp_path, request):
    whole = tomllib.loads(write_recipe(Recipe()))
    file = tmp_path / "recipe.toml"

    def case(choose):
        if choose.random() < 0.3:
            file.write_bytes(mutate_bytes(write_recipe(Recipe()).encode(), choose))
            recipe = read_recipe(file)
        elif choose.random() < 0.3:
            part = choose.choice(list(whole))
            key = f"{part}.{choose.choice(list(whole[part]))}" if isinstance(whole[part], dict) else part
            recipe = with_settings(Recipe(), [f"{key}={choose.choice(ODD)}"])
        else:
            recipe = recipe_from(mutate_value(whole, choose))
        file.write_text(write_recipe(portable(recipe, tmp_path)), encoding="utf-8")
        again = read_recipe(file)
        assert portable(again, tmp_path) == portable(recipe, tmp_path)
        for table in asdict(recipe).values():
            for value in table.values() if isinstance(table, dict) else [table]:
                assert not isinstance(value, int | float) or abs(value) <= 1e308

    refused, cases = run(case, 900, request)
    assert cases // 4 < refused < cases


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of an own network with a deployment and figures, and what it answers."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    gated = gatefit.retrofit(make("basic"), images(), "lc", "step").eval()
    for module in gated.gatefit.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=2.0)
    write_tensors(folder / "original.safetensors", make("basic").state_dict())
    gatefit.save(gated, folder, classes=["a", "b"])
    deployed = gatefit.deploy(gated, images(), tuned=False)
    write_deployment(folder, deployed_info(deployed).plans)
    gate = {"name": "g", "units": 3, "block_open": 1, "channel_open": 0.5, "distinct": 1, "always": 1, "never": 0}
    epoch = {"epoch": 1, "loss": 0.5, "accuracy": 0.5, "share": 0.5, "lr": 0.1}
    figures = {
        "accuracy": 0.5, "agreement": 0.5, "macs_sequential": 5.0, "macs_parallel": 6.0, "share": 0.5, "macs_std": 0.1,
        "macs_min": 4.0, "macs_max": 6.0, "paths": 2,
    }  # fmt: skip
    report = {
        "model": "m", "data": "d", "seed": 0, "labels": True, "images": 9, "dense": {"accuracy": 0.5, "macs": 10},
        "gated": figures, "histogram": {"edges": [0, 1], "counts": [9]}, "gates": [gate], "history": [epoch],
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    row = {"engine": "torch", "batch": 1, "threads": 1, "macs_share": 0.5, "time_share": 0.5}
    (folder / "bench.json").write_text(json.dumps({"rows": [row]}))
    with torch.no_grad():
        return folder, gated(images()), deployed(images())


def test_folders(saved, tmp_path, request):
    whole, answers, fast = saved
    folder = tmp_path / "run"

    def case(choose):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        name = choose.choice(["config.json", "config.json", "deployment.json", "report.json", "bench.json",
                              "model.safetensors", "original.safetensors"])  # fmt: skip
        file, sealed = folder / name, False
        if name.endswith(".json") and choose.random() < 0.7:
            content = mutate_value(json.loads(file.read_text()), choose)
            sealed = choose.random() < 0.5 and isinstance(content, dict) and "digest" in content
            try:
                if sealed:
                    content["digest"] = json_digest({k: v for k, v in content.items() if k != "digest"})
            except ValueError:
                sealed = False  # no JSON number
            file.write_text(json.dumps(content))
        else:
            file.write_bytes(mutate_bytes(file.read_bytes(), choose))
        with torch.no_grad():
            if name in ("report.json", "bench.json"):
                read_result(folder)
            elif name == "deployment.json":
                deployed = load_deployed(folder, make("basic"))
                assert sealed or torch.equal(deployed(images()), fast)
            else:
                gated = gatefit.load(folder, make("basic"))
                load_original(folder)
                assert sealed or torch.equal(gated(images()), answers)

    refused, cases = run(case, 500, request)
    assert cases // 3 < refused < cases


def test_image_folders(tmp_path, request):
    spec = InputSpec((3, 16, 16))
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    encoded = {}
    for kind in ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF"):
        stream = BytesIO()
        Image.fromarray(pixels).save(stream, kind)
        encoded[kind] = stream.getvalue()

    def case(choose):
        root = tmp_path / "photos"
        shutil.rmtree(root, ignore_errors=True)
        for split in choose.choice([["train", "val"], ["train", "test"], [""], ["Train", "validation"], ["val"]]):
            for label in ("cat", "dog")[: choose.choice([2, 2, 2, 1, 0])]:
                (root / split / label).mkdir(parents=True, exist_ok=True)
                for i in range(choose.choice([4, 4, 1, 0])):
                    kind = choose.choice(list(encoded))
                    data = encoded[kind]
                    if choose.random() < 0.15:
                        data = mutate_bytes(data, choose)
                    (root / split / label / f"{i}.{choose.choice([kind.lower(), 'jpg', 'txt'])}").write_bytes(data)
        root.mkdir(exist_ok=True)
        if choose.random() < 0.2:
            (root / choose.choice(["metadata.csv", "metadata.jsonl"])).write_bytes(
                mutate_bytes(b"file_name,label\n0.png,cat\n", choose)
            )
        splits = read_data(str(root), spec, choose.choice(["refuse", "skip"]), choose.randrange(3))
        for part in (splits.train, splits.test):
            assert (
                part.labels is None
                or not len(part)
                or (part.labels.min() >= 0 and part.labels.max() < len(part.classes))
            )
            batches = list(loader(part, [list(range(len(part)))] if len(part) else []))
            assert sum(len(x) for x, _, _ in batches) == len(part)
            assert all(x.shape[1:] == (3, 16, 16) for x, _, _ in batches)

    refused, cases = run(case, 400, request)
    assert refused < cases


def test_calls(request):
    gated = gatefit.retrofit(make("basic"), images(), "lc", "step").eval()
    network, x = make("basic"), images()
    with torch.no_grad():
        answers = network(x)
    tensors = [x, x[:1], x[:0], x[0], x[:, :1], x[..., :3], x.double(), x.half(), x * float("nan"), x * 1e30]
    fitting = [x, x[:1], x[:0], x * 1e30]
    labels = [torch.zeros(n).long() + value for n in (4, 3, 0) for value in (0, 1, 10**6)]
    words, numbers = ["", "x", "lc", "c", "step", "relu1", "torch", "parallel", "a\nb", "nul\0l"], [-1, 0, 1, 3, 10**6]

    def case(choose):
        kind = choose.randrange(4)
        with torch.no_grad():
            if kind == 0:
                example, gates = choose.choice(tensors), choose.choice(["lc", "c", *words])
                made = gatefit.retrofit(network, example, gates, choose.choice(["step", *words]), choose.random() < 0.5)
                assert torch.equal(made.eval()(x), answers)
            elif kind == 1:
                data = (choose.choice(fitting), choose.choice(labels))
                figures = gatefit.evaluate(gated, data, choose.choice([None, network]))
                assert figures.accuracy is None or 0 <= figures.accuracy <= 1
            elif kind == 2:
                deployed = gatefit.deploy(
                    gated, choose.choice(fitting), choose.choice(["torch", *words]), choose.choice([4, *numbers]),
                    tuned=False, batch=choose.choice([1, *numbers[:-1]]),
                    placement=choose.choice(["sequential", *words]),
                )  # fmt: skip
                assert torch.allclose(deployed(x), answers, atol=1e-4)
            else:
                gatefit.load(choose.choice(words), choose.choice([None, network]))

    refused, cases = run(case, 200, request)
    assert refused < cases
