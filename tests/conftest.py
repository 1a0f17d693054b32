"""What the tests share: a tiny configuration, models with trained-like weights, a stand-in."""

import csv
import functools
import gc
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]
if "tiny_run.py" not in sys.argv[0]:    # a job that pytest is part of does not concern the tests
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)

import script_unet  # noqa: E402

torch.set_num_threads(1)    # models this small are no slower, and two processes test at once

# A model that trains in milliseconds, with two resolutions and both optimizers at work
TINY = {"IMG_SIZE": 28, "PATCH_SIZE": 4, "CHANNELS": (16, 32), "BLOCKS": (1, 1),
        "EMBEDDING_DIM": 32, "ATTENTION_HEAD_DIM": 16, "NUM_DIFFUSION_STEPS": 20,
        "BATCH_SIZE": 100, "EPOCHS": 2, "SAMPLING_STEPS": 4, "WARMUP_STEPS": 3, "EMA_GAMMA": 4.0,
        "DROPOUT": 0.1, "GUIDANCE_SCALE": 1.0, "PRECISION": "fp32", "DATA_DIR": str(DATA),
        "usual_epoch": lambda: 6,   # as 600 images in batches of 100
        # As they are, and so again after a test that runs what sets them
        "PICTURE_DIR": script_unet.PICTURE_DIR, "CHECKPOINT_PREFIX": script_unet.CHECKPOINT_PREFIX,
        "SEED": script_unet.SEED,
        # As exact on fewer images, and else a fifth of a tiny epoch
        "refresh_batch_norm": functools.partial(script_unet.refresh_batch_norm, batches=4,
                                                batch_size=100)}


def pytest_collection_finish():
    """Spare the collection at the end of each epoch the walk through all of torch."""
    gc.freeze()


@pytest.fixture(autouse=True)
def alike():
    """Torch's random numbers and the signal handlers are alike, whatever test ran before."""
    torch.manual_seed(0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def set_tiny(monkeypatch, folder, **constants):
    """Set the tiny configuration, hide GPUs (exactness) and work in the folder."""
    for name, value in {**TINY, **constants}.items():
        monkeypatch.setattr(script_unet, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", functools.lru_cache(lambda: False))
    monkeypatch.chdir(folder)
    Path(script_unet.PICTURE_DIR).mkdir()


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """script_unet with TINY's constants, in an empty working directory."""
    set_tiny(monkeypatch, tmp_path)
    return script_unet


@pytest.fixture(scope="session")
def pictures():
    """The fixture's training images and labels, as uint8 (600, 1, 28, 28) and int64 (600,)."""
    return script_unet.load_fashion_mnist("train", DATA / "FashionMNIST" / "raw")


def labels_of(images, pictures):
    """The labels that these uint8 images have among the pictures."""
    known = {bytes(x.flatten().tolist()): y for x, y in zip(pictures[0], pictures[1].tolist())}
    return [known[bytes(x.flatten().tolist())] for x in images]


def awake(module, seed=0):
    """The module in eval mode with random weights everywhere: zero-initialised ones hide bugs."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 / max(1, p[0].numel()) ** 0.5 * torch.randn(p.shape, generator=draw)
    return module.eval()


class Predictor:
    """A stand-in for the model whose x_start is a given function of (x_t, t, labels)."""

    def __init__(self, x_start, steps=100, kind="cosine", size=28):
        self.x_start = x_start
        self.constants = {"IMG_SIZE": size, "NUM_DIFFUSION_STEPS": steps, "BETA_SCHEDULE": kind,
                          "BETA_START": 1e-4, "BETA_END": 0.02}
        self.abar = script_unet.alphas_cumprod(self.constants)

    def __call__(self, x_t, t, labels):
        a = self.abar[t].view(-1, 1, 1, 1)
        return (a.sqrt() * x_t - self.x_start(x_t, t, labels)) / (1 - a).sqrt()


def checkpoint(what, folder="."):
    """The path of a checkpoint: "last", "best_model" or "epoch_2"."""
    return Path(folder, f"{script_unet.CHECKPOINT_PREFIX}_{what}.pt")


def same(one, other):
    """Whether two states hold the same, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def log_rows(folder="."):
    """The rows of training_log.csv as dicts of numbers."""
    with open(Path(folder, "training_log.csv")) as file:
        return [{name: float(value) for name, value in row.items()}
                for row in csv.DictReader(file)]


def raising(error):
    """A function that raises the error, whatever it is given."""
    def function(*_args, **_kwargs):
        raise error

    return function
