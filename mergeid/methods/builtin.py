"""The merge methods besides `mergeid.methods.registry.linear`, one file per family; importing this registers them."""

from mergeid.methods import dare, fisher, regmean, spherical, stock, task_arithmetic, ties

__all__ = ["dare", "fisher", "regmean", "spherical", "stock", "task_arithmetic", "ties"]
