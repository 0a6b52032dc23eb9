"""The deployed network that a user gets: what it cannot run, and what would make it answer wrongly, it refuses."""

import warnings
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from gatefit.deployment.info import DeployedInfo, Images, deployed_info, set_deployed_info
from gatefit.deployment.plan import BlockPlan, Latency
from gatefit.errors import DeployError, first_line


class DeployedNetwork(fx.GraphModule):
    """A gated network in the form that runs fast: images (B, C, H, W) to what the network gives. For inference only.

    Its weights are copies in other layouts, so they cannot be changed: what would only seem to change them is refused.
    """

    _held: list[tuple[dict[str, Any], str, Tensor, int]]
    """Each weight as it has to be: the dictionary that it stands in, its name there, itself, its number of writes."""
    _device: torch.device
    _warned: bool
    """Whether the user heard that a batch is far from the one that the network was tuned for."""

    @property
    def plans(self) -> tuple[BlockPlan, ...]:
        """What was made of each block."""
        return deployed_info(self).plans

    @property
    def latency(self) -> Latency | None:
        """Milliseconds beside the dense network on the machine that it was tuned on; None: it was not timed."""
        return deployed_info(self).latency

    def __call__(self, images: Tensor) -> Any:
        """Run a batch.

        Raises:
            DeployError: it cannot be run, or the weights were changed.
        """
        info = deployed_info(self)
        assert info.images is not None
        info.images.check(images, self._device)
        if any(tensors.get(name) is not t or _version(t) != version for tensors, name, t, version in self._held):
            raise DeployError(
                "the weights of this deployed network were changed, but it runs on packed copies of them; change the "
                "gated network, and deploy it anew"
            )
        if not len(images):
            result = self(images.new_zeros(1, *images.shape[1:]))
            return tree_map_only(Tensor, lambda t: t[:0], result)
        self._note_batch(info, len(images))
        try:
            return super().__call__(images)
        except DeployError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            if tuple(images.shape[1:]) == info.images.shape:
                raise
            raise DeployError(
                f"this network was deployed with images of shape {info.images.shape} and cannot run "
                f"{tuple(images.shape[1:])}: {first_line(error)[:200]}"
            ) from error

    def _note_batch(self, info: DeployedInfo, batch: int) -> None:
        """Warn once where a batch is far from the one that the network was tuned for."""
        latency = info.latency
        if latency is None or self._warned or latency.batch / 2 <= batch <= latency.batch * 2:
            return
        self._warned = True
        warnings.warn(
            f"this network was tuned for batches of {latency.batch}, and is given one of {batch}: "
            f"gatefit.deploy(..., batch={batch}) may be faster",
            stacklevel=5,  # GraphModule has two calls of its own between the user and this one
        )

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse, as packed copies of the weights would stay as they are."""
        raise DeployError(
            "a deployed network cannot load weights, as it runs on packed copies; load them into the gated network, "
            "and deploy it anew"
        )

    def train(self, mode: bool = True) -> "DeployedNetwork":
        """Refuse train mode."""
        if mode:
            raise DeployError("a deployed network is for inference only; train the gated network, and deploy it anew")
        super().train(False)
        return self

    def __reduce__(self) -> NoReturn:
        raise DeployError(
            "a deployed network cannot be pickled; write it with gatefit.save_deployed(deployed, folder), and "
            "read it with gatefit.load_deployed(folder)"
        )

    def __deepcopy__(self, memo: Any) -> "DeployedNetwork":
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, DeployedNetwork)
        return copied._hold()

    def _apply(self, fn: Any, recurse: bool = True) -> "DeployedNetwork":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self._hold()

    def _hold(self) -> "DeployedNetwork":
        """Note the weights as they are now."""
        self._warned = False
        self._held = [
            (tensors, name, t, _version(t))
            for module in self.modules()
            for tensors in (module._parameters, module._buffers)
            for name, t in tensors.items()
            if t is not None
        ]
        self._device = self._held[0][2].device if self._held else torch.device("cpu")
        return self


def _version(tensor: Tensor) -> int:
    """Count the writes to a tensor, where PyTorch does."""
    return 0 if tensor.is_inference() else tensor._version


def seal(network: fx.GraphModule, images: Images, latency: Latency | None = None, weights: str = "") -> DeployedNetwork:
    """Make the user's form of a deployed network; the two share their modules."""
    info = deployed_info(network)
    sealed = DeployedNetwork(network, network.graph, class_name="Deployed")
    assert isinstance(sealed, DeployedNetwork)
    sealed.eval()
    set_deployed_info(sealed, replace(info, images=images, latency=latency, weights=weights))
    return sealed._hold()
