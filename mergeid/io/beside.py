"""Names of the files that belong beside weights."""

from __future__ import annotations

_ENDINGS = (".json", ".txt", ".model", ".jinja", ".py", ".spm", ".vocab", ".bpe", ".tiktoken", ".sentencepiece")
_NOT_COMPANIONS = (
    "mergeid.json", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json",
    "requirements.txt", "README.txt",
)  # fmt: skip
"""Records of another run, not of the merged model."""


def is_companion(name: str) -> bool:
    """Whether a file of a model folder belongs beside its weights, judged by its name (``sub/file.json`` too)."""
    base = name.rsplit("/", 1)[-1]
    if base.startswith(".") or base in _NOT_COMPANIONS or base.endswith(".index.json"):
        return False
    if "/" in name:
        return name.count("/") == 1 and base.endswith(".json") and not name.startswith(("onnx/", "openvino/"))
    return base.endswith(_ENDINGS)
