"""The adapter: timm's models seen through mergeid's protocol. timm itself is imported on first use, since its import
takes seconds; recognising needs only the shipped index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid import plugins
from mergeid.plugins import (
    Architecture,
    Batch,
    ConfigDifference,
    LossParts,
    MergeidError,
    Resized,
    Size,
    TensorTable,
)
from mergeid_timm import compare, names, sizes
from mergeid_timm.index import bare_names, first_difference, load_index, nearest
from mergeid_timm.labels import space_label
from mergeid_timm.scores import check_labels, task
from mergeid_timm.shapes import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

HINTS = ("mergeid.arch", "architecture", "arch", "model_name")
"""Metadata keys of a safetensors file that may name the architecture."""

SHALLOW: tuple[dict[str, Any], ...] = ({"depth": 4}, {"depths": (1, 1, 2, 1)}, {"layers": (1, 1, 2, 1)})
"""What timm's classes call their depth."""

NOT_MODEL_OPTIONS = frozenset({"pretrained_cfg", "tag"})
COMPANION_SUFFIXES = frozenset({".json", ".txt"})
NOT_COMPANIONS = frozenset({"mergeid.json", "requirements.txt"})


def _kv_heads(model: nn.Module) -> list[int]:
    """Key and value heads of every block, where its class takes a list of them."""
    found = (getattr(getattr(b, "attn", None), "num_kv_heads", None) for b in getattr(model, "blocks", ()))
    return [h for h in found if isinstance(h, int)]


def shapes_of(table: TensorTable) -> dict[str, Shape]:
    """Shapes by bare name: wrappers' prefixes taken off."""
    return {bare: tuple(table[n].shape) for n, bare in bare_names(table).items()}


class TimmAdapter:
    """All of timm's architectures, with any number of classes (also none), input channels and image size.

    `Architecture.options` are keywords of ``timm.create_model`` read off the tensors or the config, plus
    ``pretrained_cfg`` (preprocessing facts from a config.json) and ``tag`` (``"a1_in1k"``).
    """

    name = "timm"

    def architectures(self) -> Iterable[str]:
        """All names in the shipped index (timm is not imported)."""
        return sorted(load_index().by_name)

    def recognise(
        self, table: TensorTable, config: Mapping[str, Any] | None, metadata: Mapping[str, str]
    ) -> Architecture | None:
        """From a hub config.json (``"architecture"``), the file's metadata, or tensor names and shapes alone.

        Several architectures may share one table; all are in `Architecture.candidates`, and the one with the
        shortest name is chosen.
        """
        stated = (config or {}).get("architecture")
        if isinstance(stated, str) and self.at_hand(stated):
            return self._stated(stated, table, config)
        if (config or {}).get("model_type") is not None:
            return None
        for key in HINTS:
            hint = metadata.get(key, "").removeprefix("timm/")
            if hint and self.at_hand(hint):
                return self._stated(hint, table, None)
        found = load_index().lookup(shapes_of(table))
        if not found:
            return None
        best = found[0]
        same = [m.name for m in found if m.options == best.options]
        return Architecture(self.name, best.name, dict(best.options), tuple(dict.fromkeys(same)))

    def at_hand(self, name: str, config: Mapping[str, Any] | None = None) -> bool:
        """Whether the shipped index has the name."""
        return name.removeprefix("timm/").partition(".")[0] in load_index().by_name

    def _stated(self, stated: str, table: TensorTable, config: Mapping[str, Any] | None) -> Architecture:
        """An architecture that a config or the metadata names, with options read off the table where possible."""
        name, _, tag = stated.partition(".")
        options: dict[str, Any] = {}
        if config is not None:
            options |= dict(config.get("model_args") or {})
            if isinstance(config.get("num_classes"), int):
                options["num_classes"] = config["num_classes"]
            facts = config.get("pretrained_cfg") or {k: v for k, v in config.items() if k in names.DATA_FACTS}
            if config.get("label_names"):  # timm puts them beside the others
                facts = {**facts, "label_names": config["label_names"]}
            if facts:
                options["pretrained_cfg"] = dict(facts)
                tag = tag or str(facts.get("tag") or "")
        if tag:
            options["tag"] = tag
        read = load_index().read_options(name, shapes_of(table)) if table else None
        return Architecture(self.name, name, options | (read or {}), (name,))

    def resolve(self, name: str, table: TensorTable | None, config: Mapping[str, Any] | None) -> Architecture:
        """The architecture that the user named (``resnet18``, ``resnet50.a1_in1k``), options read off the table.

        Raises `MergeidError` for an unknown name and for a table that cannot be that architecture's.
        """
        name = name.removeprefix("timm/")
        plain = name.partition(".")[0]
        if not self.at_hand(name) and not names.installed(plain):
            near = plugins.near_names(plain, self.architectures())
            raise MergeidError(
                f"timm has no architecture {name!r}"
                + (f"; near names are {', '.join(near)}" if near else "")
                + "; `mergeid adapters` says how to list all names"
            )
        theirs = config if config is not None and "architecture" in config else None
        arch = self._stated(name, table or {}, theirs)
        if table and self.at_hand(name) and load_index().read_options(plain, shapes_of(table)) is None:
            return self._despite_difference(arch, table)
        return arch

    def _despite_difference(self, arch: Architecture, table: TensorTable) -> Architecture:
        """The architecture for a table that is not in the index under this name: another pooling or size that the
        config states, or names of an old timm version. Raises `MergeidError` where it is neither."""
        model = self.build(arch, device="meta")
        if not self.mismatch(arch, model, table):
            return arch
        mapped = self.tensor_names(arch, model, table)
        classes = names.class_count(model, mapped, table)
        if classes is not None:
            changed = replace(arch, options={**arch.options, "num_classes": classes})
            if not self.mismatch(changed, self.build(changed, device="meta"), table):
                return changed
        shapes = shapes_of(table)
        difference = first_difference(arch.name, shapes) or "its tensors have other names or shapes"
        raise MergeidError(
            f"the checkpoint does not fit {arch.id}: {difference}; {self._nearest_words(shapes, arch.name)}"
        )

    def _nearest_words(self, shapes: Mapping[str, Shape], named: str) -> str:
        found = load_index().lookup(shapes)
        if found:
            return f"by its tensors it is timm/{found[0].name}"
        near = nearest(shapes)
        if near is None or near == named:
            return "name another --arch"
        return f"the nearest architecture by its tensors is timm/{near}"

    def nearest(self, table: TensorTable) -> str | None:
        """For error messages: the nearest architecture and the first tensor that differs, None where nothing is
        near. Takes about a second."""
        shapes = shapes_of(table)
        name = nearest(shapes)
        if name is None:
            return None
        difference = first_difference(name, shapes)
        return f"timm/{name}" + (f" (but {difference})" if difference else "")

    def build(self, arch: Architecture, *, device: str | torch.device = "cpu") -> nn.Module:
        """``timm.create_model`` without pretrained weights, in eval mode.

        Raises `MergeidError` where timm refuses the options.
        """
        import timm

        options = {k: v for k, v in arch.options.items() if k not in NOT_MODEL_OPTIONS}
        try:
            model = plugins.made_on(device, lambda: timm.create_model(arch.name, pretrained=False, **options))
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise MergeidError(
                f"timm {timm.__version__} cannot build {arch.name} with {options or 'its defaults'} ({said}); "
                "check the architecture's name and the options in config.json"
            ) from error
        return model.eval()

    def shrink(self, arch: Architecture) -> Architecture:
        """The architecture with fewer blocks of the same width: what verifies the graph of a model too large to run.

        Raises `MergeidError` where its class has no depth to set."""
        tried = list(SHALLOW)
        if heads := _kv_heads(self.build(arch, device="meta")):
            middle = heads[len(heads) // 2]
            tried.append({"depth": 4, "num_kv_heads": (heads[0], middle, middle, heads[-1])})
        for options in tried:
            smaller = replace(arch, options={**arch.options, **options})
            try:
                self.build(smaller, device="meta")
            except MergeidError:  # this class has another name for its depth
                continue
            return smaller
        raise MergeidError(f"timm's {arch.name} cannot be built with fewer blocks; give a checkpoint of it")

    def tensor_names(self, arch: Architecture, model: nn.Module, table: TensorTable) -> dict[str, str]:
        """Identity but for wrappers' prefixes and for names of old timm versions, which timm's own filters rename."""
        return names.tensor_names(arch.name, model, table)

    def mismatch(self, arch: Architecture, model: nn.Module, table: TensorTable) -> str | None:
        """The first tensor in which a built model and a checkpoint's table differ, in words; None where they agree."""
        mapped = self.tensor_names(arch, model, table)
        return names.first_mismatch(model, mapped, table)

    def example_inputs(
        self, arch: Architecture, model: nn.Module, generator: torch.Generator, batch_size: int = 2
    ) -> Batch:
        """``{"x": [B, C, H, W], "labels": [B]}`` at the smallest size that the architecture runs at."""
        import torch

        channels, height, width = self._input_size(arch, model)
        batch: Batch = {"x": torch.randn(batch_size, channels, height, width, generator=generator)}
        classes = int(getattr(model, "num_classes", 0) or 0)
        if classes > 0:
            batch["labels"] = torch.randint(classes, (batch_size,), generator=generator)
        return batch

    def _input_size(self, arch: Architecture, model: Any) -> Shape:
        facts = getattr(model, "pretrained_cfg", None) or {}
        channels, height, width = facts.get("input_size", (3, 224, 224))
        channels = int(arch.options.get("in_chans", channels))
        size = arch.options.get("img_size")
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else tuple(size)
            return channels, int(height), int(width)
        entry = next(iter(load_index().by_name.get(arch.name, [])), None)
        small = None if entry is None else entry.small
        return (channels, small, small) if small is not None else (channels, int(height), int(width))

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [B, classes], or pooled features where there is no head.

        Raises `MergeidError` where the batch has no image ``"x"`` of four dimensions.
        """
        return task(self._run(model, batch))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """All that the model returns, the logits first; errors as in `forward`."""
        output = self._run(model, batch)
        return plugins.task_first(task(output), plugins.returned_tensors(output))

    @staticmethod
    def _run(model: nn.Module, batch: Batch) -> Any:
        import torch

        x = batch.get("x")
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            given = list(x.shape) if isinstance(x, torch.Tensor) else ", ".join(batch) or "nothing"
            raise MergeidError(
                f"timm models take images 'x' [batch, channels, height, width], not {given}; give images"
            )
        return model(x)

    def owns(self, model: nn.Module) -> bool:
        """Whether it is one of timm's models, which has been imported then."""
        return type(model).__module__.startswith("timm.models.")

    def interface(self, names: Sequence[str]) -> list[str]:
        """All: timm's models return no by-products."""
        return list(names)

    def logits(self, model: nn.Module) -> str | None:
        """A classifier returns its logits and nothing else."""
        return "" if int(getattr(model, "num_classes", 0) or 0) > 1 else None

    def loss(self, arch: Architecture, output: Tensor, batch: Batch) -> LossParts | None:
        """Cross-entropy per example; None without labels or without a head.

        Raises `MergeidError` where labels do not fit the number of classes.
        """
        import torch
        from torch.nn.functional import cross_entropy

        labels = batch.get("labels")
        if labels is None or output.dim() != 2 or arch.options.get("num_classes") == 0:
            return None
        check_labels(arch.id, labels, output.shape[0], output.shape[1])
        labels = labels.long()
        right = output.argmax(dim=1) == labels
        return LossParts(cross_entropy(output, labels, reduction="none"), right.long(), torch.ones_like(labels))

    def preprocessing(self, arch: Architecture, folder: Path | None = None) -> Mapping[str, Any]:
        """Size, mean, standard deviation, interpolation and crop that the architecture's weights were trained with."""
        facts = names.data_facts(arch.name, str(arch.options.get("tag", "")), arch.options.get("pretrained_cfg"))
        size = arch.options.get("img_size", facts["size"][1:])
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = int(arch.options.get("in_chans", facts["size"][0]))
        found: dict[str, Any] = {"kind": "image", "input": "x", **facts, "size": (channels, height, width)}
        for key in ("mean", "std"):
            if len(found[key]) != channels:
                found[key] = (sum(found[key]) / len(found[key]),) * channels
        found["fixed_size"] = self._fixed_size(arch)
        if arch.options.get("num_classes") is not None:
            found["classes"] = int(arch.options["num_classes"])
        labels = (arch.options.get("pretrained_cfg") or {}).get("label_names")
        labels = labels if isinstance(labels, (list, Mapping)) else None
        numbered: dict[Any, Any] = dict(enumerate(labels)) if isinstance(labels, list) else dict(labels or {})
        found["class_names"] = {str(label): int(i) for i, label in numbered.items() if str(i).isdecimal()}
        return found

    @staticmethod
    def _fixed_size(arch: Architecture) -> bool:
        entry = next(iter(load_index().by_name.get(arch.name, [])), None)
        return entry is not None and (entry.has_size or (entry.sized and entry.small is None))

    def check(self, arch: Architecture, batch: Batch) -> None:
        """Raises `MergeidError` where a batch does not fit: channels, image size, label range."""
        import torch

        about = self.preprocessing(arch)
        x = batch.get("x")
        if not isinstance(x, torch.Tensor):
            given = ", ".join(k for k in batch if k != "labels") or "none"
            raise MergeidError(f"{arch.id} needs images under the key 'x', but the data has: {given}; rename one")
        channels, height, width = about["size"]
        wanted = f"[batch, {channels}, {height if about['fixed_size'] else 'height'}, "
        wanted += f"{width if about['fixed_size'] else 'width'}]"
        if x.dim() != 4 or x.shape[1] != channels or (about["fixed_size"] and tuple(x.shape[2:]) != (height, width)):
            raise MergeidError(
                f"{arch.id} takes images {wanted}, but the data has shape {list(x.shape)}; give images of that shape"
            )
        labels = batch.get("labels")
        if isinstance(labels, torch.Tensor) and about.get("classes"):
            check_labels(arch.id, labels, x.shape[0], about["classes"])

    def described(self, config: Mapping[str, Any] | None, metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
        """A hub config.json, or the architecture that the file's metadata name."""
        stated = (config or {}).get("architecture")
        if config is not None and isinstance(stated, str) and self.at_hand(compare.name_of(stated)):
            return config
        if config is not None and config.get("model_type") is not None:
            return None
        hints = (metadata.get(key, "") for key in HINTS)
        hint = next((h for h in hints if h and self.at_hand(compare.name_of(h))), None)
        return None if hint is None else {"architecture": hint}

    def config_differences(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[ConfigDifference]:
        """Architectures and options that change what the network computes; see `mergeid_timm.compare`."""
        return compare.differences(a, b, lambda name, o: self._unfilled(Architecture(self.name, name, o)))

    def adopted(self, config: Mapping[str, Any], other: Mapping[str, Any], *, head: bool) -> dict[str, Any]:
        """`other`'s architecture and options with `config`'s own classes and preprocessing."""
        return compare.adopted(config, other)

    def input_size(self, arch: Architecture) -> Size:
        """Of the images that it is built for."""
        return sizes.input_size(arch, self._unfilled(arch))

    def resized(
        self, arch: Architecture, table: TensorTable, to: Architecture, to_table: TensorTable
    ) -> Resized | None:
        """Tables of positions, resampled by timm; see `mergeid_timm.sizes`."""
        return sizes.resized(arch, table, to, to_table, self._unfilled)

    def config_at(
        self, config: Mapping[str, Any], to: Architecture, size: Size, like: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """`like`, or what describes `to`, with `config`'s own classes and preprocessing."""
        return sizes.config_at(config, to, size, like)

    def with_classes(self, arch: Architecture, classes: int) -> Architecture:
        """The architecture with a head for so many classes."""
        return replace(arch, options={**arch.options, "num_classes": classes})

    def config_with_classes(
        self, config: Mapping[str, Any], classes: int, labels: Sequence[str] | None
    ) -> dict[str, Any]:
        """A hub config.json that says so."""
        return names.config_with_classes(config, classes, labels)

    def _unfilled(self, arch: Architecture) -> nn.Module:
        return self.build(arch, device="meta")

    def space_label(self, arch: Architecture, axes: Iterable[tuple[str, int]]) -> str | None:
        """``"stage 2 block 1 conv1"``, ``"blocks.3 MLP hidden"``, ``"residual stream"``, …"""
        return space_label(axes)

    def companion_files(self, folder: Path) -> list[Path]:
        """config.json and other small JSON and text files beside the weights."""
        if not folder.is_dir():
            return []
        return [
            p
            for p in sorted(folder.iterdir())
            if p.is_file()
            and p.suffix in COMPANION_SUFFIXES
            and not p.name.startswith(".")
            and p.name not in NOT_COMPANIONS
            and not p.name.endswith(".index.json")
        ]
