"""Options, help and messages of the command line."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gatefit.commands.cli import app
from gatefit.commands.cli.convert import _epoch
from gatefit.commands.cli.session import session
from gatefit.commands.convert import convert
from gatefit.errors import GatefitError, RecipeError
from gatefit.formats import model_title
from gatefit.progress import Progress
from gatefit.recipe import ClosingPart, FinetunePart, ModelPart, Recipe, with_settings
from gatefit.version import __version__

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = f"{ROOT}/examples/cifar_resnet.py:resnet8"
COMMANDS = ["convert", "inspect", "models", "evaluate", "report", "deploy", "bench"]
HEAVY = {"torch", "torchvision", "timm", "matplotlib", "accelerate", "sklearn", "numpy", "PIL", "safetensors"}


def gatefit(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([c, "--help"] for c in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    """Wrapped in a program that prints what has been imported when the command ends."""
    program = (
        "import sys\nfrom gatefit.commands.cli import main\n"
        "try:\n    main()\nfinally:\n    print('IMPORTED', *{m.partition('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    shown, _, imported = done.stdout.partition("IMPORTED")
    assert "typer" in imported.split() and not HEAVY & set(imported.split())
    assert f"gatefit {__version__}" in shown if arguments == ["--version"] else "Usage:" in shown


@pytest.mark.parametrize(
    "arguments",
    [["convert", "resnet18"], ["inspect", "resnet18"], ["models"], ["evaluate", "x"], ["report", "x"],
     ["deploy", "x"], ["bench", "x"]],
    ids=lambda a: a[0],
)  # fmt: skip
def test_the_first_line_comes_before_pytorch(arguments):
    """With torch replaced by something that tells of its import: the line is there by then."""
    program = (
        "import sys\n"
        "class Told:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n            print('IMPORTS TORCH', file=sys.stderr, flush=True)\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Told())\n"
        "from gatefit.commands.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    first, second, *rest = done.stderr.splitlines()
    assert first == f"gatefit {' '.join(arguments)}: loading PyTorch ..." and second == "IMPORTS TORCH"
    assert rest == ["Interrupted. Nothing was saved."] and done.returncode == 130


def test_completion_is_offered():
    assert "--install-completion" in gatefit("--help").stdout


def test_typed_marker_is_packaged():
    import tomllib

    assert (ROOT / "gatefit" / "py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["gatefit"]


@pytest.fixture
def ran(monkeypatch):
    """Recipes that would have been run."""
    from gatefit.errors import GatefitError

    recipes = []

    def run(recipe, *_args, **_options):
        recipes.append(recipe)
        raise GatefitError("not run")

    monkeypatch.setattr("gatefit.commands.convert.convert", run)
    return recipes


def test_set_overrides_options_and_they_override_the_recipe(ran, tmp_path):
    (tmp_path / "r.toml").write_text("seed = 1\n[finetune]\nepochs = 1\nlr = 0.5\ntarget = 0.9\n[gates]\nkinds = 'l'\n")
    options = ["--recipe", tmp_path / "r.toml", "--epochs", 2, "--seed", 2, "--target", 0.8, "--gates", "c"]
    gatefit("convert", *options, "--set", "finetune.epochs=3", "--set", "gates.kinds=lc", "--set", "finetune.l1=1e-4")
    (recipe,) = ran
    assert (recipe.seed, recipe.finetune.epochs, recipe.finetune.lr, recipe.gates.kinds) == (2, 3, 0.5, "lc")
    assert (recipe.closing.l1, recipe.closing.target) == (1e-4, None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("finetune.epoch=3", "unknown recipe key 'finetune.epoch'; did you mean 'epochs'"),
        ("finetune.epochs=many", "'finetune.epochs' must be int, not 'many'"),
        ("finetune.lr=-1", "finetune.lr must be positive"),
        ("finetune=3", "must be a table"),
        ("finetune.lr.peak=3", "finetune.lr"),
        ("lr 3", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("gates.kinds=x", "must be one of"),
        ("seed=1\nextra=2", "seed"),
    ],
)
def test_wrong_settings_get_one_line(ran, setting, message):
    result = gatefit("convert", "resnet18", "--l1", "1", "--set", setting)
    _, line = result.stderr.splitlines()
    assert result.exit_code == 1 and line.startswith("gatefit: ") and message in line and not ran


def test_an_old_key_is_read_with_a_note(ran, tmp_path):
    result = gatefit("convert", "resnet18", "--l1", "1", "--set", "finetune.keep=0.2")
    assert ran[0].closing.min_open == 0.2
    notes = [x for x in result.stderr.splitlines() if "finetune.keep" in x]
    assert notes == ["note: recipe key 'finetune.keep' is now called 'closing.min_open'"]
    (tmp_path / "r.toml").write_text("[finetune]\nkeep = 0.3\n")
    result = gatefit("convert", "resnet18", "--l1", "1", "--recipe", tmp_path / "r.toml")
    assert ran[1].closing.min_open == 0.3
    assert notes[0] in result.stderr.splitlines()


def test_paths_in_settings_become_absolute(ran, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    gatefit("convert", "resnet18", "--l1", "1", "--set", "data.name=photos", "--set", "model.name=net.py:build")
    assert ran[0].data.name == str(tmp_path / "photos") and ran[0].model.name == f"{tmp_path}/net.py:build"


def test_an_interrupted_training_says_how_to_go_on(tmp_path, capsys):
    import typer

    (tmp_path / "checkpoint.safetensors").touch()
    recipe = Recipe(finetune=FinetunePart(epochs=10))
    for step, epoch in ((0, 1), (29, 3), (100, 10)):
        where = _epoch(Progress("fine-tune", step, 100, loss=1.0), recipe)
        with pytest.raises(typer.Exit) as end, session("convert", tmp_path, lambda where=where: where):
            raise KeyboardInterrupt
        assert end.value.exit_code == 130
        how = f"Run the same command with --resume to continue from {tmp_path} (fine-tune, epoch {epoch} of 10)."
        assert f"Interrupted. {how}" in capsys.readouterr().err.splitlines()


def test_help_tells_each_command_in_a_whole_sentence():
    """The list of commands cuts long sentences short."""
    listed = gatefit("--help").stdout.partition("Commands:\n")[2].strip().splitlines()
    assert len(listed) == len(COMMANDS) and not any(line.endswith("...") for line in listed)


def test_warnings_of_others_stay_warnings(capsys):
    with pytest.warns(FutureWarning, match="theirs"), session("x"):
        warnings.warn("theirs", FutureWarning, stacklevel=1)
    assert "note:" not in capsys.readouterr().err


def test_titles_show_no_folder():
    assert model_title("/home/me/net.py:build") == "net.py:build"
    assert model_title("timm/resnet18") == "timm/resnet18"
    result = gatefit("inspect", EXAMPLE)
    assert result.stdout.startswith("cifar_resnet.py:resnet8: ") and str(ROOT) not in result.stdout


def test_harvest_is_hidden_and_noted(tmp_path):
    text = gatefit("deploy", "--help").stdout
    assert "--prune-unused" in text and "--harvest" not in text
    result = gatefit("deploy", tmp_path, "--harvest")
    assert "note: --harvest is now called --prune-unused" in result.stderr.splitlines()


class Fake:
    """A tracker that keeps what it is given, in the class."""

    requires_logging_directory = True
    calls: list = []  # noqa: RUF012

    def __init__(self, project, folder):
        self.calls.append(("made", project, folder))

    def start(self):
        self.calls.append(("start",))

    def store_init_configuration(self, values):
        self.calls.append(("config", values))

    def log(self, values, step):
        self.calls.append(("log", values, step))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def fake(monkeypatch):
    import gatefit.commands.trackers as trackers

    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "fake", Fake)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["fake"])
    monkeypatch.setattr(Fake, "calls", [])
    return Fake.calls


def test_a_tracker_gets_recipe_and_steps(fake, tmp_path):
    out = tmp_path / "out"
    result = gatefit(
        "convert", EXAMPLE, "--data", "digits", "--target", 0.7, "--out", out, "--log-with", "fake", "--json",
        "--set", "baseline.epochs=1", "--set", "model.image_size=8", "--epochs", 1, "--set", "data.limit=256",
    )  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads(result.stdout)["images"]
    assert [c[0] for c in fake[:3]] == ["made", "start", "config"] and fake[0][2] == str(out / "logs")
    assert fake[2][1]["closing.target"] == 0.7 and fake[2][1]["seed"] == 0 and "closing.l1" not in fake[2][1]
    logs = [c for c in fake if c[0] == "log"]
    assert [c[0] for c in fake].count("finish") == 1 and fake[-1] == ("finish",)
    assert {k for _, values, _ in logs for k in values} == {
        "baseline/loss", "baseline/accuracy", "fine-tune/loss", "fine-tune/accuracy", "fine-tune/share"
    }  # fmt: skip
    assert [step for _, values, step in logs if "fine-tune/loss" in values] == [1, 2]


def test_only_the_main_process_logs(fake, tmp_path, monkeypatch):
    from gatefit.commands.trackers import tracking
    from gatefit.recipe import Recipe

    class Second:
        is_main_process = False

    monkeypatch.setattr("gatefit.commands.trackers.PartialState", Second)
    with tracking(["fake"], Recipe(), tmp_path) as report:
        report(Progress("fine-tune", 1, 2, 0.5))
    assert fake == []


@pytest.mark.parametrize(
    ("name", "message"),
    [("tensorbored", "did you mean 'tensorboard'"), ("comet_ml", "pip install comet_ml"), ("zz", "known are ")],
)
def test_trackers_that_are_not_there_are_refused_first(fake, ran, name, message):
    result = gatefit("convert", "resnet18", "--l1", "1", "--log-with", name)
    assert result.exit_code == 1 and message in result.stderr.splitlines()[-1] and not ran


def test_a_target_that_is_set_replaces_the_recipes_l1():
    recipe = with_settings(Recipe(), ["closing.l1=0.1"])
    assert recipe.closing.l1 == 0.1
    recipe = with_settings(recipe, ["closing.target=0.5"])
    assert (recipe.closing.l1, recipe.closing.target) == (None, 0.5)
    with pytest.raises(RecipeError, match="not both"):
        with_settings(recipe, ["closing.target=0.5", "closing.l1=0.1"])


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("a\nb"), RecursionError(), ZeroDivisionError("division")])
def test_errors_that_nobody_expected_are_one_line_and_can_be_traced(monkeypatch, error):
    def fails(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("gatefit.inputs.models.build", fails)
    result = gatefit("inspect", "test_resnet")
    (line,) = [x for x in result.stderr.splitlines() if x.startswith("gatefit: ")]
    assert result.exit_code == 1 and type(error).__name__ in line and "test_command_line.py, line" in line
    monkeypatch.setenv("GATEFIT_TRACEBACK", "1")
    assert gatefit("inspect", "test_resnet").exception is error


def test_a_script_that_ends_itself_is_no_network(tmp_path):
    file = tmp_path / "train.py"
    file.write_text("import argparse\nargparse.ArgumentParser().add_argument('x')\nraise SystemExit(2)\n")
    result = gatefit("inspect", f"{file}:net")
    assert result.exit_code == 1 and "train.py cannot be imported" in result.stderr


def test_a_resume_of_nothing_says_so(tmp_path):
    said = []
    with pytest.raises(GatefitError, match="no model 'nothing'"):
        convert(
            Recipe(model=ModelPart(name="nothing"), closing=ClosingPart(target=0.5)),
            tmp_path / "out",
            resume=True,
            on_progress=lambda p: said.append(p.message),
        )
    assert len(said) == 1 and "nothing to resume in" in said[0]
