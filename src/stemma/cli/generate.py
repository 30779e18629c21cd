"""Generate from prompts that share prefixes, each shared run encoded, kept and read once.

--prompts is a JSONL file, one prompt on each line: {"prompt": "text"}, {"messages": [{"role": "user", "content":
"..."}]} for the tokenizer's chat template, or {"prompt_ids": [5, 9, 2]}. The tokens are those that transformers'
generate gives; only the time and memory differ. A line of --output is {"prompt": 0, "sample": 0, "text": "...",
"token_ids": [4, 7]}.

With --batch-size, Ctrl-C or SIGTERM stops after the batch; --resume continues to the same file.
"""

import dataclasses
import hashlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from stemma.data.records import read_jsonl, text_field
from stemma.errors import InvalidBatchError, InvalidDataError, OutputError, UnsupportedModelError
from stemma.files import locked

if TYPE_CHECKING:
    from stemma.decode.generate import Prompt
    from stemma.decode.shared_cache import SharingReport
    from stemma.decode.shared_prefix import SharedPrefix

__all__ = ["Config", "main", "read_prompts"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of `stemma generate`."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model folder or hub id, with its tokenizer unless all prompts are token ids."""
    prompts: Path
    """JSONL file of prompts."""
    prefix: Path | None = None
    """Text file that all prompts begin with, encoded once, before them; or the folder of an encoded one. Not with
    messages."""
    save_prefix: Path | None = None
    """Folder for the encoded --prefix, which this model then reads instead of encoding it again; must not exist yet,
    unless --resume is given."""
    output: Path | None = None
    """JSONL file of the generations, must not exist yet; standard output when not given."""
    resume: bool = False
    """Continue the --output of a generation that was interrupted; other flags as before."""
    batch_size: int | None = None
    """Prompts that are decoded together, and share; None: all."""
    max_new_tokens: int = 256
    """Most new tokens of a sequence."""
    num_return_sequences: int = 1
    """Sequences for each prompt."""
    num_beams: int = 1
    """Beams of each prompt; above 1 not with --temperature."""
    temperature: float = 0.0
    """0 takes the most likely token; above 0 samples."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens whose probability reaches this, in (0, 1]."""
    top_k: int = 0
    """Sample from so many most likely tokens; 0 for all."""
    stop_strings: tuple[str, ...] = ()
    """A sequence ends with any of these texts."""
    share: Literal["auto", "always", "never"] = "auto"
    """Share where it pays, wherever two sequences have a run in common, or not at all."""
    max_tokens: int | None = None
    """Most prompt tokens in one forward call."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""
    device: str = "auto"
    """Where to compute: auto (CUDA when there is one), cpu, cuda, cuda:1 and so on."""
    seed: int = 0
    """Seed of the samples."""
    report: bool = False
    """Print what was shared, to standard error."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "num_return_sequences", "num_beams", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        if self.save_prefix is not None and self.prefix is None:
            raise ValueError("--save-prefix keeps the encoded --prefix; give one.")
        if self.resume and self.output is None:
            raise ValueError("--resume continues an --output; give one.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must be 0 or a positive number, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must lie in (0, 1], got {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"--top-k must be 0 or positive, got {self.top_k}.")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            name = "--top-p" if self.top_p < 1 else "--top-k"
            raise ValueError(f"{name} applies to sampling only; set --temperature above 0, or leave {name} out.")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("--num-beams above 1 searches and --temperature above 0 samples; choose one.")
        if self.temperature == 0 and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"--num-return-sequences {self.num_return_sequences} without sampling gives the same sequence again; "
                "set --temperature, or as many --num-beams."
            )


def main(config: Config) -> dict[str, Any]:
    """Generate and write the lines; the result is these and the report, or, after a signal, how to go on."""
    from stemma.cli._generate_output import Output
    from stemma.train.checkpoint import StopSignal

    if config.output is None and sys.stdout is None:
        raise OutputError("standard output is closed; give an --output")
    by_line = read_prompts(config.prompts)
    prompts = list(by_line.values())
    prefix_text = _prefix_text(config, prompts)
    _check_save_prefix(config)
    size = config.batch_size or len(prompts)
    batches = [range(begin, min(begin + size, len(prompts))) for begin in range(0, len(prompts), size)]
    lines: list[dict[str, Any]] = []
    stop, output, job, report = None, None, None, None
    with ExitStack() as stack:
        done = 0
        if config.output is not None:  # refuses a file that cannot be used before a model is loaded
            counts = [len(batch) * config.num_return_sequences for batch in batches]
            if config.output.parent.exists() or not config.resume:
                stack.enter_context(locked(config.output))
            output = stack.enter_context(Output(config.output, _settings(config), counts, config.resume))
            lines, done = list(output.lines), output.done
        if done < len(batches):
            job = _Job(config, by_line, prefix_text)
        if output is not None and len(batches) - done > 1:
            stop = stack.enter_context(StopSignal())
        while job is not None and done < len(batches):
            new, found = job.lines(done, batches[done])
            if output is None:
                escaped = (sys.stdout.encoding or "utf-8").lower() != "utf-8"
                print("".join(json.dumps(line, ensure_ascii=escaped) + "\n" for line in new), end="", flush=True)
            else:
                output.append(new)
            lines += new
            report = found if report is None or found is None else report + found
            done += 1
            if len(batches) > 1:
                print(f"[{batches[done - 1].stop}/{len(prompts)}] prompts", file=sys.stderr, flush=True)
            if stop is not None and stop.requested is not None:
                break
        if output is not None and done == len(batches):
            output.finish()
    prefix = None if job is None else job.saved(report)
    if config.report and job is not None:
        print(report or "nothing was shared (--share never)", file=sys.stderr)
        if prefix is not None:
            how = "encoded once" if prefix["encoded"] else f"read from {config.prefix}"
            print(f"prefix: {prefix['tokens']} tokens, {how}, {prefix['saved_tokens']} fewer encoded", file=sys.stderr)
    result = {
        "model": config.model,
        "generations": lines,
        "report": None if report is None else dataclasses.asdict(report),
        "prefix": prefix,
    }
    if done < len(batches):
        return {**result, **_interrupted(config, (stop and stop.requested) or signal.SIGTERM, len(prompts))}
    return {**result, "status": "finished"}


class _Job:
    """The model, and the prompts as token ids; all that can be refused is refused before anything is encoded."""

    def __init__(self, config: Config, prompts: "Mapping[int, Prompt]", prefix_text: str | None) -> None:
        import stemma
        from stemma.decode.prompts import prompt_ids
        from stemma.models.limits import check_lengths, check_prompts
        from stemma.models.loading import load_config, load_model
        from stemma.models.tokens import text_ids

        if Path(config.model).is_file():
            raise UnsupportedModelError(f"'{config.model}' is a file; give the folder of a saved model, with weights.")
        load_config(config.model)
        self.config, follows = config, config.prefix is not None
        self.tokenizer = _tokenizer(config.model, needed=any(not _is_ids(prompt) for prompt in prompts.values()))
        names = [f"{config.prompts}, line {line}:" for line in prompts]
        self.rows = []
        for index, prompt in enumerate(prompts.values()):
            try:
                self.rows.append(prompt_ids(self.tokenizer, prompt, index, follows))
            except InvalidBatchError as error:
                raise InvalidDataError(f"{names[index]} {error}") from error
        head = [] if prefix_text is None else text_ids(self.tokenizer, prefix_text)
        self.model = load_model(config.model, dtype=config.dtype, device=config.device)
        self.prefix: SharedPrefix | None = None
        if follows or config.share != "never":
            stemma.enable(self.model)
        if config.prefix is not None and prefix_text is None:
            self.prefix = stemma.SharedPrefix.from_pretrained(self.model, config.prefix)
            head = self.prefix.ids.tolist()
        check_prompts(self.model, self.rows, len(head) + config.max_new_tokens, names.__getitem__)
        check_lengths(self.model, len(head) + max(map(len, self.rows)) + config.max_new_tokens)
        if prefix_text is not None:
            self.prefix = stemma.SharedPrefix.from_ids(self.model, head, max_tokens=config.max_tokens)
        if config.save_prefix is not None and self.prefix is not None:
            self.prefix.save_pretrained(config.save_prefix)

    def lines(self, number: int, batch: range) -> "tuple[list[dict[str, Any]], SharingReport | None]":
        """What a batch of prompts gives. Its samples depend on the seed and its number, not on earlier batches."""
        import torch

        import stemma
        from stemma.decode.generate import Config as Sharing
        from stemma.train.seeds import stream_seed

        config = self.config
        torch.manual_seed(stream_seed(config.seed, "batch", number) if number else config.seed)
        sampling: dict[str, Any] = {"do_sample": config.temperature > 0}
        if config.temperature > 0:
            sampling |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        result = stemma.generate(
            self.model,
            self.tokenizer,
            self.rows[batch.start : batch.stop],
            max_new_tokens=config.max_new_tokens,
            prefix=self.prefix,
            sharing=Sharing(share=config.share, max_tokens=config.max_tokens),
            num_return_sequences=config.num_return_sequences,
            num_beams=config.num_beams,
            **sampling,
            **({"stop_strings": list(config.stop_strings)} if config.stop_strings else {}),
        )
        lines = [
            {"prompt": batch[place], "sample": sample, "token_ids": ids}
            | ({} if result.texts is None else {"text": result.texts[place][sample]})
            for place, group in enumerate(result.token_ids)
            for sample, ids in enumerate(group)
        ]
        return lines, result.report

    def saved(self, report: "SharingReport | None") -> dict[str, Any] | None:
        """What the prefix saved against encoding it in each row."""
        if self.prefix is None or report is None:
            return None
        assert self.config.prefix is not None
        encoded = not self.config.prefix.is_dir()
        return {
            "tokens": self.prefix.length,
            "encoded": encoded,
            "saved_tokens": (report.rows - encoded) * self.prefix.length,
        }


def read_prompts(path: Path) -> "dict[int, Prompt]":
    """The prompts of a file by their line numbers, each a text, chat messages or token ids.

    Raises:
        InvalidDataError: the file cannot be read or is empty, or a line holds not exactly one prompt; names the line.
    """
    prompts: dict[int, Prompt] = {}
    for number, record in read_jsonl(path):
        given = [name for name in ("prompt", "messages", "prompt_ids") if name in record]
        if len(given) != 1:
            raise InvalidDataError(
                f"{path}, line {number}: expected one of prompt, messages and prompt_ids, found {given or 'none'}"
            )
        if given == ["prompt"]:
            prompts[number] = text_field(path, number, record, "prompt")
            continue
        value = record[given[0]]
        kind = dict if given == ["messages"] else int
        if not isinstance(value, list) or not value or not all(type(item) is kind for item in value):
            wanted = "messages (objects with role and content)" if given == ["messages"] else "integer token ids"
            raise InvalidDataError(f"{path}, line {number}: field '{given[0]}' must be a list of {wanted}")
        prompts[number] = value
    return prompts


def _prefix_text(config: Config, prompts: "Sequence[Prompt]") -> str | None:
    """The text of --prefix; None without one, or where it is the folder of an encoded one."""
    if config.prefix is None:
        return None
    if config.prefix.is_dir():
        if any(isinstance(prompt[0], Mapping) for prompt in prompts):
            raise InvalidDataError(
                "--prefix stands in front of texts or token ids; give prompts without messages with it."
            )
        return None
    try:
        text = config.prefix.read_text(encoding="utf-8-sig")  # without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDataError(f"{config.prefix} cannot be read: {error}") from error
    if any(not isinstance(prompt, str) for prompt in prompts):
        raise InvalidDataError(
            "--prefix is a text, so the prompts behind it have to be texts too ('prompt'). Messages and token ids that "
            "begin alike share their beginning without it."
        )
    return text


def _check_save_prefix(config: Config) -> None:
    folder = config.save_prefix
    if folder is None:
        return
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not config.resume)):
        raise InvalidDataError(
            f"'{folder}' exists; read it with --prefix if it is an encoded prefix, or choose another --save-prefix"
        )
    above = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InvalidDataError(f"cannot write '{folder}': '{above}' cannot be written; choose another --save-prefix")


def _settings(config: Config) -> dict[str, Any]:
    """What decides the lines; a resumed generation must have the same."""
    from stemma.models.loading import model_digest

    def digest(path: Path) -> str:
        return "sha256 " + hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()[:16]

    apart = ("prompts", "prefix", "save_prefix", "output", "resume", "stop_strings", "report")
    values = {name: value for name, value in vars(config).items() if name not in apart}
    values |= {"stop_strings": list(config.stop_strings), "prompts": digest(config.prompts), "prefix": None}
    values["the digest of the model's files"] = model_digest(config.model)
    if config.prefix is not None:
        values["prefix"] = digest(config.prefix / "prefix.json" if config.prefix.is_dir() else config.prefix)
    return values


def _interrupted(config: Config, number: int, prompts: int) -> dict[str, Any]:
    words = ["stemma", "generate", config.model, "--resume"]
    for field in dataclasses.fields(Config):
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if field.name in ("model", "resume") or value == field.default:
            continue
        if isinstance(value, bool):
            words += [flag]
        elif isinstance(value, tuple):
            words += [flag, *value]
        else:
            words += [f"{flag}={value}"]
    command = shlex.join(words)
    print(
        f"stopped by {signal.Signals(number).name} before all {prompts} prompts. Go on with: {command}", file=sys.stderr
    )
    return {"status": "interrupted", "resume_with": command, "exit_status": 128 + number}


def _is_ids(prompt: "Prompt") -> bool:
    return not isinstance(prompt, str) and isinstance(prompt[0], int)


def _tokenizer(reference: str, needed: bool) -> Any:
    """The model's tokenizer; None where there is none and none is needed."""
    from stemma.models.loading import load_tokenizer

    try:
        return load_tokenizer(reference)
    except UnsupportedModelError:
        if needed:
            raise
        return None
