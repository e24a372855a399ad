"""All campaigns; importing this registers them."""

from . import data, folders, graphs, headers, hub, kept, pickles, recipes, sketches, values  # noqa: F401
