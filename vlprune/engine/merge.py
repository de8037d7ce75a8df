"""Merges of several pictures as one, in the form that `gather_tokens` takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlprune.engine.kept import upload
from vlprune.selection import Selection

Part = tuple[Selection, int, int]  # of one picture: what stays, its first token of N, its first slot of the K


def entries_of(parts: Sequence[Part], device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
    """source, slot and weight of all merges together; None where nothing is merged.

    A kept token that no entry names is zero, not a copy, so each has an entry of weight 0 as well.
    """
    parts = [part for part in parts if part[0].merge is not None]
    if not parts:
        return None
    merges = [s.merge for s, _, _ in parts if s.merge is not None]
    lengths = [len(m.source) for m in merges] + [len(s.kept) for s, _, _ in parts]
    firsts = np.repeat([[old for _, old, _ in parts] * 2, [new for _, _, new in parts] * 2], lengths, axis=1)
    own = np.concatenate([np.arange(len(s.kept)) for s, _, _ in parts])
    shift = upload(torch.from_numpy(np.concatenate([firsts.ravel(), own])), device)
    old, new, own_slot = shift.split([firsts.shape[1], firsts.shape[1], len(own)])
    source = old + torch.cat([*(m.source for m in merges), *(s.kept for s, _, _ in parts)])
    slot = new + torch.cat([*(m.slot for m in merges), own_slot])
    weight = torch.cat([*(m.weight.float() for m in merges), torch.zeros(len(own), device=device)])
    return source, slot, weight
