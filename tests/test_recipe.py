from dataclasses import replace

import pytest
from places import RECIPES

from gatefit.errors import RecipeError
from gatefit.recipe import (
    RENAMED,
    ClosingPart,
    DataPart,
    FinetunePart,
    ModelPart,
    Recipe,
    field_docstrings,
    portable,
    read_recipe,
    with_settings,
    write_recipe,
)


def written(tmp_path, text):
    file = tmp_path / "r.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_every_recipe_parses_and_survives_a_round_trip(file, tmp_path):
    recipe = read_recipe(file)
    assert read_recipe(written(tmp_path, write_recipe(recipe))) == recipe


def test_complete_recipe_round_trip(tmp_path):
    recipe = Recipe(seed=3, finetune=FinetunePart(lr=0.5), closing=ClosingPart(l1=1e-4))
    recipe = replace(recipe, data=replace(recipe.data, name='a "b" \\c\n\x07'))
    assert read_recipe(written(tmp_path, write_recipe(recipe))) == recipe


def test_paths_are_relative_to_the_recipe(tmp_path):
    recipe = read_recipe(written(tmp_path, '[model]\nname = "../x.py:f"\nweights = "./w.safetensors"\n'))
    assert recipe.model.name == f"{tmp_path.parent}/x.py:f" and recipe.model.weights == f"{tmp_path}/w.safetensors"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[finetune]\nepoch = 3", "unknown recipe key 'finetune.epoch'; did you mean 'epochs'"),
        ("[finetunes]\nepochs = 3", "unknown recipe key 'finetunes'; did you mean 'finetune'"),
        ("finetune = 3", "must be a table"),
        ('[finetune]\nepochs = "many"', "'finetune.epochs' must be int, not 'many'"),
        ("[finetune]\nepochs = 1.5", "must be int"),
        ("[finetune]\nflip = 1", "must be bool"),
        ("[closing]\nl1 = -1", "l1 must be 0 or more"),
        ("[closing]\nl1 = 1\ntarget = 0.5", "not both"),
        ("[closing]\ntarget = 1.5", "between 0 and 1"),
        ('[gates]\nkinds = "x"', "must be one of 'lc', 'l', 'c'"),
        ("seed = ", "not valid TOML"),
    ],
)
def test_wrong_recipes_are_named(text, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        read_recipe(written(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_keys_are_read_with_a_note(old, new, tmp_path):
    (part, key), (new_part, new_key) = old.split("."), new.split(".")
    value = {
        "penalty": '"plain"',
        "precision": '"bf16"',
        "fill": "false",
        "recalibrate": "7",
        "refit": "7",
        "renew": "7",
    }
    text = value.get(key, "0.5")
    with pytest.warns(FutureWarning, match=f"'{old}' is now called '{new}'"):
        recipe = read_recipe(written(tmp_path, f"[{part}]\n{key} = {text}"))
    assert recipe == read_recipe(written(tmp_path, f"[{new_part}]\n{new_key} = {text}"))
    with pytest.raises(RecipeError, match="the same setting"):
        read_recipe(
            written(
                tmp_path, f"[{part}]\n{key} = {text}\n" + f"[{new_part}]\n" * (part != new_part) + f"{new_key} = {text}"
            )
        )


def test_a_written_recipe_explains_its_keys():
    text = write_recipe(Recipe())
    meaning = field_docstrings(ClosingPart)["min_open"]
    assert " ".join(text.replace("\n# ", " ").split()).count(meaning) == 1


@pytest.mark.parametrize(
    "text",
    [
        "seed = " + "[" * 100_000,
        "seed = " + "9" * 400,
        "seed = " + "9" * 5000,
        "finetune.lr = " + "9" * 400,
        "finetune.lr = inf",
        "finetune.lr = nan",
        "finetune.weight_decay = inf",
        "closing.l1 = inf",
        "distillation.temperature = inf",
        "finetune.epochs = 1" + "0" * 34,
        "closing.gate_reinits = 1" + "0" * 34,
        "model.image_size = 1" + "0" * 34,
        "model.image_size = 100_000",
        "baseline.epochs = 2_000_000",
        "finetune.batch_size = 1" + "0" * 34,
        'data.name = "a\\u0000b"',
        "gates.kinds = [" + "1," * 10_000 + "]",
        "x" * 10_000 + " = 1",
        "\0",
        "finetune.lr = 1979-05-27",
    ],
)
def test_hostile_recipes_end_in_one_short_line(tmp_path, text):
    file = tmp_path / "r.toml"
    file.write_text(text)
    with pytest.raises(RecipeError) as refused:
        read_recipe(file)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700


def test_hostile_settings_end_in_one_short_line():
    for setting in ("seed=" + "[" * 100_000, "a" + ".b" * 100_000 + "=1", "finetune.lr=" + "9" * 5000, "data.name=\0"):
        with pytest.raises(RecipeError) as refused:
            with_settings(Recipe(), [setting])
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 700


def test_recipes_that_are_no_text(tmp_path):
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe\x00")
    for place in (tmp_path / "r.toml", tmp_path, tmp_path / "none", tmp_path / "nul\0l"):
        with pytest.raises(RecipeError):
            read_recipe(place)


@pytest.mark.parametrize("name", ["a\nb", "\x7f\x01\x1f", "q\"'\\", "'''", "\u2028 \x85", "\r\n", "é\U0001f600"])
def test_any_name_is_written_as_toml(tmp_path, name):
    recipe = Recipe(data=DataPart(name=name))
    (tmp_path / "r.toml").write_text(write_recipe(recipe), encoding="utf-8")
    assert read_recipe(tmp_path / "r.toml") == recipe


def test_paths_are_written_as_seen_from_the_folder(tmp_path):
    recipe = Recipe(
        model=ModelPart(name=f"{tmp_path}/project/own.py:net", weights=f"{tmp_path}/project/w.pth"),
        data=DataPart(name=f"{tmp_path}/photos"),
    )
    folder = tmp_path / "project" / "runs" / "mine"
    seen = portable(recipe, folder)
    assert (seen.model.name, seen.model.weights) == ("../../own.py:net", "../../w.pth")
    assert seen.data.name == "../../../photos"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(write_recipe(seen))
    assert read_recipe(folder / "recipe.toml") == recipe
    names = Recipe(model=ModelPart(name="timm/resnet18"), data=DataPart(name="hfds/a/b"))
    assert portable(names, folder) == names
