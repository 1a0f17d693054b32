"""Three published diffusion trainers from PyPI, two set up as their authors train 28 x 28 images,
denoising-diffusion-pytorch as its README does larger ones.

throughput.py times their training steps, ten_minutes.py trains them. All compute in float32, as
published for a CPU (on a GPU with convolutions in TF32, torch's default; there
denoising-diffusion-pytorch's README asks for fp16 and flash attention, and would be faster than
here). Two things are left out, both to the peers' advantage: their data loaders, as batches come
from memory, and the random mirroring that two of them do, as the evaluation would count a shoe that
points the wrong way against them.
"""

import importlib.metadata
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import script_unet  # noqa: E402
from script_unet import UserError, to_float, to_uint8  # noqa: E402


class Peer:
    """A model, its loss, optimizer and sampler; the subclasses fill in the recipe.

    Raises UserError when its package is not installed.
    """

    batch_size = 128        # as published
    conditional = False     # whether it can be asked for a class
    gradient_clip = None

    def __init__(self, device):
        self.device = device
        try:
            self.build()
        except ImportError as error:
            raise UserError(f"{error}: pip install -r tests/benchmarks/requirements.txt") from error

    def build(self):
        """Set self.model and self.optimizer. Imports the package."""
        raise NotImplementedError

    def loss(self, x, labels):
        """The mean loss of a batch x (B, 1, 28, 28) in [-1, 1]."""
        raise NotImplementedError

    def update_average(self):
        """Update the averaged weights, where the recipe has any."""

    def generate(self, labels):
        """len(labels) samples in [-1, 1], of these classes if the peer is conditional."""
        raise NotImplementedError

    def step(self, images, labels):
        """One update on a batch of uint8 images on the device."""
        self.model.train()
        self.optimizer.zero_grad()
        self.loss(to_float(images), labels).backward()
        if self.gradient_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_clip)
        self.optimizer.step()
        self.update_average()

    @torch.no_grad()
    def sample(self, labels, batch_size=500):
        """uint8 samples (N, 1, 28, 28) for labels (N,)."""
        return torch.cat([to_uint8(self.generate(part)).cpu()
                          for part in labels.to(self.device).split(batch_size)])

    def parameters(self):
        return sum(p.numel() for p in self.model.parameters())

    @torch.no_grad()
    def operations(self):
        """Of the forward pass of one image, counted as script_unet.model_size() counts ours."""
        image, label = torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # counts all
            self.loss(image.to(self.device), label.to(self.device))
        return counter.get_total_flops()

    def version(self):
        return f"{self.package} {importlib.metadata.version(self.package)}"


class DdpmPytorch(Peer):
    """denoising-diffusion-pytorch as in its README, with three resolutions as 28 has.

    The README's 32 images with gradients of two batches added are one batch of 64.
    """

    package, batch_size, gradient_clip = "denoising-diffusion-pytorch", 64, 1.0

    def build(self):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA
        network = Unet(dim=64, dim_mults=(1, 2, 4), channels=1)
        self.model = GaussianDiffusion(network, image_size=28, timesteps=1000,
                                       sampling_timesteps=250, auto_normalize=False)
        self.model.to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=8e-5, betas=(0.9, 0.99))
        self.average = EMA(self.model, beta=0.995, update_every=10)

    def loss(self, x, labels):
        return self.model(x)

    def update_average(self):
        self.average.update()

    def generate(self, labels):
        return self.average.ema_model.eval().sample(batch_size=len(labels))


class Diffusers(Peer):
    """diffusers' UNet2DModel as in the Hugging Face diffusion course, unit 2, notebook 3.

    The class is an embedding of four numbers, given as four more channels of the image.
    """

    package, conditional = "diffusers", True

    def build(self):
        from diffusers import DDPMScheduler, UNet2DModel
        unet = UNet2DModel(
            sample_size=28, in_channels=1 + 4, out_channels=1, layers_per_block=2,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
        classes = nn.Embedding(script_unet.NUM_CLASSES, 4)
        self.model = nn.ModuleDict({"unet": unet, "class_embedding": classes})
        self.model.to(self.device)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def noise(self, x, t, labels):
        """The model's estimate of the noise in x."""
        channels = self.model["class_embedding"](labels)[:, :, None, None].expand(-1, -1, 28, 28)
        return self.model["unet"](torch.cat([x, channels], dim=1), t).sample

    def loss(self, x, labels):
        noise = torch.randn_like(x)
        t = torch.randint(0, 999, (len(x),), device=x.device)
        return F.mse_loss(self.noise(self.scheduler.add_noise(x, noise, t), t, labels), noise)

    def generate(self, labels):
        self.model.eval()
        x = torch.randn(len(labels), 1, 28, 28, device=self.device)
        for t in tqdm(self.scheduler.timesteps, desc="sampling", leave=False, disable=None):
            x = self.scheduler.step(self.noise(x, t, labels), t, x).prev_sample
        return x


class SmallDiffusion(Peer):
    """smalldiffusion as in its examples/fashion_mnist_unet.py."""

    package, batch_size = "smalldiffusion", 1024

    def build(self):
        from smalldiffusion import Scaled, ScheduleLogLinear, Unet
        self.schedule = ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)
        self.model = Scaled(Unet)(28, 1, 1, ch=64, ch_mult=(1, 1, 2), attn_resolutions=(14,))
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=7e-4)

        def average(averaged, current, count):  # nearly the example's torch_ema with 0.999
            decay = min(0.999, (1 + int(count)) / (10 + int(count)))
            torch._foreach_lerp_(averaged, current, 1 - decay)

        self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=average)

    def loss(self, x, labels):
        from smalldiffusion import generate_train_sample
        x, sigma, noise, _ = generate_train_sample(x, self.schedule)
        return self.model.get_loss(x, sigma, noise)

    def update_average(self):
        self.average.update_parameters(self.model)

    def generate(self, labels):
        from smalldiffusion import samples
        *_, images = samples(self.average.module, self.schedule.sample_sigmas(20), gam=1.6,
                             batchsize=len(labels))
        return images


PEERS = {"ddpm-pytorch": DdpmPytorch, "diffusers": Diffusers, "smalldiffusion": SmallDiffusion}
