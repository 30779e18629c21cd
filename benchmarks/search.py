"""Search: quality on classic collections, and what 100,000 abstracts cost.

    STEMMA_DATA=FOLDER python benchmarks/search.py collections --encoder FOLDER [--sparse-encoder FOLDER]
    STEMMA_DATA=FOLDER python benchmarks/search.py speed [--encoder FOLDER]

writes `results/search.jsonl`; `--folder` keeps the corpora and their indexes, so that an interrupted run goes on. The
collections are those of `ir_collections.py`. The abstracts are sentences of `daily_papers/daily_papers.jsonl.gz`
(2404589803/hf-daily-paper-newsletter-chinese) put together anew; their vectors are random, which exact search takes as
long for. Times are of the CPU, on one thread. Needs the extra `search`.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import os
import random
import resource
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks import ir_collections as collections  # noqa: E402
from benchmarks.rows import RESULTS, Recorder  # noqa: E402
from stemma.search import Corpus, Dense, Fused, Index, Lexical, Sparse, compare, evaluate  # noqa: E402
from stemma.search.encoded import load_encoder  # noqa: E402
from stemma.search.metrics import Evaluation  # noqa: E402

MEASURES = ("AP", "nDCG@10", "R@100")
OURS = "both"
TEXTS = 100_000
QUERIES = 100
DIM = 384


class CachedQueries:
    """An encoder that encodes a query once for all the methods that ask for it."""

    def __init__(self, model: Any) -> None:
        self.encode_document = model.encode_document
        self.encode_query = lambda texts: self._cached(texts[0])
        self._cached = functools.cache(lambda text: model.encode_query([text]))


def indexes(corpus: Corpus, encoder: Any, sparse_encoder: str | None) -> dict[str, Index]:
    """What is compared, by the name of its row."""
    lexical = Lexical(corpus)
    found: dict[str, Index] = {"fts5": lexical, "bm25s": Lexical(corpus, engine="bm25s")}
    if sparse_encoder:
        found["sparse"] = Sparse(corpus, sparse_encoder)
    if encoder is not None:
        dense = Dense(corpus, encoder)
        found |= {
            "dense": dense,
            "rrf": Fused(lexical, dense, weights="rrf"),
            "linear": Fused(lexical, dense),
            "feedback alone": Fused(dense, feedback="after"),
            "before": Fused(lexical, dense, feedback="before"),
            "after": Fused(lexical, dense, feedback="after"),
            OURS: Fused(lexical, dense, feedback="both"),
        }
    return found


def measure_collections(recorder: Recorder, names: list[str], folder: Path, encoder: str, sparse_encoder: str) -> None:
    """Quality by collection; of several also over all queries, with the p-values of one method against the others."""
    data = collections.folder()
    assert data is not None, "set STEMMA_DATA to the folder that holds ir/"
    cached = CachedQueries(load_encoder(encoder, "SentenceTransformer")) if encoder else None
    pooled: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        collection = collections.load(name, data)
        corpus = Corpus.open(folder / f"{name}.sqlite")
        corpus.add({"id": document, "text": text} for document, text in collection.texts.items())
        shapes = {"texts": len(collection.texts), "queries": len(collection.queries)}
        for method, index in indexes(corpus, cached, sparse_encoder).items():
            found = evaluate(collection.qrels, index.run(collection.queries), MEASURES)
            record(recorder, name, method, found, shapes)
            for measure, values in found.values.items():
                own = {f"{name} {query}": value for query, value in values.items()}
                pooled.setdefault(method, {}).setdefault(measure, {}).update(own)
    if len(names) == 1:
        return
    everything = {method: Evaluation(values, (), ()) for method, values in pooled.items()}
    shapes = {"collections": names, "queries": len(next(iter(pooled.values()))["AP"])}
    for method, found in everything.items():
        record(recorder, "pooled", method, found, shapes)
        if OURS in everything and method != OURS:
            for measure in MEASURES:
                test = compare(everything[OURS], found, measure)
                row = {"workload": "pooled", "method": OURS, "metric": f"{measure} p", "unit": "p", "shapes": shapes}
                recorder.add("search", **row, value=test.p, baseline=method, baseline_value=found.means[measure])


def record(recorder: Recorder, workload: str, method: str, found: Evaluation, shapes: dict[str, Any]) -> None:
    """One row for each measure."""
    for measure, value in found.means.items():
        row = {"workload": workload, "method": method, "metric": measure, "unit": "mean over queries"}
        recorder.add("search", **row, value=value, repeats=1, shapes=shapes)
    print(
        f"{workload:10} {method:15} " + "  ".join(f"{name} {value:.4f}" for name, value in found.means.items()),
        flush=True,
    )


def abstracts(data: Path) -> Iterator[dict[str, str]]:
    """Made-up abstracts of six real sentences each."""
    with gzip.open(data / "daily_papers" / "daily_papers.jsonl.gz", "rt", encoding="utf-8") as file:
        sentences = [sentence for line in file for sentence in json.loads(line)["abstract"].split(". ")]
    generator = random.Random(0)
    for number in range(TEXTS):
        yield {"id": str(number), "text": ". ".join(generator.choices(sentences, k=6))}


def random_vectors(texts: list[str]) -> np.ndarray:
    """A vector for each text, the same whenever it is asked for."""
    made = [np.random.default_rng(zlib.crc32(text.encode())).standard_normal(DIM, np.float32) for text in texts]
    return np.stack(made)


def measure_speed(recorder: Recorder, folder: Path, encoder: str | None) -> None:
    """Building and asking, 100,000 abstracts."""
    shapes = {"texts": TEXTS, "dim": DIM, "queries": QUERIES}

    def build(method: str, make: Callable[[], Any], path: Path) -> Any:
        started = time.process_time()
        made = make()
        seconds = time.process_time() - started
        files = [each for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file()]
        row = {"workload": "100k", "method": method, "shapes": shapes}
        recorder.add("search", **row, metric="build", unit="CPU s", value=seconds)
        recorder.add("search", **row, metric="disk", unit="bytes", value=sum(each.stat().st_size for each in files))
        print(f"{method:20} built in {seconds:.1f} CPU s", flush=True)
        return made

    path = folder / "100k.sqlite"
    corpus = Corpus.open(path)
    data = Path(os.environ["STEMMA_DATA"])
    build("fts5", lambda: corpus.add(abstracts(data)), path)
    bm25s = Lexical(corpus, engine="bm25s")
    build("bm25s", lambda: bm25s.ranked("model", 1), folder / "100k.sqlite.bm25s")
    dense = build("dense", lambda: Dense(corpus, random_vectors), folder / "100k.sqlite.dense")
    flat = Dense(corpus, random_vectors, faiss="Flat")
    generator = random.Random(1)
    texts = list(corpus)
    words = [generator.choice(texts).text.split() for _ in range(QUERIES)]
    queries = [" ".join(each[begin : begin + 7]) for each in words for begin in [generator.randrange(len(each) // 2)]]
    asked = {
        "fts5": Lexical(corpus),
        "bm25s": bm25s,
        "dense": dense,
        "dense, faiss Flat": flat,
        "both, fts5": Fused(Lexical(corpus), dense, feedback="both"),
        "both, bm25s": Fused(bm25s, dense, feedback="both"),
        "both, bm25s, faiss Flat": Fused(bm25s, flat, feedback="both"),
    }
    for method, index in asked.items():
        ask(recorder, method, lambda query, index=index: index.search(query, k=20), queries, shapes)
    if encoder:
        from sentence_transformers import SentenceTransformer

        ask(recorder, "encode the query", SentenceTransformer(encoder, device="cpu").encode_query, queries, shapes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    recorder.add("search", workload="100k", method="all", metric="peak memory", unit="bytes", value=peak, shapes=shapes)


def ask(
    recorder: Recorder, method: str, search: Callable[[str], Any], queries: list[str], shapes: dict[str, Any]
) -> None:
    """Time every query once, after one that warms up."""
    search(queries[0])
    took = []
    for query in queries:
        started = time.process_time()
        search(query)
        took.append(1000 * (time.process_time() - started))
    took.sort()
    row = {"workload": "100k", "method": method, "unit": "CPU ms", "repeats": len(took), "shapes": shapes}
    spread = (took[0], took[-1])
    recorder.add("search", **row, metric="median", value=statistics.median(took), spread=spread)
    recorder.add("search", **row, metric="p95", value=took[int(0.95 * len(took))], spread=spread)
    print(f"{method:25} median {statistics.median(took):.1f} ms, p95 {took[int(0.95 * len(took))]:.1f} ms", flush=True)


def main() -> None:
    """Measure one part and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("collections", "speed"))
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "search", help="corpora and indexes")
    parser.add_argument("--encoder", help="folder of a sentence-transformers model")
    parser.add_argument("--sparse-encoder", help="folder of a sparse encoder")
    parser.add_argument("--names", default=",".join(collections.NAMES), help="collections to measure")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(threads=1)
    if given.part == "collections":
        measure_collections(recorder, given.names.split(","), given.folder, given.encoder, given.sparse_encoder)
    else:
        measure_speed(recorder, given.folder, given.encoder)
    recorder.save(RESULTS)


if __name__ == "__main__":
    main()
