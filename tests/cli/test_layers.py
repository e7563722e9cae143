"""`ditattn compare` over captures: tables by layer and level, computed again in NumPy."""

import math
import re

import numpy as np
import pytest
from tensors import attention, load, normal, relative_error, rounded, save

LAYERS = ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
TIMESTEPS = {0: 999.0, 10: 750.5, 20: 300.0}
OUTLIERS = "blocks.1.attn"
BACKENDS = ["FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3"]


def model_tensors(rng, layer, step, size=64):
    """One layer has channels of Q and K whose products cancel, and rows of V far larger than the others: 8 bits for all
    of a block leave few for the rest."""
    query, key, value = (rounded(x, "float32") for x in normal(rng, *[(1, 80, 2, size)] * 3))
    if layer == OUTLIERS:
        query[..., 7] *= 40 + step
        key[..., 5] *= 60
        value[:, ::7] *= 100
    return {"query": query, "key": key, "value": value}


def make_cases(seed=11):
    rng = np.random.default_rng(seed)
    return {(step, layer): model_tensors(rng, layer, step) for step in TIMESTEPS for layer in LAYERS}


def save_capture(path, cases, timesteps=True):
    tensors, texts = {}, {}
    for (step, layer), case in cases.items():
        name = f"step{step:06d}/{layer}"
        tensors |= {f"{name}.{what}": tensor for what, tensor in case.items()}
        texts[f"{name}.layer"] = layer
        if timesteps:
            texts[f"{name}.timestep"] = repr(TIMESTEPS[step])
    return save(path, tensors, texts)


def geometric_mean(numbers):
    return math.exp(sum(map(math.log, numbers)) / len(numbers))


def results_of(row):
    return {entry["backend"]: entry for entry in row["results"]}


def worst_errors(ditattn, folder, cases, backend, env):
    """Each case's error, from what `run` writes, in NumPy."""
    errors = {}
    for place, tensors in cases.items():
        source, target = save(folder / "in.safetensors", tensors), folder / "out.safetensors"
        ditattn.ok("run", "--backend", backend, "--input", source, "--output", target, env=env)
        expected, magnitude, _ = attention(**tensors)
        errors[place] = relative_error(load(target)["out"][1], expected, magnitude)
    return errors


def test_errors_by_layer_and_level(ditattn, tmp_path):
    cases = make_cases()
    source = save_capture(tmp_path / "qkv.safetensors", cases)
    # A level that is forced is used whole: processes choose alike.
    env = {"DITATTN_CPU_LEVEL": ditattn.json("doctor")["machine"]["best_cpu_level"]}
    document = ditattn.json("compare", "--input", source, "--repeats", "2", env=env)
    assert list(document) == ["machine", "cases", "summary"]
    summary = document["summary"]
    assert (summary["tolerance"], summary["tolerance_given"]) == (1e-2, False)
    assert [row["layer"] for row in summary["layers"]] == LAYERS
    assert [row["level"] for row in summary["levels"]] == ["t=999", "t=750.5", "t=300"]
    for backend in BACKENDS:
        errors = worst_errors(ditattn, tmp_path, cases, backend, env)
        for axis, rows, names in ((1, "layers", LAYERS), (0, "levels", list(TIMESTEPS))):
            for row, name in zip(summary[rows], names):
                entry = results_of(row)[backend]
                worst = max(error for place, error in errors.items() if place[axis] == name)
                print(f"{backend} {name}: {entry['worst_rel_l2']:.3e}")
                assert math.isclose(entry["worst_rel_l2"], worst, rel_tol=1e-6)
                assert entry["within"] == (worst <= 1e-2) and entry["missing"] == 0
                assert entry["cases"] == len(TIMESTEPS if rows == "layers" else LAYERS)
    sage = {row["layer"]: results_of(row)["SAGE_ATTN"]["worst_rel_l2"] for row in summary["layers"]}
    assert sage[OUTLIERS] > 10 * max(sage[layer] for layer in LAYERS if layer != OUTLIERS)


def test_speeds_are_against_the_fastest_exact_one(ditattn, tmp_path):
    source = save_capture(tmp_path / "qkv.safetensors", make_cases())
    document = ditattn.json("compare", "--input", source, "--repeats", "2")
    times = {case["case"]: {e["backend"]: e["median_ms"] for e in case["results"]} for case in document["cases"]}
    for rows, key in (("layers", "layer"), ("levels", "level")):
        for row in document["summary"][rows]:
            mine = [t for name, t in times.items() if level_or_layer(name, key) == row[key]]
            for backend, entry in results_of(row).items():
                speeds = [min(t["FLASH_ATTN"], t["TORCH_SDPA"]) / t[backend] for t in mine]
                assert math.isclose(entry["relative_speed"], geometric_mean(speeds), rel_tol=1e-9)


def level_or_layer(name, key):
    step, layer = re.fullmatch(r"qkv/step(\d+)/(.*)", name).groups()
    return layer if key == "layer" else f"t={TIMESTEPS[int(step)]:g}"


def test_which_layers_tolerate_what(ditattn, tmp_path):
    source = save_capture(tmp_path / "qkv.safetensors", make_cases())
    for arguments, tolerance in (([], 1e-2), (["--max-error", "1e-4"], 1e-4), (["--max-error", "5"], 5)):
        summary = ditattn.json("compare", "--input", source, "--repeats", "1", *arguments)["summary"]
        assert (summary["tolerance"], summary["tolerance_given"]) == (tolerance, bool(arguments))
        assert [verdict["backend"] for verdict in summary["verdicts"]] == ["SAGE_ATTN", "SAGE_ATTN_3"]
        for verdict in summary["verdicts"]:
            worst = {row["layer"]: results_of(row)[verdict["backend"]]["worst_rel_l2"] for row in summary["layers"]}
            order = sorted(LAYERS, key=lambda layer: -worst[layer])
            assert verdict["beyond"] == [layer for layer in order if worst[layer] > tolerance]
            assert verdict["within"] == [layer for layer in order if worst[layer] <= tolerance]
            assert (verdict["relative_speed"] is None) == (not verdict["within"])


def test_tables_for_people(ditattn, tmp_path):
    source = save_capture(tmp_path / "qkv.safetensors", make_cases())
    text = ditattn.ok("compare", "--input", source, "--repeats", "1")
    lines = text.splitlines()
    assert "9 recorded cases; --all-cases, --json and --report show each" in lines and "max abs error" not in text
    header = next(line.split() for line in lines if line.startswith("layer "))
    assert header == ["layer", *BACKENDS]
    rows = {line.split()[0]: re.split(r"  +", line) for line in lines if line.startswith(("blocks.", "t="))}
    assert list(rows) == [*LAYERS, "t=999", "t=750.5", "t=300"]
    for name in LAYERS:
        cells = dict(zip(header, rows[name]))
        assert re.fullmatch(r"\d\.\de-0\d \d+\.\d\d×", cells["FLASH_ATTN"]), cells
        assert cells["SAGE_ATTN"].endswith(" over") == (name == OUTLIERS)
    assert any(line.startswith("SAGE_ATTN stays within 1.0e-02 in 2 of 3 layers, ") for line in lines)
    assert any(re.fullmatch(rf"  beyond: {OUTLIERS} \(.* at t=.*\)", line) for line in lines)
    every = ditattn.ok("compare", "--input", source, "--repeats", "1", "--all-cases", "--shape", "1,1,4,4,8")
    assert every.count("max abs error") == 10 and "--all-cases" not in every
    mixed = ditattn.ok("compare", "--input", source, "--repeats", "1", "--shape", "1,1,4,4,8")
    assert mixed.count("max abs error") == 1 and "\n1,1,4,4,8: " in mixed


def test_few_cases_have_tables_of_their_own_too(ditattn):
    """The shipped capture: one layer, four noise levels that its names tell."""
    text = ditattn.ok("compare", "--repeats", "1")
    assert text.count("max abs error") == 4 and "\nlevel " in text and "\nlayer " not in text
    assert re.findall(r"^(t=\S+)", text, re.MULTILINE) == ["t=0.05", "t=0.35", "t=0.65", "t=0.95"]


def test_without_noise_levels_steps_stand_for_them(ditattn, tmp_path):
    cases = make_cases()
    first = save_capture(tmp_path / "one.safetensors", cases, timesteps=False)
    second = save_capture(tmp_path / "two.safetensors", {(0, LAYERS[0]): cases[0, LAYERS[0]]}, timesteps=False)
    arguments = ["--backends", "FLASH_ATTN", "--repeats", "1"]
    summary = ditattn.json("compare", "--input", first, "--input", second, *arguments)["summary"]
    assert [row["level"] for row in summary["levels"]] == ["step 0", "step 10", "step 20"]
    assert [row["layer"] for row in summary["layers"]] == [*(f"one/{layer}" for layer in LAYERS), f"two/{LAYERS[0]}"]
    assert summary["verdicts"] == []
    assert "All back ends that ran are exact here" in ditattn.ok("compare", "--input", first, *arguments)


def test_what_a_backend_refuses_or_breaks_is_counted(stand_ins, tmp_path):
    """SAGE_ATTN of the stand-ins gives NaN; FLASHINFER_ATTN refuses a head size of 16."""
    rng = np.random.default_rng(0)
    cases = {(0, layer): model_tensors(rng, layer, 0, size) for layer, size in zip(LAYERS, (16, 64, 16))}
    source = save_capture(tmp_path / "qkv.safetensors", cases)
    document = stand_ins.json("compare", "--input", source, "--repeats", "1")
    rows = [results_of(row) for row in document["summary"]["layers"]]
    assert [row["FLASHINFER_ATTN"]["cases"] for row in rows] == [0, 0, 0]  # it breaks down at 64
    assert all(row["SAGE_ATTN"]["worst_rel_l2"] is None and not row["SAGE_ATTN"]["within"] for row in rows)
    (verdict,) = [v for v in document["summary"]["verdicts"] if v["backend"] == "SAGE_ATTN"]
    assert sorted(verdict["beyond"]) == LAYERS
    text = stand_ins.ok("compare", "--input", source, "--repeats", "1")
    assert re.search(r"^blocks\.0\.attn .*nan .*over .*refused$", text, re.MULTILINE), text


@pytest.mark.parametrize("timestep", ["soon", "[1]", ""])
def test_a_malformed_timestep_is_refused(ditattn, tmp_path, timestep):
    case = {f"a.{what}": tensor for what, tensor in model_tensors(np.random.default_rng(0), "a", 0).items()}
    source = save(tmp_path / "in.safetensors", case, {"a.timestep": timestep})
    assert f"timestep='{timestep}', expected a number" in ditattn.fails(4, "compare", "--input", source)


def test_two_calls_of_a_step_share_its_row(ditattn, tmp_path):
    """Names that no capture of ours makes are layers of no level."""
    tensors = model_tensors(np.random.default_rng(0), "a", 0)
    names = ["step000001/a", "step000001/a#2", "x" * 5000, "step/b", "c t=nan"]
    source = save(tmp_path / "in", {f"{name}.{what}": x for name in names for what, x in tensors.items()})
    summary = ditattn.json("compare", "--input", source, "--backends", "FLASH_ATTN", "--repeats", "1")["summary"]
    assert [row["layer"] for row in summary["layers"]] == ["c t=nan", "step/b", "a", "a#2", "x" * 5000]
    assert [row["level"] for row in summary["levels"]] == ["step 1"]
