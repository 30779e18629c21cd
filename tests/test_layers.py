"""Who may import whom, and how long a file may get: read from the source, so that nothing has to be remembered."""

import ast
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

import pytest

import stemma

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "stemma"

# Lowest first. A module may import from its own room and from rooms on lower floors; rooms of one floor are strangers.
METHODS = ("pretrain", "tune", "synth", "rl", "serve", "compress", "retrieve", "probe")
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("files",),
    ("prefix", "data", "train"),
    ("attention",),
    ("cache",),
    ("models",),
    ("scoring",),
    ("decode", "search"),
    (*METHODS, "eval"),
    ("recipes",),
    ("cli", "papers", "census"),
)
RANK = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PUBLIC_FLOOR = RANK["decode"]  # the highest that the names of `stemma` come from

# Third-party packages each room may import at all, wherever the import statement stands.
NUMERIC = {"numpy", "torch"}
THIRD_PARTY = {
    "errors": set(),
    "files": set(),
    "prefix": NUMERIC,
    "attention": NUMERIC,
    "cache": NUMERIC | {"safetensors"},
    "models": NUMERIC | {"accelerate", "safetensors", "tokenizers", "transformers"},
    "search": {"Stemmer", "bm25s", "faiss", "numpy", "sentence_transformers"},
}
# Inside transformers, only these rooms; of TRL, only this one.
INTERNALS = {"transformers": {"models", "scoring", "decode", "census"}, "trl": {"rl.trl"}}
OPEN = {"transformers.cache_utils", "transformers.modeling_outputs", "transformers.utils", "transformers.utils.logging"}
"""Documented for who writes a model, a cache or a program."""
# Everywhere: only these may be imported when a module is loaded. The rest are extras, or slow and rarely needed
# (matplotlib), and belong inside functions.
CORE_DEPENDENCIES = {"accelerate", "numpy", "safetensors", "tokenizers", "torch", "tqdm", "transformers", "tyro"}

MAX_LINES = 400
# Path -> why it is longer. An entry that is no longer needed fails the test.
LONGER_FILES: dict[str, str] = {
    "tests/rl/trl/test_trl.py": "importing TRL costs ten seconds a process, so its contract tests share one file",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """The part of a dotted name under `stemma`: 'stemma.rl.trl' -> 'rl'; the package is '', its `__main__` of 'cli'."""
    if module == "stemma.__main__":
        return "cli"
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def methods_of(room: str) -> set[str]:
    """Stems of a room's methods: what names a source. All others in a room are pieces that its methods share."""
    files = [*(PACKAGE / room).glob("[!_]*.py"), *(PACKAGE / room).glob("*/__init__.py")]
    sources = [path for path in files if "\nSource: " in path.read_text(encoding="utf-8")]
    return {path.parent.name if path.stem == "__init__" else path.stem for path in sources}


def public_uses(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """What a module uses of `stemma`'s own names, as the module that defines each, after `import stemma`."""
    for statement in ast.walk(tree):
        if isinstance(statement, ast.stmt) and not hasattr(statement, "body"):
            for node in ast.walk(statement):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "stemma":
                    yield f"{stemma._PUBLIC.get(node.attr, 'stemma')}.{node.attr}", statement


def imports(tree: ast.AST, own: str, is_package: bool) -> Iterator[tuple[str, ast.stmt]]:
    """Every imported dotted name (relative ones resolved, `from a import b` as 'a.b') with its statement. A public name
    of `stemma` stands for the module that defines it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = own.split(".")
                parents = parents[: len(parents) - node.level + (1 if is_package else 0)]
                base = ".".join([*parents, base]) if base else ".".join(parents)
            for alias in node.names:
                where = stemma._PUBLIC.get(alias.name, base) if base == "stemma" else base
                yield f"{where}.{alias.name}", node
    yield from public_uses(tree)


def type_checking_only(tree: ast.AST) -> set[ast.stmt]:
    """Statements under `if TYPE_CHECKING:`; they never run."""
    return {
        statement
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in node.body
        for statement in ast.walk(inner)
        if isinstance(statement, ast.stmt)
    }


def violations(source: str, own: str, is_package: bool = False) -> list[str]:
    """What the rules of this file have against a module named `own` with this source."""
    tree = ast.parse(source)
    never_run = type_checking_only(tree)
    top_level = set(tree.body)
    room = room_of(own)
    found = []
    for name, statement in imports(tree, own, is_package):
        where = f"{own}:{statement.lineno} imports {name}"
        head = name.split(".")[0]
        if head != "stemma":
            if head in sys.stdlib_module_names:
                continue
            if statement in top_level and head not in CORE_DEPENDENCIES:
                found.append(f"{where}: optional or slow; import it inside the function that needs it")
            if room in THIRD_PARTY and head not in THIRD_PARTY[room] and statement not in never_run:
                found.append(f"{where}: {room}/ may use only {sorted(THIRD_PARTY[room]) or 'the standard library'}")
            found += _of_internals(name, statement, own, where)
        elif name != "stemma":
            found += _inside(name, statement, own, room, where, statement in never_run, statement in top_level)
    return found


def _of_internals(name: str, statement: ast.stmt, own: str, where: str) -> list[str]:
    package = name.split(".")[0]
    module = statement.module if isinstance(statement, ast.ImportFrom) else name
    inside = package == "trl" or (package == "transformers" and module not in {package, *OPEN})
    if not inside or any(f"{own}.".startswith(f"stemma.{room}.") for room in INTERNALS[package]):
        return []
    return [f"{where}: only {', '.join(sorted(INTERNALS[package]))} may know the inside of {package}"]


def _inside(
    name: str, statement: ast.stmt, own: str, room: str, where: str, never_runs: bool, at_top: bool
) -> Iterator[str]:
    """What is against an import of one part of the house by another."""
    target = room_of(name)
    if room == "":
        if target not in RANK or RANK[target] > PUBLIC_FLOOR or not never_runs:
            yield f"{where}: public names are lazy and come from the floors up to decode/"
        return
    if target not in RANK:
        if name not in ("stemma.__version__",):
            yield f"{where}: there is no such room"
        return
    if not at_top and not never_runs and isinstance(statement, ast.Import | ast.ImportFrom) and room != "cli":
        yield f"{where}: imports of the house stand at the top; inside functions are optional and slow packages"
    if target != room:
        if room in METHODS and target in METHODS:
            yield f"{where}: rooms of methods do not import each other; move what both need a floor down"
        elif RANK[target] >= RANK[room] and not (room == "train" and target == "data"):
            yield f"{where}: imports run downwards only ({' <- '.join('/'.join(rooms) for rooms in FLOORS)})"
        private = [part for part in name.split(".")[2:] if part.startswith("_")]
        if private and not (room == "cli" and target == "recipes"):
            yield f"{where}: a leading underscore is private to its room"
        return
    if room in METHODS:
        mine, theirs = own.split(".")[2:3], name.split(".")[2:3]
        if theirs != mine and theirs and theirs[0] in methods_of(room):
            yield f"{where}: methods do not import each other; what two of them need stands beside them, or lower"
            return
    if any(part.startswith("_") for part in name.split(".")[-1:]) and not is_module(name):
        yield f"{where}: a leading underscore is private to its file"


def module_graph() -> dict[str, set[str]]:
    """Module -> modules of the house that it imports when it runs, also inside functions."""
    known = {dotted(path): path for path in modules()}
    graph: dict[str, set[str]] = {}
    for own, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        never_run = type_checking_only(tree)
        found = set()
        for name, statement in imports(tree, own, path.name == "__init__.py"):
            target = name if name in known else name.rpartition(".")[0]
            if target in known and target != own and statement not in never_run and target != "stemma":
                found.add(target)
        graph[own] = found
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Sets of modules that reach each other (Tarjan's algorithm would be faster and longer)."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        rest = [*graph[start]]
        while rest:
            following = rest.pop()
            if following not in seen:
                seen.add(following)
                rest += graph.get(following, ())
        reach[start] = seen
    return [{start, *(m for m in reach[start] if start in reach[m])} for start in graph if start in reach[start]]


def test_there_are_no_circles() -> None:
    assert circles(module_graph()) == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})[0] == {"a", "b", "c"}


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_run_downwards(path: Path) -> None:
    assert not violations(path.read_text(encoding="utf-8"), dotted(path), path.name == "__init__.py")


@pytest.mark.parametrize(
    ("own", "line", "complaint"),
    [
        ("stemma.prefix.tree", "import transformers", "prefix/ may use only"),
        ("stemma.prefix.tree", "from stemma.models.adapter import enable", "downwards"),
        ("stemma.prefix.tree", "def f():\n    from ..models import adapter", "downwards"),
        ("stemma.prefix.tree", "from stemma import score", "downwards"),
        ("stemma.models.adapter", "import stemma\nstemma.generate(1)", "downwards"),
        ("stemma.prefix.tree", "from stemma.data.gsm8k import reward", "downwards"),
        ("stemma.errors", "import torch", "may use only"),
        ("stemma.scoring.score", "from stemma.prefix.tree import _merge", "private to its room"),
        ("stemma.scoring.score", "from stemma.scoring.plan import _merge", "private to its file"),
        ("stemma.scoring.score", "import matplotlib.pyplot as plt", "optional or slow"),
        ("stemma.scoring.score", "def f():\n    from stemma.scoring.plan import explain", "at the top"),
        ("stemma.serve.kvcomm.texts", "from stemma.rl.engine.batch import RolloutBatch", "rooms of methods"),
        ("stemma.rl.tempo", "from stemma.rl.grpo import step", "methods do not import each other"),
        ("stemma.rl.tempo", "from stemma.recipes.tempo import run", "downwards"),
        ("stemma.rl.tempo", "from stemma.cli.main import main", "downwards"),
        ("stemma.rl.tempo", "import trl", "optional or slow"),
        ("stemma.rl.tempo", "def f():\n    import trl", "the inside of trl"),
        ("stemma.serve.prefix_kv", "from transformers.masking_utils import or_masks", "the inside of transformers"),
        ("stemma", "from stemma.scoring.score import score", "lazy"),
        ("stemma", "if TYPE_CHECKING:\n    from stemma.serve.hydragen import generate", "public names"),
    ],
)
def test_the_rules_catch(own: str, line: str, complaint: str) -> None:
    assert any(complaint in violation for violation in violations(line, own)), violations(line, own)


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ("stemma.attention.tree", "import torch\nfrom stemma.prefix.layout import Layout"),
        ("stemma.rl.tempo", "from stemma.rl.engine.batch import RolloutBatch\nfrom stemma.scoring.score import score"),
        ("stemma.rl.trl.rows", "def f():\n    import trl"),
        ("stemma.recipes.tempo", "from stemma.rl.grpo import Trainer\nfrom stemma.recipes._runs import Runs"),
        ("stemma.rl.grpo", "import stemma\nstemma.generate(1)"),
        ("stemma.rl.tempo", "from transformers import AutoTokenizer"),
        ("stemma", "if TYPE_CHECKING:\n    from stemma.prefix.tree import PrefixTree"),
        ("stemma.cli.train", "from stemma.errors import StemmaError"),
    ],
)
def test_the_rules_allow(own: str, line: str) -> None:
    assert violations(line, own) == []


def test_every_room_is_on_a_floor() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} <= set(RANK)


def test_files_stay_short() -> None:
    files = [path for folder in ("src", "tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")]
    assert files
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    too_long = {name: count for name, count in lengths.items() if count > MAX_LINES and name not in LONGER_FILES}
    assert not too_long, f"split these, or give a reason in LONGER_FILES: {too_long}"
    stale = [name for name in LONGER_FILES if lengths.get(name, 0) <= MAX_LINES]
    assert not stale, f"no longer needed in LONGER_FILES: {stale}"


# Methods that torch or Python defines; their meaning is documented there.
_FOREIGN = {"forward", "backward", "setup_context", "jvp", "vmap"}


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions and classes of a module, and the classes' public methods, that have no docstring."""
    missing = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            missing.append(node.name)
        for method in node.body if isinstance(node, ast.ClassDef) else []:
            if (
                isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef))
                and not method.name.startswith("_")
                and method.name not in _FOREIGN
                and not ast.get_docstring(method)
                and not any("overload" in ast.unparse(d) or "setter" in ast.unparse(d) for d in method.decorator_list)
            ):
                missing.append(f"{node.name}.{method.name}")
    return missing


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_public_names_have_docstrings(path: Path) -> None:
    assert undocumented(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_missing_docstrings_are_found() -> None:
    assert undocumented(ast.parse("def f(): ...\nclass A:\n  'a'\n  def g(self): ...\n  def _h(self): ...")) == [
        "the module",
        "f",
        "A.g",
    ]


def exported(tree: ast.Module) -> list[str] | None:
    """What a module lists in `__all__`; None without one."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


def test_all_lists_what_other_modules_use() -> None:
    trees = {dotted(path): ast.parse(path.read_text(encoding="utf-8")) for path in modules()}
    used: dict[str, set[str]] = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in trees:
                names = {alias.name for alias in node.names if f"{node.module}.{alias.name}" not in trees}
                used.setdefault(node.module, set()).update(names)
    missing = {name: used[name] - set(exported(trees[name]) or ()) for name in used}
    assert {name: found for name, found in missing.items() if found} == {}


def test_all_lists_what_there_is() -> None:
    for path in modules():
        name = dotted(path)
        listed = exported(ast.parse(path.read_text(encoding="utf-8"))) or []
        module = import_module(name) if listed and name != "stemma.rl.trl" else None  # whose names need TRL
        assert [each for each in listed if module is not None and not hasattr(module, each)] == [], name
