"""What training minimises: cross entropy of the answers behind a frozen language model, and dense labels of the tower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.eval.tiny.codec import READ_ANSWER, SCENE_ANSWER
from vlprune.eval.tiny.drawing import CHARACTER, COLOR, SECOND_CHARACTER, SHAPE
from vlprune.eval.tiny.net import NetConfig

from .net import Decoder, Eyes
from .pictures import LABEL_CLASSES

STATISTICS = ("answers", "patches", "contents", "read ce", "read acc", "scene ce", "scene acc")
BACKGROUND = 0.1  # weight of a patch without a label
NAMED = ((CHARACTER, SECOND_CHARACTER), (SHAPE,), (COLOR,))  # rows of labels that CLS sums up together


class Heads(nn.Module):
    """Heads that only training needs.

    patches: each patch token names its characters, thing, colour, and whether a thing's centre lies in it.
    contents: the pooled CLS token names every character, thing and colour in the picture.
    """

    def __init__(self, c: NetConfig) -> None:
        super().__init__()
        self.patch = nn.Linear(c.vision_dim, sum(LABEL_CLASSES))
        self.contents = nn.Linear(c.vision_dim, sum(LABEL_CLASSES[rows[0]] - 1 for rows in NAMED))
        for head in (self.patch, self.contents):
            nn.init.normal_(head.weight, std=0.7 / c.vision_dim**0.5)
            nn.init.zeros_(head.bias)

    def forward(self, patches: Tensor, pooled: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, D], [B, D] states, [B, 5, N] labels -> losses of patches and of contents."""
        labels = labels.long()
        loss = patches.new_zeros((), dtype=torch.float32)
        for row, part in enumerate(self.patch(patches).float().split(LABEL_CLASSES, -1)):
            wanted = labels[:, row].flatten()
            ce = F.cross_entropy(part.flatten(0, 1), wanted, reduction="none")
            weight = torch.where(wanted > 0, 1.0, BACKGROUND)
            loss = loss + (ce * weight).sum() / weight.sum()
        wanted = torch.cat([bag(labels[:, rows].flatten(1), LABEL_CLASSES[rows[0]]) for rows in NAMED], 1)
        return loss, F.binary_cross_entropy_with_logits(self.contents(pooled).float(), wanted)


def bag(values: Tensor, classes: int) -> Tensor:
    """[B, N] of 0 (nothing) to classes - 1 -> [B, classes - 1] of 0 and 1."""
    zeros = torch.zeros(len(values), classes, device=values.device)
    return zeros.scatter_(1, values, 1.0)[:, 1:]


def losses(
    eyes: Eyes, heads: Heads, decoder: Decoder, prefix: Tensor, batch: dict[str, Tensor], scene_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> losses of answers, patches and contents, and their STATISTICS.

    Args:
        prefix: [P] ids before the picture.
        batch: pixels [B, H, W, 3], labels [B, 5, N], ids and marks [B, T].
    """
    states = eyes.states(batch["pixels"])
    patches, contents = heads(states[:, 1:], eyes.model.vision_tower.pooled(states), batch["labels"])
    table, ids = decoder.embeddings, batch["ids"].long()
    before = F.embedding(prefix, table).expand(len(ids), -1, -1)
    text = F.embedding(ids, table)
    hidden = decoder.hidden(torch.cat([before, eyes.visual(states).to(table.dtype), text], 1))[:, -ids.shape[1] :]
    marks = batch["marks"][:, 1:].flatten()
    chosen = marks.nonzero()[:, 0]  # logits of the answers alone: the vocabulary is large
    logits = decoder.logits(hidden[:, :-1].flatten(0, 1)[chosen]).float()
    wanted, marks = ids[:, 1:].flatten()[chosen], marks[chosen]
    ce, right = F.cross_entropy(logits, wanted, reduction="none"), (logits.argmax(-1) == wanted).float()
    kinds = [(marks == kind).float() for kind in (READ_ANSWER, SCENE_ANSWER)]
    weight = kinds[0] + scene_weight * kinds[1]
    answers = (ce * weight).sum() / weight.sum()
    parts = [(value * kind).sum() / kind.sum() for kind in kinds for value in (ce.detach(), right)]
    return answers, patches, contents, torch.stack([answers.detach(), patches.detach(), contents.detach(), *parts])
