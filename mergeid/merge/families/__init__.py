"""The merge methods besides `mergeid.merge.methods.linear`, one file per family; importing this registers them."""

from mergeid.merge.families import dare, fisher, regmean, spherical, stock, task_arithmetic, ties

__all__ = ["dare", "fisher", "regmean", "spherical", "stock", "task_arithmetic", "ties"]
