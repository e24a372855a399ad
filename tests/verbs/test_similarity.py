"""CKA, SVCCA and PWCCA against their definitions on whole matrices, their invariances, and the command."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from command_line import mergeid
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_bad_input import all_refused
from torch import nn

import mergeid as m
from mergeid.errors import MergeidError
from mergeid.evidence import similarity as s
from mergeid.evidence.similarity import CkaMap, PairRows, PairSums

seeds = st.integers(0, 2**31)


def pair(seed: int, rows: int = 60, p: int = 7, q: int = 5, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, p)) * rng.uniform(0.1, 3, p) + rng.standard_normal(p) * 5
    return x, x @ rng.standard_normal((p, q)) + noise * rng.standard_normal((rows, q))


def sums(
    x: np.ndarray, y: np.ndarray, pieces: int = 17, kind: type[PairSums] | type[PairRows] = PairSums
) -> PairSums | PairRows:
    found = kind()
    for a, b in zip(*(torch.from_numpy(v).split(pieces) for v in (x, y)), strict=True):
        found.add(a, b)
    return found.finish()


def hsic_unbiased(k: np.ndarray, l: np.ndarray) -> float:
    """Song et al. 2012, equation 4, with n × n matrices."""
    n = len(k)
    k, l = (g - np.diag(np.diag(g)) for g in (k, l))
    one = np.ones(n)
    return float(
        (np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one))
        / (n * (n - 3))
    )


def naive(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """All four indices from whole matrices: n × n Gram matrices, and a QR decomposition for the correlations."""
    n = len(x)
    centre = np.eye(n) - np.ones((n, n)) / n
    k, l = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    found = {"cka": float(np.sum(k * l) / np.sqrt(np.sum(k * k) * np.sum(l * l)))}
    k, l = x @ x.T, y @ y.T
    found["cka_unbiased"] = hsic_unbiased(k, l) / np.sqrt(hsic_unbiased(k, k) * hsic_unbiased(l, l))
    x, y = x - x.mean(0), y - y.mean(0)

    def kept(v: np.ndarray) -> np.ndarray:
        u, sv, _ = np.linalg.svd(v, full_matrices=False)
        k = int(np.searchsorted(np.cumsum(sv**2) / np.sum(sv**2), 0.99)) + 1
        return u[:, :k] * sv[:k]

    a, b = kept(x), kept(y)
    # cosines of the principal angles between two spaces are the canonical correlations
    found["svcca"] = float(np.cos(scipy.linalg.subspace_angles(a, b)).mean())
    qx, qy = np.linalg.qr(x)[0], np.linalg.qr(y)[0]
    u, rho, _ = np.linalg.svd(qx.T @ qy)
    variates = (qx @ u)[:, : len(rho)]
    alpha = np.abs(variates.T @ x).sum(1)
    found["pwcca"] = float((alpha * rho).sum() / alpha.sum())
    return found


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([(60, 7, 5), (40, 3, 9), (200, 12, 12)]), st.floats(0.01, 10), st.booleans())
def test_against_the_definitions(seed: int, shape: tuple[int, int, int], noise: float, rows: bool) -> None:
    x, y = pair(seed, *shape, noise=noise)
    found, expected = sums(x, y, kind=PairRows if rows else PairSums), naive(x, y)
    assert found.cka() == pytest.approx(expected["cka"], rel=1e-8)
    assert found.cka_unbiased() == pytest.approx(expected["cka_unbiased"], rel=1e-7, abs=1e-9)
    assert found.svcca() == pytest.approx(expected["svcca"], rel=1e-6, abs=1e-7)
    assert found.pwcca() == pytest.approx(expected["pwcca"], rel=1e-6, abs=1e-7)


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(0.01, 100), st.floats(-50, 50))
def test_rotations_and_scales_do_not_matter(seed: int, scale: float, shift: float) -> None:
    """CKA and SVCCA: orthogonal maps, one scale and a shift on either side; the canonical correlations of PWCCA: any
    invertible map of Y."""
    x, y = pair(seed, rows=120)
    rng = np.random.default_rng(seed)
    turned = scale * x @ np.linalg.qr(rng.standard_normal((7, 7)))[0] + shift
    mixed = y @ (np.eye(5) + 0.3 * rng.standard_normal((5, 5)))
    first, other = sums(x, y), sums(turned, y)
    for index in ("cka", "cka_unbiased", "svcca"):
        assert getattr(other, index)() == pytest.approx(getattr(first, index)(), rel=1e-6, abs=1e-8)
    if np.linalg.cond(np.cov(mixed.T)) < 1e6:
        assert sums(x, mixed).pwcca() == pytest.approx(first.pwcca(), rel=1e-5)


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_a_layer_is_like_itself_in_another_order(seed: int) -> None:
    x, _ = pair(seed)
    order = np.random.default_rng(seed).permutation(7)
    found = sums(x, x[:, order])
    assert [found.cka(), found.cka_unbiased(), found.svcca(), found.pwcca()] == pytest.approx([1] * 4, abs=1e-9)


def test_the_unbiased_index_is_zero_for_unrelated_layers() -> None:
    """With 30 rows and 100 neurons the plain one calls noise alike."""
    rng = np.random.default_rng(0)
    found = [sums(rng.standard_normal((30, 100)), rng.standard_normal((30, 100))) for _ in range(40)]
    assert np.mean([f.cka() for f in found]) > 0.6
    assert abs(np.mean([f.cka_unbiased() for f in found])) < 0.02


@pytest.mark.parametrize("shape", [(12, 40, 30), (12, 40, 5), (50, 20, 20), (3, 5, 5)])
def test_the_rows_say_what_their_sums_say(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they are fewer than the neurons, and where a layer is constant."""
    monkeypatch.setattr(s, "NUMBERS", 60)
    x, y = pair(3, *shape)
    for one, two in ((x, y), (1e3 + x, y), (np.ones_like(x), y)):
        both = [sums(one, two, 5, kind) for kind in (PairSums, PairRows)]
        values = [[f.cka(), f.cka_unbiased(), f.svcca(), f.pwcca(), f.count] for f in both]
        assert values[0] == pytest.approx(values[1], rel=1e-6, abs=1e-9)


def test_batches_do_not_matter_and_large_means_do_not_cancel() -> None:
    x, y = pair(1, rows=3000)
    x += 1e5
    values = [[f.cka(), f.cka_unbiased(), f.svcca(), f.pwcca()] for f in (sums(x, y, k) for k in (1, 999, 3000))]
    assert values[0] == values[1] == values[2]
    centred = sums(x - 1e5, y)
    assert values[0] == pytest.approx(
        [centred.cka(), centred.cka_unbiased(), centred.svcca(), centred.pwcca()], rel=1e-6
    )


def test_constant_layers_and_few_rows() -> None:
    x = np.ones((10, 3))
    found = sums(x, np.random.default_rng(0).standard_normal((10, 2)))
    assert [found.cka(), found.cka_unbiased(), found.svcca(), found.pwcca()] == [0, 0, 0, 0]
    assert sums(x[:3], x[:3]).cka_unbiased() == 0


def test_the_map_of_all_layers() -> None:
    """Against the naive index where one chunk holds everything, against the mean of chunks otherwise."""
    x, y = pair(2, rows=50)
    layers_a, layers_b = [x, x[:, :3]], [y, x[:, 3:], np.ones((50, 2))]

    def found(chunk: int, pieces: int) -> np.ndarray:
        result = CkaMap(chunk)
        split = [[torch.from_numpy(v).split(pieces) for v in layers] for layers in (layers_a, layers_b)]
        for k in range(len(split[0][0])):
            result.add([v[k] for v in split[0]], [v[k] for v in split[1]])
        return result.finish()

    whole = found(50, 7)
    for i, a in enumerate(layers_a):
        for j, b in enumerate(layers_b[:2]):
            assert whole[i, j] == pytest.approx(naive(a, b)["cka_unbiased"], rel=1e-9)
    assert np.isnan(whole[:, 2]).all()
    np.testing.assert_array_equal(whole, found(50, 50))
    pieces = [slice(0, 20), slice(20, 40), slice(40, 50)]

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([hsic_unbiased(a[p] @ a[p].T, b[p] @ b[p].T) for p in pieces]))

    expected = mean(x, y) / np.sqrt(mean(x, x) * mean(y, y))
    assert found(20, 7)[0, 0] == pytest.approx(expected, rel=1e-9)
    assert s.CkaMap().finish().shape == (0, 0)


def network(seed: int, width: int = 12) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, width), nn.ReLU(), nn.Linear(width, 4)
    ).eval()


def test_two_live_networks() -> None:
    a, b = network(0), network(1)
    data = [{"arg0": x} for x in torch.randn(200, 1, 6, 6)]
    found = m.similarity(a, b, data=data, example_inputs=data[0]["arg0"][None], per_example=9)
    assert [layer.layer for layer in found.layers] == ["0", "3", "5"] == found.names_a == found.names_b
    assert [layer.rows for layer in found.layers] == [1800, 200, 200] and found.cka_map.shape == (3, 3)
    with torch.no_grad():
        x, y = (net[:4](torch.stack([d["arg0"] for d in data])).double().numpy() for net in (a, b))
    expected = naive(x, y)
    assert found.layers[1].cka == pytest.approx(expected["cka"], rel=1e-5)
    assert found.cka_map[1, 1] == pytest.approx(expected["cka_unbiased"], rel=1e-5)
    other = m.similarity(a, b, data=data, example_inputs=data[0]["arg0"][None], per_example=9, batch_size=7)
    np.testing.assert_allclose(other.cka_map, found.cka_map, rtol=1e-5)
    same = m.similarity(a, a, data=data, example_inputs=data[0]["arg0"][None], layers=["3"])
    assert same.layers[0].cka_unbiased == pytest.approx(1) and same.names_a == ["3"]
    json.dumps(found.to_json())


def test_networks_of_another_width() -> None:
    data = [{"arg0": x} for x in torch.randn(60, 1, 6, 6)]
    found = m.similarity(network(0), network(1, 20), data=data, example_inputs=data[0]["arg0"][None])
    assert [layer.neurons for layer in found.layers] == [(6, 6), (12, 20), (4, 4)]
    assert "fewer than 5 rows per neuron" in found.notes[0]
    with pytest.raises(MergeidError, match=r"--layers 'x\*' matches no layer"):
        m.similarity(network(0), network(1), data=data, example_inputs=data[0]["arg0"][None], layers=["x*"])


@pytest.fixture
def work(tmp_path: Path) -> Path:
    import timm

    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_file(
            timm.create_model("test_resnet", num_classes=4, in_chans=1).state_dict(), tmp_path / f"{name}.safetensors"
        )
    images = np.random.default_rng(0).standard_normal((24, 1, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "data.npz", images=images)
    return tmp_path


def test_the_command(work: Path) -> None:
    pair_of = ("similarity", "a.safetensors", "b.safetensors", "--data", "data.npz")
    done = mergeid(*pair_of, "-o", "s.json", "--plot", "s.png", cwd=work, columns=120)
    assert done.code == 0, done.stderr
    assert done.written == ["s.json", "s.png"]
    assert "unbiased" in done.stdout and "PWCCA" in done.stdout
    found = json.loads((work / "s.json").read_text())
    assert found["format"] == "mergeid.similarity/1" and found["examples"] == 24
    assert len(found["map"]["cka_unbiased"]) == len(found["map"]["a"]) == len(found["layers"])
    all_refused(
        work,
        (["similarity", "a.safetensors", "b.safetensors"], ["--data"]),
        ([*pair_of, "--plot", "s.gif"], ["s.gif", ".png"]),
        ([*pair_of, "-o", "a.safetensors"], ["a.safetensors"]),
        ([*pair_of, "--layers", "none.*"], ["'none.*' matches no layer"]),
        (["similarity", "a.safetensors", "c.safetensors", "--data", "data.npz"], ["no such file.*c.safetensors"]),
    )


def test_outputs_that_are_no_numbers_are_refused_by_name() -> None:
    a, b = network(0), network(1)
    data = [{"arg0": x} for x in torch.randn(40, 1, 6, 6)]
    with torch.no_grad():
        b[3].weight[0, 0] = torch.nan
    with pytest.raises(MergeidError, match="layer 3 of Sequential puts out NaN or infinite numbers"):
        m.similarity(a, b, data=data, example_inputs=data[0]["arg0"][None])


@pytest.mark.parametrize("rows", [False, True])
def test_a_constant_layer_of_any_precision_is_like_nothing(rows: bool) -> None:
    x = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    constant = torch.full((40, 5), 0.1, dtype=torch.float64) * torch.tensor([1.0, 3.0, 7.0, 1e6, 1e-6])
    sums = PairRows() if rows else PairSums()
    sums.add(x, constant)
    found = sums.finish()
    assert found.cka() == found.svcca() == found.pwcca() == 0
    assert abs(found.cka_unbiased()) < 1e-9
    whole = CkaMap()
    whole.add([x], [constant])
    assert np.isnan(whole.finish()).all()


def test_models_of_two_number_formats() -> None:
    a, b = network(0), network(1)
    data = [{"arg0": x} for x in torch.randn(40, 1, 6, 6)]
    half = m.similarity(a, copy.deepcopy(b).to(torch.bfloat16), data=data, example_inputs=data[0]["arg0"][None])
    full = m.similarity(a, b, data=data, example_inputs=data[0]["arg0"][None])
    assert [one.cka for one in half.layers] == pytest.approx([one.cka for one in full.layers], abs=0.02)
