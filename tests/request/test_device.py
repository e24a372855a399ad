"""The device that a run is asked for."""

import pytest
import torch

from mergeid.errors import MergeidError
from mergeid.request.boundary import verb
from mergeid.request.request import Run


@pytest.mark.parametrize(
    ("gpus", "mps", "expected"), [(0, False, "cpu"), (0, True, "cpu"), (2, False, "cuda"), (1, True, "cuda")]
)
def test_auto_takes_a_gpu_if_there_is_one(monkeypatch, gpus, mps, expected):
    _machine(monkeypatch, gpus, mps)
    assert Run.of(None, device="auto").device == expected


@pytest.mark.parametrize(("gpus", "device"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2"), (1, "mps")])
def test_a_device_that_is_not_there_is_named_with_what_to_do(monkeypatch, gpus, device):
    _machine(monkeypatch, gpus, mps=False)
    with pytest.raises(MergeidError, match=f"device '{device}' cannot be used here.*--device auto"):
        Run.of(None, device=device)


@pytest.mark.parametrize("device", [None, "cpu", "cuda", "cuda:1"])
def test_a_device_that_is_there_stays_as_it_was_named(monkeypatch, device):
    _machine(monkeypatch, gpus=2, mps=False)
    assert Run.of(None, device=device).device == device


def _machine(monkeypatch, gpus, mps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize("before", [True, False])
def test_convolutions_of_a_gpu_round_nothing_inside_of_a_verb(monkeypatch, before):
    _machine(monkeypatch, gpus=1, mps=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    seen = []

    @verb
    def asked(device: str) -> None:
        Run(device=device)
        seen.append(torch.backends.cudnn.allow_tf32)

    asked("cuda")
    asked("cpu")
    assert seen == [False, before] and torch.backends.cudnn.allow_tf32 is before


def test_what_a_caller_said_of_convolutions_alone_stays(monkeypatch):
    _machine(monkeypatch, gpus=1, mps=False)
    conv = getattr(torch.backends.cudnn, "conv", None)
    if not hasattr(conv, "fp32_precision"):
        pytest.skip("this torch has one setting for all layers")
    before = conv.fp32_precision
    try:
        conv.fp32_precision = "ieee"
        Run(device="cuda")
        assert conv.fp32_precision == "ieee"
    finally:
        conv.fp32_precision = before


@pytest.mark.parametrize("device", ["tpu", "", "cpu:x", "cuda:-1"])
def test_what_is_no_device_is_refused_before_anything_is_read(device: str) -> None:
    with pytest.raises(MergeidError, match=r"^device '.*' cannot be used here"):
        Run.of(None, device=device)
