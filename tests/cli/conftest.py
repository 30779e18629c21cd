"""What tests of several commands need."""

import pytest

from stemma.models.tiny import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tiny_model(seed=4).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path
