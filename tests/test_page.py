"""A page stands alone, and shows what it is given as it is."""

import base64
import html.parser
import os

import pytest

from dsv3.page import Table, write_page


class Reader(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self.sources = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.data.append(data)


def test_a_page_holds_text_tables_and_images(tmp_path):
    image = tmp_path / "loss.png"
    image.write_bytes(b"\x89PNG picture")
    nasty = "<script>alert(1)</script> & \"more\"\nanother line"
    sections = [("Numbers", [Table([("name", "value"), ("<b>", 1.5)]), image]), ("Text", [nasty])]
    path = write_page(tmp_path / "report.html", "A & B", sections)
    page = Reader(path.read_text(encoding="utf-8"))
    assert page.tags.count("h2") == 2 and page.tags.count("tr") == 2 and "script" not in page.tags and "b" not in page.tags
    assert nasty in page.data and "<b>" in page.data and "1.5" in page.data and page.data.count("A & B") == 2
    (source,) = page.sources
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == b"\x89PNG picture"
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "report.html"]


def test_what_cannot_be_shown_is_named_and_nothing_is_written(tmp_path):
    other = tmp_path / "plot.gif"
    other.write_bytes(b"GIF")
    with pytest.raises(ValueError, match="write_page: '.*plot.gif' is no image that a page can show, want .png or .svg"):
        write_page(tmp_path / "report.html", "x", [("y", [other])])
    with pytest.raises(OSError):
        write_page(tmp_path / "report.html", "x", [("y", [tmp_path / "none.png"])])
    assert os.listdir(tmp_path) == ["plot.gif"]
