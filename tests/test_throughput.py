"""tests/benchmarks/throughput.py and ten_minutes.py: what is timed, and how long is trained."""

from types import SimpleNamespace

import pytest
import torch
from conftest import log_rows

import ten_minutes
import throughput
from script_unet import Trainer, read_checkpoint

CPU = torch.device("cpu")


def test_rate_is_of_whole_steps_after_the_first(monkeypatch):
    now, durations = [0.0], iter([60, 3, 3, 60])    # the first compiles; two reach five seconds
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def step():
        now[0] += next(durations)
        return 12

    assert throughput.rate(step, 5, CPU) == 24 / 6


def test_timed_steps_are_training_steps_of_one_epoch_after_another(tiny, pictures):
    trainer = Trainer(CPU)
    step = throughput.our_step(trainer, *pictures)
    assert [step() for _ in range(8)] == [100] * 8      # 600 images
    assert [trainer.progress[name] for name in ("epoch", "position", "step")] == [1, 200, 8]


@pytest.mark.parametrize("seconds, epochs", [(4.5, 2), (0.1, 1)])
def test_ten_minutes_are_as_many_whole_epochs_as_fit_by_the_measured_rate(
        tiny, monkeypatch, pictures, seconds, epochs):
    monkeypatch.setattr(tiny, "BATCH_SIZE", 90)     # an epoch is 540 of the 600 images
    monkeypatch.setattr(throughput, "rate", lambda *_args: 250.0)   # 2.16 s an epoch
    for name in ("generate_visualizations", "draw_losses"):
        monkeypatch.setattr(tiny, name, lambda *_args: None)
    path = ten_minutes.train_ours(*pictures, pictures, seconds)
    assert tiny.EPOCHS == epochs        # so the learning rate ends at 0
    assert read_checkpoint(path)["progress"]["epoch"] == epochs == len(log_rows())
