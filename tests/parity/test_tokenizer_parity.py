"""DeepSeek's own tokenizer through dsv3 and through transformers: the same ids for all of the real corpora."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")

from dsv3.data import encode_documents, load_tokenizer, read_corpus, special_ids  # noqa: E402
from dsv3.data.tokenizer import PAD  # noqa: E402
from tests.real_data import DATA  # noqa: E402

REAL = DATA / "deepseek_v3_tokenizer"
CORPORA = ["corpus/thealgorithms_python.jsonl", "corpus/rust_book.jsonl", "corpus/moby_dick.jsonl", "tinyshakespeare"]

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not REAL.is_dir(), reason="DeepSeek's tokenizer is not here (DSV3_DATA)"),
]


@pytest.fixture(scope="module")
def ours():
    return load_tokenizer(REAL)


def test_special_tokens_agree(ours, theirs):
    bos, eos, pad = special_ids(ours)
    assert (bos, eos) == (theirs.bos_token_id, theirs.eos_token_id)
    assert theirs.pad_token_id == eos and theirs.convert_ids_to_tokens(pad) == PAD  # its config pads with eos
    assert ours.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize("name", CORPORA)
def test_ids_agree_on_real_text(ours, theirs, name, table):
    """Every document of a corpus, encoded as the shards are, less its bos and eos, and decoded again."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here (DSV3_DATA)")
    documents = list(read_corpus(path))
    stream = encode_documents(ours, documents)
    want = theirs([document.text for document in documents], add_special_tokens=False).input_ids
    bos, eos, _ = special_ids(ours)
    different = 0
    for document, first, stop, ids in zip(documents, stream.starts[:-1], stream.starts[1:], want, strict=True):
        got = stream.tokens[first:stop].tolist()
        different += got != [bos, *ids, eos]
        if len(document.text) < 20_000:
            assert theirs.decode(ids, clean_up_tokenization_spaces=False) == document.text
    table.check(name.split("/")[-1], "documents with other ids than AutoTokenizer's", different, 0)
