"""The form of every network that gatefit returns."""

from typing import Any, NoReturn

from torch import fx

from gatefit.errors import GatefitError


class RewrittenNetwork(fx.GraphModule):
    """A traced network that `copy.deepcopy` copies, and that is not pickled.

    torch.fx pickles a network as code, and traces it again where it is read. What gatefit put in does not survive that:
    the file would be written, and could not be read.
    """

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise GatefitError(
            "torch.save and pickle cannot keep this network: a gated one is written by gatefit.save(gated, folder) and "
            "read by gatefit.load(folder); a deployed one by `gatefit deploy` and gatefit.load_deployed(folder)"
        )
