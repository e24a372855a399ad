"""A network whose weights lie under the names of a single file, converted whenever it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergeid.plugins import MergeidError, TensorTable


class SingleFile(nn.Module):
    """A network with the parameters of a file.

    Args:
        network: as diffusers builds it; its own parameters are not used.
        table: the file's tensors.
        convert: the file's tensors -> the network's.
    """

    def __init__(self, network: nn.Module, table: TensorTable, convert: Callable[[Any], dict[str, Tensor]]) -> None:
        super().__init__()
        self._network, self._convert = [network], convert  # in a list: it is no part of the state
        device = next(network.parameters()).device
        for name, info in table.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for step in path:
                if not hasattr(owner, step):
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            owner.register_parameter(leaf, nn.Parameter(torch.randn(info.shape, device=device) * 0.02))
        missing = {n for n, _ in network.named_parameters()} - set(self.converted())
        if missing:
            raise MergeidError(
                f"the file lacks {len(missing)} tensors of {type(network).__name__} (first: {min(missing)}); check "
                "that the config is this file's"
            )

    @property
    def network(self) -> nn.Module:
        """The network that runs."""
        return self._network[0]

    @property
    def config(self) -> Any:
        """As the library's networks have it."""
        return self.network.config

    def converted(self) -> dict[str, Tensor]:
        """The parameters under the network's names."""
        return self._convert(dict(self.named_parameters()))

    def forward(self, *args: object, **kwargs: object) -> Any:
        """As the network's."""
        return functional_call(self.network, self.converted(), args, kwargs)

    def encode(self, sample: Tensor) -> Any:
        """As an autoencoder's."""
        return functional_call(_Part(self.network, "encode"), self._under("network"), (sample,))

    def decode(self, latent: Tensor) -> Any:
        """As an autoencoder's."""
        return functional_call(_Part(self.network, "decode"), self._under("network"), (latent,))

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}.{k}": t for k, t in self.converted().items()}

    def _apply(self, fn: Any, recurse: bool = True) -> SingleFile:
        self.network._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class _Part(nn.Module):
    """One method of a network as its forward."""

    def __init__(self, network: nn.Module, method: str) -> None:
        super().__init__()
        self.network, self.method = network, method

    def forward(self, value: Tensor) -> Any:
        return getattr(self.network, self.method)(value)
