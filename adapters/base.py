"""What model families have in common. A family's file holds only what differs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlprune.context import Grid
from vlprune.engine.adapter import Item
from vlprune.engine.kept import upload
from vlprune.errors import UnsupportedModel
from vlprune.geometry import Lens
from vlprune.plan import Stage

ALWAYS = frozenset({"index", "grids", "generator", "image_size", "padding", "newline"})
TOWER = frozenset({"received_attention", "encoder_features", "encoder_rows"})
BLOCKS = frozenset({"early_received_attention", "final_keys"})  # of other blocks of the tower
BLOCKS_WITH_CLS = frozenset({"early_cls_attention", "final_cls_attention"})
BEFORE = frozenset({"features", "queries", "keys", "values", "project"}) | TOWER | BLOCKS
DECODER = frozenset({
    "features", "text_features", "text_embeddings", "queries", "keys", "values", "last_query", "last_value", "text_keys",
    "last_attention", "text_attention", "text_self_attention", "next_attention", "norm", "embeddings", "guide",
})  # fmt: skip
CACHE = frozenset({
    "features", "queries", "keys", "values", "last_query", "last_value", "last_attention", "text_attention",
    "prompt_attention", "query_sum", "is_text", "guide",
})  # fmt: skip


class Adapter:
    """Paths, ids and what each stage offers, for one model instance."""

    family: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]  # class names of transformers models this adapter serves
    notes: ClassVar[tuple[str, ...]] = ()  # limits that show only while the model runs
    modalities: ClassVar[dict[str, tuple[str, str]]] = {"image": ("image_token_id", "get_image_features")}

    def __init__(self, model: nn.Module) -> None:
        whole: Any = model
        config = whole.config
        self.model = model
        self.core: Any = whole.model
        self.text: Any = getattr(self.core, "language_model", None) or self.core.text_model
        self.layers: nn.ModuleList = self.text.layers
        present = {m: (getattr(config, token, None), name) for m, (token, name) in self.modalities.items()}
        self.visual_ids = {m: int(token) for m, (token, _) in present.items() if token is not None}
        self.encoders = {m: name for m, (token, name) in present.items() if token is not None}
        self.mrope = False  # positions of several dimensions
        types = getattr(self.text.config, "layer_types", None)
        everywhere = getattr(self.text.config, "sliding_window", None) is not None
        self.sliding = [t == "sliding_attention" for t in types] if types else [everywhere] * len(self.layers)
        self.tower: Any = self.find_tower()
        self.blocks: nn.ModuleList = self.find_blocks()
        self.projector: Any = self.find_projector()
        self.project: nn.Module = self.projector
        self.side_projectors: tuple[nn.Module, ...] = ()
        self.group = 1
        self.cls_tokens = 0
        self.feature_block = len(self.blocks) - 1

    # ---- paths

    def find_tower(self) -> Any:
        return self.core.vision_tower

    def find_blocks(self) -> nn.ModuleList:
        """transformers before 5.20 nests some towers one level deeper."""
        tower = getattr(self.tower, "vision_model", self.tower)
        for path in ("encoder.layers", "encoder.layer", "transformer.layers", "blocks"):
            found: Any = tower
            for name in path.split("."):
                found = getattr(found, name, None)
            if isinstance(found, nn.ModuleList):
                return found
        raise UnsupportedModel(f"the {self.family} adapter finds no list of blocks in {type(self.tower).__name__}")

    def find_projector(self) -> Any:
        return self.core.multi_modal_projector

    def block_attention(self, block: nn.Module) -> nn.Module:
        for name in ("self_attn", "attn", "attention"):
            if hasattr(block, name):
                return getattr(block, name)
        raise UnsupportedModel(f"the {self.family} adapter finds no attention in {type(block).__name__}")

    def layer_attention(self, layer: nn.Module) -> nn.Module:
        return layer.self_attn  # type: ignore[return-value]

    # ---- what a stage offers

    def offers(self, stage: Stage) -> frozenset[str]:
        tower = TOWER | ({"cls_attention"} if self.cls_tokens else frozenset())
        early = BEFORE | tower | (BLOCKS_WITH_CLS if self.cls_tokens else frozenset())
        if stage.name == "encoder":
            return ALWAYS | early | ({"cls_value"} if self.cls_tokens else frozenset())
        if stage.layer == 0:
            return (
                ALWAYS | early | {"text_features", "text_embeddings", "embeddings", "next_attention", "norm", "guide"}
            )
        if stage.layer is not None:
            return ALWAYS | DECODER | tower
        if stage.name == "decode":
            return frozenset({"last_attention", "last_query", "keys", "index", "grids"})
        return ALWAYS | CACHE

    def why_not(self, stage: Stage) -> str | None:
        """Why this model has no such stage, and what to do; None if it has."""
        return None

    def why_not_in_tower(self) -> str | None:
        """Why tokens cannot leave between the blocks of the tower, if they can leave before the projector."""
        return None

    # ---- pictures

    def lens(self) -> Lens:
        """How the family's processor lays tokens over a picture."""
        return Lens()

    def items(self, modality: str, call: dict[str, Any], tokens: int) -> list[Item]:
        """The runs of visual tokens behind one call of the feature method, in prompt order.

        Args:
            call: the method's arguments by name.
            tokens: the number of rows the projector takes, or of tokens it made.
        """
        raise NotImplementedError

    def segments(self, call: dict[str, Any]) -> list[int] | None:
        """Lengths of the pictures where the tower attends within all of them in one masked call."""
        return None

    def pool(self, call: dict[str, Any], patches: Tensor) -> Tensor:
        """A value per patch [R, P, C], in the tower's order, as a value per row of the projector [U, C]: their mean."""
        flat = patches.flatten(0, 1)
        return flat if self.group == 1 else flat.unflatten(0, (-1, self.group)).float().mean(1)

    def tokens(self, call: dict[str, Any], items: list[Item], rows: Tensor) -> list[Tensor]:
        """A value per row of the projector [U, C] as a value per token [N, C] of every item; NaN where there is no row."""
        at = upload(torch.cat([item.rows for item in items if item.rows is not None]), rows.device)
        x = rows.index_select(0, at.clamp(min=0))
        if any(item.newline is not None for item in items):
            x = x.masked_fill((at < 0)[:, None], torch.nan)
        return list(x.split([item.length for item in items]))

    # ---- family code on the instance

    def attach(self, engine: Any) -> None:
        """Override what hooks cannot reach, on the instance alone."""

    def detach(self) -> None:
        """Undo `attach`."""


class FixedGrid(Adapter):
    """A family whose pictures, or the tiles they are cut into, all have one grid."""

    grid: Grid

    def items(self, modality: str, call: dict[str, Any], tokens: int) -> list[Item]:
        n = self.grid.tokens
        return [Item((self.grid,), torch.arange(i, i + n)) for i in range(0, tokens, n)]


def square(patches: Tensor, factor: int) -> Tensor:
    """Means over `factor` x `factor` patches of square pictures: [R, P, C] -> [R P / factor^2, C]."""
    side = round(patches.shape[1] ** 0.5)
    cells = patches.unflatten(1, (side // factor, factor, side // factor, factor))
    return cells.float().mean(dim=(2, 4)).flatten(0, 2)


def find(model: nn.Module) -> Adapter:
    """The adapter of a model. UnsupportedModel names the families that have one."""
    from vlprune.adapters.families import FAMILIES

    name = type(model).__name__
    for adapter in FAMILIES:
        if name in adapter.architectures:
            return adapter(model)
    known = ", ".join(a for cls in FAMILIES for a in cls.architectures)
    inner = (
        "model.get_base_model()" if hasattr(model, "peft_config") else "the ...ForConditionalGeneration model itself"
    )
    raise UnsupportedModel(f"{name} has no adapter; vlprune wraps {known}. Pass {inner}")


def outline(architecture: str) -> nn.Module:
    """A model of that class with the default configuration of its family, four decoder layers and no memory behind it."""
    import transformers

    cls: Any = getattr(transformers, architecture)
    with torch.device("meta"):
        return cls(cls.config_class(text_config={"num_hidden_layers": 4}))  # type: ignore[no-any-return]
