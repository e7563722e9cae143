"""Every program and library of an installed tree, as its ELF headers describe it, and the memory of a process that uses
all CPU back ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from test_install import BUILD, LIBDIR, SOURCE, clean_environment, prefix  # noqa: F401  (a fixture)

NOT_OURS = {"libtvm_ffi.so"}  # a copy of the package's
HARDENED = os.environ["DITATTN_TEST_HARDENING"] == "ON"
PF_X, PF_W = 1, 2


class Elf:
    """What of an ELF file matters here."""

    def __init__(self, path):
        self.path = path
        with path.open("rb") as stream:
            elf = ELFFile(stream)
            self.type = elf["e_type"]
            self.flags = {}  # of segments, by type; the loaded ones in a list
            self.loaded = []
            for segment in elf.iter_segments():
                self.flags[segment["p_type"]] = segment["p_flags"]
                if segment["p_type"] == "PT_LOAD":
                    self.loaded.append(segment["p_flags"])
            self.tags = {}
            for section in elf.iter_sections():
                if isinstance(section, DynamicSection):
                    for tag in section.iter_tags():
                        name = tag.entry.d_tag
                        text = tag.runpath if name == "DT_RUNPATH" else tag.rpath if name == "DT_RPATH" else None
                        self.tags[name] = tag.entry.d_val if text is None else text

    @property
    def binds_now(self):
        return "DT_BIND_NOW" in self.tags or bool(self.tags.get("DT_FLAGS", 0) & 8 or self.tags.get("DT_FLAGS_1", 0) & 1)

    @property
    def has_text_relocations(self):
        return "DT_TEXTREL" in self.tags or bool(self.tags.get("DT_FLAGS", 0) & 4)


def weaknesses(elf):
    """What an attacker would like about it."""
    found = []
    if elf.type != "ET_DYN":
        found.append(f"{elf.type}: no position-independent code")
    if "PT_GNU_RELRO" not in elf.flags or not elf.binds_now:
        found.append("relocations stay writable")
    if elf.flags.get("PT_GNU_STACK", PF_X) & PF_X:
        found.append("executable stack")
    if elf.has_text_relocations:
        found.append("text relocations")
    if any(flags & PF_X and flags & PF_W for flags in elf.loaded):
        found.append("a segment writable and executable")
    for tag in ("DT_RPATH", "DT_RUNPATH"):
        outside = [entry for entry in elf.tags.get(tag, "").split(":") if entry and not entry.startswith("$ORIGIN")]
        if outside:
            found.append(f"{tag} {outside}")
    return found


@pytest.fixture(scope="module")
def elves(prefix):  # noqa: F811
    files = [file for file in sorted(prefix.rglob("*")) if file.is_file() and not file.is_symlink()]
    found = [Elf(file) for file in files if file.read_bytes()[:4] == b"\x7fELF"]
    assert {"ditattn", "libditattn", "libditattn_command", "flash_attn"} <= {elf.path.name.split(".")[0] for elf in found}
    return found


@pytest.mark.skipif(not HARDENED, reason="configured with DITATTN_HARDENING=OFF")
def test_every_file_is_hardened(elves):
    found = {elf.path.name: weaknesses(elf) for elf in elves if elf.path.name not in NOT_OURS}
    assert not {name: what for name, what in found.items() if what}
    print(f"{len(found)} files")


def test_the_check_sees_what_is_weak(tmp_path):
    """Files linked without each protection: the check above can fail."""
    source = tmp_path / "weak.cpp"
    source.write_text("int main() { return 0; }\n")
    compiler = os.environ["DITATTN_TEST_COMPILER"]
    for flags, words in [
        (["-no-pie"], "ET_EXEC"), (["-pie", "-Wl,-z,lazy"], "stay writable"), (["-pie", "-Wl,-z,norelro"], "stay writable"),
        (["-pie", "-Wl,-z,execstack"], "executable stack"), (["-pie", "-Wl,-rpath,/tmp/lib"], "/tmp/lib"),
        (["-shared", "-nostdlib", "-Wl,-N"], "writable and executable"),
    ]:  # fmt: skip
        program = tmp_path / "weak"
        subprocess.run([compiler, "-fPIC", source, "-o", program, *flags], check=True)
        assert any(words in weakness for weakness in weaknesses(Elf(program))), (flags, weaknesses(Elf(program)))


def test_no_file_names_where_it_was_built(elves):
    """The same tree gives the same files wherever it lies."""
    places = [str(place).encode() for place in (SOURCE, BUILD)]
    for elf in elves:
        content = elf.path.read_bytes()
        assert not [place for place in places if place in content], elf.path


PROGRAM = """
import numpy as np, ditattn
q, k, v = (np.random.default_rng(1).standard_normal((1, 40, 2, 64)).astype("float32") for _ in "qkv")
ran = []
for member in ditattn.DiffusionAttentionBackendEnum:
    try:
        impl = member.get_class().get_impl_cls()(num_heads=2, head_size=64)
        impl.forward(q, k, v)
    except (ImportError, ValueError, NotImplementedError):
        continue
    ran.append(member.name)
print(*ran)
print(open("/proc/self/maps").read(), end="")
"""


def test_no_memory_is_writable_and_executable(prefix, tmp_path):  # noqa: F811
    package = prefix / LIBDIR / "python"
    if not package.is_dir():
        pytest.skip("built without the Python package")
    environment = clean_environment(PYTHONPATH=str(package), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ran, _, maps = done.stdout.partition("\n")
    assert {"FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3"} <= set(ran.split()), ran
    permissions = [line.split()[1] for line in maps.splitlines()]
    assert len(permissions) > 20 and "r-xp" in permissions
    assert not [line for line in maps.splitlines() if "w" in line.split()[1] and "x" in line.split()[1]]
