"""Recipes of mixtures of experts, in mergekit-moe's words."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field

from mergeid.basics.reading import read_yaml_documents
from mergeid.errors import MergeidError
from mergeid.io.model_names import ModelName
from mergeid.io.schema import Own, validated


class ExpertEntry(Own):
    """A model, and the prompts that it is for, or not for."""

    source_model: ModelName
    positive_prompts: list[str] | None = None
    negative_prompts: list[str] | None = None
    residual_scale: float | None = None
    noise_scale: Annotated[float, Field(ge=0)] | None = None


class MixtureFile(Own):
    """A mixture of experts."""

    base_model: ModelName
    experts: Annotated[list[ExpertEntry], Field(min_length=1)]
    shared_experts: list[ExpertEntry] | None = None
    gate_mode: str | None = None
    experts_per_token: Annotated[int, Field(ge=1, lt=1025)] | None = None
    dtype: str | None = None
    architecture: str | None = None


def read_mixture(path: str | os.PathLike[str]) -> MixtureFile:
    """What a recipe says. Raises `MergeidError` for no such file, no YAML, unknown keys or other kinds of values."""
    documents = read_yaml_documents(path, "a recipe in YAML")
    if len(documents) != 1:
        raise MergeidError(f"{os.fspath(path)} has {len(documents)} documents; expected one mixture")
    return validated(MixtureFile, documents[0], os.fspath(path))
