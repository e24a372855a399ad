"""mergeid's adapter for diffusers: pipelines, their networks, and single files in the names of other tools."""

from mergeid_diffusers.adapter import DiffusersAdapter

__all__ = ["DiffusersAdapter"]
