"""How many images a second does a training step take in, beside those of published trainers?

    python tests/benchmarks/throughput.py

Times whole training steps (forward, backward, optimizer, averaged weights) of this project's
model and of the peers in peers.py, on the same images; ours in batches of BATCH_SIZE, the peers'
of 128, as diffusers' course has them (--peer-batch-size; the other two publish 1,024 and 64). Each
runs in a process of its own, as its users run it: ours with keep_freed_memory(), which main()
calls, the peers with the allocator as it is, or with --keep-freed-memory like ours. They take
turns, A B C D A B C D ..., so that a machine that slows down slows all of them: a ratio is the
median of the rounds' ratios, and their range shows whether other work disturbed them. The models
differ: MFLOP are the operations of one image's forward pass, a multiply-add counted as 2. A matrix
product is timed after each turn of ours, to say what share of the machine's arithmetic the training
reaches.
"""

import argparse
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from statistics import median

import torch

import peers
import script_unet

MATRIX_SIZE = 2048


def clock(device):
    """Seconds, read when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def rate(step, seconds, device):
    """What step() returns (images, operations), a second, over at least so many seconds."""
    step()  # not counted: it brings the caches and, the first time, whatever is lazy up to date
    done, start = 0, clock(device)
    while time.perf_counter() - start < seconds:
        done += step()
    return done / (clock(device) - start)


def our_step(trainer, images, labels):
    """A function that does one training step of a Trainer and returns its number of images."""
    def step():
        if trainer.progress["position"] + script_unet.BATCH_SIZE > len(images):
            trainer.progress.update(epoch=trainer.progress["epoch"] + 1, position=0)
        trainer.step(images, labels)
        return script_unet.BATCH_SIZE

    return step


def peer_step(peer, images, labels, batch_size):
    """The same for a peer, on random batches from memory."""
    def step():
        batch = torch.randint(len(images), (batch_size,), device=images.device)
        peer.step(images[batch], labels[batch])
        return batch_size

    return step


contender = {}  # in a contender's process: its step, and the device


def set_up(name, keep_freed_memory, peer_batch_size):
    """Build a contender in this process. Gives its parameters, operations and package."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C: end without a traceback of its own
    # If the parent is killed, end as well
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    if keep_freed_memory:
        script_unet.keep_freed_memory()
    device = script_unet.pick_device()
    images, labels = (part.to(device) for part in script_unet.load_fashion_mnist("train"))
    if name == "ours":
        if script_unet.BATCH_SIZE > len(images):
            raise script_unet.UserError(f"BATCH_SIZE must be at most {len(images)}, the images, "
                                        f"got {script_unet.BATCH_SIZE}")
        trainer = script_unet.Trainer(device)
        contender.update(step=our_step(trainer, images, labels), device=device)
        return *script_unet.model_size(trainer.model), "script_unet.py"
    peer = peers.PEERS[name](device)
    contender.update(step=peer_step(peer, images, labels, peer_batch_size), device=device)
    return peer.parameters(), peer.operations(), peer.version()


def turn(seconds):
    """The rate of the contender in this process."""
    return rate(contender["step"], seconds, contender["device"])


def matrix_product(device, dtype):
    """A function that multiplies two matrices and returns the operations that this takes."""
    a, b = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device).to(dtype) for _ in range(2))

    def step():
        a @ b
        return 2 * MATRIX_SIZE**3

    return step


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of a turn each, default 7")
    parser.add_argument("--seconds", type=float, default=5, help="of each turn, default 5")
    parser.add_argument("--peers", nargs="*", choices=peers.PEERS, default=list(peers.PEERS),
                        help="default all; without names, ours alone")
    parser.add_argument("--peer-batch-size", type=int, default=128, help="default 128")
    parser.add_argument("--keep-freed-memory", action="store_true", help="in the peers as well")
    args = parser.parse_args()
    script_unet.check_constants()
    if min(args.rounds, args.seconds, args.peer_batch_size) <= 0:
        parser.error("--rounds, --seconds and --peer-batch-size must be above 0")
    if args.peers and script_unet.IMG_SIZE != 28:
        parser.error("the peers take 28 x 28 images: set IMG_SIZE = 28, or --peers without names")

    device, batch_size = script_unet.pick_device(), script_unet.BATCH_SIZE
    dtype = script_unet.precision(device)
    print(f"{device}, {torch.get_num_threads()} threads on {os.cpu_count()} processors, torch "
          f"{torch.__version__}, batches of {batch_size}, the peers' of {args.peer_batch_size}; "
          f"their allocator is {'set like ours' if args.keep_freed_memory else 'as it is'}")
    script_unet.keep_freed_memory()
    entries = {}
    for name in ("ours", *args.peers):
        process = ProcessPoolExecutor(1, get_context("spawn"))
        try:
            keep = name == "ours" or args.keep_freed_memory
            facts = process.submit(set_up, name, keep, args.peer_batch_size)
            entries[name] = *facts.result(), process
        except script_unet.UserError as error:
            if name == "ours":
                raise
            print(f"left out: {error}")
    flops = entries["ours"][1]
    product = matrix_product(device, torch.bfloat16 if dtype == "bf16" else torch.float32)

    rates, shares, products = {name: [] for name in entries}, [], []
    for number in range(args.rounds):
        for name, (*_, process) in entries.items():
            rates[name].append(process.submit(turn, args.seconds).result())
            if name == "ours":
                products.append(rate(product, args.seconds / 5, device))
                shares.append(3 * flops * rates["ours"][-1] / products[-1])
        print(f"round {number + 1} of {args.rounds}: " + ", ".join(
            f"{name} {values[-1]:.0f}" for name, values in rates.items()) + " images/s", flush=True)

    print(f"\n{'':34}{'precision':>10}{'parameters':>12}{'MFLOP':>7}{'images/s':>10}"
          f"{'ours to it':>12}{'least, greatest':>17}")
    for name, (parameters, operations, package, _) in entries.items():
        ratios = sorted(ours / theirs for ours, theirs in zip(rates["ours"], rates[name]))
        print(f"{package:34}{dtype if name == 'ours' else 'fp32':>10}{parameters:12,}"
              f"{operations / 1e6:7.1f}{median(rates[name]):10.0f}{median(ratios):12.1f}"
              f"{f'{ratios[0]:.1f} to {ratios[-1]:.1f}':>17}")
    print(f"ours took in {min(rates['ours']):.0f} to {max(rates['ours']):.0f} images/s")
    print(f"ours, medians: {3 * flops * median(rates['ours']) / 1e9:.0f} GFLOP/s (a step as three "
          f"forward passes of {flops / 1e6:.1f} MFLOP), {median(shares):.0%} of the "
          f"{median(products) / 1e9:.0f} GFLOP/s of a {dtype} product of {MATRIX_SIZE} x "
          f"{MATRIX_SIZE} matrices")
    for *_, process in entries.values():
        process.shutdown()


if __name__ == "__main__":
    try:
        main()
    except (script_unet.UserError, BrokenProcessPool) as error:     # out of memory, say
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
