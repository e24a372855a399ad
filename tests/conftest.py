"""Two test processes on two cores fight over threads otherwise, and small networks lose most."""

import torch

torch.set_num_threads(1)
