"""Train a small class-conditional diffusion transformer on scikit-learn's digits.

The model is a DiT at pixel resolution: every pixel of an 8x8 image is one token.
Conditioning is adaLN-single (Chen et al., "PixArt-alpha", 2023): one shared linear
layer turns the embedding of (time, class) into shifts, scales and gates, to which
every block adds a small learned table of its own.  Training is flow matching along
straight lines (Liu et al., "Rectified flow", 2022): for x_t = (1 - t) * image +
t * noise the model predicts the velocity dx/dt = noise - image.  Sampling integrates
that velocity from t = 1 down to t = 0 with Euler's method and classifier-free
guidance (Ho and Salimans, 2022).

    python train.py --out digits.safetensors                    # train
    python train.py --sample --weights digits.safetensors --out ref.safetensors
"""

import argparse
import copy
import math
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Everything that fixes the shapes; stored as strings in the weights' metadata."""

    image_size: int = 8
    dim: int = 192
    heads: int = 3  # of dim / heads = 64 channels
    blocks: int = 6
    mlp_dim: int = 768
    time_dim: int = 256  # sines and cosines of the time
    classes: int = 10  # index `classes` is the null class of guidance


def time_features(t: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of 1000 t at the dim / 2 frequencies 10000^(-2 i / dim)."""
    i = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    angle = 1000 * t[:, None].float() * torch.exp(-math.log(10000) * 2 * i / dim)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights of its own; the conditioning shifts and scales."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Pre-norm attention and MLP, both shifted, scaled and gated by the conditioning."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.heads = c.heads
        self.table = nn.Parameter(torch.zeros(6, c.dim))
        self.qkv = nn.Linear(c.dim, 3 * c.dim)
        self.out = nn.Linear(c.dim, c.dim)
        self.fc1 = nn.Linear(c.dim, c.mlp_dim)
        self.fc2 = nn.Linear(c.mlp_dim, c.dim)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        m = (modulation + self.table).unsqueeze(2)  # (batch, 6, 1, dim)
        shift1, scale1, gate1, shift2, scale2, gate2 = m.unbind(1)
        qkv = self.qkv(modulated_norm(x, shift1, scale1))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v)  # scale 1 / sqrt(64)
        x = x + gate1 * self.out(heads.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.fc1(modulated_norm(x, shift2, scale2)), approximate="tanh")
        return x + gate2 * self.fc2(hidden)


class DigitsDiT(nn.Module):
    """Velocity of a batch of flat noisy images at times t, for class labels y."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.patch = nn.Linear(1, c.dim)
        self.pos = nn.Parameter(0.02 * torch.randn(c.image_size**2, c.dim))
        self.time1 = nn.Linear(c.time_dim, c.dim)
        self.time2 = nn.Linear(c.dim, c.dim)
        self.label = nn.Parameter(0.02 * torch.randn(c.classes + 1, c.dim))
        self.modulation = nn.Linear(c.dim, 6 * c.dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.blocks))
        self.final_table = nn.Parameter(torch.zeros(2, c.dim))
        self.head = nn.Linear(c.dim, 1)
        for zero in (self.modulation, self.head):  # every block starts as the identity
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        embedded = self.time2(F.silu(self.time1(time_features(t, self.config.time_dim))))
        condition = embedded + self.label[y]
        modulation = self.modulation(F.silu(condition)).unflatten(-1, (6, -1))
        h = self.patch(x[..., None]) + self.pos
        for block in self.blocks:
            h = block(h, modulation)
        shift, scale = (condition[:, None, None] + self.final_table[:, None]).unbind(1)
        return self.head(modulated_norm(h, shift, scale)).squeeze(-1)


def load_data(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 64) in 0..16 and labels; scikit-learn's, or an exported copy."""
    if path:
        archive = np.load(path)
        return archive["images"], archive["labels"]
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def augment(images: Tensor) -> Tensor:
    """Half of the images slightly turned, slanted, scaled and moved (below one pixel)."""
    n, size = len(images), math.isqrt(images.shape[1])
    jitter = 2 * torch.rand(n, 2, 3, device=images.device) - 1
    jitter *= torch.tensor([[0.08, 0.12, 0.1], [0.12, 0.08, 0.1]], device=images.device)
    jitter *= (torch.rand(n, 1, 1, device=images.device) < 0.5).float()
    grid = F.affine_grid(jitter + torch.eye(2, 3, device=images.device),
                         [n, 1, size, size], align_corners=False)
    moved = F.grid_sample(images.view(n, 1, size, size) + 1, grid, align_corners=False)
    return moved.flatten(1) - 1  # outside is background, -1


def flow_loss(model: DigitsDiT, x0: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of the velocity on straight lines from images to noise."""
    noise = torch.randn_like(x0)
    xt = torch.lerp(x0, noise, t[:, None])
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=x0.is_cuda):
        velocity = model(xt, t, y)
    return F.mse_loss(velocity.float(), noise - x0)


@torch.no_grad()
def mean_loss(model: DigitsDiT, x: Tensor, y: Tensor, repeats: int = 20) -> float:
    """flow_loss without augmentation, over evenly spread times and fresh noise."""
    spread = torch.linspace(0, 1, len(x), device=x.device)
    losses = [flow_loss(model, x, y, spread[torch.randperm(len(x), device=x.device)])
              for _ in range(repeats)]
    return torch.stack(losses).mean().item()


def train(args: argparse.Namespace, device: torch.device) -> None:
    """AdamW with warm-up and cosine decay; keeps a moving average of the weights."""
    images, labels = load_data(args.data)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.tensor(images[order], dtype=torch.float32, device=device) / 8 - 1
    y = torch.tensor(labels[order], device=device)
    held_x, held_y, x, y = x[:297], y[:297], x[297:], y[297:]

    config = Config()
    model = DigitsDiT(config).to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99),
                                  weight_decay=0.01, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * step / args.steps)))

    start = time.perf_counter()
    for step in range(args.steps):
        pick = torch.randint(len(x), (args.batch,), device=device)
        dropped = torch.rand(args.batch, device=device) < 0.1  # learns the null class too
        t = torch.sigmoid(torch.randn(args.batch, device=device))
        loss = flow_loss(model, augment(x[pick]), y[pick].masked_fill(dropped, config.classes), t)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        if (step + 1) % args.log_every == 0:
            print(f"step {step + 1} loss {loss.item():.4f} held-out "
                  f"{mean_loss(average, held_x, held_y):.4f} "
                  f"seconds {time.perf_counter() - start:.0f}", flush=True)
    seconds = time.perf_counter() - start

    rounded = {name: w.bfloat16() for name, w in average.state_dict().items()}
    average.load_state_dict(rounded)  # measure what is shipped
    losses = mean_loss(average, x[:297], y[:297]), mean_loss(average, held_x, held_y)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    metadata = {key: str(value) for key, value in asdict(config).items()} | {
        "trained_with": f"train.py --seed {args.seed} --steps {args.steps} "
                        f"--batch {args.batch} --lr {args.lr}",
        "trained_on": "1500 of the 1797 images of sklearn.datasets.load_digits; 297 held out",
        "training_seconds": f"{seconds:.0f} ({machine})",
        "training_loss": f"{losses[0]:.4f}",
        "held_out_loss": f"{losses[1]:.4f}",
        "sample_steps": str(args.sample_steps),
        "guidance": str(args.guidance),
    }
    save_file(rounded, args.out, metadata)
    print("\n".join(f"{key}: {value}" for key, value in metadata.items()))


def load_model(path: Path) -> DigitsDiT:
    """The model of a weights file, widened to float32."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}
    model = DigitsDiT(Config(**{f.name: int(metadata[f.name]) for f in fields(Config)}))
    model.load_state_dict(weights)  # copies into float32 parameters
    return model.requires_grad_(False).eval()


def integrate(model: DigitsDiT, noise: Tensor, y: Tensor, steps: int, guidance: float) -> Tensor:
    """Euler's method from t = 1 to 0 along the guided velocity; pixels in 0..16."""
    x, both = noise, torch.cat([y, torch.full_like(y, model.config.classes)])
    for step in range(steps):
        t = torch.full((len(both),), 1 - step / steps, device=x.device)
        given, null = model(torch.cat([x, x]), t, both).chunk(2)
        x = x - (null + guidance * (given - null)) / steps
    return (8 * (x + 1)).clamp(0, 16)


def sample(args: argparse.Namespace, device: torch.device) -> None:
    """Write samples, their labels 0, 1, ..., 9, 0, ... and the noise they started from."""
    model = load_model(args.weights).to(device)
    size = model.config.image_size
    noise = torch.randn(args.count, size**2)  # drawn on the CPU: the same on every machine
    labels = torch.arange(args.count) % model.config.classes
    start = time.perf_counter()
    samples = torch.cat([
        integrate(model, n.to(device), y.to(device), args.sample_steps, args.guidance).cpu()
        for n, y in zip(noise.split(250), labels.split(250))])
    print(f"{args.count} samples in {time.perf_counter() - start:.1f} s")
    shape = (args.count, size, size)
    save_file({"samples": samples.view(shape), "labels": labels, "noise": noise.view(shape)},
              args.out, {"sample_steps": str(args.sample_steps), "guidance": str(args.guidance)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("digits.safetensors"))
    parser.add_argument("--data", type=Path, help="an .npz written by --export-data")
    parser.add_argument("--export-data", type=Path, help="write scikit-learn's digits and stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--log-every", type=int, default=1000)
    parser.add_argument("--sample", action="store_true", help="sample instead of training")
    parser.add_argument("--weights", type=Path, default=Path("digits.safetensors"))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--sample-steps", type=int, default=40)
    parser.add_argument("--guidance", type=float, default=2.0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.export_data:
        images, labels = load_data(None)
        np.savez_compressed(args.export_data, images=images, labels=labels)
    elif args.sample:
        sample(args, device)
    else:
        train(args, device)


if __name__ == "__main__":
    main()
