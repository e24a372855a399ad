"""All campaigns; importing this registers them."""

from . import (  # noqa: F401
    adapters,
    data,
    folders,
    graphs,
    headers,
    hub,
    kept,
    pickles,
    places,
    plans,
    recipes,
    sketches,
    values,
)
