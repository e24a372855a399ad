"""Options of mergekit's commands that have other names here, or none, for those who type them out of habit."""

from __future__ import annotations

_STREAMED = "weights are read, merged and written piece by piece"
_ON_CPU = "weights are merged on the CPU; --device cuda is for networks that are run"
_ADAPTERS = "adapters are added to their base as they are read, in float32 or wider, and no copy is kept"
_ALIKE = "all models must have the same tensors, but for names that the library knows to be the same"
ADVICE = {
    "--allow-crimes": "models whose configs differ are merged with --config a, other architectures are not",
    "--unsafe-truncate-embeddings": "rows are matched by token instead; use --tokenizer a or union",
    "--transformers-cache": "set the environment variable HF_HUB_CACHE",
    "--lora-merge-cache": _ADAPTERS,
    "--lora-merge-dtype": _ADAPTERS,
    "--cuda": _ON_CPU,
    "--low-cpu-memory": _STREAMED,
    "--read-to-gpu": _ON_CPU,
    "--multi-gpu": f"{_ON_CPU}, and accelerate launch shares the work among processes",
    "--gpu-rich": _ON_CPU,
    "--out-shard-size": "use --shard-size, in bytes (5GB)",
    "--copy-tokenizer": "the first model's tokenizer is always copied; --tokenizer chooses another",
    "--no-copy-tokenizer": "the first model's tokenizer is always copied; an output that is a file has none",
    "--clone-tensors": "copies of a layer are always written out",
    "--trust-remote-code": "code that comes with a model is never run",
    "--random-seed": "use --seed",
    "--lazy-unpickle": "use --allow-pickle, which reads tensors one at a time",
    "--write-model-card": "use --push, which writes one; mergeid.json always says what was done",
    "--no-write-model-card": "only --push writes one",
    "--safe-serialization": "the result is always written as safetensors",
    "--no-safe-serialization": "the result is always written as safetensors",
    "--quiet": "redirect stderr, which takes the progress (2>/dev/null)",
    "-v": "mergeid.json beside the result says what was done, tensor by tensor",
    "--num-threads": "set the environment variable OMP_NUM_THREADS",
    "-j": "set the environment variable OMP_NUM_THREADS",
    "--async-write": "weights are written while others are read",
    "--write-threads": "weights are written while others are read",
    "--load-in-4bit": "hidden states are computed with the base's own weights, read one at a time where they are large",
    "--load-in-8bit": "hidden states are computed with the base's own weights, read one at a time where they are large",
    "--i-understand-this-is-not-useful-without-training": "experts that are all the same are never refused",
    "--tensor-union": _ALIKE,
    "-u": _ALIKE,
    "--tensor-intersection": _ALIKE,
    "-i": _ALIKE,
    "--out-path": "use -o",
    "--intermediate-dir": "what lies between stages is kept in a hidden folder beside the result until it is whole",
    "-I": "what lies between stages is kept in a hidden folder beside the result until it is whole",
    "--lazy": "stages are made anew each time, and named ones that are needed elsewhere by recipes of their own",
}
"""Option -> what to do in its place, or why nothing is to be done."""


def advised(text: str) -> str:
    """The message of an unknown option, with what stands here in the place of one of mergekit's."""
    option = text.removeprefix("No such option: ").partition(";")[0].partition(" ")[0]
    known = ADVICE.get(option) or ADVICE.get("--" + option.removeprefix("--no-"))
    if not text.startswith("No such option") or known is None:
        return text
    return f"No such option: {option}, which is mergekit's: {known}"
