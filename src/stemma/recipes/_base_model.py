"""The small language model that reproductions need where a random one would not do: trained here, on text that comes
with Python, in a few minutes, once.

It is a byte-level Llama that has read the sources of the standard library. A reproduction gets the model, its tokenizer
and rows of token ids of files that the model has never seen:

- `base.rows("test", ...)` to evaluate;
- `base.rows("validation", ...)` to choose, profile or calibrate;
- `base.rows("train", ...)` to go on training;
- `stemma.data.python_text.reference_texts(...)`: prose of another kind, of which no split was trained on.

What it can do: 2.2 to 2.4 bits per byte on unseen sources, at every position up to 2,048. It knows spelling and syntax,
and looks hardly further back than 32 bytes (a context of 1,024 saves 0.04 bits per byte over one of 32); it does not
copy from its context. There is context to be stored, moved and dropped, but losing it costs this model little: say so
where a result rests on it.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stemma.data.python_text import Split, reference_texts, source_texts
from stemma.errors import InvalidDataError
from stemma.models.loading import load_model, load_tokenizer
from stemma.models.tiny import byte_tokenizer, tiny_model
from stemma.recipes._runs import Options, fingerprint, kept_folder
from stemma.train import sft
from stemma.train.checkpoint import save_model
from stemma.train.fit import run_steps
from stemma.train.pretrained import without_progress_bars
from stemma.train.seeds import stream

__all__ = ["BaseModel", "Config", "GivenModel", "python_base", "text_rows"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The model and its training."""

    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 256
    max_position_embeddings: int = 4096
    stages: tuple[tuple[int, int, int], ...] = ((128, 16, 600), (512, 4, 350), (2048, 1, 250))
    """(bytes per row, rows per step, steps): short rows teach most per second, long ones the use of far context."""
    learning_rate: float = 3e-3
    """Peak of the cosine schedule that runs over all stages."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages or min(min(stage) for stage in self.stages) < 1:
            raise ValueError(f"stages must be one or more triples of positive numbers; got {self.stages}")
        longest = max(length for length, _, _ in self.stages)
        if longest > self.max_position_embeddings:
            raise ValueError(
                f"stages have rows of {longest} bytes, but max_position_embeddings is {self.max_position_embeddings}"
            )

    def make(self) -> Any:
        """The model before any training."""
        tokenizer = byte_tokenizer()
        return tiny_model(
            "llama",
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
            tie_word_embeddings=True,
            initializer_range=0.64 * self.hidden_size**-0.5,  # with the usual 0.02 it needs twice the tokens
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            seed=self.seed,
        )


QUICK = Config(hidden_size=32, num_hidden_layers=2, intermediate_size=64, stages=((128, 4, 4), (256, 1, 1)))


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The trained model and what belongs to it."""

    model: Any
    """A `LlamaForCausalLM` in float32 on the CPU, in evaluation mode; a new object from every call of `python_base`."""
    tokenizer: Any
    """One token per byte, see `stemma.models.tiny.byte_tokenizer`."""
    folder: Path
    """Where both are, for `from_pretrained`."""
    seconds: float
    """What training took, or 0 when the model was found."""
    unit = "byte"
    """What a token is."""

    @property
    def about(self) -> str:
        """The model, in words."""
        return f"byte-level Llama of {self.parameters:,} parameters trained on library sources"

    @property
    def parameters(self) -> int:
        """Parameters of the model, the shared embedding counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def rows(self, split: Split, count: int, length: int, *, seed: int = 0) -> Tensor:
        """Rows of library source text; see `text_rows`."""
        return text_rows(source_texts(split), count, length, seed=seed)

    @torch.no_grad()
    def bits_per_byte(self, ids: Tensor) -> Tensor:
        """Bits that each byte costs after those before it in its row.

        Args:
            ids: (rows, length) int64.

        Returns:
            (rows, length - 1) float32.
        """
        costs = []
        for row in ids.split(1):
            logits = self.model(input_ids=row, use_cache=False).logits[0, :-1].float()
            costs.append(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none") / math.log(2))
        return torch.stack(costs)


def python_base(options: Options) -> BaseModel:
    """The base model from `options.cache_dir`; trained and written there first where it is missing.

    The folder's name depends on the settings and on every byte of the training text, so another Python version gets a
    model of its own. Training takes some minutes of one core, with `options.quick` a second.

    Raises:
        InvalidDataError: this Python comes without the sources of its library.
    """
    config, started = QUICK if options.quick else Config(), time.perf_counter()
    corpus = _joined(source_texts("train"))
    name = f"python-base-{fingerprint({**asdict(config), 'text': fingerprint({'text': corpus.hex()})})}"
    trained: list[float] = []

    def make(folder: Path) -> None:
        model = _train(config, corpus, lambda line: print(line, file=sys.stderr, flush=True))
        save_model(folder, model=model, processing_class=byte_tokenizer())
        trained.append(time.perf_counter() - started)

    folder = kept_folder(options.cache_dir / name, make)
    with without_progress_bars():  # runs have lines of their own
        model = load_model(str(folder), device="cpu")
    return BaseModel(model=model, tokenizer=byte_tokenizer(), folder=folder, seconds=sum(trained))


@dataclass(frozen=True, kw_only=True)
class GivenModel:
    """A pretrained model in place of the base model, with prose of the language reference for text."""

    model: Any
    """A causal language model in float32 on the CPU, in evaluation mode."""
    tokenizer: Any
    folder: Path
    """Folder or hub id; results are kept under its last part."""
    unit = "token"

    @classmethod
    def load(cls, reference: str) -> "GivenModel":
        """The model and its tokenizer.

        Args:
            reference: a model folder or a hub id.

        Raises:
            UnsupportedModelError: no causal language model with a tokenizer is there.
        """
        tokenizer = load_tokenizer(reference)
        return cls(model=load_model(reference, device="cpu"), tokenizer=tokenizer, folder=Path(reference).resolve())

    @property
    def about(self) -> str:
        """The model, in words."""
        return f"{self.folder.name}, {self.parameters:,} parameters, float32"

    @property
    def parameters(self) -> int:
        """Parameters of the model, the shared embedding counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def rows(self, split: Split, count: int, length: int, *, seed: int = 0) -> Tensor:
        """Rows of consecutive tokens of topics of the language reference, none of which overlap.

        Returns:
            (count, length) int64.

        Raises:
            InvalidDataError: the texts do not hold so many rows.
        """
        pieces = []
        for text in reference_texts(split).values():
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            pieces += [ids[begin : begin + length] for begin in range(0, len(ids) - length + 1, length)]
        if len(pieces) < count:
            raise InvalidDataError(f"the texts hold {len(pieces)} rows of {length} tokens, not {count}")
        order = torch.randperm(len(pieces), generator=stream(seed, "text rows"))[:count]
        return torch.tensor(pieces)[order]


def text_rows(texts: Mapping[str, str], count: int, length: int, *, seed: int = 0) -> Tensor:
    """Rows of consecutive bytes from texts: every row from one text and from the beginning of a line of it.

    The texts are shuffled; each that is long enough gives a row before any gives its second, and the rows of one text
    do not overlap. The first rows of a larger `count` are those of a smaller one.

    Returns:
        (count, length) int64.

    Raises:
        InvalidDataError: the texts do not hold so many rows.
    """
    pieces = {name: _pieces(text.encode(), length) for name, text in texts.items()}
    order = [sorted(pieces)[i] for i in torch.randperm(len(pieces), generator=stream(seed, "text rows")).tolist()]
    deepest = max(map(len, pieces.values()), default=0)
    found = [pieces[name][depth] for depth in range(deepest) for name in order if depth < len(pieces[name])]
    if len(found) < count:
        raise InvalidDataError(
            f"{len(texts)} texts hold {len(found)} rows of {length} bytes, not {count}; ask for fewer or shorter rows"
        )
    return torch.tensor([list(piece) for piece in found[:count]])


def _pieces(text: bytes, length: int) -> list[bytes]:
    """Disjoint pieces of a text, each from the beginning of a line."""
    found, begin = [], 0
    while begin + length <= len(text):
        found.append(text[begin : begin + length])
        begin = text.find(b"\n", begin + length - 1) + 1 or len(text)
    return found


def _joined(texts: Mapping[str, str]) -> bytes:
    """All texts behind each other, a zero byte before each."""
    return b"".join(b"\x00" + text.encode() for text in texts.values())


def _train(config: Config, corpus: bytes, say: Callable[[str], None]) -> Any:
    text = torch.frombuffer(bytearray(corpus), dtype=torch.uint8)
    plan = [(length, rows) for length, rows, steps in config.stages for _ in range(steps)]

    def batches(step: int) -> dict[str, Tensor]:
        length, rows = plan[step]
        begins = torch.randint(0, len(text) - length, (rows,), generator=stream(config.seed, "python base", step))
        ids = torch.stack([text[begin : begin + length] for begin in begins.tolist()]).long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    model = config.make()
    options = sft.Config(max_steps=len(plan), learning_rate=config.learning_rate, warmup_steps=min(30, len(plan) // 2))
    trainer = sft.Trainer(model, options, batches=batches)
    size = sum(parameter.numel() for parameter in model.parameters())
    say(f"base model: {size:,} parameters, {len(corpus) / 1e6:.1f} MB of library sources, {len(plan)} steps")
    recent: list[float] = []

    def tell(metrics: Mapping[str, float]) -> None:
        step = trainer.completed_steps
        recent.append(metrics["loss"] / math.log(2))
        if step % 50 == 0 or step == len(plan):
            length, mean = plan[step - 1][0], sum(recent) / len(recent)
            say(f"base model: step {step}, rows of {length} bytes, {mean:.3f} bits per byte")
            recent.clear()

    run_steps(trainer, on_step=tell)
    return model
