"""Write figures and names as people read them."""

import re
from pathlib import PurePath


def mega(macs: float) -> str:
    """Write MACs in millions."""
    return f"{macs / 1e6:,.2f} M"


def percent(share: float | None) -> str:
    """Write a share in percent, or a dash where there is none."""
    return "-" if share is None else f"{100 * share:.2f} %"


def folder_name(model: str) -> str:
    """Name the folder of a model's run: "torchvision-resnet50", or "net-build" of "../proj/net.py:build"."""
    return re.sub(r"[^\w.-]+", "-", model_title(model).replace(".py:", "-")).strip("-.") or "model"


def model_title(model: str) -> str:
    """Shorten "folder/file.py:function" to "file.py:function" for a title; leave other names as they are."""
    path, colon, function = model.rpartition(".py:")
    return f"{path.replace(chr(92), '/').rsplit('/', 1)[-1]}.py:{function}" if colon else model


def data_title(data: str) -> str:
    """Shorten the path of images to its last part, which says nothing of the machine; leave other names as they are."""
    if not (PurePath(data).is_absolute() or data.startswith(("./", "../", "~"))):
        return data
    return PurePath(data).name
