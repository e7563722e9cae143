"""The library still exports every symbol of the frozen copy, which programs and plug-ins of this minor version may use.

Usage: symbols_test.py LIBRARY FROZEN           compares; what is new is only told
       symbols_test.py LIBRARY FROZEN --freeze  writes the copy, at a release
"""

import re
import subprocess
import sys
from pathlib import Path


def exported(library: str) -> set[str]:
    """Functions, and what exceptions and derived classes need. Inline functions come and go with the compiler's flags."""
    listing = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    names = re.findall(r"^\w+ ([A-Za-z]) (_Z\w+)$", listing, re.MULTILINE)
    return {name for kind, name in names if kind == "T" or re.match("_ZT[IV]N7ditattn", name)}


def main(library: str, frozen: str, *flags: str) -> int:
    now = exported(library)
    if flags == ("--freeze",):
        Path(frozen).write_text("".join(f"{name}\n" for name in sorted(now)))
        return 0
    then = set(Path(frozen).read_text().split())
    print(f"{len(then)} symbols are promised, {len(now - then)} are new")
    for name in sorted(then - now):
        print(f"no longer exported: {name}", subprocess.run(["c++filt", name], capture_output=True, text=True).stdout)
    return len(then) < 100 or not then <= now


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
