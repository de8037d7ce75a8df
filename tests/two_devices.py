"""A model cut over two devices, also on a machine that has none.

    python tests/two_devices.py qwen2_5_vl decoder        (what differs from one device, a line each; nothing if all is well)

`pretended()` makes devices far:0 and far:1 whose tensors are computed on the CPU, and which, like those of GPUs, cannot be
mixed: an operator that is given tensors of both raises. It changes torch for the process, so tests run it in one of its own.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import tiny
import torch
from laws.every import give_guide, plan
from reference import TOLERANCE, apart, decode, text_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import vlprune
from vlprune import DecodePruner
from vlprune.api import adapter_of
from vlprune.releases import CACHE, cache_of
from vlprune.support import STAGES, variants

CUTS = ("decoder", "tower")
MIXED = [  # several stages, positions numbered anew, heads of their own behind a removal
    "divprune:keep=0.7+fastv@1:keep=0.5+uniform@3:keep=0.3",
    "uniform:keep=0.5+positions=compact",
    "divprune:keep=0.7+h2o:keep=0.5",
    "fastv@1:keep=0.7+fastocr:keep=0.5",
    "fastocr:keep=0.5:smoothing=0.5:focal_layers=0/1/3",
    "fastocr:keep=0.3:window=1:period=2:focal_layers=0/3",
]
CAN_PRETEND = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")

# ---- a model on two devices


def places(model: Any, cut: str) -> dict[str, int]:
    """Module -> 0 or 1. "decoder": layers behind the first, norm and head are on 1. "tower": the second half of the tower,
    the projector and layers behind the second."""
    adapter, text = adapter_of(model), text_model(model)
    names = {module: name for name, module in model.named_modules()}
    tied = model.lm_head.weight is text.get_input_embeddings().weight
    late = {names[text.norm]} | (set() if tied else {"lm_head"})
    late |= {names[layer] for layer in text.layers[1 if cut == "decoder" else 2 :]}
    if cut == "tower":
        late |= {names[block] for block in adapter.blocks[len(adapter.blocks) // 2 :]}
        late.add(names[getattr(adapter.core, "multi_modal_projector", adapter.projector)])
    whole = late | {names[block] for block in [*text.layers, *adapter.blocks]}
    found: dict[str, int] = {}

    def visit(name: str, module: Any) -> None:
        inside = [n for n in whole if n.startswith(f"{name}." if name else "")]
        if name in whole or not inside:
            found[name] = int(name in late)
            return
        for child, part in module.named_children():
            visit(f"{name}.{child}".lstrip("."), part)
        for own, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            found[f"{name}.{own}".lstrip(".")] = 0

    visit("", model)
    return found


def spread(model: Any, cut: str, device: str) -> Any:
    """The model, cut over `device`:0 and 1 in place."""
    import accelerate

    at = {name: f"{device}:{n}" for name, n in places(model, cut).items()}
    accelerate.dispatch_model(model, at, main_device=f"{device}:0", force_hooks=True)
    for name, _ in list(model.named_parameters()):  # those of no module of the map
        module, _, own = name.rpartition(".")
        if name in at:
            holder = model.get_submodule(module)
            setattr(holder, own, torch.nn.Parameter(getattr(holder, own).to(at[name]), requires_grad=False))
    return model


def plans(model: Any, every: bool) -> list[Any]:
    """One rule of every kind of field at every stage, or every rule at every stage, and a few of several stages."""
    few = {"uniform", "fastv", "himap", "dart", "sgl", "vflowopt", "zoo_prune", "flowcut", "prumerge", "trim", "h2o",
           "lookm:tokens=all", "fastocr", "fasa", "spatten", "holov", "holov:attention=received"}  # fmt: skip
    assert few <= {name for name, _ in variants()}, "a name that is not there tests nothing"
    chosen = [(name, pruner) for name, pruner in variants() if every or name in few]
    single = [plan(pruner, stage, 0.5) for stage in STAGES for _, pruner in chosen]
    return [p for p in (*single, *map(vlprune.Plan.parse, MIXED)) if vlprune.supported(model, p)]


def answer(model: Any, x: Any) -> list[Tensor]:
    tokens, logits, cache = decode(model, x, 4)
    if any(p.device != model.lm_head.weight.device for p in text_model(model).layers.parameters()):
        assert len({layer.keys.device for layer in cache.layers}) == 2, "the cache is not on two devices"
    return [tokens, logits]


def beams(model: Any, x: Any) -> list[Tensor]:
    out = model.generate(**x, max_new_tokens=4, do_sample=False, num_beams=3, output_scores=True,
                         return_dict_in_generate=True)  # fmt: skip
    return [out.sequences, out.sequences_scores]


def two_turns(model: Any, x: Any) -> list[Tensor]:
    """The same pictures again, behind what is left of them."""
    first = model(**x, use_cache=True)
    mask = torch.cat([x["attention_mask"], x["attention_mask"]], 1)
    second = model(**{**x, "attention_mask": mask, CACHE: cache_of(first)}, use_cache=True)
    ids = second.logits[:, -1:].argmax(-1)
    mask = torch.cat([mask, torch.ones_like(ids)], 1)
    third = model(input_ids=ids, attention_mask=mask, **{CACHE: cache_of(second)}, use_cache=True)
    return [first.logits, second.logits, third.logits]


def gathered(model: Any, x: Any) -> list[Tensor]:
    with vlprune.gathered_attention(model) as seen:
        decode(model, x, 3)
    return seen.scores


@torch.no_grad()
def differences(family: str, cut: str, device: str, every: bool) -> list[str]:
    """What answers on two devices otherwise than on one."""
    with pytest.MonkeyPatch.context() as patch:
        give_guide(patch)
        for _, pruner in variants():
            if isinstance(pruner, DecodePruner):  # also among as few tokens as there are here
                patch.setattr(type(pruner), "worthwhile", lambda self, tokens: True)
        return _differences(family, cut, device, every)


def _differences(family: str, cut: str, device: str, every: bool) -> list[str]:
    (whole, inputs), (split, _) = tiny.FAMILIES[family](), tiny.FAMILIES[family]()
    alone = whole if device == "far" else whole.to(f"{device}:0")
    x, wrong = inputs(), []
    there, far = ({k: v.to(d) for k, v in x.items()} for d in (alone.device, f"{device}:0"))
    spread(split, cut, device)
    runs: list[tuple[Any, Any]] = [(answer, None), *((answer, p) for p in plans(whole, every))]
    if family == "llava":
        runs += [(way, vlprune.Plan.parse(text)) for way in (beams, two_turns) for text in MIXED]
    if not any(adapter_of(whole).sliding):
        runs.append((gathered, None))
    for way, p in [*runs, (answer, None)]:
        try:
            with ExitStack() as wrapped:
                for model in (alone, split) if p is not None else ():
                    wrapped.enter_context(vlprune.pruning(model, p))
                for want, found in zip(way(alone, there), way(split, far), strict=True):
                    distance = apart(found.to(want.device), want)
                    assert distance < (TOLERANCE if want.is_floating_point() else 1), f"off by {distance:.1e}"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-3:]
            at = " < ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in reversed(where))
            wrong.append(f"{way.__name__} {p}: {type(error).__name__} {str(error).splitlines()[0]} ({at})")
    return wrong


# ---- devices that are not there


class Far(Tensor):
    """A tensor that says it lies elsewhere; `near` holds its numbers."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: Any, near: Tensor, device: torch.device) -> Any:
        out = Tensor._make_wrapper_subclass(
            cls, near.size(), strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            device=device, requires_grad=near.requires_grad,
        )  # fmt: skip
        out.near = near
        return out

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.near.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Far({self.near}, device={str(self.device)!r})"


COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
PICKS = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """On the CPU, as if it were where the tensors say; GPUs take single numbers and indices from the CPU, nothing else."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    devices = {t.device for t in tensors if isinstance(t, Far)}
    devices |= {t.device for t in tensors if t.dim() and not (function in PICKS and devices)}
    if len(devices) > 1 and function not in COPIES:
        raise RuntimeError(f"{function} was given tensors of {', '.join(sorted(map(str, devices)))}")
    asked = kwargs.get("device")
    device = torch.device(asked) if asked is not None else tensors[0].device if tensors else None
    if asked is None and function not in COPIES and devices:
        (device,) = devices
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = function(*_near(args), **_near(kwargs))
    if device is None or device.type == "cpu":
        return out
    given = {id(_near(t)): t for t in tensors}
    return tree_map_only(Tensor, lambda t: given[id(t)] if id(t) in given else Far(t, device), out)


def _near(tree: Any) -> Any:
    return tree_map_only(Far, lambda t: t.near, tree)


class _Everywhere(TorchDispatchMode):
    """Also what is given no tensor, only a device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """torch.tensor and its like fill memory of their own."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function not in (torch.tensor, torch.as_tensor, torch.scalar_tensor) or kwargs.get("device") is None:
            return function(*args, **kwargs)
        device = kwargs.pop("device")
        return function(*tree_map_only(Far, lambda t: t.near.item() if not t.dim() else t, args), **kwargs).to(device)


class _Two(getattr(backend_registration, "_DummyBackendModule", object)):  # type: ignore[misc]
    def device_count(self) -> int:
        return 2


@contextmanager
def pretended() -> Iterator[None]:
    """far:0 and far:1."""
    backend_registration._setup_privateuseone_for_python_backend("far", backend_module=_Two())
    with _Everywhere(), _Literals():
        yield


if __name__ == "__main__":
    with pretended():
        found = differences(sys.argv[1], sys.argv[2], "far", "every" in sys.argv)
    print("\n".join(found))
    sys.exit(bool(found))
