"""Follows a page of docs/ literally: its files and commands in order, in one shell, and what commands print."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OWN_VARIABLES = ("DITATTN_", "DIFFUSION_ATTENTION_", "PYTHONPATH", "LD_LIBRARY_PATH", "CMAKE_")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`([\w./]+\.\w+)`:\n\n\Z")  # the text before a block that is a file: "…, `folder/name.cpp`:"


def blocks(text):
    """(language, body, the text before it) of each block."""
    return [(match[1], match[2], text[: match.start()]) for match in FENCE.finditer(text)]


def commands(body):
    """Commands of an `sh` block: a line each, without comments; lines that end in a backslash go on."""
    joined = body.replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in joined.splitlines() if line.strip() and line[0] != "#"]


def shown(body):
    """(command, output) of each "$ command" in a block."""
    parts = re.split(r"^\$ (.*)\n", body, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def masked(output):
    """Numbers, level and processor names and the widths of columns are a machine's own."""
    text = re.sub(r"\b(sse2|avx2|avx512\w*|amx)\b(, products in bfloat16)?", "LEVEL", output)
    text = re.sub(r"; GPU: .*?(?=  |$)", "", text, flags=re.MULTILINE)
    text = re.sub(r"^.* threads?, \d+ GB; .*$", "MACHINE", text, flags=re.MULTILINE)
    text = re.sub(r"\s*\brecommended\b", "", text)  # by timing
    text = re.sub(r"[-+]?(\d+(\.\d*)?(e[-+]?\d+)?|nan|inf)\b", "#", text)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def differences(expected, printed):
    """What of a shown output is not what was printed; "…" stands for lines that are left out."""
    lines, at, skip = masked(printed), 0, False
    for line in masked(expected):
        if line == "…":
            skip = True
            continue
        found = [i for i in range(at, len(lines)) if lines[i] == line][:1] if skip else [at] * (lines[at : at + 1] == [line])
        if not found:
            return f"the page shows\n  {line}\nbut printed was\n" + "\n".join(lines)
        at, skip = found[0] + 1, False
    return "" if skip or at == len(lines) else "printed, but not shown:\n" + "\n".join(lines[at:])


def environment(**extra):
    """Without the caller's own settings, tuned choices and colours."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(OWN_VARIABLES)}
    return inherited | {"NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1", "DITATTN_TUNE": "off"} | extra


def run(command):
    done = subprocess.run(command, env=environment(), text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def follow(text, folder, skip=(), **variables):
    """Writes the files and runs the commands of a page in `folder`, and checks what commands print where that is shown."""
    script, expected = ["exec 2>&1"], []
    for language, body, before in blocks(text):
        file = FILE.search(before)
        if file:
            script.append(f"mkdir -p $(dirname {file[1]})\ncat >{file[1]} <<'END_OF_FILE'\n{body}END_OF_FILE")
        elif language in ("sh", "console"):
            for command, output in shown(body) if language == "console" else [(c, None) for c in commands(body)]:
                if command not in skip:
                    script.append(f"printf '\\036'\n{command} || {{ echo \"status $?\"; exit 1; }}")
                    expected.append((command, output))
    done = subprocess.run(["bash", "-c", "\n".join(script)], cwd=folder, env=environment(**variables), text=True,
                          capture_output=True, timeout=240)  # fmt: skip
    printed = done.stdout.split("\036")[1:]
    assert done.returncode == 0 and len(printed) == len(expected), done.stdout + done.stderr
    for (command, output), real in zip(expected, printed, strict=True):
        if output is not None:
            problem = differences(output, real)
            assert not problem, f"$ {command}\n{problem}"
    return len(expected)
