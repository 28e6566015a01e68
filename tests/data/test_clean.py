"""Cleaning: what goes, what stays, and that code means the same."""

import ast
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data import embedded_corpus
from dsv3.data.clean import clean_text

CONTROLS = st.sampled_from("\r\n\t \0\x0b\x0c\x85\xa0\xad\u2028\u2029\u0301\ufeffe")
AWKWARD = st.text(st.one_of(st.characters(codec="utf-8"), CONTROLS))


def decomposed(text):
    """A text without blanks, each letter apart from its accents."""
    return unicodedata.normalize("NFD", "".join(text.split()))


@given(AWKWARD)
def test_prose_is_clean_and_keeps_its_visible_characters(text):
    """The oracle goes by Unicode's categories."""
    got = clean_text(text)
    assert clean_text(got) == got == unicodedata.normalize("NFC", got)
    shown = "".join(c for c in text if c not in "\xad\ufeff" and (unicodedata.category(c) != "Cc" or c.isspace()))
    assert decomposed(got) == decomposed(shown)
    assert all(c in "\n\t" or unicodedata.category(c) != "Cc" for c in got)
    assert got.splitlines() == [line.rstrip() for line in got.split("\n")] or not got
    assert "\n\n\n\n" not in got and not got.startswith("\n") and not got[-1:].isspace()


@given(AWKWARD)
def test_code_is_the_text_but_for_ends_of_lines(text):
    got = clean_text(text, "code")
    lines = [line.removesuffix("\r") for line in text.replace("\0", "").split("\n")[:-1]]
    assert got == "\n".join([*lines, text.replace("\0", "").split("\n")[-1]]).removeprefix("\ufeff")


@pytest.mark.parametrize(
    "text, want",
    [
        ("a\r\nb\rc\x85d\u2028e\u2029f\x0cg", "a\nb\nc\nd\ne\nf\ng"),
        ("  indented\n\tand tabs\t\n", "  indented\n\tand tabs"),
        ("one\n\n\n\n\n\ntwo\n\n\n", "one\n\n\ntwo"),
        ("one\n\n\n\ntwo\n\n\nthree", "one\n\n\ntwo\n\n\nthree"),
        ("soft\xadhyphen \x1b[1mbold\x07 \ufeffmark", "softhyphen [1mbold mark"),
        ("u\u0308ber x² \ufb01t", "über x² \ufb01t"),
        ("क्\u200dष 👩\u200d💻 a\u200bb", "क्\u200dष 👩\u200d💻 a\u200bb"),
        (" \n\t\n", ""),
    ],
)
def test_prose(text, want):
    assert clean_text(text) == want


def test_code_keeps_all_that_a_string_may_hold():
    code = "s = 'e\u0301 \x1b \xad'   \n\n\n\n\n\x0c# \u2028 \r end  \n\n"
    assert clean_text(code, "code") == code
    assert clean_text("\ufeffa\r\nb\0c\r\n", "code") == "a\nbc\n"


def test_python_means_the_same():
    """Sources of the standard library, also with the other system's ends of lines, parse to the same tree."""
    for document in embedded_corpus(max_bytes=400_000):
        if document.name.endswith(".py"):
            tree = ast.dump(ast.parse(document.text))
            for text in (document.text, "\ufeff" + document.text.replace("\n", "\r\n")):
                assert ast.dump(ast.parse(clean_text(text, "code"))) == tree, document.name


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="clean_text: `kind` is 'poem', want one of 'prose', 'code'"):
        clean_text("x", "poem")
