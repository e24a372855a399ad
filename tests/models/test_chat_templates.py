"""Chat templates by name, against the conversations written down by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import TemplateError

from mergeid import MergeidError
from mergeid.io.opening import open_checkpoint
from mergeid.models.chat_templates import JINJA, TEMPLATES, commonest, with_chat_template

TALK = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Good day"), ("user", "How are you?")]
EXPECTED = {
    "alpaca": "Be brief.\n\n### Instruction:\nHello\n\n### Response:\nGood day\n\n### Instruction:\nHow are you?"
    "### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    "Good day<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>\n"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>\n"
    "<|start_header_id|>assistant<|end_header_id|>\n\nGood day<|eot_id|>\n"
    "<|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|>\n"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief.\n\nHello [/INST] Good day</s> [INST] How are you? [/INST]",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hello\n[|assistant|]Good day[|endofturn|]\n"
    "[|user|]How are you?\n[|assistant|]",
}


def _rendered(template: str, talk: list[tuple[str, str]]) -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    messages = [{"role": role, "content": content} for role, content in talk]
    text: str = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return text


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n != "exaone"])
def test_a_talk_reads_as_models_of_that_name_expect_it(name: str) -> None:
    assert _rendered(TEMPLATES[name], TALK) == EXPECTED[name]


def test_exaone_has_the_white_space_of_mergekit() -> None:
    """The model's own has the same words."""
    assert "".join(_rendered(TEMPLATES["exaone"], TALK).split()) == "".join(EXPECTED["exaone"].split())


def test_mistral_refuses_turns_out_of_order() -> None:
    with pytest.raises(TemplateError, match="expected user and assistant in turn"):
        _rendered(TEMPLATES["mistral"], TALK[:2] + TALK[3:])


def _model(folder: Path, template: str | None, rows: int = 3) -> Path:
    """A small model with a tokenizer of so many tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=rows, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    core = Tokenizer(WordLevel({f"t{i}": i for i in range(rows)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="t0")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_the_commonest_template_is_that_of_the_models_as_they_came(tmp_path: Path) -> None:
    """Also where another model's tokenizer takes the place of theirs."""
    import mergeid

    templates = {"a": None, "b": "{{ messages }}", "c": "{{ messages }}\n", "d": "{{ bos_token }}"}
    places = {n: _model(tmp_path / n, t, rows=4 + (n == "a")) for n, t in templates.items()}
    assert commonest([open_checkpoint(p) for p in places.values()]) == "{{ messages }}"
    out = tmp_path / "out"
    mergeid.merge(*places.values(), output=out, tokenizer="a", chat_template="auto", match="never")
    assert (out / JINJA).read_text().strip() == "{{ messages }}"


def test_names_files_letters_and_texts(tmp_path: Path) -> None:
    models = [open_checkpoint(_model(tmp_path / "a", "{{ 1 }}")), open_checkpoint(_model(tmp_path / "b", "{{ 2 }}"))]
    (tmp_path / "own.jinja").write_text("{{ 3 }}")
    for choice, expected in {
        "b": "{{ 2 }}",
        str(tmp_path / "own.jinja"): "{{ 3 }}",
        "{{ 4 }}": "{{ 4 }}",
        "llama3": TEMPLATES["llama3"].strip(),
    }.items():
        assert with_chat_template(models, choice, models)[0].beside[JINJA] == expected
    with pytest.raises(MergeidError, match="chat template 'vicuna' is not known; expected auto"):
        with_chat_template(models, "vicuna", models)
    for broken, line in (("{{ unclosed", 1), ("\n{% for m in messages %}{{ m }}", 2), ("{% endif %}", 1)):
        (tmp_path / "broken.jinja").write_text(broken)
        for choice, what in ((broken, ""), (str(tmp_path / "broken.jinja"), " .*broken.jinja")):
            with pytest.raises(MergeidError, match=f"the chat template{what} is not valid Jinja in line {line}"):
                with_chat_template(models, choice, models)
    marked = "{% generation %}{{ 5 }}{% endgeneration %}"  # a tag of transformers
    assert with_chat_template(models, marked, models)[0].beside[JINJA] == marked
