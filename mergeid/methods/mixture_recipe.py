"""Recipes of mixtures of experts, in mergekit-moe's words."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field

from mergeid.basics.reading import read_yaml_documents
from mergeid.errors import MergeidError
from mergeid.io.schema import Own, validated


class ExpertEntry(Own):
    """A model, and the prompts that it is for, or not for."""

    source_model: str
    positive_prompts: list[str] = Field(default_factory=list)
    negative_prompts: list[str] = Field(default_factory=list)
    residual_scale: float = 1.0


class MixtureFile(Own):
    """A mixture of experts."""

    base_model: str
    experts: Annotated[list[ExpertEntry], Field(min_length=1)]
    gate_mode: str | None = None
    experts_per_token: Annotated[int, Field(ge=1, lt=1025)] | None = None


def read_mixture(path: str | os.PathLike[str]) -> MixtureFile:
    """What a recipe says. Raises `MergeidError` for no such file, no YAML, unknown keys or other kinds of values."""
    documents = read_yaml_documents(path, "a recipe in YAML")
    if len(documents) != 1:
        raise MergeidError(f"{os.fspath(path)} has {len(documents)} documents; expected one mixture")
    return validated(MixtureFile, documents[0], os.fspath(path))
