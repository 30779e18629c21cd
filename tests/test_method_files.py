"""One contract over the files of all methods: docstring, source, options, reproduction, tests. Found by their place."""

import ast
import dataclasses
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from stemma.cli._flags import _helps
from stemma.cli.methods import ROOMS, method_files, method_name, methods, recipe_files
from stemma.cli.run import no_model_because

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "stemma"
FILES = sorted(path for room in ROOMS for path in method_files(PACKAGE / room))
SHARED = {"rl/engine"}
"""What stands in a room of methods and is none: pieces that its methods share."""


def parts(path: Path) -> tuple[str, dict[str, ast.stmt], list[str]]:
    """The docstring, the top-level functions and classes, and `__all__`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    public = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return ast.get_docstring(tree) or "", defined, public[0] if public else []


def module_of(path: Path) -> str:
    """The dotted name of a method's module or package."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


each_file = pytest.mark.parametrize("path", FILES, ids=module_of)


def test_there_are_methods_and_only_in_rooms_of_methods() -> None:
    from test_layers import METHODS

    assert set(ROOMS) == set(METHODS)
    assert len(FILES) == len(methods()) >= 9  # names are unique over the rooms


def test_what_is_no_method_is_known() -> None:
    inside = {f"{path.parent.name}/{path.stem}" for room in ROOMS for path in (PACKAGE / room).glob("[!_]*")}
    found = {module_of(path).removeprefix("stemma.").replace(".", "/") for path in FILES}
    assert inside - found == SHARED


NAMES_OF_MORE = {"grpo": "the trainer's own name", "trl": "the package that is adapted"}
"""Methods whose names are also those of something that others use."""


def names_method(name: str, text: str) -> bool:
    """Whether a word of the text is a method's name, also in the spellings of classes and flags, or begins with it."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", text).replace("-", "_").lower()
    return bool(re.search(rf"(?<![a-z0-9]){'_?'.join(name.replace('-', ''))}(?![a-z0-9])", words))


@pytest.mark.parametrize("text", ["a tempo", "TEMPO:", "TempoConfig", "rl.tempo import", "use_tempo", "--tempo.x"])
def test_names_of_methods_are_found(text: str) -> None:
    assert names_method("tempo", text)


def test_a_name_is_found_in_every_spelling_and_not_in_other_words() -> None:
    for text in ("prefix_kv", "prefix-kv", "PrefixKV", "PrefixKVCache", "make_prefix_kv"):
        assert names_method("prefix-kv", text), text
    assert names_method("kvcomm", "KVComm")
    assert names_method("pppo", "PPPOConfig")
    assert not names_method("tempo", "temporary contemporary")
    assert not names_method("prefix-kv", "prefix, kv; prefix_kvs")


@each_file
def test_the_name_of_a_method_stands_in_its_own_places_only(path: Path) -> None:
    room, stem = module_of(path).split(".")[1:]
    if stem in NAMES_OF_MORE:
        return
    places = (PACKAGE / room / f"{stem}.py", PACKAGE / room / stem, *(PACKAGE / "recipes").glob(f"*{stem}*"))
    found = [
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if not any(place in (file, *file.parents) for place in places)
        and names_method(method_name(path), file.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_every_recipe_has_its_method() -> None:
    assert set(recipe_files()) <= set(methods())


@each_file
def test_the_docstring_says_what_for_and_from_where(path: Path) -> None:
    docstring, _, public = parts(path)
    summary, _, rest = docstring.partition("\n")
    assert re.fullmatch(r"\S.{20,}\.", summary)
    assert rest.startswith("\n")
    paper = methods()[method_name(path)].paper
    assert 2 < len(paper.title.split()) < 25
    assert int(paper.arxiv[:2]) == paper.year % 100  # an arXiv id begins with the year of the first version
    assert "What we changed" in docstring or "Differences from" in docstring or "differs" in docstring
    assert public


@each_file
def test_settings_are_one_frozen_and_explained_dataclass(path: Path) -> None:
    docstring, _, public = parts(path)
    assert ("Config" in public) != ("No `Config`: " in docstring)
    if "Config" in public:
        config = import_module(module_of(path)).Config
        parameters = config.__dataclass_params__
        assert parameters.frozen
        fields = dataclasses.fields(config)
        assert all(field.kw_only for field in fields)
        assert {field.name for field in fields} <= set(_helps(config))
        assert "__post_init__" in vars(config) or "__post_init__" in vars(config.__mro__[1])


@each_file
def test_it_can_be_reproduced_or_says_why_not(path: Path) -> None:
    docstring, _, _ = parts(path)
    method = methods()[method_name(path)]
    assert method.reproduced != bool(method.unreproduced_because)
    assert ("No `run`: " in docstring) == bool(method.unreproduced_because)


@pytest.mark.parametrize("path", recipe_files().values(), ids=lambda path: path.stem)
def test_a_recipe_runs_from_its_options(path: Path) -> None:
    _, defined, _ = parts(path)
    run = defined["run"]
    assert isinstance(run, ast.FunctionDef)
    assert [argument.arg for argument in run.args.args] == ["options"]
    takes_model = "options.model" in path.read_text(encoding="utf-8")
    assert takes_model != bool(no_model_because(method_name(path)))


@each_file
def test_it_has_its_tests(path: Path) -> None:
    room, name = module_of(path).split(".")[1:]
    assert list((ROOT / "tests" / room).rglob(f"test_{name}.py"))


def test_every_row_of_a_reproduction_belongs_to_a_method() -> None:
    known = {f"{method.room}_{name}": method for name, method in methods().items()}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if "recipe" in rows[0]:
            assert known[path.stem].reproduced
            assert {row["recipe"] for row in rows} == {known[path.stem].name}
            assert len({(row["commit"], row["date"], row["dirty"]) for row in rows}) == 1  # of one run, as is said
