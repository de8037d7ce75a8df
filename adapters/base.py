"""What model families have in common. A family's file holds only what differs."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vlprune.context import Grid
from vlprune.engine.adapter import Item
from vlprune.errors import UnsupportedModel
from vlprune.plan import Stage

ALWAYS = frozenset({"index", "grids", "generator", "image_size", "padding", "newline"})
TOWER = frozenset({"received_attention", "encoder_features"})
BEFORE = frozenset({"features", "queries", "keys", "values", "project"}) | TOWER
DECODER = frozenset({
    "features", "text_features", "text_embeddings", "queries", "keys", "values", "last_query", "last_value", "text_keys",
    "last_attention", "text_attention", "next_attention", "norm",
})  # fmt: skip
CACHE = frozenset({"features", "keys", "values", "last_query", "last_value", "last_attention"})


class Adapter:
    """Paths, ids and what each stage offers, for one model instance."""

    family: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]  # class names of transformers models this adapter serves
    modalities: ClassVar[dict[str, tuple[str, str]]] = {"image": ("image_token_id", "get_image_features")}

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        self.model = model
        self.core: Any = model.model
        self.text: Any = getattr(self.core, "language_model", None) or self.core.text_model
        self.layers: nn.ModuleList = self.text.layers
        present = {m: (getattr(config, token, None), name) for m, (token, name) in self.modalities.items()}
        self.visual_ids = {m: int(token) for m, (token, _) in present.items() if token is not None}
        self.encoders = {m: name for m, (token, name) in present.items() if token is not None}
        rope = getattr(self.text.config, "rope_parameters", None) or {}
        self.mrope = "mrope_section" in rope
        self.tower: Any = self.find_tower()
        self.blocks: nn.ModuleList = self.find_blocks()
        self.projector: Any = self.find_projector()
        self.cls_tokens = 0
        self.feature_block = len(self.blocks) - 1

    # ---- paths

    def find_tower(self) -> Any:
        return self.core.vision_tower

    def find_blocks(self) -> nn.ModuleList:
        tower = getattr(self.tower, "vision_model", self.tower)  # transformers before 5.20 nests it
        blocks: nn.ModuleList = tower.encoder.layers
        return blocks

    def find_projector(self) -> Any:
        return self.core.multi_modal_projector

    def block_attention(self, block: nn.Module) -> nn.Module:
        return block.self_attn  # type: ignore[return-value]

    def layer_attention(self, layer: nn.Module) -> nn.Module:
        return layer.self_attn  # type: ignore[return-value]

    # ---- what a stage offers

    def offers(self, stage: Stage) -> frozenset[str]:
        tower = TOWER | ({"cls_attention"} if self.cls_tokens else frozenset())
        if stage.name == "encoder":
            return ALWAYS | BEFORE | tower | ({"cls_value"} if self.cls_tokens else frozenset())
        if stage.layer == 0:
            return ALWAYS | BEFORE | tower | {"text_features", "text_embeddings", "next_attention", "norm"}
        if stage.layer is not None:
            return ALWAYS | DECODER | tower
        return ALWAYS | CACHE

    def why_not(self, stage: Stage) -> str | None:
        """Why this model has no such stage, and what to do; None if it has."""
        if stage.name == "decode":
            return "decode-time selection is not available yet; stages here are encoder, projector, a decoder layer, cache"
        return None

    # ---- pictures

    def items(self, modality: str, call: dict[str, Any], features: list[Tensor]) -> list[Item]:
        """The runs of visual tokens behind one call of the feature method, in prompt order."""
        raise NotImplementedError

    def bare_item(self, length: int) -> Item:
        """An item of a prompt that brought finished features, at the head of `length` placeholders."""
        return Item(Grid(1, 1, length))

    # ---- family code on the instance

    def attach(self, engine: Any) -> None:
        """Override what hooks cannot reach, on the instance alone."""

    def detach(self) -> None:
        """Undo `attach`."""


def find(model: nn.Module) -> Adapter:
    """The adapter of a model. UnsupportedModel names the families that have one."""
    from vlprune.adapters.families import FAMILIES

    name = type(model).__name__
    for adapter in FAMILIES:
        if name in adapter.architectures:
            return adapter(model)
    known = ", ".join(a for cls in FAMILIES for a in cls.architectures)
    raise UnsupportedModel(f"{name} has no adapter; vlprune wraps {known}. Pass the ...ForConditionalGeneration model itself")
