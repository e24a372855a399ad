"""mergeid's adapter for timm: any of its architectures, recognised from tensor names and shapes alone."""

from mergeid_timm.adapter import TimmAdapter

__all__ = ["TimmAdapter"]
