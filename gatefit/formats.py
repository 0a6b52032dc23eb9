"""How figures are written."""


def mega(macs: float) -> str:
    """MACs in millions."""
    return f"{macs / 1e6:,.2f} M"


def percent(share: float | None) -> str:
    """A share in percent, or a dash where there is none."""
    return "-" if share is None else f"{100 * share:.2f} %"


def model_title(model: str) -> str:
    """A model's name for a title: of "folder/file.py:function" only "file.py:function", other names as they are."""
    path, colon, function = model.rpartition(".py:")
    return f"{path.replace(chr(92), '/').rsplit('/', 1)[-1]}.py:{function}" if colon else model
