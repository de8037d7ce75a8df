"""Who may import whom, read from the import statements."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOUNS = {f"vlprune.{n}" for n in ("context", "selection", "pruner", "plan", "trace", "errors", "geometry")}
OPS = {"vlprune.ops", "vlprune.kernels"}
RELEASES = {"vlprune.releases"}
FRONT = {f"vlprune.{n}" for n in ("api", "calibrate", "gathered", "support", "processors", "models", "draw")}
MAY = {  # room -> what its files may import of vlprune
    "vlprune.kernels.benchmarks": {"vlprune"},
    "vlprune.kernels": {"vlprune.kernels", "vlprune.errors"},
    "vlprune.ops": {"vlprune.kernels"},
    "vlprune.errors": set(),
    "vlprune.context": set(),
    "vlprune.geometry": {"vlprune.context", "vlprune.errors"},
    "vlprune.draw": {"vlprune.draw", "vlprune.geometry", "vlprune.context", "vlprune.errors"},
    "vlprune.selection": {"vlprune.errors", "vlprune.kernels"},  # ranking is an op
    "vlprune.pruner": NOUNS | {"vlprune.pruners"},  # the registry loads the built-in rules
    "vlprune.plan": NOUNS | {"vlprune.__version__"},
    "vlprune.trace": NOUNS | {"vlprune.draw"},
    "vlprune.pruners": {"vlprune.context", "vlprune.errors", "vlprune.pruner", "vlprune.selection", "vlprune.pruners"}
    | OPS,
    "vlprune.releases": set(),
    "vlprune.engine": NOUNS | OPS | RELEASES | {"vlprune.engine"},
    "vlprune.adapters": NOUNS | OPS | RELEASES | {"vlprune.engine", "vlprune.adapters"},
    "vlprune.cli": NOUNS | FRONT | {"vlprune.eval"},
    "vlprune.eval": {"vlprune.eval", "vlprune.ops", "vlprune.pruners"} | NOUNS | FRONT | RELEASES,
    "vlprune": NOUNS
    | OPS
    | FRONT
    | RELEASES
    | {"vlprune.engine", "vlprune.adapters", "vlprune.pruners", "vlprune.cli"},
}
LIBRARIES = {  # a library -> the rooms that may know it
    "transformers": (
        "vlprune.engine",
        "vlprune.adapters",
        "vlprune.eval",
        "vlprune.releases",
        "vlprune.processors",
        "vlprune.cli",
    ),
    "triton": ("vlprune.kernels",),
    "matplotlib": ("vlprune.eval", "vlprune.draw", "vlprune.calibrate"),
    "lmms_eval": ("vlprune.eval",),
    "datasets": ("vlprune.eval",),
    "accelerate": ("vlprune.eval",),
    "huggingface_hub": ("vlprune.plan",),
}


def module(path: Path) -> str:
    """kernels/max_min/triton.py -> vlprune.kernels.max_min.triton"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "vlprune" else ("vlprune", *parts)
    return ".".join(p for p in parts if p != "__init__")


FILES = {
    module(p): p
    for room in ("vlprune", "kernels", "adapters", "eval")
    for p in sorted((ROOT / room).rglob("*.py"))
    if not (
        room == "vlprune" and p.relative_to(ROOT).parts[1] in ("kernels", "adapters", "eval")
    )  # the same, by a link
}


def imports(path: Path) -> set[str]:
    """Absolute names of all imported modules, and `package.name` where a name is taken from the top package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module(path).split(".")
                keep = len(package) - node.level + (path.name == "__init__.py")
                base = ".".join([*package[:keep], *filter(None, [base])])
            found |= {f"{base}.{a.name}" for a in node.names} if base == "vlprune" else {base}
    return found


def room(name: str, rooms: object) -> str:
    """The longest of `rooms` that `name` lies in."""
    inside = [r for r in rooms if name == r or name.startswith(r + ".")]  # type: ignore[attr-defined]
    return max(inside, key=len, default="")


def test_every_file_is_seen():
    assert {"vlprune.api", "vlprune.kernels.max_min", "vlprune.adapters.base", "vlprune.engine.engine"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_arrows(name):
    here = room(name, MAY)
    public = {"vlprune", *(f"vlprune.{n}" for n in _public_names())}
    for target in sorted(i for i in imports(FILES[name]) if i.split(".")[0] == "vlprune"):
        if "vlprune" in MAY[here] or (here in ("vlprune.eval", "vlprune.cli", "vlprune") and target in public):
            continue
        assert room(target, MAY[here]), f"{name} imports {target}; {here} may import {sorted(MAY[here])}"


@pytest.mark.parametrize("name", FILES)
def test_libraries_stay_in_their_rooms(name):
    for target in imports(FILES[name]):
        rooms = LIBRARIES.get(target.split(".")[0])
        assert rooms is None or room(name, rooms), f"{name} imports {target}, which belongs to {', '.join(rooms)}"


@pytest.mark.parametrize("name", [n for n in FILES if room(n, MAY) in ("vlprune.eval", "vlprune.cli")])
def test_eval_uses_the_public_face(name):
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlprune"):
            hidden = [a.name for a in node.names if a.name.startswith("_") and a.name != "__version__"]
            assert not hidden, f"{name} imports {hidden} from {node.module}"
        assert not (isinstance(node, ast.Attribute) and node.attr == "_vlprune"), f"{name} reaches into a wrapped model"


def test_nobody_imports_a_root_folder():
    """`kernels` is a library of Hugging Face's; ours is vlprune.kernels."""
    for path in [*FILES.values(), *(ROOT / "tests").rglob("*.py")]:
        roots = {i.split(".")[0] for i in imports(path)}
        assert not roots & {"kernels", "adapters", "eval"}, path


def _public_names() -> set[str]:
    tree = ast.parse((ROOT / "vlprune" / "__init__.py").read_text())
    names = {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    return names | {"__version__"}


def test_import_touches_nothing():
    """Not transformers' tables, no class's forward, and no optional library."""
    code = """
import sys
import transformers
from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration, Qwen2ForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

def state():
    classes = CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration, Qwen2ForCausalLM, PreTrainedModel, DynamicCache
    classes += DynamicLayer, StaticLayer
    methods = {(c, k): v for c in classes for b in c.__mro__ if b is not object for k, v in vars(b).items()}
    tables = {k: t[k] for t in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS) for k in t.keys()}
    return methods, tables

before, modules = state(), set(sys.modules)
import vlprune, vlprune.pruners, vlprune.ops
assert state() == before
loaded = {m.split(".")[0] for m in set(sys.modules) - modules}
optional = {"triton", "matplotlib", "lmms_eval", "datasets", "accelerate", "scipy", "torchvision"} & loaded
assert not optional, optional
assert "kernels" not in loaded
print("untouched")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "untouched"
