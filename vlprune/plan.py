"""Where to prune and how much: Stage, Budget, Step, Plan, their text form and vlprune.json.

fastv:keep=0.333    holov:keep=0.111:beta=0.25    debias(fastv)@2:keep=64    fastv@2:keep=0.66+fastv@8:keep=0.33
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlprune.errors import BudgetError, SpecError, nearest
from vlprune.pruner import Pruner, find

FORMAT = 1
FILE = "vlprune.json"
Positions = Literal["original", "compact"]
Scope = Literal["image", "prompt"]


@dataclass(frozen=True, order=True)
class Stage:
    """A place in the model: "encoder", "projector", "k" (the input of decoder layer k, from 0), "cache" or "decode"."""

    name: str

    NAMED = ("encoder", "projector", "cache", "decode")

    def __post_init__(self) -> None:
        if self.name not in self.NAMED and not re.fullmatch(r"0|[1-9]\d*", self.name):
            raise SpecError(
                f"unknown stage {self.name!r}; a stage is {', '.join(self.NAMED)} or a decoder layer's number"
            )

    @property
    def layer(self) -> int | None:
        """The decoder layer this stage stands before; the projector stage is layer 0, the others have none."""
        if self.name == "projector":
            return 0
        return int(self.name) if self.name.isdigit() else None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Budget:
    """How many visual tokens stay: a float in (0, 1] is their share, an int of at least 2 their count.

    A share is always one of the tokens the picture had at first, whatever earlier stages removed. scope="image" gives
    every image its own budget, scope="prompt" lets the images of a prompt compete for one.
    """

    keep: float | int
    scope: Scope = "image"

    def __post_init__(self) -> None:
        keep = self.keep
        if isinstance(keep, bool) or not isinstance(keep, (int, float)):
            raise BudgetError(f"keep is a share (a float in (0, 1]) or a count (an int of at least 2), got {keep!r}")
        if isinstance(keep, int) and keep == 1:
            raise BudgetError("keep=1: one token, or all of them? Write keep=1.0 for all; a count starts at 2")
        if isinstance(keep, int) and keep < 2:
            raise BudgetError(f"keep={keep}: a count is at least 2; to keep a share write a float in (0, 1]")
        if isinstance(keep, float) and not 0 < keep <= 1:
            raise BudgetError(f"keep={keep}: a share lies in (0, 1]; to keep a count write an int of at least 2")
        if self.scope not in typing.get_args(Scope):
            raise BudgetError(f"scope={self.scope!r}: it is 'image' or 'prompt'")

    def count(self, n: int) -> int:
        """Tokens that stay of `n`: the only place that turns a budget into a number."""
        return min(n, self.keep) if isinstance(self.keep, int) else min(n, max(1, math.floor(n * self.keep + 0.5)))

    @staticmethod
    def equivalent(average: float, n: int, layers: int, at: int) -> Budget:
        """The count that leaves `average` of `n` tokens a layer, over `layers` layers, when the cut is before layer `at`.

        Papers quote this average as often as the count: EntropyPrune's 192 of 576 over 32 layers cut at 2 is 166.
        """
        if not 0 <= at < layers:
            raise BudgetError(f"the cut must lie before one of the {layers} layers, got {at}")
        count = int((layers * average - at * n) / (layers - at))
        if count < 2:
            floor = (at * n + 2 * (layers - at)) / layers
            raise BudgetError(f"an average of {average} of {n} tokens is out of reach when layers below {at} see them all; "
                              f"the lowest average there is {floor:.1f}")  # fmt: skip
        return Budget(min(count, n))

    def __str__(self) -> str:
        return f"keep={self.keep!r}" + ("" if self.scope == "image" else f":scope={self.scope}")


@dataclass(frozen=True)
class Step:
    """One pruner at one stage with one budget."""

    pruner: Pruner
    stage: Stage
    budget: Budget

    def __str__(self) -> str:
        text, params = _pruner_text(self.pruner)
        at = "" if self.stage.name == self.pruner.stage else f"@{self.stage}"
        return ":".join([text + at, str(self.budget), *params])


@dataclass(frozen=True)
class Plan:
    """Steps in the order of the model, and how kept tokens are numbered.

    positions="original" keeps every token's position id; "compact" renumbers as if the prompt had been shorter.
    """

    steps: tuple[Step, ...]
    positions: Positions = "original"

    def __post_init__(self) -> None:
        if not self.steps:
            raise SpecError("a plan has at least one step")
        if self.positions not in typing.get_args(Positions):
            raise SpecError(f"positions={self.positions!r}: it is 'original' or 'compact'")
        stages = [s.stage.name for s in self.steps]
        twice = {s for s in stages if stages.count(s) > 1}
        if twice:
            raise SpecError(f"two steps at stage {', '.join(sorted(twice))}; a stage takes one")
        object.__setattr__(self, "steps", tuple(sorted(self.steps, key=_order)))

    @staticmethod
    def parse(text: str, keep: float | int | None = None, **params: Any) -> Plan:
        """Read the text form. `keep` and `params` fill in what a single step leaves open."""
        terms = _split(text, "+")
        positions: str = "original"
        if len(terms) > 1 and terms[-1].startswith("positions="):
            positions = terms.pop().removeprefix("positions=")
        if params and len(terms) > 1:
            raise SpecError(f"parameters {sorted(params)} fit a single step; write them into the plan's text")
        return Plan(tuple(_parse_step(t, keep, params) for t in terms), typing.cast(Positions, positions))

    @staticmethod
    def staircase(pruner: str, at: Sequence[int], average: float, layers: int) -> Plan:
        """One pruner before several decoder layers, each time keeping the same share of what is left.

        The share r is the one with ``sum_l r^(cuts at or before l) = average L`` over all L layers. With "uniform" this is
        the schedule of ADSC (arXiv:2602.12618) without the fine-tuning that is its point; with "pyramiddrop" it is
        PyramidDrop's with other layers.

        Args:
            pruner: its text, without stage and budget. at: ascending layers. average: share of all tokens, over layers.
        Raises:
            BudgetError: layers out of order or range, or an average below what the layers before the first cut see.
        """
        cuts = list(at)
        if not cuts or cuts != sorted(set(cuts)) or not cuts[0] >= 0 or cuts[-1] >= layers:
            raise BudgetError(f"the cuts are ascending layers from 0 to {layers - 1}, got {cuts}")
        if not cuts[0] / layers < average <= 1:
            raise BudgetError(
                f"average={average} is a share above {cuts[0]}/{layers}, as layers before {cuts[0]} see all"
            )

        def seen(r: float) -> float:
            return sum(r ** sum(c <= layer for c in cuts) for layer in range(layers)) / layers

        low, high = 0.0, 1.0
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if seen(middle) < average else (low, middle)
        name, _, params = pruner.partition(":")
        tail = f":{params}" if params else ""
        return Plan.parse("+".join(f"{name}@{c}:keep={high ** (i + 1):.6f}{tail}" for i, c in enumerate(cuts)))

    def layer_average(self, n: int, layers: int) -> float:
        """Visual tokens a decoder layer sees on average, of `n` per image: the other number papers quote."""
        left, total = n, 0
        cuts = {s.stage.layer: s.budget.count(n) for s in self.steps if s.stage.layer is not None}
        for s in self.steps:
            if s.stage.name == "encoder":
                left = s.budget.count(n)
        for layer in range(layers):
            left = min(left, cuts.get(layer, left))
            total += left
        return total / layers

    def to_dict(self) -> dict[str, Any]:
        from vlprune import __version__

        steps = [{"step": str(s), "source": dataclasses.asdict(s.pruner.source)} for s in self.steps]
        return {"format": FORMAT, "vlprune": __version__, "positions": self.positions, "steps": steps}

    @staticmethod
    def from_dict(data: Any, where: str = "the plan") -> Plan:
        """Raises SpecError for a newer or missing format number and, by name, for fields it does not know."""
        if not isinstance(data, dict) or not isinstance(data.get("steps"), list):
            raise SpecError(f"{where} is not a vlprune plan: an object with a list 'steps' was expected")
        if data.get("format") != FORMAT:
            raise SpecError(f"{where} has format {data.get('format')!r}, this vlprune reads format {FORMAT}; update vlprune "
                            "or save the plan anew")  # fmt: skip
        unknown = set(data) - {"format", "vlprune", "positions", "steps"}
        for step in data["steps"]:
            unknown |= set(step) - {"step", "source"} if isinstance(step, dict) else {repr(step)}
        if unknown:
            raise SpecError(f"{where} has unknown fields: {', '.join(sorted(unknown))}")
        if any(not isinstance(step.get("step"), str) for step in data["steps"]):
            raise SpecError(f"{where}: every step needs its text under 'step'")
        from vlprune import __version__

        if _release(data.get("vlprune", "0")) > _release(__version__):
            warnings.warn(f"{where} was written by vlprune {data['vlprune']}, this is {__version__}", stacklevel=3)
        steps = tuple(_parse_step(step["step"], None, {}) for step in data["steps"])
        return Plan(steps, data.get("positions", "original"))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write vlprune.json into a checkpoint folder, beside config.json."""
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    @staticmethod
    def from_pretrained(folder_or_repo: str | Path) -> Plan:
        """Read vlprune.json from a folder, or from a model hub repository if there is no such folder."""
        path = Path(folder_or_repo) / FILE
        if not path.parent.is_dir():
            from huggingface_hub import hf_hub_download

            try:
                path = Path(hf_hub_download(str(folder_or_repo), FILE))
            except (OSError, ValueError) as error:
                raise SpecError(f"no such folder, and no repository with a {FILE} that can be reached: "
                                f"{str(folder_or_repo)!r} ({type(error).__name__})") from error  # fmt: skip
        if not path.is_file():
            raise SpecError(f"{path.parent} holds no {FILE}; Plan.save_pretrained writes one")
        try:
            data = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise SpecError(f"{path} is not valid JSON ({error}); save the plan anew") from error
        return Plan.from_dict(data, str(path))

    def __str__(self) -> str:
        return "+".join(
            [*map(str, self.steps), *([] if self.positions == "original" else [f"positions={self.positions}"])]
        )


def _release(version: Any) -> list[int]:
    """[0, 10, 2] of "0.10.2"."""
    return [int(n) for n in re.findall(r"\d+", str(version))]


def _order(step: Step) -> tuple[int, int]:
    rank = {"encoder": 0, "projector": 1, "cache": 3, "decode": 4}.get(step.stage.name, 2)
    return rank, step.stage.layer or 0


def _split(text: str, mark: str) -> list[str]:
    """Split at `mark` outside parentheses."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth < 0:
            break
        if c == mark and not depth:
            parts.append(text[start:i])
            start = i + 1
    if depth:
        raise SpecError(f"unbalanced parentheses in {text!r}")
    return [*parts, text[start:]]


def _parse_step(text: str, keep: float | int | None, params: dict[str, Any]) -> Step:
    head, *rest = _split(text.strip(), ":")
    written = _assignments(rest, text)
    name, at, stage = head.partition("@") if "(" not in head else _after_parentheses(head)
    found: Any = written.pop("keep", None)
    if found is not None and keep is not None:
        raise SpecError(f"keep is given twice: in {text!r} and as {keep!r}")
    scope: Any = written.pop("scope", "image")
    twice = written.keys() & params.keys()
    if twice:
        raise SpecError(f"{sorted(twice)} given twice, in {text!r} and as arguments")
    pruner = _parse_pruner(name, {**written, **params})
    budget = found if found is not None else keep
    if budget is None:
        raise BudgetError(f"{text!r} has no budget; write {head}:keep=0.333 or pass keep=")
    return Step(pruner, Stage(stage if at else pruner.stage), Budget(budget, scope))


def _after_parentheses(head: str) -> tuple[str, str, str]:
    close = head.rindex(")") + 1
    more, at, stage = head[close:].partition("@")
    if more:
        raise SpecError(f"{head!r}: nothing but @stage follows the parentheses, found {more!r}")
    return head[:close], at, stage


def _assignments(texts: list[str], whole: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        key, value = _assignment(text, whole)
        if key in found:
            raise SpecError(f"{key} is given twice in {whole!r}")
        found[key] = value
    return found


def _assignment(text: str, whole: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SpecError(f"{text!r} in {whole!r} is not of the form parameter=value")
    for read in (int, float):
        try:
            return key, read(value)
        except ValueError:
            continue
    return key, {"true": True, "false": False, "none": None}.get(value.lower(), value)


def _parse_pruner(text: str, params: dict[str, Any]) -> Pruner:
    """``fastv`` or, for a pruner that wraps another, ``debias(fastv:query=all)``."""
    name, inner, _ = text.partition("(")
    cls = find(name.strip())
    fields = {f.name: f for f in dataclasses.fields(cls)}
    kwargs = dict(params)
    if inner:
        if "inner" not in fields:
            raise SpecError(f"{name} wraps no other pruner; write {name}, not {text}")
        inner_head, *inner_rest = _split(text[len(name) + 1 : -1], ":")
        kwargs["inner"] = _parse_pruner(inner_head, _assignments(inner_rest, text))
    elif "inner" in fields:
        raise SpecError(f"{name} wraps another pruner; write {name}(fastv)")
    unknown = kwargs.keys() - fields.keys()
    if unknown:
        takes = ", ".join(f for f in fields if f != "inner") or "none"
        raise SpecError(f"{name} has no parameter {', '.join(sorted(unknown))}; it takes {takes}"
                        + nearest(sorted(unknown)[0], fields))  # fmt: skip
    types = typing.get_type_hints(cls)
    try:
        return cls(**{k: _cast(k, v, types[k], name) for k, v in kwargs.items()})
    except TypeError as error:
        raise SpecError(f"{name}: {error}") from error


def _cast(key: str, value: Any, kind: Any, name: str) -> Any:
    """The value as the parameter's type has it. Types other than those a text can give are left to the class."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    choices = [c for option in options if typing.get_origin(option) is Literal for c in typing.get_args(option)]
    for option in options:
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if value in choices or (option not in (int, float, str, bool, type(None)) and not choices):
            return value
        if isinstance(option, type) and isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    if choices:
        raise SpecError(f"{name}: {key}={value!r} is not one of {', '.join(map(repr, choices))}")
    wanted = " or ".join("none" if option is type(None) else option.__name__ for option in options)
    raise SpecError(f"{name}: {key}={value!r} should be of type {wanted}")


def _pruner_text(pruner: Pruner) -> tuple[str, list[str]]:
    """Name (with the wrapped pruner) and the parameters that differ from their defaults."""
    params, name = [], pruner.name
    for f in dataclasses.fields(pruner):
        value = getattr(pruner, f.name)
        if f.name == "inner":
            text, inner = _pruner_text(value)
            name = f"{pruner.name}({':'.join([text, *inner])})"
        elif value != f.default:
            text = str(value).lower() if isinstance(value, (bool, type(None))) else str(value)
            params.append(f"{f.name}={text.replace('e+', 'e')}")  # a plus separates steps
    return name, params
