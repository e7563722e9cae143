#!/usr/bin/env python3
"""From cmake/third_party.json, the one table of what others wrote: what a build holds of it, as SPDX 2.3, or the page.

Usage: sbom.py spdx VERSION OUTPUT NAME=VERSION[=RELATION]…   the document for a build that
                                       has these, of these versions
       sbom.py page                                THIRD_PARTY.md, on stdout
"""

import hashlib
import json
import os
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

TABLE: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "cmake" / "third_party.json").read_text())
CUDA_EULA = "LicenseRef-NVIDIA-CUDA-EULA"

PAGE = """# Third parties

What others wrote and ditattn uses, with the versions that it is built and tested with. Nothing of it stands in this source tree: it
comes from Debian's packages and from PyPI. ditattn itself is under the [Apache License 2.0](LICENSE). An installed tree, a wheel and the
Debian package have `share/ditattn/ditattn.spdx.json`, which says what that build holds (SPDX 2.3). Both are made from
`cmake/third_party.json` by `scripts/sbom.py`.

| name | version | licence (SPDX) | where |
|---|---|---|---|
{rows}

apache-tvm-ffi's notice: Apache TVM FFI, Copyright 2024-present The Apache Software Foundation. This product includes software developed at
The Apache Software Foundation (http://www.apache.org/). Its library has libbacktrace in it (BSD-3-Clause), its headers DLPack's (Apache-2.0).
"""


def page() -> str:
    rows = [f"| [{e['name']}]({e['url']}) | {e['version']} | {e['licence']} | {e['where']} |" for e in TABLE]
    return PAGE.format(rows="\n".join(rows))


def package(name: str, version: str, licence: str, url: str) -> dict[str, Any]:
    return {
        "SPDXID": "SPDXRef-" + re.sub(r"[^A-Za-z0-9.-]", "-", name), "name": name, "versionInfo": version,
        "downloadLocation": url, "filesAnalyzed": False, "licenseConcluded": licence, "licenseDeclared": licence,
        "copyrightText": "NOASSERTION",
    }  # fmt: skip


def document(version: str, held: dict[str, str]) -> dict[str, Any]:
    """Reproducible: the time is SOURCE_DATE_EPOCH's, the name space follows from the content."""
    relation = {e["name"]: e["relation"] for e in TABLE if e["relation"]}
    for name, text in held.items():
        held[name], _, other = text.partition("=")
        relation[name] = other or relation.get(name)
    unknown = held.keys() - {entry["name"] for entry in TABLE if entry["relation"]}
    if unknown:
        raise SystemExit(f"sbom: {', '.join(sorted(unknown))}: not among what cmake/third_party.json says is installed")
    ours = package("ditattn", version, "Apache-2.0", "NOASSERTION")
    entries = [entry for entry in TABLE if entry["name"] in held]
    packages = [ours] + [package(e["name"], held[e["name"]], e["licence"], e["url"]) for e in entries]
    relations = [("SPDXRef-DOCUMENT", "DESCRIBES", ours["SPDXID"])]
    relations += [(ours["SPDXID"], relation[e["name"]], p["SPDXID"]) for e, p in zip(entries, packages[1:])]
    epoch = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", 0)), timezone.utc)
    digest = hashlib.sha256(json.dumps([packages, relations]).encode()).hexdigest()[:32]
    result: dict[str, Any] = {
        "spdxVersion": "SPDX-2.3", "dataLicense": "CC0-1.0", "SPDXID": "SPDXRef-DOCUMENT", "name": f"ditattn-{version}",
        "documentNamespace": f"https://spdx.org/spdxdocs/ditattn-{version}-{digest}",
        "creationInfo": {"created": epoch.strftime("%Y-%m-%dT%H:%M:%SZ"), "creators": ["Tool: ditattn-scripts/sbom.py"]},
        "packages": packages,
        "relationships": [
            {"spdxElementId": a, "relationshipType": kind, "relatedSpdxElement": b} for a, kind, b in relations
        ],
    }  # fmt: skip
    if any(CUDA_EULA == entry["licence"] for entry in entries):
        text = "NVIDIA CUDA Toolkit End User License Agreement, https://docs.nvidia.com/cuda/eula/"
        result["hasExtractedLicensingInfos"] = [{"licenseId": CUDA_EULA, "name": "NVIDIA CUDA EULA", "extractedText": text}]
    return result


def main(arguments: list[str]) -> None:
    if arguments == ["page"]:
        sys.stdout.write(page())
    elif arguments[:1] == ["spdx"] and len(arguments) > 3:
        held = dict(argument.split("=", 1) for argument in arguments[3:])
        Path(arguments[2]).write_text(json.dumps(document(arguments[1], held), indent=1) + "\n")
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
