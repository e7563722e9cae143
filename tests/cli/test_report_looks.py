"""Pictures and colours of `ditattn compare --report`, and, where there is one, the page in a browser."""

import base64
import html
import itertools
import re
import shutil
import subprocess

import numpy as np
import pytest
from report_page import check, make_report, one_case, png

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# --- Pictures -------------------------------------------------------------------------------------------------------


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
