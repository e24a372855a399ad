"""mergeid's adapter for Hugging Face transformers: any model folder with a ``config.json``."""

from mergeid_transformers.adapter import TransformersAdapter

__all__ = ["TransformersAdapter"]
