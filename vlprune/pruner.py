"""Selection rules and their registry. A rule sees one item, knows no model and keeps no state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from vlprune.context import FIELDS, Context
from vlprune.errors import SpecError, nearest
from vlprune.selection import Heads, Merge, Selection, top

Fidelity = Literal["exact", "approximate", "idea"]
Tokens = Literal["visual", "all"]


@dataclass(frozen=True)
class Source:
    """Where a method comes from, and how close ours is to it.

    fidelity: "exact" keeps the tokens of the authors' code, "approximate" differs in a way the docstring names, "idea"
    is our reading of a method without public code.
    """

    paper: str = ""
    code: str = ""
    licence: str = ""
    fidelity: Fidelity = "exact"


@dataclass(frozen=True)
class Pruner:
    """A selection rule. Its fields are its hyper-parameters, nothing else; two calls with one Context agree.

    stage: where the paper puts it ("encoder", "projector", a decoder layer "k", "cache", "decode"); a plan may move it.
    needs: the Context fields `select` reads; checked when a model is wrapped.
    adaptive: the rule may keep fewer than `Context.keep` tokens.
    batched: `select` runs under torch.vmap, one pass for many contexts: it reads nothing but its `needs`, no shape in it
        hangs on values, the host looks at none, and what is random comes from the generator. Not inherited, as a subclass
        may do what its base does not.
    merges: the rule may answer with a merge, which cached keys and a budget shared by several pictures do not take.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[str] = "projector"
    needs: ClassVar[frozenset[str]] = frozenset()
    source: ClassVar[Source] = Source()
    adaptive: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    batched: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "batched" not in vars(cls):
            cls.batched = False

    def early_block(self, blocks: int) -> int:
        """The vision layer, of `blocks`, whose attention the fields ``early_...`` of a Context hold."""
        return 0

    def select(self, ctx: Context) -> Selection:
        """Choose `ctx.keep` of the N tokens."""
        raise NotImplementedError(f"{type(self).__name__} must implement select")

    def select_many(self, contexts: Sequence[Context]) -> list[Selection]:
        """`select` for G contexts of equal N, K, grids and layer: one pass if the rule is `batched`, else one by one."""
        return _at_once(self, list(contexts)) if self.batched else [self.select(ctx) for ctx in contexts]


class Scorer(Pruner):
    """A rule that gives every token one number and keeps the highest."""

    def score(self, ctx: Context) -> Tensor:
        """[N], higher stays."""
        raise NotImplementedError(f"{type(self).__name__} must implement score")

    def select(self, ctx: Context) -> Selection:
        scores = self.score(ctx).float()
        return Selection(top(scores, ctx.keep), scores=scores)


PAIRS = 2**26  # of tokens, at a time: rules that compare them all hold about three tensors of so many numbers
PARTS: dict[str, type] = {"merge": Merge, "heads": Heads}


def _at_once(rule: Pruner, contexts: list[Context]) -> list[Selection]:
    """`rule.select` of all contexts; those whose tensors have one shape, and all else is equal, go in one pass."""
    needs = rule.needs - {"generator"}  # every context has one of its own, and all are the same
    alike: dict[Any, list[int]] = {}
    for i, ctx in enumerate(contexts):
        values = [getattr(ctx, name) for name in needs]
        alike.setdefault(tuple(v.shape if isinstance(v, Tensor) else v for v in values), []).append(i)
    found: dict[int, Selection] = {}
    for members in alike.values():
        some = [contexts[i] for i in members]
        selections = _mapped(rule, some) if len(some) > 1 else [rule.select(some[0])]
        found.update(zip(members, selections, strict=True))
    return [found[i] for i in range(len(contexts))]


def _mapped(rule: Pruner, contexts: list[Context]) -> list[Selection]:
    """`rule.select` under torch.vmap."""
    first = contexts[0]
    fields = {name: getattr(first, name) for name in rule.needs | {"keep", "grids", "layer", "layers"}}
    read = [name for name, value in fields.items() if isinstance(value, Tensor)]
    tensors = {name: torch.stack([getattr(ctx, name) for ctx in contexts]) for name in read}

    def select(one: dict[str, Tensor]) -> dict[str, Any]:
        return _parts(rule.select(Context(**fields | one)))

    most = max(1, PAIRS // first.tokens**2)
    mapped = torch.vmap(select, randomness="same", chunk_size=most if most < len(contexts) else None)
    return _each(Selection, mapped(tensors))


def _parts(answer: Any) -> dict[str, Any]:
    """The tensors of a Selection by name, those of its merge and heads in a dict of their own."""
    parts = {name: value for name, value in vars(answer).items() if value is not None}
    return {name: value if isinstance(value, Tensor) else _parts(value) for name, value in parts.items()}


def _each(kind: type, parts: dict[str, Any]) -> list[Any]:
    """One `kind` for every entry along the first dimension of its parts."""
    columns = [_each(PARTS[name], p) if isinstance(p, dict) else p.unbind() for name, p in parts.items()]
    return [kind(**dict(zip(parts, row, strict=True))) for row in zip(*columns, strict=True)]


P = TypeVar("P", bound=type[Pruner])
PRUNERS: dict[str, type[Pruner]] = {}


def register(name: str) -> Callable[[P], P]:
    """Class decorator: make a Pruner known under a lower-case, unique name.

    Third parties register by the entry-point group ``vlprune.pruners``; each entry names a module or a Pruner class.
    """

    def add(cls: P) -> P:
        if name != name.lower() or not name.replace("_", "").isalnum():
            raise SpecError(f"a pruner's name is lower-case letters, digits and '_'; got {name!r}")
        if name in PRUNERS and PRUNERS[name].__qualname__ != cls.__qualname__:
            raise SpecError(f"pruner {name!r} is already registered by {PRUNERS[name].__module__}")
        unknown = cls.needs - FIELDS if isinstance(cls.needs, frozenset) else frozenset()  # wrappers have a property
        if unknown:
            raise SpecError(f"pruner {name!r} needs {sorted(unknown)}, which Context does not have")
        cls.name = name
        PRUNERS[name] = cls
        return cls

    return add


_entry_points_read = False


def find(name: str) -> type[Pruner]:
    """The registered class, looking at third parties' entry points if need be; SpecError names the nearest."""
    global _entry_points_read
    import vlprune.pruners  # noqa: F401  (registers the built-in rules)

    if name not in PRUNERS and not _entry_points_read:
        _entry_points_read = True
        for entry in metadata.entry_points(group="vlprune.pruners"):
            loaded: Any = entry.load()
            if isinstance(loaded, type) and issubclass(loaded, Pruner) and not loaded.name:
                register(entry.name)(loaded)
    if name not in PRUNERS:
        raise SpecError(f"unknown pruner {name!r}{nearest(name, PRUNERS)} (vlprune list shows all)")
    return PRUNERS[name]


class EncoderPruner(Pruner):
    """A rule that drops tokens step by step inside the vision tower.

    The engine calls `step` after every vision layer that has run, with the tokens still there, until the tower's
    feature layer; `Context.keep` is the final count, `Context.layer` the vision layer, `Context.layers` their number.
    """

    stage = "encoder"

    def start(self) -> Any:
        """The state of one image before its first layer."""
        return None

    def step(self, ctx: Context, state: Any) -> tuple[Selection | None, Any]:
        """Tokens that go on to the next layer (None: all of them), and the new state."""
        raise NotImplementedError(f"{type(self).__name__} must implement step")


class CachePruner(Pruner):
    """A rule for the rows of a key-value cache: asked behind every layer of the prefill, each key head for itself.

    tokens: "visual" chooses among a picture's tokens, and all text stays. "all" chooses among all tokens of a prompt, of
        which the budget is then a share, or of the turn of a conversation that brought a picture.
    heads: "each" lets every key head keep tokens of its own; "shared" takes the sum of their scores.

    Layers with a sliding window share one choice, as their masks must know where a row comes from.
    """

    stage = "cache"
    tokens: Tokens = "visual"
    heads: Literal["each", "shared"] = "each"

    def score(self, ctx: Context) -> Tensor:
        """[Hkv, N], higher stays."""
        raise NotImplementedError(f"{type(self).__name__} must implement score")

    def select(self, ctx: Context) -> Selection:
        scores = self.score(ctx).float()
        total = scores.sum(dim=0)
        own = Heads(top(scores, ctx.keep)) if self.heads == "each" else None
        return Selection(top(total, ctx.keep), scores=total, heads=own)


class DecodePruner(Pruner):
    """A rule that chooses, step by step, which cached visual tokens a decode step reads; nothing leaves the cache.

    Layers listed by `focal` choose; all others but the `dense` ones read the last choice. `reads` says what a focal layer
    reads itself: "all" tokens, after which its attention ranks them; the last "choice" of this step like any other layer
    (all, in the first focal layer), after which its attention narrows it; or its "own", made before it attends from its
    query and keys, which may differ from head to head and which no other layer reads.
    """

    stage = "decode"
    needs = frozenset({"last_attention"})
    reads: ClassVar[Literal["all", "choice", "own"]] = "all"

    def focal(self, layers: int) -> tuple[int, ...]:
        """Layers, ascending, that refresh the choice."""
        raise NotImplementedError(f"{type(self).__name__} must implement focal")

    def dense(self, layers: int) -> tuple[int, ...]:
        """Layers that read everything and choose nothing."""
        return ()

    def count(self, keep: int, tokens: int, layer: int, layers: int) -> int:
        """Tokens, of an item's `tokens`, that the choice made in `layer` consists of: the Context's `keep`."""
        return keep

    def worthwhile(self, tokens: int) -> bool:
        """Whether an item of that many tokens is worth choosing from; if not it is always read whole."""
        return True

    def start(self, ctx: Context) -> Any:
        """The state of one item after its prefill; `ctx` is that of the last focal layer's last prompt row (reads="own":
        without attention)."""
        return None

    def step(self, ctx: Context, state: Any) -> tuple[Selection, Any]:
        """The choice made at a focal layer of a decode step, and the new state."""
        raise NotImplementedError(f"{type(self).__name__} must implement step")

    def step_many(self, contexts: Sequence[Context], states: Sequence[Any]) -> tuple[list[Selection], list[Any]]:
        """`step` for items of equal N, K and grids, as a rule can that works on all of them at once; here one by one."""
        selections, after = zip(*map(self.step, contexts, states), strict=True)
        return list(selections), list(after)
