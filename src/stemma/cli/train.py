"""Train a model with GRPO and the methods around it on a verifiable task, each shared prefix encoded once.

Without options: a small Llama, made here and trained from scratch on DialLock with many-shot prompts; a supervised
warm-up, then GRPO; a few minutes on two cores. With --model and --dataset: the same on your checkpoint and data.

--method chooses where prompts and completions come from and what is trained on, --credit the advantages. A chosen
method adds its own options: `stemma train --method NAME --help` shows them.

The run folder holds checkpoints and the final model (for from_pretrained), metrics.jsonl, report.md, report.json,
plot.png and config.resolved.yaml. Ctrl-C or SIGTERM finishes the step and saves; --resume continues to the same
numbers. Several processes: accelerate launch -m stemma.cli.main train ...
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from stemma.cli import _flags
from stemma.cli._train_options import Config, config_class, resolve
from stemma.errors import InvalidDataError
from stemma.files import locked, write_text

__all__ = ["Config", "config_class", "main"]

_STORED = "config.resolved.yaml"


def main(config: Config) -> dict[str, Any]:
    """Run or resume a training run; the result is its report."""
    from stemma.cli._train_run import Training
    from stemma.train.distributed import check_accelerator
    from stemma.train.report import require_matplotlib
    from stemma.train.tracking import make_accelerator

    require_matplotlib()
    accelerator = make_accelerator(config.report_to, config.output_dir)
    check_accelerator(accelerator, bf16=config.bf16)
    with ExitStack() as stack:
        if accelerator.is_main_process:
            if not config.resume and not config.output_dir.exists():
                config.output_dir.mkdir(parents=True)
            if config.output_dir.exists():
                stack.enter_context(locked(config.output_dir))
            _open_folder(config)
        accelerator.wait_for_everyone()
        stored = _stored_config(config.output_dir)
        if accelerator.is_main_process:
            print((config.output_dir / _STORED).read_text(encoding="utf-8"), file=sys.stderr)
        return Training(stored, accelerator, resume=config.resume).train()


def _open_folder(config: Config) -> None:
    """Make a new run folder, or check that an old one is resumed with its own settings.

    Raises:
        InvalidDataError: the folder exists without --resume, does not with it, or the settings differ.
    """
    folder, stored_path = config.output_dir, config.output_dir / _STORED
    if not config.resume:
        # A run that was refused before it began left its settings and nothing else: nothing is lost by starting anew.
        if folder.exists() and (
            not folder.is_dir() or any(item.name not in (_STORED, "inputs.json", ".lock") for item in folder.iterdir())
        ):
            raise InvalidDataError(
                f"the run folder '{folder}' exists already; continue it with --resume, or choose another --output-dir"
            )
        write_text(stored_path, _flags.to_yaml(resolve(config), leave_out=["resume", "output_dir"]))
        return
    if not stored_path.is_file():
        raise InvalidDataError(f"there is no run to resume in '{folder}' (no {_STORED}); leave out --resume")
    default, given, kept = (_flags.flat(each) for each in (type(config)(), config, _stored_config(folder)))
    for name, value in given.items():
        if name not in ("resume", "output_dir") and value not in (default[name], kept.get(name)):
            raise InvalidDataError(
                f"{name} is {kept.get(name)!r} in the run folder '{folder}', not {value!r}; a resumed run keeps its "
                "settings"
            )


def _stored_config(folder: Path) -> Config:
    """The settings that a run folder was made with, read back from it."""
    arguments = ["--config", str(folder / _STORED), "--output-dir", str(folder)]
    config, _ = _flags.parse("train", sys.modules[__name__], arguments)
    return config
