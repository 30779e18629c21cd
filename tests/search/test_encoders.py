"""Encoders of sentence-transformers: from a folder, with prompts, dense and sparse; no pickle is loaded."""

import shutil

import numpy as np
import pytest

from search.letters import corpus_of, made_up
from stemma.errors import InvalidDataError
from stemma.search import Dense, Reranked, Sparse

sentence_transformers = pytest.importorskip("sentence_transformers")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A BERT of random weights with a head for masked words, and a tokenizer of letters."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"bcdfghkm", *(f"##{letter}" for letter in "bcdfghkm")]
    (folder / "vocab.txt").write_text("\n".join(tokens))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=len(tokens), initializer_range=0.5, **sizes)).eval().save_pretrained(folder)
    return folder


def test_a_folder_is_a_dense_encoder(backbone, tmp_path):
    from sentence_transformers.sentence_transformer import modules

    model = sentence_transformers.SentenceTransformer(
        modules=[modules.Transformer(str(backbone)), modules.Pooling(16)], prompts={"query": "b b ", "document": ""}
    )
    model.save(str(tmp_path / "encoder"))
    corpus = corpus_of(tmp_path / "c.sqlite", made_up(40))
    index = Dense(corpus, str(tmp_path / "encoder"))
    vectors = model.encode_document([document.text for document in corpus], normalize_embeddings=True)
    expected = vectors @ model.encode_query("m k", normalize_embeddings=True)
    assert index.ranked("m k", 40) == pytest.approx(dict(zip((d.id for d in corpus), expected.tolist())), abs=1e-5)
    assert not np.allclose(model.encode("m k"), model.encode_query("m k"))


def test_a_folder_without_safe_weights_is_refused(backbone, tmp_path):
    shutil.copytree(backbone, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    for folder in ("pickled", "none"):
        with pytest.raises(InvalidDataError, match=f"cannot load the encoder '.*{folder}'"):
            Dense(corpus_of(tmp_path / "c.sqlite", []), tmp_path / folder)


def test_a_sparse_encoder_names_its_terms(backbone, tmp_path):
    model = sentence_transformers.SparseEncoder(str(backbone))
    corpus = corpus_of(tmp_path / "c.sqlite", made_up(40))
    index = Sparse(corpus, str(backbone))
    vectors = model.encode_document([document.text for document in corpus]).to_dense().numpy()
    expected = vectors @ model.encode_query(["m k"]).to_dense().numpy()[0]
    assert index.ranked("m k", 40) == pytest.approx(dict(zip((d.id for d in corpus), expected.tolist())), rel=1e-4)
    (hit,) = index.search("m k", 1)
    (row,) = [row for row, document in enumerate(corpus) if document.id == hit.id]
    largest = int((vectors[row] * model.encode_query(["m k"]).to_dense().numpy()[0]).argmax())
    assert hit.matched[0] == model.tokenizer.convert_ids_to_tokens(largest)


def test_a_cross_encoder_orders_hits_anew(backbone, tmp_path):
    model = sentence_transformers.CrossEncoder(str(backbone), num_labels=1)
    corpus = corpus_of(tmp_path / "c.sqlite", made_up(10))
    index = Dense(corpus, lambda texts: [[float(len(text))] for text in texts])
    found = Reranked(index, model, depth=10).ranked("m k", 10)
    expected = model.predict([("m k", document.text) for document in corpus])
    assert found == pytest.approx(dict(zip((d.id for d in corpus), expected.tolist())), abs=1e-5)
