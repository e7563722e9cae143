"""Compares the float64 oracle with PyTorch's scaled_dot_product_attention in float64.

    python torch_check.py CONFORMANCE_PROGRAM [--seed N]

Has the conformance program write its cases and the oracle's results (`--dump`), computes them with PyTorch and prints
the worst differences. Exit status 1 if one is over the bound, 77 (skipped) where PyTorch is not installed.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

try:
    import torch
    from safetensors import safe_open
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

from torch.nn.attention import SDPBackend, sdpa_kernel

BOUND = 1e-12  # relative to the largest |value|; both sides compute in float64
MIN_CASES = 50


def combined_mask(mask, causal, query, key):
    """What PyTorch adds to the logits, (B, H, Sq, Skv) or None; causal with a mask means AND."""
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if mask is None and not causal:
        return None
    added = torch.zeros(full, dtype=torch.float64)
    if mask is not None:
        if mask.ndim == 2:
            mask = mask[:, None, None, :]
        if mask.dtype == torch.bool:
            added = added.masked_fill(~mask, -torch.inf)
        else:
            added = added + mask.double()
    if causal:
        hidden = torch.ones(full[2:], dtype=torch.bool).triu(1)
        added = added.masked_fill(hidden, -torch.inf)
    return added


def torch_attention(tensors, scale, causal):
    query, key, value = (tensors[name].double().transpose(1, 2) for name in ("query", "key", "value"))
    mask = combined_mask(tensors.get("attn_mask"), causal, query, key)
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    logits = scale * query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2)
    if mask is not None:
        logits = logits + mask
    lse = torch.logsumexp(logits, dim=-1)
    out = torch.where(torch.isneginf(lse)[..., None], 0.0, out)  # older PyTorch gives NaN in rows without keys
    return out, lse


def difference(ours, theirs):
    """Largest |ours − theirs| relative to the largest |theirs|; infinities must agree."""
    same = (ours == theirs)
    gap = torch.where(same, 0.0, (ours - theirs).abs())
    finite = theirs[torch.isfinite(theirs)]
    return (gap.max() / max(1e-300, finite.abs().max().item() if finite.numel() else 1.0)).item()


def check(file):
    with safe_open(file, framework="pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}
        metadata = content.metadata()
    out, lse = torch_attention(tensors, float(metadata["scale"]), metadata["causal"] == "1")
    return metadata["case"], difference(tensors["out"], out), difference(tensors["lse"], lse)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--seed", default="1")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([arguments.program, f"--dump={directory}", f"--seed={arguments.seed}"], check=True)
        results = [check(file) for file in sorted(pathlib.Path(directory).glob("*.safetensors"))]
    worst_out = max(results, key=lambda result: result[1])
    worst_lse = max(results, key=lambda result: result[2])
    print(f"PyTorch {torch.__version__}, {len(results)} cases, bound {BOUND:g}")
    print(f"worst output difference {worst_out[1]:.2e} in [{worst_out[0]}]")
    print(f"worst LSE difference    {worst_lse[2]:.2e} in [{worst_lse[0]}]")
    failed = len(results) < MIN_CASES or not (worst_out[1] <= BOUND and worst_lse[2] <= BOUND)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
