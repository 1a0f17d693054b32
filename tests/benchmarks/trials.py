"""What does a change do, beyond the luck of one seed? Trains several seeds at once, on a GPU.

    python tests/benchmarks/trials.py --seeds 0 1 2 3 --epochs 12
    python tests/benchmarks/evaluate.py trial_seed0_last.pt

Each seed is a Trainer of script_unet.py, as it stands with your changes, and ends as a checkpoint
in the working directory, for evaluate.py and not to be resumed from; held-out losses are printed.
Before the end nothing is saved. script_unet.py by itself leaves a large GPU idle for nine tenths of
a step, whose thousand small kernels a processor core cannot start any faster. Here the step is
recorded once, as a CUDA graph, and replayed, so that the trainings share the GPU. The updates are
those of Trainer.step (tests/test_trials.py), with an epoch's random draws made at once, so from
other random numbers: who changes that method, or the kinds of optimizers, changes Trial as well.
Dropout's masks depend on the trials beside. Without a GPU it is slow.
"""

import argparse
import contextlib
import functools
import math
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import script_unet  # noqa: E402


def newton_schulz(matrices, dtype, ns_coefficients, ns_steps, eps):
    """torch.optim.Muon's orthogonalisation, of matrices (N, rows, columns)."""
    a, b, c = ns_coefficients
    x = matrices.to(dtype)
    if tall := matrices.shape[1] > matrices.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


class Trial:
    """A training of script_unet.EPOCHS epochs whose step() reads all that varies from tensors."""

    def __init__(self, seed, images, labels):
        """images uint8 (N, 1, H, W) and labels (N,), on the device"""
        script_unet.SEED, self.device = seed, images.device
        self.seed, self.images, self.labels = seed, images, labels
        self.trainer = script_unet.Trainer(self.device)
        self.model = self.trainer.model.train()
        self.params = list(self.model.parameters())
        self.averages = list(self.trainer.average.parameters())
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[
            script_unet.precision(self.device)]

        batch, epochs = script_unet.BATCH_SIZE, script_unet.EPOCHS
        self.steps = len(images) // batch           # of an epoch
        step = torch.arange(self.steps * epochs, dtype=torch.float64)
        done = (step // self.steps + step % self.steps * batch / len(images)) / epochs
        length = self.steps * epochs / script_unet.usual_epoch()
        factors = ((step + 1) / script_unet.WARMUP_STEPS).clamp(max=1)
        factors *= (1 - done) ** min(2, max(1, length / 6))
        self.factors = (factors * min(1, 20 / length)**0.5).float().to(self.device)
        self.weights = 1 - (1 - 1 / (step + 1)) ** (script_unet.EMA_GAMMA + 1)
        self.weights = self.weights.float().to(self.device)     # of the average

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.order, self.t, self.y = (zeros(self.steps, batch, dtype=torch.long) for _ in range(3))
        self.noise = zeros(self.steps, batch, *images.shape[1:])
        self.of_epoch, self.of_run = zeros(1, dtype=torch.long), zeros(1, dtype=torch.long)
        self.loss, self.rate = zeros(()), zeros(())     # the sum of an epoch's; AdamW's
        self.on = zeros(())                             # 0: the step changes no weight
        # One group: another's weights would stay as they are
        (group,), adamw = self.trainer.adamw.param_groups, self.trainer.adamw.defaults
        fast = {"fused": True, "capturable": True} if self.device.type == "cuda" else {}
        self.adamw = torch.optim.AdamW(group["params"], self.rate, adamw["betas"], adamw["eps"],
                                       script_unet.WEIGHT_DECAY, **fast)
        muon, shapes = self.trainer.muon.defaults, {}
        self.adamw_rate, self.muon_rate, self.momentum = adamw["lr"], muon["lr"], muon["momentum"]
        self.orthogonal = {name: muon[name] for name in ("ns_coefficients", "ns_steps", "eps")}
        for kernel, matrix in zip(self.trainer.kernels, self.trainer.matrices):
            shapes.setdefault(tuple(matrix.shape), []).append((kernel, matrix))
        self.muon = [(*zip(*pairs), zeros(len(pairs), *shape)) for shape, pairs in shapes.items()]

    def draw(self, epoch):
        """Make an epoch's draws, of the distributions of Trainer.step's."""
        batch, steps = script_unet.BATCH_SIZE, len(self.model.abar)
        torch.manual_seed(script_unet.generator("trial", self.seed, epoch).initial_seed())
        order = script_unet.epoch_order(self.seed, epoch, len(self.images), self.device)
        self.order.copy_(order[:self.order.numel()].view_as(self.order))
        t = torch.arange(batch, device=self.device) + torch.rand(self.t.shape, device=self.device)
        self.t.copy_((t * steps / batch).long().clamp(max=steps - 1))
        dropped = torch.rand(self.y.shape, device=self.device) < script_unet.LABEL_DROPOUT
        self.y.copy_(self.labels[self.order].masked_fill(dropped, script_unet.NUM_CLASSES))
        self.noise.normal_()
        self.of_epoch.zero_()
        self.loss.zero_()

    def step(self):
        """Trainer.step on the next batch; nothing in it waits for the device."""
        batch, t, y, noise = (part.index_select(0, self.of_epoch)[0] for part in (
            self.order, self.t, self.y, self.noise))
        x_start = script_unet.to_float(self.images.index_select(0, batch))
        losses = script_unet.diffusion_loss(self.model, x_start, t, y, noise)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(self.params, script_unet.GRADIENT_CLIP)
        with torch.no_grad():
            factor = self.factors.index_select(0, self.of_run)[0] * self.on
            self.rate.copy_(factor * self.adamw_rate)
            self.adamw.step()
            rate = factor * self.muon_rate
            for kernels, matrices, momentum in self.muon:
                grad = torch.stack([k.grad.movedim(1, 3).flatten(1) for k in kernels])
                momentum.lerp_(grad, 1 - self.momentum)
                update = newton_schulz(grad.lerp(momentum, self.momentum), self.dtype,
                                       **self.orthogonal)
                update *= -rate * math.sqrt(max(1, grad.shape[1] / grad.shape[2]))
                for matrix, change in zip(matrices, update):
                    matrix.mul_(1 - rate * script_unet.WEIGHT_DECAY).add_(change)
            change = torch._foreach_sub(self.params, self.averages)
            torch._foreach_mul_(change, self.weights.index_select(0, self.of_run)[0])
            torch._foreach_add_(self.averages, change)
            self.loss += losses.mean()
            self.of_epoch += 1
            self.of_run += 1

    def record(self):
        """Make replay() a step: on a GPU, of a graph in a stream of its own."""
        if self.device.type != "cuda":
            self.on.fill_(1)
            self.in_stream = contextlib.nullcontext
            self.replay = lambda: (self.model.zero_grad(), self.step())
            return
        stream = torch.cuda.Stream()
        self.in_stream = functools.partial(torch.cuda.stream, stream)
        stream.wait_stream(torch.cuda.current_stream())
        with self.in_stream():
            self.draw(0)
            for _ in range(3):  # as a graph needs, with rates of 0
                self.model.zero_grad()
                self.step()
            self.model.zero_grad()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.step()
        states = [value for state in self.adamw.state.values() for value in state.values()]
        for part in (*states, *(momentum for *_, momentum in self.muon), self.of_run):
            part.zero_()
        self.on.fill_(1)
        torch.cuda.synchronize()
        self.replay = graph.replay

    def finish(self, step):
        """Ready the average (and, early, the guide) for sampling, after so many steps."""
        script_unet.SEED = self.seed
        self.trainer.progress.update(epoch=step // self.steps, step=step)
        script_unet.finish_average(self.trainer, self.images, self.labels)


def train(trials):
    """Run all trials side by side, and tell of some of the epochs."""
    for trial in trials:
        trial.record()
    wait = torch.cuda.synchronize if trials[0].device.type == "cuda" else lambda: None
    start, epochs, steps, done = time.perf_counter(), script_unet.EPOCHS, trials[0].steps, 0
    ready = script_unet.guide_step(len(trials[0].images)), steps * epochs   # the guide; all
    for epoch in range(1, epochs + 1):
        for trial in trials:
            with trial.in_stream():
                trial.draw(epoch - 1)
        for _ in range(steps):
            for trial in trials:
                with trial.in_stream():
                    trial.replay()
            done += 1
            if done in ready:
                wait()
                for trial in trials:
                    trial.finish(done)
                wait()      # before the streams change the averages again
        wait()
        if epoch <= 3 or epoch == epochs or epoch % 10 == 0:
            losses = " ".join(f"{trial.loss.item() / steps:.4f}" for trial in trials)
            print(f"epoch {epoch}/{epochs}: loss {losses}, {time.perf_counter() - start:.0f} s",
                  flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], metavar="SEED",
                        help="default 0 1 2 3")
    parser.add_argument("--epochs", type=int, default=script_unet.EPOCHS,
                        help="default EPOCHS")
    args = parser.parse_args()
    script_unet.EPOCHS = args.epochs
    script_unet.check_constants()
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds must differ, got {args.seeds}")
    script_unet.keep_freed_memory()
    device = script_unet.pick_device()
    images, labels = (part.to(device) for part in script_unet.load_fashion_mnist("train"))
    if 3 * script_unet.BATCH_SIZE > len(images):    # record() tries three steps
        sys.exit(f"BATCH_SIZE must be at most {len(images) // 3}, got {script_unet.BATCH_SIZE}")
    heldout = [part.to(device) for part in script_unet.load_fashion_mnist("test")]
    trials = [Trial(seed, images, labels) for seed in args.seeds]
    failed, script_unet.PICTURE_DIR, script_unet.CHECKPOINT_PREFIX = False, ".", "trial"
    with script_unet.hold_folder():     # which may not be writable, or be another run's
        for path in (Path(f"trial_seed{seed}_last.pt") for seed in args.seeds):
            if path.exists():
                sys.exit(f"{path.absolute()} is of an earlier run: move it away")
        train(trials)
        for trial in trials:
            loss = script_unet.heldout_loss(trial.trainer.average, *heldout)["loss"]
            script_unet.CHECKPOINT_PREFIX = f"trial_seed{trial.seed}"
            path = script_unet.checkpoint_path("last")
            try:
                script_unet.check_loss(loss)
                trial.trainer.save("last")
                print(f"seed {trial.seed}: held out {loss:.5f}, {path}")
            except script_unet.UserError as error:  # one's does not lose the others
                print(f"seed {trial.seed}: {re.split('; |, an old', str(error))[0]}, so not saved")
                failed = True
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except (script_unet.UserError, OSError) as error:   # nearly all of OSErrors name their file
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
