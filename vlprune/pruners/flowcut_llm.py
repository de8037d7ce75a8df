"""FlowCut's second cut, in the language model: what the last prompt token takes from the visual tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlprune.context import Context
from vlprune.pruner import Scorer, Source, register
from vlprune.pruners.flowcut import flow_score, mean_attention, strength


@register("flowcut_llm")
@dataclass(frozen=True)
class FlowCutLLM(Scorer):
    """One cut before decoder layer 2, scored with queries, keys and values of layer 1, which has just run.

        a_j = mean_h softmax_j(q_h . k_hj / sqrt d)      b_j = mean_h softmax_j(v_h . v_hj / sqrt d)
        score_j = (a_j / sum a + b_j / sum b) |mean_h v_hj|_1

    with q, v of the last prompt token and both softmaxes over the visual tokens alone. The authors use it for models
    with many tokens, after `flowcut` in the tower: ``flowcut:keep=0.5+flowcut_llm:keep=0.11``. Position ids stay, as in
    their Qwen code; their LLaVA code numbers the kept tokens anew.
    """

    stage = "2"
    batched = True
    needs = frozenset({"last_query", "last_value", "keys", "values"})
    source = Source(paper="arXiv:2505.19536", code="TungChintao/FlowCut@a2ecd24", fidelity="exact")

    def score(self, ctx: Context) -> Tensor:
        values = ctx.values.float()
        a = mean_attention(ctx.last_query.float(), ctx.keys.float())
        b = mean_attention(ctx.last_value.float(), values)
        return flow_score(a, b, strength(values))
