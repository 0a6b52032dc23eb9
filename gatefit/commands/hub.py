"""Share a gated network: write it with a model card, push it to the Hugging Face Hub, read it from there.

Only data is fetched: tensors, JSON, TOML and ONNX. Nothing that a downloaded folder holds or names is run as code.
"""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData, snapshot_download
from torch import nn

from gatefit.commands.figures import kept_figures
from gatefit.errors import CheckpointError
from gatefit.files import write_atomically
from gatefit.folder import CONFIG, WEIGHTS, Config, Figures, read_config
from gatefit.formats import mega, percent
from gatefit.gating.checkpoint import load, save
from gatefit.gating.original import reason_not_to_build
from gatefit.training.evaluate import Evaluation

CARD = "README.md"
FETCHED = ["*.safetensors", "*.json", "*.toml", "*.onnx"]
"""Files that `from_pretrained` fetches."""
PUSHED = [*FETCHED, CARD]
_HERE = "path/of/this/folder"
"""What a model card calls a folder that has not been pushed."""
_UNFINISHED = ["checkpoint*", ".*"]


def save_pretrained(
    gated: nn.Module,
    folder: str | Path,
    evaluation: Evaluation | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Write a gated network into `folder` as `gatefit.save` does, with a model card, `README.md`.

    Args:
        gated: from `retrofit`, `finetune` or `load`.
        folder: made where it is missing.
        evaluation: from `gatefit.evaluate`; its figures stand in the card.
        classes: class names in the order of the outputs.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    save(gated, folder, classes=classes, figures=None if evaluation is None else kept_figures(evaluation, ""))
    _write_card(folder, model_card(read_config(folder), ""))


def from_pretrained(
    folder_or_repo: str | Path, model: nn.Module | None = None, *, revision: str | None = None
) -> nn.Module:
    """Read a gated network from a folder, or from a repository of the Hugging Face Hub, in eval mode.

    What is a folder here is read without the network; only another name, "user/name", is looked up on the Hub. Every
    file is checked against the hash that `config.json` keeps. A config that names a function in a Python file is
    refused, so that nothing downloaded runs code.

    Args:
        folder_or_repo: where `save_pretrained` or `gatefit convert` wrote, or where `push_to_hub` put it.
        model: the original architecture (any weights), for networks that neither timm nor torchvision has.
        revision: branch, tag or commit on the Hub; by default its main branch.

    Raises:
        CheckpointError: there is no such folder or repository, it cannot be fetched, is incomplete, was tampered
            with, or needs `model`.
    """
    folder = Path(folder_or_repo).expanduser()
    if not folder.is_dir():
        folder = _fetch(str(folder_or_repo), revision)
    config = read_config(folder)
    if model is None:
        _refuse_code(config, str(folder_or_repo))
    for name in config.files:
        if (folder / name).is_file():
            config.check_file(folder, name)
    return load(folder, model)


def push_to_hub(
    source: nn.Module | str | Path, repo_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Push a gated network to a repository of the Hugging Face Hub, which is made where it is missing.

    Args:
        source: a gated network, or a folder that `save_pretrained` or `gatefit convert` wrote: a folder's figures,
            recipe and deployment go with it. A folder without a model card gets one, in any the folder's place
            becomes `repo_id`.
        repo_id: "user/name".
        private: whether a new repository is only for you.
        token: of your account; by default the one that `hf auth login` stored.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the folder is not one that gatefit wrote, or the Hub cannot be reached or refuses.
    """
    if isinstance(source, nn.Module):
        with tempfile.TemporaryDirectory() as temporary:
            save(source, temporary)
            return _push(Path(temporary), repo_id, private, token)
    return _push(Path(source), repo_id, private, token)


def model_card(config: Config, repo_id: str) -> str:
    """Return the model card of a folder, Markdown with a YAML header: what it is, its figures, how to load it."""
    original = config.model["name"].rpartition("/")[2] if config.model else "A network of its author's own"
    header = ModelCardData(
        library_name="gatefit",
        pipeline_tag="image-classification",
        tags=["gatefit", "image-classification", "dynamic-inference", "pruning"],
    )
    needs_model = config.model is None or config.model["source"] == "file"
    place = repr(repo_id or _HERE)
    call = f"gatefit.from_pretrained({place}{', model=...' if needs_model else ''})".replace("'", '"')
    note = "`model=` takes the original architecture, with any weights.\n\n" if needs_model else ""
    return (
        f"---\n{header.to_yaml()}\n---\n\n# {repo_id.rpartition('/')[2] or f'{original}, gated'}\n\n"
        f"{original} with gates, made by gatefit: for each image the network runs only the blocks and channels that "
        f"this image needs.\n\n{_figures_table(config.figures)}"
        f"## How to load it\n\n```python\nimport gatefit\n\ngated = {call}\n```\n\n{note}"
        f"{_input_line(config.input)}\n"
    )


def _input_line(spec: dict[str, Any]) -> str:
    """Say what a network takes."""
    if len(spec["shape"]) != 3:
        return f"Its first input has the shape ({', '.join(['B', *map(str, spec['shape'])])})."
    channels, height, width = spec["shape"]
    return (
        f"It takes images of {height}x{width} pixels and {channels} channels, normalised with mean "
        f"{list(spec['mean'])} and standard deviation {list(spec['std'])}."
    )


def _figures_table(figures: Figures | None) -> str:
    if figures is None:
        return ""
    of = f" of {figures.data}" if figures.data else ""
    agreement = (
        ""
        if figures.agreement is None
        else f"On {percent(figures.agreement)} of the images the answer is the original's.\n\n"
    )
    return (
        f"## Figures\n\nMeasured on {figures.images:,} images{of}; MACs (multiplications with addition) are means per "
        "image and include the gates.\n\n"
        "| network | accuracy | MACs | share of the MACs |\n| --- | --- | --- | --- |\n"
        f"| original | {percent(figures.original_accuracy)} | {mega(figures.original_macs)} | 100.00 % |\n"
        f"| gated | {percent(figures.accuracy)} | {mega(figures.macs)} | {percent(figures.share)} |\n\n{agreement}"
    )


def _write_card(folder: Path, card: str) -> None:
    write_atomically(folder / CARD, lambda file: file.write_text(card, encoding="utf-8"))


def _push(folder: Path, repo_id: str, private: bool, token: str | None) -> str:
    config = read_config(folder)
    for name in config.files:
        if name == WEIGHTS or (folder / name).is_file():
            config.check_file(folder, name)
    if (folder / CARD).is_file():
        _write_card(folder, (folder / CARD).read_text(encoding="utf-8").replace(_HERE, repo_id))
    else:
        _write_card(folder, model_card(config, repo_id))
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=PUSHED,
            ignore_patterns=_UNFINISHED,
            commit_message="Upload a gated network",
        )
    except Exception as error:
        raise CheckpointError(
            f"'{repo_id}' could not be pushed to the Hugging Face Hub ({_short(error)}); check the name, the network "
            "and your token (hf auth login)"
        ) from error
    return str(commit.commit_url)


def _fetch(name: str, revision: str | None) -> Path:
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise CheckpointError(f"no folder '{name}'; a repository of the Hugging Face Hub is named user/name")
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=FETCHED, ignore_patterns=_UNFINISHED))
    except Exception as error:
        raise CheckpointError(
            f"there is no folder '{name}', and it could not be fetched from the Hugging Face Hub ({_short(error)})"
        ) from error
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"'{name}' on the Hugging Face Hub has no {CONFIG}: it is not one that gatefit wrote")
    return folder


def _refuse_code(config: Config, name: str) -> None:
    """Refuse a reference that would run code of the folder's choice, or read other files or the network."""
    if config.model is None:
        raise CheckpointError(
            f"'{name}' was saved from a network of its author's own; call gatefit.from_pretrained({name!r}, model=...)"
        )
    reason = reason_not_to_build(config)
    if reason:
        raise CheckpointError(
            f"'{name}' {reason}; build the network yourself and call gatefit.from_pretrained({name!r}, model=...)"
        )


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
