#!/usr/bin/env python3
"""Prints gcovr's JSON summary by folder. Fails where less than the given percentage of all lines was run.

Usage: coverage_by_folder.py SUMMARY.json PERCENT
"""

import json
import sys
from collections import defaultdict
from pathlib import Path


def main(summary: str, least: float) -> int:
    folders: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for file in json.loads(Path(summary).read_text())["files"]:
        parts = Path(file["filename"]).parent.parts
        for folder in ("/".join(parts[:2]), "all"):
            folders[folder][0] += file["line_covered"]
            folders[folder][1] += file["line_total"]
    for folder, (covered, total) in sorted(folders.items(), key=lambda item: (item[0] == "all", item[0])):
        print(f"{folder:24} {covered:6} of {total:6} lines  {100 * covered / max(total, 1):5.1f} %")
    covered, total = folders["all"]
    if covered * 100 < least * total:
        print(f"coverage: fewer than {least:g} % of the lines were run", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
