"""The lmms-eval model: any family vlprune wraps, pruned by a plan. Errors are raised, never scored as empty answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from accelerate import Accelerator  # type: ignore[import-untyped]
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.model_utils.usage_metrics import log_usage
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from loguru import logger
from PIL import ImageFile
from tqdm import tqdm  # type: ignore[import-untyped]

import vlprune
from vlprune.api import adapter_of
from vlprune.errors import SpecError, VlpruneError
from vlprune.eval.answering import current_plan
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
    truncated: list[str] = field(default_factory=list)  # names of pictures that are cut short

    def means(self) -> dict[str, float]:
        """What the results file shows under "throughput", each with "avg_" in front."""
        n = max(1, self.prompts)
        return {
            "visual_tokens": self.visual / n,
            "kept_visual_tokens": self.kept / n,
            "visual_tokens_per_layer": self.layer_average / n,
            "kv_bytes": self.kv_bytes / n,
            "latency_ms": self.seconds * 1e3 / n,
            "truncated_pictures": len(self.truncated),
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
            known = "pretrained, plan, keep, dtype, attn_implementation, revision"
            raise SpecError(f"unknown model arguments: {', '.join(sorted(unknown))} (known: {known})")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise SpecError(f"batch_size={batch_size!r}: it is a number of at least 1")
        if plan is None and keep is not None:
            raise SpecError("keep= needs plan=, such as plan=divprune,keep=0.333")
        parsed = None if plan is None else vlprune.Plan.parse(plan, keep)  # misspelt plans fail before weights load
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

    def clean(self) -> None:
        """lmms-eval calls this after every evaluation; a lent model belongs to somebody else."""
        if not self.lent:
            super().clean()

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("vlprune answers generation tasks; tasks scored by likelihood are not supported")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("vlprune answers single-round tasks; multi-round tasks are not supported")

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Greedy or sampled answers, in the order of the requests."""
        order = Collator([r.args for r in requests], lambda a: -len(a[0]), group_fn=lambda a: a[2], grouping=True)
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding")
        answers: list[GenerationResult] = []
        for batch in order.get_batched(n=self.batch_size):
            try:
                conversations = [self._conversation(a) for a in batch]
            except UNREADABLE:  # name and count every picture that cannot be read, not just the first
                read_all((f"{a[4]}/{a[3]}", partial(self._conversation, a)) for a in (r.args for r in requests))
                raise
            answers += self._answer(conversations, batch[0][2], [a[4] for a in batch])
            bar.update(len(batch))
        bar.close()
        m = self.measured
        speed = m.new_tokens / m.seconds if m.seconds else 0.0
        extra: dict[str, Any] = {"total_requests": m.prompts, **m.means()}
        log_metrics(m.seconds, m.new_tokens, speed, additional_metrics=extra)
        if m.truncated:
            logger.warning(f"{len(m.truncated)} pictures are cut short: {', '.join(m.truncated)}")
        self.measured = Measured()
        return list(order.get_original(answers))

    def _conversation(self, arguments: tuple[Any, ...]) -> ChatMessages:
        """The prompt of one request. Truncated pictures are shown as far as they go, and named and counted."""
        _, to_messages, _, doc_id, task, split = arguments

        def read() -> ChatMessages:
            return ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))

        lenient = ImageFile.LOAD_TRUNCATED_IMAGES  # lmms-eval turns it on for the whole process
        try:
            ImageFile.LOAD_TRUNCATED_IMAGES = False
            return read()
        except UNREADABLE:
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            messages = read()  # raises where there is no picture at all
            self.measured.truncated.append(f"{task}/{doc_id}")
            return messages
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = lenient

    @torch.inference_mode()
    def _answer(
        self, conversations: list[ChatMessages], options: dict[str, Any], tasks: list[str]
    ) -> list[GenerationResult]:
        inputs = self._inputs(conversations).to(self.device, self.model.dtype)
        synchronise(self.device)
        started = time.perf_counter()
        ids = self.model.generate(**inputs, **self._generation(options))
        synchronise(self.device)
        seconds = time.perf_counter() - started
        new = ids[:, inputs["input_ids"].shape[1] :]
        lengths = [int((row != self.processor.tokenizer.pad_token_id).sum()) for row in new]
        self._measure(inputs, seconds, sum(lengths))
        answers = []
        for row, length, mask, task in zip(new, lengths, inputs["attention_mask"], tasks, strict=True):
            text = self.processor.tokenizer.decode(row, skip_special_tokens=True)
            for stop in options.get("until") or []:
                text = text.split(stop)[0] if stop else text
            counts = TokenCounts(input_tokens=int(mask.sum()), output_tokens=length)
            log_usage(type(self).__name__, task, int(mask.sum()), length, source=self.setting)
            answers.append(GenerationResult(text=text.strip(), token_counts=counts))
        return answers

    def _inputs(self, conversations: list[ChatMessages]) -> Any:
        """Prompts in the checkpoint's own template, padded on the left."""
        texts, pictures = [], []
        for conversation in conversations:
            images, videos, audios = conversation.extract_media()
            if videos or audios:
                raise VlpruneError("vlprune answers questions about pictures; this task has videos or sounds")
            pictures.append(images)
            messages = conversation.to_hf_messages()
            texts.append(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        start = self.processor.tokenizer.bos_token
        return self.processor(
            text=texts, images=pictures if any(pictures) else None, padding=True, return_tensors="pt",
            add_special_tokens=not (start and texts[0].startswith(start)),  # templates may write the first one
        )  # fmt: skip

    def _generation(self, options: dict[str, Any]) -> dict[str, Any]:
        """lmms-eval's generation arguments as `generate` takes them."""
        out = {k: v for k, v in options.items() if k not in ("until", "image_aspect_ratio") and v is not None}
        out.setdefault("max_new_tokens", MAX_NEW_TOKENS)
        out["do_sample"] = bool(out.get("do_sample") or out.get("temperature"))
        if not out["do_sample"]:
            out = {k: v for k, v in out.items() if k not in ("temperature", "top_p", "top_k")}
        return {"pad_token_id": self.processor.tokenizer.pad_token_id, **out}

    def _measure(self, inputs: Any, seconds: float, new_tokens: int) -> None:
        m, rows = self.measured, len(inputs["input_ids"])
        m.prompts, m.seconds, m.new_tokens = m.prompts + rows, m.seconds + seconds, m.new_tokens + new_tokens
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        visual_ids = torch.tensor(list(adapter_of(self.model).visual_ids.values()), device=ids.device)
        visual = int((torch.isin(ids, visual_ids) & mask).sum())
        m.visual += visual
        if current_plan(self.model) is not None and visual:
            trace = vlprune.trace(self.model)
            m.kept, m.layer_average = m.kept + trace.kept, m.layer_average + trace.layer_average
            m.kv_bytes += trace.kv_bytes
        else:
            m.kept, m.layer_average = m.kept + visual, m.layer_average + visual
            m.kv_bytes += int(mask.sum()) * kv_bytes_per_token(self.model)

    @property
    def setting(self) -> str:
        """Plan and versions in one line; the results file shows it under "usage", "by_source"."""
        parts = {
            "plan": current_plan(self.model) or "unpruned",
            "vlprune": vlprune.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attention": self.model.config._attn_implementation,
        }
        return " ".join(f"{name}={value}" for name, value in parts.items())


def kv_bytes_per_token(model: Any) -> int:
    """Keys and values of one token in all decoder layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * heads * width * config.num_hidden_layers * torch.empty(0, dtype=model.dtype).element_size())
