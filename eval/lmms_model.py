"""The lmms-eval model: any family vlprune wraps, pruned by a plan. Errors are raised, never scored as empty answers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.model_utils.usage_metrics import log_usage
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from tqdm import tqdm

import vlprune
from vlprune.api import adapter_of
from vlprune.errors import SpecError
from vlprune.eval.checkpoints import load
from vlprune.eval.files import UNREADABLE, read_all
from vlprune.eval.timing import synchronise

MAX_NEW_TOKENS = 1024  # lmms-eval's own default for tasks that name none


@dataclass(eq=False)
class Measured:
    """Sums over the prompts that were answered."""

    prompts: int = 0
    seconds: float = 0.0
    new_tokens: int = 0
    visual: int = 0
    kept: float = 0.0
    layer_average: float = 0.0
    kv_bytes: float = 0.0
    tasks: Counter[str] = field(default_factory=Counter)

    def means(self) -> dict[str, float]:
        """What the results file shows under "throughput", each with "avg_" in front."""
        n = max(1, self.prompts)
        return {
            "visual_tokens": self.visual / n,
            "kept_visual_tokens": self.kept / n,
            "visual_tokens_per_layer": self.layer_average / n,
            "kv_bytes": self.kv_bytes / n,
            "latency_ms": self.seconds * 1e3 / n,
        }


class Vlprune(lmms):
    """Model arguments of `--model vlprune`.

    Args:
        pretrained: a checkpoint folder, a repository, or the name of a shipped checkpoint.
        plan: how to prune, such as ``holov:keep=0.111``; without it the model runs as it is.
        keep: the budget, where `plan` has none.
        dtype: "auto", "bfloat16", "float16" or "float32".
        attn_implementation: "sdpa", "eager" or a flash implementation; default: transformers' choice.
        revision: of a repository.
        batch_size, max_batch_size, device: lmms-eval's own arguments.
    Raises:
        SpecError, UnsupportedStage, UnsupportedModel: before the first sample.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        plan: str | None = None,
        keep: float | int | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise SpecError(f"unknown model arguments {', '.join(sorted(unknown))}; known are pretrained, plan, keep, dtype, "
                            "attn_implementation and revision")  # fmt: skip
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise SpecError(f"batch_size={batch_size!r}: it is a number of at least 1")
        if plan is None and keep is not None:
            raise SpecError("keep= needs plan=, such as plan=divprune,keep=0.333")
        parsed = None if plan is None else vlprune.Plan.parse(plan, keep)  # a misspelt plan is found before the weights load
        self.accelerator = Accelerator()
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.accelerator.num_processes > 1:
            place = self.accelerator.device
        model, processor = load(pretrained, dtype=dtype, attention=attn_implementation, device=place, revision=revision)
        self._start(model, processor, int(batch_size))
        if parsed is not None:
            vlprune.wrap(self.model, parsed)

    @classmethod
    def around(cls, model: Any, processor: Any, batch_size: int) -> Vlprune:
        """A loaded model, wrapped or not; it stays loaded after an evaluation."""
        self = cls.__new__(cls)
        lmms.__init__(self)
        self.accelerator = Accelerator()
        self._start(model, processor, batch_size)
        self.lent = True
        return self

    def _start(self, model: Any, processor: Any, batch_size: int) -> None:
        self.model, self.processor, self.batch_size, self.lent = model, processor, batch_size, False
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if processor.chat_template is None and tokenizer.chat_template is None:
            raise SpecError("this checkpoint has no chat template; add a chat_template.jinja to its folder")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.measured = Measured()

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def plan(self) -> vlprune.Plan | None:
        return vlprune.plan_of(self.model) if hasattr(self.model, "_vlprune") else None
