"""Who may import whom, and how long a file may get: read from the source, so that nothing has to be remembered."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "stemma"

# Lowest first. A module may import from its own room and from rooms listed before it.
FLOORS = ("errors", "prefix", "attention", "cache", "models", "data", "train", "METHODS", "cli")
METHODS = ("pretrain", "tune", "synth", "rl", "serve", "compress", "retrieve", "probe")

# Third-party packages each room may import at all, wherever the import statement stands.
NUMERIC = {"numpy", "torch"}
THIRD_PARTY = {
    "errors": set(),
    "prefix": NUMERIC,
    "attention": NUMERIC,
    "cache": NUMERIC | {"safetensors"},
    "models": NUMERIC | {"accelerate", "safetensors", "tokenizers", "transformers"},
}
# Everywhere: only these may be imported when a module is loaded. The rest are extras, or slow and rarely needed
# (matplotlib), and belong inside functions.
CORE_DEPENDENCIES = {"accelerate", "numpy", "safetensors", "tokenizers", "torch", "tqdm", "transformers", "tyro"}

MAX_LINES = 400
# Path -> why it is longer. An entry that is no longer needed fails the test.
LONGER_FILES: dict[str, str] = {
    "tests/rl/test_trl.py": "importing TRL costs ten seconds a process, so its contract tests share one file",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """The part of a dotted name under `stemma`: 'stemma.rl.trl' -> 'rl'; the package is '', its `__main__` of 'cli'."""
    if module == "stemma.__main__":
        return "cli"
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def rank(room: str) -> int:
    return FLOORS.index("METHODS" if room in METHODS else room)


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, own: str, is_package: bool) -> Iterator[tuple[str, ast.stmt]]:
    """Every imported dotted name (relative ones resolved, `from a import b` as 'a.b') with its statement."""
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
                yield f"{base}.{alias.name}", node


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
            continue
        if statement in never_run and room == "":
            continue  # the package's own list of lazy names
        target = room_of(name)
        if (room in METHODS or room == "cli") and target not in FLOORS and target not in METHODS:
            continue  # methods and commands are users of the public names, which all come from the floors below them
        if target not in FLOORS and target not in METHODS:
            found.append(f"{where}: import from the module that defines the name, not from the package's lazy surface")
            continue
        if target != room:
            if room in METHODS and target in METHODS:
                found.append(f"{where}: rooms of methods do not import each other; move what both need a floor down")
            elif room == "" or rank(target) >= rank(room):
                found.append(f"{where}: imports run downwards only ({' <- '.join(FLOORS)})")
            # The option classes of a room's methods import no torch, so the command line reads them where they are.
            options = room == "cli" and name.split(".")[2:3] == ["_config"]
            if any(part.startswith("_") for part in name.split(".")[1:]) and not options:
                found.append(f"{where}: a leading underscore is private to its room")
        elif own.startswith(f"stemma.{room}._recipe"):
            pass  # a reproduction compares methods; methods import theirs inside `run` only
        elif room in METHODS and not is_package and not any(part.startswith("_") for part in name.split(".")[2:3]):
            found.append(f"{where}: methods do not import each other; what two of them need goes to {room}/_shared.py")
        elif any(part.startswith("_") for part in name.split(".")[-1:]) and not is_module(name):
            found.append(f"{where}: a leading underscore is private to its file")
    return found


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_run_downwards(path: Path) -> None:
    assert not violations(path.read_text(encoding="utf-8"), dotted(path), path.name == "__init__.py")


@pytest.mark.parametrize(
    ("own", "line", "complaint"),
    [
        ("stemma.prefix.tree", "import transformers", "prefix/ may use only"),
        ("stemma.prefix.tree", "from stemma.models.adapter import enable", "downwards"),
        ("stemma.prefix.tree", "def f():\n    from ..models import adapter", "downwards"),
        ("stemma.errors", "import torch", "may use only"),
        ("stemma.models.scoring", "from stemma import score", "lazy surface"),
        ("stemma.models.scoring", "from stemma.prefix.tree import _merge", "private to its room"),
        ("stemma.models.scoring", "from stemma.models.adapter import _merge", "private to its file"),
        ("stemma.models.scoring", "import matplotlib.pyplot as plt", "optional or slow"),
        ("stemma.rl.tempo", "from stemma.serve.hydragen import read", "rooms of methods"),
        ("stemma.rl.tempo", "from stemma.rl.grpo import step", "methods do not import each other"),
        ("stemma.rl.tempo", "from stemma.cli.main import main", "downwards"),
        ("stemma.rl.tempo", "import trl", "optional or slow"),
        ("stemma", "from stemma.models.scoring import score", "downwards"),
    ],
)
def test_the_rules_catch(own: str, line: str, complaint: str) -> None:
    assert any(complaint in violation for violation in violations(line, own)), violations(line, own)


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ("stemma.attention.tree", "import torch\nfrom stemma.prefix.layout import Layout"),
        ("stemma.rl.tempo", "from stemma.rl._shared import clip\nfrom stemma.models.scoring import score"),
        ("stemma.rl.trl", "def f():\n    import trl"),
        ("stemma.rl._recipe_tempo", "from stemma.rl.grpo import Trainer"),
        ("stemma.rl.grpo", "import stemma"),
        ("stemma", "if TYPE_CHECKING:\n    from stemma.prefix.tree import PrefixTree"),
        ("stemma.cli.train", "from stemma.errors import StemmaError"),
    ],
)
def test_the_rules_allow(own: str, line: str) -> None:
    assert violations(line, own) == []


def test_every_room_is_on_a_floor() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} <= set(FLOORS) | set(METHODS)


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
