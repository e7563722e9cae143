"""`ditattn models`, and `ditattn compare --model`, against the catalogue's own file."""

import json
from pathlib import Path

import pytest

CATALOGUE = json.loads((Path(__file__).parents[2] / "src/models/models.json").read_text())["models"]
FIELDS = [
    "name", "family", "hidden_size", "guidance", "layout", "text_at_most", "verified", "unverified", "arithmetic",
    "source", "notes", "resolutions", "roles",
]  # fmt: skip
ROLE_FIELDS = [
    "role", "category", "resolution", "shape", "kv_heads", "layers", "mask", "mask_note", "joint", "joint_tokens",
]  # fmt: skip


def expected_rows():
    """(model, resolution, role) → shape and joint tokens, from the file."""
    rows = {}
    for model in CATALOGUE:
        for resolution in model["resolutions"]:
            for role in model["roles"]:
                seq_q, seq_kv = resolution["lengths"][role["role"]]
                shape = [model["batch"], role["heads"], seq_q, seq_kv, role["head_size"]]
                joint = sum(model["context"]["text"]) if role["joint"] != "none" else 0
                rows[model["name"], resolution["name"], role["role"]] = (shape, role, joint)
    return rows


def test_json_has_every_problem(ditattn):
    document = ditattn.json("models")
    assert list(document) == ["models"]
    assert [model["name"] for model in document["models"]] == [model["name"] for model in CATALOGUE]
    expected = expected_rows()
    for model, written in zip(document["models"], CATALOGUE):
        assert list(model) == FIELDS
        assert all(model[field] == written[field] for field in ("family", "guidance", "layout", "source", "verified"))
        assert (model["unverified"] == "") == model["verified"]
        assert [size["name"] for size in model["resolutions"]] == [size["name"] for size in written["resolutions"]]
        for role in model["roles"]:
            assert list(role) == ROLE_FIELDS
            shape, source, joint = expected.pop((model["name"], role["resolution"], role["role"]))
            assert (role["shape"], role["joint_tokens"]) == (shape, joint)
            assert role["kv_heads"] == source["kv_heads"]
            assert all(role[field] == source[field] for field in ("layers", "joint", "category"))
    assert not expected


def test_table(ditattn):
    lines = ditattn.ok("models").splitlines()
    assert lines[0].split() == "model resolution role B H Sq Skv D layers mask joint guidance".split()
    rows = {tuple(line.split()[:3]): line.split()[3:] for line in lines[1:] if len(line.split()) > 10}
    unverified = {model["name"] for model in CATALOGUE if not model["verified"]}
    assert unverified and {name.rstrip("*") for name, _, _ in rows if name.endswith("*")} == unverified
    rows = {(name.rstrip("*"), *rest): row for (name, *rest), row in rows.items()}
    for key, (shape, role, joint) in expected_rows().items():
        assert rows[key][:6] == [str(number) for number in [*shape, role["layers"]]]
        assert " ".join(rows[key]).find(f"{role['joint']} {joint}" if joint else "none") > 0
    assert any(line.startswith("* not verified") for line in lines)


@pytest.mark.parametrize("name", ["PixArt-Sigma", "pixart-sigma"])
def test_one_model(ditattn, name):
    written = next(model for model in CATALOGUE if model["name"] == "PixArt-Sigma")
    assert [model["name"] for model in ditattn.json("models", name)["models"]] == ["PixArt-Sigma"]
    text = ditattn.ok("models", name)
    for needed in (written["arithmetic"], *written["source"], written["roles"][1]["mask_note"], "2048x2048: 2048 x"):
        assert needed in text
    assert "FLUX" not in text


def test_what_is_not_verified_is_told(ditattn):
    for model in CATALOGUE:
        if not model["verified"]:
            assert model["unverified"] in ditattn.ok("models", model["name"])


def test_unknown_model(ditattn):
    assert "Unknown model: 'nope'. Valid models are: FLUX.1-dev, " in ditattn.fails(2, "models", "nope")


def compare(ditattn, *models):
    arguments = [argument for model in models for argument in ("--model", model)]
    return ditattn.json("compare", *arguments, "--backends", "FLASH_ATTN", "--repeats", "1")["cases"]


def test_compare_runs_a_model(ditattn):
    """Masked, and with text of its own: every problem is right."""
    names = ["DiT-XL/2@256x256", "ltx-2:ltx2.audio_text_cross", "PixArt-alpha@512x512:cross"]
    cases = compare(ditattn, *names)
    assert [(case["case"], case["shape"], case["mask"]) for case in cases] == [
        ("DiT-XL/2@256x256:self", [2, 16, 256, 256, 72], "none"),
        ("LTX-2@768x512x121:ltx2.audio_text_cross", [2, 32, 126, 1024, 64], "none"),
        ("PixArt-alpha@512x512:cross", [2, 16, 1024, 120, 72], "padding"),
    ]
    for case in cases:
        print(case["case"], case["results"][0]["rel_l2"])
        assert 0 < case["results"][0]["rel_l2"] <= case["error_bound"]


def test_compare_joins_text(ditattn):
    (case,) = compare(ditattn, "FLUX.1-schnell@512x512:self")
    assert case["shape"] == [1, 24, 1280, 1280, 128]
    print(case["results"][0]["rel_l2"])
    assert 0 < case["results"][0]["rel_l2"] <= case["error_bound"]


def test_compare_with_a_mask_of_rows(ditattn):
    """Padded rows see nothing there: zeros."""
    (case,) = compare(ditattn, "HunyuanVideo:hunyuan_video.token_refiner")
    assert (case["case"], case["mask"]) == ("HunyuanVideo@540p:hunyuan_video.token_refiner", "bool")
    assert 0 < case["results"][0]["rel_l2"] <= case["error_bound"]


def test_compare_without_role_and_resolution(stand_ins):
    """All roles of the first resolution."""
    arguments = ["compare", "--model", "PixArt-alpha", "--backends", "SAGE_ATTN_3", "--repeats", "1"]
    cases = stand_ins.json(*arguments)["cases"]
    assert [case["case"] for case in cases] == ["PixArt-alpha@512x512:self", "PixArt-alpha@512x512:cross"]


@pytest.mark.parametrize(
    "name, says",
    [
        ("nope", "Unknown model: 'nope'"),
        ("", "Unknown model: ''"),
        ("DiT-XL/2@4K", "DiT-XL/2 has no resolution '4K'. Valid ones are: 256x256, 512x512"),
        ("DiT-XL/2:cross", "DiT-XL/2 has no role 'cross'. Valid ones are: self"),
        ("DiT-XL/2@256x256:", "has no role ''"),
    ],
)
def test_models_that_there_are_not(ditattn, name, says):
    assert says in ditattn.fails(2, "compare", "--model", name)


def test_too_much_work(ditattn):
    error = ditattn.fails(4, "compare", "--model", "Wan2.1-T2V-1.3B")
    assert "Wan2.1-T2V-1.3B@480p:self takes 6.59 TFLOP a call, more than the 1 that" in error
    assert "Choose a smaller role or resolution: Wan2.1-T2V-1.3B@480p:cross, Wan2.1-T2V-1.3B@720p:cross" in error
