"""A command's `Config` from flags, from a YAML file, or from both; and the YAML that gives the same `Config` again.

The fields of a `Config` are its flags and the strings under them their help. Fields that it inherits form a group of
their own on the help page, and a field that is itself a dataclass is a group whose flags begin with the field's name:
`--server.url URL`. In a YAML file the same option is `url: URL` below `server:`. Flags come after the file and overrule
it. A command whose options depend on each other offers `config_class(given)` beside its `Config`: the class to use for
the options that were given. A command with many options names those that a person needs first in `Config.first_flags`:
`--help` shows them, `--help-all` shows every option.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

__all__ = ["flat", "parse", "to_yaml"]

_COMMON = {
    "config": (Path | None, None, "YAML file with any of these options; flags overrule it."),
    "json": (bool, False, "Print the result as one JSON object on stdout; everything else goes to stderr."),
}

_NARROWEST = 40
"""Columns of help; tyro does not come to an end in 5."""


def parse(name: str, module: Any, arguments: Sequence[str]) -> tuple[Any, bool]:
    """The command's own Config from its flags and YAML files, and whether `--json` was among them.

    Raises:
        SystemExit: help was asked for (status 0), or something is wrong with the flags or the file (status 2); what is
            wrong has been printed.
    """
    import tyro  # 0.1 s, so not before a command has been chosen

    if shutil.get_terminal_size().columns < _NARROWEST:
        os.environ["COLUMNS"] = str(_NARROWEST)
    hidden: set[str] = set()
    if {"-h", "--help", "--help-all"} & set(arguments):
        print(_wrapped(module.__doc__ or ""), end="\n\n")
        if "--help-all" not in arguments and hasattr(module.Config, "first_flags"):
            hidden = {field.name for field in dataclasses.fields(module.Config)} - set(module.Config.first_flags)
    files, flags = _split([word if word != "--help-all" else "--help" for word in arguments])
    contents = {path: _read_yaml(name, path) for path in files}
    try:
        config_class = _config_class(module, [*contents.values(), _given(flags)])
        for path in reversed(files):
            flags = [*_flags_of(contents[path], config_class, path), *flags]
    except ValueError as error:
        _refuse(name, str(error))
    own = (module.Config, config_class)
    form = _form(config_class, own, pairs=bool(files), common=True, hidden=hidden)
    try:
        parsed: Any = tyro.cli(form, prog=f"stemma {name}", description="", args=flags)
    except SystemExit as stop:
        if stop.code and files:
            print(f"Some of the options come from {', '.join(files)}.", file=sys.stderr)
        if not stop.code and hidden:
            print(f"`stemma {name} --help-all` shows all options, these and {len(hidden)} more.")
        raise
    try:
        return _filled(config_class, own, parsed), parsed.json
    except ValueError as error:
        _refuse(name, str(error))


def _config_class(module: Any, given: Sequence[Mapping[Any, Any]]) -> type:
    """The command's Config, or the one that fits the options in these mappings, later ones overruling earlier ones."""
    if not hasattr(module, "config_class"):
        return module.Config
    options: dict[str, Any] = {}
    for values in given:
        for name, value in values.items():
            inner = value if isinstance(value, dict) else {}
            options |= {f"{name}.{option}": item for option, item in inner.items()} or {str(name): value}
    return module.config_class(options)


def _given(flags: Sequence[str]) -> dict[str, str]:
    """The values behind the flags, by the names of their options."""
    found = {}
    for word, following in zip(flags, [*flags[1:], ""]):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value if equals else following
    return found


def flat(config: Any) -> dict[str, Any]:
    """The options of a Config by their names, those of a group as `group.option`."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{name}": item for name, item in flat(value).items()}
        else:
            found[field.name] = value
    return found


def to_yaml(config: Any, *, leave_out: Sequence[str] = ()) -> str:
    """YAML that `--config` reads back as the same Config, but for the options named in `leave_out`."""
    import yaml

    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    plain = {name: _plain(value) for name, value in values.items() if name not in leave_out}
    return yaml.safe_dump(plain, sort_keys=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return list(value) if isinstance(value, tuple) else value


# ---------------------------------------------------------------------------------------------- what tyro parses


def _form(
    config_class: type, own: Sequence[type], *, pairs: bool, common: bool = False, hidden: Collection[str] = ()
) -> type:
    """A plain dataclass with the flags of `config_class`, those of other classes than `own` grouped; it checks nothing
    but types. Help does not show the `hidden` ones."""
    import tyro

    hints, helps = get_type_hints(config_class, include_extras=True), _helps(config_class)
    flags: list[Any] = []
    groups: dict[type, list[Any]] = {}
    for field in dataclasses.fields(config_class):
        owner = _owner(config_class, field.name)
        target = flags if owner in own else groups.setdefault(owner, [])
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            within = [each.name for each in dataclasses.fields(hint)] if field.name in hidden else ()
            nested = _form(hint, [hint], pairs=pairs, hidden=within)
            text = helps.get(field.name) or (hint.__doc__ or "").partition("\n")[0]
            hint = Annotated[nested, tyro.conf.arg(help=text)]
            target.append((field.name, hint, dataclasses.field(default_factory=nested)))
        else:
            hint = _annotated(field.name, hint, field.default, helps.get(field.name, ""), pairs)
            hint = Annotated[hint, tyro.conf.Suppress] if field.name in hidden else hint
            copied = dataclasses.field(default=field.default)  # a factory's default, if any, goes in its place
            if field.default_factory is not dataclasses.MISSING:
                copied = dataclasses.field(default_factory=field.default_factory)
            target.append((field.name, hint, copied))
    for name, (kind, default, text) in _COMMON.items() if common else ():
        flags.append((name, _annotated(name, kind, default, text, False), dataclasses.field(default=default)))
    for owner, inherited in groups.items():
        group = dataclasses.make_dataclass(_group_name(owner), inherited, frozen=True, kw_only=True)
        text = (owner.__doc__ or "").partition("\n")[0].replace("`", "")
        hint = Annotated[group, tyro.conf.OmitArgPrefixes, tyro.conf.arg(help=text)]
        flags.append((_group_name(owner), hint, dataclasses.field(default_factory=group)))
    return dataclasses.make_dataclass("Config", flags, frozen=True, kw_only=True)


def _filled(config_class: type, own: Sequence[type], parsed: Any) -> Any:
    """`config_class` with the values of its form."""
    hints, values = get_type_hints(config_class), {}
    for field in dataclasses.fields(config_class):
        owner = _owner(config_class, field.name)
        value = getattr(parsed if owner in own else getattr(parsed, _group_name(owner)), field.name)
        hint = hints[field.name]
        values[field.name] = _filled(hint, [hint], value) if dataclasses.is_dataclass(value) else value
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name} must be a finite number; got {value}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{field.name} must be a number of at most 63 bits; got one of {value.bit_length()}")
    return config_class(**values)


def _owner(config_class: type, name: str) -> type:
    """The class that a field was first declared in."""
    return [each for each in config_class.__mro__ if name in inspect.get_annotations(each)][-1]


def _group_name(owner: type) -> str:
    """Name of the group of inherited flags: that of their class, such as `sampling`."""
    return owner.__name__.lower()


def _helps(config_class: type) -> dict[str, str]:
    """The string under each field, also of inherited fields."""
    found = {}
    for owner in reversed([each for each in config_class.__mro__ if dataclasses.is_dataclass(each)]):
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except OSError:  # no source: made while running, from fields of other classes
            continue
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, body.body[1:]):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = after.value if isinstance(after, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[statement.target.id] = " ".join(text.value.split())
    return found


def _annotated(name: str, hint: Any, default: Any, text: str, pairs: bool) -> Any:
    """The type of a flag with its help, and with what makes its line short: no `None` and no `--no-` where it is idle.

    After a file, which may have switched something on, every switch has its `--no-`.
    """
    import tyro

    if default is False and not pairs:
        return Annotated[hint, tyro.conf.arg(help=text), tyro.conf.FlagCreatePairsOff]
    if default is None:
        bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        metavar = "|".join(_metavar(kind) for kind in get_args(bare) if kind is not type(None))
        if tyro.conf.Positional in get_args(hint)[1:]:
            metavar = f"[{name.upper()}]"  # may be left out
        return Annotated[hint, tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="")]
    if get_origin(hint) is tuple:
        return Annotated[hint, tyro.conf.arg(help=text, metavar=f"{_metavar(get_args(hint)[0])} ...")]
    return Annotated[hint, tyro.conf.arg(help=text)]


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    return str(kind.__name__).upper()


def _wrapped(docstring: str) -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    return "\n\n".join(textwrap.fill(paragraph, width) for paragraph in inspect.cleandoc(docstring).split("\n\n"))


def _refuse(name: str, message: str) -> NoReturn:
    print(f"stemma {name}: {message}\nRun `stemma {name} --help` for the options.", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------- YAML to flags


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files behind `--config`, and the other arguments."""
    files, rest, words = [], [], iter(arguments)
    for word in words:
        if word.startswith("--config="):
            files.append(word.partition("=")[2])
        elif word == "--config" and (path := next(words, None)) is not None:
            files.append(path)
        else:
            rest.append(word)
    return files, rest


def _read_yaml(name: str, path: str) -> dict[Any, Any]:
    """The options of a YAML file."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        _refuse(name, f"cannot read the file '{path}' of --config: {reason}")
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date or number that is none, nesting without end
        _refuse(name, f"{path} is not YAML: {' '.join(str(error).split())[:300]}")
    if not isinstance(values, dict) or not values:
        _refuse(name, f"{path} holds no options; expected lines such as 'max_steps: 100', got {values!r}")
    return values


def _flags_of(values: Mapping[Any, Any], config_class: type, path: str, group: str = "") -> Iterator[str]:
    """Flags for a mapping; their values are strings, whose types are checked like those of the command line."""
    hints = get_type_hints(config_class)
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key).replace("-", "_"), hints, n=1, cutoff=0.5)
            hint = f"; did you mean '{group}{near[0]}'?" if near else f"; known are {', '.join(hints)}"
            raise ValueError(f"{path}: unknown option '{group}{key}'{hint}")
        kind, where = hints[key], f"{path}: {group}{key}"
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        flag = f"--{group}{key}".replace("_", "-")
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ValueError(f"{where} must be a group of options, one per line below it; got {value!r}")
            yield from _flags_of(value, kind, path, f"{key}.")  # type: ignore[arg-type]
        elif isinstance(value, dict) or (isinstance(value, list) and get_origin(kind) is not tuple):
            raise ValueError(f"{where} must be a single value; got {value!r}")
        elif value is None and type(None) not in kinds:
            raise ValueError(f"{where} has no value; give one, or leave the line out")
        elif isinstance(value, bool) != (bool in kinds):
            raise ValueError(f"{where} must{'' if bool in kinds else ' not'} be true or false; got {value!r}")
        elif isinstance(value, bool):
            yield flag if value else f"--{group}no-{key}".replace("_", "-")
        elif isinstance(value, list):
            yield from (flag, *map(str, value))
        else:
            yield f"{flag}={value}"
