"""What training minimises: answers behind a frozen language model, the tower's dense labels, and visual tokens like words."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.eval.tiny.drawing import CHARACTER, COLOR, SECOND_CHARACTER, SHAPE
from vlprune.eval.tiny.net import NetConfig

from .language import ASKED, LOOKED_AT
from .net import Decoder, Eyes
from .pictures import LABEL_CLASSES

TERMS = ("answers", "patches", "contents", "names", "named")
BACKGROUND = 0.1  # weight of a patch without a label
NAMED = ((CHARACTER, SECOND_CHARACTER), (SHAPE,), (COLOR,))  # rows of labels that CLS sums up together


class Losses(NamedTuple):
    answers: Tensor
    patches: Tensor
    contents: Tensor
    names: Tensor
    named: Tensor  # share of names that are right
    tasks: Tensor  # [3, T] over the answers' tokens by task: their number, sum of cross entropies, how many are right

    def statistics(self) -> Tensor:
        """[len(TERMS) + 3 T]"""
        return torch.cat([torch.stack(self[:-1]), self.tasks.flatten()]).detach()


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
    eyes: Eyes,
    heads: Heads,
    decoder: Decoder,
    prefix: Tensor,
    batch: dict[str, Tensor],
    scene_weight: float,
    speaks: bool = True,
    named: bool = True,
) -> Losses:
    """All terms of one batch.

    Args:
        prefix: [P] ids before the picture.
        batch: pixels [B, H, W, 3], labels [B, 5, N], names [B, 2, N], ids and marks [B, T].
        speaks: whether the language model answers; if not, `answers` is NaN.
        named: whether visual tokens are compared with words, which costs as much as several layers; if not, `names` is NaN.
    """
    states = eyes.states(batch["pixels"])
    patches, contents = heads(states[:, 1:], eyes.model.vision_tower.pooled(states), batch["labels"])
    visual = eyes.visual(states).to(decoder.embeddings.dtype)
    absent = torch.full_like(patches, torch.nan)
    names, right = like_words(visual, batch["names"], decoder) if named else (absent, absent)
    if not speaks:
        return Losses(absent, patches, contents, names, right, patches.new_zeros(3, len(ASKED)))
    answers, tasks = answered(visual, decoder, prefix, batch["ids"].long(), batch["marks"], scene_weight)
    return Losses(answers, patches, contents, names, right, tasks)


def like_words(visual: Tensor, names: Tensor, decoder: Decoder) -> tuple[Tensor, Tensor]:
    """How well the embedding nearest to a visual token is that of the word its patch shows.

        p(w | v) ~ exp(-|v - e_w|^2 / 2 s^2),    s^2 = mean |e - mean e|^2 / net.APART

    What a frozen language model can be asked about is words.

    Args:
        visual: [B, N, D]
        names: [B, 2, N] ids, 0 for none.
    Returns:
        Mean cross entropy over all names, and the share of those that the nearest embedding gives.
    """
    row, slot, patch = (names > 0).nonzero().unbind(1)
    wanted = names[row, slot, patch].long()
    scores = (F.linear(visual[row, patch], decoder.embeddings).float() - decoder.half_squares) * decoder.sharpness
    count = max(1, len(wanted))
    ce = F.cross_entropy(scores, wanted, reduction="sum") / count
    return ce, (scores.argmax(-1) == wanted).sum() / count


def answered(
    visual: Tensor, decoder: Decoder, prefix: Tensor, ids: Tensor, marks: Tensor, scene_weight: float
) -> tuple[Tensor, Tensor]:
    """[B, N, D] visual tokens, [B, T] ids and marks -> weighted cross entropy of the answers, and `Losses.tasks`."""
    before = F.embedding(prefix, decoder.embeddings).expand(len(ids), -1, -1)
    text = F.embedding(ids, decoder.embeddings)
    hidden = decoder.hidden(torch.cat([before, visual, text], 1))[:, -ids.shape[1] :]
    marks = marks[:, 1:].flatten()
    chosen = marks.nonzero()[:, 0]  # logits of the answers alone: the vocabulary is large
    logits = decoder.logits(hidden[:, :-1].flatten(0, 1)[chosen]).float()
    wanted, task = ids[:, 1:].flatten()[chosen], marks[chosen].long() - 1
    ce = F.cross_entropy(logits, wanted, reduction="none")
    parts = torch.stack([torch.ones_like(ce), ce.detach(), (logits.argmax(-1) == wanted).float()])
    tasks = ce.new_zeros(3, len(ASKED)).index_add_(1, task, parts)
    weights = ce.new_tensor([scene_weight if name in LOOKED_AT else 1.0 for name in ASKED])[task]
    return (ce * weights).sum() / weights.sum(), tasks
