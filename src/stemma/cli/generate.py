"""Generate from prompts that share prefixes, each shared run encoded, kept and read once.

--prompts is a JSONL file, one prompt on each line: {"prompt": "text"}, {"messages": [{"role": "user", "content":
"..."}]} for the tokenizer's chat template, or {"prompt_ids": [5, 9, 2]}. The tokens are those that transformers'
generate gives; only the time and memory differ. A line of --output is {"prompt": 0, "sample": 0, "text": "...",
"token_ids": [4, 7]}.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from stemma.serve.hydragen import Prompt

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
    """Folder for the encoded --prefix, which this model then reads instead of encoding it again."""
    output: Path | None = None
    """JSONL file of the generations; standard output when not given."""
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
        for name in ("max_new_tokens", "num_return_sequences", "num_beams", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
        if self.save_prefix is not None and self.prefix is None:
            raise ValueError("--save-prefix keeps the encoded --prefix; give one.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must be 0 or a positive number, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must lie in (0, 1], got {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"--top-k must be 0 or positive, got {self.top_k}.")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("--num-beams above 1 searches and --temperature above 0 samples; choose one.")
        if self.temperature == 0 and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"--num-return-sequences {self.num_return_sequences} without sampling gives the same sequence again; "
                "set --temperature, or as many --num-beams."
            )


def main(config: Config) -> dict[str, Any]:
    """Generate, write the lines and return them with the report."""
    import dataclasses
    import json
    import os
    import sys

    import torch

    import stemma
    from stemma.errors import InvalidDataError
    from stemma.models.loading import load_model
    from stemma.serve.hydragen import Config as Sharing

    prompts = read_prompts(config.prompts)
    prefix_text, encoded = None, config.prefix is not None and config.prefix.is_dir()
    if encoded and any(isinstance(prompt[0], Mapping) for prompt in prompts):
        raise InvalidDataError("--prefix stands in front of texts or token ids; give prompts without messages with it.")
    if config.prefix is not None and not encoded:
        try:
            prefix_text = config.prefix.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidDataError(f"{config.prefix} cannot be read: {error}") from error
        if any(not isinstance(prompt, str) for prompt in prompts):
            raise InvalidDataError("--prefix is a text in front of texts; give prompts as text with it.")
    model = load_model(config.model, dtype=config.dtype, device=config.device)
    tokenizer = _tokenizer(config.model, needed=any(not _is_ids(prompt) for prompt in prompts))
    handle = None
    if config.prefix is not None:
        stemma.enable(model)
        if encoded:
            handle = stemma.SharedPrefix.from_pretrained(model, config.prefix)
        else:
            assert tokenizer is not None
            ids = tokenizer(prefix_text)["input_ids"]
            handle = stemma.SharedPrefix.from_ids(model, ids, max_tokens=config.max_tokens)
        if config.save_prefix is not None:
            handle.save_pretrained(config.save_prefix)
    torch.manual_seed(config.seed)
    sampling: dict[str, Any] = {"do_sample": config.temperature > 0}
    if config.temperature > 0:
        sampling |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    result = stemma.generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=config.max_new_tokens,
        prefix=handle,
        sharing=Sharing(share=config.share, max_tokens=config.max_tokens),
        num_return_sequences=config.num_return_sequences,
        num_beams=config.num_beams,
        **sampling,
        **({"stop_strings": list(config.stop_strings)} if config.stop_strings else {}),
    )
    lines = [
        {"prompt": number, "sample": sample, "token_ids": ids}
        | ({} if result.texts is None else {"text": result.texts[number][sample]})
        for number, group in enumerate(result.token_ids)
        for sample, ids in enumerate(group)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    if config.output is None:
        print(text, end="")
    else:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        temporary = config.output.with_name(f".{config.output.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, config.output)
    if config.report:
        print(result.report or "nothing was shared (--share never)", file=sys.stderr)
    return {
        "model": config.model,
        "generations": lines,
        "report": None if result.report is None else dataclasses.asdict(result.report),
    }


def read_prompts(path: Path) -> "list[Prompt]":
    """The prompts of a file, each a text, chat messages or token ids.

    Raises:
        InvalidDataError: the file cannot be read or is empty, or a line holds not exactly one prompt; names the line.
    """
    from stemma.data.records import read_jsonl, text_field
    from stemma.errors import InvalidDataError

    prompts: list[Prompt] = []
    for number, record in read_jsonl(path):
        given = [name for name in ("prompt", "messages", "prompt_ids") if name in record]
        if len(given) != 1:
            raise InvalidDataError(
                f"{path}, line {number}: expected one of prompt, messages and prompt_ids, found {given or 'none'}"
            )
        if given == ["prompt"]:
            prompts.append(text_field(path, number, record, "prompt"))
            continue
        value = record[given[0]]
        kind = Mapping if given == ["messages"] else int
        if not isinstance(value, list) or not value or not all(isinstance(item, kind) for item in value):
            wanted = "messages (objects with role and content)" if given == ["messages"] else "integer token ids"
            raise InvalidDataError(f"{path}, line {number}: field '{given[0]}' must be a list of {wanted}")
        prompts.append(value)
    return prompts


def _is_ids(prompt: "Prompt") -> bool:
    return not isinstance(prompt, str) and isinstance(prompt[0], int)


def _tokenizer(reference: str, needed: bool) -> Any:
    """The model's tokenizer; None where there is none and none is needed."""
    from transformers import AutoTokenizer

    from stemma.errors import InvalidDataError

    try:
        return AutoTokenizer.from_pretrained(reference)
    except Exception as error:  # transformers raises many kinds here
        if not needed:
            return None
        first = str(error).strip().partition("\n")[0]
        raise InvalidDataError(
            f"'{reference}' has no tokenizer that can be loaded ({first}); give prompts as prompt_ids."
        ) from error
