"""What training minimises: cross entropy of the answers, and dense labels that teach the tower what lies where."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codec import READ_ANSWER, SCENE_ANSWER
from .drawing import CHARACTER, COLOR, LABEL_CLASSES, SECOND_CHARACTER, SHAPE
from .net import TinyNet

STATISTICS = ("answers", "patches", "contents", "read ce", "read acc", "scene ce", "scene acc")
BACKGROUND = 0.1  # weight of a patch without a label


class Objective(nn.Module):
    """Loss terms with the heads that only training needs.

    patches: each patch token names its characters, shape, colour, and whether a thing's centre lies in it.
    contents: the pooled CLS token, where there is one, names every character and every coloured shape in the picture.
    """

    prefix: Tensor

    def __init__(self, net: TinyNet, prefix: list[int], scene_weight: float) -> None:
        super().__init__()
        c = net.config
        self.patch_head = nn.Linear(c.vision_dim, sum(LABEL_CLASSES))
        self.characters = LABEL_CLASSES[CHARACTER] - 1
        self.shapes, self.colors = LABEL_CLASSES[SHAPE] - 1, LABEL_CLASSES[COLOR] - 1
        self.contents_head = nn.Linear(c.vision_dim, self.characters + self.shapes * self.colors)
        for head in (self.patch_head, self.contents_head):
            nn.init.normal_(head.weight, std=0.7 / c.vision_dim**0.5)
            nn.init.zeros_(head.bias)
        self.register_buffer("prefix", torch.tensor(prefix), persistent=False)
        self.scene_weight = scene_weight
        self._auxiliary, self._answers = self.auxiliary, self.answers

    def compile_terms(self) -> None:
        self._auxiliary = torch.compile(self.auxiliary, dynamic=False)
        self._answers = torch.compile(self.answers, dynamic=False)

    def forward(
        self, net: TinyNet, batch: dict[str, Tensor], keep: float, close_up: bool, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> losses of answers, patches and contents, and their STATISTICS.

        Args:
            keep: share of visual tokens the language model sees, drawn anew for each picture.
            close_up: whether the kept tokens and the text move together, or stay at their positions.
        """
        height, width = batch["pixels"].shape[1:3]
        size = (height, width)
        states = net.tower(batch["pixels"])
        patches, contents = self._auxiliary(net, states, net.arranged(batch["labels"], size))
        visual = net.visual(states, size)
        ids = batch["ids"].long()
        (b, n, d), p, t = visual.shape, len(self.prefix), ids.shape[1]
        positions = net.positions(p, size, t)
        if keep < 1:
            k = int(n * keep)
            kept = torch.rand(b, n, device=ids.device, generator=generator).topk(k, 1).indices.sort(1).values
            visual = visual.gather(1, kept[..., None].expand(-1, -1, d))
            positions = net.thinned(positions, kept, p, t, close_up)
        embed = net.text.embed_tokens
        prefix = embed(self.prefix).expand(b, -1, -1).to(visual.dtype)
        hidden = net.text(torch.cat([prefix, visual, embed(ids).to(visual.dtype)], 1), positions)
        answers, accuracies = self._answers(net, hidden[:, -t:], ids, batch["marks"])
        statistics = torch.cat([torch.stack([answers, patches, contents]).detach().float(), accuracies])
        return answers, patches, contents, statistics

    def auxiliary(self, net: TinyNet, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Tower states, [B, 5, P] labels -> losses of patches and of contents."""
        labels = labels.long()
        logits = self.patch_head(net.cells(states)).float().split(LABEL_CLASSES, -1)
        patches = states.new_zeros((), dtype=torch.float32)
        for row, part in enumerate(logits):
            wanted = labels[:, row].flatten()
            ce = F.cross_entropy(part.flatten(0, 1), wanted, reduction="none")
            weight = torch.where(wanted > 0, 1.0, BACKGROUND)
            patches = patches + (ce * weight).sum() / weight.sum()
        if not net.names_contents:
            return patches, torch.zeros_like(patches)
        pair = (labels[:, SHAPE] - 1) * self.colors + labels[:, COLOR]  # 1 .. shapes * colors
        pair = torch.where(labels[:, SHAPE] > 0, pair, 0)
        seen = labels[:, [CHARACTER, SECOND_CHARACTER]].flatten(1)
        wanted = torch.cat([_bag(seen, self.characters), _bag(pair, self.shapes * self.colors)], 1)
        named = self.contents_head(net.pooled(states)).float()
        return patches, F.binary_cross_entropy_with_logits(named, wanted)

    def answers(self, net: TinyNet, hidden: Tensor, ids: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] states of the text -> weighted cross entropy of the answers; the statistics of both kinds."""
        logits = net.logits(hidden[:, :-1]).float().flatten(0, 1)
        wanted, marks = ids[:, 1:].flatten(), marks[:, 1:].flatten()
        ce = F.cross_entropy(logits, wanted, reduction="none")
        right = (logits.argmax(-1) == wanted).float()
        read, scene = (marks == READ_ANSWER).float(), (marks == SCENE_ANSWER).float()
        weight = read + self.scene_weight * scene
        parts = [(value * kind).sum() / kind.sum() for kind in (read, scene) for value in (ce.detach(), right)]
        return (ce * weight).sum() / weight.sum(), torch.stack(parts)


def _bag(values: Tensor, classes: int) -> Tensor:
    """[B, N] of 0 (nothing) or 1 .. classes -> [B, classes] of 0 and 1."""
    zeros = torch.zeros(len(values), classes + 1, device=values.device)
    return zeros.scatter_(1, values, 1.0)[:, 1:]
