"""DyCoke: of a video, keep what differs from the same place in an earlier frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from vlprune.context import Context
from vlprune.pruner import Pruner, Source, register
from vlprune.selection import Selection, top


def references(frames: list[int], compat: str) -> list[int | None]:
    """For each frame, given their sizes, the one it is compared with; None: it stays whole.

    In groups of four the second is compared with the first, the fourth with the third, the third with the first.
    """
    found: list[int | None] = []
    for f, size in enumerate(frames):
        before = (None, f - 1, f - 2, f - 1)[f % 4]
        spared = compat == "official" and f % 4 == 2 and f + 2 >= len(frames)
        found.append(None if before is None or spared or frames[before] != size else before)
    return found


def quotas(frames: list[int], whole: list[bool], keep: int) -> list[int]:
    """Tokens that each frame keeps: whole frames all, the others equal parts of what is left of K, the earlier the larger.

    Where the whole frames alone exceed K, all frames share it in proportion to their size.
    """
    rest = keep - sum(size for size, w in zip(frames, whole, strict=True) if w)
    thin = [size for size, w in zip(frames, whole, strict=True) if not w]
    if rest < 0:
        whole, rest, thin = [False] * len(frames), keep, frames
    out, taken, seen, total = [], 0, 0, sum(thin)
    for size, w in zip(frames, whole, strict=True):
        seen += 0 if w else size
        now = -(-rest * seen // total) if total else 0
        out.append(size if w else now - taken)
        taken = taken if w else now
    return out


@register("dycoke")
@dataclass(frozen=True)
class DyCoke(Pruner):
    """Token temporal merging, which drops: of the frames with a reference those of lowest ``cos(x_i, y_i)`` stay.

    x_i is a projected token and y_i the one at the same place of the reference, see `references`. K decides how many
    tokens a compared frame keeps, see `quotas`; frames without reference stay whole if K allows, else they keep tokens
    spread evenly, and so does a single picture. Models that hand over every frame as a picture of its own need
    scope=prompt.

    compat: "official" keeps the third frame of the last group whole, as the authors' loop does.

    Differs: the authors give the share that compared frames lose (0.7) where K is given here, and put tokens in order of
    similarity. Their second half, a choice of cached keys while decoding, is `fastocr` and its neighbours' matter.
    """

    compat: Literal["corrected", "official"] = "corrected"

    stage = "projector"
    batched = True
    needs = frozenset({"features", "grids", "index"})
    source = Source(
        paper="arXiv:2411.15024", code="KD-TAO/DyCoke@dd74634", licence="Apache-2.0", fidelity="approximate"
    )

    def select(self, ctx: Context) -> Selection:
        x = F.normalize(ctx.features.float(), dim=1)
        n, device = len(x), x.device
        frames = [g.height * g.width for g in ctx.grids for _ in range(g.frames)]
        before = references(frames, self.compat)
        share = quotas(frames, [b is None for b in before], ctx.keep)
        cells = sum(frames)
        partner, frame, quota, lattice = (
            torch.tensor(t).to(device, non_blocking=True) for t in _tables(frames, before, share)
        )

        index = torch.arange(n, device=device) if ctx.index is None else ctx.index
        held = torch.full((cells,), -1, dtype=torch.int64, device=device).scatter(
            0, index, torch.arange(n, device=device)
        )
        other = torch.where(partner[index] < 0, -1, held[partner[index].clamp(min=0)])
        alike = (x * x[other.clamp(min=0)]).sum(dim=1)
        novel = torch.where(other < 0, 1.0 + lattice[index], 1.0 - alike)  # nothing to compare with: as it is spread

        order = novel.sort(descending=True, stable=True).indices
        order = order[frame[index][order].sort(stable=True).indices]  # frame by frame, the most novel first
        of = frame[index][order]
        sizes = torch.zeros(len(frames), dtype=torch.int64, device=device).scatter_add(0, of, torch.ones_like(of))
        place = torch.arange(n, device=device) - (sizes.cumsum(0) - sizes)[of]
        chosen = torch.zeros_like(novel).scatter(0, order, (place < quota[of]).float())
        return Selection(top(novel + 4 * chosen, ctx.keep), scores=novel)


def _tables(
    frames: list[int], before: list[int | None], share: list[int]
) -> tuple[list[int], list[int], list[int], list[float]]:
    """Per cell its partner (-1: none), its frame, and 1 where its frame keeps it if spread evenly; per frame its quota."""
    starts = [sum(frames[:f]) for f in range(len(frames))]
    partner, frame, lattice = [], [], []
    for f, (size, ref, k) in enumerate(zip(frames, before, share, strict=True)):
        partner += [-1] * size if ref is None else list(range(starts[ref], starts[ref] + size))
        frame += [f] * size
        spread = {(2 * i + 1) * size // (2 * k) for i in range(k)}
        lattice += [float(i in spread) for i in range(size)]
    return partner, frame, share, lattice
