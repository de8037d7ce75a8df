"""Asking a pruner: which items share a budget, and what stays of each of them."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch

from vlprune.engine.contexts import Contexts, Stand
from vlprune.engine.evict import Chosen, takes_all, tokens_of
from vlprune.engine.kept import Layout
from vlprune.engine.run import Run, Visual
from vlprune.errors import PruningError
from vlprune.plan import Step
from vlprune.selection import Selection

Group = tuple[int, list[Visual], int]  # row, items that share a budget, K
Batch = tuple[int, int, list[tuple[int, list[Visual]]]]  # N, K, (row, items that share a budget)


def groups_of(run: Run, step: Step, layout: Layout) -> list[Group]:
    """The groups of which something has to go."""
    groups: list[Group] = []
    whole = takes_all(step)
    for row, of_row in groupby(run.visuals, lambda v: v.row):
        mine = list(of_row)
        for members in [mine] if whole or step.budget.scope == "prompt" else [[v] for v in mine]:
            n, first = sum(layout.item(row, v.item).length for v in members), sum(v.tokens for v in members)
            if whole:
                assert run.opened is not None
                n, first = tokens_of(layout, row), tokens_of(run.opened, row)
            keep = min(step.budget.count(first), n)
            if keep < n:
                groups.append((row, members, keep))
    return groups


def counts_of(groups: list[Group], step: Step) -> dict[tuple[int, int], int] | None:
    """(row, item) -> K, or None where only the choice itself will tell."""
    if step.pruner.adaptive or any(len(members) > 1 for _, members, _ in groups):
        return None
    return {(row, members[0].item): keep for row, members, keep in groups}


def batches_of(groups: list[Group], layout: Layout) -> list[Batch]:
    """Groups of one size, budget and shape together."""
    alike: dict[Any, list[tuple[int, list[Visual]]]] = {}
    for row, visuals, keep in groups:
        n = sum(layout.item(row, v.item).length for v in visuals)
        alike.setdefault((n, keep, *(v.info.grids for v in visuals)), []).append((row, visuals))
    return [(n, keep, members) for (n, keep, *_), members in alike.items()]


def choose(stand: Stand, step: Step, batches: list[Batch]) -> Chosen:
    """Ask the pruner, a batch at a time."""
    chosen: Chosen = {}
    for n, keep, members in batches:
        with torch.no_grad():
            selections = step.pruner.select_many(Contexts(stand, members, keep))
        if len(selections) != len(members):
            raise PruningError(
                f"{step.pruner.name}.select_many was asked for {len(members)} selections and made {len(selections)}"
            )
        for selection, (row, visuals) in zip(selections, members, strict=True):
            selection.check(n, keep, step.pruner.adaptive)
            if len(visuals) == 1:
                chosen[row, visuals[0].item] = selection
            else:
                chosen |= _per_item(selection, row, visuals, stand.layout)
    return chosen


def _per_item(selection: Selection, row: int, visuals: list[Visual], layout: Layout) -> Chosen:
    """A prompt-wide selection, cut into its items. Counts per item are known only on the device: one wait."""
    if selection.merge is not None:
        raise PruningError("a merging pruner cannot share a budget among pictures; use scope=image")
    out: Chosen = {}
    at = 0
    for v in visuals:
        n = layout.item(row, v.item).length
        inside = (selection.kept >= at) & (selection.kept < at + n)
        scores = None if selection.scores is None else selection.scores[at : at + n]
        out[row, v.item] = Selection(selection.kept[inside] - at, None, scores)
        at += n
    return out
