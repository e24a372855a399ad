"""Mixtures of experts made of dense models, as adapters describe them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn


class MixtureRequest(NamedTuple):
    """What a mixture is made of.

    Attributes:
        experts: how many the router chooses among.
        per_token: how many of them process a token.
        shared: how many more process every token.
        gated: whether the shared ones have prompts for a router of their own; None: routers are drawn at random.
        architecture: what its name begins with; None: the first that can be made.
    """

    experts: int
    per_token: int
    shared: int = 0
    gated: bool | None = None
    architecture: str | None = None


class MixtureTensor(NamedTuple):
    """Where a tensor of a mixture of experts comes from.

    Attributes:
        expert: number of the model, the shared ones after the others; None: the base.
        name: of the tensor there.
        ends: whether its output is added to the residual stream.
    """

    expert: int | None
    name: str
    ends: bool = False


class Mixture(NamedTuple):
    """A mixture of experts made of dense models.

    Attributes:
        config: its config.json.
        tensors: name -> where it comes from.
        gates: names of the routers' weights [experts, width], bottom layer first; they come from nowhere.
        embedding: name of the base's table of tokens [tokens, width].
        width: of the residual stream.
        shared_gates: likewise of the routers of shared experts [shared, width]; none: they have none.
        zeros: shapes of the tensors that are zero, which no dense model has.
        notes: what the user should know of it.
    """

    config: dict[str, Any]
    tensors: dict[str, MixtureTensor]
    gates: tuple[str, ...]
    embedding: str
    width: int
    shared_gates: tuple[str, ...] = ()
    zeros: Mapping[str, tuple[int, ...]] = {}
    notes: tuple[str, ...] = ()


@runtime_checkable
class MakesMixtures(Protocol):
    """Optional ability of an adapter: knows which mixture of experts has the layers of its dense models."""

    def mixture(self, config: Mapping[str, Any], names: Sequence[str], asked: MixtureRequest) -> Mixture | None:
        """The mixture of models of this config and these tensors; None: there is none.

        Raises:
            MergeidError: there are some, but not as it is asked for.
        """
        ...

    def layer_inputs(self, model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
        """What enters each layer of a dense model, [batch, tokens, width], bottom first."""
        ...
