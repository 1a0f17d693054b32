"""Train a class-conditional denoising diffusion model on Fashion-MNIST, in one file.

    python script_unet.py

Edit the constants below, run the command, open the PNGs.

Notation: x_start is a clean image, float (B, 1, H, W) in [-1, 1]; t (B,) is a step index,
0 ... T-1, from almost clean to pure noise; x_t is x_start after t; abar is alphas_cumprod.

References
[1] Ho, Jain, Abbeel, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
[2] Nichol, Dhariwal, Improved DDPM (cosine schedule), arXiv:2102.09672
[3] Song, Meng, Ermon, Denoising Diffusion Implicit Models (DDIM), arXiv:2010.02502
[4] Salimans, Ho, Progressive Distillation (v prediction), arXiv:2202.00512
[5] Ho, Salimans, Classifier-Free Diffusion Guidance, arXiv:2207.12598
[6] Lu et al., DPM-Solver++ (second-order multistep sampler), arXiv:2211.01095
[7] Shen et al., Efficient Attention: Attention with Linear Complexities, arXiv:1812.01243
[8] Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models
    (power-function averaging of weights), arXiv:2312.02696
[9] Liu et al., Muon is Scalable for LLM Training, arXiv:2502.16982
"""

import contextlib
import copy
import csv
import ctypes
import functools
import gzip
import hashlib
import io
import math
import os
import pickle
import platform
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

try:
    import fcntl
except ImportError:         # Windows: two runs in one folder are not told apart
    fcntl = None

# ----------------------------------------------------------------------------------------
# Constants. main() reads them when it runs: a notebook may set script_unet.EPOCHS = 2 first.

# Training
EPOCHS = 150                # passes over the training images
BATCH_SIZE = 128            # images per optimizer step, over all processes together
LEARNING_RATE = 2e-3        # AdamW's peak, reached after WARMUP_STEPS, then a cosine down to 0
MUON_LEARNING_RATE = 0.02   # the same for the convolutions, whose updates are orthogonal [9]
WARMUP_STEPS = 200          # optimizer steps; batch statistics and Adam's moments settle first
WEIGHT_DECAY = 0.01         # AdamW's decoupled decay
GRADIENT_CLIP = 1.0         # largest L2 norm of the whole gradient
DROPOUT = 0.0               # probability in each residual block; 60,000 images need none here
LABEL_DROPOUT = 0.1         # share of labels replaced by the null class, for guidance [5]
EMA_GAMMA = 16.0            # power of the weight average [8]: it lags about 1/18 of the run
SEED = 0                    # all randomness of step k is a function of SEED and k

# Data
IMG_SIZE = 28               # pixels a side, 16 to 64; other sizes than 28 are resampled
NUM_CLASSES = 10            # Fashion-MNIST's labels 0 ... 9; index 10 is the null class
DATA_DIR = "data"           # torchvision's layout, and where its download goes
SYSTEM_DATA_DIR = "/usr/share/datasets/fashion-mnist"  # Debian's package dataset-fashion-mnist

# Model
PATCH_SIZE = 2              # 1 to 4; p x p pixels become one cell, the work falls by p * p
CHANNELS = (64, 128)        # width at each resolution: 14 x 14, then 7 x 7 cells
BLOCKS = (1, 1)             # residual blocks at each resolution, in the encoder and the decoder
EMBEDDING_DIM = 256         # features of the time and class embedding
ATTENTION_HEAD_DIM = 32     # features of each attention head at the lowest resolution

# Diffusion
NUM_DIFFUSION_STEPS = 100   # T
BETA_SCHEDULE = "cosine"    # "cosine" [2] or "linear" [1]
BETA_START = 1e-4           # linear only: first beta at T = 1000, rescaled by 1000 / T
BETA_END = 0.02             # linear only: last beta at T = 1000, rescaled by 1000 / T

# Sampling
SAMPLING_STEPS = 20         # of the T steps; more are slower and hardly better
SAMPLING_ETA = 0.0          # 0: deterministic, second order [6]; 1: DDPM's noise [1, 3]
GUIDANCE_SCALE = 1.0        # 1: none; above: more typical, less varied images, twice the cost

# Machine
DEVICE = "auto"             # "auto": CUDA, then MPS, then CPU; or a torch device's name
PRECISION = "auto"          # "auto": bf16 where the hardware computes in it; or "bf16", "fp32"

# Output, in the working directory
RESUME = True               # go on from the last checkpoint; False sets older ones aside
CHECKPOINT_EVERY = 10       # epochs between the numbered checkpoints
PICTURES_EVERY = 1          # epochs between pictures
SAMPLES_PER_CLASS = 10      # columns of the samples picture
GENERATION_COLUMNS = 11     # columns of the generation picture
OUTPUT_NAME = "fashion_mnist_diffusion"  # what checkpoints' names start with
PICTURE_DIR = "epoch_visualizations"

# What README.md's results were measured with: main() prints the constants that differ.
DEFAULTS = {"EPOCHS": 150, "BATCH_SIZE": 128, "LEARNING_RATE": 2e-3, "MUON_LEARNING_RATE": 0.02,
    "WARMUP_STEPS": 200, "WEIGHT_DECAY": 0.01, "GRADIENT_CLIP": 1.0, "DROPOUT": 0.0,
    "LABEL_DROPOUT": 0.1, "EMA_GAMMA": 16.0, "SEED": 0, "IMG_SIZE": 28, "NUM_CLASSES": 10,
    "DATA_DIR": "data", "SYSTEM_DATA_DIR": "/usr/share/datasets/fashion-mnist", "PATCH_SIZE": 2,
    "CHANNELS": (64, 128), "BLOCKS": (1, 1), "EMBEDDING_DIM": 256, "ATTENTION_HEAD_DIM": 32,
    "NUM_DIFFUSION_STEPS": 100, "BETA_SCHEDULE": "cosine", "BETA_START": 1e-4, "BETA_END": 0.02,
    "SAMPLING_STEPS": 20, "SAMPLING_ETA": 0.0, "GUIDANCE_SCALE": 1.0, "DEVICE": "auto",
    "PRECISION": "auto", "RESUME": True, "CHECKPOINT_EVERY": 10, "PICTURES_EVERY": 1,
    "SAMPLES_PER_CLASS": 10, "GENERATION_COLUMNS": 11, "OUTPUT_NAME": "fashion_mnist_diffusion",
    "PICTURE_DIR": "epoch_visualizations"}

# ----------------------------------------------------------------------------------------


class UserError(Exception):
    """Something that the user can mend; the message names the constant or the file."""


def model_constants():
    """The constants that a trained model cannot do without, as stored in its checkpoints."""
    names = ("IMG_SIZE", "NUM_CLASSES", "PATCH_SIZE", "CHANNELS", "BLOCKS", "EMBEDDING_DIM",
             "ATTENTION_HEAD_DIM", "NUM_DIFFUSION_STEPS", "BETA_SCHEDULE", "BETA_START",
             "BETA_END")
    return {name: globals()[name] for name in names}


def seed_of(*keys):
    """A 32-bit seed for a named stream of random numbers, e.g. seed_of("step", SEED, 17)."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def generator(*keys, device="cpu"):
    """A torch.Generator of its own for the stream that the keys name."""
    return torch.Generator(device).manual_seed(seed_of(*keys))


# ----------------------------------------------------------------------------------------
# Data: four gzipped IDX files, kept in memory as uint8

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
               "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DATA_FILES = {"train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
              "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")}
DATA_REMEDY = ("delete the file and run again to download it, or `apt-get install "
               "dataset-fashion-mnist` on Debian or Ubuntu")


def read_idx(path):
    """The array in a gzipped IDX file of unsigned bytes: (N, 28, 28) images or (N,) labels.

    Raises UserError, naming the file, when it is not what its header promises.
    """
    try:
        with gzip.open(path) as file:
            data = file.read()
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); {DATA_REMEDY}") from error
    # Header: two zero bytes, type 8 (unsigned byte), number of dimensions, big-endian sizes.
    if len(data) < 4 or data[:3] != b"\0\0\x08" or data[3] not in (1, 3):
        raise UserError(f"{path} has the wrong magic number {data[:4].hex()}, expected 00000803 "
                        f"(images) or 00000801 (labels); {DATA_REMEDY}")
    start = 4 + 4 * data[3]
    shape = tuple(int(size) for size in np.frombuffer(data[4:start], ">u4"))
    if len(data) < start or len(data) - start != math.prod(shape):
        raise UserError(f"{path} announces a count and shape of {shape}, but holds "
                        f"{max(0, len(data) - start)} bytes; {DATA_REMEDY}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def find_data():
    """(folder, source in words) of the four files; downloads them when no folder has them."""
    names = [name for split in DATA_FILES.values() for name in split]
    raw = Path(DATA_DIR, "FashionMNIST", "raw")
    tried = []
    for folder in (raw, Path(SYSTEM_DATA_DIR)):
        missing = [name for name in names if not (folder / name).is_file()]
        if not missing:
            return folder, f"{folder}"
        tried.append(f"{folder} (without {missing[0]})")
    from torchvision.datasets import FashionMNIST  # here, as its import takes a second
    try:
        # Downloaded aside and moved as a whole: a broken download leaves nothing behind.
        Path(DATA_DIR).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=DATA_DIR, prefix=".download-") as aside:
            FashionMNIST(aside, download=True)  # checks MD5 sums
            shutil.rmtree(raw.parent, ignore_errors=True)
            os.replace(Path(aside, "FashionMNIST"), raw.parent)
    except Exception as error:  # urllib, ssl, OSError or RuntimeError, as torchvision pleases
        raise UserError(
            f"Fashion-MNIST not found. Tried: {', '.join(tried)}, and torchvision's download "
            f"into {DATA_DIR} ({error}). Either put the four .gz files into {raw}, or, on Debian "
            "or Ubuntu, `apt-get install dataset-fashion-mnist`.") from error
    return raw, f"torchvision's download, now in {raw}"


def load_fashion_mnist(split, folder=None):
    """Images uint8 (N, 1, IMG_SIZE, IMG_SIZE) and labels int64 (N,) of "train" or "test"."""
    folder = folder or find_data()[0]
    image_path, label_path = (Path(folder, name) for name in DATA_FILES[split])
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise UserError(f"{image_path} holds arrays of {images.shape[1:]}, not 28 x 28 images; "
                        f"{DATA_REMEDY}")
    if labels.shape != images.shape[:1]:
        raise UserError(f"{label_path} has a count of {labels.shape}, but {image_path} "
                        f"{images.shape[:1]}; {DATA_REMEDY}")
    if labels.max(initial=0) >= NUM_CLASSES:
        raise UserError(f"{label_path} has the label {labels.max()}, above 9; {DATA_REMEDY}")
    images = torch.from_numpy(images.copy())[:, None]
    if IMG_SIZE != 28:
        images = torch.cat([
            F.interpolate(part.float(), size=(IMG_SIZE, IMG_SIZE), mode="bilinear",
                          antialias=True).round().to(torch.uint8)
            for part in images.split(5000)])
    return images, torch.from_numpy(labels.astype(np.int64))


def to_float(images):
    """uint8 0 ... 255 to float -1 ... 1."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float -1 ... 1 to uint8 0 ... 255: the inverse of to_float, clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ----------------------------------------------------------------------------------------
# Building blocks, small to large. Maps are (B, C, H, W) in channels_last memory.


class PatchConv(nn.Module):
    """Each non-overlapping patch of p x p pixels becomes one output pixel, linearly.

    (B, in, H, W) -> (B, out, ceil(H / p), ceil(W / p)). Sizes that p does not divide are
    padded with zeros, the smaller half first.
    """

    def __init__(self, in_channels, out_channels, patch_size):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels * patch_size**2, out_channels, 1)

    def forward(self, x):
        rows, cols = -x.shape[-2] % self.patch_size, -x.shape[-1] % self.patch_size
        if rows or cols:
            x = F.pad(x, (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2))
        # Unshuffling and a 1 x 1 convolution are a strided convolution, faster on a CPU.
        x = F.pixel_unshuffle(x, self.patch_size)     # (B, in * p * p, H / p, W / p)
        return self.proj(x.contiguous(memory_format=torch.channels_last))


class PatchExpand(nn.Module):
    """PatchConv's counterpart: each pixel becomes a patch of p x p pixels, linearly.

    (B, in, h, w) -> (B, out, *size) with size = (H, W), h = ceil(H / p), w = ceil(W / p).
    Crops what PatchConv pads, so that every patch lies where it came from.
    """

    def __init__(self, in_channels, out_channels, patch_size):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, out_channels * patch_size**2, 1)

    def forward(self, x, size):
        x = F.pixel_shuffle(self.proj(x), self.patch_size)      # (B, out, h * p, w * p)
        top, left = (x.shape[-2] - size[0]) // 2, (x.shape[-1] - size[1]) // 2
        x = x[..., top:top + size[0], left:left + size[1]]      # (B, out, H, W)
        return x.contiguous(memory_format=torch.channels_last)


class DoubleConv(nn.Module):
    """Two 3 x 3 convolutions, each after batch normalization and SiLU; (B, C, H, W) -> same.

    The embedding (B, E) shifts every channel between the two. The second convolution starts
    at zero, so that a residual block starts as the identity.
    """

    def __init__(self, channels, embedding_dim, dropout=0.0):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shift = nn.Linear(embedding_dim, channels)
        self.norm2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, emb):
        x = self.conv1(F.silu(self.norm1(x)))                   # (B, C, H, W)
        x = x + self.shift(emb)[:, :, None, None]               # (B, C, H, W)
        return self.conv2(self.dropout(F.silu(self.norm2(x))))  # (B, C, H, W)


class ResBlock(nn.Module):
    """x + DoubleConv(x, emb); (B, C, H, W), (B, E) -> (B, C, H, W)."""

    def __init__(self, channels, embedding_dim, dropout=0.0):
        super().__init__()
        self.double_conv = DoubleConv(channels, embedding_dim, dropout)

    def forward(self, x, emb):
        return x + self.double_conv(x, emb)


class Down(nn.Module):
    """To a coarser grid: PatchConv, then residual blocks; (B, in, H, W) -> (B, out, H/p, W/p)."""

    def __init__(self, in_channels, out_channels, patch_size, blocks, embedding_dim, dropout=0.0):
        super().__init__()
        self.patch_conv = PatchConv(in_channels, out_channels, patch_size)
        self.blocks = nn.ModuleList(
            ResBlock(out_channels, embedding_dim, dropout) for _ in range(blocks))

    def forward(self, x, emb):
        x = self.patch_conv(x)          # (B, out, ceil(H / p), ceil(W / p))
        for block in self.blocks:
            x = block(x, emb)
        return x


class Up(nn.Module):
    """To a finer grid: residual blocks, PatchExpand, plus the encoder's map of that grid.

    (B, in, h, w), skip (B, out, H, W) -> (B, out, H, W).
    """

    def __init__(self, in_channels, out_channels, patch_size, blocks, embedding_dim, dropout=0.0):
        super().__init__()
        self.blocks = nn.ModuleList(
            ResBlock(in_channels, embedding_dim, dropout) for _ in range(blocks))
        self.patch_expand = PatchExpand(in_channels, out_channels, patch_size)

    def forward(self, x, skip, emb):
        for block in self.blocks:
            x = block(x, emb)
        return self.patch_expand(x, skip.shape[-2:]) + skip     # (B, out, H, W)


class SelfAttention(nn.Module):
    """Multi-head linear attention [7], residual, O(H W) in time; (B, C, H, W) -> same.

    softmax_d(q) (softmax_n(k)^T v): both factors are normalised, so the weights with which a
    position mixes the values sum to one, without the (H W) x (H W) matrix.
    """

    def __init__(self, channels, head_dim=32):
        super().__init__()
        self.heads = channels // head_dim
        self.norm = nn.BatchNorm2d(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        b, c, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c)      # (B, N, C)
        qkv = self.qkv(tokens).view(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, heads, N, d)
        context = k.softmax(-2).to(v.dtype).transpose(-1, -2) @ v           # (B, heads, d, d)
        mixed = (q.softmax(-1).to(v.dtype) @ context).transpose(1, 2)       # (B, N, heads, d)
        mixed = self.out(mixed.reshape(b, h * w, c))                        # (B, N, C)
        return x + mixed.view(b, h, w, c).permute(0, 3, 1, 2)               # (B, C, H, W)


# ----------------------------------------------------------------------------------------
# The model


class FashionMNISTUNetDenoiser(nn.Module):
    """A U-Net on patches; forward(x_t, t, labels) gives v (B, 1, H, W), see predict_x_start.

    x_t float (B, 1, H, W); t int (B,) in 0 ... T-1; labels int (B,), NUM_CLASSES for "any".
    `constants` overrides the module's model_constants(); the instance keeps them all, and the
    alphas_cumprod (T,) of its noise schedule.
    """

    def __init__(self, constants=None, dropout=None):
        super().__init__()
        self.constants = c = {**model_constants(), **(constants or {})}
        dropout = DROPOUT if dropout is None else dropout
        channels, blocks, dim = c["CHANNELS"], c["BLOCKS"], c["EMBEDDING_DIM"]
        common = {"embedding_dim": dim, "dropout": dropout}
        self.register_buffer("alphas_cumprod", alphas_cumprod(c), persistent=False)
        self.time_mlp = nn.Sequential(nn.Linear(dim // 4, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.class_embedding = nn.Embedding(c["NUM_CLASSES"] + 1, dim)
        nn.init.normal_(self.class_embedding.weight, std=0.5)
        # Grids from fine to coarse: the pixels, the patches, then halves of halves.
        widths, patches = (1, *channels), (c["PATCH_SIZE"], *(2 for _ in channels[1:]))
        self.downs = nn.ModuleList(
            Down(widths[i], widths[i + 1], patches[i], blocks[i], **common)
            for i in range(len(channels)))
        self.attention = SelfAttention(channels[-1], c["ATTENTION_HEAD_DIM"])
        self.ups = nn.ModuleList(
            Up(widths[i + 1], widths[i], 2, blocks[i], **common)
            for i in reversed(range(1, len(channels))))
        self.last_blocks = nn.ModuleList(
            ResBlock(channels[0], **common) for _ in range(blocks[0]))
        self.norm = nn.BatchNorm2d(channels[0])
        self.to_pixels = PatchExpand(channels[0], 1, c["PATCH_SIZE"])
        nn.init.zeros_(self.to_pixels.proj.weight)
        nn.init.zeros_(self.to_pixels.proj.bias)

    def forward(self, x_t, t, labels):
        emb = timestep_embedding(t / len(self.alphas_cumprod), self.time_mlp[0].in_features)
        emb = F.silu(self.time_mlp(emb) + self.class_embedding(labels))     # (B, E)
        x, skips = x_t, []
        for down in self.downs:
            x = down(x, emb)                                # (B, C_i, H_i, W_i)
            skips.append(x)
        x = self.attention(skips.pop())                     # (B, C_-1, H_-1, W_-1)
        for up in self.ups:
            x = up(x, skips.pop(), emb)                     # (B, C_i, H_i, W_i)
        for block in self.last_blocks:
            x = block(x, emb)                               # (B, C_0, H / p, W / p)
        return self.to_pixels(F.silu(self.norm(x)), x_t.shape[-2:])     # (B, 1, H, W)


def timestep_embedding(time, dim):
    """Sines and cosines of time (B,) in 0 ... 1 at dim / 2 frequencies, 1 to 1000; (B, dim)."""
    frequencies = torch.logspace(0, 3, dim // 2, device=time.device)
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def parameter_count(model):
    """Number of trained values."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_image(model):
    """Operations of one forward pass of one image; a multiply-add counts 2."""
    size, device = model.constants["IMG_SIZE"], model.alphas_cumprod.device
    label = torch.zeros(1, dtype=torch.long, device=device)
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 1, size, size, device=device), label, label)
    model.train(training)
    return counter.get_total_flops()


# ----------------------------------------------------------------------------------------
# The diffusion process


@functools.lru_cache
def noise_schedule(steps, kind, beta_start=1e-4, beta_end=0.02):
    """betas (T,), float64. Raises UserError where pure noise is not reached.

    "cosine": [2] eq. 17 with s = 0.008 and betas up to 0.999. "linear": [1] section 4, scaled
    by 1000 / T, so that every T ends as the published T = 1000 does.
    """
    if kind == "cosine":
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - f[1:] / f[:-1]
    elif kind == "linear":
        scale = 1000 / steps
        betas = torch.linspace(beta_start * scale, beta_end * scale, steps, dtype=torch.float64)
    else:
        raise UserError(f'BETA_SCHEDULE must be "cosine" or "linear", got {kind!r}')
    betas = betas.clamp(max=0.999)
    if (1 - betas).prod() >= 1e-3:
        raise UserError(f"BETA_START and BETA_END must leave less than 0.001 of the image after "
                        f"NUM_DIFFUSION_STEPS = {steps}, got {beta_start} and {beta_end}")
    return betas


def alphas_cumprod(constants=None):
    """abar (T,), float32: the share of x_start's variance that is left in x_t, [1] eq. 4."""
    c = constants or model_constants()
    betas = noise_schedule(c["NUM_DIFFUSION_STEPS"], c["BETA_SCHEDULE"], c["BETA_START"],
                           c["BETA_END"])
    return (1 - betas).cumprod(0).float()


def at(values, t):
    """values[t], shaped (B, 1, 1, 1) to scale images."""
    return values[t][:, None, None, None]


def q_sample(x_start, t, noise=None, abar=None):
    """x_t ~ q(x_t | x_start), [1] eq. 4: sqrt(abar_t) x_start + sqrt(1 - abar_t) noise.

    x_start float (B, 1, H, W), t int (B,), noise like x_start or None for fresh normal noise;
    abar (T,), by default that of the module's constants.
    """
    noise = torch.randn_like(x_start) if noise is None else noise
    abar = at(alphas_cumprod().to(t.device) if abar is None else abar, t)
    return abar.sqrt() * x_start + (1 - abar).sqrt() * noise


def x_start_from_v(x_t, t, v, abar):
    """x_start = sqrt(abar_t) x_t - sqrt(1 - abar_t) v, [4] appendix D.

    v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_start is what the model predicts.
    """
    abar = at(abar, t)
    return abar.sqrt() * x_t - (1 - abar).sqrt() * v


def posterior(x_start, x_t, abar_t, abar_next, eta=1.0):
    """Mean and standard deviation of q(x_next | x_t, x_start), [3] eq. 7 and 16.

    abar_t, abar_next: floats, abar_next = 1 for the image itself. eta = 1 between neighbouring
    steps is DDPM's posterior, [1] eq. 7; eta = 0 is deterministic.
    """
    noise = (x_t - math.sqrt(abar_t) * x_start) / math.sqrt(1 - abar_t)
    std = eta * math.sqrt((1 - abar_next) / (1 - abar_t) * (1 - abar_t / abar_next))
    mean = math.sqrt(abar_next) * x_start + math.sqrt(max(0, 1 - abar_next - std**2)) * noise
    return mean, std


def predict_x_start(model, x_t, t, labels, guidance_scale=1.0, precision=None):
    """The model's x_start (B, 1, H, W), float32, not clipped; guided as in [5] eq. 6."""
    if guidance_scale != 1:
        anything = torch.full_like(labels, model.constants["NUM_CLASSES"])
        guided, free = predict_x_start(
            model, x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([labels, anything]),
            precision=precision).chunk(2)
        return free + guidance_scale * (guided - free)
    with autocast(x_t.device, precision):
        v = model(x_t.contiguous(memory_format=torch.channels_last), t, labels)
    return x_start_from_v(x_t, t, v.float(), model.alphas_cumprod)


def diffusion_loss(model, x_start, t, labels, noise, precision=None):
    """Squared error of v for each image, (B,), apart from overshoot.

    Pixels end at -1 and 1 (half of them are exactly -1) and sampling clips there, so a
    prediction beyond the end is as right as one on it. Without this, half of the background
    comes out a little too bright: the grain that few-step samplers show.
    """
    abar = model.alphas_cumprod
    x_t = q_sample(x_start, t, noise, abar)
    error = predict_x_start(model, x_t, t, labels, precision=precision) - x_start
    error = error.masked_fill((x_start.abs() >= 1) & (error * x_start > 0), 0)
    return error.square().mean((1, 2, 3)) / (1 - abar[t])   # error of v = of x_start / sqrt(...)


# ----------------------------------------------------------------------------------------
# Sampling


def sampling_steps(total, steps):
    """`steps` indices from total - 1 down to 0, evenly spaced."""
    return np.linspace(total - 1, 0, min(steps, total)).round().astype(int).tolist()


@torch.no_grad()
def sample(model, labels, steps=None, eta=None, guidance_scale=None, seed=None, callback=None,
           batch_size=500, precision=None):
    """Images (N, 1, H, W) in [-1, 1] of the labels (N,), on the model's device.

    steps: of the T (default SAMPLING_STEPS). eta = 1 with steps = T is DDPM [1], eta = 0 the
    deterministic second-order solver [6], anything else DDIM [3]. guidance_scale: 1 for none.
    Image i depends on seed and on i alone, not on N or batch_size: up to 1e-4 in fp32.
    callback(k, t, x_t) sees all images before step k and, with t = -1, the result.
    """
    steps = SAMPLING_STEPS if steps is None else steps
    eta = SAMPLING_ETA if eta is None else eta
    scale = GUIDANCE_SCALE if guidance_scale is None else guidance_scale
    seed = SEED if seed is None else seed
    abar, size = model.alphas_cumprod, model.constants["IMG_SIZE"]
    device = abar.device
    labels = torch.as_tensor(labels, device=device)
    # A generator an image, on the CPU: the same noise on every machine, in any batch.
    streams = [generator("sample", seed, i) for i in range(len(labels))]

    def fresh_noise():
        noise = [torch.randn(1, size, size, generator=stream) for stream in streams]
        return torch.stack(noise).to(device) if noise else torch.empty(0, 1, size, size)

    x_t = fresh_noise()
    visited = sampling_steps(len(abar), steps)
    before = None                                   # the last step's x_start and log(SNR) / 2
    for k, t in enumerate(visited):
        if callback:
            callback(k, t, x_t)
        x_start = torch.cat([
            predict_x_start(model, x, torch.full_like(y, t), y, scale, precision).clamp(-1, 1)
            for x, y in zip(x_t.split(batch_size), labels.split(batch_size))])
        last = k == len(visited) - 1
        abar_t, abar_next = abar[t].item(), 1.0 if last else abar[visited[k + 1]].item()
        target = x_start
        if eta == 0 and not last:
            # [6] algorithm 2: x_start, extrapolated in half the log signal-to-noise ratio
            half, half_next = (0.5 * math.log(a / (1 - a)) for a in (abar_t, abar_next))
            if before is not None:
                ratio = (half_next - half) / (half - before[1])
                target = x_start + 0.5 * ratio * (x_start - before[0])
            before = x_start, half
        x_t, std = posterior(target, x_t, abar_t, abar_next, eta)
        if std > 0:
            x_t = x_t + std * fresh_noise()
    if callback:
        callback(len(visited), -1, x_t)
    return x_t


# ----------------------------------------------------------------------------------------
# Averaged weights, and the held-out loss that judges them


@torch.no_grad()
def update_average(average, model, step):
    """Power-function average of the weights after `step` (1, 2, ...) updates, [8] eq. 127."""
    decay = (1 - 1 / step) ** (EMA_GAMMA + 1)
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


@torch.no_grad()
def refresh_batch_norm(model, images, labels, precision=None, batches=20, batch_size=256):
    """Batch normalization's statistics, measured for these weights on noisy training images.

    Averaged weights fit neither the statistics of the last weights nor an average of them.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None                        # the plain mean over the batches
    draw = generator("batch norm", SEED)
    steps = len(model.alphas_cumprod)
    model.train()
    for _ in range(batches):
        pick = torch.randint(len(images), (batch_size,), generator=draw)
        t = torch.randint(steps, (batch_size,), generator=draw).to(images.device)
        x_start = to_float(images[pick.to(images.device)])
        noise = torch.randn(x_start.shape, generator=draw).to(images.device)
        diffusion_loss(model, x_start, t, labels[pick.to(labels.device)], noise, precision)
    model.eval()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


NOISE_LEVELS = ("early", "middle", "late")      # thirds of the steps: little to much noise


def by_noise_level(losses, t, steps):
    """(2, 3) sums and counts of the losses (B,) in each third of the steps t (B,)."""
    level = F.one_hot(t * 3 // steps, 3).float()
    return torch.stack([losses.detach() @ level, level.sum(0)])


def mean_losses(sums):
    """by_noise_level's sums as {"loss": ..., "early": ..., "middle": ..., "late": ...}."""
    total, count = sums.tolist()
    means = [a / b if b else float("nan") for a, b in zip(total, count)]
    return {"loss": sum(total) / max(1, sum(count)), **dict(zip(NOISE_LEVELS, means))}


@torch.no_grad()
def heldout_loss(model, images, labels, precision=None, batch_size=500):
    """mean_losses of the model on uint8 images, each with a fixed step and fixed noise."""
    draw = generator("held out")
    steps = len(model.alphas_cumprod)
    t = (torch.arange(len(images)) % steps).to(images.device)
    noise = torch.randn(images.shape, generator=draw).to(images.device)
    sums = sum(
        by_noise_level(diffusion_loss(model, to_float(x), s, y, n, precision), s, steps).cpu()
        for x, s, y, n in zip(*(a.split(batch_size) for a in (images, t, labels, noise))))
    return mean_losses(sums)


# ----------------------------------------------------------------------------------------
# Files: everything is written through atomic_write


def atomic_write(path, data):
    """Write bytes beside path, flush them to the disk, rename them over path.

    A reader, a crash or a full disk never meets half a file: what stood at path stays until
    the new file is whole. Raises UserError, naming path, when it cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.writing")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UserError(f"cannot write {path.absolute()} ({error.strerror}). An earlier file of "
                        "that name is untouched; free the disk or make the folder writable, "
                        "then run again to go on") from error


# ----------------------------------------------------------------------------------------
# Pictures


def save_figure(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    atomic_write(path, buffer.getvalue())


def mosaic(images, columns, gap=2):
    """uint8 (N, 1, H, W), row by row, as one array (rows * (H + gap), columns * (W + gap))."""
    images = F.pad(images.cpu(), (0, gap, 0, gap), value=128)
    n, _, h, w = images.shape
    grid = images.view(n // columns, columns, h, w).permute(0, 2, 1, 3)
    return grid.reshape(n // columns * h, columns * w).numpy()


def picture_grid(images, columns, column_names, title, path, gap=2):
    """Save images in [-1, 1] (10 * columns, 1, H, W): a row a class, on a fixed gray scale."""
    rows, cell = len(images) // columns, images.shape[-1] + gap
    figure = Figure(figsize=(1.6 + 0.62 * columns, 0.8 + 0.62 * rows), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(mosaic(to_uint8(images), columns, gap), cmap="gray", vmin=0, vmax=255,
                interpolation="nearest")
    middle = (cell - gap) / 2
    axes.set_yticks([middle + cell * row for row in range(rows)], CLASS_NAMES[:rows])
    axes.set_xticks([middle + cell * col for col in range(columns)], column_names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
    save_figure(figure, path)


def generate_visualizations(model, epoch, precision=None, final=False):
    """Draw samples (SAMPLES_PER_CLASS a class) and how the first of each class came about.

    Writes PICTURE_DIR/epoch_{epoch}_samples.png and _generation.png or, when final, the final
    samples and an animated GIF. All from one batch of fixed noise, the same every epoch.
    """
    per_class = SAMPLES_PER_CLASS
    labels = torch.arange(NUM_CLASSES).repeat_interleave(per_class)
    names, frames = [], []

    def watch(k, t, x_t):
        names.append("image" if t < 0 else f"t = {t}")
        frames.append(x_t[::per_class].cpu())               # (10, 1, H, W)

    images = sample(model, labels, seed=SEED, callback=watch, precision=precision)
    about = (f"after epoch {epoch}: {len(frames) - 1} of {len(model.alphas_cumprod)} steps, "
             f"guidance {GUIDANCE_SCALE:g}")
    stem = f"{PICTURE_DIR}/epoch_{epoch}"
    picture_grid(images, per_class, range(1, per_class + 1), f"Samples {about}",
                 "final_fashion_mnist_samples.png" if final else f"{stem}_samples.png")
    if final:
        atomic_write("final_fashion_mnist_generation.gif", animation(frames))
        return
    columns = np.linspace(0, len(frames) - 1, min(GENERATION_COLUMNS, len(frames))).round()
    chosen = [int(column) for column in columns]
    grid = torch.stack([frames[i] for i in chosen], dim=1)  # (10, columns, 1, H, W)
    picture_grid(grid.flatten(0, 1), len(chosen), [names[i] for i in chosen],
                 f"From noise to image {about}", f"{stem}_generation.png")


def animation(frames, scale=3):
    """GIF bytes of frames (10, 1, H, W) in [-1, 1]: two rows of classes, the last frame held."""
    pictures = [Image.fromarray(mosaic(to_uint8(frame), 5)) for frame in frames]
    pictures = [p.resize((p.width * scale, p.height * scale), Image.NEAREST) for p in pictures]
    buffer = io.BytesIO()
    pictures[0].save(buffer, format="GIF", save_all=True, append_images=pictures[1:], loop=0,
                     duration=[100] * (len(pictures) - 1) + [2000])
    return buffer.getvalue()


def plot_losses(history):
    """training_loss.png: the loss of each epoch, whole and by noise level, training and held out."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for part, style in (("train", "--"), ("heldout", "-")):
        word = "held out" if part == "heldout" else "training"
        left.plot(epochs, [row[f"{part}_loss"] for row in history], style, color="C0", marker=".",
                  label=word)
        for level, color in zip(NOISE_LEVELS, ("C1", "C2", "C3")):
            right.plot(epochs, [row[f"{part}_{level}"] for row in history], style, color=color,
                       marker=".", label=f"{level} steps, {word}")
    for axes, title in ((left, "All steps"), (right, "By noise level (early: little noise)")):
        axes.set(xlabel="epoch", ylabel="mean squared error of v", title=title, yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    save_figure(figure, "training_loss.png")


def write_log(history):
    """training_log.csv: one row an epoch."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=history[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    atomic_write("training_log.csv", text.getvalue().encode())


# ----------------------------------------------------------------------------------------
# Checkpoints


def checkpoint_name(what):
    """Path of a checkpoint: "last", "best_model" or "epoch_10"."""
    return Path(f"{OUTPUT_NAME}_{what}.pt")


def write_checkpoint(path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(path, buffer.getbuffer())


class NotACheckpoint(Exception):
    """A file that is no whole checkpoint of this script; the message says why."""


def read_checkpoint(path):
    """The checked state in a file; nothing in it is executed. Raises NotACheckpoint."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise NotACheckpoint(f"cannot be read ({error.strerror})") from error
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0][:100]
        raise NotACheckpoint(f"truncated, corrupt or unsafe ({reason})") from error
    keys = {"constants", "model", "average", "optimizer", "progress"}
    if not isinstance(state, dict) or keys - set(state):
        raise NotACheckpoint("not a checkpoint of this script")
    for part in ("model", "average"):
        for name, value in state[part].items():
            if not torch.isfinite(value).all():
                raise NotACheckpoint(f"{part}.{name} holds NaN or infinity")
    return state


def load_denoiser(path, device=None):
    """The model in a checkpoint, averaged weights, in eval mode, ready for sample().

    Raises UserError when the file is missing or damaged.
    """
    try:
        state = read_checkpoint(path)
        model = FashionMNISTUNetDenoiser(state["constants"], dropout=0.0)
        model.load_state_dict(state["average"])
    except (NotACheckpoint, RuntimeError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no checkpoint of this script: {error}") from error
    model = model.to(device or pick_device(), memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


def set_aside(path):
    """Rename path to path.1, path.2, ...: out of the way, never deleted. Returns the new path."""
    number = 1
    while (new := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(new)
    return new


def resume(trainer):
    """Load the newest whole checkpoint into the trainer; returns its path, or None.

    Damaged files are reported and set aside. Raises UserError when the checkpoint is whole but
    of another model than the constants describe.
    """
    names = [checkpoint_name("last"), checkpoint_name("best_model"),
             *Path().glob(f"{OUTPUT_NAME}_epoch_*.pt")]
    paths = [path for path in names if path.exists()]
    if not RESUME:
        for path in paths:
            print(f"RESUME is False: {path} is kept as {set_aside(path)}")
        return None
    found = []
    for path in paths:
        try:
            state = read_checkpoint(path)
            progress = state["progress"]
            found.append((progress["step"], path == names[0], path, state))
        except NotACheckpoint as error:
            print(f"{path}: {error}; kept as {set_aside(path)}, looking for an older checkpoint")
    if not found:
        return None
    _, _, path, state = max(found, key=lambda item: item[:2])
    theirs, ours = state["constants"], trainer.model.constants
    differing = [f"{name}: {theirs.get(name)} there, {ours.get(name)} here"
                 for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    if differing:
        raise UserError(f"{path} was trained with other constants ({'; '.join(differing)}). Set "
                        "them back to go on with it, or set RESUME = False to set it aside and "
                        "start anew")
    trainer.load_state_dict(state)
    return path


# ----------------------------------------------------------------------------------------
# Training


def pick_device():
    """DEVICE or, for "auto", CUDA, then MPS, then the CPU."""
    if DEVICE != "auto":
        return torch.device(DEVICE)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_precision(device):
    """PRECISION or, for "auto", "bf16" where the hardware multiplies in it, else "fp32".

    A CPU without AVX512-BF16 or AMX emulates bf16, many times slower than float32.
    """
    if PRECISION != "auto":
        return PRECISION
    if device.type == "cuda":
        hardware = torch.cuda.is_bf16_supported()
    elif device.type == "cpu":
        known = getattr(torch.cpu, "get_capabilities", dict)()
        hardware = any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))
    else:
        hardware = False
    return "bf16" if hardware else "fp32"


def autocast(device, precision=None):
    """Context in which a model computes in the precision (default: pick_precision's)."""
    precision = precision or pick_precision(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def keep_freed_memory():
    """Let glibc reuse freed memory instead of returning it to the kernel after every tensor.

    Else each activation is mapped and zeroed page by page again: a quarter of a CPU step.
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4       # malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal [9], for weights of two and more dimensions.

    Each weight (out, ...) is seen as a matrix (out, rest). Five Newton-Schulz steps replace its
    averaged gradient U S V^T by about U V^T: every direction is learned at the same pace.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                average = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(average, group["momentum"])       # Nesterov's
                update = self.orthogonalize(update.flatten(1))
                scale = max(1, update.shape[0] / update.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-group["lr"] * scale)

    @staticmethod
    def orthogonalize(matrix):
        """About U V^T of a matrix U S V^T: singular values end between 0.7 and 1.2."""
        x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
        x = (x / (x.norm() + 1e-7)).to(torch.bfloat16)
        for _ in range(5):                          # a quintic with the coefficients of [9]
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        x = x.to(matrix.dtype)
        return x.T if matrix.shape[0] > matrix.shape[1] else x


def is_distributed():
    return dist.is_available() and dist.is_initialized()


def rank_and_world():
    """Number of this process and of all processes, (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


class Trainer:
    """The weights, their average, the optimizers and the progress: all that a resume restores.

    progress: "epoch" finished epochs, "position" images of the epoch at hand, "step" updates,
    "sums" losses of the epoch at hand, "best_loss", "best_epoch", "history" (a row an epoch).
    """

    def __init__(self, device, precision):
        torch.manual_seed(seed_of("weights", SEED))
        self.device, self.precision = device, precision
        self.model = FashionMNISTUNetDenoiser().to(device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        hidden = [p for p in self.model.parameters() if p.ndim == 4 and min(p.shape[:2]) >= 16]
        others = [p for p in self.model.parameters() if all(p is not h for h in hidden)]
        fused = device.type in ("cpu", "cuda")
        self.optimizers = {
            "muon": Muon(hidden, MUON_LEARNING_RATE, weight_decay=WEIGHT_DECAY),
            "adamw": torch.optim.AdamW(others, LEARNING_RATE, betas=(0.9, 0.99),
                                       weight_decay=WEIGHT_DECAY, fused=fused)}
        self.progress = {"epoch": 0, "position": 0, "step": 0, "sums": torch.zeros(2, 3),
                         "best_loss": math.inf, "best_epoch": 0, "history": []}
        self.parallel = self.model
        if is_distributed():
            if device.type == "cuda":       # statistics over the whole batch; gloo has no such
                self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            self.parallel = nn.parallel.DistributedDataParallel(self.model)
            self.parallel.alphas_cumprod = self.model.alphas_cumprod

    def state_dict(self):
        return {"constants": self.model.constants, "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": {k: v.state_dict() for k, v in self.optimizers.items()},
                "progress": {**self.progress, "sums": self.progress["sums"].cpu()}}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizer"][name])
        self.progress = dict(state["progress"])

    def step(self, images, labels):
        """One update on the next BATCH_SIZE images of the epoch; images uint8, on the device.

        Order, steps, noise and dropped labels are functions of SEED, epoch and step alone, and
        those of the whole batch even where this process computes only its share.
        """
        progress, (rank, world) = self.progress, rank_and_world()
        steps = len(self.model.alphas_cumprod)
        order = epoch_order(progress["epoch"], len(images))
        batch = order[progress["position"]:progress["position"] + BATCH_SIZE].to(self.device)
        torch.manual_seed(seed_of("step", SEED, progress["step"]))
        strata = torch.arange(BATCH_SIZE, device=self.device)
        t = (strata + torch.rand(BATCH_SIZE, device=self.device)) / BATCH_SIZE * steps
        noise = torch.randn(BATCH_SIZE, 1, IMG_SIZE, IMG_SIZE, device=self.device)
        dropped = torch.rand(BATCH_SIZE, device=self.device) < LABEL_DROPOUT
        mine = slice(rank, None, world)
        batch, t, noise, dropped = batch[mine], t.long()[mine], noise[mine], dropped[mine]
        x_start = to_float(images[batch])
        y = labels[batch].masked_fill(dropped, NUM_CLASSES)

        self.model.train()
        losses = diffusion_loss(self.parallel, x_start, t, y, noise, self.precision)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        done = (progress["epoch"] + progress["position"] / len(images)) / EPOCHS
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * learning_rate_factor(
                    progress["step"], done)
            optimizer.step()
            optimizer.zero_grad()

        progress["step"] += 1
        progress["position"] += BATCH_SIZE
        progress["sums"] = progress["sums"].to(self.device) + by_noise_level(losses, t, steps)
        update_average(self.average, self.model, progress["step"])


@functools.lru_cache(maxsize=1)
def epoch_order(epoch, count):
    """A permutation of the images, another one each epoch."""
    return torch.randperm(count, generator=generator("order", SEED, epoch))


def learning_rate_factor(step, done):
    """Linear warm-up over WARMUP_STEPS times a cosine over the share of the run that is done."""
    return min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * done))


class Interrupted(BaseException):
    """The run was asked to stop, and its state is saved. code: the exit status."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class StopRequest:
    """Within `with`: Ctrl-C and SIGTERM are remembered until the step at hand is done."""

    def __init__(self):
        self.number, self.previous = 0, {}

    def __enter__(self):
        with contextlib.suppress(ValueError):       # signals reach the main thread only
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self.remember)
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def remember(self, number, _frame):
        if self.number:                             # asked twice: at once
            raise KeyboardInterrupt
        self.number = number

    def agreed(self):
        """The signal's number, or 0; the same in every process."""
        if not is_distributed():
            return self.number
        number = torch.tensor(self.number, device=pick_device())
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


@contextlib.contextmanager
def hold_folder():
    """Keep other runs out of the working directory; a dead process holds nothing."""
    path = Path(f".{OUTPUT_NAME}.lock")
    try:
        file = open(path, "a+")
    except OSError as error:
        raise UserError(f"the working directory {Path.cwd()} must be writable "
                        f"({error.strerror}); run from another one") from error
    with file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)    # the kernel's: ends with us
            except OSError as error:
                file.seek(0)
                raise UserError(f"another run holds the folder {Path.cwd()}: {file.read()}. Wait "
                                "for it, stop it, or run from another folder") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {time.ctime()}")
        file.flush()
        for leftover in Path().rglob(".*.writing"):
            leftover.unlink()
        yield


def check_constants():
    """Raise UserError naming each constant that cannot work, what is allowed and what it is."""
    problems = []

    def check(name, allowed, test):
        value = globals()[name]
        try:
            fine = test(value)
        except TypeError:
            fine = False
        if not fine:
            problems.append(f"{name} must be {allowed}, got {value!r}")

    def whole(name, low, high=math.inf, allowed=None):
        check(name, allowed or (f"an integer of at least {low}" if high == math.inf else
                                f"an integer from {low} to {high}"),
              lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high)

    def number(name, low, high, allowed):
        check(name, allowed, lambda v: low <= v <= high and math.isfinite(v))

    for name in ("EPOCHS", "EMBEDDING_DIM", "ATTENTION_HEAD_DIM", "SAMPLING_STEPS",
                 "CHECKPOINT_EVERY", "PICTURES_EVERY", "SAMPLES_PER_CLASS", "WARMUP_STEPS"):
        whole(name, 1)
    whole("SEED", 0)
    whole("BATCH_SIZE", 2)
    whole("IMG_SIZE", 16, 64)
    whole("PATCH_SIZE", 1, 4)
    whole("NUM_DIFFUSION_STEPS", 2)
    whole("GENERATION_COLUMNS", 2)
    for name in ("LEARNING_RATE", "MUON_LEARNING_RATE", "GRADIENT_CLIP"):
        number(name, 1e-12, math.inf, "a number above 0")
    for name in ("WEIGHT_DECAY", "EMA_GAMMA", "GUIDANCE_SCALE"):
        number(name, 0, math.inf, "a number of at least 0")
    for name in ("DROPOUT", "LABEL_DROPOUT"):
        number(name, 0, 0.999, "a number from 0 to below 1")
    number("SAMPLING_ETA", 0, 1, "a number from 0 to 1")
    number("BETA_START", 1e-12, 1, "a number above 0, at most 1")
    number("BETA_END", 1e-12, 1, "a number above 0, at most 1")
    check("BETA_SCHEDULE", '"cosine" or "linear"', lambda v: v in ("cosine", "linear"))
    check("PRECISION", '"auto", "bf16" or "fp32"', lambda v: v in ("auto", "bf16", "fp32"))
    check("CHANNELS", "a tuple of 1 to 4 positive integers, the last a multiple of "
          f"ATTENTION_HEAD_DIM = {ATTENTION_HEAD_DIM}",
          lambda v: 1 <= len(v) <= 4 and all(isinstance(c, int) and c > 0 for c in v)
          and v[-1] % ATTENTION_HEAD_DIM == 0)
    check("BLOCKS", "a tuple of integers of at least 0, as many as CHANNELS",
          lambda v: len(v) == len(CHANNELS) and all(isinstance(c, int) and c >= 0 for c in v))
    check("NUM_CLASSES", "10, the number of classes of Fashion-MNIST", lambda v: v == 10)
    check("EMBEDDING_DIM", "a multiple of 8", lambda v: v % 8 == 0)
    world = int(os.environ.get("WORLD_SIZE", 1))
    check("BATCH_SIZE", f"at least 2 for each of the {world} processes, and the same for each",
          lambda v: v % world == 0 and v // world >= 2)
    if problems:
        raise UserError("; ".join(problems))
    noise_schedule(NUM_DIFFUSION_STEPS, BETA_SCHEDULE, BETA_START, BETA_END)
    try:
        pick_device()
        torch.zeros(1, device=pick_device())
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'DEVICE must be "auto" or a device that torch can use, got {DEVICE!r} '
                        f"({error})") from error


def check_output(trainer):
    """Raise UserError when the pictures' folder or the disk cannot take what a run writes."""
    try:
        Path(PICTURE_DIR).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=PICTURE_DIR):
            pass
    except OSError as error:
        raise UserError(f"PICTURE_DIR must be a folder that can be written to, got "
                        f"{PICTURE_DIR!r} ({error.strerror})") from error
    size = 4 * 4 * parameter_count(trainer.model)   # weights, average, at most two moments
    needed = (4 + EPOCHS // CHECKPOINT_EVERY) * size + EPOCHS // PICTURES_EVERY * 500_000
    free = shutil.disk_usage(".").free
    if free < needed:
        raise UserError(f"the disk of {Path.cwd()} has {free / 1e6:.0f} MB free, but this run's "
                        f"checkpoints and pictures need {needed / 1e6:.0f} MB: raise "
                        f"CHECKPOINT_EVERY = {CHECKPOINT_EVERY} or PICTURES_EVERY = "
                        f"{PICTURES_EVERY}, or free some space")


def check_losses(sums):
    """Raise UserError when training has diverged; an untrained model's loss is about 1."""
    loss = mean_losses(sums)["loss"]
    if not loss < 10:
        raise UserError(f"training diverged: the loss is {loss:g}. The last good checkpoint is "
                        "kept; lower LEARNING_RATE, MUON_LEARNING_RATE or GRADIENT_CLIP, raise "
                        'WARMUP_STEPS, or set PRECISION = "fp32", and run again')


def report(trainer, source, images, heldout):
    """Say what will be done."""
    model, device = trainer.model, trainer.device
    name = f"{torch.cuda.get_device_name(device)} ({device})" if device.type == "cuda" else device
    changed = [f"{name} = {globals()[name]!r}" for name in DEFAULTS
               if globals()[name] != DEFAULTS[name]]
    print(f"device      {name}, {trainer.precision}, {torch.get_num_threads()} CPU threads, "
          f"{rank_and_world()[1]} process(es), torch {torch.__version__}\n"
          f"data        {len(images):,} training and {len(heldout):,} held-out images from "
          f"{source}\n"
          f"model       {parameter_count(model):,} parameters, "
          f"{flops_per_image(model) / 1e6:.1f} MFLOP per image\n"
          f"training    {EPOCHS} epochs of {len(images) // BATCH_SIZE} steps of {BATCH_SIZE} "
          f"images\n"
          f"constants   {', '.join(changed) or 'all at their defaults'}\n"
          f"outputs     {checkpoint_name('last')}, _best_model, _epoch_*; training_loss.png, "
          f"training_log.csv; {PICTURE_DIR}/")


def duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h {minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m {seconds:02d}s"


def write_checkpoints(trainer):
    """All the checkpoints that are due at the end of an epoch; last comes last."""
    progress, state = trainer.progress, trainer.state_dict()
    if progress["epoch"] % CHECKPOINT_EVERY == 0:
        write_checkpoint(checkpoint_name(f"epoch_{progress['epoch']}"), state)
    if progress["best_epoch"] == progress["epoch"]:
        write_checkpoint(checkpoint_name("best_model"), state)
    write_checkpoint(checkpoint_name("last"), state)


def finish_epoch(trainer, images, labels, heldout):
    """Judge the averaged weights, draw, log and save; returns the epoch's row of the log."""
    progress, (rank, _) = trainer.progress, rank_and_world()
    if is_distributed():
        dist.all_reduce(progress["sums"])
    check_losses(progress["sums"])
    row = {"epoch": progress["epoch"] + 1, "step": progress["step"]}
    row |= {f"train_{k}": v for k, v in mean_losses(progress["sums"]).items()}
    progress.update(epoch=row["epoch"], position=0, sums=torch.zeros(2, 3))
    if rank == 0:
        refresh_batch_norm(trainer.average, images, labels, trainer.precision)
        losses = heldout_loss(trainer.average, *heldout, trainer.precision)
        row |= {f"heldout_{k}": v for k, v in losses.items()}
        progress["history"].append(row)
        if losses["loss"] < progress["best_loss"]:
            progress.update(best_loss=losses["loss"], best_epoch=row["epoch"])
        if row["epoch"] % PICTURES_EVERY == 0:
            generate_visualizations(trainer.average, row["epoch"], trainer.precision)
        plot_losses(progress["history"])
        write_log(progress["history"])
        write_checkpoints(trainer)
    return row


def train(trainer, images, labels, heldout, stop):
    """Run the epochs that are left, from wherever the trainer's progress stands."""
    progress, (rank, world) = trainer.progress, rank_and_world()
    per_epoch = len(images) // BATCH_SIZE * BATCH_SIZE
    started, trained = time.perf_counter(), 0
    while progress["epoch"] < EPOCHS:
        epoch, epoch_started, first = progress["epoch"] + 1, time.perf_counter(), trained
        with tqdm(total=per_epoch, initial=progress["position"], desc=f"epoch {epoch}/{EPOCHS}",
                  unit=" images", leave=False, disable=None if rank == 0 else True) as bar:
            while progress["position"] + BATCH_SIZE <= len(images):
                if number := stop.agreed():
                    if rank == 0:
                        check_losses(progress["sums"])
                        write_checkpoint(checkpoint_name("last"), trainer.state_dict())
                    raise Interrupted(number)
                trainer.step(images, labels)
                trained += BATCH_SIZE
                if progress["step"] % 20 == 0:
                    check_losses(progress["sums"])
                    left = (EPOCHS - progress["epoch"]) * per_epoch - progress["position"]
                    left *= (time.perf_counter() - started) / trained
                    bar.set_postfix_str(f"loss {mean_losses(progress['sums'])['loss']:.4f}, "
                                        f"{duration(left)} left in all", refresh=False)
                bar.update(BATCH_SIZE)
        rate = (trained - first) / (time.perf_counter() - epoch_started)
        row = finish_epoch(trainer, images, labels, heldout)
        if rank == 0:
            left = (EPOCHS - epoch) * per_epoch * (time.perf_counter() - started) / max(1, trained)
            best = ", best" if progress["best_epoch"] == epoch else ""
            print(f"epoch {epoch}/{EPOCHS}: training loss {row['train_loss']:.4f}, held-out "
                  f"{row['heldout_loss']:.4f}{best}; {rate:.0f} images/s, "
                  f"{duration(time.perf_counter() - epoch_started)}, {duration(left)} left",
                  flush=True)
        if is_distributed():
            dist.barrier()


def run(stop):
    """One process's whole run: data, model, resume, training, final pictures."""
    device = pick_device()
    precision, (rank, _) = pick_precision(device), rank_and_world()
    if rank == 0:
        folder, source = find_data()
    if is_distributed():                    # the first process may download; the others wait
        dist.barrier()
    folder, source = (folder, source) if rank == 0 else find_data()
    images, labels = (part.to(device) for part in load_fashion_mnist("train", folder))
    heldout = [part.to(device) for part in load_fashion_mnist("test", folder)]
    if BATCH_SIZE > len(images):
        raise UserError(f"BATCH_SIZE must be at most the number of training images, "
                        f"{len(images)}, got {BATCH_SIZE}")
    trainer = Trainer(device, precision)
    if rank == 0:
        report(trainer, source, images, heldout[0])
        check_output(trainer)
        path = resume(trainer)
        if path:
            progress = trainer.progress
            print(f"resuming from {path}: {progress['epoch']} epochs finished, "
                  f"{progress['position']} images into the next (RESUME = False starts anew)")
            if progress["position"] == 0 and path != checkpoint_name("last"):
                write_checkpoints(trainer)
    if is_distributed():
        states = [trainer.state_dict() if rank == 0 else None]
        dist.broadcast_object_list(states)
        trainer.load_state_dict(states[0])
    train(trainer, images, labels, heldout, stop)
    if rank == 0:
        generate_visualizations(trainer.average, trainer.progress["epoch"], precision, final=True)
        print(f"trained for {trainer.progress['epoch']} epochs, best held-out loss "
              f"{trainer.progress['best_loss']:.4f} in epoch {trainer.progress['best_epoch']}; "
              "see final_fashion_mnist_samples.png. Raise EPOCHS to go on")


def main():
    """Train, resume or finish the run in the working directory, as the constants say."""
    check_constants()
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:        # set by torchrun
            if pick_device().type == "cuda":
                torch.cuda.set_device(pick_device())
            dist.init_process_group("nccl" if pick_device().type == "cuda" else "gloo")
            stack.callback(dist.destroy_process_group)
        if rank_and_world()[0] == 0:
            stack.enter_context(hold_folder())
        run(stack.enter_context(StopRequest()))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"script_unet.py: {error}")
    except Interrupted as interrupted:
        print(f"stopped by {interrupted}, state saved: run the same command again to go on",
              flush=True)
        sys.exit(interrupted.code)
