"""Values that no parameter of a method can have."""

from __future__ import annotations

import pytest

from mergeid.errors import MergeidError
from mergeid.methods.registry import Parameter


@pytest.mark.parametrize("value", [1e20, -1e20, 10**400])
@pytest.mark.parametrize("low", [0.0, float("-inf")])
def test_a_number_beyond_all_weights_is_told_the_bound(value: float, low: float) -> None:
    """It was told that a number was expected."""
    with pytest.raises(MergeidError, match=r"expected a number of at most 1e\+12$"):
        Parameter("lambda", 1.0, low).checked(value)
