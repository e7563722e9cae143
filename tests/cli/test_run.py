"""`ditattn run` against float64 attention in NumPy."""

import numpy as np
import pytest
import safetensors.numpy
from tensors import as_float64, attention, error_bound, load, normal, relative_error, rounded, save

FILE_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
BACKENDS = {"FLASH_ATTN": "bottom-right", "TORCH_SDPA": "top-left"}  # how each aligns causal
SEED = 20240607


def make_inputs(dtype, batch=2, seq_q=65, seq_kv=130, heads=4, kv_heads=4, size=40):
    rng = np.random.default_rng(SEED)
    shapes = [(batch, seq_q, heads, size), (batch, seq_kv, kv_heads, size), (batch, seq_kv, kv_heads, size)]
    return {name: rounded(x, dtype) for name, x in zip(("query", "key", "value"), normal(rng, *shapes))}


def check(ditattn, tmp_path, backend, dtype, inputs, *flags, causal=None, scale=None):
    """Runs, compares `out` within the project's bound and `lse`, returns both and the JSON document."""
    source = save(tmp_path / "in.safetensors", inputs)
    target = tmp_path / "out.safetensors"
    if scale is not None:
        flags += ("--scale", scale)
    if causal is not None:
        flags += ("--causal",)
    document = ditattn.json("run", "--backend", backend, "--input", source, "--output", target, "--lse", *flags)
    results = load(target)
    assert sorted(results) == ["lse", "out"]
    expected, magnitude, expected_lse = attention(
        inputs["query"], inputs["key"], inputs["value"], inputs.get("attn_mask"), causal, scale
    )
    file_type, out = results["out"]
    assert (file_type, out.shape) == (FILE_TYPES[dtype], expected.shape)
    error = relative_error(out, expected, magnitude)
    bound = error_bound(dtype, inputs["query"], inputs["key"], scale)
    print(f"{backend} {dtype} {flags}: error {error:.3e}, bound {bound:.1e}")
    assert error <= bound
    file_type, lse = results["lse"]
    assert (file_type, lse.shape) == ("F32", expected_lse.shape)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)
    return out, lse, document


each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", FILE_TYPES)


@each_backend
@each_dtype
def test_cross_attention(ditattn, tmp_path, backend, dtype):
    _, _, document = check(ditattn, tmp_path, backend, dtype, make_inputs(dtype))
    assert document["backend"] == backend
    assert document["source"] == "--backend"
    assert document["shape"] == [2, 65, 4, 40]
    assert document["dtype"] == dtype
    assert document["output"] == str(tmp_path / "out.safetensors")
    assert document["engine"] and document["ms"] > 0


@each_backend
def test_gqa(ditattn, tmp_path, backend):
    check(ditattn, tmp_path, backend, "float32", make_inputs("float32", kv_heads=2))


@each_backend
@pytest.mark.parametrize("scale", [0.5, -0.25, 0.0])
def test_scale(ditattn, tmp_path, backend, scale):
    check(ditattn, tmp_path, backend, "float32", make_inputs("float32"), scale=scale)


@each_backend
@pytest.mark.parametrize("seq_q, seq_kv", [(64, 64), (33, 70), (70, 33)])
def test_causal(ditattn, tmp_path, backend, seq_q, seq_kv):
    inputs = make_inputs("float32", seq_q=seq_q, seq_kv=seq_kv)
    out, lse, _ = check(ditattn, tmp_path, backend, "float32", inputs, causal=BACKENDS[backend])
    if backend == "FLASH_ATTN" and seq_q > seq_kv:  # bottom-right leaves the first rows without keys
        assert not out[:, : seq_q - seq_kv].any() and np.isneginf(lse[:, :, : seq_q - seq_kv]).all()


def masks():
    rng = np.random.default_rng(SEED + 1)
    lengths = np.arange(130) < np.array([[130], [77]])
    holes = rng.random((2, 130)) < 0.7
    additive = np.where(rng.random((1, 1, 65, 130)) < 0.2, -np.inf, rng.standard_normal((1, 1, 65, 130)))
    return {
        "padding": lengths,
        "padding with holes": holes,
        "boolean per head": rng.random((1, 4, 65, 130)) < 0.5,
        "additive": additive.astype(np.float32),
        "additive per batch and head": rng.standard_normal((2, 4, 1, 130)).astype(np.float16),
    }


@each_backend
@pytest.mark.parametrize("kind", masks())
def test_masks(ditattn, tmp_path, backend, kind):
    inputs = make_inputs("float32") | {"attn_mask": masks()[kind]}
    check(ditattn, tmp_path, backend, "float32", inputs)


@each_backend
def test_causal_and_mask_mean_and(ditattn, tmp_path, backend):
    inputs = make_inputs("float32") | {"attn_mask": masks()["boolean per head"]}
    check(ditattn, tmp_path, backend, "float32", inputs, causal=BACKENDS[backend])


@each_backend
def test_rows_without_keys_and_nan_behind_the_mask(ditattn, tmp_path, backend):
    inputs = make_inputs("float32")
    mask = np.arange(130) < np.array([[100], [0]])
    for name in ("key", "value"):
        inputs[name][0, 100:] = np.nan
        inputs[name][1] = np.inf
    source = save(tmp_path / "in.safetensors", inputs | {"attn_mask": mask})
    target = tmp_path / "out.safetensors"
    ditattn.ok("run", "--backend", backend, "--input", source, "--output", target, "--lse")
    out, lse = load(target)["out"][1], load(target)["lse"][1]
    assert not out[1].any() and np.isneginf(lse[1]).all()
    expected, magnitude, _ = attention(inputs["query"][:1], *(inputs[n][:1, :100] for n in ("key", "value")))
    error = relative_error(out[:1], expected, magnitude)
    print(f"{backend}: error {error:.3e}")
    assert error <= error_bound("float32", inputs["query"][:1], inputs["key"][:1, :100])


# Joint text tokens, packed sequences, valid prefixes.

TEXT = 19


def joint_inputs(dtype="float32", kv_heads=2):
    """Image and text of different lengths, and more text keys than text queries."""
    rng = np.random.default_rng(SEED + 2)
    shapes = [(2, TEXT, 4, 40), (2, TEXT + 3, kv_heads, 40), (2, TEXT + 3, kv_heads, 40)]
    text = {f"joint_{name}": rounded(x, dtype) for name, x in zip(("query", "key", "value"), normal(rng, *shapes))}
    return make_inputs(dtype, kv_heads=kv_heads) | text


def joined(inputs, strategy):
    """query, key, value with the text in front or at the rear, float64."""

    def join(name):
        parts = [as_float64(inputs[name]), as_float64(inputs[f"joint_{name}"])]
        return np.concatenate(parts if strategy == "rear" else parts[::-1], axis=1)

    return [join(name) for name in ("query", "key", "value")]


def run_outputs(ditattn, tmp_path, backend, tensors, *flags):
    """`out` and `lse` as written."""
    source, target = save(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors"
    ditattn.ok("run", "--backend", backend, "--input", source, "--output", target, "--lse", *flags)
    results = load(target)
    return results["out"][1], results["lse"][1]


def check_numbers(what, out, lse, expected, bound):
    """`expected` is what tensors.attention gives."""
    error = relative_error(out, expected[0], expected[1])
    print(f"{what}: error {error:.3e}, bound {bound:.1e}")
    assert out.shape == expected[0].shape and error <= bound
    np.testing.assert_allclose(lse, expected[2], rtol=1e-5, atol=1e-5)


@each_backend
@each_dtype
@pytest.mark.parametrize("flags, strategy", [((), "front"), (("--joint-strategy", "rear"), "rear")])
def test_joint(ditattn, tmp_path, backend, dtype, flags, strategy):
    inputs = joint_inputs(dtype)
    out, lse = run_outputs(ditattn, tmp_path, backend, inputs, *flags)
    query, key, value = joined(inputs, strategy)
    assert out.shape == (2, 65 + TEXT, 4, 40)
    check_numbers(strategy, out, lse, attention(query, key, value), error_bound(dtype, query, key))


@each_backend
@pytest.mark.parametrize("strategy", ["front", "rear"])
@pytest.mark.parametrize("image_mask", [False, True])
def test_joint_with_masks(ditattn, tmp_path, backend, strategy, image_mask):
    """Text padded in its own mask; a missing image mask hides nothing."""
    text = np.arange(TEXT + 3) < np.array([[TEXT + 3], [5]])
    image = np.arange(130) < np.array([[90], [130]]) if image_mask else np.ones((2, 130), bool)
    inputs = joint_inputs()
    tensors = inputs | {"joint_attn_mask": text} | ({"attn_mask": image} if image_mask else {})
    out, lse = run_outputs(ditattn, tmp_path, backend, tensors, "--joint-strategy", strategy)
    query, key, value = joined(inputs, strategy)
    mask = np.concatenate([text, image] if strategy == "front" else [image, text], axis=1)
    check_numbers(strategy, out, lse, attention(query, key, value, mask), error_bound("float32", query, key))


@each_backend
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "stated", [{}, {"max_seqlen_q": np.array(65, np.int64), "max_seqlen_k": np.array([99], np.int32)}]
)
def test_packed_sequences(ditattn, tmp_path, backend, causal, stated):
    """Three sequences in each batch entry, each alone in NumPy; the longest is worked out or stated."""
    inputs = make_inputs("float32")
    q_ends, k_ends = [0, 20, 21, 65], [0, 30, 70, 130]
    offsets = {"cu_seqlens_q": np.array(q_ends, np.int32), "cu_seqlens_k": np.array(k_ends, np.int32)}
    flags = ["--causal"] if causal else []
    out, lse = run_outputs(ditattn, tmp_path, backend, inputs | offsets | stated, *flags)
    parts = []
    for i in range(3):
        q, k = slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1])
        sequence = inputs["query"][:, q], inputs["key"][:, k], inputs["value"][:, k]
        parts.append(attention(*sequence, causal=BACKENDS[backend] if causal else None))
    expected = [np.concatenate(x, axis=axis) for x, axis in zip(zip(*parts), (1, 1, 2))]
    check_numbers("packed", out, lse, expected, error_bound("float32", inputs["query"], inputs["key"]))


@each_backend
@pytest.mark.parametrize("length", [130, 77, 1, 0])
def test_valid_prefix(ditattn, tmp_path, backend, length):
    """What stands behind the prefix never shows."""
    inputs = make_inputs("float32")
    for name in ("key", "value"):
        inputs[name][:, length:] = np.nan
    out, lse = run_outputs(ditattn, tmp_path, backend, inputs, "--valid-kv-length", length)
    if length == 0:
        assert not out.any() and np.isneginf(lse).all()
        return
    query, key, value = inputs["query"], inputs["key"][:, :length], inputs["value"][:, :length]
    check_numbers(length, out, lse, attention(query, key, value), error_bound("float32", query, key))


@each_backend
def test_valid_prefix_before_joint_tokens(ditattn, tmp_path, backend):
    inputs = joint_inputs()
    flags = ["--valid-kv-length", 77, "--joint-strategy", "rear"]
    out, lse = run_outputs(ditattn, tmp_path, backend, inputs, *flags)
    query, key, value = joined(inputs | {name: inputs[name][:, :77] for name in ("key", "value")}, "rear")
    check_numbers("prefix", out, lse, attention(query, key, value), error_bound("float32", query, key))


def test_the_package_reads_what_we_write_and_the_other_way_round(ditattn, tmp_path):
    inputs = make_inputs("float16")
    safetensors.numpy.save_file(inputs, tmp_path / "in.safetensors", metadata={"made by": "the package"})
    target = tmp_path / "out.safetensors"
    ditattn.ok("run", "--backend", "FLASH_ATTN", "--input", tmp_path / "in.safetensors", "--output", target)
    results = safetensors.numpy.load_file(target)
    assert list(results) == ["out"] and results["out"].dtype == np.float16
    expected, magnitude, _ = attention(*inputs.values())
    assert relative_error(results["out"], expected, magnitude) <= 3.5e-4


@pytest.fixture
def paths(tmp_path):
    return "--input", save(tmp_path / "in.safetensors", make_inputs("float32")), "--output", tmp_path / "out"


def test_default_backend(ditattn, paths):
    document = ditattn.json("run", *paths)
    assert (document["backend"], document["source"]) == ("FLASH_ATTN", "platform default")


@pytest.mark.parametrize("name", ["TORCH_SDPA", "torch_sdpa", "Torch_Sdpa"])
def test_backend_from_the_environment(ditattn, paths, name):
    document = ditattn.json("run", *paths, env={"DIFFUSION_ATTENTION_BACKEND": name})
    assert (document["backend"], document["source"]) == ("TORCH_SDPA", "attention_config.default (DIFFUSION_ATTENTION_BACKEND)")


@pytest.mark.parametrize("name", ["", "auto", "AUTO"])
def test_environment_may_leave_it_open(ditattn, paths, name):
    document = ditattn.json("run", *paths, env={"DIFFUSION_ATTENTION_BACKEND": name})
    assert document["source"] == "platform default"


def test_flag_wins_over_environment(ditattn, paths):
    document = ditattn.json("run", *paths, "--backend", "flash_attn", env={"DIFFUSION_ATTENTION_BACKEND": "TORCH_SDPA"})
    assert document["backend"] == "FLASH_ATTN"


def test_default_passes_over_a_broken_backend(stand_ins, paths):
    """The platform's first choice is broken there: a default moves on, and says so when asked to be talkative."""
    assert stand_ins.json("run", *paths)["backend"] == "TORCH_SDPA"
    talkative = stand_ins("-v", "run", *paths)
    assert "Platform default passes over FLASH_ATTN" in talkative.stderr


def test_text_output(ditattn, paths):
    assert "out (2, 65, 4, 40) float32 by FLASH_ATTN" in ditattn.ok("run", *paths)


def test_unused_tensors_are_told(ditattn, tmp_path):
    source = save(tmp_path / "in", make_inputs("float32") | {"atn_mask": np.ones((2, 130), bool)})
    done = ditattn("run", "--input", source, "--output", tmp_path / "out")
    assert done.returncode == 0 and "'atn_mask' is not used" in done.stderr


def test_an_existing_output_is_replaced(ditattn, paths):
    paths[-1].write_bytes(b"old")
    ditattn.ok("run", *paths)
    assert list(load(paths[-1])) == ["out"]
    assert {file.name for file in paths[-1].parent.iterdir()} == {"in.safetensors", "out"}


def test_guard(ditattn, paths):
    document = ditattn.json("run", "--guard", *paths)
    (seen,) = document["guard"]["layers"]
    assert document["guard"]["failures"] == 0 and seen["checks"] == 1
    assert 0 < seen["worst"]["error"] < seen["worst"]["bound"]
    assert "FLASH_ATTN" in ditattn.ok("run", "--guard", *paths).splitlines()[-1]


def test_guard_finds_what_is_too_far(ditattn, paths):
    result = ditattn("run", "--backend", "SAGE_ATTN", "--guard", *paths)
    assert result.returncode == 5 and "SAGE_ATTN" in result.stdout
    assert ditattn("run", "--backend", "SAGE_ATTN", "--guard", "--max-error", "0.5", *paths).returncode == 0
    assert ditattn("run", "--max-error", "0.5", *paths).returncode == 2
