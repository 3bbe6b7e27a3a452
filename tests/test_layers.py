"""A module of raywards imports only from lower layers, and the light ones stay light.

Read from the source with `ast`, function-level imports included, so that a cycle cannot hide in a
function; then measured in fresh interpreters.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# From the lowest layer to the highest. Modules of one layer do not import each other.
LAYERS = [
    ["errors", "trl_fields"],
    ["settings", "rowset"],
    ["config", "schemas", "conversation", "sources"],
    [
        *("client.faults", "client.inputs", "client.rlhf"),
        *("control_tokens", "packing", "families"),
        *("serve.batcher", "serve.keys"),
    ],
    ["client.plans"],
    ["client.blocking", "client.loops"],
    ["client", "rendering", "attention"],
    ["preferences", "loader", "loss", "metrics", "evaluation", "heads"],
    ["groups", "objectives"],
    ["model"],
    ["settle", "invariance", "adapters"],
    ["checkpoint"],
    ["scorer"],
    ["train.table", "train.storage", "train.tasks", "train.callbacks", "ray_cluster"],
    [
        *("train.prepare", "train.zero", "train.session", "train.runlog", "train.runfolder"),
        *("train.object_storage", "train.hub"),
        *(
            "serve.dialects",
            "serve.autoscaling",
            "serve.metrics",
            "serve.page",
            "serve.recent",
            "score_file",
            "batch_score",
        ),
    ],
    [
        *("train.rows", "train.card", "train.adapters", "train.reshard"),
        *("serve.dialects.errors", "serve.dialects.bodies", "serve.openapi"),
    ],
    ["serve.dialects.tei", "serve.dialects.vllm"],
    ["serve.dialects.*"],
    ["train.tuning", "train.job"],
    ["train.start", "train.finished"],
    ["train.worker"],
    ["train.saving", "train.export"],
    ["train.best", "train.stops"],
    ["train.loop"],
    ["train.cluster"],
    ["train.planned", "serve.traffic", "serve.incoming", "serve.tokenizing"],
    ["serve.replica"],
    ["train.trainer", "serve.http"],
    ["serve.app"],
    ["train", "serve"],
    ["__init__"],
    ["quickstart"],
    ["cli"],
    ["__main__"],
]
SCORER_LAYER = next(i for i, layer in enumerate(LAYERS) if "scorer" in layer)
LIGHT = [
    *("errors", "trl_fields", "settings", "config", "schemas"),
    *("client", "client.blocking", "client.loops", "client.plans"),
    *("client.faults", "client.inputs", "client.rlhf"),
]
HEAVY = {"torch", "ray", "transformers"}


class Import(NamedTuple):
    """One import statement's target: `name` is dotted, `raywards.` stripped where `is_ours`."""

    name: str
    is_ours: bool
    in_function: bool
    for_types_only: bool
    line: int

    @property
    def distribution(self) -> str:
        return self.name.partition(".")[0]


def read_modules() -> dict[str, str]:
    """Source by module name: `config`, `train.loop`, `train` for a package, `__init__` for ours."""
    modules = {}
    for path in sorted((ROOT / "raywards").rglob("*.py")):
        parts = path.relative_to(ROOT / "raywards").with_suffix("").parts
        package = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        modules[".".join(package)] = path.read_text()
    return modules


def find_imports(module: str, source: str, modules: set[str]) -> Iterator[Import]:
    """Every import statement of `source`, wherever it stands."""

    def targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            return
        base = node.module or ""
        if node.level:
            is_package = module == "__init__" or any(m.startswith(f"{module}.") for m in modules)
            here = ["raywards", *([] if module == "__init__" else module.split("."))]
            up = node.level - 1 if is_package else node.level
            base = ".".join([*here[: len(here) - up], *filter(None, [base])])
        for alias in node.names:  # `from raywards import errors` is an import of raywards.errors
            full = f"{base}.{alias.name}"
            yield full if full.removeprefix("raywards.") in modules else base

    def walk(node: ast.AST, in_function: bool, for_types_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in targets(node):
                is_ours = target.partition(".")[0] == "raywards"
                name = target.removeprefix("raywards.") if target != "raywards" else "__init__"
                yield Import(name, is_ours, in_function, for_types_only, node.lineno)
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types_only |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, in_function, for_types_only)

    return walk(ast.parse(source), in_function=False, for_types_only=False)


def names_of_the_package(source: str) -> set[str]:
    """What `source` takes from `raywards` itself: `raywards.X`, `from raywards import X`."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {
        n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "raywards"
    }
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "raywards"]
    return names | {alias.name for n in imports for alias in n.names}


def layer_of(module: str) -> int | None:
    for index, names in enumerate(LAYERS):
        if module in names or any("*" in name and fnmatch(module, name) for name in names):
            return index
    return None


def find_violations(modules: dict[str, str]) -> list[str]:
    """Every import in `modules` (source by name) that breaks a rule, as a line to read."""
    found = []
    for module, source in modules.items():
        layer = layer_of(module)
        if layer is None:
            found.append(f"{module} is in no layer: enter it in LAYERS")
            continue
        for item in find_imports(module, source, set(modules)):
            where = f"{module}:{item.line} imports {item.name}"
            if item.name == "__init__" and names_of_the_package(source) == {"__version__"}:
                continue  # the package is imported before its modules; its version is always there
            if item.is_ours:
                target_layer = layer_of(item.name)
                if target_layer is None:
                    found.append(f"{where}, which is in no layer")
                elif target_layer >= layer:
                    found.append(f"{where}, which is in no lower layer")
                halves = {name.partition(".")[0] for name in (module, item.name)}
                if halves == {"train", "serve"}:
                    found.append(f"{where}: train/ and serve/ never import each other")
            elif not item.for_types_only:
                if module in LIGHT and item.distribution in HEAVY:
                    found.append(f"{where}: {', '.join(LIGHT)} import no {item.distribution}")
                if layer <= SCORER_LAYER and (
                    item.distribution == "ray"
                    or (item.distribution == "deepspeed" and not item.in_function)
                ):
                    found.append(f"{where}: scorer and all below it do without")
    return found


def test_every_module_imports_only_from_lower_layers() -> None:
    modules = read_modules()
    assert "errors" in modules
    assert "__init__" in modules
    assert not (violations := find_violations(modules)), "\n" + "\n".join(violations)


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("errors", "import raywards.config", "no lower layer"),
        ("errors", "def f():\n    from raywards import config", "no lower layer"),
        ("packing", "from . import rendering", "no lower layer"),
        ("packing", "from raywards.attention import attend", "no lower layer"),
        ("attention", "from raywards.model import RewardModel", "no lower layer"),
        ("train.zero", "from ..scorer import Scorer\nfrom .loop import train", "no lower layer"),
        ("train.loop", "from raywards.serve import batcher", "never import each other"),
        ("serve.app", "from raywards.train.prepare import prepare", "never import each other"),
        ("client", "def f():\n    import torch", "import no torch"),
        ("config", "if True:\n    from transformers import AutoConfig", "import no transformers"),
        ("scorer", "def f():\n    import ray.data", "do without"),
        ("checkpoint", "from deepspeed import comm", "do without"),
        ("train.zero", "import raywards\nraywards.Scorer", "no lower layer"),
        ("train.zero", "from raywards import Scorer\nraywards.__version__", "no lower layer"),
        ("utils", "", "is in no layer"),
    ],
)
def test_a_planted_violation_is_found(module: str, source: str, expected: str) -> None:
    names = ["config", "rendering", "scorer", "serve", "serve.batcher", "train", "train.loop"]
    modules = dict.fromkeys([*names, "train.prepare"], "") | {module: source}
    (violation,) = find_violations(modules)
    assert expected in violation
    assert violation.startswith(module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("config", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("loader", "def f():\n    import deepspeed"),
        ("train.loop", "import ray, deepspeed\nfrom ..scorer import Scorer\nfrom . import zero"),
        ("train", "from .loop import train\nfrom raywards.errors import ConfigError"),
        ("train.zero", "import raywards\nprint(raywards.__version__)"),
        ("serve.dialects.native", "from raywards.schemas import RewardRequest"),
    ],
)
def test_what_the_rules_allow_is_allowed(module: str, source: str) -> None:
    names = ["errors", "schemas", "scorer", "train", "train.loop", "train.zero", "serve.dialects"]
    assert find_violations(dict.fromkeys(names, "") | {module: source}) == []


def import_in_a_fresh_interpreter(module: str, without: list[str]) -> str:
    """The loaded modules among `without` after `import module`, by a new Python; "" for none."""
    code = f"import sys, {module}; print(*[m for m in {without!r} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]  # deepspeed prints lines of its own before


@pytest.mark.parametrize(
    "module", ["raywards", *(f"raywards.{name}" for name in LIGHT)], ids=lambda name: name
)
def test_the_light_modules_load_no_torch_ray_or_transformers(module: str) -> None:
    assert import_in_a_fresh_interpreter(module, without=sorted(HEAVY)) == ""


@pytest.mark.trains
def test_the_scorer_loads_no_ray_and_no_deepspeed() -> None:
    assert import_in_a_fresh_interpreter("raywards.scorer", without=["ray", "deepspeed"]) == ""


def test_a_fresh_interpreter_would_tell() -> None:
    assert import_in_a_fresh_interpreter("torch", without=["torch", "ray"]) == "torch"


# Forks of an interpreter that has loaded what others wrote: it costs seconds for each module else.
FIRST_IMPORTS = """
import importlib, json, os, sys, traceback
import datasets, deepspeed, fastapi, httpx, peft, ray.serve, ray.train.torch, torch, transformers

assert not any(name.partition(".")[0] == "raywards" for name in sys.modules)
told = {}
for module in sys.argv[1:]:
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            importlib.import_module(module)
        except BaseException:
            os.write(writing, traceback.format_exc()[-2000:].encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        error = pipe.read().decode()
    if error:
        told[module] = error
    os.wait()
print(json.dumps(told))
"""


@pytest.mark.slow
def test_every_module_can_be_the_first_import() -> None:
    modules = [f"raywards.{name}" for name in read_modules() if not name.startswith("__")]
    assert len(modules) > 80
    run = subprocess.run(
        [sys.executable, "-c", FIRST_IMPORTS, *modules, "raywards.not_there"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    assert "No module named" in told.pop("raywards.not_there")
    assert told == {}
