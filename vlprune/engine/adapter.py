"""What the engine asks of a model family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from vlprune.context import Grid
from vlprune.plan import Stage


@dataclass(frozen=True, eq=False)
class Item:
    """One image, or one frame of a video where a prompt separates frames: a run of visual tokens."""

    grid: Grid
    newline: Tensor | None = None  # [N] bool
    tokens: int = 0  # N; 0 means the grid's own

    @property
    def length(self) -> int:
        return self.tokens or self.grid.tokens


class Adapter(Protocol):
    """Where things are in one model. Adapters hold no state of a request."""

    family: str
    core: nn.Module  # takes input_ids and pixels, returns hidden states
    text: nn.Module  # the decoder; `text.layers`, `text.norm`, `text.config`
    layers: nn.ModuleList
    visual_ids: dict[str, int]  # modality -> placeholder token id
    encoders: dict[str, str]  # modality -> name of the core's feature method
    tower: nn.Module
    blocks: nn.ModuleList
    projector: nn.Module
    feature_block: int  # the vision block whose output the projector reads
    cls_tokens: int  # tokens in front of the patches
    mrope: bool

    def offers(self, stage: Stage) -> frozenset[str]: ...

    def why_not(self, stage: Stage) -> str | None: ...

    def block_attention(self, block: nn.Module) -> nn.Module: ...

    def layer_attention(self, layer: nn.Module) -> nn.Module: ...

    def items(self, modality: str, call: dict[str, Any], features: list[Tensor]) -> list[Item]: ...

    def bare_item(self, length: int) -> Item: ...

    def attach(self, engine: Any) -> None: ...

    def detach(self) -> None: ...
