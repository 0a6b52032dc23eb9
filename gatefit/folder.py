"""Write and read `config.json`, which says what a folder on disk holds: see docs/folder.md for every key."""

import platform
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from gatefit.errors import CheckpointError, first_line, shown
from gatefit.files import check_schema, digest, is_sealed, json_digest, read_json, sealed, to_json, write_atomically

FORMAT = 2
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
ORIGINAL = "original.safetensors"
PARTS = {"gated": {"gates", "form", "compensation", "blocks", "architecture"}}
"""The kinds of folder that this version reads, and the keys of each kind's own part."""
_COMMON = {"format", "kind", "model", "input", "classes", "files", "figures", "versions", "digest"}
_FORMAT_1 = {"model", "input", "gates", "form", "blocks", "architecture", "sha256"}
_PACKAGES = ("gatefit", "torch", "timm", "torchvision")


@dataclass(frozen=True)
class Figures:
    """What an evaluation found, as `config.json` and the model card keep it. Shares lie in [0, 1]."""

    data: str
    """Name of the images, without the place where they lie."""
    images: int
    accuracy: float | None
    """None without labels that fit."""
    agreement: float | None
    """Share of images on which the answer is the original's; None without the original."""
    macs: float
    """Mean MACs of an image, gates included."""
    share: float
    """`macs` as a share of the original's."""
    original_accuracy: float | None
    original_macs: int


@dataclass(frozen=True)
class Config:
    """The content of a `config.json`."""

    kind: str
    """What the folder holds; a key of `PARTS`."""
    model: dict[str, Any] | None
    """How to build the original network: source, name, arguments. None: an own network that only its owner has."""
    input: dict[str, Any]
    """Shape (C, H, W), normalisation and crop of the images."""
    part: dict[str, Any]
    """What only folders of this kind have."""
    files: dict[str, str]
    """SHA-256 of each file that decides an answer, by its name in the folder."""
    classes: tuple[str, ...] | None = None
    """Class names in the order of the outputs, where known."""
    figures: Figures | None = None
    versions: dict[str, str] = field(default_factory=lambda: this_versions())
    """Of the packages that the network was saved with."""
    format: int = FORMAT

    @property
    def network(self) -> str:
        """Compute the SHA-256 of all that decides an answer of the network: what a deployment is tied to."""
        return json_digest([self.kind, self.model, self.input, self.part, self.files.get(WEIGHTS)])

    def check_file(self, folder: Path, name: str) -> None:
        """Refuse a file of the folder that is not the one this config was written for.

        Raises:
            CheckpointError: the file is missing, is another, or is none that the config knows.
        """
        if digest(folder / name) != self.files.get(name):
            raise CheckpointError(f"{folder / name} is not the file that {CONFIG} was written for; write it anew")


def write_config(folder: Path, config: Config) -> None:
    """Write `config.json`, with a digest of its own content.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_atomically(folder / CONFIG, lambda file: file.write_text(to_text(config), encoding="utf-8"))


def to_text(config: Config) -> str:
    """Write a config as the text of `config.json`, with a digest of its own content.

    Raises:
        CheckpointError: it holds what JSON does not know.
    """
    content = {
        "format": FORMAT,
        "kind": config.kind,
        "model": config.model,
        "input": config.input,
        "classes": None if config.classes is None else list(config.classes),
        "files": config.files,
        "figures": None if config.figures is None else asdict(config.figures),
        "versions": config.versions,
        config.kind: config.part,
    }
    return to_json(sealed(content))


def read_config(folder: Path) -> Config:
    """Read the `config.json` of a folder, of this format or of format 1.

    Raises:
        CheckpointError: it is missing, damaged, changed by hand, or of a format or kind that is not known here.
    """
    file = folder / CONFIG
    content = read_json(file)
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{file} is not one that gatefit wrote: keys are missing")
    if content["format"] == 1:
        return _from_format_1(content, file)
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{file} has format {shown(content['format'])}; this gatefit reads up to {FORMAT}: update it"
        )
    kind = content.get("kind")
    if not isinstance(kind, str) or kind not in PARTS:
        raise CheckpointError(f"{file} is of kind {shown(kind)}; this gatefit reads {', '.join(PARTS)}: update it")
    part = content.get(kind)
    if not set(content) >= _COMMON or not isinstance(part, dict) or not set(part) >= PARTS[kind]:
        raise CheckpointError(f"{file} is not one that gatefit wrote: keys are missing")
    if not is_sealed(content):
        raise CheckpointError(f"{file} was changed after it was saved; put the file back, or save the network anew")
    check_schema(file, content, "config")
    known = content["figures"]
    try:
        return Config(
            kind=kind,
            model=content["model"],
            input=content["input"],
            part=part,
            files=dict(content["files"]),
            classes=None if content["classes"] is None else tuple(content["classes"]),
            figures=None if known is None else Figures(**{f.name: known[f.name] for f in fields(Figures)}),
            versions=dict(content["versions"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is not one that gatefit wrote: {first_line(error)[:160]}") from error


def _from_format_1(content: dict[str, Any], file: Path) -> Config:
    compensation = content.get("compensation", content.get("fill"))
    if not set(content) >= _FORMAT_1 or compensation is None:
        raise CheckpointError(f"{file} is not one that gatefit wrote: keys are missing")
    part = {k: content[k] for k in ("gates", "form", "blocks", "architecture")} | {"compensation": compensation}
    model, spec, files = content["model"], content["input"], {WEIGHTS: content["sha256"]}
    check_schema(file, {"kind": "gated", "model": model, "input": spec, "gated": part, "files": files}, "config")
    return Config("gated", model, spec, part, files, versions={}, format=1)


def this_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what a network computes."""
    packages = {name: str(import_module(name).__version__) for name in _PACKAGES}
    return {"python": platform.python_version(), **packages}
