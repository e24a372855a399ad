"""What a solve computes on its way is freed when it is used up, not when Python looks for cycles."""

from __future__ import annotations

import gc

import pytest
import torch
from tiny_transformers import configs
from torch import Tensor, nn

from mergeid.repair.solve import solve_network


def net(name: str, seed: int) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    kind = getattr(transformers, name)
    config = {k: v for k, v in configs()[name].items() if k not in ("model_type", "architectures")}
    return kind(kind.config_class(**config)).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM", "GPT2LMHeadModel"])
def test_no_activation_waits_for_the_collector(name: str) -> None:
    models, merged = [net(name, k) for k in (0, 1)], net(name, 2)
    ids = torch.randint(3, 90, (16, 11), generator=torch.Generator().manual_seed(0))
    gc.collect()
    gc.disable()
    try:
        done = solve_network(merged, models, [0.5, 0.5], lambda m, b: m(**b).logits, [{"input_ids": ids}])
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [tuple(x.shape) for x in gc.garbage if isinstance(x, Tensor) and x.shape[:2] == ids.shape]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert len(done) > 5 and not left
