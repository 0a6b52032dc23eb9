"""What becomes of the folder of a conversion, whichever way it ends."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from gatefit.commands.output_folder import BASELINE, FINETUNE, check_folder, output_folder
from gatefit.errors import CheckpointError, RecipeError, TrainingError
from gatefit.folder import ORIGINAL
from gatefit.progress import silent
from gatefit.recipe import ClosingPart, DataPart, ModelPart, Recipe

RECIPE = Recipe(model=ModelPart(name="resnet18"), closing=ClosingPart(target=0.5))


@contextmanager
def opened(path, resume=False, recipe=RECIPE, on_progress=silent):
    check_folder(recipe, path, resume)
    with output_folder(recipe, path, True, on_progress):
        yield


def broken_off(path, error, checkpoint=False, **more):
    with pytest.raises(type(error)), opened(path, **more):
        if checkpoint:
            (path / FINETUNE).write_bytes(b"learnt")
        raise error


def test_a_new_folder_is_gone_after_an_error(tmp_path):
    broken_off(tmp_path / "out", OSError("no space"))
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_empty_after_an_error(tmp_path):
    broken_off(tmp_path, KeyboardInterrupt())
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())


def test_what_was_trained_is_kept_and_said(tmp_path):
    messages = []
    broken_off(tmp_path, OSError("no space"), True, on_progress=lambda p: messages.append(p.message))
    assert (tmp_path / FINETUNE).read_bytes() == b"learnt"
    assert len(messages) == 1 and f"--resume --out {tmp_path}" in messages[0]


@pytest.mark.parametrize("error", [TrainingError("not finite"), RecipeError("cannot be reached")])
def test_what_would_fail_again_is_not_kept(tmp_path, error):
    broken_off(tmp_path / "out", error, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [TrainingError("not finite"), RecipeError("cannot be reached"), KeyError("bug")])
def test_a_network_that_was_trained_is_kept(tmp_path, error):
    messages, out = [], tmp_path / "out"
    with pytest.raises(type(error)), opened(out, on_progress=lambda p: messages.append(p.message)):
        (out / BASELINE).write_bytes(b"learnt")
        (out / ORIGINAL).write_bytes(b"learnt")
        raise error
    assert (out / ORIGINAL).read_bytes() == b"learnt"
    assert (
        len(messages) == 1 and ("--resume" if isinstance(error, KeyError) else f"--weights {out}/orig") in messages[0]
    )


def test_a_run_begun_elsewhere_is_the_same_when_its_folder_moved(tmp_path):
    project = tmp_path / "project"
    (project / "photos").mkdir(parents=True)
    recipe = replace(RECIPE, data=DataPart(name=str(project / "photos")))
    broken_off(project / "out", OSError("no space"), True, recipe=recipe)
    assert str(tmp_path) not in (project / "out" / "recipe.toml").read_text()
    project.rename(tmp_path / "moved")
    with pytest.raises(RecipeError, match="another recipe"):
        check_folder(recipe, tmp_path / "moved" / "out", True)
    check_folder(replace(RECIPE, data=DataPart(name=str(tmp_path / "moved/photos"))), tmp_path / "moved" / "out", True)


def test_a_run_that_is_resumed_loses_nothing(tmp_path):
    broken_off(tmp_path, OSError("no space"), True)
    broken_off(tmp_path, TrainingError("not finite"), resume=True)
    assert (tmp_path / "recipe.toml").is_file() and (tmp_path / FINETUNE).is_file()


def test_a_complete_folder_has_no_checkpoint(tmp_path):
    with opened(tmp_path):
        (tmp_path / BASELINE).write_bytes(b"learnt")
        (tmp_path / FINETUNE).write_bytes(b"learnt")
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.toml"]


def test_recipes_are_compared_by_what_they_say(tmp_path):
    broken_off(tmp_path, OSError("no space"), True)
    (tmp_path / "recipe.toml").write_text('model = {name = "resnet18"}\n[finetune]\ntarget = 0.5  # the old key\n')
    with pytest.warns(FutureWarning, match=r"closing\.target"), opened(tmp_path, True):
        pass
    with pytest.raises(RecipeError, match="another recipe"), opened(tmp_path, True, replace(RECIPE, seed=1)):
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("x")
    for resume, message in ((False, "exists; choose another"), (True, "not a run of gatefit")):
        with pytest.raises(CheckpointError, match=message), opened(tmp_path, resume):
            pass
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
