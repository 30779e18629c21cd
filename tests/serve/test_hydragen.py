"""The page of the paper stands over `stemma.generate`; its tests are those of `tests/decode/test_generate.py`."""

import stemma
from stemma.serve import hydragen


def test_the_page_is_over_the_public_function():
    assert hydragen.generate is stemma.generate
    assert "arXiv 2402.05099" in hydragen.__doc__
