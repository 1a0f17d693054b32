"""tests/benchmarks/trials.py: its updates are those of Trainer.step."""

import contextlib
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

import script_unet
import trials

AVAILABLE = torch.cuda.is_available()       # which the fixture `tiny` hides
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not AVAILABLE, reason="needs a GPU"))]


@pytest.fixture(params=DEVICES)
def device(request, tiny, monkeypatch):
    """The CPU or, where there is one, a GPU, in the precision that it would take by itself."""
    monkeypatch.setattr(tiny, "SEED", 5)
    monkeypatch.setattr(tiny, "PRECISION", "fp32" if request.param == "cpu" else "auto")
    monkeypatch.setattr(tiny, "pick_device", lambda: torch.device(request.param))
    if request.param == "cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return tiny.pick_device()


@pytest.mark.parametrize("epochs, guided", [(4, 1.5), (8, 3), (30, 3)])  # 30: rates start lower
def test_a_trial_updates_as_the_trainer_does(tiny, pictures, monkeypatch, device, epochs, guided):
    # A batch that does not divide the images, a clipped gradient; dropout's mask is not among the
    # trial's draws
    for name, value in {"DROPOUT": 0.0, "EPOCHS": epochs, "BATCH_SIZE": 90, "GRADIENT_CLIP": 0.05,
                        "PRECISION": "fp32"}.items():
        monkeypatch.setattr(tiny, name, value)
    drawn, loss = [], tiny.diffusion_loss

    def listen(model, x_start, *draws):     # to t, labels and noise
        if torch.is_grad_enabled():
            drawn[:] = draws
        return loss(model, x_start, *draws)

    monkeypatch.setattr(tiny, "diffusion_loss", listen)
    pictures = [part.to(device) for part in pictures]
    trainer, trial = tiny.Trainer(device), trials.Trial(5, *pictures)
    trial.record()
    first = [weight.clone() for weight in trainer.model.parameters()]
    for epoch in range(4):
        trial.draw(epoch)
        trainer.progress.update(epoch=epoch, position=0)
        for position in range(6):
            trainer.step(*pictures)
            trial.t[position], trial.y[position], trial.noise[position] = drawn
            trial.replay()
            if trainer.progress["step"] == 6 * guided:
                trial.finish(trainer.progress["step"])
        tiny.finish_average(trainer, *pictures)
        trial.finish(trainer.progress["step"])
        for part in ("average", "guide"):   # which then stays behind
            ours, theirs = (getattr(x, part).state_dict() for x in (trial.trainer, trainer))
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    for a, b in zip(trial.model.parameters(), trainer.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert all((a - b).abs().max() > 0.003 for a, b in zip(first, trainer.model.parameters()))
    assert trial.trainer.average.epochs == 4 and trial.trainer.guide.epochs == math.ceil(guided)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_newton_schulz_is_torchs_in_either_precision(shape, dtype, error):
    grads = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    updates = []
    for grad in grads:
        weight = torch.nn.Parameter(torch.zeros(shape))
        muon = torch.optim.Muon([weight], lr=1, weight_decay=0, momentum=0, nesterov=False)
        weight.grad = grad
        with script_unet.InFloat32() if dtype is torch.float32 else contextlib.nullcontext():
            muon.step()
        updates.append(-weight.detach() / max(1, shape[0] / shape[1]) ** 0.5)
    options = {name: muon.defaults[name] for name in ("ns_coefficients", "ns_steps", "eps")}
    ours = trials.newton_schulz(grads, dtype, **options)
    torch.testing.assert_close(ours, torch.stack(updates), rtol=0, atol=error)
    assert ours.abs().max() > 0.2


def test_a_trial_draws_what_the_trainer_draws_from(tiny, pictures, device):
    images, labels = (part.to(device) for part in pictures)
    trial = trials.Trial(0, images, labels)
    trial.draw(1)
    assert trial.order.flatten().sort().values.tolist() == list(range(600))
    spread = torch.arange(100, device=device) * 20 // 100   # a hundred images over twenty steps
    assert (trial.t - spread).abs().max() == 0
    dropped = trial.y == script_unet.NUM_CLASSES
    assert 0.05 < dropped.float().mean() < 0.15     # of LABEL_DROPOUT = 0.1, 600 times
    assert torch.equal(trial.y[~dropped], labels[trial.order][~dropped])
    assert abs(trial.noise.mean()) < 0.01 and abs(trial.noise.std() - 1) < 0.01


def test_noise_levels_of_trials_are_even_where_a_batch_does_not_spread_over_them_evenly(
        tiny, pictures, monkeypatch):
    monkeypatch.setattr(tiny, "BATCH_SIZE", 30)
    trial, drawn = trials.Trial(0, *pictures), []
    for epoch in range(10):
        trial.draw(epoch)
        drawn.append(trial.t.flatten().clone())
    shares = torch.cat(drawn).bincount(minlength=20) / 6000
    assert shares.tolist() == pytest.approx([0.05] * 20, abs=0.005)


def test_each_seed_and_epoch_of_the_trials_has_draws_of_its_own(tiny, pictures):
    trial, other = (trials.Trial(seed, *pictures) for seed in (0, 1))
    draws = []
    for one, epoch in ((trial, 0), (trial, 1), (other, 0), (trial, 0)):
        one.draw(epoch)
        draws.append([part.clone() for part in (one.order, one.noise)])
    for first, second in itertools.combinations(draws[:3], 2):
        assert not any(map(torch.equal, first, second))
    assert all(map(torch.equal, draws[3], draws[0]))


@pytest.mark.parametrize("epochs, guided", [(8, 3), (4, 2)])
def test_trials_learn_side_by_side_and_leave_checkpoints(
        tiny, monkeypatch, capsys, device, epochs, guided):
    monkeypatch.setattr(sys, "argv", ["trials.py", "--seeds", "0", "1", "--epochs", str(epochs)])
    drawn, draw = {0: [], 1: []}, trials.Trial.draw
    monkeypatch.setattr(trials.Trial, "draw", lambda trial, epoch: (
        drawn[trial.seed].append(epoch), draw(trial, epoch)))
    trials.main()
    assert all(epoch[-epochs:] == list(range(epochs)) for epoch in drawn.values())
    *_, last, first, second = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[4].rstrip(",")) for line in (first, second)]
    assert f"epoch {epochs}/{epochs}" in last and all(0.05 < loss < 0.72 for loss in losses)
    assert losses[0] != losses[1]
    assert all(0.05 < float(loss.rstrip(",")) < 1 for loss in last.split()[3:5])    # of an epoch
    for seed in (0, 1):
        model = tiny.load_denoiser(f"trial_seed{seed}_last.pt", torch.device("cpu"))
        assert model.epochs == epochs and model.guide[0].epochs == guided
        assert torch.isfinite(tiny.sample(model, range(10), seed=0)).all()
        heldout = tiny.heldout_loss(model, *tiny.load_fashion_mnist("test"))["loss"]
        assert losses[seed] == pytest.approx(heldout, abs=2e-5 if device.type == "cpu" else 1e-3)
    monkeypatch.setattr(trials, "train", None)      # what must not be reached
    with pytest.raises(SystemExit, match="trial_seed0_last.pt is of an earlier run"):
        trials.main()


@pytest.mark.parametrize("reason", ["training diverged", "cannot write"])
def test_a_trial_that_cannot_be_saved_does_not_lose_the_others(
        tiny, monkeypatch, capsys, device, reason):
    monkeypatch.setattr(sys, "argv", ["trials.py", "--seeds", "0", "1", "--epochs", "8"])

    def fail(trained):
        with pytest.raises(tiny.UserError, match="another run holds"), tiny.hold_folder():
            pass
        for trial in trained:
            trial.finish(1)
        if reason == "cannot write":
            Path("trial_seed0_last.pt").mkdir()     # in the checkpoint's place
        else:
            next(trained[0].model.parameters()).data.fill_(torch.nan)

    monkeypatch.setattr(trials, "train", fail)
    with pytest.raises(SystemExit, match="1"):
        trials.main()
    said = capsys.readouterr().out
    assert f"seed 0: {reason}" in said and "again" not in said and "so not saved" in said
    if reason == "cannot write":
        Path("trial_seed0_last.pt").rmdir()     # still the empty folder
    assert [path.name for path in Path().glob("trial*")] == ["trial_seed1_last.pt"]
