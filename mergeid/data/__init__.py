"""Data for calibration and measurement: anything a user has, as a dataset of dict items that fit the model.

dataset = load_data("images/", adapter=adapter, arch=arch)
loader = DataLoader(dataset, batch_size=64, collate_fn=collate)
"""

from mergeid.data.batching import IGNORED, Item, ItemDataset, collate
from mergeid.data.load import load_data

__all__ = ["IGNORED", "Item", "ItemDataset", "collate", "load_data"]
