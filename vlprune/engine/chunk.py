"""Where the pictures of a prompt lie: kinds of its tokens, and the run of slots that each picture takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlprune.engine.adapter import Item
from vlprune.engine.kept import Layout, Span
from vlprune.engine.run import Prompt, Run, Visual
from vlprune.errors import PruningError


def columns_of(mask: Any, cache: Any, length: int) -> Tensor | None:
    """Which of the last `length` tokens are no padding, [B, T], of a mask in any of the forms that models are given.

    For a static cache `generate` builds the [B, 1, T, S] masks itself. Every token sees at least itself, and none a pad.
    """
    if isinstance(mask, dict):  # one for each kind of layer
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor) or mask.dim() == 2:
        return mask
    past = 0 if cache is None else int(cache.get_seq_length())
    seen = mask[:, 0, :, past : past + length]
    return (seen if seen.dtype == torch.bool else seen == 0).any(dim=1)


def read_prompt(ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None, visual_ids: list[int],
                table: Callable[[Tensor], Tensor]) -> Callable[[], Prompt]:  # fmt: skip
    """The kind of every token: -1 padding, 0 text, 1 + n a placeholder of the n-th modality.

    The copy to the host starts now; the function returned waits for it, and for nothing that is queued behind it.
    """
    source: Any = ids if ids is not None else embeds
    kinds = torch.zeros(source.shape[:2], dtype=torch.int8, device=source.device)
    if ids is None:  # the caller embedded the prompt: the same test as the library's own placeholder mask
        rows = table(torch.tensor(visual_ids, device=source.device))
    for k, token in enumerate(visual_ids):
        found = ids == token if ids is not None else (source == rows[k]).all(-1)
        kinds = kinds.masked_fill(found, k + 1)
    if mask is not None:
        kinds = kinds.masked_fill(mask[:, -source.shape[1] :].to(kinds.device) == 0, -1)
    host, copied = kinds.to("cpu", non_blocking=True), None
    if kinds.is_cuda:
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(kinds.device))

    def wait() -> Prompt:
        if copied is not None:
            copied.synchronize()
        return [_runs(row) for row in host.numpy()]

    return wait


def _runs(kinds: Any) -> list[tuple[int, int]]:
    """[0, 0, 1, 1, 1] -> [(0, 2), (1, 3)]"""
    starts = np.flatnonzero(np.diff(kinds, prepend=kinds[:1] - 1))
    lengths = np.diff(starts, append=len(kinds))
    return list(zip(kinds[starts].tolist(), lengths.tolist(), strict=True))


def open_chunk(run: Run, modalities: list[str]) -> Layout:
    """Find the items of this chunk, once per prefill. `modalities`: kind k is the (k - 1)-th of them."""
    if run.layout is not None:
        return run.layout
    queues = {}
    for kind, modality in enumerate(modalities, 1):
        if modality in run.tapes:
            tape = run.tapes[modality]
            order = _prompt_order(run, kind, tape.items)
            queues[kind] = iter([(tape.items[s], tape, s) for s in order])
    rows: list[tuple[Span, ...]] = []
    for row, runs in enumerate(run.prompt):
        spans, at, picture = [], 0, 0
        for kind, length in runs:
            end = at + length
            if kind == 0 or (kind > 0 and kind not in queues):  # a placeholder's id without a picture is text
                spans.append(Span(at, length))
            while kind in queues and at < end:
                found = next(queues[kind], None)
                if found is None:
                    raise PruningError(f"the prompt has placeholders for more {modalities[kind - 1]}s than were given")
                info, tape, source = found
                tokens = info.length
                if at + tokens > end:
                    raise PruningError(f"a picture of {tokens} tokens meets a run of {end - at} placeholders; does the "
                                       "prompt come from the model's own processor?")  # fmt: skip
                run.visuals.append(Visual(row, len(run.visuals), at, tokens, info, tape, source, picture))
                spans.append(Span(at, tokens, run.visuals[-1].item))
                at, picture = at + tokens, picture + 1
            at = end
        rows.append(tuple(spans))
    run.opened = run.layout = Layout(tuple(rows), run.length)
    return run.layout


def complete(run: Run, modalities: list[str]) -> bool:
    """Whether all pictures of the prompt are there, as many tokens as it has placeholders (up to copies of rows)."""
    for kind, modality in enumerate(modalities, 1):
        wanted = sum(n for runs in run.prompt for k, n in runs if k == kind)
        given = sum(i.length for i in run.tapes[modality].items) if modality in run.tapes else 0
        if wanted and (not given or wanted % given):
            return False
    return True


def _prompt_order(run: Run, kind: int, items: list[Item]) -> list[int]:
    """Which item each picture of the prompt is: beams and several sequences per prompt repeat a row with all it shows."""
    tokens = [sum(n for k, n in runs if k == kind) for runs in run.prompt]
    lengths = [i.length for i in items]
    copies = max(1, sum(tokens) // max(1, sum(lengths)))
    order: list[int] = []
    first = 0
    for row in range(0, len(tokens), copies):
        stop, left = first, tokens[row]
        while left > 0 and stop < len(items):
            left -= lengths[stop]
            stop += 1
        order += list(range(first, stop)) * copies
        first = stop
    return order
