"""Reproduce a method's claims at laptop scale: baseline and method side by side, with seeds, a table and a plot.

Without a method: the list of reproductions. All runs of a reproduction start from one small policy, made here and kept
in --cache-dir, and sample equally many tokens. The output folder gets METHOD.md (the table "the paper's claim, measured
here"), METHOD.png (curves), METHOD.json and, under runs/, every finished run: a reproduction that was interrupted goes
on with the next one.
"""

import ast
import difflib
import re
import sys
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import tyro

from stemma.cli.methods import methods, recipe_files
from stemma.recipes._runs import Options

__all__ = ["Config", "main", "no_model_because", "recipes"]

_NO_MODEL = re.compile(r"No `--model`: (.+?\.)(?= [A-Z]|\n\n|$)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Flags of `stemma run`."""

    method: Annotated[str | None, tyro.conf.Positional] = None
    """The method; none: the list."""


def recipes() -> dict[str, tuple[str, str]]:
    """Reproductions by name: the module, and the first line of the method's docstring, read without importing them."""
    known = methods()
    return {name: (f"stemma.recipes.{path.stem}", known[name].purpose) for name, path in recipe_files().items()}


def no_model_because(name: str) -> str | None:
    """Why a reproduction takes no pretrained model, from its docstring; None: it takes one."""
    reason = _NO_MODEL.search(ast.get_docstring(ast.parse(recipe_files()[name].read_text(encoding="utf-8"))) or "")
    return None if reason is None else " ".join(reason[1].split())


def main(config: Config) -> dict[str, Any]:
    """List the reproductions, or run one; the result is what METHOD.json holds."""
    known = recipes()
    if config.method is None:
        width = max(map(len, known), default=0)
        print("\n".join(f"{name:<{width}}  {summary}" for name, (_, summary) in known.items()))
        return {"recipes": {name: summary for name, (_, summary) in known.items()}}
    if config.method not in known:
        described = methods().get(config.method.replace("_", "-"))
        if described is not None and not described.reproduced:
            print(
                f"stemma run: '{described.name}' has no reproduction: "
                f"{described.unreproduced_because or 'none has been written.'}\nRun `stemma run` for the list.",
                file=sys.stderr,
            )
            return {"error": f"no reproduction of '{described.name}'", "exit_status": 2}
        near = difflib.get_close_matches(config.method, known, n=1, cutoff=0.4)
        hint = f" Did you mean `stemma run {near[0]}`?" if near else ""
        print(
            f"stemma run: no reproduction of '{config.method}'.{hint}\nRun `stemma run` for the list.", file=sys.stderr
        )
        return {"error": f"unknown method '{config.method}'", "exit_status": 2}
    reason = no_model_because(config.method)
    if config.model is not None and reason:
        print(f"stemma run: {config.method} takes no --model: {reason}\nRun it without.", file=sys.stderr)
        return {"error": f"{config.method} takes no --model", "exit_status": 2}
    module = import_module(known[config.method][0])
    options = Options(**{field.name: getattr(config, field.name) for field in fields(Options)})
    result: dict[str, Any] = module.run(options)
    print(Path(result["files"]["md"]).read_text(encoding="utf-8"))
    if config.quick:
        print("These numbers mean nothing: --quick only checks that everything runs.", file=sys.stderr)
    return result
