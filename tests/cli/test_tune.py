"""`ditattn tune`: what it measures and keeps, and that other processes choose by it; the commands of docs/tuning.md."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from tensors import load, normal, save

FIELDS = ["machine", "device", "file", "cases"]
CASE_FIELDS = [
    "case", "shape", "num_kv_heads", "dtype", "mask", "causal", "joint", "chosen", "results", "skipped",
]  # fmt: skip
RESULT_FIELDS = ["backend", "engine", "median_ms", "error", "reason"]
EXACT = {"float32": 2e-5, "float16": 1.5e-3, "bfloat16": 6e-3}
SHAPE = "1,2,64,96,40"
BUDGET = ("--budget", "20")
DOCS = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text()


class Tuner:
    """The command with a cache of its own."""

    def __init__(self, command, folder):
        self.command, self.folder = command, folder
        self.env = {"DITATTN_TUNE": "use", "DITATTN_TUNE_CACHE": str(folder)}

    def __call__(self, *args, **env):
        return self.command(*args, env=self.env | env)

    def ok(self, *args, **env):
        return self.command.ok(*args, env=self.env | env)

    def json(self, *args, **env):
        return self.command.json(*args, env=self.env | env)

    def fails(self, status, *args, **env):
        return self.command.fails(status, *args, env=self.env | env)

    def tune(self, *args, **env):
        document = self.json("tune", *args, *BUDGET, **env)
        assert list(document) == FIELDS
        for case in document["cases"]:
            assert list(case) == CASE_FIELDS + ["check"] * ("--check" in args)
            assert all(list(result) == RESULT_FIELDS for result in case["results"])
        return document

    @property
    def file(self):
        (file,) = [path for path in self.folder.iterdir() if path.suffix == ".json"]
        return file

    def rewrite(self, change):
        """The cache with changed results, as if they had been measured so."""
        document = json.loads(self.file.read_text())
        for problem in document["problems"]:
            for result in problem["results"]:
                change(result)
        self.file.write_text(json.dumps(document))


@pytest.fixture
def tuner(ditattn, tmp_path):
    return Tuner(ditattn, tmp_path / "cache")


def make_fastest(name):
    return lambda result: result.update(median_ms=0.001 if result["backend"] == name else 1000.0)


def usable(case):
    return [result for result in case["results"] if result["reason"] is None]


def test_what_is_measured(tuner):
    document = tuner.tune("--shape", SHAPE, "--dtype", "float16")
    assert document["device"] == "cpu" and document["file"] == str(tuner.file)
    (case,) = document["cases"]
    assert (case["case"], case["shape"], case["num_kv_heads"]) == (SHAPE, [1, 2, 64, 96, 40], 2)
    assert (case["dtype"], case["mask"], case["causal"], case["joint"], case["skipped"]) == (
        "float16", "none", False, False, None)  # fmt: skip
    times = [result["median_ms"] for result in usable(case)]
    assert len(times) >= 3 and times == sorted(times) and times[0] > 0
    errors = {result["backend"]: result["error"] for result in usable(case)}
    print(errors)
    assert 0 < errors["FLASH_ATTN"] < EXACT["float16"] and 0 < errors["TORCH_SDPA"] < EXACT["float16"]
    assert EXACT["float16"] < errors["SAGE_ATTN_3"] < 0.5
    assert errors[case["chosen"]] <= EXACT["float16"]


def test_other_processes_choose_by_the_file(tuner, tmp_path):
    query, key, value = normal(np.random.default_rng(1), *[(1, 64, 2, 40)] * 3)
    file = save(tmp_path / "qkv.safetensors", {k: x.astype("float32") for k, x in zip(("query", "key", "value"), (query, key, value))})
    tuner.tune("--input", file)

    def chosen(*args, **env):
        ran = tuner.json("run", "--input", file, "--output", tmp_path / "out.safetensors", *args, **env)
        (case,) = tuner.json("explain", "--shape", "1,2,64,64,40", *args, **env)["cases"]
        assert case["chosen"] == ran["backend"]
        return ran["backend"]

    bounded = ("--diffusion-attention-config", '{"default": {"backend": "auto", "max_error": 0.05}}')
    for name in ("TORCH_SDPA", "FLASH_ATTN"):
        tuner.rewrite(make_fastest(name))
        assert chosen() == name
        assert chosen(DITATTN_TUNE="frozen") == name
        assert chosen(DITATTN_TUNE="off") == "FLASH_ATTN"
    tuner.rewrite(make_fastest("SAGE_ATTN"))
    assert chosen() in ("FLASH_ATTN", "TORCH_SDPA")
    assert chosen(*bounded) == "SAGE_ATTN"
    assert chosen("--backend", "torch_sdpa") == "TORCH_SDPA"
    _, out = load(tmp_path / "out.safetensors")["out"]
    assert out.shape == (1, 64, 2, 40)


def test_list_shows_what_is_kept(tuner):
    assert tuner.json("tune", "--list")["cases"] == []
    tuned = tuner.tune("--shape", SHAPE, "--shape", "1,4,32,32,16", "--model", "PixArt-Sigma@512x512:cross")["cases"]
    listed = tuner.json("tune", "--list")["cases"]
    assert [case["shape"] for case in listed] == [case["shape"] for case in tuned]
    for before, after in zip(tuned, listed):
        assert before["results"] == after["results"] and before["chosen"] == after["chosen"] and after["case"] == ""
    text = tuner.ok("tune", "--list")
    assert f"3 problems in {tuner.file}" in text and tuned[0]["chosen"] in text
    tuner.rewrite(make_fastest("SAGE_ATTN"))
    assert tuner.json("tune", "--list")["cases"][0]["chosen"] != "SAGE_ATTN"
    assert tuner.json("tune", "--list", "--max-error", "0.5")["cases"][0]["chosen"] == "SAGE_ATTN"
    assert {case["chosen"] for case in tuner.json("tune", "--list", "--max-error", "0")["cases"]} == {None}


def test_a_problem_is_kept_once(tuner):
    for _ in range(2):
        tuner.tune("--shape", SHAPE)
    assert len(json.loads(tuner.file.read_text())["problems"]) == 1
    assert sorted(path.name for path in tuner.folder.iterdir()) == [tuner.file.name, tuner.file.name + ".lock"]


def test_captures(tuner, tmp_path):
    rng = np.random.default_rng(2)
    tensors = {}
    for case, rows in (("a/0", 24), ("b/1", 40)):
        for name, x in zip(("query", "key", "value"), normal(rng, (1, rows, 2, 16), (1, 32, 2, 16), (1, 32, 2, 16))):
            tensors[f"{case}.{name}"] = x.astype("float32")
    document = tuner.tune("--input", save(tmp_path / "capture.safetensors", tensors))
    assert [(case["case"].removeprefix("capture/"), case["shape"]) for case in document["cases"]] == [
        ("a/0", [1, 2, 24, 32, 16]), ("b/1", [1, 2, 40, 32, 16])]  # fmt: skip


def test_check_times_the_default(tuner):
    (case,) = tuner.tune("--shape", "1,8,256,256,64", "--check")["cases"]
    check = case["check"]
    print(check)
    assert list(check) == ["auto_ms", "best_ms", "ratio", "best"] and 0 < check["best_ms"] and 0 < check["auto_ms"]
    assert 0.3 < check["ratio"] < 3, "of the fastest to itself, and a look-up"
    assert "auto/best" in tuner.ok("tune", "--shape", SHAPE, "--check", *BUDGET)


def test_only_those_that_are_named(tuner):
    (case,) = tuner.tune("--shape", SHAPE, "--backends", "sage_attn,torch_sdpa")["cases"]
    assert {result["backend"] for result in case["results"]} == {"SAGE_ATTN", "TORCH_SDPA"}
    assert case["chosen"] == "TORCH_SDPA"
    assert "Unknown diffusion attention backend: 'NOPE'" in tuner.fails(2, "tune", "--shape", SHAPE, "--backends", "nope")
    assert "CuDNNAttentionBackend" in tuner.fails(3, "tune", "--shape", SHAPE, "--backends", "flash_attn,cudnn_attn")
    assert "must be registered" in tuner.fails(3, "tune", "--shape", SHAPE, "--backends", "custom")
    assert "has an empty name" in tuner.fails(2, "tune", "--shape", SHAPE, "--backends", "flash_attn,")


def test_what_is_known_of_others_is_kept(tuner):
    (before,) = tuner.tune("--shape", SHAPE)["cases"]
    tuner.rewrite(make_fastest("TORCH_SDPA"))
    (case,) = tuner.tune("--shape", SHAPE, "--backends", "sage_attn,flash_attn")["cases"]
    times = {result["backend"]: result["median_ms"] for result in usable(case)}
    assert set(times) == {result["backend"] for result in usable(before)} and case["chosen"] == "TORCH_SDPA"
    assert times["TORCH_SDPA"] == 0.001 and times["SAGE_ATTN_3"] == 1000
    assert times["SAGE_ATTN"] != 1000 and times["FLASH_ATTN"] != 1000
    assert tuner.json("tune", "--list")["cases"][0]["results"] == case["results"]
    text = tuner.ok("tune", "--shape", SHAPE, "--backends", "flash_attn", *BUDGET)
    assert re.search(r"TORCH_SDPA +0\.001 ", text), text


def problems_of_the_catalogue(ditattn, max_tflop):
    """Shape, heads of K/V and kind of mask of each problem that is no larger, in the order of `ditattn models`."""
    problems = {}
    for model in ditattn.json("models")["models"]:
        for role in model["roles"]:
            batch, heads, rows, keys, size = role["shape"]
            if 4 * batch * heads * rows * keys * size <= max_tflop * 1e12:
                joint = role["joint"] != "none"
                problems[*role["shape"], role["kv_heads"], role["mask"], joint] = None
    return list(problems)


def test_the_catalogue(tuner, ditattn):
    expected = problems_of_the_catalogue(ditattn, 0.001)
    assert 2 < len(expected) < 10
    cases = tuner.tune("--catalogue", "--max-tflop", "0.001", "--backends", "flash_attn")["cases"]
    assert [(*case["shape"], case["num_kv_heads"], case["mask"], case["joint"]) for case in cases] == expected
    for case in cases:
        (result,) = case["results"]
        assert case["chosen"] == "FLASH_ATTN" and result["error"] <= EXACT["float32"] and result["median_ms"] > 0
        assert re.fullmatch(r"[\w./-]+@[\w.]+:[\w.]+", case["case"])
    assert len(tuner.json("tune", "--list")["cases"]) == len(expected)
    (more,) = tuner.tune("--catalogue", "--max-tflop", "0.0003", "--shape", SHAPE, "--backends", "flash_attn")["cases"][1:]
    assert more["case"] in {case["case"] for case in cases}


def test_a_catalogue_that_cannot_be_tuned(tuner, tmp_path):
    small = ("--catalogue", "--max-tflop", "0.0003")
    assert "no such model" in tuner.fails(2, "tune", *small, "--model", "no such model")
    assert "--max-tflop requires --catalogue" in tuner.fails(2, "tune", "--shape", SHAPE, "--max-tflop", "1")
    error = tuner.fails(2, "tune", "--catalogue", "--max-tflop", "1e-9")
    assert "--max-tflop 1e-09 leaves nothing of the catalogue: its smallest problem takes 0.00026 TFLOP" in error
    for wrong in ("-1", "nan", "much"):
        assert "--max-tflop" in tuner.fails(2, "tune", "--catalogue", "--max-tflop", wrong)
    assert not tuner.folder.exists()
    (tmp_path / "file").write_text("x")
    error = tuner.fails(4, "tune", *small, *BUDGET, DITATTN_TUNE_CACHE=str(tmp_path / "file" / "cache"))
    assert "Cannot make the folder" in error and "DITATTN_TUNE_CACHE names another." in error


@pytest.mark.parametrize("arguments, status, text", [
    ((), 2, "Nothing to tune: give --shape B,H,Sq,Skv,D, --model NAME, --input FILE or --catalogue."),
    (("--shape", "1,2,3"), 2, "1,2,3"),
    (("--shape", SHAPE, "--dtype", "int8"), 2, "int8"),
    (("--shape", SHAPE, "--max-error", "-1"), 2, "--max-error"),
    (("--shape", SHAPE, "--max-error", "nan"), 2, "--max-error"),
    (("--shape", SHAPE, "--budget", "-1"), 2, "--budget"),
    (("--shape", SHAPE, "--device", "tpu"), 2, "tpu"),
    (("--model", "no such model"), 2, "no such model"),
    (("--input", "/no/such/file.safetensors"), 4, "/no/such/file.safetensors"),
    (("--list", "--device", "cuda"), 3, "cuda"),
])  # fmt: skip
def test_bad_usage(tuner, arguments, status, text):
    assert text in tuner.fails(status, "tune", *arguments)
    assert not tuner.folder.exists()


def test_what_does_not_fit_is_skipped(tuner):
    document = tuner.tune("--shape", "1,1,2000000000,1,64", "--shape", SHAPE)
    assert "needs" in document["cases"][0]["skipped"] and "GB" in document["cases"][0]["skipped"]
    assert document["cases"][0]["chosen"] is None and document["cases"][1]["chosen"]


def test_a_damaged_file_is_set_aside_with_a_warning(tuner):
    tuner.tune("--shape", SHAPE)
    tuner.file.write_text("{ damaged")
    done = tuner("explain", "--shape", SHAPE)
    assert done.returncode == 0 and done.stderr.count("warning") == 1
    assert "are not used" in done.stderr and f"{tuner.folder}/" in done.stderr and ".set-aside" in done.stderr
    assert tuner("explain", "--shape", SHAPE).stderr == ""
    (case,) = tuner.tune("--shape", SHAPE)["cases"]
    assert case["chosen"]


def test_frozen_measures_and_writes_nothing(tuner):
    tuner.tune("--shape", SHAPE)
    before = {path.name: path.read_bytes() for path in tuner.folder.iterdir()}
    error = tuner.fails(4, "tune", "--shape", SHAPE, DITATTN_TUNE="frozen")
    assert "DITATTN_TUNE is 'frozen': nothing is measured. Unset it to tune." in error
    assert len(tuner.json("tune", "--list", DITATTN_TUNE="frozen")["cases"]) == 1
    assert {path.name: path.read_bytes() for path in tuner.folder.iterdir()} == before


def test_variables_that_are_wrong(tuner, tmp_path):
    assert "DITATTN_TUNE is 'sometimes'" in tuner.fails(4, "tune", "--shape", SHAPE, DITATTN_TUNE="sometimes")
    assert "DITATTN_TUNE_CACHE is 'here'" in tuner.fails(4, "tune", "--list", DITATTN_TUNE_CACHE="here")
    (tmp_path / "file").write_text("x")
    error = tuner.fails(4, "tune", "--shape", SHAPE, *BUDGET, DITATTN_TUNE_CACHE=str(tmp_path / "file" / "cache"))
    assert "Cannot make the folder" in error and "DITATTN_TUNE_CACHE names another." in error
    text = tuner.ok("tune", "--shape", SHAPE, *BUDGET, DITATTN_TUNE_CACHE="", XDG_CACHE_HOME="", HOME="")
    assert "Kept by nobody: there is no cache folder (DITATTN_TUNE_CACHE)." in text


def test_stand_ins_that_are_bad_are_not_chosen(stand_ins, tmp_path):
    tuner = Tuner(stand_ins, tmp_path / "cache")
    (case,) = tuner.tune("--shape", "1,2,16,16,64")["cases"]
    results = {result["backend"]: result for result in case["results"]}
    assert case["chosen"] == "TORCH_SDPA"
    assert results["FLASHINFER_ATTN"]["reason"].endswith("the engine broke down")
    assert results["SAGE_ATTN_3"]["error"] == 1
    assert results["SAGE_ATTN"]["error"] is None  # it writes nothing: NaN
    assert "FLASH_ATTN" not in results and "CUDNN_ATTN" not in results


def commands_of_the_docs():
    blocks = re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL)
    return [shlex.split(line, comments=True)[1:] for block in blocks for line in block.splitlines()]


def test_the_commands_of_the_docs(tuner):
    commands = commands_of_the_docs()
    assert len(commands) == 4
    for arguments in commands:
        text = tuner.ok(*arguments)
        if arguments[:2] == ["tune", "--list"]:
            assert "2 problems in" in text and "H=8 Sq=512 Skv=512 D=64, float32 on cpu" in text
        if "--diffusion-attention-config" in arguments:
            assert "FLASH_ATTN" in text


def test_the_configuration_of_the_docs(tuner):
    (config,) = re.findall(r"```json\n(.*?)```", DOCS, re.DOTALL)
    tuner.tune("--shape", SHAPE)
    tuner.rewrite(make_fastest("SAGE_ATTN"))

    def chosen(*args):
        return tuner.json("explain", "--shape", SHAPE, "--diffusion-attention-config", config, *args)["cases"][0]["chosen"]

    assert chosen() == "SAGE_ATTN" and chosen("--role", "self") == "SAGE_ATTN"
    assert chosen("--role", "self", "--mask", "bool") == "FLASH_ATTN"
    assert chosen("--role", "cross") == "FLASH_ATTN" and chosen("--role", "ltx2.audio_to_video") == "FLASH_ATTN"


def test_the_bounds_of_the_docs():
    numbers = re.search(r"at most ([\d.e-]+) in bfloat16, ([\d.e-]+) in float16 and ([\d.e-]+) in float32", DOCS)
    assert [float(number) for number in numbers.groups()] == [EXACT["bfloat16"], EXACT["float16"], EXACT["float32"]]


def test_the_docs_name_every_flag_and_no_other(ditattn):
    """Those of AttentionConfig are `explain`'s."""
    flags = set(re.findall(r"^  (?:-h,)?(--[a-z-]+)", ditattn.ok("tune", "--help"), re.MULTILINE)) - {"--help"}
    named = set(re.findall(r"--[a-z][a-z-]+", DOCS)) - {"--mask", "--role", "--diffusion-attention-config"}
    assert len(flags) > 10 and named == flags
