"""Options from a YAML file and from flags: types, unknown names, groups, what a file leaves to the flags."""

import contextlib
import dataclasses
import io
import re
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stemma.cli import _flags


@dataclass(frozen=True, kw_only=True)
class Base:
    """What is inherited."""

    steps: int | None = 3
    """Steps of the base."""
    rate: float = 0.5
    """A rate."""

    def __post_init__(self) -> None:
        raise AssertionError("only the command's own class checks its values")


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group of options."""

    first_ratio: float = 0.25
    """Where to begin."""
    keep_last: bool = True
    """Keep the last one."""

    def __post_init__(self) -> None:
        if self.first_ratio > 1:
            raise ValueError(f"first_ratio must be at most 1; got {self.first_ratio}")


@dataclass(frozen=True, kw_only=True)
class Config(Base):
    steps: int | None = None
    """Steps; None: some number."""
    path: Path | None = None
    """A path."""
    name: str = "x"
    """A name."""
    loud: bool = False
    """In capitals."""
    shared: bool = True
    """Shared."""
    kind: Literal["none", "red"] = "red"
    """Colour."""
    report_to: tuple[Literal["none", "a", "b"], ...] = ("none",)
    """Where to."""
    group: Group = field(default_factory=Group)
    """Options of the group."""

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("name must not be bad")


MODULE = types.SimpleNamespace(Config=Config, __doc__="A trial.")


def parse(*arguments: str) -> Any:
    return _flags.parse("trial", MODULE, arguments)[0]


def refused(*arguments: str) -> str:
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(io.StringIO()) as errors:
        parse(*arguments)
    assert stop.value.code == 2
    return " ".join(errors.getvalue().replace("│", " ").split())


def write(folder: Path, text: str) -> str:
    (folder / "options.yaml").write_text(text, encoding="utf-8")
    return str(folder / "options.yaml")


def test_flags_overrule_the_file_and_the_file_overrules_defaults(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "steps: 7\nrate: 1e-3\nloud: true\nshared: false\nkind: none\nreport_to: [a, b]\npath: some/where\n"
        "group:\n  first_ratio: 0.75\n  keep_last: false\n",
    )
    whole = Config(
        steps=7,
        rate=1e-3,
        loud=True,
        shared=False,
        kind="none",
        report_to=("a", "b"),
        path=Path("some/where"),
        group=Group(first_ratio=0.75, keep_last=False),
    )
    assert parse("--config", file) == parse(f"--config={file}") == whole
    flags = ("--steps", "9", "--no-loud", "--shared", "--report-to", "b", "--group.first-ratio", "1", "--path", "None")
    changed = {
        "steps": 9,
        "loud": False,
        "shared": True,
        "report_to": ("b",),
        "path": None,
        "group": Group(first_ratio=1, keep_last=False),
    }
    for arguments in (["--config", file, *flags], [*flags, "--config", file]):
        assert parse(*arguments) == dataclasses.replace(whole, **changed)


def test_a_later_file_overrules_an_earlier_one(tmp_path: Path) -> None:
    one = write(tmp_path, "steps: 7\nname: one\n")
    (tmp_path / "two.yaml").write_text("name: -two\nreport_to: a\nsteps: null\n")
    assert parse("--config", one, "--config", str(tmp_path / "two.yaml")) == Config(
        steps=None, name="-two", report_to=("a",)
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no options; expected lines such as 'max_steps: 100', got None"),
        ("just words", "holds no options"),
        ("- steps", "holds no options"),
        ("steps: [1", "is not YAML"),
        ("steps: " + "[" * 5000, "is not YAML"),
        ("steps: " + "9" * 5000, "is not YAML"),
        ("steps: 2001-99-99", "is not YAML"),
        ("step: 7", "unknown option 'step'; did you mean 'steps'?"),
        ("first-ratio: 7", "unknown option 'first-ratio'"),
        ("zzzzz: 7", "known are steps, rate, path"),
        ("group: {first-ratio: 1}", "unknown option 'group.first-ratio'; did you mean 'group.first_ratio'?"),
        ("group: 3", "group must be a group of options"),
        ("steps: seven", "Error parsing --steps: no type matching"),
        ("steps: 1.5", "Error parsing --steps: no type matching"),
        ("steps: true", "steps must not be true or false; got True"),
        ("loud: 1", "loud must be true or false; got 1"),
        ("steps: [1, 2]", "steps must be a single value; got [1, 2]"),
        ("name: {a: 1}", "name must be a single value"),
        ("kind: blue", "kind"),
        ("report_to: [a, c]", "report-to"),
        ("name:", "name has no value"),
        ("group: {first_ratio: 2}", "first_ratio must be at most 1; got 2.0"),
        ("name: bad", "name must not be bad"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, told: str) -> None:
    message = refused("--config", write(tmp_path, text))
    assert told in message
    assert "stemma trial --help" in message
    if "Error parsing" in told:
        assert "come from" in message
        assert "options.yaml" in message


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    assert "cannot read the file" in refused("--config", str(tmp_path / "none.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused("--config", str(tmp_path / "bytes.yaml"))
    assert "--config" in refused("--config")


def test_help_groups_what_is_inherited_and_nested(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (["--help"], ["--config", write(tmp_path, "steps: 4"), "--help"]):
        with pytest.raises(SystemExit) as stop:
            parse(*arguments)
        assert stop.value.code == 0
        page = capsys.readouterr().out
        inherited = page.index("What is inherited.")
        nested = page.index("Options of the group.")
        assert page.index("--name STR") < nested < page.index("--group.first-ratio FLOAT")
        assert inherited < page.index("--steps INT")
        assert "Steps; None: some number." in page  # the help of the class that changes the default
        assert "--report-to {none,a,b} ..." in page
        assert ("--no-loud" in page) == (len(arguments) > 1)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_shows_what_comes_first_and_help_all_the_rest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [shown(capsys, "--help"), shown(capsys, "--help-all")]
    monkeypatch.setattr(Config, "first_flags", ("rate", "name"), raising=False)
    pages.append(shown(capsys, "--help-all"))
    first = shown(capsys, "--help")
    flags = set(re.findall(r"--[a-z][a-z.-]*", first))
    assert flags == {"--help", "--rate", "--name", "--config", "--json", "--help-all"}
    assert "these and 7 more" in first
    for page in pages:
        assert "--group.first-ratio FLOAT" in page
        assert "--help-all" not in page
    assert parse("--group.first-ratio", "1").group.first_ratio == 1  # hidden, not gone


@pytest.mark.parametrize("columns", ["0", "1", "5", "39"])
def test_help_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert "--group.first-ratio" in shown(capsys, "--help")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rate", "nan"], "rate must be a finite number; got nan"),
        (["--rate=-inf"], "rate must be a finite number; got -inf"),
        (["--group.first-ratio", "inf"], "first_ratio must be a finite number; got inf"),
        (["--steps", "1" + 30 * "0"], "steps must be a number of at most 63 bits; got one of 100"),
        (["--steps", "1" + 5000 * "0"], "steps"),
        (["--steps", "1.5"], "Error parsing --steps"),
    ],
)
def test_numbers_that_nobody_means_are_refused_by_their_flag(flags: list[str], told: str) -> None:
    assert told in refused(*flags)


def test_flat_names() -> None:
    assert _flags.flat(Config(steps=1))["group.first_ratio"] == 0.25
    assert list(_flags.flat(Config()))[-2:] == ["group.first_ratio", "group.keep_last"]


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(lambda t: t != "bad")


@given(
    steps=st.none() | st.integers(-(10**9), 10**9),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    name=texts,
    loud=st.booleans(),
    shared=st.booleans(),
    kind=st.sampled_from(["none", "red"]),
    report_to=st.lists(st.sampled_from(["none", "a", "b"]), min_size=1).map(tuple),
    ratio=st.floats(0, 1),
)
def test_written_options_read_back_as_the_same(
    ratio: float, tmp_path_factory: pytest.TempPathFactory, **values: Any
) -> None:
    config = Config(**values, path=Path("a b/ü"), group=Group(first_ratio=ratio))
    text = _flags.to_yaml(config)
    assert list(yaml.safe_load(text)) == [f.name for f in dataclasses.fields(Config)]
    assert parse("--config", write(tmp_path_factory.getbasetemp(), text)) == config


def test_left_out_options() -> None:
    assert "name" not in yaml.safe_load(_flags.to_yaml(Config(), leave_out=["name"]))


def test_the_help_page_of_training_imports_no_torch() -> None:
    code = (
        "import sys\nfrom stemma.cli.main import main\nassert main(['train', '--help']) == 0\n"
        "assert main(['train', '--epsilon', '2']) == 2\nassert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "epsilon must be in (0, 1)" in done.stderr
