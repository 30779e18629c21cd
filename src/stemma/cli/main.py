"""Dispatch of the `stemma` command by file name.

Every module beside this one that does not start with an underscore is a sub-command. It offers

- a module docstring, whose first line is the summary in `stemma --help`;
- `Config`, a frozen dataclass: its fields are the flags, the string under each field is the flag's help (see `_flags`);
- where options depend on each other, `config_class(given)`: the class for the options that were given;
- `main(config) -> dict | int`: prints text, returns what `--json` prints (a dict; its optional key
  `exit_status` is the process's exit status) or a bare exit status.

Summaries are read from the source without importing it, so `stemma --help` and a mistyped command cost milliseconds.
Exit status: 0 success, 1 a named failure, 2 a wrong command line, 130 interrupted.
"""

import ast
import contextlib
import difflib
import errno
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stemma.cli._flags import parse as _parse
from stemma.errors import OutputError, StemmaError

__all__ = ["commands", "main"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What writing fails with, whoever writes."""
_VERSIONED = ("stemma-lm", "torch", "transformers", "trl", "peft", "accelerate")


def commands() -> dict[str, str]:
    """Names of all sub-commands and the first docstring line of each, in alphabetical order, without importing them."""
    found = {}
    folders = import_module("stemma.cli").__path__
    for path in sorted((path for folder in folders for path in Path(folder).glob("*.py")), key=lambda path: path.stem):
        if path.stem != "main" and not path.stem.startswith("_"):
            docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem.replace("_", "-")] = docstring.partition("\n")[0]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: the process's own) and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # after hours of work no character may be an error
    try:
        status = _dispatch(arguments)
        if sys.stdout is not None:  # it was closed
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("stemma: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()  # its reader has gone (`stemma ... | head`)
        return 141
    except OSError as error:
        if error.errno not in _FULL:
            raise
        if os.environ.get("STEMMA_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"stemma: cannot write: {error.strerror}; make room, or write elsewhere", file=sys.stderr)
        _drop_output()
        return 1


def _drop_output() -> None:
    """Keep the interpreter from complaining at exit of output that nobody takes."""
    if sys.stdout is None:
        return
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(_overview(), file=sys.stderr)
        return 2
    first = arguments[0]
    if first in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if first == "--version":
        return _print_versions(as_json="--json" in arguments[1:])
    known = commands()
    if first not in known:
        kind = "option" if first.startswith("-") else "command"
        options = ["--help", "--version"] if kind == "option" else list(known)
        near = difflib.get_close_matches(first, options, n=1, cutoff=0.5)
        hint = f" Did you mean `stemma {near[0]}`?" if near else ""
        print(f"stemma: unknown {kind} '{first}'.{hint}\nRun `stemma --help` for the list.", file=sys.stderr)
        return 2
    return _run(first, arguments[1:])


def _overview() -> str:
    known = commands()
    width = max(map(len, known), default=0)
    lines = [
        "usage: stemma COMMAND [options]",
        "",
        "Encode shared prefixes once when training language models and decoding with them.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {summary}" for name, summary in known.items()),
        "",
        "`stemma COMMAND --help` explains a command. Every command takes --json and --config FILE.yaml (its options).",
        "`stemma --version` prints versions.",
        "STEMMA_TRACEBACK=1 shows where an error was raised.",
    ]
    return "\n".join(lines)


def _print_versions(as_json: bool) -> int:
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _VERSIONED:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    if as_json:
        print(json.dumps(versions))
    else:
        own = versions.pop("stemma-lm", "(not installed)")
        print(f"stemma {own} ({', '.join(f'{name} {number}' for name, number in versions.items())})")
    return 0


def _run(name: str, arguments: list[str]) -> int:
    module = import_module(f"stemma.cli.{name.replace('-', '_')}")
    try:
        config, as_json = _parse(name, module, arguments)
    except SystemExit as stop:  # help has been printed (status 0), or what is wrong with the options (status 2)
        return stop.code if isinstance(stop.code, int) else 2
    try:
        if as_json and sys.stdout is None:
            raise OutputError("--json writes to standard output, which is closed")
        if not as_json:
            result = module.main(config)
        else:
            with contextlib.redirect_stdout(sys.stderr):
                result = module.main(config)
    except (StemmaError, OSError) as error:
        if not isinstance(error, StemmaError) and error.filename is None:  # not about a file: a closed pipe, or a bug
            raise
        if os.environ.get("STEMMA_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"stemma {name}: {error}", file=sys.stderr)
        if as_json:
            print(json.dumps({"error": type(error).__name__, "message": str(error), "exit_status": 1}))
        return 1
    status = int(result.get("exit_status", 0)) if isinstance(result, dict) else int(result or 0)
    if as_json:
        payload = result if isinstance(result, dict) else {"exit_status": status}
        print(json.dumps(_jsonable(payload), allow_nan=False))
    return status


def _jsonable(value: Any) -> Any:
    """Plain JSON data: paths become strings, NaN and infinities become null (JSON has none)."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):  # numpy and torch scalars
        return _jsonable(value.item())
    raise TypeError(f"a command returned {type(value).__name__}, which JSON cannot hold; use numbers and strings")


if __name__ == "__main__":
    sys.exit(main())
