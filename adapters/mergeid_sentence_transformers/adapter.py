"""The adapter: the modules of a sentence-transformers folder as one network, from tokens to an embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid import plugins
from mergeid.plugins import Architecture, Batch, ConfigDifference, Contents, LossParts, MergeidError, TensorTable
from mergeid_sentence_transformers import folder as folders
from mergeid_sentence_transformers.folder import Step, steps_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

NAME = "SentenceTransformer"


class SentenceTransformersAdapter:
    """Folders with a ``modules.json`` of which more than the encoder has weights (``2_Dense``), or whose encoder lies
    in a sub-folder. An encoder alone is a model of transformers.

    `Architecture.options` holds ``config`` (`Contents.config`) and ``inner``, number of a module -> the architecture of
    transformers that it is.
    """

    name = "sentence_transformers"

    def contents(self, names: Sequence[str], read: Callable[[str], Any]) -> Contents | None:
        """The sub-folders with weights; see `mergeid_sentence_transformers.folder`."""
        return folders.contents(names, read)

    def unread(self, names: Sequence[str], read: Callable[[str], Any]) -> Sequence[str]:
        """An encoder's own pooled output; see `mergeid_sentence_transformers.folder`."""
        return folders.unread(names, read)

    def architectures(self) -> Iterable[str]:
        """One: what it is made of stands in the folder."""
        return [NAME]

    def recognise(
        self, table: TensorTable, config: Mapping[str, Any] | None, metadata: Mapping[str, str]
    ) -> Architecture | None:
        """From the list of modules."""
        if self.described(config, metadata) is None or config is None:
            return None
        steps = steps_of(config["modules"])
        library, inner = plugins.get_adapter("transformers"), {}
        for i, step in enumerate(steps):
            if step.encodes:
                found = library.recognise(_of_step(table, steps, step), config["parts"].get(step.folder), {})
                if found is None:
                    raise MergeidError(
                        f"config.json of module {step.folder or '0'} does not name a model_type of transformers; "
                        f"expected "
                        "the config of its encoder"
                    )
                inner[i] = found
        return Architecture(self.name, NAME, {"config": dict(config), "inner": inner})

    def resolve(self, name: str, table: TensorTable | None, config: Mapping[str, Any] | None) -> Architecture:
        """Raises `MergeidError` where there is no folder that says what the network is made of."""
        found = self.recognise(table or {}, config, {}) if name == NAME else None
        if found is None:
            raise MergeidError(
                f"--arch {self.name}/{name} needs the folder with its modules.json; name the folder, without --arch"
            )
        return found

    def build(self, arch: Architecture, *, device: str | torch.device = "cpu") -> nn.Module:
        """All modules with random weights, in eval mode. Raises `MergeidError` for one that cannot be built."""
        from mergeid_sentence_transformers.chain import built

        config = arch.options["config"]
        return built(steps_of(config["modules"]), config, arch.options["inner"], device)

    def tensor_names(self, arch: Architecture, model: nn.Module, table: TensorTable) -> dict[str, str]:
        """Module by module: ``2_Dense.linear.weight`` -> ``2.linear.weight``."""
        steps = steps_of(arch.options["config"]["modules"])
        found: dict[str, str] = {}
        keys = set(model.state_dict())
        for i, step in enumerate(steps):
            own = _of_step(table, steps, step)
            if i in arch.options["inner"]:
                part: Any = model.get_submodule(str(i))
                names = plugins.get_adapter("transformers").tensor_names(arch.options["inner"][i], part, own)
            else:
                names = {n: n for n in own}
            found |= {step.prefix + n: f"{i}.{k}" for n, k in names.items() if f"{i}.{k}" in keys}
        return found

    def example_inputs(
        self, arch: Architecture, model: nn.Module, generator: torch.Generator, batch_size: int = 2
    ) -> Batch:
        """Short random sequences, as the encoder takes them."""
        number, inner = self._encoder(arch)
        part = model.get_submodule(str(number))
        found = plugins.get_adapter("transformers").example_inputs(inner, part, generator, batch_size)
        return {k: v for k, v in found.items() if k != "labels"}

    def _encoder(self, arch: Architecture) -> tuple[int, Architecture]:
        """Raises `MergeidError` where no module is a network of transformers."""
        if not arch.options["inner"]:
            raise MergeidError(
                "none of the modules is an encoder of transformers, so that no inputs are known; use --match never"
            )
        found: tuple[int, Architecture] = next(iter(arch.options["inner"].items()))
        return found

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sentence's embedding [B, features]."""
        return next(iter(self.outputs(model, batch).values()))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The embedding, and the encoder's own pooled output, which no module reads but transformers would return."""
        from mergeid_sentence_transformers.chain import embedding, inputs

        found = model(inputs(batch))
        name, task = embedding(found)
        return {name: task, **{k: v for k, v in found.items() if k == folders.POOLED}}

    def loss(self, arch: Architecture, output: Tensor, batch: Batch) -> LossParts | None:
        """None: an embedding has no labels."""
        return None

    def preprocessing(self, arch: Architecture, folder: Path | None = None) -> Mapping[str, Any]:
        """The encoder's."""
        number, inner = self._encoder(arch)
        step = steps_of(arch.options["config"]["modules"])[number]
        library: Any = plugins.get_adapter("transformers")
        found: Mapping[str, Any] = library.preprocessing(inner, None if folder is None else folder / step.folder)
        return found

    def check(self, arch: Architecture, batch: Batch) -> None:
        """Raises `MergeidError` where a batch does not fit the encoder."""
        library: Any = plugins.get_adapter("transformers")
        library.check(self._encoder(arch)[1], batch)

    def space_label(self, arch: Architecture, axes: Iterable[tuple[str, int]]) -> str | None:
        """The encoder's labels for its own spaces, ``"2_Dense"`` for one of a module's own."""
        steps = steps_of(arch.options["config"]["modules"])
        listed = [(name.partition("."), axis) for name, axis in axes]
        numbers = sorted({int(name[0]) for name, _ in listed if name[0].isdecimal()})
        for number, inner in arch.options["inner"].items():
            own = [(name[2], axis) for name, axis in listed if name[0] == str(number)]
            if own:
                return plugins.get_adapter("transformers").space_label(inner, own)
        return steps[numbers[0]].folder if numbers else None

    def companion_files(self, folder: Path) -> list[Path]:
        """Configs, tokenizer and settings of every module."""
        return sorted(p for p in folder.glob("**/*") if p.suffix in (".json", ".txt", ".model") and p.is_file())

    def described(self, config: Mapping[str, Any] | None, metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
        """The config, where it lists modules."""
        return config if config is not None and "modules" in config and "parts" in config else None

    def config_differences(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[ConfigDifference]:
        """Modules that differ, and the fields of their configs."""
        one, two = ([(s.folder, s.kind.rpartition(".")[2]) for s in steps_of(c["modules"])] for c in (a, b))
        if one != two:
            return [ConfigDifference("modules", [k for _, k in one], [k for _, k in two])]
        found = plugins.part_differences(a["parts"], b["parts"])
        for folder in a["settings"]:
            found += [
                d._replace(effect="inputs") if d.field.endswith(("max_seq_length", "do_lower_case")) else d
                for d in plugins.part_differences(
                    a["settings"][folder], b["settings"].get(folder, {}), f"{folder}/".lstrip("/")
                )
            ]
        return found

    def adopted(self, config: Mapping[str, Any], other: Mapping[str, Any], *, head: bool) -> dict[str, Any]:
        """`other`'s function, module by module."""
        return {**deepcopy(dict(other)), "parts": plugins.part_adopted(config["parts"], other["parts"], head=head)}


def _of_step(table: TensorTable, steps: Sequence[Step], step: Step) -> dict[str, Any]:
    """A module's tensors by their names in its own file."""
    others = tuple(s.prefix for s in steps if len(s.prefix) > len(step.prefix))
    own = {n: info for n, info in table.items() if n.startswith(step.prefix) and not (others and n.startswith(others))}
    return {n.removeprefix(step.prefix): info for n, info in own.items()}
