"""Train a class-conditional denoising diffusion model on Fashion-MNIST, in one file.

Edit the constants, run `python script_unet.py`, open the PNGs. 150 epochs take two cores (Zen 3-5,
Xeons) 5 to 10 h, in bf16 1.3 to 3; Frechet distance after 14: 2 to 2.5 times real images' (n=2000).

An image is mixed with ever more noise in T steps; a network learns to tell the two apart; sampling
walks back from pure noise. x_start: a clean image, float (B, 1, H, W) in [-1, 1]; t (B,): a step, 0
(almost clean; [1]'s t = 1) ... T-1 (noise); x_t = sqrt(abar[t]) x_start + sqrt(1 - abar[t]) noise.

[1] Ho, Jain, Abbeel, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
[2] Nichol, Dhariwal, Improved Denoising Diffusion Probabilistic Models, arXiv:2102.09672
[3] Song, Meng, Ermon, Denoising Diffusion Implicit Models, arXiv:2010.02502
[4] Salimans, Ho, Progressive Distillation for Fast Sampling (v), arXiv:2202.00512
[5] Ho, Salimans, Classifier-Free Diffusion Guidance, arXiv:2207.12598
[6] Lu et al., DPM-Solver++, arXiv:2211.01095; its corrector: Zhao et al., UniPC, arXiv:2302.04867
[7] Shen et al., Efficient Attention: Attention with Linear Complexities, arXiv:1812.01243
[8] Karras et al., Analyzing and Improving the Training Dynamics (EMA), arXiv:2312.02696
[9] Liu et al., Muon is Scalable for LLM Training (on Jordan's Muon, 2024), arXiv:2502.16982
[10] Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, arXiv:2406.02507
[11] Liu et al., A ConvNet for the 2020s (separable blocks), arXiv:2201.03545
"""
import contextlib, copy, ctypes, filecmp, functools, gc, glob, gzip, hashlib, io, math, os, platform
import shutil, signal, sys, tempfile, time, zipfile, zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

# ---- Constants, read when main() runs: a notebook may set script_unet.EPOCHS = 2 first ---------
# Training
EPOCHS = 150                # passes over the training images; after 14, patterns are still vague
BATCH_SIZE = 256            # images per optimizer step; a CPU is 15% faster with 256 than with 128
LEARNING_RATE = 2.8e-3      # AdamW's peak, times .37 if EPOCHS = 150; falls to 0: see Trainer.step
MUON_LEARNING_RATE = 0.028  # likewise Muon's (Jordan's scale, not [9]'s); kernels of 16+ in and out
WARMUP_STEPS = 100          # learning rates rise over these steps, while running averages settle
WEIGHT_DECAY = 0.1          # each step shrinks all weights by this times the learning rate
GRADIENT_CLIP = 1.0         # largest L2 norm of the whole gradient; a safeguard, hardly ever met
DROPOUT = 0.0               # probability in each residual block; 60,000 images need none
LABEL_DROPOUT = 0.1         # share of labels that become the null class (any) [5], for the guide
EMA_GAMMA = 16.0            # the averaged weights [8] lag 1 / (2 + this) of the steps so far
SEED = 0                    # fixes all randomness but the held-out loss's, which is always the same
# Data
IMG_SIZE = 28               # pixels a side, 16 to 64; images of 28 x 28 are resampled to it
DATA_DIR = "data"           # torchvision's layout, and where its download goes
SYSTEM_DATA_DIR = "/usr/share/datasets/fashion-mnist"  # Debian's package dataset-fashion-mnist
# Model
PATCH_SIZE = 2              # 1 to 4; p x p pixels become one cell, so the work falls by p * p
CHANNELS = (64, 96, 128)    # width at each resolution: 14 x 14 cells, 7 x 7, then 4 x 4
BLOCKS = (1, 1, 1)          # residual blocks at each resolution, on the way down and up again
EMBEDDING_DIM = 256         # features of the embedding of time and class; 512 gain nothing
ATTENTION_HEAD_DIM = 64     # features of each attention head; divides the last of CHANNELS
# Diffusion
NUM_DIFFUSION_STEPS = 100   # T, the steps from image to noise; few, as sampling visits only some
BETA_SCHEDULE = "cosine"    # "cosine" [2] or "linear" [1]; beta: the share of variance a step takes
BETA_START = 1e-4           # linear only: the first beta at T = 1000, rescaled by 1000 / T
BETA_END = 0.02             # linear only: the last beta at T = 1000, rescaled by 1000 / T
# Sampling
SAMPLING_STEPS = 22         # of the T steps; more are slower and hardly better
SAMPLING_ETA = 0.0          # noise added at each step: 0: none [6]; 1: all of DDPM's [1, 3]
SAMPLING_GRAIN = 0.75       # std of noise left on clothes, in gray levels: cloth has grain; 0: none
GUIDANCE_SCALE = 0.0        # 0: by length of training, 2.8 to 1.5; 1: off; more: clearer, less real
# Machine and output, in the working directory
PRECISION = "auto"          # "auto": bf16 where the hardware computes in it; or "bf16", "fp32"
RESUME = True               # go on from the newest checkpoint; False sets older ones aside
CHECKPOINT_EVERY = 10       # epochs between the numbered checkpoints
PICTURE_COLUMNS = 10        # samples per class, and steps shown on the way from noise to image
PICTURE_DIR = "epoch_visualizations"           # where the pictures of each epoch go
CHECKPOINT_PREFIX = "fashion_mnist_diffusion"  # what the checkpoints' paths start with

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
               "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
NUM_CLASSES = len(CLASS_NAMES)  # labels 0 ... 9; label 10 is the null class: any of them
FORMAT = 5  # of the checkpoints: raise it when their parts, or what their weights mean, change
MODEL_CONSTANTS = """FORMAT IMG_SIZE NUM_CLASSES PATCH_SIZE CHANNELS BLOCKS EMBEDDING_DIM BETA_END
    ATTENTION_HEAD_DIM NUM_DIFFUSION_STEPS BETA_SCHEDULE BETA_START""".split()  # saved with weights
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # processes; RANK: this one's number (torchrun)
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0  # other launchers may set it alone

class UserError(Exception): """Something the user can mend; it names the constant or the file."""
def again():  # for messages: RESUME = False would set aside what there is to go on from
    return f"run the same command again{'' if RESUME else ' with RESUME = True'}"
def say(text):  # print it at once; where standard output has gone away, on standard error
    for name in [x for x in ("stdout", "stderr") if vars(sys)[x]]:
        with contextlib.suppress(OSError): return print(text, file=vars(sys)[name], flush=True)
        setattr(sys, name, None)  # or Python's last flush would fail, and change the exit status
def model_constants(others=None):  # {name: value} as set now, but for these others
    return {name: globals()[name] for name in MODEL_CONSTANTS} | (others or {})
def generator(*keys):
    """A torch.Generator, on the CPU, for the stream that the keys name, e.g. "order", SEED, 17."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
def pick_device():  # not MPS: wrong channels_last gradients (pytorch issues 107214, 175189)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

# ---- Data: four gzipped IDX files, kept in memory as uint8 -------------------------------------
DATA_FILES = {"train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
              "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")}
def bad_data(path, reason):
    return UserError(f"{path} {reason}. Make it readable, or delete it and run again to download "
                     "it, or first `apt-get install dataset-fashion-mnist` on Debian or Ubuntu")

def read_idx(path):
    """The uint8 array in a gzipped IDX file. Raises UserError when it is unreadable or damaged."""
    try:
        data = gzip.decompress(Path(path).read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise bad_data(path, f"cannot be read as a gzip file ({error})") from error
    # Header: two zero bytes, 8 for unsigned bytes, number of dimensions, big-endian sizes
    if data[:4] not in (b"\0\0\x08\1", b"\0\0\x08\3"):
        raise bad_data(path, f"has the wrong magic number {data[:4].hex()}, not 0000080[13]")
    start = 4 + 4 * data[3]
    shape = [int.from_bytes(data[i:i + 4], "big") for i in range(4, start, 4)]
    if len(data) - start != math.prod(shape):
        raise bad_data(path, f"announces a count of {shape}, but has {len(data) - start} bytes")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)

def find_data():
    """The folder that has the four files; downloads them when none has. Raises UserError."""
    raw, tried = Path(DATA_DIR, "FashionMNIST", "raw"), []
    for folder in (raw, Path(SYSTEM_DATA_DIR)):
        missing = [x for x in sum(DATA_FILES.values(), ()) if not os.path.isfile(folder / x)]
        if not missing: return folder
        tried.append(f"{folder} (without {missing[0]})")
    try:  # Downloaded aside, moved when whole: a broken download leaves nothing to be trusted
        from torchvision.datasets import FashionMNIST  # here, as its import takes a second
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw, prefix=".download-") as aside:
            FashionMNIST(aside, download=True)  # checks MD5 sums
            for file in Path(aside, "FashionMNIST", "raw").iterdir():
                old = raw / file.name   # if it differs, it may be yours, and is kept
                if old.exists() and not filecmp.cmp(old, file, False): shutil.copy(old, f"{old}.1")
                os.replace(file, old)
    except Exception as error:  # urllib's, ssl's, ImportError, OSError or RuntimeError
        raise UserError(f"Fashion-MNIST not found: tried {', '.join(tried)} and a download into "
                        f"DATA_DIR = {DATA_DIR!r} ({error}). Put the four .gz files into {raw}, or "
                        "`apt-get install dataset-fashion-mnist` on Debian or Ubuntu") from error
    return raw

def load_fashion_mnist(split, folder=None):
    """uint8 (N, 1, IMG_SIZE, IMG_SIZE), labels int64 (N,), of "train" or "test"; or UserError."""
    paths = [Path(folder or find_data(), name) for name in DATA_FILES[split]]
    images, labels = map(read_idx, paths)
    if len(images) < 4 or images.shape[1:] not in ((28, 28), (IMG_SIZE, IMG_SIZE)):
        raise bad_data(paths[0], f"is {images.shape}, not 4+ of 28 x 28 or (set it) {IMG_SIZE=}")
    if labels.shape != images.shape[:1] or labels.max() >= NUM_CLASSES:
        raise bad_data(paths[1], f"must count {len(images)} labels below {NUM_CLASSES=}")
    images, labels = torch.tensor(images)[:, None], torch.tensor(labels, dtype=torch.long)
    return F.interpolate(images, IMG_SIZE, mode="bilinear", antialias=True), labels     # or as is

def to_float(images): return images.float() / 127.5 - 1     # 0 ... 255 to -1 ... 1
def to_uint8(images): return ((images + 1) * 127.5).round().clamp(0, 255).byte()    # and back

# ---- Building blocks, small to large; maps are (B, C, H, W) in channels_last memory ------------
class Conv1x1(nn.Conv2d):  # (B, in, H, W) -> (B, out, H, W), as a matrix product: faster with AMX
    def forward(self, x):
        weight = self.weight.movedim(1, 3).flatten(1)   # so its gradient is channels_last as well
        return F.linear(x.movedim(1, 3), weight, self.bias).movedim(3, 1)   # (B, out, H, W)

class PatchConv(nn.Module):
    """Non-overlapping p x p patches to one pixel each; (B, in, H, W) -> (B, out, H/p, W/p).
    Sizes that p does not divide are rounded up: padded with zeros, the smaller half first."""
    def __init__(self, in_channels, out_channels, patch_size):
        super().__init__()
        self.patch_size = patch_size
        self.conv = Conv1x1(in_channels * patch_size**2, out_channels, 1, bias=False)
    def forward(self, x):
        p = self.patch_size
        rows, cols = -x.shape[-2] % p, -x.shape[-1] % p
        if rows or cols: x = F.pad(x, (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2))
        # Reshape to (B, H/p, p, W/p, p, in), then a matrix product: on a CPU faster than stride p
        x = x.permute(0, 2, 3, 1).unflatten(2, (-1, p)).unflatten(1, (-1, p))
        return self.conv(x.transpose(2, 3).flatten(3).permute(0, 3, 1, 2))  # (B, out, H/p, W/p)

class PatchExpand(nn.Module):
    """Each pixel to a p x p patch; (B, in, H/p, W/p), size = (H, W) -> (B, out, H, W).
    Crops what PatchConv pads, so that every patch lies where it came from."""
    def __init__(self, in_channels, out_channels, patch_size):
        super().__init__()
        self.patch_size = patch_size
        self.conv = Conv1x1(in_channels, out_channels * patch_size**2, 1, bias=False)
    def forward(self, x, size):
        x = self.conv(x).permute(0, 2, 3, 1).unflatten(3, (self.patch_size, self.patch_size, -1))
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)   # not yet cropped
        top, left = (x.shape[-2] - size[0]) // 2, (x.shape[-1] - size[1]) // 2
        return x[..., top:top + size[0], left:left + size[1]]       # (B, out, H, W)

class DoubleConv(nn.Module):
    """second(norm(first(x)) * (1 + scale) + shift); x (B, C, H, W) -> same; emb (B, E) gives both.
    Plain: first = norm, hard swish, 3 x 3; second = hard swish, dropout, 3 x 3 or 1 x 1 (`kernel`).
    Separable, less work ([11] figure 4): first = each channel's 3 x 3; second = 1 x 1 to 2 C, hard
    swish, dropout, 1 x 1 to C. The last starts at zero: a residual block starts as the identity."""
    def __init__(self, channels, embedding_dim, dropout=0.0, separable=False, kernel=3):
        super().__init__()
        c, norm, act, drop = channels, nn.BatchNorm2d, nn.Hardswish(), nn.Dropout(dropout)
        conv = functools.partial(nn.Conv2d, c, c, 3, padding="same", bias=False)
        first = [conv(groups=c)] if separable else [norm(c), act, conv()]
        self.first, self.norm = nn.Sequential(*first), norm(c)
        self.scale_shift = nn.Linear(embedding_dim, 2 * c)
        second = ([Conv1x1(c, 2 * c, 1), act, drop, Conv1x1(2 * c, c, 1, bias=False)] if separable
                  else [act, drop, conv() if kernel == 3 else Conv1x1(c, c, 1, bias=False)])
        self.second = nn.Sequential(*second)
        nn.init.zeros_(self.second[-1].weight)
    def forward(self, x, emb):  # -> (B, C, H, W)
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1)
        return self.second(torch.addcmul(shift, self.norm(self.first(x)), 1 + scale))

class ResBlock(nn.Module):
    """x + DoubleConv(...)(x, emb); (B, C, H, W), (B, E) -> (B, C, H, W)."""
    def __init__(self, *args, **kwargs):
        super().__init__()
        self.double_conv = DoubleConv(*args, **kwargs)
    def forward(self, x, emb):
        return x + self.double_conv(x, emb)                         # (B, C, H, W)

class Blocks(nn.ModuleList):  # ResBlocks in a row; (B, C, H, W), emb (B, E) -> (B, C, H, W)
    def forward(self, x, emb):
        for block in self: x = block(x, emb)
        return x                                                    # (B, C, H, W)

class Down(nn.Module):
    """PatchConv to a coarser grid, residual blocks; x (B, in, H, W), emb -> (B, out, H/p, W/p)."""
    def __init__(self, in_channels, out_channels, patch_size, blocks, *args, **kwargs):
        super().__init__()
        self.patch_conv = PatchConv(in_channels, out_channels, patch_size)
        self.blocks = Blocks(ResBlock(out_channels, *args, **kwargs) for _ in range(blocks))
    def forward(self, x, emb):
        return self.blocks(self.patch_conv(x), emb)                 # (B, out, H/p, W/p)

class Up(nn.Module):
    """To a finer grid: PatchExpand, plus the encoder's map of that grid, then residual blocks.
    (B, in, H/p, W/p), skip (B, out, H, W), emb (B, E) -> (B, out, H, W)."""
    def __init__(self, in_channels, out_channels, patch_size, blocks, *args, **kwargs):
        super().__init__()
        self.patch_expand = PatchExpand(in_channels, out_channels, patch_size)
        self.blocks = Blocks(ResBlock(out_channels, *args, **kwargs) for _ in range(blocks))
    def forward(self, x, skip, emb):
        return self.blocks(self.patch_expand(x, skip.shape[-2:]) + skip, emb)   # (B, out, H, W)

class SelfAttention(nn.Module):
    """Multi-head linear attention [7] section 3.2, residual, O(N), N = H W; (B, C, H, W) -> same.
    softmax(q) (softmax(k)^T v), q's over features, k's over places; no N x N weights are formed."""
    def __init__(self, channels, head_dim):
        super().__init__()
        self.heads, self.norm = channels // head_dim, nn.BatchNorm2d(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels, bias=False)
        nn.init.zeros_(self.out.weight)
    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)                    # (B, N, C), N = H W
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, -1))            # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, heads, N, d)
        context = k.softmax(-2).transpose(-1, -2) @ v                       # (B, heads, d, d)
        mixed = (q.softmax(-1) @ context).transpose(1, 2)                   # (B, N, heads, d)
        return x + self.out(mixed.flatten(2)).transpose(1, 2).view_as(x)    # (B, C, H, W)

# ---- The noise schedule, and the model that carries it -----------------------------------------
def alphas_cumprod(constants=None):
    """abar (T,), float32: the share of x_start's variance left in x_t, [1] eq. 4; a step takes beta
    of it. "cosine": [2] eq. 17, s = 0.008; "linear": [1] section 4, * 1000 / T, so any T ends in
    noise; betas <= 0.999. UserError unless abar[T-1] is 1e-30 to 0.001, each beta 2e-7 or more."""
    c = model_constants(constants)
    T, start, end = c["NUM_DIFFUSION_STEPS"], c["BETA_START"], c["BETA_END"]
    time = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = {"cosine": 1 - f[1:] / f[:-1],
             "linear": torch.linspace(start, end, T, dtype=torch.float64) * 1000 / T}
    betas = betas[c["BETA_SCHEDULE"]].clamp(max=0.999)
    if betas.min() < 2e-7 or not 1e-30 < (1 - betas).prod() < 1e-3:  # in float32, 1 - 1e-8 is 1
        raise UserError("BETA_START and BETA_END must leave a share of 1e-30 to 0.001 of the image "
                        f"at the end, 1000 / T times each be 2e-7 or more, got {start} and {end}")
    return (1 - betas).cumprod(0).float()

def time_embedding(time):
    """Cosines and sines of time (B,) in 0 ... 1 at 32 angular frequencies, 1 to 1000; (B, 64)."""
    angles = time[:, None] * 10 ** torch.linspace(0, 3, 32, device=time.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)

class FashionMNISTUNetDenoiser(nn.Module):
    """A U-Net on patches; forward(x_t, t, labels) gives v (B, 1, H, W), see x_start_from_v.
    x_t float (B, 1, H, W); t int (B,) in 0 ... T-1; labels int (B,), NUM_CLASSES for any class.
    `constants` overrides model_constants(), unchecked but for betas; all are kept, and abar."""
    def __init__(self, constants=None, dropout=0.0):
        super().__init__()
        self.constants = c = model_constants(constants)
        channels, blocks, dim = c["CHANNELS"], c["BLOCKS"], c["EMBEDDING_DIM"]
        self.register_buffer("abar", alphas_cumprod(c), persistent=False)
        self.register_buffer("epochs", torch.tensor(0))  # usual_epoch()s trained, for guidance()
        self.guide = (self,)  # itself, or a weaker model for guidance; a tuple: not a submodule
        self.time_mlp = nn.Sequential(nn.Linear(64, dim), nn.Hardswish(), nn.Linear(dim, dim))
        self.class_embedding = nn.Embedding(c["NUM_CLASSES"] + 1, dim)
        nn.init.normal_(self.class_embedding.weight, std=0.5)   # torch's 1 draws much worse
        downs = zip((1, *channels), channels, (c["PATCH_SIZE"], 2, 2, 2), blocks)  # in, out, p, n
        self.downs = nn.ModuleList(Down(*sizes, dim, dropout, separable=True) for sizes in downs)
        self.attention = SelfAttention(channels[-1], c["ATTENTION_HEAD_DIM"])
        self.middle = Blocks(ResBlock(channels[-1], dim, dropout) for _ in range(blocks[-1]))
        self.ups = nn.ModuleList(Up(channels[i + 1], channels[i], 2, blocks[i], dim, dropout,
                                    kernel=1) for i in reversed(range(len(channels) - 1)))
        self.norm = nn.BatchNorm2d(channels[0])
        self.to_pixels = PatchExpand(channels[0], 1, c["PATCH_SIZE"])
        nn.init.zeros_(self.to_pixels.conv.weight)
    def forward(self, x_t, t, labels):
        emb = self.time_mlp(time_embedding(t / len(self.abar)))     # (B, E)
        emb = F.hardswish(emb + self.class_embedding(labels))       # (B, E)
        x, skips = x_t, []
        for down in self.downs:
            x = down(x, emb)                                        # (B, C_i, H_i, W_i)
            skips.append(x)
        x = self.middle(self.attention(skips.pop()), emb)           # (B, C_-1, H_-1, W_-1)
        for up in self.ups:
            x = up(x, skips.pop(), emb)                             # (B, C_i, H_i, W_i)
        return self.to_pixels(F.hardswish(self.norm(x)), x_t.shape[-2:])    # (B, 1, H, W)

def model_size(model):
    """(parameters, operations of one image's convolutions and matrix products); multiply-add: 2."""
    size, label = model.constants["IMG_SIZE"], torch.zeros(1, dtype=int, device=model.abar.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).eval()(torch.zeros(1, 1, size, size).to(label.device), label, label)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()

# ---- The diffusion process ---------------------------------------------------------------------
def q_sample(x_start, t, noise=None, abar=None):
    """x_t ~ q(x_t | x_start), [1] eq. 4: sqrt(abar_t) x_start + sqrt(1 - abar_t) noise.
    x_start, noise (default: fresh) float (B, 1, H, W); t int (B,); abar (T,) (the constants')."""
    noise = torch.randn_like(x_start) if noise is None else noise
    a = (alphas_cumprod().to(t.device) if abar is None else abar)[t].view(-1, 1, 1, 1)
    return a.sqrt() * x_start + (1 - a).sqrt() * noise

def x_start_from_v(x_t, t, v, abar):
    """x_start = sqrt(abar_t) x_t - sqrt(1 - abar_t) v, [4] section 4.
    The model predicts v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_start."""
    a = abar[t].view(-1, 1, 1, 1)
    return a.sqrt() * x_t - (1 - a).sqrt() * v

def posterior(x_start, x_t, abar_t, abar_next, eta=1.0):
    """Mean (B, 1, H, W) and standard deviation of q(x_next | x_t, x_start), [3] eq. 7 and 16.
    abar_t < 1 and abar_next, from abar_t to 1 (no noise): floats. eta 1: DDPM's, [1] eq. 7."""
    noise = (x_t - math.sqrt(abar_t) * x_start) / math.sqrt(1 - abar_t)
    std = eta * math.sqrt((1 - abar_next) / (1 - abar_t) * (1 - abar_t / abar_next))
    return math.sqrt(abar_next) * x_start + math.sqrt(max(0, 1 - abar_next - std**2)) * noise, std

def precision(device):
    """PRECISION or, for "auto", "bf16" where the hardware, not an emulation, multiplies in it."""
    if PRECISION != "auto": return PRECISION
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # older versions have none: fp32
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
            device.type == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16")))
    return "bf16" if fast else "fp32"
def predict_x_start(model, x_t, t, labels):
    """The model's x_start (B, 1, H, W), float32, not clipped."""
    with torch.autocast(t.device.type, torch.bfloat16, enabled=precision(t.device) == "bf16"):
        v = model(x_t, t, labels)
    return x_start_from_v(x_t, t, v.float(), model.abar)

def diffusion_loss(model, x_start, t, labels, noise):
    """Mean squared error of v for each image, (B,), with two exceptions that keep black black.
    Where a pixel of x_start is -1 or 1, as half are, a prediction beyond it costs nothing: sampling
    clips it. At t = 0, sampling's last, absolute error: best is the median, black if most are."""
    error = predict_x_start(model, q_sample(x_start, t, noise, model.abar), t, labels) - x_start
    error = error.masked_fill((x_start.abs() >= 1) & (error * x_start > 0), 0)
    error = error / (1 - model.abar[t]).sqrt().view(-1, 1, 1, 1)    # now v's, but for the sign
    return torch.where(t.view(-1, 1, 1, 1) == 0, error.abs(), error.square()).mean((1, 2, 3))

# ---- Sampling ----------------------------------------------------------------------------------
def guidance(model):
    """GUIDANCE_SCALE or, for 0, less the longer trained: up to 8 usual epochs 2.8; 150: 1.5."""
    return GUIDANCE_SCALE or 1.43 + 11 / max(8, model.epochs.item())

@torch.no_grad()
def sample(model, labels, steps=None, eta=None, guidance_scale=None, seed=None,
           callback=lambda t, x_t: None, batch_size=500):
    """Images (N, 1, H, W) in [-1, 1] of int labels (N,), by a model in eval mode, on its device.
    steps (1 to T), eta, seed default to the constants, the scale (None or 0) to guidance(). eta 0:
    second-order solver and corrector [6]; 1 with T steps: DDPM [1]; between: the solver plus noise.
    All leave SAMPLING_GRAIN of the noise (at most t = 0's) on clothes: predictions are too smooth.
    Guidance: guide + scale (model - guide), [5] eq. 6 with w = scale - 1 and [10]'s weaker guide;
    both are clipped first, or their overshoots would leave noise on black. Image i's noise depends
    on seed and i alone. callback(t, x_t) sees all before each step t and, at t = -1, the result."""
    steps = SAMPLING_STEPS if steps is None else steps
    eta = SAMPLING_ETA if eta is None else eta
    seed = SEED if seed is None else seed
    abar, size, T = model.abar.tolist(), model.constants["IMG_SIZE"], len(model.abar)
    lam = [math.log(a / (1 - a)) / 2 for a in abar]                 # [6]'s lambda
    abar.append(max(abar[0], 1 - (SAMPLING_GRAIN / 127.5) ** 2))    # so abar[-1] is the image's
    labels = torch.as_tensor(labels, dtype=torch.long, device=model.abar.device)
    streams = [generator("sample", int(seed), i) for i in range(len(labels))]
    def fresh_noise():  # one stream per image, on the CPU: the same on all machines, in any batch
        noise = [torch.randn(1, 1, size, size, generator=stream) for stream in streams]
        return torch.cat([torch.empty(0, 1, size, size), *noise]).to(labels.device)  # N may be 0
    def predict(net, x_t, t):  # x_start (N, 1, H, W), clipped to the range of images
        batches = zip(x_t.split(batch_size), labels.split(batch_size))
        x_start = [predict_x_start(net, x, torch.full_like(y, t), y) for x, y in batches]
        return torch.cat(x_start).clamp(-1, 1)
    x_t, before, scale = fresh_noise(), None, guidance_scale or guidance(model)
    u = np.linspace(1, 0, min(steps, T))                    # t / (T - 1), from noise to image
    u += (1 - len(u) / T) * u * (1 - u) * (2 * u - 1)       # denser at the ends, >= 1 step apart
    visited = (u * (T - 1)).round().astype(int).tolist()
    for t, t_next in zip(visited, [*visited[1:], -1]):              # -1: the image
        callback(t, x_t)
        x_start = predict(model, x_t, t)
        if scale != 1:
            x_start = torch.lerp(predict(model.guide[0], x_t, t), x_start, scale).clamp(-1, 1)
        estimate = x_start                                          # (N, 1, H, W)
        if before and eta < 1:
            s, x_s, start_s = before                                # of the step before t
            if eta == 0:  # [6] UniC-1: the step from s to t again, now with both ends' x_start
                x_t, _ = posterior((start_s + x_start) / 2, x_s, abar[s], abar[t], 0)
            ratio = (lam[t_next] - lam[t]) / (lam[t] - lam[s]) if t else 0  # last: first order
            estimate = x_start + ratio / 2 * (x_start - start_s)    # [6] algorithm 2, at mid-step
        before = t, x_t, x_start                                    # kept for the next step
        x_t, std = posterior(estimate, x_t, abar[t], abar[t_next], eta)
        if std > 0: x_t = x_t + std * fresh_noise()
    cloth = (127.5 * x_start + 127).clamp(0, 1)     # 0 up to gray level 0.5 (black), 1 from 1.5 on
    x_t = torch.lerp(x_start, x_t, cloth).clamp(-1, 1)              # no grain on black
    callback(-1, x_t)
    return x_t

# ---- Averaged weights, and the held-out loss that judges them ----------------------------------
@torch.no_grad()
def update_average(average, model, step):
    """Power-function average of the weights after `step` (1, 2, ...) updates, [8] section 3.1."""
    decay = (1 - 1 / step) ** (EMA_GAMMA + 1)
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)

@torch.no_grad()
def refresh_batch_norm(model, images, labels, batches=20, batch_size=256):
    """Measure batch normalization's statistics for these weights, on noisy training images.
    Averaged weights fit neither the statistics of the last weights nor an average of them."""
    for norm in (part for part in model.eval().modules() if isinstance(part, nn.BatchNorm2d)):
        norm.train().reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
    draw, device = generator("batch norm", SEED), images.device
    for _ in range(batches):
        pick = torch.randint(len(images), (batch_size,), generator=draw).to(device)
        t = torch.randint(len(model.abar), (batch_size,), generator=draw).to(device)
        noise = torch.randn(batch_size, *images.shape[1:], generator=draw).to(device)
        diffusion_loss(model, to_float(images[pick]), t, labels[pick], noise)   # forward alone
    model.eval()

NOISE_LEVELS = ("early", "middle", "late")  # thirds of the steps, from little to much noise
def by_noise_level(losses, t, T):
    """(2, 3) sums and counts of the losses (B,) in each third of the steps t (B,)."""
    level = F.one_hot(t * 3 // T, 3).float()
    return torch.stack([losses.detach() @ level, level.sum(0)])
def mean_losses(sums):  # by_noise_level's, {"loss": ..., "early": ..., "middle": ..., "late": ...}
    total, count = torch.cat([sums.sum(1, keepdim=True), sums], dim=1)
    return dict(zip(("loss", *NOISE_LEVELS), (total / count).tolist()))

@torch.no_grad()
def heldout_loss(model, images, labels, batch_size=500):
    """mean_losses on uint8 images; image i has fixed noise and step i % T (N < T: i * T // N)."""
    T, sums, count = len(model.abar), 0, len(images)
    t = (torch.arange(count) * max(T, count) // count % T).to(images.device)
    noise = torch.randn(images.shape, generator=generator("held out")).to(images.device)
    for x, s, y, n in zip(*(part.split(batch_size) for part in (images, t, labels, noise))):
        sums = sums + by_noise_level(diffusion_loss(model, to_float(x), s, y, n), s, T)
    return mean_losses(sums)

# ---- Pictures ----------------------------------------------------------------------------------
def atomic_write(path, data):
    """Write bytes beside path, flush them, rename them over path: nobody ever meets half a file.
    Raises UserError when it cannot be written. Of several processes, the first writes."""
    if RANK: return
    beside = (path := Path(path)).with_name(f".{path.name}.writing")
    try:
        (path := path.absolute()).parent.mkdir(parents=True, exist_ok=True)  # if it was deleted
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        for wait in (0.1, 0.5, 2, 8) * (sys.platform == "win32"):   # refused while others read it
            with contextlib.suppress(PermissionError): return os.replace(beside, path)
            time.sleep(wait)
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError): beside.unlink()
        raise UserError(f"cannot write {path} ({error.strerror}), an old one is kept. "
                        f"Make room, make it writable or close it, and {again()}") from error
def save_figure(figure, path):
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=100)
    atomic_write(path, buffer.getvalue())

def mosaic(images, columns, gap=2):
    """Images (N, 1, H, W) in [-1, 1] as one uint8 array, white lines between; columns divides N."""
    images = F.pad(to_uint8(images.cpu()), (gap, 0, gap, 0), value=255)
    grid = images[:, 0].unflatten(0, (-1, columns)).transpose(1, 2)     # (rows, H, columns, W)
    return grid.flatten(2).flatten(0, 1)[gap:, gap:].numpy()

def draw_classes(images, names, title, path):
    """Save images (N, 1, H, W), a row per class, on a fixed gray scale, with names of columns."""
    columns, cell = len(names), images.shape[-1] + 2                # with mosaic's gap
    figure = Figure((1.8 + 0.68 * max(7, columns), 1.1 + 0.67 * NUM_CLASSES), layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.imshow(mosaic(images, columns), cmap="gray", vmin=0, vmax=255, interpolation="nearest",
                origin="upper", aspect="equal")     # whatever a user's style says
    axes.set_yticks([cell * (i + 0.5) for i in range(NUM_CLASSES)], CLASS_NAMES, parse_math=False)
    axes.set_xticks([cell * (column + 0.5) for column in range(columns)], names)
    axes.tick_params(which="both", length=0, grid_alpha=0)  # a style's grid crosses the clothes
    save_figure(figure, path)

def generate_visualizations(model, epoch, final=False):
    """Draw samples of each class, and how the first of each came out of noise: one fixed batch.
    Writes both PNGs of the epoch or, when final, the samples and a GIF, 5 classes (or 1) a row."""
    columns, wide, names, frames = PICTURE_COLUMNS, math.gcd(5, NUM_CLASSES), [], []
    def watch(t, x_t):
        names.append("image" if t < 0 else f"t = {t}")
        frames.append(x_t[::columns].to("cpu", copy=True))  # (NUM_CLASSES, 1, H, W), not a view
    images = sample(model, torch.arange(NUM_CLASSES).repeat_interleave(columns), callback=watch)
    stem, steps = Path(PICTURE_DIR, f"epoch_{epoch}"), f"{len(frames) - 1} of {len(model.abar)}"
    about = f"epoch {epoch}, {steps} steps, guidance {guidance(model):.3g}"
    draw_classes(images, range(1, columns + 1), f"Samples, {about}",
                 "final_fashion_mnist_samples.png" if final else f"{stem}_samples.png")
    if final:
        buffer, (first, *rest) = io.BytesIO(), [Image.fromarray(mosaic(f, wide)) for f in frames]
        times = [max(20, min(100, 5000 // len(rest)))] * len(rest) + [2000]     # ms, the image held
        first.save(buffer, "GIF", save_all=True, append_images=rest, loop=0, duration=times)
        return atomic_write("final_fashion_mnist_generation.gif", buffer.getvalue())
    shown = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
    draw_classes(torch.stack([frames[i] for i in shown], dim=1).flatten(0, 1),
                 [names[i] for i in shown], f"Noise to image, {about}", f"{stem}_generation.png")

def draw_losses(history):
    """training_loss.png: each epoch's loss, in all and by noise level, training and held out."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels, epochs = figure.subplots(1, 2), [row["epoch"] for row in history]
    for kind, style in (("train", ".--"), ("heldout", ".-")):
        for i, level in enumerate(("loss", *NOISE_LEVELS)):
            y = [row[f"{kind}_{level}"] for row in history]
            panels[min(i, 1)].plot(epochs, y, f"C{i}{style}", label=f"{kind} {level}: {y[-1]:.4f}")
    for axes, title in zip(panels, ("All steps", "By noise level (early steps: little noise)")):
        top = 1.2 * np.nanmax([line.get_ydata()[-1] for line in axes.lines])   # first may be above
        axes.set(title=title, xlabel="epoch", ylabel="loss", yscale="log", ylim=(None, top))
        axes.xaxis.set(major_locator=MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set(major_locator=MaxNLocator(12), major_formatter="{x:.3g}", minor_formatter="")
        axes.grid(alpha=0.3)
        axes.legend(ncols=2, fontsize="small")
    save_figure(figure, "training_loss.png")

# ---- Checkpoints -------------------------------------------------------------------------------
TRAINED = ("model", "average", "guide", "muon", "adamw")  # a Trainer's models and optimizers
def checkpoint_path(what): return Path(f"{CHECKPOINT_PREFIX}_{what}.pt")  # "last", "epoch_10" ...
def find_checkpoints():  # that exist; "epoch_" and 1 to 7 digits, so that "epoch_2_copy" is not one
    whats = "last", "best_model", *("epoch_" + "[0-9]" * n for n in range(1, 8))
    return [Path(p) for w in whats for p in glob.glob(f"{glob.escape(CHECKPOINT_PREFIX)}_{w}.pt")]

def read_checkpoint(path):
    """The checked state in a file; parts that another FORMAT lacks are {}. Raises UserError."""
    try:
        state = torch.load(data := io.BytesIO(Path(path).read_bytes()), "cpu", weights_only=True)
        if state["constants"].get("FORMAT") != FORMAT: state = dict.fromkeys(TRAINED, {}) | state
        weights = [v for x in TRAINED for v in state[x].values() if torch.is_tensor(v)]
        fine = state["progress"]["step"] >= 0 and all(v.isfinite().all() for v in weights)
        if not fine or zipfile.ZipFile(data).testzip():     # torch.load ignores checksums
            raise ValueError("its values are damaged or not finite")
    except Exception as error:  # torch.load raises whatever the bytes suggest to it
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:100]
        raise UserError(f"{path} cannot be read as this script's checkpoint ({reason})") from error
    return state

def load_denoiser(path, device=None):
    """A checkpoint's averaged model, frozen, its guide on the same device. Raises UserError."""
    state, device = read_checkpoint(path), device or pick_device()
    try:
        if (c := state["constants"]).get("FORMAT") != FORMAT: raise ValueError(f"not of {FORMAT=}")
        model, guide = (FashionMNISTUNetDenoiser(c).eval().requires_grad_(False) for _ in range(2))
        for net, part in ((model, "average"), (guide, "guide")): net.load_state_dict(state[part])
    except (RuntimeError, TypeError, LookupError, ValueError) as error:
        raise UserError(f"{path} does not fit this script's model: {error}") from error
    model.guide = (guide.to(device, memory_format=torch.channels_last),)
    return model.to(device, memory_format=torch.channels_last)

def newest_checkpoint(constants):
    """(path, state) of the newest whole checkpoint; without any, path is None. Sets damaged ones
    aside (if not RESUME, all). UserError: another model's, or unreadable, which may be whole."""
    most, newest, found = -1, None, {"constants": constants}    # the newest's step, path and state
    for path in find_checkpoints():
        try:
            if not RESUME: raise UserError("RESUME is False")   # and so is set aside below
            state = read_checkpoint(path)
            if (step := state["progress"]["step"]) > most: most, newest, found = step, path, state
        except UserError as error:  # if the disk or memory ("alloc") failed, the file may be whole
            if isinstance(e := error.__cause__, (OSError, MemoryError)) or "alloc" in str(e): raise
            number = next(i for i in range(1, 9999) if not Path(f"{path}.{i}").exists())
            aside = path.rename(f"{path}.{number}")
            say(f"{error}: {path} is kept as {aside}")
    theirs = found["constants"]
    differing = [f"{name} was {theirs.get(name)}, is {constants.get(name)}"
                 for name in {**constants, **theirs} if theirs.get(name) != constants.get(name)]
    if differing:
        raise UserError(f"{newest} has another model: {'; '.join(differing)}. Set these back "
                        "(FORMAT: take the script of then), or set RESUME = False to set it aside")
    return newest, found

# ---- Training ----------------------------------------------------------------------------------
def keep_freed_memory():
    """Let glibc reuse freed memory: mapping it anew costs a CPU a quarter of its speed."""
    if os.name == "posix" and platform.libc_ver()[0] == "glibc":  # M_MMAP_MAX, M_TRIM_THRESHOLD
        for option in ((-4, 0), (-1, 2**31 - 1)): ctypes.CDLL(None).mallopt(*option)

def over_processes(tensor, operation="SUM"):
    """The tensor's sum, or another of dist.ReduceOp, over the processes of this run."""
    if WORLD_SIZE > 1: dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
    return tensor

@functools.lru_cache(maxsize=1)
def epoch_order(seed, epoch, count, device):
    """A permutation of the images, another one each epoch; kept, as every step asks for it."""
    return torch.randperm(count, generator=generator("order", seed, epoch)).to(device)

def check_loss(loss):
    """The loss itself. Raises UserError when training has diverged; untrained, it is about 0.8."""
    if not loss < 10:
        raise UserError(f"training diverged (loss {loss:g}); the last good checkpoint is kept. "
                        "Lower LEARNING_RATE, MUON_LEARNING_RATE or GRADIENT_CLIP, raise "
                        f'WARMUP_STEPS or set PRECISION = "fp32", then {again()}')
    return loss

class InFloat32(torch.overrides.TorchFunctionMode):
    """Makes .bfloat16(), which Muon calls, do nothing: emulated, it is 2 to 15 times as slow."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return args[0] if function is torch.Tensor.bfloat16 else function(*args, **kwargs or {})

def usual_epoch(): return 60_000 // min(256, BATCH_SIZE)  # its updates: the unit of a run's length
def guide_step(count):  # updates until the guide stays: 3 usual epochs or, in runs under 8, 3/8
    return max(1, min(3 * usual_epoch(), 3 * EPOCHS * (count // BATCH_SIZE) // 8))
def finish_average(trainer, images, labels):
    """Make the averaged weights ready for sample(). Up to guide_step() the guide is a new copy,
    its classes a fifth nearer to a trained null class; then it is kept, and stays the weaker."""
    refresh_batch_norm(trainer.average, images, labels)
    trainer.average.epochs.fill_(math.ceil(trainer.progress["step"] / usual_epoch()))
    if trainer.progress["step"] <= guide_step(len(images)):
        trainer.guide.load_state_dict(trainer.average.state_dict())
        classes = trainer.guide.class_embedding.weight
        if LABEL_DROPOUT: classes[:-1].lerp_(classes[-1], 0.2)  # weaker: it errs alike, but more

class Trainer:
    """The weights, their average, its guide, the optimizers and the progress: what a resume needs.
    progress (`now`): "epoch" finished epochs, "position" images of the current one, "step" updates,
    "sums" the epoch's by_noise_level(), "best_loss", "best_epoch", "history" (a row per epoch)."""
    def __init__(self, device):
        torch.manual_seed(SEED)
        self.network = self.model = FashionMNISTUNetDenoiser(dropout=DROPOUT)   # one, but for DDP
        self.model.to(device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.guide = copy.deepcopy(self.average)
        self.average.guide = (self.guide,)
        if WORLD_SIZE > 1:  # gradients, on GPUs batch statistics too, are averaged over processes
            if device.type == "cuda": nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            self.network = nn.parallel.DistributedDataParallel(self.model)
            self.network.abar = self.model.abar  # for diffusion_loss
        self.kernels = [p for p in self.model.parameters() if p.ndim == 4 and min(p.shape[:2]) > 15]
        rest = [p for p in self.model.parameters() if all(p is not k for k in self.kernels)]
        # Muon orthogonalizes updates of matrices (out, h * w * in): views, so load kernels in place
        self.matrices = [nn.Parameter(k.data.movedim(1, 3).view(len(k), -1)) for k in self.kernels]
        self.muon = torch.optim.Muon([{"params": self.matrices}], MUON_LEARNING_RATE,
                                     momentum=0.9, ns_steps=3)  # torch's 0.95: no better; 5: slower
        self.adamw = torch.optim.AdamW(rest, LEARNING_RATE, (0.9, 0.99), fused=True)
        self.progress = {"epoch": 0, "position": 0, "step": 0, "sums": torch.zeros(2, 3),
                         "best_loss": math.inf, "best_epoch": 0, "history": []}

    def save(self, *names):
        if not all(p.isfinite().all() for p in self.model.parameters()): check_loss(math.nan)
        torch.save({"constants": self.model.constants, "progress": self.progress,
                    **{x: getattr(self, x).state_dict() for x in TRAINED}}, buffer := io.BytesIO())
        for name in names: atomic_write(checkpoint_path(name), buffer.getvalue())
    def save_epoch(self):
        """Write the checkpoints that are due at the end of an epoch, "last" last."""
        epoch, best = self.progress["epoch"], self.progress["best_epoch"]
        due = {f"epoch_{epoch}": epoch % CHECKPOINT_EVERY == 0, "best_model": epoch == best}
        self.save(*(name for name in due if due[name]), "last")

    def step(self, images, labels):
        """One update, [1] algorithm 1, on the next BATCH_SIZE images (uint8, on the device) of the
        epoch; each process draws the whole batch, by SEED, epoch and step. May make the guide."""
        now, T, device = self.progress, len(self.model.abar), images.device
        batch = epoch_order(SEED, now["epoch"], len(images), device)[now["position"]:][:BATCH_SIZE]
        torch.manual_seed(generator("step", SEED, now["step"]).initial_seed())
        t = torch.arange(BATCH_SIZE, device=device) + torch.rand(BATCH_SIZE, device=device)
        t = (t * T / BATCH_SIZE).long().clamp(max=T - 1)            # spread evenly over 0 ... T-1
        noise = torch.randn(BATCH_SIZE, *images.shape[1:], device=device)
        dropped = torch.rand(BATCH_SIZE, device=device) < LABEL_DROPOUT
        y = labels[batch].masked_fill(dropped, NUM_CLASSES)
        batch, t, y, noise = (part[RANK::WORLD_SIZE] for part in (batch, t, y, noise))  # its share
        losses = diffusion_loss(self.network.train(), to_float(images[batch]), t, y, noise)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        for m, k in zip(self.matrices, self.kernels): m.grad = k.grad.movedim(1, 3).flatten(1)
        left = max(0, 1 - (now["epoch"] + now["position"] / len(images)) / EPOCHS)  # of the run
        length = EPOCHS * (len(images) // BATCH_SIZE) / usual_epoch()  # usual epochs; 20+: low peak
        warm, peak = min(1, (now["step"] + 1) / WARMUP_STEPS), min(1, 20 / length) ** 0.5
        factor = warm * peak * left ** min(2, max(1, length / 6))  # fall: line to 6, square from 12
        for opt in (self.muon, self.adamw):     # by today's constants: a load leaves opt.defaults
            opt.param_groups[0].update(lr=factor * opt.defaults["lr"], weight_decay=WEIGHT_DECAY)
            with InFloat32() if precision(device) == "fp32" else contextlib.nullcontext():
                opt.step()
        self.model.zero_grad()
        now.update(step=now["step"] + 1, position=now["position"] + BATCH_SIZE)
        now["sums"] = now["sums"].to(device) + over_processes(by_noise_level(losses, t, T))
        update_average(self.average, self.model, now["step"])
        if now["step"] == guide_step(len(images)): finish_average(self, images, labels)

def finish_epoch(trainer, images, labels, heldout):
    """Judge the averaged weights, draw, log and, last, save."""
    now = trainer.progress
    finish_average(trainer, images, labels)
    row = {"epoch": now["epoch"] + 1, "step": now["step"]}
    for kind, losses in (("train", mean_losses(now["sums"])),
                         ("heldout", heldout_loss(trainer.average, *heldout))):
        check_loss(losses["loss"])
        row |= {f"{kind}_{name}": value for name, value in losses.items()}
    now.update(epoch=row["epoch"], position=0, sums=torch.zeros(2, 3))
    now["history"].append(row)
    if row["heldout_loss"] < now["best_loss"]:
        now.update(best_loss=row["heldout_loss"], best_epoch=row["epoch"])
    generate_visualizations(trainer.average, row["epoch"])
    draw_losses(now["history"])
    table = [row.keys(), *(past.values() for past in now["history"])]
    atomic_write("training_log.csv", "".join(",".join(map(str, x)) + "\n" for x in table).encode())
    trainer.save_epoch()
    gc.collect()  # figures are cyclic and would keep their memory for a while

def exit_if_asked(trainer, images, labels, stop):
    """Save and exit with 128 + the signal's number when there is one in the list `stop`."""
    if number := over_processes(torch.tensor(max(stop, default=0)), "MAX").item():
        finish_average(trainer, images, labels)
        trainer.save("last")
        say("\n" * os.isatty(1) + f"stopped by {signal.Signals(number).name}, saved in "
            f"{checkpoint_path('last')}: {again()} to go on")   # a bar leaves its line unended
        sys.exit(128 + number)

def train(trainer, images, labels, heldout, stop):
    """Run what is left; a bar on terminals (disable=None). Exits, saved, if `stop` has a signal."""
    now, per_epoch = trainer.progress, len(images) // BATCH_SIZE * BATCH_SIZE
    with tqdm(total=EPOCHS * per_epoch, initial=now["epoch"] * per_epoch + now["position"],
              unit=" images", smoothing=0, disable=RANK > 0 or not sys.stderr or None) as bar:
        while now["epoch"] < EPOCHS or now["position"]:  # an epoch begun is ended, if EPOCHS fell
            began, first, seen = time.perf_counter(), now["position"], now["sums"].to(images.device)
            bar.set_description(f"epoch {now['epoch'] + 1}/{EPOCHS}")
            while now["position"] + BATCH_SIZE <= len(images):
                trainer.step(images, labels)
                if now["step"] % 20 == 0 or stop or now["position"] + BATCH_SIZE > len(images):
                    loss, seen = check_loss(mean_losses(now["sums"] - seen)["loss"]), now["sums"]
                    bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)  # of the last 1 to 20
                bar.update(BATCH_SIZE)
                exit_if_asked(trainer, images, labels, stop)
            rate = (now["position"] - first) / (time.perf_counter() - began)
            finish_epoch(trainer, images, labels, heldout)
            row, best = now["history"][-1], " (best)" if now["best_epoch"] == now["epoch"] else ""
            seconds = time.perf_counter() - began + first / (rate or math.inf)  # a whole epoch
            with bar.external_write_mode():
                say(f"epoch {now['epoch']}/{EPOCHS}: loss {row['train_loss']:.4f}, held out "
                    f"{row['heldout_loss']:.4f}{best}, {rate:.0f} images/s, {seconds:.0f} s, "
                    f"{max(0, EPOCHS - now['epoch']) * seconds / 60:.0f} min left")
            exit_if_asked(trainer, images, labels, stop)

# ---- main --------------------------------------------------------------------------------------
# Default (again: users edit those above), which sets the type; then least and greatest, or choices
ALLOWED = {
    "EPOCHS": (150, 1, 1e6), "BATCH_SIZE": (256, 2, 1e5), "LEARNING_RATE": (2.8e-3, 1e-9, 10),
    "MUON_LEARNING_RATE": (0.028, 1e-9, 10), "WARMUP_STEPS": (100, 1, 1e6),
    "WEIGHT_DECAY": (0.1, 0, 10), "GRADIENT_CLIP": (1.0, 1e-9, 1e9), "DROPOUT": (0.0, 0, 0.99),
    "LABEL_DROPOUT": (0.1, 0, 0.99), "EMA_GAMMA": (16.0, 0, 1e6), "SEED": (0, 0, 1e9),
    "IMG_SIZE": (28, 16, 64), "PATCH_SIZE": (2, 1, 4), "CHANNELS": ((64, 96, 128), 1, 1e4),
    "BLOCKS": ((1, 1, 1), 0, 100), "EMBEDDING_DIM": (256, 1, 1e5),
    "ATTENTION_HEAD_DIM": (64, 1, 1e4), "NUM_DIFFUSION_STEPS": (100, 3, 1e4),
    "BETA_SCHEDULE": ("cosine", "linear"), "BETA_START": (1e-4, 1e-9, 1),
    "BETA_END": (0.02, 1e-9, 1), "SAMPLING_STEPS": (22, 1, 1e5), "SAMPLING_ETA": (0.0, 0, 1),
    "SAMPLING_GRAIN": (0.75, 0, 10), "GUIDANCE_SCALE": (0.0, 0, 100),
    "PRECISION": ("auto", "bf16", "fp32"), "RESUME": (True, False),
    "CHECKPOINT_EVERY": (10, 1, 1e6), "PICTURE_COLUMNS": (10, 2, 100), "NUM_CLASSES": (10, 1, 256)}
def check_constants():
    """Raise UserError naming each constant that cannot work, what is allowed and what it is."""
    wrong = []
    for name, allowed in ALLOWED.items():
        value, kind, limits = globals()[name], type(allowed[0]), allowed[1:]
        if kind in (bool, str):
            words, fine = " or ".join(map(repr, allowed)), type(value) is kind and value in allowed
        else:  # within limits: the number or, of a tuple, each integer
            words = {int: "an integer", float: "a number", tuple: "a tuple, each an integer"}[kind]
            words += " from %g to %g" % limits
            number, values = (int, value) if kind is tuple else (kind, (value,))
            fine = type(values) is tuple and all(
                type(v) in (int, number) and limits[0] <= v <= limits[1] for v in values)
        if not fine: wrong.append(f"{name} must be {words}, got {value!r}")
    if not wrong and not (1 <= len(BLOCKS) == len(CHANNELS) <= 4 and any(BLOCKS)):
        wrong.append(f"BLOCKS must be as many as CHANNELS, 1 to 4, and not all 0, got {BLOCKS!r}")
    elif not wrong and CHANNELS[-1] % ATTENTION_HEAD_DIM:
        wrong.append(f"ATTENTION_HEAD_DIM must divide {CHANNELS=}[-1], got {ATTENTION_HEAD_DIM}")
    if len(CLASS_NAMES) != NUM_CLASSES: wrong.append(f"{NUM_CLASSES=} must be {len(CLASS_NAMES)=}")
    if wrong: raise UserError("; ".join(wrong))
    alphas_cumprod()  # checks BETA_START and BETA_END together

@contextlib.contextmanager
def hold_folder():
    """Make the folders; lock the working directory meanwhile. UserError: held, or read-only."""
    path = Path(".fashion_mnist_diffusion.lock")
    try:
        for folder in (Path(), Path(PICTURE_DIR), checkpoint_path("last").parent):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        file = open(path, "a")
    except OSError as error:
        raise UserError(f"PICTURE_DIR = {PICTURE_DIR!r}, CHECKPOINT_PREFIX = {CHECKPOINT_PREFIX!r} "
                        f"and the working directory must be writable ({error})") from error
    with file:  # its end, as the process's, is the lock's
        with contextlib.suppress(ImportError, OSError):  # Windows and some disks have no locks
            import fcntl
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"another run holds {Path.cwd()}: {path.read_text()}. Wait for "
                                "it, stop it, or run in another folder") from error
            path.write_text(f"process {os.getpid()} on {platform.node()} since {time.ctime()}")
        yield

def report(model, folder, images, heldout, epochs_left):
    """Say what will be done. UserError: no room for 20 bytes a weight and file, 1 MB an epoch."""
    (parameters, flops), device, n = model_size(model), model.abar.device, len(images) // BATCH_SIZE
    chip = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    changed = [f"{k} = {globals()[k]!r}" for k, v in ALLOWED.items() if globals()[k] != v[0]]
    say(f"device     {device} ({chip}), {precision(device)}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n"
        f"data       {len(images):,} training and {len(heldout):,} held-out images, {folder}\n"
        f"model      {parameters:,} parameters, {flops / 1e6:.1f} MFLOP per image\n"
        f"training   {EPOCHS} epochs of {n} steps of {BATCH_SIZE}: {EPOCHS * n:,} updates\n"
        f"constants  {', '.join(changed) or 'all at their defaults'}\noutputs    "
        f"{checkpoint_path('*')}, training_loss.png, training_log.csv, {Path(PICTURE_DIR)}/")
    need = 20 * parameters * (4 + EPOCHS // CHECKPOINT_EVERY) + 10**6 * epochs_left  # bytes
    saved = sum(p.stat().st_size for p in find_checkpoints() if not RANK)  # in need as well
    if not RANK and (free := shutil.disk_usage(checkpoint_path("last").parent).free + saved) < need:
        raise UserError(f"{checkpoint_path('*').absolute()}: {free / 1e6:.0f} MB free, with these, "
                        f"{need / 1e6:.0f} needed: free some, raise CHECKPOINT_EVERY, lower EPOCHS")

def run(stop):
    """Data, model, resume, training, final pictures."""
    found = [None if RANK else (find_data(), *newest_checkpoint(model_constants()))]
    if WORLD_SIZE > 1: dist.broadcast_object_list(found)    # the others wait for a download, too
    device, folder, (_, path, state) = pick_device(), find_data(), found[0]  # each machine's data
    images, labels = (part.to(device) for part in load_fashion_mnist("train", folder))
    heldout = [part.to(device) for part in load_fashion_mnist("test", folder)]
    if not 2 * WORLD_SIZE <= BATCH_SIZE <= len(images) or BATCH_SIZE % WORLD_SIZE:
        raise UserError(f"BATCH_SIZE must be from {2 * WORLD_SIZE} to {len(images)}, the images, "
                        f"and a multiple of {WORLD_SIZE}, the processes, got {BATCH_SIZE}")
    now = (trainer := Trainer(device)).progress
    now.update(state.get("progress", {}))
    report(trainer.model, folder, images, heldout[0], EPOCHS - now["epoch"])
    if path:
        for name in TRAINED: getattr(trainer, name).load_state_dict(state.pop(name))
        say(f"resuming   {path}: {now['epoch']} epochs and {now['position']} images of the next "
            "are done (RESUME = False starts anew)")
        if now["epoch"] and not checkpoint_path("best_model").exists():     # now the last is best
            now.update(best_epoch=now["epoch"], best_loss=now["history"][-1]["heldout_loss"])
            trainer.save("last", "best_model")
        if now["position"] == 0: trainer.save_epoch()   # what a kill between two files left out
    if 0 in stop: stop.remove(0)  # from here on there is something to save before leaving
    train(trainer, images, labels, heldout, stop)
    generate_visualizations(trainer.average, now["epoch"], final=True)
    say(f"finished   {now['epoch']} epochs: see final_fashion_mnist_samples.png; best held-out "
        f"loss {now['best_loss']:.4f} (epoch {now['best_epoch']}); to go on see README")
    if stop: sys.exit(128 + max(stop))  # all is done, but what follows in a shell is not wanted

def main():
    """Train, resume or finish the run in the working directory. Raises UserError, SystemExit."""
    check_constants()
    keep_freed_memory()
    stop = [0] if WORLD_SIZE == 1 else []  # the signals; 0: nothing to save yet, leave at once
    def remember(number, _frame):
        if stop == [0] or (stop and number == signal.SIGINT and "RANK" not in os.environ):
            sys.exit(128 + number)  # nothing to save, or a second Ctrl-C (torchrun repeats its own)
        stop.append(number)
        if not RANK and os.isatty(2): os.write(2, b"\nstopping when this is done and saved\n")
    with torch.random.fork_rng([]), contextlib.ExitStack() as stack:  # a caller's CPU draws go on
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()) if RANK else hold_folder())
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):  # the old ones (None: default) come back
                stack.callback(signal.signal, number, signal.signal(number, remember) or 0)
        if WORLD_SIZE == 1: return run(stop)
        try:
            if torch.cuda.is_available(): torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            stack.push(lambda kind, *_: kind in (None, SystemExit) and dist.destroy_process_group())
            run(stop)  # if it fails, no destroy_process_group(): NCCL's would wait for the others
        except RuntimeError as error:
            stack.pop_all()  # the handlers stay, or torchrun's SIGTERM might cut the message short
            raise UserError(f"process {RANK} of {WORLD_SIZE} failed or lost another ({error}): "
                            f"{again()} to go on, one process to see why") from error

if __name__ == "__main__":  # takes no arguments; those of a notebook are the kernel's
    with contextlib.suppress(AttributeError): sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main() if len(sys.argv) == 1 or "ipykernel" in sys.modules else sys.exit(__doc__)
    except UserError as error:
        sys.exit(f"script_unet.py: {error}")
