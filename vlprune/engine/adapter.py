"""What the engine asks of a model family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from vlprune.context import Grid
from vlprune.geometry import Lens
from vlprune.plan import Stage


@dataclass(frozen=True, eq=False)
class Item:
    """One picture, or one frame of a video where a prompt separates frames: a run of N visual tokens.

    A row is what the projector makes one token of; rows are numbered as the tower puts them out.

    grids: of the tokens, one after the other.
    rows: [N] int64 on the CPU, the row behind each token, -1 where there is none; None if tokens blend several rows.
    newline: [N] bool on the CPU, learned separators.
    """

    grids: tuple[Grid, ...]
    rows: Tensor | None = None
    newline: Tensor | None = None

    @property
    def grid(self) -> Grid:
        """The one that shows the whole picture: the first of more than one token."""
        return next((g for g in self.grids if g.tokens > 1), self.grids[0])

    @property
    def length(self) -> int:
        return sum(g.tokens for g in self.grids)


class Adapter(Protocol):
    """Where things are in one model. Adapters hold no state of a request."""

    family: ClassVar[str]
    core: Any  # takes input_ids and pixels, returns hidden states
    text: Any  # the decoder; `text.layers`, `text.norm`, `text.config`
    layers: nn.ModuleList
    visual_ids: dict[str, int]  # modality -> placeholder token id
    encoders: dict[str, str]  # modality -> name of the core's feature method
    tower: Any
    blocks: nn.ModuleList
    projector: Any  # where rows of the tower become tokens
    project: Any  # the same as a function of finished rows, [*, N, Dv] -> [*, N, D]
    side_projectors: tuple[nn.Module, ...]  # projectors that read inner blocks
    group: int  # consecutive rows of the projector module's input that make one token
    feature_block: int  # the vision block whose output the projector reads
    cls_tokens: int  # tokens in front of the patches
    mrope: bool
    sliding: list[bool]  # per decoder layer: attends within a window

    def offers(self, stage: Stage) -> frozenset[str]: ...

    def why_not(self, stage: Stage) -> str | None: ...

    def why_not_in_tower(self) -> str | None: ...

    def block_attention(self, block: nn.Module) -> nn.Module: ...

    def layer_attention(self, layer: nn.Module) -> nn.Module: ...

    def lens(self) -> Lens: ...

    def items(self, modality: str, call: dict[str, Any], tokens: int) -> list[Item]: ...

    def segments(self, call: dict[str, Any]) -> list[int] | None: ...

    def pool(self, call: dict[str, Any], patches: Tensor) -> Tensor: ...

    def tokens(self, call: dict[str, Any], items: list[Item], rows: Tensor) -> list[Tensor]: ...

    def attach(self, engine: Any) -> None: ...

    def detach(self) -> None: ...
