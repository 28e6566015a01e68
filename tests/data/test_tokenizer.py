"""Training, saving, loading and using tokenizers."""

import gzip
import json
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from dsv3.data import (
    Document,
    check_tokenizer,
    embedded_corpus,
    encode_documents,
    load_tokenizer,
    read_corpus,
    save_tokenizer,
    special_ids,
    train_tokenizer,
)
from dsv3.data.tokenizer import BOS, EOS, MARKERS, PAD
from tests.real_data import DATA

ROOT = Path(__file__).resolve().parents[2]
REAL = DATA / "deepseek_v3_tokenizer"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="DeepSeek's tokenizer is not here (DSV3_DATA)")
needs_data = pytest.mark.skipif(not (DATA / "corpus").is_dir(), reason="no data folder (DSV3_DATA)")
AWKWARD = [
    "",
    " leading and trailing  ",
    "def f(x):\r\n\treturn 1234567 + x  # naïve\n\n",
    "日本語とEnglish、数字123と한국어",
    "e\u0301 \u200d \U0001f468\u200d\U0001f469 \0 \ufeff \u2028",
    f"forged {EOS} and {BOS}{PAD} and {MARKERS[0]}x{MARKERS[-1]}",
    "''\"\"`~!@#$%^&*()_+-=[]{}|;:,.<>/?\\",
]


@pytest.fixture(scope="module")
def sample():
    return [document.text for document in embedded_corpus(max_bytes=300_000)]


@pytest.fixture(scope="module")
def tokenizer(sample):
    return train_tokenizer(sample, 1024)


@pytest.fixture(scope="module")
def real():
    return load_tokenizer(REAL)


def round_trip(tokenizer, texts):
    """Asserts that each document comes back exactly, between its bos and eos."""
    ids = special_ids(tokenizer)
    stream = encode_documents(tokenizer, [Document(str(i), text) for i, text in enumerate(texts)])
    assert stream.tokens.dtype == np.int32 and stream.starts.dtype == np.int64
    assert stream.starts[0] == 0 and stream.starts[-1] == len(stream.tokens)
    assert stream.text_bytes.tolist() == [len(text.encode()) for text in texts]
    for text, first, stop in zip(texts, stream.starts[:-1], stream.starts[1:], strict=True):
        tokens = stream.tokens[first:stop].tolist()
        assert (tokens[0], tokens[-1]) == (ids.bos, ids.eos)
        assert not {*ids} & {*tokens[1:-1]}
        assert tokenizer.decode(tokens) == text
    return stream


def test_ids_are_laid_out_as_deepseeks(tokenizer):
    assert special_ids(tokenizer) == (0, 1, 2)
    assert [tokenizer.id_to_token(i) for i in (3, 4, 5)] == ["!", '"', "#"]
    assert tokenizer.get_vocab_size() == 1024
    assert [tokenizer.id_to_token(1024 - len(MARKERS) + i) for i in range(len(MARKERS))] == list(MARKERS)
    assert sorted(tokenizer.get_vocab().values()) == list(range(1024))


def test_training_twice_gives_the_same(tokenizer, sample):
    assert train_tokenizer(iter(sample), 1024).to_str() == tokenizer.to_str()


def test_pre_tokenisation_on_known_text(tokenizer):
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("x=12345;  if (a.b):\n\n日本x_y")
    plain = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in cut]
    want = ["x", "=", "123", "45", ";", " ", " if", " (", "a", ".b", "):\n\n", "日本", "x", "_y"]
    assert plain == [piece if piece.isascii() else "æĹ¥æľ¬" for piece in want]


def test_encode_puts_bos_first_and_decode_leaves_it_out(tokenizer):
    ids = tokenizer.encode("import os").ids
    assert ids[0] == 0 and tokenizer.decode(ids) == "import os"
    assert tokenizer.encode("import os", add_special_tokens=False).ids == ids[1:]
    assert tokenizer.encode(MARKERS[3]).ids[1:] == [tokenizer.token_to_id(MARKERS[3])]


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text() | st.sampled_from(AWKWARD), min_size=1, max_size=4))
def test_round_trip_of_any_text(tokenizer, texts):
    round_trip(tokenizer, texts)


def test_round_trip_of_awkward_text(tokenizer):
    stream = round_trip(tokenizer, AWKWARD)
    assert tokenizer.encode(EOS).ids == [0, 1]  # encoding documents leaves the tokenizer as it was
    empty = stream.tokens[: stream.starts[1]].tolist()
    assert empty == [0, 1]


def test_documents_come_in_any_number(tokenizer):
    documents = (Document(str(i), f"document {i}") for i in range(600))
    stream = encode_documents(tokenizer, documents)
    assert len(stream.starts) == 601
    last = stream.tokens[stream.starts[-2] :]
    assert tokenizer.decode(last.tolist()) == "document 599"


def test_small_text_gives_a_small_vocabulary():
    tokenizer = train_tokenizer(["", "ab ab ab"], 4096)
    assert 266 < tokenizer.get_vocab_size() < 280
    round_trip(tokenizer, AWKWARD)
    assert train_tokenizer(["x"], 266).get_vocab_size() == 266


@pytest.mark.parametrize(
    "texts, size, message",
    [
        (["a"], 265, "`vocab_size` is 265, want at least 266 for 3 special tokens, 256 bytes and 7 markers"),
        ("one text", 300, "`texts` is a str, want an iterable of strings"),
        ([], 300, "empty corpus: no text to train on"),
        (["", ""], 300, "empty corpus: no text to train on"),
    ],
)
def test_training_refuses(texts, size, message):
    with pytest.raises(ValueError, match=f"train_tokenizer: {message}"):
        train_tokenizer(texts, size)


@pytest.mark.parametrize("zipped", [False, True])
def test_save_and_load(tokenizer, tmp_path, zipped):
    save_tokenizer(tokenizer, tmp_path / "a" / "b")
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["tokenizer.json", "tokenizer_config.json"]
    if zipped:
        file = tmp_path / "a" / "b" / "tokenizer.json"
        (tmp_path / "a" / "b" / "tokenizer.json.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert load_tokenizer(tmp_path / "a" / "b").to_str() == tokenizer.to_str()


def test_a_kill_while_saving_leaves_no_half_folder(tokenizer, tmp_path, monkeypatch):
    write, calls = Path.write_text, []

    class Killed(BaseException):
        pass

    def write_text(path, *arguments, **options):
        calls.append(path)
        if len(calls) == 2:
            raise Killed
        return write(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        with pytest.raises(Killed):
            save_tokenizer(tokenizer, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    save_tokenizer(tokenizer, tmp_path / "new")
    assert load_tokenizer(tmp_path / "new").to_str() == tokenizer.to_str() and os.listdir(tmp_path) == ["new"]


def test_add_bos_follows_the_config_or_the_argument(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).encode("a").ids[0] == 0
    plain = load_tokenizer(tmp_path, add_bos=False)
    assert plain.encode("a").ids == tokenizer.encode("a").ids[1:]
    save_tokenizer(plain, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is False
    assert load_tokenizer(tmp_path).encode("a").ids == plain.encode("a").ids
    assert load_tokenizer(tmp_path, add_bos=True).encode("a").ids == tokenizer.encode("a").ids
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    assert load_tokenizer(tmp_path).encode("a").ids == tokenizer.encode("a").ids
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).encode("a").ids == plain.encode("a").ids


def test_loading_turns_truncation_and_padding_off(tokenizer, tmp_path):
    short = Tokenizer.from_str(tokenizer.to_str())
    short.enable_truncation(4)
    short.enable_padding(length=64)
    with pytest.raises(ValueError, match="encode_documents: the tokenizer truncates or pads"):
        encode_documents(short, [Document("a", "a")])
    save_tokenizer(short, tmp_path)
    assert load_tokenizer(tmp_path).to_str() == tokenizer.to_str()


def test_loading_refuses(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="load_tokenizer: '.*nowhere' is no folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="load_tokenizer: no tokenizer.json or tokenizer.json.gz in"):
        load_tokenizer(tmp_path)
    for name, data in (("tokenizer.json.gz", b"plain"), ("tokenizer.json", b"{}")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"load_tokenizer: '.*{name}' is no tokenizer"):
            load_tokenizer(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="load_tokenizer: '.*tokenizer_config.json' is not JSON"):
        load_tokenizer(tmp_path)


def test_saving_where_nothing_can_be_written(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="save_tokenizer: cannot write to '.*file'"):
        save_tokenizer(tokenizer, tmp_path / "file")


def test_check_against_the_models_vocabulary(tokenizer):
    check_tokenizer(tokenizer, 1024)
    check_tokenizer(tokenizer, 2000)
    message = "check_tokenizer: the tokenizer's largest id is 1023, want below the model's vocab_size 1023"
    with pytest.raises(ValueError, match=message):
        check_tokenizer(tokenizer, 1023)


def test_a_tokenizer_without_the_special_tokens(tmp_path):
    other = Tokenizer(models.BPE())
    other.add_tokens([BOS, "x"])
    for use in (
        lambda: special_ids(other),
        lambda: check_tokenizer(other, 100),
        lambda: save_tokenizer(other, tmp_path),
        lambda: encode_documents(other, [Document("a", "a")]),
    ):
        with pytest.raises(ValueError, match=f"the tokenizer has no token {EOS}"):
            use()


def test_encoding_no_documents(tokenizer):
    with pytest.raises(ValueError, match="encode_documents: empty corpus: no documents"):
        encode_documents(tokenizer, [])


def test_transformers_opens_what_is_saved(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == 1024
    for text in AWKWARD:
        ids = tokenizer.encode(text).ids
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
        assert theirs(text, add_special_tokens=False).input_ids == ids[1:]


@needs_real
def test_pre_tokenisation_is_deepseeks(tokenizer, real):
    ours, theirs = json.loads(tokenizer.to_str()), json.loads(real.to_str())
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert ours[part] == theirs[part]
    flags = {token["content"]: {**token, "id": 0} for token in theirs["added_tokens"]}
    for token in ours["added_tokens"]:
        assert {**token, "id": 0} == flags[token["content"]]


@needs_real
def test_deepseeks_tokenizer(real):
    assert special_ids(real) == (0, 1, 2)
    check_tokenizer(real, 129_280)
    with pytest.raises(ValueError, match="largest id is 128814, want below the model's vocab_size 102400"):
        check_tokenizer(real, 102_400)
    assert real.encode("def f(x):\n    return 12345 + x").ids == [
        *(0, 3465, 285, 4042, 3395, 361, 1354, 223, 6895, 1883, 940, 1527)
    ]
    assert real.token_to_id(MARKERS[3]) == 128_801
    round_trip(real, AWKWARD)


@needs_real
@needs_data
def test_real_text_through_both_tokenizers(tokenizer, real):
    rows = (read_corpus(DATA / "corpus" / name) for name in ("thealgorithms_python.jsonl", "rust_book.jsonl"))
    texts = [document.text for documents in rows for document in islice(documents, 80)]
    own, theirs = round_trip(tokenizer, texts), round_trip(real, texts)
    assert own.text_bytes.sum() / len(own.tokens) > 2
    assert theirs.text_bytes.sum() / len(theirs.tokens) > 3.3
