"""Pages and docstrings are true: their Python runs, their command lines parse, their links lead somewhere.

Conventions for code fences: behind the backticks stands a language and nothing else, as the built site shows other
fences as text. `python` blocks of a page run in order, in one namespace and an empty folder; those below a line
`<!-- no-run -->` must compile; in `sh` blocks every `stemma` line must parse and every `./dev` job must exist. A `yaml`
block that begins with `# name.yaml` is that file for the commands of its page. `python` blocks in docstrings follow the
same rules, each docstring for itself.
"""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import stemma
from stemma.cli import main as dispatcher
from stemma.cli.methods import ROOMS, method_files

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^(?:<!-- (no-run) -->\n)?```([^\n`]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


Block = tuple[bool, str, int]
"""Whether it runs, its code, and the line where the code starts."""


def fenced(text: str, language: str) -> list[Block]:
    """Code blocks of a language."""
    found = FENCE.finditer(text)
    return [(not m[1], m[3], text.count("\n", 0, m.start(3)) + 1) for m in found if m[2] == language]


def blocks(path: Path, language: str) -> list[Block]:
    return fenced(path.read_text(encoding="utf-8"), language)


def with_blocks(language: str) -> list[Path]:
    return [path for path in PAGES if blocks(path, language)]


def run(found: list[Block], where: str, first_line: int = 1) -> None:
    """Run the blocks one after the other in one namespace, and compare what they print with what they say."""
    namespace: dict[str, object] = {"__name__": "page"}
    for runs, code, line in found:
        compiled = compile("\n" * (first_line + line - 2) + code, where, "exec")
        if runs:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compiled, namespace)
            # A comment `# prints: ...` states the output of its block, to the letter.
            promised = re.findall(r"# prints: (.*)", code)
            assert printed.getvalue().splitlines()[: len(promised)] == promised, f"{where}:{first_line + line - 1}"


@pytest.mark.parametrize("path", with_blocks("python"), ids=page_id)
def test_python_of_the_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(blocks(path, "python"), page_id(path))


def examples(path: Path) -> dict[str, tuple[list[Block], int]]:
    """Examples in the docstrings of a module, with the line of the docstring, by the name of what they document."""
    found = {}

    def look(node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> None:
        docstring = ast.get_docstring(node)
        if docstring and fenced(docstring, "python"):
            found[name] = fenced(docstring, "python"), node.body[0].lineno
        for inner in node.body:
            if isinstance(inner, ast.ClassDef | ast.FunctionDef):
                look(inner, f"{name}.{inner.name}".removeprefix("."))

    look(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


EXAMPLES = [
    pytest.param(*found, page_id(path), id=f"{page_id(path).removeprefix('src/stemma/').removesuffix('.py')}:{name}")
    for path in sorted((ROOT / "src").rglob("*.py"))
    for name, found in examples(path).items()
]


@pytest.mark.parametrize(("found", "line", "where"), EXAMPLES)
def test_examples_of_the_docstring_run(
    found: list[Block], line: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(found, where, line)


def test_public_names_and_methods_have_examples() -> None:
    functions = {name for name in stemma.__all__ if inspect.isfunction(getattr(stemma, name))} - {"disable"}  # `enable`
    names = {name: name for name in (*functions, "SharedPrefix")} | {"PrefixTree": "PrefixTree.from_groups"}
    for name, documented in names.items():
        assert documented in examples(Path(importlib.import_module(stemma._PUBLIC[name]).__file__)), name
    methods = [path for room in ROOMS for path in method_files(ROOT / "src" / "stemma" / room)]
    assert [page_id(path) for path in methods if not examples(path)] == []


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_fences_of_the_page_are_what_the_site_renders(path: Path) -> None:
    begun = [match[2] for match in FENCE.finditer(path.read_text(encoding="utf-8"))]
    assert [words for words in begun if not re.fullmatch(r"\w+", words)] == []


def test_docstrings_are_markdown_with_single_backticks() -> None:
    other = re.compile(r"(?<!`)``(?!`)|:(?:func|class|meth|mod|data|attr):`")
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else None
            if isinstance(text, str) and other.search(text):
                found.append(f"{page_id(path)}:{node.lineno}")
    assert found == []


def command_lines(path: Path) -> list[tuple[str, int]]:
    """The commands in the page's `sh` blocks, continued lines joined, comments dropped."""
    found = []
    for _, code, line in blocks(path, "sh"):
        joined = code.replace("\\\n", " ")
        found += [(text.strip(), line) for text in joined.splitlines() if text.strip() and not text.startswith("#")]
    return found


@pytest.mark.parametrize("path", with_blocks("sh"), ids=page_id)
def test_command_lines_of_the_page_parse(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _, text, _ in blocks(path, "yaml"):
        name = re.match(r"# (\S+\.yaml)\n", text)
        if name:
            Path(name[1]).write_text(text, encoding="utf-8")
    jobs = re.findall(r"^(\w+)\)$", (ROOT / "dev").read_text(encoding="utf-8"), re.MULTILINE)
    for text, line in command_lines(path):
        words = [word for word in shlex.split(text, comments=True) if not re.fullmatch(r"[A-Z_]+=.*", word)]
        if words[:1] == ["./dev"]:
            assert words[1] in jobs, f"{page_id(path)}:{line}: {text}"
        elif words[:1] == ["stemma"] and not words[1].startswith("-"):
            assert words[1] in dispatcher.commands(), f"{page_id(path)}:{line}: {text}"
            module = importlib.import_module(f"stemma.cli.{words[1].replace('-', '_')}")
            status = 0
            try:
                dispatcher._parse(words[1], module, words[2:])
            except SystemExit as stop:
                status = stop.code
            assert status == 0, f"{page_id(path)}:{line}: {text}"


def anchors(path: Path) -> set[str]:
    """Anchors that headings of a Markdown file get, and the names whose docstrings it shows (`::: name`)."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_of_the_page_resolve(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    broken = []
    for match in LINK.finditer(text):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name) if name else path
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("path", [path for path in PAGES if path.name != "CHANGELOG.md"], ids=page_id)
def test_names_and_files_on_the_page_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in set(re.findall(r"\bstemma(?:\.\w+)+", text)):
        pkgutil.resolve_name(name)
    files = re.findall(r"\b(?:src/stemma|tests|benchmarks|docs|examples)/[\w/.-]+\.\w+", text)
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_the_two_commands_of_the_readme_are_what_ci_runs() -> None:
    readme = [text for text, _ in command_lines(ROOT / "README.md") if text.startswith("./dev")]
    assert [shlex.split(text, comments=True) for text in readme[:2]] == [["./dev", "demo"], ["./dev", "test"]]
    steps = re.findall(r"^step (.*)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"./dev demo", "./dev test", "./dev lint", "./dev docs"} == set(steps)


def test_model_types_that_the_readme_names_are_what_it_says() -> None:
    census = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for result, sentence in (("exact", r"\bLlama, .*? are exact"), ("refused", r"such as (.*?), is refused by name")):
        types = re.findall(rf"^\| `([^`]+)` \| [^|]* \| {result} \|", census, re.MULTILINE)
        found = re.search(sentence, readme, re.DOTALL)
        assert found
        for name in re.findall(r"[A-Z][\w-]+", found[0]):
            assert any(each.startswith(name.lower().replace("-", "_")) for each in types), f"{name} is not {result}"


def test_the_floors_name_every_package() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    packages = [path.parent.name for path in (ROOT / "src" / "stemma").glob("*/__init__.py")]
    assert [name for name in packages if f"`{name}/`" not in page] == []


def test_every_command_has_its_section() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name in dispatcher.commands():
        assert f"## `stemma {name}`" in page


def test_the_reference_shows_every_public_name() -> None:
    page = ROOT / "docs" / "api.md"
    assert {f"stemma.{name}" for name in stemma.__all__ if name != "__version__"} <= anchors(page)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"([\w/-]+\.md)", navigation))
    assert listed == {path.relative_to(ROOT / "docs").as_posix() for path in PAGES if path.parent != ROOT}


@pytest.mark.parametrize("name", ["rollout", "search"])
def test_the_page_says_what_the_rows_say(name: str) -> None:
    from benchmarks import pages, rows

    table = importlib.import_module(f"benchmarks.{name}_table")
    text = table.PAGE.read_text(encoding="utf-8")
    assert pages.with_block(text, table.block(rows.load(rows.RESULTS / f"{name}.jsonl")), name) == text


def test_every_figure_is_on_a_page() -> None:
    shown = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    figures = [path.name for path in (ROOT / "docs" / "figures").iterdir() if path.suffix in (".svg", ".png")]
    assert [name for name in figures if f"figures/{name}" not in shown] == []


def test_the_picture_is_what_the_library_computes() -> None:
    script = ROOT / "docs" / "figures" / "make_tree.py"
    spec = importlib.util.spec_from_file_location("make_tree", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    committed = (script.parent / "tree.svg").read_text(encoding="utf-8")
    assert module.picture() == committed, "run: python docs/figures/make_tree.py"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX shell")
def test_dev_without_a_job_explains_itself_and_installs_nothing() -> None:
    done = subprocess.run(["sh", str(ROOT / "dev"), "--help"], capture_output=True, text=True, timeout=30)
    assert "./dev demo" in done.stdout
    assert "./dev test" in done.stdout
    wrong = subprocess.run(["sh", str(ROOT / "dev"), "dmeo"], capture_output=True, text=True, timeout=30)
    assert wrong.returncode == 1
    assert "unknown job 'dmeo'" in wrong.stderr
