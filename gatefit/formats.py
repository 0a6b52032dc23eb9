"""How figures are written."""


def mega(macs: float) -> str:
    """MACs in millions."""
    return f"{macs / 1e6:,.2f} M"


def percent(share: float | None) -> str:
    """A share in percent, or a dash where there is none."""
    return "-" if share is None else f"{100 * share:.2f} %"
