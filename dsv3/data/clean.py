"""Cleaning a text before anything is decided about it: one form for what means the same, nothing that nobody sees.

Two kinds of text differ in what may be touched. In prose a trailing blank or the way an accent is written says nothing. In
code both may be data inside of a string, so there only what no compiler tells apart is changed.
"""

from __future__ import annotations

import re
import unicodedata

from dsv3.checks import check_choice

KINDS = ("prose", "code")

# Ends of lines: carriage returns, NEL, and the line and paragraph separators of Unicode; form feed and vertical tab, too.
_ENDS = re.compile("\r\n?|[\x85\u2028\u2029\x0b\x0c]")
# Control characters but newline and tab, byte order marks, soft hyphens.
_UNSEEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\ufeff]")
_MANY_BLANK_LINES = re.compile("\n{4,}")


def clean_text(text: str, kind: str = "prose") -> str:
    """Returns a text in its clean form.

    Prose, in this order (what is clean stays as it is):

    1. every end of a line is `\\n` (also a lone carriage return, NEL, U+2028, U+2029, form feed, vertical tab);
    2. control characters but tab, byte order marks and soft hyphens go: they are not seen, and split words into rare tokens.
       Joiners (U+200C, U+200D) and the zero-width space stay: scripts and emoji need them;
    3. Unicode form NFC: a letter with an accent is written one way. Not NFKC, which turns x² into x2;
    4. blanks at the end of lines go (so does Markdown's line break of two blanks), of more than two blank lines in a row two
       stay, and there are none at the beginning and at the end. Indentation and tabs stay.

    Code: zero characters go, `\\r\\n` is `\\n`, a byte order mark at the beginning goes. Strings may hold anything else as
    data, and what a lone carriage return or a form feed means differs between languages, so that these stay.

    Args:
      text: any text.
      kind: "prose" or "code".

    Returns:
      The cleaned text; empty where nothing is left.

    Raises:
      ValueError: another kind.

    References: Unicode Standard Annex 15 (normalisation forms).

    >>> clean_text("cafe\\u0301  \\r\\n\\r\\n\\r\\n\\r\\n\\r\\nbar\\n"), clean_text("x = ' '  \\r\\n", "code")
    ('café\\n\\n\\nbar', "x = ' '  \\n")
    """
    check_choice("clean_text", "kind", kind, KINDS)
    if kind == "code":
        return text.replace("\0", "").replace("\r\n", "\n").removeprefix("\ufeff")
    text = _UNSEEN.sub("", _ENDS.sub("\n", text))
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    text = "\n".join(map(str.rstrip, text.split("\n")))
    return _MANY_BLANK_LINES.sub("\n\n\n", text).strip("\n")
