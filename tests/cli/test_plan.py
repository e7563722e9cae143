"""`ditattn plan`: what it prints, what its figures change, what it refuses, and predictions beside measured times."""

import json
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = json.loads((ROOT / "src/planner/figures.json").read_text())
MESH_FIELDS = [
    "mesh", "ulysses", "ring", "allgather", "ms", "speed", "attention_ms", "copying_ms", "exchange_ms", "sent_bytes",
    "workspace_bytes", "tensor_bytes", "notes",
]  # fmt: skip
WAN = "Wan2.1-T2V-14B@720p:self"


def only_problem(document):
    (problem,) = document["problems"]
    return problem


def by_mesh(problem):
    return {mesh["mesh"]: mesh for mesh in problem["meshes"]}


def test_document(ditattn):
    document = ditattn.json("plan", "--model", WAN)
    assert list(document) == ["gpus", "gpu", "backend", "link", "gpus_per_node", "figures", "problems"]
    assert (document["gpus"], document["link"], document["gpus_per_node"]) == (8, "nvlink", 8)
    problem = only_problem(document)
    assert problem["problem"] == WAN and problem["shape"] == [1, 40, 75600, 75600, 128]
    meshes = problem["meshes"]
    assert all(list(mesh) == MESH_FIELDS for mesh in meshes)
    assert sorted((m["ulysses"], m["ring"], m["allgather"]) for m in meshes) == [
        (1, 1, 8), (1, 8, 1), (2, 1, 4), (2, 4, 1), (4, 1, 2), (4, 2, 1), (8, 1, 1)]  # fmt: skip
    assert [m["ms"] for m in meshes] == sorted(m["ms"] for m in meshes)
    for mesh in meshes:
        assert mesh["ms"] == pytest.approx(mesh["attention_ms"] + mesh["copying_ms"] + mesh["exchange_ms"])
        assert mesh["speed"] == pytest.approx(problem["one_gpu_ms"] / mesh["ms"])
    assert problem["why"].startswith(f"{meshes[0]['mesh']}: ") and meshes[1]["mesh"] in problem["why"]
    sources = {entry["source"] for entry in document["figures"]}
    assert sources == {FIGURES["gpus"][0]["source"], FIGURES["gpus"][0]["kernels"][0]["source"],
                       FIGURES["links"][0]["source"]}  # fmt: skip


def test_bytes_by_hand(ditattn):
    """Of 75,600 tokens a rank has 9,450, 40 heads of 128 numbers of two bytes."""
    meshes = by_mesh(only_problem(ditattn.json("plan", "--model", WAN)))
    head = 9450 * 128 * 2
    assert meshes["ulysses=8"]["sent_bytes"] == 4 * head * 35  # query, key, value, result; 35 heads are others'
    assert meshes["ring=8"]["sent_bytes"] == 7 * 2 * head * 40
    assert all(mesh["tensor_bytes"] == 4 * head * 40 for mesh in meshes.values())


def test_short_names(ditattn):
    names = json.loads((ROOT / "src/models/models.json").read_text())["short_names"]
    assert names["wan14b-720p"] == WAN
    for short, full in names.items():
        document = ditattn.json("plan", "--model", short.upper())
        assert document == ditattn.json("plan", "--model", full) and only_problem(document)["problem"] == full


def test_the_page_shows_what_is_printed(ditattn):
    page = (ROOT / "docs/planning.md").read_text()
    command, shown = page.split("```\n$ ditattn ", 1)[1].split("```", 1)[0].split("\n", 1)
    assert shown == ditattn.ok(*command.split())


def test_joint_text_and_shared_heads(ditattn):
    problem = only_problem(ditattn.json("plan", "--model", "FLUX.1-dev@1024x1024", "--gpus", 2))
    assert problem["joint_tokens"] == 512
    problem = only_problem(ditattn.json("plan", "--shape", "1,8,4096,4096,64", "--kv-heads", 2, "--gpus", 4))
    assert by_mesh(problem)["ulysses=4"]["notes"] == ["2 K/V heads sent as 4"]
    problem = only_problem(ditattn.json("plan", "--shape", "1,6,4096,4096,64", "--gpus", 4, "--causal"))
    assert "heads uneven: 2 on the slowest ranks, 1.5 on average" in by_mesh(problem)["ulysses=4"]["notes"]
    assert "causal: the last ranks have most to do" in by_mesh(problem)["ring=4"]["notes"]


def test_nodes(ditattn):
    document = ditattn.json("plan", "--model", WAN, "--gpus", 16, "--link", "ib")
    assert document["gpus_per_node"] == 8 and len(document["figures"]) == 4
    assert only_problem(document)["meshes"][0]["ulysses"] <= 8
    apart = ditattn.json("plan", "--model", WAN, "--gpus", 8, "--link", "ib")
    assert apart["gpus_per_node"] == 1
    inside = ditattn.json("plan", "--model", WAN, "--gpus", 8, "--link", "ib", "--gpus-per-node", 8)
    near = ditattn.json("plan", "--model", WAN, "--gpus", 8)
    times = [{name: m["ms"] for name, m in by_mesh(only_problem(d)).items()} for d in (apart, inside, near)]
    assert times[1] == times[2] and all(times[0][name] > times[2][name] for name in times[2])


def test_table(ditattn):
    text = ditattn.ok("plan", "--shape", "1,24,4608,4608,128", "--gpus", 2)
    lines = text.splitlines()
    assert lines[0] == ("1,24,4608,4608,128: B=1 H=24 Sq=4608 Skv=4608 D=128, bfloat16; 2 H200 with FLASH_ATTN, "
                        "joined by nvlink")  # fmt: skip
    assert {line.split()[0] for line in lines[2:5]} == {"ulysses=2", "ring=2", "allgather=2"}
    assert "Predicted, not measured" in text and FIGURES["links"][0]["source"] in text
    slow = ditattn.ok("plan", "--shape", "1,2,64,64,64", "--gpus", 2)
    assert "no mesh comes to" in slow  # one GPU is faster


def test_other_figures(ditattn, tmp_path):
    """A link ten times as fast: what nothing hides is a tenth, but for latencies, which stay."""
    changed = json.loads(json.dumps(FIGURES))
    changed["links"][0]["gb_per_s"] *= 10
    file = tmp_path / "figures.json"
    file.write_text(json.dumps(changed))
    before = by_mesh(only_problem(ditattn.json("plan", "--model", WAN)))["ulysses=8"]
    after = by_mesh(only_problem(ditattn.json("plan", "--model", WAN, "--figures", file)))["ulysses=8"]
    latencies = 2e-3 * FIGURES["links"][0]["latency_us"]
    assert (before["exchange_ms"] - latencies) / (after["exchange_ms"] - latencies) == pytest.approx(10)
    assert before["attention_ms"] == after["attention_ms"]


def test_check(ditattn, tmp_path):
    lines = [
        {"gpus": 1, "mesh": "", "shape": "1,40,75600,75600,128", "ms": 163},
        {"gpus": 8, "mesh": "ulysses=8", "shape": "1,40,75600,75600,128", "ms": 25},
        {"gpus": 2, "mesh": "ring=2", "shape": "1,8,4096,4096,64", "ms": 1, "kv_heads": 2, "causal": True, "link": "ib"},
    ]
    file = tmp_path / "times.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    checks = ditattn.json("plan", "--check", file)["checks"]
    problem = only_problem(ditattn.json("plan", "--model", WAN))
    assert [check["predicted_ms"] for check in checks[:2]] == [problem["one_gpu_ms"], by_mesh(problem)["ulysses=8"]["ms"]]
    assert all(check["ratio"] == pytest.approx(check["predicted_ms"] / check["measured_ms"]) for check in checks)
    text = ditattn.ok("plan", "--check", file).splitlines()
    assert text[0].split()[:3] == ["GPUs", "mesh", "shape"] and text[2].split()[:2] == ["8", "ulysses=8"]


def test_the_page_compares_with_what_was_measured(ditattn, tmp_path):
    """The tables of docs/planning.md, of one GPU and of several, from the measured times they name."""
    page = (ROOT / "docs/planning.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| (1 rank|\w+=[^|]*) \| \d", line)]
    meshes = [row[0] for row in rows]
    assert meshes.count("1 rank") >= 12 and {"ulysses=2", "ring=2", "allgather=2"} <= set(meshes)
    file = tmp_path / "times.jsonl"
    lines = []
    for mesh, shape, measured, _, _ in rows:
        lines.append({"gpus": math.prod(map(int, re.findall(r"=(\d+)", mesh))), "mesh": "" if mesh == "1 rank" else mesh,
                      "shape": shape.removesuffix(", causal"), "ms": float(measured),
                      "causal": shape.endswith(", causal")})  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)))
    for row, check in zip(rows, ditattn.json("plan", "--check", file)["checks"]):
        assert (f"{check['predicted_ms']:.4g}", f"{check['ratio']:.2f}") == (row[3], row[4]), row
        is_long = int(row[1].split(",")[2]) > 30000
        assert row[0] == "1 rank" or (0.94 if is_long else 0.9) < check["ratio"] < (1.06 if is_long else 1.2), row


SHAPE = ["--shape", "1,8,64,64,64"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--shape B,H,Sq,Skv,D or --model NAME"),
        (["--model", "none"], "Unknown model: 'none'. Valid models are: FLUX.1-dev"),
        (["--model", "FLUX.1-dev@8x8"], "no resolution '8x8'"),
        (["--shape", "1,2,3"], "expected 5"),
        ([*SHAPE, "--gpus", "0"], "0 GPUs: there must be 1 to 1024"),
        ([*SHAPE, "--gpus", "2000"], "2000 GPUs: there must be 1 to 1024"),
        ([*SHAPE, "--link", "wifi"], "'wifi'. There are figures of: nvlink, ib"),
        ([*SHAPE, "--gpus", "9"], "nvlink joins the 8 GPUs of a node, not 9"),
        ([*SHAPE, "--gpus-per-node", "0"], "0 GPUs per node"),
        ([*SHAPE, "--gpu", "B200"], "'B200'. There are figures of: H200"),
        ([*SHAPE, "--backend", "NONE"], "'NONE'. There are figures of: FLASH_ATTN"),
        ([*SHAPE, "--kv-heads", "3"], "8 heads, 3 K/V heads"),
    ],
)
def test_refusals(ditattn, arguments, words):
    assert words in ditattn.fails(2, "plan", *arguments)


@pytest.mark.parametrize(
    "flag, content, words",
    [
        ("--figures", None, "Cannot read"),
        ("--figures", "{", "not JSON"),
        ("--figures", json.dumps({**FIGURES, "node_link": "x"}), "node_link 'x'"),
        ("--check", None, "Cannot read"),
        ("--check", "{}", "line 1: no field 'gpus'"),
        ("--check", '\n{"gpus": 2, "mesh": "ring=3", "shape": "1,1,8,8,8", "ms": 1}', "line 2: 'ring=3' is no mesh of 2"),
        ("--check", '{"gpus": 2, "mesh": "ring=2", "shape": "1,1,8,8,8", "ms": 0}', "a time of 0 ms"),
        ("--check", '{"gpus": 2, "mesh": "ring=2", "shape": "1,1,8,8,8", "ms": 1, "us": 1}', "unknown field 'us'"),
        ("--check", '{"gpus": "2", "mesh": "ring=2", "shape": "1,1,8,8,8", "ms": 1}', "line 1"),
        ("--check", "[]", "line 1"),
    ],
)
def test_broken_files(ditattn, tmp_path, flag, content, words):
    file = tmp_path / "file"
    if content is not None:
        file.write_text(content)
    assert words in ditattn.fails(4, "plan", *SHAPE, flag, file)
