"""save_pretrained, from_pretrained and push_to_hub against local folders and a Hub that is made up."""

import json
import re
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from networks import images, make

import gatefit
from gatefit.commands import hub
from gatefit.errors import CheckpointError
from gatefit.files import json_digest
from gatefit.folder import Figures
from gatefit.gating.info import set_info
from gatefit.inputs.models import ModelReference
from gatefit.training.evaluate import Evaluation

X = torch.zeros(2, 3, 64, 64)


def gated_resnet():
    return gatefit.retrofit(timm.create_model("test_resnet", num_classes=5).eval(), X, "lc", "step", True).eval()


def evaluation():
    return Evaluation(
        images=360, accuracy=0.825, agreement=0.9, dense_accuracy=0.8944, dense_macs=2_000_000,
        macs_sequential=1_200_000.0, macs_parallel=1.3e6, macs=torch.ones(360), paths=3, gates=(),
        answers=torch.zeros(360), labels=None, masks={},
    )  # fmt: skip


class Hub:
    """Repositories in a folder, for the two calls that reach the network."""

    def __init__(self, root):
        self.root = root
        self.fetched, self.made = [], []

    def create_repo(self, _api, repo_id, *, private, exist_ok):
        assert exist_ok
        self.made.append((repo_id, private))

    def upload_folder(self, _api, *, repo_id, folder_path, allow_patterns, ignore_patterns, commit_message):
        for file in folder_path.iterdir():
            if self.takes(file.name, allow_patterns, ignore_patterns):
                (self.root / repo_id).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.root / repo_id / file.name)
        return SimpleNamespace(commit_url=f"https://hub.example/{repo_id}/commit/1")

    def snapshot_download(self, repo_id, *, revision, allow_patterns, ignore_patterns):
        self.fetched.append((repo_id, revision))
        if not (self.root / repo_id).is_dir():
            raise OSError("404 Client Error.\nRepository Not Found")
        target = self.root / "cache" / repo_id
        shutil.copytree(
            self.root / repo_id, target, dirs_exist_ok=True,
            ignore=lambda _, names: [n for n in names if not self.takes(n, allow_patterns, ignore_patterns)],
        )  # fmt: skip
        return str(target)

    @staticmethod
    def takes(name, allowed, ignored):
        return any(fnmatch(name, p) for p in allowed) and not any(fnmatch(name, p) for p in ignored)


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    made_up = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *a, **k: made_up.create_repo(*a, **k))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda *a, **k: made_up.upload_folder(*a, **k))
    monkeypatch.setattr(hub, "snapshot_download", made_up.snapshot_download)
    return made_up


def reseal(folder, change):
    """Change a config as somebody would who knows how its digest is made."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    config["digest"] = json_digest({k: v for k, v in config.items() if k != "digest"})
    (folder / "config.json").write_text(json.dumps(config))


def test_a_local_folder_is_read_without_the_network(tmp_path, made_up):
    gated, x = gated_resnet(), torch.randn(3, 3, 64, 64)
    gatefit.save_pretrained(gated, tmp_path / "mine", classes=list("abcde"))
    for place in (tmp_path / "mine", str(tmp_path / "mine")):
        assert torch.equal(gatefit.from_pretrained(place)(x), gated(x))
    assert not made_up.fetched and {f.name for f in (tmp_path / "mine").iterdir()} == {
        "model.safetensors", "config.json", "README.md",
    }  # fmt: skip


def test_the_card_says_what_the_network_is(tmp_path):
    gatefit.save_pretrained(gated_resnet(), tmp_path, evaluation())
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "gatefit" and "gatefit" in card.data.tags
    assert card.data.pipeline_tag == "image-classification"
    for words in (
        "| original | 89.44 % | 2.00 M | 100.00 % |", "| gated | 82.50 % | 1.20 M | 60.00 % |", "360 images",
        "On 90.00 % of the images the answer is the original's", "test_resnet", "64x64 pixels",
    ):  # fmt: skip
        assert words in card.text, words
    code = re.search(r"```python\n(.*?)```", card.text, re.S).group(1)
    found = {}
    exec(code.replace("path/of/this/folder", str(tmp_path)), found)
    assert found["gated"](X).shape == (2, 5)


def test_a_card_without_figures_shows_no_table(tmp_path):
    gatefit.save_pretrained(gated_resnet(), tmp_path)
    assert "|" not in ModelCard.load(tmp_path / "README.md").text


def test_the_card_of_an_own_network_begins_with_a_capital(tmp_path):
    gatefit.save_pretrained(gatefit.retrofit(make("basic"), images(), "c").eval(), tmp_path)
    assert "\nA network of its author's own with gates, made by gatefit" in (tmp_path / "README.md").read_text()


def test_what_is_not_known_is_a_dash():
    table = hub._figures_table(Figures("", 10, None, None, 50.0, 0.5, None, 100))
    assert "| gated | - | 0.00 M | 50.00 % |" in table and "the answer is" not in table


def test_push_and_fetch(tmp_path, made_up):
    gated, x = gated_resnet(), torch.randn(3, 3, 64, 64)
    assert gatefit.push_to_hub(gated, "me/gated", private=True) == "https://hub.example/me/gated/commit/1"
    assert made_up.made == [("me/gated", True)]
    assert torch.equal(gatefit.from_pretrained("me/gated", revision="v1")(x), gated(x))
    assert made_up.fetched == [("me/gated", "v1")]
    assert 'from_pretrained("me/gated")' in (made_up.root / "me/gated/README.md").read_text()


def test_a_folder_is_pushed_with_its_figures_but_without_pictures_code_or_checkpoints(tmp_path, made_up):
    folder = tmp_path / "run"
    gatefit.save_pretrained(gated_resnet(), folder, evaluation())
    for name in ("recipe.toml", "report.json", "model.onnx", "own.py", "weights.pth", "macs.png", "report.html",
                 "checkpoint.safetensors", ".config.json.tmp"):  # fmt: skip
        (folder / name).write_text("{}")
    gatefit.push_to_hub(folder, "me/run")
    assert {f.name for f in (made_up.root / "me/run").iterdir()} == {
        "model.safetensors", "config.json", "README.md", "recipe.toml", "report.json", "model.onnx",
    }  # fmt: skip
    card = (made_up.root / "me/run/README.md").read_text()
    assert 'from_pretrained("me/run")' in card and "82.50 %" in card


def test_only_data_is_fetched(tmp_path, made_up):
    gatefit.push_to_hub(gated_resnet(), "me/gated")
    for name in ("own.py", "pickle.bin", "weights.pth"):
        (made_up.root / "me/gated" / name).write_text("raise SystemExit")
    gatefit.from_pretrained("me/gated")
    assert {f.name for f in (made_up.root / "cache/me/gated").iterdir()} == {"model.safetensors", "config.json"}


@pytest.mark.parametrize("place", ["hub", "folder"])
def test_code_that_a_folder_names_is_never_run(tmp_path, made_up, place):
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"import networks\nopen({str(ran)!r}, 'w').close()\ndef net():\n    return networks.make('basic')\n"
    )
    gated = gatefit.retrofit(make("basic"), images(), "c", "step").eval()
    set_info(gated, reference=ModelReference("file", f"{tmp_path / 'own.py'}:net"))
    gatefit.save_pretrained(gated, tmp_path / "run")
    assert "model=..." in (tmp_path / "run/README.md").read_text()
    name = tmp_path / "run"
    if place == "hub":
        gatefit.push_to_hub(tmp_path / "run", "me/own")
        name = "me/own"
    with pytest.raises(CheckpointError, match=r"names code, .*model=\.\.\."):
        gatefit.from_pretrained(name)
    assert not ran.exists()
    assert torch.equal(gatefit.from_pretrained(name, make("basic"))(images()), gated(images()))


def test_an_own_network_without_a_name_needs_its_model(tmp_path, made_up):
    gatefit.push_to_hub(gatefit.retrofit(make("grouped"), images(), "c"), "me/own")
    with pytest.raises(CheckpointError, match=r"of its author's own; call gatefit\.from_pretrained\('me/own', model="):
        gatefit.from_pretrained("me/own")


@pytest.mark.parametrize(
    "model",
    [
        {"source": "timm", "name": "test_resnet", "arguments": {"checkpoint_path": "/etc/passwd"}},
        {"source": "timm", "name": "test_resnet", "arguments": {"pretrained": True}},
        {"source": "timm", "name": "hf-hub:other/net", "arguments": {}},
        {"source": "timm", "name": "local-dir:/etc", "arguments": {}},
        {"source": "torchvision", "name": "resnet18", "arguments": {"weights": "DEFAULT"}},
        {"source": "elsewhere", "name": "net", "arguments": {}},
    ],
)
def test_a_reference_that_would_read_other_files_is_refused(tmp_path, monkeypatch, model):
    gatefit.save_pretrained(gated_resnet(), tmp_path)
    reseal(tmp_path, lambda c: c.update(model=model))
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: pytest.fail("was built"))
    with pytest.raises(CheckpointError, match=r"does not build for it|is not one that gatefit wrote"):
        gatefit.from_pretrained(tmp_path)


def test_damage_on_the_way_is_seen(tmp_path, made_up):
    gatefit.push_to_hub(gated_resnet(), "me/gated")
    gatefit.save(gated_resnet(), tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", made_up.root / "me/gated/model.safetensors")
    with pytest.raises(CheckpointError, match="is not the file"):
        gatefit.from_pretrained("me/gated")


def test_a_damaged_folder_is_not_pushed(tmp_path, made_up):
    with pytest.raises(CheckpointError, match="no file"):
        gatefit.push_to_hub(tmp_path, "me/empty")
    gatefit.save_pretrained(gated_resnet(), tmp_path)
    gatefit.save(gated_resnet(), tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="is not the file"):
        gatefit.push_to_hub(tmp_path, "me/gated")
    assert not made_up.made


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("me/none", r"no folder 'me/none', .* Hugging Face Hub \(404 Client Error\.\)"),
        ("nowhere", "no folder 'nowhere'; a repository .* is named user/name"),
        ("./runs/mine", "no folder './runs/mine'"),
        ("/runs/mine", "no folder '/runs/mine'"),
        ("../runs", r"no folder '\.\./runs'"),
    ],
)
def test_what_is_not_there_ends_in_one_line(made_up, name, message):
    with pytest.raises(CheckpointError, match=message) as refused:
        gatefit.from_pretrained(name)
    assert "\n" not in str(refused.value)
    assert [repo for repo, _ in made_up.fetched] == (["me/none"] if name == "me/none" else [])


def test_a_repository_of_another_program(made_up):
    (made_up.root / "me/other").mkdir(parents=True)
    (made_up.root / "me/other/weights.safetensors").write_text("")
    with pytest.raises(CheckpointError, match=r"'me/other' .* has no config\.json"):
        gatefit.from_pretrained("me/other")
    (made_up.root / "me/other/config.json").write_text('{"architectures": ["Bert"]}')
    with pytest.raises(CheckpointError, match="is not one that gatefit wrote"):
        gatefit.from_pretrained("me/other")


def test_a_hub_that_refuses_ends_in_one_line(monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise OSError("401 Client Error.\nInvalid username or password.")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(CheckpointError, match=r"could not be pushed .*401 Client Error.*hf auth login") as refused:
        gatefit.push_to_hub(gated_resnet(), "me/gated")
    assert "\n" not in str(refused.value)
