"""Names of the files that belong beside weights."""

from __future__ import annotations

_ENDINGS = (".json", ".txt", ".model", ".jinja", ".py", ".spm", ".vocab", ".bpe", ".tiktoken", ".sentencepiece")
_NOT_COMPANIONS = (
    "mergeid.json", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json",
    "requirements.txt", "README.txt", "adapter_config.json",
)  # fmt: skip
"""Records of another run, not of the merged model; and the config of an adapter that lies beside a whole model, whose
weights would be missing: transformers looks for them where it sees the config."""
SUBFOLDERS = ("additional_chat_templates", "custom_generate")
"""Where transformers looks for templates by name, and for code that generates."""
_TERMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
"""How the files begin that say on what terms weights may be passed on."""


def is_companion(name: str, *, of_parts: bool = False) -> bool:
    """Whether a file of a model folder belongs beside its weights, judged by its name (``sub/file.json`` too).

    Args:
        of_parts: whether sub-folders hold networks, so that their vocabularies count as well.
    """
    base = name.rsplit("/", 1)[-1]
    if base.startswith(".") or base in _NOT_COMPANIONS or base.endswith(".index.json"):
        return False
    if name.startswith(tuple(f"{sub}/" for sub in SUBFOLDERS)):
        return name.count("/") == 1 and base.endswith(_ENDINGS)
    if "/" in name:
        known = base.endswith(_ENDINGS if of_parts else ".json")
        return known and name.count("/") == 1 and not name.startswith(("onnx/", "openvino/"))
    return base.endswith(_ENDINGS) or base.upper().startswith(_TERMS)
