"""Each message of docs/troubleshooting.md is provoked, by the package or the command, and is what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import page
import pytest

import ditattn
from ditattn import AttentionMetadata, DiffusionAttentionBackendEnum, attention, get_attn_backend_for_role

PAGE = (page.ROOT / "docs/troubleshooting.md").read_text()
MESSAGES = re.findall(r"^### `(.*)`$", PAGE, re.MULTILINE)
QUERY = np.ones((1, 8, 4, 16), "float32")


def call(query=QUERY, key=QUERY, value=QUERY, metadata=None, **options):
    return lambda folder: attention(query, key, value, metadata=metadata and metadata(), **options)


def masked(shape, dtype=bool):
    """A mask that hides one key from one row."""
    mask = np.ones(shape, dtype)
    mask.flat[0] = 0
    return lambda: AttentionMetadata(attn_mask=mask)


def look_up(path):
    """The class of this path, as that of a member of its own."""
    return DiffusionAttentionBackendEnum.define("OF_" + re.sub(r"\W", "_", path).upper(), path).get_class()


def extra(**options):
    return lambda: AttentionMetadata(extra=options)


def not_built(folder):
    """Whatever this build has: the reason of a module that was left out is a file in its place."""
    (folder / "left_out.not_built").write_text("not built: there was no compiler for it\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITATTN_PLUGIN_PATH", str(folder))
        look_up("left_out.Backend")


def python(program, **environment):
    """What a program in a process of its own ends with."""

    def run(folder):
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, text=True, capture_output=True, timeout=120,
                              env=page.environment(PYTHONPATH=os.environ["PYTHONPATH"], **environment))  # fmt: skip
        raise RuntimeError(done.stdout + done.stderr)

    return run


def command(*arguments, **environment):
    return python(f"import sys, ditattn.__main__ as m; sys.exit(m.main({list(arguments)!r}))", **environment)


def broken_plugin(folder):
    (folder / "acme").mkdir()
    (folder / "acme/broken.so").write_text("no library")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITATTN_PLUGIN_PATH", str(folder))
        look_up("acme.broken.Backend")


def damaged_file(folder):
    (folder / "x.safetensors").write_text("no tensors at all")
    command("compare", "--input", "x.safetensors")(folder)


def defined_twice(folder):
    DiffusionAttentionBackendEnum.define("TWICE", "a.b.C")
    DiffusionAttentionBackendEnum.define("TWICE", "a.b.D")

PROVOKED = {
    # the page's message -> what makes it
    "Unknown diffusion attention backend: '<name>'. Valid options are: <names>":
        lambda folder: DiffusionAttentionBackendEnum["FLASH"],
    "Backend <name> must be registered before use. Use register_diffusion_backend(DiffusionAttentionBackendEnum.<name>, 'your.module.YourClass')":
        lambda folder: DiffusionAttentionBackendEnum["CUSTOM"].get_class(),
    "Class path '<path>' has no dot. Expected 'package.module.Class'.": lambda folder: look_up("Backend"),
    "Class path '<path>' has the bad segment '<segment>'. Segments are letters, digits and underscores, and do not start with a digit: 'package.module.Class'.":
        lambda folder: look_up("acme.2nd.Backend"),
    "Cannot import '<path>': no such module. Looked in: <places>": lambda folder: look_up("acme.nowhere.Backend"),
    "Cannot import '<path>': module failed to load (<reason>). Looked in: <places>": broken_plugin,
    "Cannot import '<path>': not built: <reason>. Looked in: <places>": not_built,
    "Backend <name> is already defined with the path '<path>'; it cannot be defined again with '<path>'. Use register_diffusion_backend to override it.":
        defined_twice,
    "Unknown device '<device>'. Valid devices are: <devices>":
        lambda folder: get_attn_backend_for_role("self", 64, device="npu"),
    "<backend> does not support a mask of kind <kind>. Supported kinds: <kinds>.":
        call(metadata=masked((1, 1, 8, 8)), backend="SAGE_ATTN"),
    "<backend> does not support head_size=<n>. Supported head sizes: <sizes>.":
        call(*3 * [np.ones((1, 8, 1, 300), "float32")], backend="SAGE_ATTN"),
    "<backend> does not support dtype=<dtype>. Supported dtypes: <dtypes>.":
        call(*3 * [QUERY.astype("float64")], backend="FLASH_ATTN"),
    "<backend> was explicitly selected but head_size=<n> is unsupported. Supported head sizes: <sizes>. Select TORCH_SDPA or <another>":
        lambda folder: get_attn_backend_for_role("self", 300, ditattn.AttentionConfig.from_dict({"default": "SAGE_ATTN"})),
    "Query, key, and value must have the same dtype, got <dtype>, <dtype> and <dtype>.": call(key=QUERY.astype("float16")),
    "Key and value must have the same shape, got <shape> and <shape>.": call(value=QUERY[:, :4]),
    "GQA requires query heads to be a multiple of KV heads, got q_heads=<n> and kv_heads=<n>.":
        call(key=QUERY[:, :, :3], value=QUERY[:, :, :3]),
    "<tensor> must have 4 dimensions (batch, tokens, heads, head_size), got shape <shape>.": call(*3 * [QUERY[0]]),
    "<tensor> must have a unit last stride, got strides <strides> for shape <shape>. Make it contiguous first.":
        call(query=QUERY.swapaxes(1, 3).copy().swapaxes(1, 3), backend="FLASH_ATTN"),
    "<mask> of shape <shape> does not broadcast to (batch, heads, queries, keys) = <shape>.<hint>":
        call(metadata=masked((8, 9))),
    "<mask> has dtype <dtype>. Valid dtypes are: bool (true = attend), and float32, float16, bfloat16 (added to the logits).":
        call(metadata=masked((1, 8), "int32")),
    "Incomplete packed FlashAttention metadata; missing [<keys>]": call(metadata=extra(max_seqlen_q=8)),
    "valid_kv_length must be within the K/V sequence, got <n> for length <n>": call(metadata=extra(valid_kv_length=9)),
    "Expected str or dict for <place>, got <type>": lambda folder: ditattn.AttentionConfig.from_dict({"default": 3}),
    "Unknown key '<key>' in AttentionConfig. Valid keys are: default, per_role":
        lambda folder: ditattn.AttentionConfig.from_dict({"defaults": "FLASH_ATTN"}),
    "--diffusion-attention-backend is mutually exclusive with --diffusion-attention-config.default.backend.":
        command("explain", "--shape", "1,1,8,8,8", "--diffusion-attention-backend", "FLASH_ATTN",
                "--diffusion-attention-config", '{"default": "FLASH_ATTN"}'),
    "DITATTN_CPU_LEVEL='<level>' is not a level this CPU has: <levels>.":
        command("list", "--json", DITATTN_CPU_LEVEL="avx1024"),
    "DITATTN_NUM_THREADS='<text>' is not a whole number from 1 to 1024.":
        python("import ditattn; ditattn.num_threads()", DITATTN_NUM_THREADS="many"),
    "Cannot read safetensors file '<file>': no such file.": command("compare", "--input", "nowhere.safetensors"),
    "Cannot read safetensors file '<file>': header length <n> is over the limit of <n> bytes.": damaged_file,
}  # fmt: skip


def pattern(message):
    """A message's regular expression: <placeholders> stand for anything."""
    return re.sub(r"<[a-z]+>", "(?s:.*)", re.escape(message))


@pytest.mark.parametrize("message", PROVOKED)
def test_a_message(message, tmp_path):
    assert message in MESSAGES, "it is not on the page"
    with pytest.raises((ValueError, ImportError, NotImplementedError, TypeError, RuntimeError)) as raised:
        PROVOKED[message](tmp_path)
    assert re.search(pattern(message), " ".join(str(raised.value).split())), str(raised.value)


def test_the_page_has_no_others_and_an_answer_to_each():
    assert MESSAGES == list(PROVOKED)
    for section in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        assert len(section.split("\n", 1)[1].split("\n## ")[0].strip()) > 40, section
