"""Nothing is opened, built, traced, proven or read twice, whatever the number of models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import mergeid
from mergeid.models.workbench import Workbench
from mergeid.request.request import Calibration, Reading, Run

PLACES = {
    "opened": "mergeid.io.opening.read_header",
    "built": "mergeid.models.load.load_checkpoint",
    "traced": "mergeid.neuron_graph.trace.trace",
    "proven": "mergeid.neuron_graph.verify.verify",
    "read": "mergeid.models.examples.examples_of",
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of `PLACES` is called from now on."""
    found: Counter[str] = Counter()

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return real(*args, **kwargs)

        return call

    for name, place in PLACES.items():
        module, attribute = place.rsplit(".", 1)
        real = getattr(__import__(module, fromlist=[attribute]), attribute)
        monkeypatch.setattr(place, counting(name, real))
    return found


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five fine-tunes and, last, their base."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=4, in_chans=1).state_dict()
    files = []
    for i in range(6):
        moved = {
            k: v + 0.02 * i * torch.randn(v.shape, generator=torch.Generator().manual_seed(i)) * v.std()
            if v.is_floating_point() and v.numel() > 1
            else v
            for k, v in state.items()
        }
        moved = {k: v.abs() if k.endswith("running_var") else v for k, v in moved.items()}
        files.append(folder / f"{i}.safetensors")
        save_file(moved, files[-1])
    x = np.random.default_rng(0).standard_normal((48, 1, 32, 32), dtype=np.float32)
    np.savez(folder / "data.npz", x=x)
    return [*files[1:], files[0]]


@pytest.mark.parametrize("matcher", [None, "cycle"])
def test_five_models_and_a_base(
    networks: list[Path], tmp_path: Path, counted: Counter[str], matcher: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # how a common order is found, is another test's
    monkeypatch.setattr("mergeid.matchers.joint.combined_matching", lambda similar, *_, **__: similar.graph.identity())
    monkeypatch.setattr("mergeid.matchers.joint._refined", lambda graph, weights, found, star, *_: star)
    data = networks[0].with_name("data.npz")
    mergeid.merge(
        [str(p) for p in networks[:-1]],
        base=str(networks[-1]),
        method="task_arithmetic",
        matcher=matcher,
        data=str(data),
        repair="none",
        arch="timm/test_resnet",
        output=tmp_path / "o.safetensors",
        refuse_above=float("inf"),
    )
    assert counted == {"opened": 6, "built": 6, "traced": 1, "proven": 1, "read": 1}


def test_a_plan_beside_a_base(networks: list[Path], counted: Counter[str]) -> None:
    a, b, base = (str(p) for p in (networks[0], networks[1], networks[-1]))
    mergeid.plan(a, b, base=base, data=str(networks[0].with_name("data.npz")), arch="timm/test_resnet")
    assert (counted["built"], counted["traced"], counted["proven"], counted["read"]) == (3, 1, 1, 1)


def test_a_model_is_held_once(networks: list[Path]) -> None:
    bench = Workbench(Reading("timm/test_resnet"), Run())
    one = bench.load(str(networks[0]))
    assert bench.load(str(networks[0])) is one and bench.graph(one) is bench.graph(one)
    data = Calibration(str(networks[0].with_name("data.npz")))
    assert bench.examples(data, one) is bench.examples(data, one)
    assert bench.examples(Calibration(), one) is None


def test_a_pair_is_planned_once(networks: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import mergeid.stages.plan as stage
    from mergeid.methods.registry import get_method
    from mergeid.methods.settings import MethodRequest
    from mergeid.request.request import Matching, Output
    from mergeid.stages.match import planned_members
    from mergeid.stages.open import open_models

    made: list[str] = []
    real = stage.make_plan
    monkeypatch.setattr(stage, "make_plan", lambda *args, **kwargs: (made.append("plan"), real(*args, **kwargs))[1])
    bench = Workbench(Reading(), Run())
    _, plan = stage.plan_pair(open_models(bench, networks[:2]), Matching(), Calibration())
    met = open_models(bench, networks[:2])  # as a verb does that goes on with what another has opened
    settings = MethodRequest(get_method("linear")).over(2, met.float_names)
    members = planned_members(met, settings, Matching(), Calibration(), Output())
    assert made == ["plan"] and members.plans[0].spaces == plan.spaces
    stage.plan_pair(met, Matching("always"), Calibration())
    assert made == ["plan", "plan"]


def test_a_model_that_is_copied_is_the_one_that_would_be_built(
    networks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mergeid.models.load as loading

    bench, alone, built = Workbench(Reading(), Run()), Workbench(Reading(), Run()), []
    real = loading.build
    monkeypatch.setattr(loading, "build", lambda *args, **kwargs: (built.append(1), real(*args, **kwargs))[1])
    one = bench.load(networks[0])
    before = {k: v.clone() for k, v in one.model.state_dict().items()}
    two = bench.load(networks[1], one)
    assert built == [1]
    wanted = alone.load(networks[1])
    assert all(torch.equal(v, wanted.model.state_dict()[k]) for k, v in two.model.state_dict().items())
    assert two.names == wanted.names and not two.model.training
    with torch.no_grad():
        said, expected = (m.outputs(m.model, two.example) for m in (two, wanted))
        assert all(torch.equal(said[name], value) for name, value in expected.items())
    # and the first is left alone
    assert all(torch.equal(v, one.model.state_dict()[k]) for k, v in before.items())
    assert not {p.data_ptr() for p in one.model.parameters()} & {p.data_ptr() for p in two.model.parameters()}
