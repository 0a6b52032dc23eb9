"""The one family of errors that gatefit raises for what a user can mend."""


class GatefitError(Exception):
    """Base of every error that gatefit raises on purpose: one line that names cause and next step."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # names of files and classes may hold more lines


class GatefitWarning(UserWarning):
    """Something that probably is not what the user wants: one line that names cause and next step."""


class ModelError(GatefitError):
    """A model, or weights for it, that cannot be found, built or loaded."""


class ConversionError(GatefitError):
    """A network that cannot be gated, or whose conversion failed one of the checks."""


class UntraceableError(ConversionError):
    """A network that torch.fx cannot follow as a whole; parts of it may do."""


class DataError(GatefitError):
    """Images or labels that are missing, unreadable or do not fit the network."""


class RecipeError(GatefitError):
    """An option or recipe key that is unknown, contradictory or out of range."""


class CheckpointError(GatefitError):
    """A saved folder that is missing, incomplete, tampered with or cannot be written."""


class TrainingError(GatefitError):
    """A fine-tune that cannot go on, such as one whose loss is not finite."""


class DeployError(GatefitError):
    """A network that cannot be deployed, or a deployment that cannot be read or run here."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def shown(value: object) -> str:
    """Write a value for a message, in short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} of very many digits or levels"
    return text if len(text) <= 60 else f"{text[:60]}..."
