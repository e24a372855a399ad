"""Names of models as mergekit's recipes write them: as text, or as a table with path, revision and LoRA adapter."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

_EXPECTED = "a path or hub id, or a table with model (path, revision) and lora"
_WANTED = PydanticCustomError("wanted", "{expected}", {"expected": _EXPECTED})


def model_name(value: Any) -> str:
    """``{model: {path: org/name, revision: x}, lora: adapter}`` as ``org/name@x+adapter``; text as it is."""
    if isinstance(value, dict) and value.get("override_architecture") is not None:
        raise PydanticCustomError(
            "refused",
            "'override_architecture', which is not supported: the architecture is read off the config; see --arch",
        )
    if not isinstance(value, dict):
        return _path(value)
    if not {"model"} <= value.keys() <= {"model", "lora", "override_architecture"}:
        raise _WANTED
    lora = value.get("lora")
    return _path(value["model"]) + ("" if lora is None else f"+{_path(lora)}")


def _path(value: Any) -> str:
    if isinstance(value, dict) and {"path"} <= value.keys() <= {"path", "revision"}:
        path, revision = value["path"], value.get("revision")
        if isinstance(path, str) and isinstance(revision, (str, type(None))):
            return path if revision is None else f"{path}@{revision}"
    if not isinstance(value, str) or not value:
        raise _WANTED
    return value


ModelName = Annotated[
    str, PlainValidator(model_name), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}]})
]
