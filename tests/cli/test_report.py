"""The page of `ditattn compare --report`: what it says and embeds."""

import math
import re
import shlex
from pathlib import Path

import pytest
from report_page import check, make_report, one_case, png

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"


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
