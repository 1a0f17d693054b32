"""tests/benchmarks/trials.py: its updates are those of Trainer.step."""

import sys
from pathlib import Path

import pytest
import torch

import script_unet

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))
import trials  # noqa: E402


def copy_draws(trial, step, position):
    """Give a trial, at this position of its epoch, what Trainer.step draws at this step."""
    count, steps = script_unet.BATCH_SIZE, script_unet.NUM_DIFFUSION_STEPS
    torch.manual_seed(script_unet.generator("step", script_unet.SEED, step).initial_seed())
    t = torch.arange(count) + torch.rand(count)
    trial.t[position] = (t * steps / count).long().clamp(max=steps - 1)
    trial.noise[position] = torch.randn(trial.noise.shape[1:])
    dropped = torch.rand(count) < script_unet.LABEL_DROPOUT
    labels = trial.labels[trial.order[position]]
    trial.y[position] = labels.masked_fill(dropped, script_unet.NUM_CLASSES)


def assert_same_weights(one, other):
    for (name, a), b in zip(one.named_parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_a_trial_updates_as_the_trainer_does(tiny, pictures, monkeypatch):
    monkeypatch.setattr(tiny, "DROPOUT", 0.0)       # whose mask is not among the trial's draws
    monkeypatch.setattr(tiny, "EPOCHS", 3)
    monkeypatch.setattr(tiny, "SEED", 5)
    trainer, trial = tiny.Trainer(torch.device("cpu")), trials.Trial(5, *pictures)
    trial.record()
    before = [weight.clone() for weight in trainer.model.parameters()]
    for epoch in range(3):
        trial.draw(epoch)
        trainer.progress.update(epoch=epoch, position=0)
        for position in range(trial.steps):
            copy_draws(trial, trainer.progress["step"], position)
            trainer.step(*pictures)
            trial.replay()
    assert_same_weights(trainer.model, trial.model)
    assert_same_weights(trainer.average, trial.trainer.average)
    assert any((a - b).abs().max() > 0.01 for a, b in zip(before, trial.model.parameters()))


def test_a_trial_draws_what_the_trainer_draws_from(tiny, pictures):
    trial = trials.Trial(0, *pictures)
    trial.draw(1)
    assert trial.order.flatten().sort().values.tolist() == list(range(600))
    spread = torch.arange(100) * 20 // 100          # a hundred images over twenty steps
    assert (trial.t - spread).abs().max() == 0
    dropped = trial.y == script_unet.NUM_CLASSES
    assert 0.05 < dropped.float().mean() < 0.15     # of LABEL_DROPOUT = 0.1, 600 times
    assert torch.equal(trial.y[~dropped], pictures[1][trial.order][~dropped])
    assert abs(trial.noise.mean()) < 0.01 and abs(trial.noise.std() - 1) < 0.01


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])
def test_trials_learn_side_by_side_and_leave_checkpoints(
        tiny, pictures, monkeypatch, capsys, device):
    monkeypatch.setattr(sys, "argv", ["trials.py", "--seeds", "0", "1", "--epochs", "3"])
    monkeypatch.setattr(tiny, "pick_device", lambda: torch.device(device))
    monkeypatch.setattr(tiny, "CHECKPOINT_PREFIX", "")
    trials.main()
    *_, last, first, second = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[4].rstrip(",")) for line in (first, second)]
    assert "epoch 3/3" in last and all(0.05 < loss < 0.77 for loss in losses)
    assert losses[0] != losses[1]
    for seed in (0, 1):
        model = tiny.load_denoiser(f"trial_seed{seed}_last.pt", torch.device("cpu"))
        assert model.epochs == 3
        images = tiny.sample(model, range(10), seed=0)
        assert images.std() > 0.1
