"""Transformers of diffusers, built small with random weights, and inputs for them: two samples of odd lengths."""

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)

# The error of quantized names on the CPU relative to sum P|V| with 1,024 keys, as docs of their back ends have it.
QUANTIZED = {"ditattn_sage": 8.5e-4, "ditattn_sage3": 1.2e-2}
TEXT = 13
TIME = torch.tensor([0.7, 0.3])


def padding(*lengths, size=TEXT):
    """(samples, size), true for each sample's first tokens."""
    return torch.arange(size) < torch.tensor(lengths)[:, None]


def tensors(batch=2, seq_q=9, seq_kv=9, heads=4, kv_heads=4, head_size=32, dtype=torch.float32):
    """Query, key, value with standard normal numbers."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, seq_q, heads, head_size), *2 * [(batch, seq_kv, kv_heads, head_size)]]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def quantization_error(out, exact, value, attend, documented):
    """The error relative to sum P|V|, and its bound. `attend(value)` is exact attention in float64.

    Errors of single keys average out: over the n keys that count (1 / sum P squared), they are sqrt(1024 / n) times
    those of 1,024 keys. A quarter more is left for chance.
    """
    weights = attend(torch.eye(value.shape[1], dtype=torch.float64)[:, None].expand(len(value), -1, value.shape[2], -1))
    keys = float(1 / weights.square().sum(-1).mean())
    error = float((out.double() - exact).norm() / attend(value.abs()).norm())
    return error, 1.25 * documented * (1024 / keys) ** 0.5


def flux():
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=48, pooled_projection_dim=24, axes_dims_rope=(8, 12, 12))  # fmt: skip
    rows, columns = torch.meshgrid(torch.arange(7), torch.arange(5), indexing="ij")
    places = torch.stack([torch.zeros(35), rows.flatten(), columns.flatten()], -1)
    return model, {"hidden_states": torch.randn(2, 35, 16), "encoder_hidden_states": torch.randn(2, TEXT, 48),
                   "pooled_projections": torch.randn(2, 24), "timestep": TIME, "img_ids": places,
                   "txt_ids": torch.zeros(TEXT, 3)}  # fmt: skip


def sd3():
    model = SD3Transformer2DModel(
        sample_size=16, in_channels=4, num_layers=3, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=48, caption_projection_dim=128, pooled_projection_dim=24, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm")  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 4, 14, 10), "encoder_hidden_states": torch.randn(2, TEXT, 48),
                   "pooled_projections": torch.randn(2, 24), "timestep": 1000 * TIME}  # fmt: skip


def wan():
    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=48, freq_dim=32,
        ffn_dim=128, num_layers=3, rope_max_seq_len=32, image_dim=40, added_kv_proj_dim=128)  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 4, 3, 10, 6), "timestep": 1000 * TIME,
                   "encoder_hidden_states": torch.randn(2, 512, 48),  # as many as the model takes for text
                   "encoder_hidden_states_image": torch.randn(2, 7, 40)}  # fmt: skip


def qwen_image():
    model = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=48, axes_dims_rope=(8, 12, 12))  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 35, 16), "encoder_hidden_states": torch.randn(2, TEXT, 48),
                   "encoder_hidden_states_mask": padding(TEXT, 4), "timestep": TIME,
                   "img_shapes": [[(1, 7, 5)]] * 2}  # fmt: skip


def hunyuan_video():
    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=32, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=48, pooled_projection_dim=24, rope_axes_dim=(8, 12, 12))  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 4, 3, 10, 6), "timestep": 1000 * TIME,
                   "encoder_hidden_states": torch.randn(2, TEXT, 48), "encoder_attention_mask": padding(9, 5),
                   "pooled_projections": torch.randn(2, 24), "guidance": torch.tensor([6.0, 6.0])}  # fmt: skip


def ltx():
    model = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=32, cross_attention_dim=128,
        num_layers=3, caption_channels=48)  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 3 * 7 * 5, 8), "encoder_hidden_states": torch.randn(2, TEXT, 48),
                   "timestep": 1000 * TIME, "encoder_attention_mask": padding(9, 5).long(), "num_frames": 3,
                   "height": 7, "width": 5}  # fmt: skip


def pixart():
    model = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=3, sample_size=16,
        cross_attention_dim=128, caption_channels=48, use_additional_conditions=False)  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 4, 16, 16), "encoder_hidden_states": torch.randn(2, TEXT, 48),
                   "timestep": 1000 * TIME, "encoder_attention_mask": padding(9, 5).long(),
                   "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}  # fmt: skip


def z_image():
    model = ZImageTransformer2DModel(
        in_channels=4, dim=128, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4, cap_feat_dim=48,
        axes_dims=[8, 12, 12], axes_lens=[128, 64, 64])  # fmt: skip
    return model, {"x": [torch.randn(4, 1, 14, 10), torch.randn(4, 1, 8, 12)], "t": TIME,
                   "cap_feats": [torch.randn(TEXT, 48), torch.randn(40, 48)]}  # fmt: skip


def cogvideox():
    model = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=48, num_layers=3, sample_width=10, sample_height=6, sample_frames=9,
        max_text_seq_length=TEXT)  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 3, 4, 6, 10), "encoder_hidden_states": torch.randn(2, TEXT, 48),
                   "timestep": 1000 * TIME}  # fmt: skip


def unet():
    model = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=48, attention_head_dim=2,
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    return model, {"sample": torch.randn(2, 4, 14, 10), "encoder_hidden_states": torch.randn(2, TEXT, 48),
                   "timestep": 1000 * TIME}  # fmt: skip


MODELS = {make.__name__: make for make in (flux, sd3, wan, qwen_image, hunyuan_video, ltx, pixart, z_image)}
OTHERS = {make.__name__: make for make in (cogvideox, unet)}


def built(name, dtype=torch.float32):
    """A model and its inputs, numbers in `dtype`; the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, inputs = (MODELS | OTHERS)[name]()
        for parameter in model.parameters():  # some start as zeros, which would hide the attention
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return model.eval().to(dtype), {key: as_dtype(value, dtype) for key, value in inputs.items()}


def as_dtype(value, dtype):
    if isinstance(value, list):
        return [as_dtype(entry, dtype) for entry in value]
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def output(model, inputs):
    """What the model computes, as one tensor in float64."""
    with torch.no_grad():
        out = model(**inputs, return_dict=False)[0]
    return torch.cat([part.double().flatten() for part in out]) if isinstance(out, list) else out.double().flatten()
