"""Two test processes on two cores fight over threads otherwise, and small networks lose most. A machine that is busy
with something else is no failure either."""

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("busy", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
