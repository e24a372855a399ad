"""The adapter: open_clip's models seen through mergeid's protocol. open_clip itself is imported on first use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeid import plugins
from mergeid.plugins import Architecture, Batch, ConfigDifference, Contents, LossParts, MergeidError, TensorTable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CONFIG = "open_clip_config.json"
MODEL, IMAGES = "model_cfg", "preprocess_cfg"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""What CLIP's images are normalised with where nothing else is said."""


class OpenClipAdapter:
    """open_clip's models, by name (``open_clip/ViT-B-32``) or from the config that lies beside their weights.

    `Architecture.options` holds ``config``, the content of ``open_clip_config.json``.
    """

    name = "open_clip"

    def contents(self, names: Sequence[str], read: Callable[[str], Any]) -> Contents | None:
        """The folder itself, with open_clip's config, where no ``config.json`` says what its weights are."""
        if CONFIG not in names or "config.json" in names:
            return None
        config = read(CONFIG)
        if not isinstance(config, Mapping) or not isinstance(config.get(MODEL), Mapping):
            raise MergeidError(f"{CONFIG} has no {MODEL}; expected the config that open_clip writes")
        return Contents(("",), dict(config))

    def architectures(self) -> Iterable[str]:
        """All names that the installed open_clip knows; none where it is not installed."""
        try:
            import open_clip
        except ImportError:
            return []
        return sorted(open_clip.list_models())

    def at_hand(self, name: str, config: Mapping[str, Any] | None) -> bool:
        """Whether the installed open_clip has a config of that name (it is not imported)."""
        spec = find_spec("open_clip")
        folders = (spec.submodule_search_locations or []) if spec is not None else []
        return any(f"{name}.json" in (p.name for p in Path(f, "model_configs").glob("*.json")) for f in folders)

    def recognise(
        self, table: TensorTable, config: Mapping[str, Any] | None, metadata: Mapping[str, str]
    ) -> Architecture | None:
        """From the config."""
        if self.described(config, metadata) is None or config is None:
            return None
        vision = config[MODEL].get("vision_cfg") or {}
        name = str(vision.get("timm_model_name") or ("ViT" if vision.get("patch_size") else "RN"))
        return Architecture(self.name, name, {"config": dict(config)})

    def resolve(self, name: str, table: TensorTable | None, config: Mapping[str, Any] | None) -> Architecture:
        """A named model. Raises `MergeidError` for an unknown name."""
        known = list(self.architectures())
        if name not in known:
            near = plugins.near_names(name, known)
            hint = (
                f"; near names are {', '.join(near)}"
                if near
                else ("; mergeid adapters 'open_clip/*' lists them" if known else "; pip install 'mergeid[open-clip]'")
            )
            raise MergeidError(f"open_clip has no model {name!r}{hint}")
        import open_clip

        return Architecture(self.name, name, {"config": {MODEL: open_clip.get_model_config(name)}})

    def build(self, arch: Architecture, *, device: str | torch.device = "cpu") -> nn.Module:
        """A float32 model with random weights in eval mode.

        Raises `MergeidError` where open_clip is not installed or refuses the config."""
        import torch

        try:
            import open_clip
        except ImportError as error:
            raise MergeidError(
                "this needs the library open_clip, which is not installed: pip install 'mergeid[open-clip]'"
            ) from error
        config = deepcopy(dict(arch.options["config"][MODEL]))
        custom = config.pop("custom_text", False) or "hf_model_name" in config.get("text_cfg", {})
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
        if "timm_model_name" in config["vision_cfg"]:
            config["vision_cfg"]["timm_model_pretrained"] = False
        try:
            model: Any = plugins.made_on(device, lambda: kind(**config))
        except Exception as error:
            raise MergeidError(
                f"open_clip cannot build {arch.name} from {CONFIG} ({type(error).__name__}: {plugins.reason(error)}); "
                "check "
                "that it belongs to the installed version"
            ) from error
        built: nn.Module = model.eval().to(device=device, dtype=torch.float32)
        return built

    def tensor_names(self, arch: Architecture, model: nn.Module, table: TensorTable) -> dict[str, str]:
        """Identity, but for wrappers' prefixes."""
        keys = set(model.state_dict())
        return {n: bare for n in table if (bare := n.removeprefix("module.")) in keys}

    def example_inputs(
        self, arch: Architecture, model: nn.Module, generator: torch.Generator, batch_size: int = 2
    ) -> Batch:
        """Random images ``"image"`` [B, 3, H, W] and token ids ``"text"`` [B, length], the last of them the highest, as
        CLIP's tokenizer ends a text."""
        import torch

        text = arch.options["config"][MODEL].get("text_cfg") or {}
        length, words = int(text.get("context_length", 77)), int(text.get("vocab_size", 49408))
        ids = torch.randint(1, max(words - 2, 2), (batch_size, length), generator=generator)
        ids[:, -1] = words - 1
        height, width = self._size(arch, model)
        return {"image": torch.randn(batch_size, 3, height, width, generator=generator), "text": ids}

    @staticmethod
    def _size(arch: Architecture, model: Any = None) -> tuple[int, int]:
        size = getattr(getattr(model, "visual", None), "image_size", None)
        size = size or arch.options["config"][MODEL]["vision_cfg"].get("image_size", 224)
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The image features, or the text's where there is no image."""
        return next(iter(self.outputs(model, batch).values()))

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Image and text features, the scale of the logits, a captioner's logits."""
        found = model(image=batch.get("image"), text=batch.get("text"))
        return dict(plugins.returned_tensors(found))

    def loss(self, arch: Architecture, output: Tensor, batch: Batch) -> LossParts | None:
        """None: features have no labels."""
        return None

    def preprocessing(self, arch: Architecture, folder: Path | None = None) -> Mapping[str, Any]:
        """Size, mean and standard deviation of the images."""
        stated = arch.options["config"].get(IMAGES) or {}
        return {
            "kind": "image",
            "input": "image",
            "size": (3, *self._size(arch)),
            "mean": tuple(stated.get("mean") or MEAN),
            "std": tuple(stated.get("std") or STD),
            "interpolation": stated.get("interpolation") or "bicubic",
            "crop_pct": 1.0,
            "fixed_size": True,
        }

    def space_label(self, arch: Architecture, axes: Iterable[tuple[str, int]]) -> str | None:
        """The innermost module that writes the space, where there is one."""
        listed = sorted({name.rpartition(".")[0] for name, axis in axes if axis == 0 and name.endswith("weight")})
        return listed[0] if len(listed) == 1 else None

    def companion_files(self, folder: Path) -> list[Path]:
        """The config and the tokenizer's files."""
        return sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt") and p.is_file())

    def described(self, config: Mapping[str, Any] | None, metadata: Mapping[str, str]) -> Mapping[str, Any] | None:
        """The config, where it is open_clip's."""
        return config if config is not None and isinstance(config.get(MODEL), Mapping) else None

    def config_differences(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[ConfigDifference]:
        """All fields of the model; how images are prepared is for the inputs."""
        one, two = ({k: v if isinstance(v, Mapping) else {"": v} for k, v in c[MODEL].items()} for c in (a, b))
        found = [d._replace(field=d.field.rstrip(".")) for d in plugins.part_differences(one, two)]
        images = plugins.part_differences({IMAGES: a.get(IMAGES)}, {IMAGES: b.get(IMAGES)})
        return found + [d._replace(effect="inputs") for d in images]

    def adopted(self, config: Mapping[str, Any], other: Mapping[str, Any], *, head: bool) -> dict[str, Any]:
        """`other`'s function with `config`'s own images."""
        return deepcopy({**other, **{k: v for k, v in config.items() if k == IMAGES}})
