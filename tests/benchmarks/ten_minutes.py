"""What does a model draw after ten minutes of training?

    python tests/benchmarks/ten_minutes.py
    python tests/benchmarks/ten_minutes.py --peer diffusers
    python tests/benchmarks/ten_minutes.py --seconds 120 'CHANNELS=(64, 128)' 'BLOCKS=(1, 1)'

Trains this project's configuration, or one with other constants, for as many whole epochs, at
least one, as by a trial of 110 seconds, not counted, fit into the time; the learning rates fall to
0 over these. (Most of an epoch may be left over, or a run slower than its trial take a tenth more.)
Or trains one of the peers in peers.py by its published recipe, at a constant rate, until the time
is up; the peers have keep_freed_memory() as well.
Then samples it, prints evaluate.py's table and saves figures.json, the samples and, of a peer,
peer.pt. Only training steps count as training time (with what they do to make the guide): what
script_unet.py does between epochs (averages' statistics, held-out loss, pictures, checkpoints) is
added apart.
"""

import argparse
import ast
import contextlib
import io
import json
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

import evaluate
import peers
import script_unet
import throughput


def train_ours(images, labels, heldout, seconds):
    """Train in the working directory; returns the path of the checkpoint, and what was done."""
    device, batch_size = images.device, script_unet.BATCH_SIZE
    trial = throughput.our_step(script_unet.Trainer(device), images, labels)
    throughput.rate(trial, 10, device)  # to warm up: the first seconds may run at a higher clock
    rate = throughput.rate(trial, 100, device)
    del trial
    per_epoch = len(images) // batch_size * batch_size
    # The learning rate follows EPOCHS: however short the run is, it ends at 0
    script_unet.EPOCHS = max(1, int(seconds * rate / per_epoch))
    print(f"{rate:.0f} images/s: {script_unet.EPOCHS} epochs of {per_epoch:,} images", flush=True)

    trainer, training, between = script_unet.Trainer(device), 0.0, 0.0
    for _ in range(script_unet.EPOCHS):
        start = time.perf_counter()
        for _ in tqdm(range(len(images) // batch_size), leave=False, disable=None):
            trainer.step(images, labels)
        middle = throughput.clock(device)
        script_unet.finish_epoch(trainer, images, labels, heldout)
        training += middle - start
        between += time.perf_counter() - middle
        row = trainer.progress["history"][-1]
        print(f"epoch {row['epoch']}: loss {row['train_loss']:.4f}, held out "
              f"{row['heldout_loss']:.4f}, {training:.0f} s of training", flush=True)
    updates = trainer.progress["step"]
    rate = updates * batch_size / training
    print(f"trained {training:.0f} s, {updates:,} updates, {rate:.0f} images/s; another "
          f"{between:.0f} s between the epochs", flush=True)
    return script_unet.checkpoint_path("last").absolute(), {
        "epochs": script_unet.EPOCHS, "updates": updates, "batch size": batch_size,
        "seconds": training, "images/s": rate, "seconds between the epochs": between}


def train_peer(peer, images, labels, seconds, batch_size):
    """Train a peer until the time is up; returns what was done."""
    updates, seen, start, elapsed = 0, 0, time.perf_counter(), 0.0
    with tqdm(total=round(seconds), unit=" s", leave=False, disable=None) as bar:
        while elapsed < seconds:
            for batch in torch.randperm(len(images)).to(images.device).split(batch_size):
                peer.step(images[batch], labels[batch])
                updates, seen = updates + 1, seen + len(batch)
                elapsed = throughput.clock(images.device) - start
                bar.update(round(elapsed) - bar.n)
                if elapsed >= seconds:
                    break
    if not all(p.isfinite().all() for p in peer.model.parameters()):
        raise script_unet.UserError("training diverged")
    print(f"trained {elapsed:.0f} s, {updates:,} updates of {batch_size} images, "
          f"{seen / elapsed:.0f} images/s", flush=True)
    return {"updates": updates, "batch size": batch_size, "seconds": elapsed,
            "images/s": seen / elapsed}


@contextlib.contextmanager
def if_possible():
    """What cannot be written is reported, and no reason to lose what took minutes or hours."""
    try:
        yield
    except script_unet.UserError as error:
        print(str(error).split(", an old")[0])      # without its advice to run again


def save(content, path):
    torch.save(content, buffer := io.BytesIO())
    script_unet.atomic_write(path, buffer.getvalue())


def measure(args, name, changed, peer, train, test, data):
    """Train, sample and judge in the working directory."""
    labels = torch.arange(10).repeat_interleave(args.samples)
    with torch.random.fork_rng():   # the peer's random numbers stay as they were
        # Now, as it may fail, or train the classifier
        reals = evaluate.evaluate_real(args.samples, args.classifier_seed)
    machine = (f"{train[0].device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
               + (f"{peer.version()}, fp32" if peer else script_unet.precision(train[0].device)))
    print(f"{name}, seed {args.seed}, {machine}, images of {data}"
          + ("" if peer else f"; constants {changed}"), flush=True)
    if peer:
        print(f"{peer.parameters():,} parameters")
        trained = train_peer(peer, *train, args.seconds, args.batch_size or peer.batch_size)
        with if_possible():     # before it samples, which may take hours
            save({part: module.state_dict() for part, module in vars(peer).items()
                  if isinstance(module, nn.Module)}, "peer.pt")
    else:
        checkpoint, trained = train_ours(*train, test, args.seconds)
        model = script_unet.load_denoiser(checkpoint)

    start = time.perf_counter()
    samples = peer.sample(labels) if peer else script_unet.to_uint8(
        script_unet.sample(model, labels)).cpu()
    seconds = time.perf_counter() - start
    with if_possible():
        save(samples, "samples.pt")
        evaluate.save_picture(samples, "samples.png")
    asked = labels if not peer or peer.conditional else None
    figures = evaluate.evaluate(samples, asked, args.classifier_seed)
    judge = evaluate.load_classifier(args.classifier_seed).name
    print(f"{name}: {len(samples):,} samples drawn in {seconds:.1f} s, see "
          f"{Path('samples.png').absolute()}")
    evaluate.print_table(figures, reals, judge)
    script_unet.atomic_write("figures.json", json.dumps(
        {"name": name, "figures": figures, "real": reals, "classifier": judge, "seed": args.seed,
         "seconds": args.seconds, "trained": trained, "machine": machine, "drawn in": seconds,
         "data": str(data), "constants": None if peer else changed}, indent=1).encode())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("constants", nargs="*", metavar="NAME=VALUE",
                        help="constants of script_unet.py to change, not with --peer")
    parser.add_argument("--seconds", type=float, default=600, help="of training, default 600")
    parser.add_argument("--seed", type=int, default=0, help="of the training and the samples")
    parser.add_argument("--output", type=Path, metavar="DIR",
                        help="for the results; default: a folder in tests/benchmarks/.cache/")
    parser.add_argument("--samples", type=evaluate.per_class, default=200, metavar="N",
                        help="images of each class to evaluate, default 200; the peers' samplers "
                        "need up to 1000 steps an image, which may take hours without a GPU")
    parser.add_argument("--classifier-seed", type=int, default=0,
                        help="of the judge, default 0; another one is trained the first time")
    parser.add_argument("--peer", choices=peers.PEERS, help="train this one instead of ours")
    parser.add_argument("--batch-size", type=int, help="of the peer, default as published")
    args = parser.parse_args()
    if args.batch_size and not args.peer:
        parser.error("--batch-size is for --peer; ours is 'BATCH_SIZE=128'")
    if args.seconds <= 0 or args.batch_size is not None and args.batch_size < 1:
        parser.error("--seconds and --batch-size must be above 0")
    batch = f"_batch{args.batch_size}" if args.batch_size else ""
    name = args.peer + batch if args.peer else "_".join(["ours", *args.constants])
    script_unet.SEED = args.seed
    # In the results' folder, wherever script_unet.py's own runs go
    script_unet.CHECKPOINT_PREFIX = "fashion_mnist_diffusion"
    script_unet.PICTURE_DIR = "." if args.peer else "epoch_visualizations"
    changeable = {*script_unet.ALLOWED, "DATA_DIR", "SYSTEM_DATA_DIR"} - {
        "SEED", "EPOCHS", "RESUME", "IMG_SIZE", "NUM_CLASSES"}
    try:
        for key, value in (constant.split("=", 1) for constant in args.constants):
            if args.peer or key not in changeable:
                parser.error(f"{key} is no constant that can be changed here")
            setattr(script_unet, key, ast.literal_eval(value))
    except (ValueError, SyntaxError) as error:
        parser.error(f"constants are given as 'EMA_GAMMA=8' or 'PRECISION=\"fp32\"': {error}")
    script_unet.check_constants()
    changed = evaluate.changed_constants(changeable)
    plain = re.sub(r"[^\w.=(),-]+", "-", name)   # of VALUE, what a folder's name may have
    folder = args.output or evaluate.CACHE / f"ten_minutes_{plain}_seed{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)

    script_unet.keep_freed_memory()
    device = script_unet.pick_device()
    train, test = ([part.to(device) for part in evaluate.real_images(split)]
                   for split in ("train", "test"))  # now: their folder may be a relative one
    data = script_unet.find_data().absolute()
    if script_unet.BATCH_SIZE > len(train[0]):
        parser.error(f"BATCH_SIZE must be at most {len(train[0])}, got {script_unet.BATCH_SIZE}")
    with contextlib.chdir(folder), script_unet.hold_folder():
        if any(Path().glob("*.pt*")) or Path("figures.json").exists():
            sys.exit(f"{folder} holds an earlier run: move it away, or choose another with "
                     "--output")
        torch.manual_seed(args.seed)
        peer = peers.PEERS[args.peer](device) if args.peer else None
        try:
            measure(args, name, changed, peer, train, test, data)
        except script_unet.UserError as error:  # its advice is for runs that can be resumed
            sys.exit(f"{re.split('; |, an old', str(error))[0]}: begin anew, with another --output")


if __name__ == "__main__":
    try:
        main()
    except (script_unet.UserError, OSError) as error:   # nearly all of OSErrors name their file
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
