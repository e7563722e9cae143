"""Structure of the tree: who may include whom, the door's size, and texts that must stand in two places alike."""

import re
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCES = {".hpp", ".cpp", ".h", ".cu", ".cuh", ".def", ".in"}

# Folder -> what its #include lines may name. "std" is a header without a folder, or one of the system's.
STD = r"<(?:[a-z0-9_]+(?:\.h)?|sys/[a-z_]+\.h)>"
RULES = {
    "include/ditattn": rf'{STD}|[<"](?:ditattn|tvm)/',
    "kernels": rf'{STD}|"kernels/',
    "src/core": r'<|"(?:ditattn|core)/',
    "src/registry": r'<|"(?:ditattn|core|registry)/',
    "src/tuner": r'<|"(?:ditattn|core|registry|tuner)/',
    "src/selector": r'<|"(?:ditattn|core|registry|tuner|selector)/',
    "src/guard": r'<|"(?:ditattn|core|registry|guard)/',
    "src/parallel": r'<|"(?:ditattn|core|registry|parallel)/',
    "src/nccl": r'<|"(?:ditattn|core|kernels|parallel|nccl)/',
    "src/planner": r'<|"(?:(?:ditattn|core|planner)/|parallel/heads\.hpp)',
    "python": rf'{STD}|[<"](?:ditattn|tvm)/',
    "backends": r'<(?!core/|registry/|selector/|src/|tools/)|"(?:ditattn|kernels|backends)/',
}


def includes(text):
    """The targets of #include lines, with their quotes."""
    return re.findall(r'^[ \t]*#[ \t]*include[ \t]+([<"][^>"]+[>"])', text, flags=re.MULTILINE)


def violations(folder, file, text):
    """Includes of `file` that the rule of `folder` forbids. A name that stands beside the file is its own."""

    def is_beside(target):
        return target[0] == '"' and "/" not in target and (file.parent / target[1:-1]).is_file()

    return [target for target in includes(text) if not re.match(RULES[folder], target) and not is_beside(target)]


def source_files(folder):
    return sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in SOURCES and p.is_file())


class IncludeArrows(unittest.TestCase):
    def test_every_folder_keeps_its_rule(self):
        for folder in RULES:
            for file in source_files(folder):
                with self.subTest(file=str(file.relative_to(ROOT))):
                    self.assertEqual(violations(folder, file, file.read_text()), [])

    def test_nothing_includes_tools(self):
        for folder in ("include", "src", "kernels", "backends", "python", "bench", "examples"):
            for file in source_files(folder):
                with self.subTest(file=str(file.relative_to(ROOT))):
                    self.assertEqual([t for t in includes(file.read_text()) if "tools/" in t], [])

    def test_the_rules_see_what_they_forbid(self):
        forbidden = [
            ("include/ditattn", "#include <fmt/format.h>"),
            ("include/ditattn", '#include "core/environment.hpp"'),
            ("kernels", '#include "ditattn/tensor.hpp"'),
            ("kernels", "#include <ditattn/threads.hpp>"),
            ("kernels", "#include <tvm/ffi/error.h>"),
            ("src/core", '#include "registry/loader.hpp"'),
            ("src/registry", '  #  include "selector/selector.hpp"'),
            ("backends", '#include "registry/loader.hpp"'),
            ("backends", '#include "core/float_bits.hpp"'),
            ("backends", "#include <core/float_bits.hpp>"),
        ]
        for folder, line in forbidden:
            self.assertEqual(len(violations(folder, ROOT / folder / "x.cpp", line)), 1, f"{folder}: {line}")

    def test_the_rules_let_through_what_is_allowed(self):
        allowed = [
            ("include/ditattn", "#include <tvm/ffi/error.h>"),
            ("include/ditattn", "#include <type_traits>"),
            ("kernels", "#include <immintrin.h>"),
            ("kernels", '#include "kernels/cpu/x.hpp"'),
            ("src/registry", '#include "core/environment.hpp"'),
            ("backends", "#include <ditattn/plugin.hpp>"),
        ]
        for folder, line in allowed:
            self.assertEqual(violations(folder, ROOT / folder / "x.cpp", line), [], f"{folder}: {line}")


class Texts(unittest.TestCase):
    def test_the_door_is_short(self):
        lines = (ROOT / "include/ditattn/ditattn.hpp").read_text().count("\n")
        self.assertLess(lines, 80)

    def test_environment_page_lists_the_table(self):
        table = re.findall(r'^DITATTN_ENV\((\w+), "(.*)"\)$', (ROOT / "src/core/env.def").read_text(), re.MULTILINE)
        page = re.findall(r"^\| `(\w+)` \| (.*?) \|$", (ROOT / "docs/environment.md").read_text(), re.MULTILINE)
        self.assertGreater(len(table), 0)
        self.assertEqual(page, table)

    def test_architecture_names_every_folder_and_no_other(self):
        page = (ROOT / "docs/architecture.md").read_text()
        table = dict(re.findall(r"^\| (`[^|]*`) \| (.*) \|$", page, re.MULTILINE))
        named = {name for cell in table for name in re.findall(r"`([\w/]+)/`", cell)}
        self.assertEqual([name for name in named if not (ROOT / name).is_dir()], [])

        def folders(parent):
            return {path.name for path in (ROOT / parent).iterdir() if path.is_dir() and path.name[0] not in "._"}

        self.assertEqual(folders(".") - {"build", "out", "shared"} - {name.split("/")[0] for name in named}, set())
        for parent in ("src", "kernels"):
            self.assertEqual({f"{parent}/{name}" for name in folders(parent)} - named, set())
        self.assertEqual(folders("tests") - set(re.findall(r"`(\w+)/`", table["`tests/`"])), set())

    def test_every_page_is_in_the_readmes_index(self):
        index = (ROOT / "README.md").read_text().split("## Where things are")[1]
        pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
        self.assertEqual(set(re.findall(r"\]\((docs/[^)/]+\.md)\)", index)), pages)

    def test_every_variable_read_by_name_is_in_the_table(self):
        """Backends cannot see src/core/environment.hpp and ask for theirs by name."""
        table = (ROOT / "src/core/env.def").read_text()
        for folder in ("src", "backends", "tools", "kernels", "python"):
            for file in source_files(folder):
                for name in re.findall(r'getenv\(\s*"((?:DITATTN|DIFFUSION)\w+)"', file.read_text()):
                    with self.subTest(file=str(file.relative_to(ROOT))):
                        self.assertIn(f"DITATTN_ENV({name},", table)

    def quickstart(self):
        return (ROOT / "examples/quickstart.cpp").read_text()

    def test_the_door_shows_the_quickstart(self):
        prefix = "///     "
        block = []
        for line in (ROOT / "include/ditattn/ditattn.hpp").read_text().splitlines():
            if line.startswith(prefix):
                block.append(line[len(prefix) :])
            elif line == "///" and block and block[-1] != "}":
                block.append("")
        self.assertEqual("\n".join(block) + "\n", self.quickstart())

    def test_the_readme_shows_the_quickstart(self):
        readme = ROOT / "README.md"
        if not readme.exists():
            self.skipTest("there is no README.md yet")
        blocks = re.findall(r"^```cpp\n(.*?)^```$", readme.read_text(), re.MULTILINE | re.DOTALL)
        self.assertTrue(blocks, "README.md has no ```cpp block")
        self.assertEqual(blocks[0], self.quickstart())


def tests_that_exist():
    """`Suite.Name` of every GoogleTest, `folder/file.py::name` of every pytest, as docs name them."""
    names = set()
    for file in (ROOT / "tests").rglob("*.cpp"):
        found = re.findall(r"^TEST(?:_F|_P)?\(\s*(\w+),\s*(\w+)\s*\)", file.read_text(), re.MULTILINE)
        names.update(f"{suite}.{name}" for suite, name in found)
    for file in (ROOT / "tests").rglob("test_*.py"):
        found = re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE)
        names.update(f"{file.relative_to(ROOT / 'tests').as_posix()}::{name}" for name in found)
    return names


def table_rows(page):
    """The cells of each row of the page's tables that end in a column "test"; rows without their header's width too."""
    rows, width = [], 0
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and cells[-1] == "test":
            width = len(cells)
        elif not cells:
            width = 0
        elif width and not set(line) <= set("|-"):
            rows.append((width, cells))
    return rows


class TestsNamedInDocs(unittest.TestCase):
    PAGE = ROOT / "docs/vllm-omni.md"

    def test_every_row_names_tests_that_exist(self):
        exist, rows = tests_that_exist(), table_rows(self.PAGE.read_text())
        self.assertGreater(len(rows), 100)
        for width, cells in rows:
            with self.subTest(row=cells[:2]):
                self.assertEqual(len(cells), width)
                self.assertRegex(cells[-1], r"^`[^`]+`(, `[^`]+`)*$")
                self.assertEqual([name for name in re.findall(r"`([^`]+)`", cells[-1]) if name not in exist], [])

    def test_every_test_of_its_own_is_named(self):
        """A test that no row names shows what nobody is told."""
        page = self.PAGE.read_text()
        own = [name for name in tests_that_exist() if name.startswith(("VllmOmni", "python/test_vllm_omni.py"))]
        self.assertGreater(len(own), 30)
        self.assertEqual([name for name in own if f"`{name}`" not in page], [])


if __name__ == "__main__":
    unittest.main()
