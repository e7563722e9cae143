"""The page of `ditattn compare --report`, read without a browser and, where there is one, in it."""

import base64
import html
import itertools
import json
import math
import re
import shlex
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tensors import normal, rounded, save

VOID = {"meta", "link", "img", "line", "rect", "path"}  # of SVG those that the page closes itself
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"


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


def test_it_tells_all_cases_and_back_ends(ditattn, tmp_path):
    text, document = make_report(ditattn, tmp_path, "--shape", "1,2,64,96,40", "--shape", "1,1,33,33,64")
    page = check(text)
    assert page.document == document
    assert len(page.all("svg")) == 2 * (1 + len(document["cases"]))  # an overview too
    ran = [entry["backend"] for entry in document["cases"][0]["results"] if entry["status"] == "ok"]
    assert len(ran) >= 4 and text.count("<rect") == len(ran) * 3
    assert len(re.findall(r'<path class="mark b(\d)"', text)) == len(ran) * 3
    for case in document["cases"]:
        assert f"<summary>{case['case']}</summary>" in text
        for entry in case["results"]:
            assert text.count(f">{entry['backend']}<") >= 1
            if entry["status"] == "ok":
                assert f"{entry['tflops']:.3g} TFLOP/s, {entry['median_ms']:.4g} ms" in text
    assert document["machine"]["cpu"] in page.texts["body"] and "level " in page.texts["table"]


def test_one_case_needs_no_overview(ditattn, tmp_path):
    text, _ = make_report(ditattn, tmp_path, "--shape", "1,2,64,96,40", "--backends", "FLASH_ATTN")
    check(text)
    assert text.count("<svg") == 2 and text.count("<rect") == 1
    assert "FLASH_ATTN is recommended: the fastest within the bound of 2.0e-06, and the only one. None was faster." in text


def test_the_recommendation_has_reasons(ditattn, tmp_path):
    text, document = make_report(ditattn, tmp_path, "--shape", "1,2,256,256,64")
    (case,) = document["cases"]
    entries = {entry["backend"]: entry for entry in case["results"] if entry["median_ms"]}
    best = entries[case["recommended"]]
    (reason,) = re.findall(r"<p>(.* is recommended: .*)</p>", text)
    others = [e for e in entries.values() if e["rel_l2"] <= case["error_bound"] and e is not best]
    ratio = min(e["median_ms"] for e in others) / best["median_ms"]
    assert reason.startswith(
        f"{best['backend']} is recommended: the fastest within the bound of 2.0e-06, {ratio:.2f} times as fast as the next, "
    )
    for entry in entries.values():
        said = f"{entry['backend']}, {best['median_ms'] / entry['median_ms']:.2f} times as fast, has an error of"
        assert (said in reason) == (entry["median_ms"] < best["median_ms"])


def test_names_are_text(ditattn, tmp_path):
    source = one_case(tmp_path, name=HOSTILE)
    picture = tmp_path / "a.svg"
    picture.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    text, document = make_report(ditattn, tmp_path, "--input", source, "--picture", f"{HOSTILE}={picture}")
    page = check(text)
    assert page.document == document and document["cases"][0]["case"] == f"in/{HOSTILE}"
    assert f"in/{HOSTILE}" in page.texts["summary"] and HOSTILE in page.texts["figcaption"]
    assert page.all("img")[0]["alt"] == HOSTILE
    assert len(page.all("img")) == 1 and "alert" not in "".join(map(str, page.all("script")))


@pytest.mark.parametrize("changes", [{"value": 0}, {"query": 0}, {"value": 1e-30}], ids=str)
def test_errors_of_zero_have_a_place(ditattn, tmp_path, changes):
    text, document = make_report(ditattn, tmp_path, "--input", one_case(tmp_path, **changes))
    check(text)
    errors = [entry["rel_l2"] for entry in document["cases"][0]["results"] if entry["status"] == "ok"]
    assert len(errors) >= 4 and text.count('<path class="mark') == len(errors)
    assert (">0</text>\n<line" in text.split("<svg")[2]) == (0 in errors)
    if changes == {"value": 0}:
        assert errors == [0] * len(errors)


def test_what_is_no_number_has_a_place(stand_ins, tmp_path):
    """SAGE_ATTN of the stand-ins gives NaN, SAGE_ATTN_3 zeros, FLASHINFER_ATTN breaks down."""
    text, document = make_report(stand_ins, tmp_path, "--input", one_case(tmp_path))
    page = check(text)
    assert page.document == document
    assert ">NaN</text>" in text and "nan" not in re.sub(r">[^<]*<", "", text.partition("<script")[0]).lower()
    assert "the engine broke down" in page.texts["table"]


def test_all_refused(stand_ins, tmp_path):
    file = tmp_path / "report.html"
    arguments = ["--shape", "1,1,8,8,16", "--backends", "FLASHINFER_ATTN", "--json", "--report", file]
    assert stand_ins("compare", *arguments).returncode == 4
    page = check(file.read_text())
    assert "None is recommended: none could be timed." in page.texts["p"] and page.all("svg") == []


def test_none_within_the_bound(ditattn, tmp_path):
    text, _ = make_report(ditattn, tmp_path, "--shape", "1,1,64,64,64", "--max-error", "0")
    check(text)
    assert "None is recommended: none is within the bound of 0.0e+00. " in text and "inf" not in text.split("<script")[0]


def test_layers_and_levels_are_tables_of_colours(ditattn, tmp_path):
    text, document = make_report(ditattn, tmp_path)  # the shipped capture
    page = check(text)
    cells = re.findall(r'<td class="h(\d)( over)?">(▲ )?([^<]*)</td>', text)
    assert len(cells) == 4 * len(document["summary"]["levels"])
    for colour, over, sign, number in cells:
        error = float(number)
        assert int(colour) == min(max(math.floor(math.log10(error)) + 8, 0), 7), number
        assert bool(over) == bool(sign) == (error > 1e-2), number
    assert "SAGE_ATTN stays within 1.0e-02 in 1 of 1 layers" in page.texts["p"]


def test_ceilings_of_the_cpu(ditattn, tmp_path):
    _, document = make_report(ditattn, tmp_path, "--shape", "1,4,512,512,64")
    ceilings = document["machine"]["ceilings"]
    assert ceilings["device"] == "cpu"
    rates = {entry["type"]: entry["tflops"] for entry in ceilings["products"]}
    assert list(rates) == ["float32", "8 bits"] and ceilings["memory"]["gb_per_s"] > 0.1
    (flash,) = [e for e in document["cases"][0]["results"] if e["backend"] == "FLASH_ATTN"]
    threads = document["machine"]["threads"]
    print(f"FLASH_ATTN {flash['tflops']:.3f} of {rates}, {ceilings['memory']['gb_per_s']:.1f} GB/s")
    assert flash["tflops"] < 1.1 * rates["float32"]  # a ceiling, and
    assert rates["float32"] < threads * 0.4  # no more than 2 FMA of 16 numbers at 6 GHz
    assert "ceilings" not in ditattn.json("compare", "--shape", "1,1,8,8,8", "--repeats", "1")["machine"]


def test_ceilings_are_of_the_level_in_effect(ditattn, tmp_path):
    levels = ["sse2", ditattn.json("doctor")["machine"]["best_cpu_level"]]
    rates = []
    for level in levels:
        file = tmp_path / "report.html"
        arguments = ["--shape", "1,1,8,8,8", "--dtype", "bfloat16", "--report", file]
        document = ditattn.json("compare", *arguments, env={"DITATTN_CPU_LEVEL": level})
        (products, _) = document["machine"]["ceilings"]["products"]
        assert products["type"] == "bfloat16" and f"level {level}," in products["how"] and products["reason"] is None
        rates.append(products["tflops"])
    print(dict(zip(levels, rates)))
    assert levels[1] == "sse2" or rates[1] > 2 * rates[0]


def test_it_says_how_it_was_made(ditattn, tmp_path):
    file = tmp_path / "it's a report.html"
    arguments = ["compare", "--shape", "1,1,8,8,8", "--repeats", "1", "--report", str(file)]
    ditattn.ok(*arguments)
    page = check(file.read_text())
    assert shlex.split(page.texts["code"]) == ["ditattn", *arguments]
    assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC, ", page.texts["p"])
    version = ditattn.ok("--version").split()[1]
    assert f"ditattn {version}" in page.texts["p"] and "NVIDIA driver" in page.texts["table"]


def test_the_commands_of_its_page(ditattn, tmp_path):
    """docs/report.md."""
    (tmp_path / "digits.png").write_bytes(png())
    page = (Path(__file__).resolve().parents[2] / "docs" / "report.md").read_text()
    commands = re.findall(r"^ditattn (compare .*)$", page, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        ditattn.ok(*shlex.split(command), "--repeats", "1", cwd=tmp_path)
        check((tmp_path / "out.html").read_text())


# --- Pictures -------------------------------------------------------------------------------------------------------


def png():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0\xff" * 2)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "kind, content",
    [
        ("png", png()),
        ("svg+xml", b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("gif", b"GIF89a" + bytes(range(20))),
        ("jpeg", b"\xff\xd8\xff\xe0" + bytes(range(21))),
        ("webp", b"RIFF\x10\0\0\0WEBPVP8 " + bytes(19)),
    ],
)
def test_pictures_are_in_the_page(ditattn, tmp_path, kind, content):
    (tmp_path / "picture").write_bytes(content)
    pictures = ["--picture", f"a=b={tmp_path / 'picture'}", "--picture", f"second={tmp_path / 'picture'}"]
    text, _ = make_report(ditattn, tmp_path, "--shape", "1,1,8,8,8", *pictures)
    images = check(text).all("img")
    assert [image["alt"] for image in images] == ["a=b", "second"]
    for image in images:
        head, _, data = image["src"].partition(",")
        assert head == f"data:image/{kind};base64" and base64.b64decode(data, validate=True) == content


@pytest.mark.parametrize(
    "picture, status, says",
    [
        ("no-form", 2, "--picture 'no-form' is not of the form CAPTION=FILE"),
        ("=file", 2, "is not of the form"),
        ("caption=", 2, "is not of the form"),
        ("caption=missing.png", 4, "there is no file 'missing.png'"),
        ("caption=.", 4, "there is no file '.'"),
        ("caption={text}", 4, "is no picture that browsers show. Give a PNG"),
        ("caption={empty}", 4, "is no picture"),
        ("caption={large}", 4, "has 8388609 bytes; at most 8388608 go into a report"),
    ],
)
def test_what_is_no_picture_is_refused_before_anything_is_measured(ditattn, tmp_path, picture, status, says):
    files = {"text": b"<html>", "empty": b"", "large": bytes((8 << 20) + 1)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    picture = picture.format(**{name: tmp_path / name for name in files})
    error = ditattn.fails(status, "compare", "--shape", "9,9,9999,9999,99", "--report", "r.html", "--picture", picture)
    assert says in error


def test_a_picture_needs_a_report(ditattn):
    assert "give --report FILE too" in ditattn.fails(2, "compare", "--shape", "1,1,8,8,8", "--picture", "a=b")


# --- Colours --------------------------------------------------------------------------------------------------------


SIGHT = {  # in linear RGB: Machado, Oliveira and Fernandes (2009), severity 1
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(colour):
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def luminance(colour):
    return linear(colour) @ [0.2126, 0.7152, 0.0722]


def lab(colour, sight):
    """CIELAB, in which equal distances look alike."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = to_xyz @ np.clip(np.asarray(sight) @ linear(colour), 0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(ditattn, tmp_path, scheme):
    """WCAG's ratios: 4.5 for texts, 3 for shapes."""
    text, _ = make_report(ditattn, tmp_path, "--shape", "1,1,8,8,8")
    block = re.findall(r":root \{(.*?)\}", text, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    for name in ("text", "faint", "good", "bad", "ceiling"):
        assert contrast(colours[name], colours["page"]) >= 4.5, name
    assert contrast(colours["text"], colours["panel"]) >= 4.5
    for slot in range(8):
        assert contrast(colours[f"b{slot}"], colours["page"]) >= 3, slot
        on = colours["on-low" if slot <= 5 else "on-high"]
        assert contrast(colours[f"h{slot}"], on) >= 4.5, slot
    for name, sight in SIGHT.items():
        places = [lab(colours[f"b{slot}"], sight) for slot in range(8)]
        least = min(np.linalg.norm(a - b) for a, b in itertools.combinations(places, 2))
        print(f"{name}: colours of back ends are {least:.1f} apart")
        assert least >= 20, name


# --- In a browser ---------------------------------------------------------------------------------------------------


def in_browser(folder, page, width):
    """The page's width where `width` pixels are to be had, and what the console says."""
    frame = f'<iframe width="{width}" height="800" style="border: 0" srcdoc="{html.escape(page)}"></iframe>'
    measure = "document.title = document.querySelector('iframe').contentDocument.documentElement.scrollWidth"
    (folder / "frame.html").write_text(f"<!DOCTYPE html><body>{frame}<script>onload = () => {measure}</script>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={folder}/profile"]
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", f"file://{folder}/frame.html"], capture_output=True, text=True, timeout=120
    )
    (title,) = re.findall(r"<title>(\d+)</title>", done.stdout)
    return int(title), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
def test_in_a_browser_it_fits_a_phone_and_the_console_is_silent(ditattn, tmp_path):
    (tmp_path / "picture.png").write_bytes(png())
    arguments = ["--shape", "1,1,33,33,64", "--input", one_case(tmp_path, name="x" * 200)]
    text, _ = make_report(ditattn, tmp_path, *arguments, "--picture", f"digits={tmp_path / 'picture.png'}")
    for width in (360, 1280):
        needed, said = in_browser(tmp_path, text, width)
        assert needed <= width and said == []
    shipped, _ = make_report(ditattn, tmp_path)
    needed, said = in_browser(tmp_path, shipped, 360)
    assert needed <= 360 and said == []


@pytest.mark.skipif(BROWSER is None, reason="there is no chromium")
def test_the_browser_would_tell(tmp_path):
    wide, said = in_browser(tmp_path, '<div style="width: 700px">x</div><script>console.error("no")</script>', 360)
    assert wide >= 700 and len(said) == 1
