"""Run rebasin's coordinate descent on two state dicts; started by matching.py in an environment that has rebasin.

    python matching_rebasin.py ARCHITECTURE A.safetensors B.safetensors OUT.safetensors

Writes the permuted B and prints one line of JSON: CPU seconds of the search alone, and of setting it up (tracing).
"""

from __future__ import annotations

import json
import sys
import time

import timm
import torch
from rebasin import PermutationCoordinateDescent
from safetensors.torch import load_file, save_file


def main(architecture: str, a: str, b: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    models = []
    for path in (a, b):
        model = timm.create_model(architecture).eval()
        model.load_state_dict(load_file(path))
        models.append(model)
    began = time.process_time()
    descent = PermutationCoordinateDescent(*models, torch.rand(1, 3, 64, 64))
    set_up = time.process_time()
    descent.calculate_permutations()
    done = time.process_time()
    descent.apply_permutations()
    save_file({k: v.contiguous() for k, v in models[1].state_dict().items()}, out)
    print(json.dumps({"seconds": done - set_up, "set_up": set_up - began}))


if __name__ == "__main__":
    main(*sys.argv[1:])
