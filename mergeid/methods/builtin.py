"""The merge methods besides `mergeid.methods.registry.linear`, one file per family; importing this registers them."""

from mergeid.methods import (
    arcee_fusion,
    breadcrumbs,
    dare,
    della,
    fisher,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    ram,
    regmean,
    sce,
    spherical,
    stock,
    task_arithmetic,
    ties,
)

__all__ = [
    "arcee_fusion", "breadcrumbs", "dare", "della", "fisher", "multislerp", "nearswap", "nuslerp", "passthrough", "ram",
    "regmean", "sce", "spherical", "stock", "task_arithmetic", "ties",
]  # fmt: skip
