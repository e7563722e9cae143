"""Reports of `ditattn compare`, made and read without a browser."""

import json
import math
import re
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
from tensors import normal, rounded, save

VOID = {"meta", "link", "img", "line", "rect", "path"}  # of SVG those that the page closes itself


class Page(HTMLParser):
    """A page's elements; fails where they are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID, tag
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag] = self.texts.get(tag, "") + data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def document(self):
        (script,) = self.all("script")
        assert script == {"type": "application/json", "id": "ditattn-comparison"}
        return json.loads(self.texts["script"])


def make_report(command, folder, *arguments):
    """The page and what --json printed in the same run."""
    file = folder / "report.html"
    document = command.json("compare", *arguments, "--repeats", "1", "--report", file)
    return file.read_text(), document


def check(text):
    """What holds for every report: it is well formed, loads nothing, runs nothing, and draws what can be drawn."""
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>\n") and "http" not in text.partition("<body>")[0]
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form", "a"), tag
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "style", (tag, name)
            assert name not in ("src", "href", "srcset", "data", "action") or value.startswith("data:"), (tag, value)
    assert "url(" not in page.texts["style"] and "@import" not in page.texts["style"]
    check_coordinates(page)
    return page


def check_coordinates(page):
    room = None
    for tag, attributes in page.elements:
        if tag == "svg":
            room = [float(number) for number in attributes["viewbox"].split()]
            assert attributes["role"] == "img" and attributes["aria-label"]
        if tag not in ("line", "rect", "path", "text"):
            continue
        if "transform" in attributes:
            attributes["x"], attributes["y"] = re.fullmatch(r"translate\((\S+) (\S+)\)", attributes["transform"]).groups()
        for name, end in (("x", 2), ("x1", 2), ("x2", 2), ("y", 3), ("y1", 3), ("y2", 3)):
            if name in attributes:
                number = float(attributes[name])
                assert math.isfinite(number) and 0 <= number <= room[end], (tag, attributes)
        if tag == "rect":
            assert 0 < float(attributes["width"]) <= room[2] - float(attributes["x"])


def one_case(folder, size=64, name=None, **changes):
    """A file of one case; of a capture where it has a name."""
    tensors = dict(zip(("query", "key", "value"), normal(np.random.default_rng(0), *[(1, 32, 2, size)] * 3)))
    tensors = {what: rounded(changes.get(what, 1) * x, "float32") for what, x in tensors.items()}
    prefix = f"{name}." if name else ""
    return save(folder / "in.safetensors", {prefix + what: x for what, x in tensors.items()})


def png():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0\xff" * 2)) + chunk(b"IEND", b"")
