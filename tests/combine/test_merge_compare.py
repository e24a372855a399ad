"""What makes two checkpoints unfit for each other, each named in one sentence. No tensor is read for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergeid.combine.tensor_plan import architecture_name, plan_many, plan_tensors
from mergeid.errors import MergeidError
from mergeid.io.checkpoint import Checkpoint
from mergeid.io.opening import open_checkpoint

BASE = {
    "emb.weight": torch.zeros(10, 4),
    "fc.weight": torch.zeros(4, 4),
    "fc.bias": torch.zeros(4),
    "norm.count": torch.tensor(3),
    "head.weight": torch.zeros(5, 4),
    "head.bias": torch.zeros(5),
}


def memory(name: str, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Checkpoint:
    return Checkpoint.from_tensors(tensors, source=name, config=config)


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    found = {**BASE, **{k.replace("__", "."): v for k, v in tensors.items()}}
    return {k: v for k, v in found.items() if v is not None}


def refuse(match: str, b: dict[str, torch.Tensor], a: dict[str, torch.Tensor] = BASE, **options) -> None:  # type: ignore[no-untyped-def]
    configs = options.pop("configs", (None, None))
    with pytest.raises(MergeidError, match=match) as caught:
        plan_tensors(memory("A", a, configs[0]), memory("B", b, configs[1]), **options)
    assert "\n" not in str(caught.value)


def test_plan() -> None:
    b = {**changed(head__weight=torch.zeros(7, 4), head__bias=None), "aux": torch.zeros(1)}
    plan = plan_tensors(memory("A", BASE), memory("B", b), skip=["head.*", "aux"])
    assert plan.merged == ("emb.weight", "fc.weight", "fc.bias")
    assert plan.compared == ("norm.count",)
    assert plan.skipped == ("head.weight", "head.bias") and plan.left_out == ("aux",)
    assert plan.dtypes == {} and plan.widened == ()


def test_dtypes() -> None:
    b = changed(fc__weight=torch.zeros(4, 4).bfloat16(), fc__bias=torch.zeros(4).double())
    plan = plan_tensors(memory("A", BASE), memory("B", b))
    assert plan.widened == ("fc.weight", "fc.bias") and plan.dtypes == {"fc.bias": "F64"}
    plan = plan_tensors(memory("A", BASE), memory("B", b), dtype="fp16", skip=["emb*"])
    assert plan.dtypes == {n: "F16" for n in plan.merged} and "emb.weight" not in plan.dtypes


def test_extra_and_missing_tensors() -> None:
    refuse(
        "tensor 'fc.bias' is only in A; expected the same tensors in both: .*--skip 'fc.bias'", changed(fc__bias=None)
    )
    refuse(r"tensor 'x' \(and 1 more\) is only in B;", changed(x=torch.zeros(1), y=torch.zeros(1)))
    refuse(
        r"tensor 'head.weight' \(and 1 more\) is only in A and tensor 'x' is only in B;",
        changed(head__weight=None, head__bias=None, x=torch.zeros(1)),
    )
    refuse(r"--skip 'head\.\*'", changed(head__weight=None, head__bias=None))


def test_a_counter_that_one_model_lacks_is_no_weight() -> None:
    """Files of old torch versions have no step counters, and those of torch's AveragedModel count the averages."""
    older = changed(norm__count=None)
    for shape in ((), (1,)):
        newer = changed(norm__count=torch.full(shape, 3))
        plan = plan_tensors(memory("A", newer), memory("B", older))
        assert plan.skipped == ("norm.count",) and plan.left_out == () and "norm.count" not in plan.compared
        plan = plan_tensors(memory("A", older), memory("B", newer))
        assert plan.skipped == () and plan.left_out == ("norm.count",)
        assert plan.merged == tuple(n for n, t in older.items() if t.is_floating_point())
    three = [memory("A", BASE), memory("B", BASE), memory("C", older)]
    assert plan_many(three).compared == () and plan_many(three[:2], base=three[2]).compared == ("norm.count",)
    refuse("tensor 'norm.count' is only in A;", older, changed(norm__count=torch.tensor([3, 4])))
    refuse("tensor 'scale' is only in B;", changed(scale=torch.tensor(1.0)))


def test_names_under_a_prefix_beside_others() -> None:
    wrapped = {f"net.{n}": t for n, t in BASE.items()}
    every = "because every name of B begins with 'net.'; expected two checkpoints of one architecture"
    refuse(every, wrapped)
    beside = r"^B has the tensors of A under 'net.', beside 'loss.weight' \(and 1 more\); expected .*: save its own"
    refuse(beside, {"loss.weight": torch.zeros(3), **wrapped, "loss.bias": torch.zeros(3)})


def test_different_architectures() -> None:
    other = {f"layer{i}": torch.zeros(1) for i in range(9)}
    refuse("A and B are different architectures: they share 0 of 14 tensor names; expected", other)
    configs = ({"architecture": "resnet18"}, {"architectures": ["BertModel"], "model_type": "bert"})
    refuse(r"different architectures \(resnet18 and BertModel\)", other, configs=configs)
    wrapped = {"module." + n: t for n, t in BASE.items()}
    refuse("because every name of B begins with 'module.'", wrapped)
    refuse("because every name of A begins with 'module.'", BASE, wrapped)


def test_architecture_names() -> None:
    assert architecture_name({"model_type": "bert"}) == "bert"
    assert architecture_name({}) is None and architecture_name(None) is None


def test_shapes() -> None:
    refuse(
        r"tensor 'fc.weight' has shape \[4, 4\] in A and \[3, 4\] in B; expected equal shapes",
        changed(fc__weight=torch.zeros(3, 4)),
    )
    head = changed(head__weight=torch.zeros(7, 4), head__bias=torch.zeros(7))
    refuse(r"and 1 more differ; .* heads and token embeddings .* with --skip 'head\.\*'", head)
    labels = tuple({"id2label": {str(i): f"c{i}" for i in range(n)}} for n in (5, 7))
    refuse(r"the task heads differ \(5 and 7 rows\): .*--skip 'head\.\*'", head, configs=labels)
    refuse(r"the task heads differ", head, configs=({"num_classes": 5}, {"num_classes": 7}))
    embedding = changed(emb__weight=torch.zeros(12, 4))
    vocabularies = ({"vocab_size": 10}, {"text_config": {"vocab_size": 12}})
    refuse(r"the vocabularies differ \(10 and 12 rows\)", embedding, configs=vocabularies)
    wider = {n: torch.zeros([2 * s for s in t.shape]) for n, t in BASE.items()}
    refuse("and 4 more differ; .* differ in size or architecture", wider)


def test_quantised_and_unknown_dtypes() -> None:
    for dtype, name in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.uint8, "U8")):
        refuse(f"tensor 'fc.weight' of B is {name}, a quantised or", changed(fc__weight=torch.zeros(4, 4).to(dtype)))
    a = memory("A", BASE)
    a.table["fc.weight"] = a.table["fc.weight"]._replace(dtype="F4")
    with pytest.raises(MergeidError, match=r"tensor 'fc.weight' of A is F4, a quantised or unknown dtype"):
        plan_tensors(a, memory("B", BASE))
    config = {"quantization_config": {"quant_method": "gptq"}}
    refuse("B is quantised .quantization_config in its config.json: gptq.", BASE, configs=(None, config))
    refuse(
        "'norm.count' is I64 in A and F32 in B; expected the same kind of numbers",
        changed(norm__count=torch.tensor(1.0)),
    )


def test_skip_patterns() -> None:
    refuse("--skip 'hed.*' matches no tensor of A or B", BASE, skip=["hed.*"])
    refuse("no weights of A and B are left to merge", BASE, skip=["*"])
    refuse("unknown dtype 'int4'", BASE, dtype="int4")


def test_label_maps() -> None:
    first = {"id2label": {str(i): f"class {i}" for i in range(5)}}
    second = {"id2label": {**first["id2label"], "3": "other"}}
    refuse(
        r"label maps differ: class 3 is 'class 3' in A and 'other' in B; .*--skip 'head\.\*'",
        BASE,
        configs=(first, second),
    )
    plan_tensors(memory("A", BASE, first), memory("B", BASE, second), skip=["head.*"])
    plan_tensors(memory("A", BASE, first), memory("B", BASE, first))
    placeholders = {"id2label": {str(i): f"LABEL_{i}" for i in range(5)}}
    plan_tensors(memory("A", BASE, first), memory("B", BASE, placeholders))
    names = [f"class {i}" for i in range(5)]
    plan_tensors(memory("A", BASE, first), memory("B", BASE, {"label_names": names}))
    refuse("class 0 is", BASE, configs=(first, {"label_names": names[::-1]}))


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "vocab.txt", "unigram"])
def test_tokenizers(tmp_path: Path, file: str) -> None:
    def folder(name: str, tokens: list[str]) -> Checkpoint:
        place = tmp_path / name
        place.mkdir()
        save_file(BASE, place / "model.safetensors")
        (place / "config.json").write_text(json.dumps({"vocab_size": 10}))
        vocab = {t: i for i, t in enumerate(tokens)}
        contents = {
            "tokenizer.json": json.dumps({"model": {"vocab": vocab}, "added_tokens": [{"content": "<x>", "id": 9}]}),
            "unigram": json.dumps({"model": {"vocab": [[t, -1.0] for t in tokens]}, "comment": name}),
            "vocab.json": json.dumps(vocab),
            "vocab.txt": "\n".join(tokens),
        }
        (place / ("tokenizer.json" if file == "unigram" else file)).write_text(contents[file])
        return open_checkpoint(place)

    a, same, b = folder("a", ["u", "v", "w"]), folder("same", ["u", "v", "w"]), folder("b", ["u", "w", "v"])
    plan_tensors(a, same)
    with pytest.raises(MergeidError, match=r"tokenizers differ: token 'v' is number 1 in .* 2 in .*'emb.weight'"):
        plan_tensors(a, b)
    with pytest.raises(MergeidError, match=r"token 'z' is number 3 in .*c and missing in .*a; expected one"):
        plan_tensors(folder("c", ["u", "v", "w", "z"]), a)
    plan_tensors(a, b, skip=["emb.*"])
