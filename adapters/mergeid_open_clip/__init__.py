"""mergeid's adapter for open_clip: folders with an ``open_clip_config.json``, and its named models."""

from mergeid_open_clip.adapter import OpenClipAdapter

__all__ = ["OpenClipAdapter"]
