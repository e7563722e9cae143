"""What compare.py times: shapes, variants of some, and the tensors of both."""

from typing import NamedTuple

import torch

from ditattn import AttentionMetadata

# name: (B, H, Sq, Skv, D, causal)
SHAPES = {
    "flux-1024": (1, 24, 4608, 4608, 128, False),
    "sd3-1024": (2, 24, 4250, 4250, 64, False),
    "qwen-image": (2, 24, 4352, 4352, 128, False),
    "wan1.3b-480p": (1, 12, 32760, 32760, 128, False),
    "wan14b-480p": (1, 40, 32760, 32760, 128, False),
    "wan14b-720p": (1, 40, 75600, 75600, 128, False),
    "wan14b-cross": (1, 40, 32760, 512, 128, False),
    "hunyuan-16k": (1, 24, 16384, 16384, 128, False),
    "ltx-d64": (1, 32, 12288, 12288, 64, False),
    "cogvideox-d64": (2, 48, 17776, 17776, 64, False),
    "d96-8k": (1, 16, 8192, 8192, 96, False),
    "d256-8k": (1, 16, 8192, 8192, 256, False),
    "sit-d72": (8, 16, 256, 256, 72, False),
    "dit-xl-d72-cfg": (2, 16, 1024, 1024, 72, False),
    "tiny-launch": (1, 8, 128, 128, 64, False),
    "causal-16k": (1, 24, 16384, 16384, 128, True),
}
# name: its shape, and what is special
VARIANTS = {
    f"{shape}-{kind}": (shape, kind)
    for shape in ("flux-1024", "qwen-image")
    for kind in ("padded", "joint", "mask", "bias")
}
TOKENS = 512  # at the end: of padding, of text
SEEN = 0.9  # of a dense boolean mask


def shape_of(name):
    return SHAPES[VARIANTS[name][0] if name in VARIANTS else name]


class Inputs(NamedTuple):
    tensors: list  # query, key, value; the image's where text is apart
    keys: int  # without padding
    text: list | None = None  # query, key, value of the tokens after the image's
    mask: torch.Tensor | None = None  # (B, Skv), or (1, 1, Sq, Skv)
    dense: dict = {}  # of a variant: the query, key and value without it, by what that is called

    def metadata(self):
        if self.text is not None:
            query, key, value = self.text
            return AttentionMetadata(joint_query=query, joint_key=key, joint_value=value, joint_strategy="rear")
        return None if self.mask is None else AttentionMetadata(attn_mask=self.mask)


def inputs_of(name, dtype):
    batch, heads, rows, keys, head_size, _ = shape_of(name)
    _, kind = VARIANTS.get(name, (name, None))
    generator = torch.Generator("cuda").manual_seed(1)
    whole = [
        torch.randn((batch, tokens, heads, head_size), generator=generator, device="cuda").to(dtype)
        for tokens in (rows, keys, keys)
    ]
    if kind is None:
        return Inputs(whole, keys)
    if kind == "padded":
        mask = (torch.arange(keys, device="cuda") < keys - TOKENS).repeat(batch, 1)
        shorter = [whole[0], *(tensor[:, :-TOKENS].contiguous() for tensor in whole[1:])]
        return Inputs(whole, keys - TOKENS, mask=mask, dense={"dense": shorter, "full dense": whole})
    if kind == "joint":
        image = [tensor[:, :-TOKENS].contiguous() for tensor in whole]
        text = [tensor[:, -TOKENS:].contiguous() for tensor in whole]
        return Inputs(image, keys, text=text, dense={"dense": whole})
    if kind == "mask":
        mask = torch.rand((1, 1, rows, keys), generator=generator, device="cuda") < SEEN
        mask[..., 0] = True  # no row without keys: libraries differ there
    else:
        mask = torch.randn((1, 1, rows, keys), generator=generator, device="cuda").to(dtype)
    return Inputs(whole, keys, mask=mask, dense={"dense": whole})
