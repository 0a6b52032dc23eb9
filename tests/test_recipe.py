from dataclasses import replace

import pytest
from places import RECIPES

from gatefit.errors import RecipeError
from gatefit.recipe import RENAMED, ClosingPart, FinetunePart, Recipe, field_docstrings, read_recipe, write_recipe


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
