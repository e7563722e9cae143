"""`ditattn explain`: the choice and every reason, as `run` and `compare` bear it out."""

import pytest

FIELDS = [
    "case", "shape", "num_kv_heads", "dtype", "device", "mask", "causal", "lse", "joint", "source", "explicit", "chosen",
    "why", "backends",
]  # fmt: skip
BACKEND_FIELDS = ["backend", "candidate", "accepted", "engine", "kernel", "median_ms", "error", "reasons"]


def only_case(document):
    assert list(document) == ["cases"]
    (case,) = document["cases"]
    assert list(case) == FIELDS
    assert all(list(entry) == BACKEND_FIELDS for entry in case["backends"])
    assert all(entry["accepted"] == (entry["reasons"] == []) for entry in case["backends"])
    return case, {entry["backend"]: entry for entry in case["backends"]}


def test_the_platforms_choice(ditattn):
    case, backends = only_case(ditattn.json("explain", "--shape", "2,16,64,128,72", "--kv-heads", 4))
    assert (case["shape"], case["num_kv_heads"]) == ([2, 16, 64, 128, 72], 4)
    assert (case["source"], case["explicit"], case["chosen"]) == ("platform default", False, "FLASH_ATTN")
    listed = [entry["name"] for entry in ditattn.json("list")["backends"]]
    assert list(backends) == listed and [name for name in listed if backends[name]["candidate"]] == listed[:2]
    engines = {entry["name"]: entry["engine"] for entry in ditattn.json("list")["backends"]}
    assert all(backends[name]["engine"] == engines[name] for name in listed if backends[name]["accepted"])


def test_reasons_are_those_of_compare(ditattn):
    _, backends = only_case(ditattn.json("explain", "--shape", "1,2,8,8,300"))
    compared = ditattn.json("compare", "--shape", "1,2,8,8,300")["cases"][0]["results"]
    assert {entry["backend"] for entry in compared if entry["status"] == "ok"} == {
        name for name, entry in backends.items() if entry["accepted"]
    }
    for entry in compared:
        if entry["status"] == "unsupported":
            assert entry["reason"].startswith(backends[entry["backend"]]["reasons"][0].rstrip("."))


@pytest.mark.parametrize("mask, refusing", [("padding", []), ("bool", ["SAGE_ATTN", "SAGE_ATTN_3"]),
                                            ("additive", ["SAGE_ATTN", "SAGE_ATTN_3"])])  # fmt: skip
def test_masks(ditattn, mask, refusing):
    case, backends = only_case(ditattn.json("explain", "--shape", "1,2,8,8,64", "--mask", mask, "--causal", "--lse"))
    assert (case["mask"], case["causal"], case["lse"]) == (mask, True, True)
    for name in ("FLASH_ATTN", "TORCH_SDPA", "SAGE_ATTN", "SAGE_ATTN_3"):
        assert backends[name]["accepted"] == (name not in refusing)
    for name in refusing:
        assert f"does not support a mask of kind {mask}" in backends[name]["reasons"][0]


def test_an_explicit_choice_that_refuses_is_told_and_not_replaced(ditattn):
    arguments = ("explain", "--shape", "1,2,8,8,64", "--mask", "bool", "--backend", "sage_attn")
    case, backends = only_case(ditattn.json(*arguments))
    assert (case["source"], case["explicit"], case["chosen"]) == ("--backend", True, None)
    assert [name for name, entry in backends.items() if entry["candidate"]] == ["SAGE_ATTN"]
    assert backends["FLASH_ATTN"]["accepted"]
    text = ditattn.ok(*arguments)
    assert "refuses" in text and "would do" in text and "chosen" not in text


def test_configuration_and_roles(ditattn):
    config = '{"default": "flash_attn", "per_role": {"cross": "torch_sdpa"}}'
    for role, chosen in (("self", "FLASH_ATTN"), ("cross", "TORCH_SDPA")):
        case, _ = only_case(
            ditattn.json("explain", "--shape", "1,2,8,8,64", "--role", role, "--diffusion-attention-config", config)
        )
        assert case["chosen"] == chosen and case["explicit"]
    model = ditattn.json("explain", "--model", "Wan2.1-T2V-1.3B", "--diffusion-attention-config", config)["cases"]
    assert {case["case"].rpartition(":")[2]: case["chosen"] for case in model} == {"self": "FLASH_ATTN", "cross": "TORCH_SDPA"}
    case, _ = only_case(ditattn.json("explain", "--shape", "1,2,8,8,64", env={"DIFFUSION_ATTENTION_BACKEND": "torch_sdpa"}))
    assert case["chosen"] == "TORCH_SDPA" and "DIFFUSION_ATTENTION_BACKEND" in case["source"]


def test_a_back_end_that_cannot_be_had(ditattn):
    case, backends = only_case(ditattn.json("explain", "--shape", "1,2,8,8,64", "--backend", "custom"))
    assert case["chosen"] is None and "must be registered before use" in backends["CUSTOM"]["reasons"][0]
    case, backends = only_case(
        ditattn.json("explain", "--shape", "1,2,8,8,64", "--register", "MINE=no.such.Backend")
    )
    assert "Cannot import 'no.such.Backend'" in backends["MINE"]["reasons"][0] and case["chosen"] == "FLASH_ATTN"


@pytest.mark.parametrize("arguments, status, text", [
    ((), 2, "Nothing to explain: give --shape B,H,Sq,Skv,D or --model NAME."),
    (("--shape", "1,2,3"), 2, "1,2,3"),
    (("--shape", "1,8,4,4,4", "--kv-heads", "3"), 2, "--kv-heads 3 does not divide the 8 heads"),
    (("--shape", "1,8,4,4,4", "--mask", "dense"), 2, "--mask: dense not in {none,padding,bool,additive}"),
    (("--shape", "1,8,4,4,4", "--backend", "nope"), 2, "Unknown diffusion attention backend: 'NOPE'"),
    (("--shape", "1,8,4,4,4", "--device", "tpu"), 2, "tpu"),
    (("--model", "no such model"), 2, "no such model"),
])  # fmt: skip
def test_bad_usage(ditattn, arguments, status, text):
    assert text in ditattn.fails(status, "explain", *arguments)
