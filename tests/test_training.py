"""Whole small runs of main(): outputs, resume, faults; randomness; one training step."""

import contextlib
import errno
import functools
import gc
import gzip
import inspect
import io
import itertools
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (ROOT, TINY, Predictor, awake, checkpoint, labels_of, log_rows, raising,
                      same, set_tiny)
from PIL import Image

import script_unet
from script_unet import (FashionMNISTUNetDenoiser, Trainer, UserError, atomic_write, draw_losses,
                         epoch_order, finish_average, generate_visualizations, heldout_loss,
                         load_denoiser, load_fashion_mnist, main, newest_checkpoint, pick_device,
                         read_checkpoint, refresh_batch_norm, sample, update_average)

CPU = torch.device("cpu")
EPOCHS, STEPS = 3, 6        # of the undisturbed run, which others must equal; steps an epoch
RUN = {"EPOCHS": EPOCHS, "CHECKPOINT_EVERY": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder, printed text, (from, to) of its renamings) of one whole run of main()."""
    folder, text, renamed = tmp_path_factory.mktemp("undisturbed"), io.StringIO(), set()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        set_tiny(patch, folder, **RUN)
        patch.setattr(os, "replace", lambda source, path, replace=os.replace: (
            renamed.add((os.path.relpath(source), os.path.relpath(path))), replace(source, path)))
        main()
    return folder, text.getvalue(), renamed


@pytest.fixture
def run(tiny, monkeypatch):
    """main() with the constants of the undisturbed run, but without its pictures."""
    for name, value in RUN.items():
        monkeypatch.setattr(tiny, name, value)
    for name in ("generate_visualizations", "draw_losses"):
        monkeypatch.setattr(tiny, name, lambda *_args, **_kwargs: None)
    return main


def assert_as_undisturbed(undisturbed):
    for what in ("last", "best_model", "epoch_2"):
        assert same(read_checkpoint(checkpoint(what)),
                    read_checkpoint(checkpoint(what, undisturbed[0]))), what
    log = "training_log.csv"
    assert Path(log).read_text() == Path(undisturbed[0], log).read_text()


def before_step(monkeypatch, number, act):
    """Have act() called in the training step of that number, 1 being the first."""
    step = Trainer.step

    def watched(trainer, *args):
        if trainer.progress["step"] + 1 == number:
            act()
        step(trainer, *args)

    monkeypatch.setattr(Trainer, "step", watched)


fail = raising(RuntimeError("power cut"))


def stop_at(run, monkeypatch, step, number=signal.SIGINT):
    """A run that gets the signal in the training step of that number; its exit status."""
    with monkeypatch.context() as patch:
        before_step(patch, step, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stopped:
            run()
    return stopped.value.code


def crash_at(run, monkeypatch, step):
    """A run that crashes in the training step of that number."""
    with monkeypatch.context() as patch:
        before_step(patch, step, fail)
        with pytest.raises(RuntimeError, match="power cut"):
            run()


def crash_before_writing(run, monkeypatch, due):
    """A run that crashes when it is to write the first file for which due(path, data)."""
    with monkeypatch.context() as patch:
        patch.setattr(script_unet, "atomic_write", lambda path, data: (
            fail() if due(path, data) else atomic_write(path, data)))
        with pytest.raises(RuntimeError, match="power cut"):
            run()


def plan_heldout_losses(monkeypatch, *losses):
    """Have the epochs' held-out losses be these."""
    planned = iter(losses)
    monkeypatch.setattr(script_unet, "heldout_loss", lambda *_args: dict.fromkeys(
        ("loss", "early", "middle", "late"), next(planned)))


# What a whole run leaves

def test_run_writes_exactly_its_outputs(undisturbed):
    names = {str(path.relative_to(undisturbed[0])) for path in undisturbed[0].rglob("*")
             if path.is_file() and not path.name.endswith(".lock")}
    assert names == {
        *(checkpoint(what).name for what in ("last", "best_model", "epoch_2")),
        "training_loss.png", "training_log.csv",
        "final_fashion_mnist_samples.png", "final_fashion_mnist_generation.gif",
        *(f"epoch_visualizations/epoch_{epoch}_{kind}.png"
          for epoch in (1, 2, 3) for kind in ("generation", "samples"))}
    assert names == {path for _, path in undisturbed[2]}
    assert all(os.path.dirname(beside) == os.path.dirname(path) for beside, path in undisturbed[2])


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"),
                    reason="no git repository")
def test_git_ignores_whatever_a_run_writes(undisturbed):
    names = sorted(path.relative_to(undisturbed[0]).as_posix()
                   for path in undisturbed[0].rglob("*") if path.is_file())
    ignored = subprocess.run(   # whoever owns the folder, and whatever that user ignores
        ["git", "-c", "safe.directory=*", "-c", "core.excludesFile=/dev/null", "check-ignore",
         "--no-index", *names, "some.pt.1"], cwd=ROOT, capture_output=True, text=True).stdout
    assert ignored.split() == [*names, "some.pt.1"]


def test_every_png_is_readable_and_under_one_megabyte(undisturbed):
    for path in undisturbed[0].rglob("*.png"):
        assert path.stat().st_size < 10**6
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) >= 400 and max(image.size) <= 2000
            assert np.asarray(image.convert("L")).std() > 10


def test_gif_shows_every_step_and_loops(undisturbed):
    with Image.open(undisturbed[0] / "final_fashion_mnist_generation.gif") as gif:
        assert gif.n_frames == TINY["SAMPLING_STEPS"] + 1 and gif.info["loop"] == 0
        assert gif.info["duration"] == 100      # ms


def test_log_has_a_row_an_epoch_of_falling_losses(undisturbed):
    rows = log_rows(undisturbed[0])
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 6), (2, 12), (3, 18)]
    names = {f"{kind}_{level}" for kind in ("train", "heldout")
             for level in ("loss", "early", "middle", "late")}
    assert set(rows[0]) == {"epoch", "step", *names}
    for name in names:
        assert 0 < rows[-1][name] < rows[0][name]


def test_logged_training_loss_is_the_mean_of_the_epochs_own_steps(run, monkeypatch):
    seen, loss = [], script_unet.diffusion_loss

    def watched(*args):
        losses = loss(*args)
        if torch.is_grad_enabled():
            seen.append(losses.mean().item())
        return losses

    monkeypatch.setattr(script_unet, "diffusion_loss", watched)
    run()
    logged = [row["train_loss"] for row in log_rows()]
    assert logged == pytest.approx(np.reshape(seen, (EPOCHS, STEPS)).mean(1).tolist(), rel=1e-5)


def test_training_loss_is_counted_at_its_noise_level(tiny, monkeypatch, pictures):
    loss, trainer = script_unet.diffusion_loss, Trainer(CPU)
    monkeypatch.setattr(script_unet, "diffusion_loss", lambda model, x_start, t, *args: (
        0 * loss(model, x_start, t, *args) + t))
    trainer.step(*pictures)     # on each of the 20 steps five times
    assert script_unet.mean_losses(trainer.progress["sums"]) == pytest.approx(
        {"loss": 9.5, "early": 3, "middle": 10, "late": 16.5})


def test_checkpoints_hold_averaged_weights_of_the_logged_heldout_loss(undisturbed):
    rows = log_rows(undisturbed[0])
    heldout = load_fashion_mnist("test", Path(TINY["DATA_DIR"], "FashionMNIST", "raw"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script_unet, "PRECISION", "fp32")
        for what, row in (("last", rows[2]), ("epoch_2", rows[1])):
            model = load_denoiser(checkpoint(what, undisturbed[0]), "cpu")
            loss = heldout_loss(model, *heldout)
            assert loss["loss"] == pytest.approx(row["heldout_loss"], rel=1e-4)


@pytest.mark.parametrize("what", ["last", "best_model", "epoch_2"])
def test_every_checkpoint_loads_and_samples(undisturbed, what):
    # Under the default constants: the checkpoint knows the model's own
    path = checkpoint(what, undisturbed[0])
    model = load_denoiser(str(path), "cpu")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.epochs == read_checkpoint(path)["progress"]["epoch"] > 0
    images = sample(model, range(10), steps=3)
    assert images.shape == (10, 1, 28, 28) and images.isfinite().all()


def test_run_says_what_it_will_do_and_one_line_an_epoch(undisturbed):
    text = undisturbed[1]
    model = FashionMNISTUNetDenoiser({name: TINY[name] for name in TINY if name.isupper()})
    parameters, flops = script_unet.model_size(model)
    for part in ("device     cpu (", f"{torch.get_num_threads()} threads",
                 "\ndata       600 training and 200 held-out images, "
                 f"{Path(TINY['DATA_DIR'], 'FashionMNIST', 'raw')}\n",
                 f"{parameters:,} parameters, {flops / 1e6:.1f} MFLOP", "EPOCHS = 3",
                 "CHANNELS = (16, 32)",
                 "training_log.csv", script_unet.PICTURE_DIR):
        assert part in text, part
    assert "LABEL_DROPOUT" not in text      # as it is at its default
    for epoch in (1, 2, 3):
        line, = (line for line in text.splitlines() if line.startswith(f"epoch {epoch}/3"))
        assert "loss" in line and "images/s" in line


@pytest.mark.parametrize("has, said", [
    ({}, "fp32"), ({"amx_bf16": True}, "bf16"), (None, "fp32")])    # torch before 2.11 cannot tell
def test_first_line_says_what_the_cpu_computes_in(tiny, monkeypatch, capsys, has, said):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    if has is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(tiny, "PRECISION", "auto")
    tiny.report(FashionMNISTUNetDenoiser(), "folder", [], [], 1)
    assert re.match(rf"device     cpu \(.*\), {said}, ", capsys.readouterr().out)


def test_lines_of_a_run_say_its_steps_its_losses_and_which_epoch_was_best(
        run, monkeypatch, capsys):
    plan_heldout_losses(monkeypatch, 1.0, 0.5, 0.7)
    run()
    said = capsys.readouterr().out
    assert f"\ntraining   3 epochs of {STEPS} steps of 100: {3 * STEPS} updates\n" in said
    for row, heldout in zip(log_rows(), ("1.0000 (best)", "0.5000 (best)", "0.7000")):
        assert (f"\nepoch {row['epoch']:.0f}/3: loss {row['train_loss']:.4f}, "
                f"held out {heldout}, ") in said
    assert "finished   3 epochs" in said and "best held-out loss 0.5000 (epoch 2)" in said


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_bar_shows_on_a_terminal_alone_what_is_done_of_the_whole_run(run, monkeypatch, stream):
    bars, tqdm = [], script_unet.tqdm
    monkeypatch.setattr(script_unet, "tqdm", lambda **options: tqdm(
        **options, file=bars.append(stream()) or bars[-1]))
    stop_at(run, monkeypatch, 4)
    run()
    shown = bars[1].getvalue()
    expected = (" 400/1800 ", "1800/1800", "epoch 1/3", "epoch 3/3")
    assert all(text in shown for text in expected) if stream is Terminal else not shown


def test_lines_of_epochs_stand_clear_of_the_bar(run, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(script_unet, "tqdm", functools.partial(script_unet.tqdm, file=terminal))
    run()
    parts = re.split("[\r\n]", terminal.getvalue())
    for epoch in (1, 2, 3):
        assert any(part.startswith(f"epoch {epoch}/3: loss ") for part in parts)


def test_of_several_processes_the_others_draw_no_bar(tiny, monkeypatch, pictures):
    terminal, trainer = Terminal(), Trainer(CPU)
    trainer.progress["epoch"] = TINY["EPOCHS"]      # nothing is left to do
    monkeypatch.setattr(tiny, "tqdm", functools.partial(tiny.tqdm, file=terminal))
    for rank, shown in ((1, False), (0, True)):
        monkeypatch.setattr(tiny, "RANK", rank)
        tiny.train(trainer, *pictures, None, [])
        assert bool(terminal.getvalue()) == shown


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_run_without_one_of_its_streams_trains_on(run, monkeypatch, name):
    monkeypatch.setattr(sys, name, None)    # as Python sets it where it is closed
    monkeypatch.setattr(script_unet, "EPOCHS", 1)
    run()
    assert len(log_rows()) == 1


@pytest.mark.parametrize("stop", [0, signal.SIGTERM])
def test_run_whose_terminal_goes_away_trains_on(run, monkeypatch, stop):
    gone = type("gone", (Terminal,), {"write": raising(OSError(5, "Input/output error"))})()
    before_step(monkeypatch, 2, lambda: monkeypatch.setattr(sys, "stdout", gone))
    before_step(monkeypatch, 2 * STEPS + 1, lambda: os.kill(os.getpid(), stop))
    with pytest.raises(SystemExit, match=str(128 + stop)) if stop else contextlib.nullcontext():
        run()
    assert len(log_rows()) == (2 if stop else 3)


@pytest.mark.parametrize("name", ["glibc", ""])     # "": musl or macOS
def test_main_has_glibc_and_no_other_library_keep_freed_memory(tiny, monkeypatch, name):
    asked = []
    libc = type("libc", (), {"mallopt": lambda *args: asked.append(args)})
    monkeypatch.setattr(tiny.platform, "libc_ver", lambda: (name, "2.39"))
    monkeypatch.setattr(tiny.ctypes, "CDLL", lambda _name: libc)
    monkeypatch.setattr(tiny, "run", lambda stop: None)
    main()
    assert asked == ([(-4, 0), (-1, 2**31 - 1)] if name else [])    # no mmap, nothing trimmed


def test_library_is_not_looked_for_on_windows_where_python_may_be_unreadable(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", raising(OSError("python.exe")))
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        script_unet.keep_freed_memory()


def test_a_notebook_may_run_it_in_another_thread(run, monkeypatch):
    monkeypatch.setattr(script_unet, "EPOCHS", 1)
    with ThreadPoolExecutor(1) as pool:     # where no signal handler can be set
        pool.submit(run).result()
    assert checkpoint("last").exists()


def test_run_on_twelve_classes_trains_each_of_them_and_the_null_class(run, monkeypatch, tmp_path):
    raw = tmp_path / "mine" / "FashionMNIST" / "raw"
    shutil.copytree(Path(TINY["DATA_DIR"], "FashionMNIST", "raw"), raw)
    for path in raw.glob("*labels*"):
        data = bytearray(gzip.decompress(path.read_bytes()))
        data[8:32] = bytes([10, 11] * 12)
        path.write_bytes(gzip.compress(data))
    for name, value in (("NUM_CLASSES", 12), ("CLASS_NAMES", tuple("abcdefghijkl")),
                        ("DATA_DIR", str(tmp_path / "mine")), ("EPOCHS", 1)):
        monkeypatch.setattr(script_unet, name, value)
    trained, loss = set(), script_unet.diffusion_loss

    def watched(model, x_start, t, labels, noise):
        if torch.is_grad_enabled():
            trained.update(labels.tolist())
        return loss(model, x_start, t, labels, noise)

    monkeypatch.setattr(script_unet, "diffusion_loss", watched)
    run()
    assert trained == set(range(13))
    assert sample(load_denoiser(checkpoint("last"), CPU), [11, 12], steps=2).isfinite().all()


def test_readme_shows_the_lines_that_a_run_prints(undisturbed):
    def shapes(text):
        lines = re.findall(
            r"(?m)^(?:data .* images|(?:model|training|outputs|epoch|finished) .*)", text)
        return {re.sub(r"\d(?:[\d,.]*\d)?", "#", line).replace(" (best)", "") for line in lines}

    readme = (ROOT / "README.md").read_text()
    shown, = re.findall(r"(?s)```\n(device .*?)```", readme)
    assert shapes(shown) == shapes(undisturbed[1]) and len(shapes(shown)) == 6


# Going on

@pytest.mark.parametrize("step, number", [
    (2, signal.SIGINT), (STEPS, signal.SIGTERM), (STEPS + 3, signal.SIGINT)])
def test_stopped_run_says_so_and_goes_on_bit_for_bit(
        run, undisturbed, monkeypatch, capsys, step, number):
    assert stop_at(run, monkeypatch, step, number) == 128 + number
    assert f"stopped by {number.name}" in capsys.readouterr().out
    state = read_checkpoint(checkpoint("last"))
    assert state["progress"]["step"] == step
    assert state["average"]["epochs"] == (step - 1) // STEPS + 1    # ready for sample()
    assert state["average"]["norm.running_mean"].any()
    run()
    epochs, images = (step - 1) // STEPS, ((step - 1) % STEPS + 1) * TINY["BATCH_SIZE"]
    said = capsys.readouterr().out
    assert f"resuming   {checkpoint('last')}" in said
    assert f"{epochs} epochs and {images} images" in said
    assert_as_undisturbed(undisturbed)


def test_run_stopped_between_epochs_goes_on_bit_for_bit(run, undisturbed, monkeypatch):
    for epochs in (2, 3):
        def stop(history, epochs=epochs):
            if len(history) == epochs:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(script_unet, "draw_losses", stop)
            with pytest.raises(SystemExit):
                run()
        progress = read_checkpoint(checkpoint("last"))["progress"]
        assert progress["epoch"] == epochs and progress["position"] == 0
    run()
    assert_as_undisturbed(undisturbed)


def test_run_stopped_in_its_final_pictures_ends_with_the_signals_status_and_is_finished(
        run, undisturbed, monkeypatch, capsys):
    def stop(_model, _epoch, final=False):
        if final:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(script_unet, "generate_visualizations", stop)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 128 + signal.SIGINT
    assert "finished   3 epochs" in capsys.readouterr().out
    assert_as_undisturbed(undisturbed)


def test_second_ctrl_c_stops_at_once_and_the_epochs_before_are_kept(run, undisturbed, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        before_step(patch, STEPS + 2, lambda: [signal.raise_signal(signal.SIGINT) for _ in "12"])
        with pytest.raises(SystemExit) as stopped:
            run()
    assert stopped.value.code == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is handler
    assert read_checkpoint(checkpoint("last"))["progress"]["step"] == STEPS
    run()
    assert_as_undisturbed(undisturbed)


@pytest.mark.parametrize("begun, during, number", [
    (False, "find_data", signal.SIGINT), (False, "find_data", signal.SIGTERM),
    (True, "newest_checkpoint", signal.SIGINT), (True, "report", signal.SIGTERM)])
def test_signal_before_the_first_step_is_answered_at_once_and_leaves_the_checkpoints(
        run, monkeypatch, begun, during, number):
    if begun:
        monkeypatch.setattr(script_unet, "EPOCHS", 1)
        run()
        monkeypatch.setattr(script_unet, "EPOCHS", 2)
    before = {path: path.read_bytes() for path in Path().glob("*.pt")}
    asked = []

    def ask(*_args):
        signal.raise_signal(number)
        asked.append("in vain")

    monkeypatch.setattr(script_unet, during, ask)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 128 + number and not asked
    assert {path: path.read_bytes() for path in Path().glob("*.pt")} == before
    assert len(before) == 2 * begun     # last and best_model


def test_signal_while_a_checkpoint_is_read_leaves_it_in_its_place(run, undisturbed, monkeypatch):
    path = checkpoint("last")
    path.write_bytes(checkpoint("last", undisturbed[0]).read_bytes())
    monkeypatch.setattr(Path, "read_bytes", lambda _path: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 128 + signal.SIGTERM and list(Path().glob("*.pt*")) == [path]


@pytest.mark.parametrize("number, launcher", [(signal.SIGTERM, {}), (signal.SIGINT, {"RANK": "0"})])
def test_a_signal_that_a_scheduler_or_torchrun_repeats_is_still_answered_by_saving(
        run, monkeypatch, number, launcher):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    before_step(monkeypatch, STEPS + 2, lambda: [signal.raise_signal(number) for _ in "12"])
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 128 + number
    assert read_checkpoint(checkpoint("last"))["progress"]["step"] == STEPS + 2


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_is_answered_at_once_on_a_terminal(run, monkeypatch, capfd, terminal):
    said = []

    def press():
        os.kill(os.getpid(), signal.SIGINT)
        said.append(capfd.readouterr().err)

    monkeypatch.setattr(os, "isatty", lambda _descriptor: terminal)
    before_step(monkeypatch, 2, press)
    with pytest.raises(SystemExit):
        run()
    assert ("stopping" in said[0]) is terminal
    out = capfd.readouterr().out        # on a line of its own
    assert out.startswith("\nstopped by") is terminal and f"saved in {checkpoint('last')}: " in out


@pytest.fixture
def stop_after_four_steps_and_resume(run, monkeypatch, capsys):
    """A function that does so, with batches of another size, and returns the lines of the epochs.
    By the clock a step takes as many seconds as it has images, all else none."""
    clock, step = [0], Trainer.step

    def slow(trainer, *args):
        clock[0] += script_unet.BATCH_SIZE
        step(trainer, *args)

    def stop_and_resume(batch_size):
        stop_at(run, monkeypatch, 4)
        monkeypatch.setattr(script_unet, "BATCH_SIZE", batch_size)
        run()
        said = capsys.readouterr().out.splitlines()
        return [line for line in said if line.startswith("epoch ")]

    monkeypatch.setattr(Trainer, "step", slow)
    monkeypatch.setattr(script_unet.time, "perf_counter", lambda: clock[0])
    return stop_and_resume


def test_time_left_after_a_resume_counts_whole_epochs(stop_after_four_steps_and_resume):
    lines = stop_after_four_steps_and_resume(TINY["BATCH_SIZE"])
    # 6 steps an epoch of 100 s each, the first epoch's in two runs
    assert ["600 s, 20 min left" in line for line in lines] == [True, False, False]
    assert "600 s, 10 min left" in lines[1] and "600 s, 0 min left" in lines[2]


def test_speed_after_a_resume_with_larger_batches_is_of_the_images_trained(
        stop_after_four_steps_and_resume):
    lines = stop_after_four_steps_and_resume(150)   # of 600 images 200 are left
    assert "1 images/s, 550 s" in lines[0] and "1 images/s, 600 s" in lines[1]


class Malice:
    """An object whose pickle, when it is loaded the careless way, leaves a file "executed"."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def not_a_number(data, part):
    state = torch.load(io.BytesIO(data), weights_only=True)
    state[part]["class_embedding.weight"].fill_(float("nan"))
    return saved(state)


def one_bit_flipped(data):
    weights = max(zipfile.ZipFile(io.BytesIO(data)).infolist(), key=lambda file: file.file_size)
    data = bytearray(data)
    data[weights.header_offset + weights.file_size // 2] ^= 1
    return bytes(data)


DAMAGES = {     # what becomes of a checkpoint's bytes
    "none": lambda data: data,
    "truncated": lambda data: data[:5000],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "random": lambda data: random.Random(0).randbytes(len(data)),
    "one bit": one_bit_flipped,
    "nan": lambda data: not_a_number(data, "model"),
    "nan average": lambda data: not_a_number(data, "average"),
    "nan guide": lambda data: not_a_number(data, "guide"),
    "malicious": lambda data: saved({**torch.load(io.BytesIO(data), weights_only=True),
                                     "progress": Malice()}),
    "foreign": lambda data: saved({"epoch": 3, "state_dict": {}}),
    "without an optimizer": lambda data: saved({name: part for name, part in torch.load(
        io.BytesIO(data), weights_only=True).items() if name != "muon"}),
    "a list": lambda data: saved([1, 2])}


def saved(state):
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize("damage", list(DAMAGES)[1:])
def test_damaged_checkpoint_is_set_aside_and_the_newest_whole_one_found(
        tiny, undisturbed, capsys, damage):
    last = checkpoint("last")
    for what in ("last", "epoch_2"):
        checkpoint(what).write_bytes(checkpoint(what, undisturbed[0]).read_bytes())
    last.write_bytes(damaged := DAMAGES[damage](last.read_bytes()))
    path, state = newest_checkpoint(script_unet.model_constants())
    assert path == checkpoint("epoch_2") and state["progress"]["epoch"] == 2
    assert f"{last}.1" in capsys.readouterr().out
    assert Path(f"{last}.1").read_bytes() == damaged and not last.exists()
    with pytest.raises(UserError, match=rf"{last}\.1"):
        load_denoiser(f"{last}.1")
    assert not Path("executed").exists()


@pytest.mark.parametrize("damage", ["none", "truncated"])
def test_crashed_run_goes_on_from_its_newest_whole_checkpoint(
        run, undisturbed, monkeypatch, capsys, damage):
    crash_at(run, monkeypatch, 2 * STEPS + 4)
    last = checkpoint("last")
    last.write_bytes(DAMAGES[damage](last.read_bytes()))
    run()
    said = capsys.readouterr().out
    source = "last" if damage == "none" else "(best_model|epoch_2)"
    assert re.search(rf"resuming   {script_unet.CHECKPOINT_PREFIX}_{source}.pt: 2 epochs", said)
    assert_as_undisturbed(undisturbed)
    kept = Path(f"{last}.1")
    assert kept.exists() == (str(kept) in said) == (damage != "none")


@pytest.mark.parametrize("steps", list(itertools.permutations((6, 12, 18))))
def test_newest_checkpoint_is_the_one_of_most_steps(tiny, undisturbed, steps):
    state = read_checkpoint(checkpoint("last", undisturbed[0]))
    for what, step in zip(("last", "best_model", "epoch_2"), steps):
        state["progress"]["step"] = step
        torch.save(state, checkpoint(what))
    path, found = newest_checkpoint(state["constants"])
    assert found["progress"]["step"] == 18
    assert path == checkpoint(("last", "best_model", "epoch_2")[steps.index(18)])


def test_checkpoint_of_no_step_at_all_is_found(tiny, undisturbed):
    state = read_checkpoint(checkpoint("last", undisturbed[0]))
    state["progress"]["step"] = 0
    torch.save(state, checkpoint("last"))
    assert newest_checkpoint(state["constants"])[0] == checkpoint("last")


def test_files_of_other_runs_are_no_checkpoints_of_this_one(run, undisturbed, monkeypatch):
    monkeypatch.setattr(script_unet, "EPOCHS", 1)
    run()
    state = read_checkpoint(checkpoint("last", undisturbed[0]))
    others = [checkpoint(what) for what in     # a copy; a run that CHECKPOINT_PREFIX names so
              ("epoch_2_seed0", "epoch_2_last", "epoch_2_epoch_3", "epoch_", "epoch_x")]
    for path in others:
        torch.save(state, path)     # of more steps
    before = read_checkpoint(checkpoint("last"))
    for resume in (True, False):
        monkeypatch.setattr(script_unet, "RESUME", resume)
        path, found = newest_checkpoint(state["constants"])
        assert (path == checkpoint("last") and same(found, before)) if resume else path is None
        assert all(path.exists() for path in others)


@pytest.mark.parametrize("error", [
    PermissionError("not permitted"), MemoryError("too large"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("std::bad_alloc")])
def test_unreadable_checkpoint_ends_the_run_and_stays_in_its_place(
        run, undisturbed, monkeypatch, error):
    path = checkpoint("last")
    path.write_bytes(checkpoint("last", undisturbed[0]).read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", raising(error))       # root may read anything
        with pytest.raises(UserError, match=f"{path} cannot be read.*{error}"):    # not "damaged"
            run()
    assert list(Path().glob("*.pt*")) == [path]
    assert read_checkpoint(path)["progress"]["epoch"] == 3


def test_resume_does_not_hold_all_checkpoints_in_memory(run, undisturbed, monkeypatch):
    read, tensors = [], []

    def watched(path):
        gc.collect()
        tensors[:] = [tensor for tensor in tensors if tensor() is not None]
        read.append(len(tensors))   # still alive from those before
        state = read_checkpoint(path)
        tensors.append(weakref.ref(state["model"]["class_embedding.weight"]))
        return state

    data = checkpoint("last", undisturbed[0]).read_bytes()
    for epoch in range(1, 5):
        checkpoint(f"epoch_{epoch}").write_bytes(data)
    monkeypatch.setattr(script_unet, "read_checkpoint", watched)
    run()
    assert len(read) == 4 and max(read) <= 2    # the newest and the one just read


def test_run_that_crashes_while_drawing_or_before_its_log_goes_on_from_the_epoch_before(
        run, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(script_unet, "draw_losses", lambda history: len(history) > 1 and fail())
        with pytest.raises(RuntimeError, match="power cut"):
            run()
    assert read_checkpoint(checkpoint("last"))["progress"]["epoch"] == 1
    crash_before_writing(run, monkeypatch, lambda path, data: (
        path == "training_log.csv" and data.count(b"\n") == 3))     # the second epoch's
    assert read_checkpoint(checkpoint("last"))["progress"]["epoch"] == 1
    run()
    assert_as_undisturbed(undisturbed)


@pytest.mark.parametrize("missing", ["best_model", "last"])
def test_files_that_a_crash_at_the_end_of_an_epoch_left_out_are_written_after_all(
        run, monkeypatch, missing):
    monkeypatch.setattr(script_unet, "EPOCHS", 2)
    crash_before_writing(run, monkeypatch, lambda path, data: (
        checkpoint("epoch_2").exists() and path == checkpoint(missing)))
    assert read_checkpoint(checkpoint("last"))["progress"]["epoch"] == 1
    run()
    last, best, numbered = (read_checkpoint(checkpoint(what))
                            for what in ("last", "best_model", "epoch_2"))
    assert last["progress"]["epoch"] == 2 and same(last, best) and same(last, numbered)


def test_finished_run_trains_no_more_until_epochs_is_raised(run, monkeypatch):
    monkeypatch.setattr(script_unet, "EPOCHS", 1)
    run()
    before, drawn = read_checkpoint(checkpoint("last")), []
    with monkeypatch.context() as patch:
        patch.setattr(script_unet, "generate_visualizations", lambda _model, epoch, final=False: (
            drawn.append((epoch, final))))
        run()
    assert drawn == [(1, True)]     # which a kill may have left out
    assert same(read_checkpoint(checkpoint("last")), before)
    monkeypatch.setattr(script_unet, "EPOCHS", 2)
    run()
    progress = read_checkpoint(checkpoint("last"))["progress"]
    assert progress["epoch"] == 2 and progress["history"][0] == before["progress"]["history"][0]


def test_epoch_that_was_begun_is_finished_when_epochs_is_lowered_below_it(
        run, monkeypatch, capsys):
    stop_at(run, monkeypatch, STEPS + 2)
    weights = read_checkpoint(checkpoint("last"))["model"]["class_embedding.weight"]
    drawn = []
    monkeypatch.setattr(script_unet, "generate_visualizations", lambda _model, epoch, final=False: (
        drawn.append((epoch, final))))
    monkeypatch.setattr(script_unet, "EPOCHS", 1)
    run()
    state, said = read_checkpoint(checkpoint("last")), capsys.readouterr().out
    assert state["progress"]["step"] == 2 * STEPS and len(log_rows()) == 2
    assert drawn == [(2, False), (2, True)]     # pictures of logged and saved weights
    assert torch.equal(state["model"]["class_embedding.weight"], weights)   # rates of 0
    assert ", 0 min left" in said and "finished   2 epochs" in said


def test_resume_false_starts_anew_and_keeps_every_older_file(run, undisturbed, monkeypatch):
    ends = {"last": ("", ".1", ".3"), "best_model": ("",), "epoch_2": ("", ".1"), "epoch_9": ("",),
            "epoch_10": ("",), "epoch_1000000": ("",)}
    older = [f"{checkpoint(what)}{end}" for what in ends for end in ends[what]]
    for name in older:
        Path(name).write_text(name)
    monkeypatch.setattr(script_unet, "RESUME", False)
    run()
    assert_as_undisturbed(undisturbed)
    assert sorted(path.read_text() for path in Path().glob("*.pt.*")) == sorted(older)
    assert len(list(Path().glob("*.pt"))) == 3


def test_resume_false_leaves_the_checkpoints_in_their_place_where_there_is_no_data(
        run, monkeypatch):
    checkpoint("last").write_bytes(b"mine")
    monkeypatch.setattr(script_unet, "RESUME", False)
    monkeypatch.setattr(script_unet, "find_data", raising(UserError("no data")))
    with pytest.raises(UserError, match="no data"):
        run()
    assert checkpoint("last").read_bytes() == b"mine"


def test_checkpoint_of_another_model_is_refused_by_the_constants_name(run, monkeypatch):
    monkeypatch.setattr(script_unet, "EPOCHS", 1)
    run()
    before = checkpoint("last").read_bytes()
    monkeypatch.setattr(script_unet, "CHANNELS", (16, 48))
    with pytest.raises(UserError, match=r"CHANNELS was \(16, 32\), is \(16, 48\).*RESUME"):
        run()
    assert checkpoint("last").read_bytes() == before


def test_checkpoint_of_an_unknown_noise_schedule_is_refused(tiny):
    Trainer(CPU).save("last")
    state = read_checkpoint(checkpoint("last"))
    state["constants"]["BETA_SCHEDULE"] = "sigmoid"
    torch.save(state, checkpoint("last"))
    with pytest.raises(UserError, match="last.pt does not fit .*sigmoid"):
        load_denoiser(checkpoint("last"))


def test_checkpoint_of_an_older_version_is_refused(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(script_unet, "FORMAT", 1)
        patch.setattr(script_unet, "EPOCHS", 1)
        run()
    for names in ((), ("guide", "muon")):   # which the oldest did not have
        state = torch.load(checkpoint("last"), weights_only=True)
        for path in Path().glob("*.pt"):
            torch.save({name: state[name] for name in state if name not in names}, path)
        with pytest.raises(UserError, match=r"FORMAT was 1, is \d+.*RESUME"):
            run()
        with pytest.raises(UserError, match=r"last.pt does not fit .*not of FORMAT=\d+"):
            load_denoiser(checkpoint("last"))


def test_resumed_run_follows_a_change_of_rates_and_weight_decay(run, monkeypatch):
    monkeypatch.setattr(script_unet, "EPOCHS", 1)
    run()
    changed = {"EPOCHS": 2, "LEARNING_RATE": 1e-3, "MUON_LEARNING_RATE": 0.01, "WEIGHT_DECAY": 0.3}
    for name, value in changed.items():
        monkeypatch.setattr(script_unet, name, value)
    run()
    done = (1 + 500 / 600) / 2     # before the last step
    for name, peak in (("adamw", 1e-3), ("muon", 0.01)):
        group, = read_checkpoint(checkpoint("last"))[name]["param_groups"]
        assert group["weight_decay"] == 0.3
        assert group["lr"] == pytest.approx(peak * (1 - done))


def test_run_stopped_with_resume_false_says_what_to_set_to_go_on(run, monkeypatch, capsys):
    monkeypatch.setattr(script_unet, "RESUME", False)
    stop_at(run, monkeypatch, 2)
    assert "run the same command again with RESUME = True to go on" in capsys.readouterr().out


def test_disk_space_that_a_resumed_run_has_already_used_is_not_asked_for_again(run, monkeypatch):
    monkeypatch.setattr(script_unet, "EPOCHS", 1)
    run()
    saved = sum(path.stat().st_size for path in Path().glob("*.pt"))
    checkpoint("another_last").write_bytes(bytes(10**6))    # of another CHECKPOINT_PREFIX
    model = FashionMNISTUNetDenoiser()
    needed = 20 * sum(p.numel() for p in model.parameters()) * 5 + 10**6  # one epoch's pictures
    assert needed > saved
    monkeypatch.setattr(script_unet, "EPOCHS", 2)
    for free, fits in ((needed - saved - 1, False), (needed - saved, True)):
        usage = type("usage", (), {"free": free})
        monkeypatch.setattr(script_unet.shutil, "disk_usage", lambda path, usage=usage: usage)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="MB free"):
            run()


def test_default_checkpoint_is_no_larger_than_the_check_of_disk_space_allows(
        tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(CPU)
    trainer.step(*pictures)
    trainer.save("last")
    parameters = sum(p.numel() for p in trainer.model.parameters())
    assert checkpoint("last").stat().st_size < 20 * parameters


@pytest.mark.parametrize("prefix", [script_unet.CHECKPOINT_PREFIX, "another"])
def test_second_run_in_the_folder_is_refused(run, monkeypatch, prefix):
    def start_another():
        monkeypatch.setattr(script_unet, "CHECKPOINT_PREFIX", prefix)
        monkeypatch.setattr(script_unet, "run", fail)   # what must not be reached
        main()

    monkeypatch.setattr(script_unet, "EPOCHS", 1)
    before_step(monkeypatch, 3, start_another)
    with pytest.raises(UserError, match=rf"another run holds .*process {os.getpid()} on"):
        run()


@pytest.mark.parametrize("missing", ["fcntl", "locks"])
def test_system_or_disk_without_locks_does_not_stop_a_run(tiny, monkeypatch, missing):
    if missing == "fcntl":  # as on Windows
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", raising(OSError(errno.ENOLCK, "No locks available")))
    reached = []
    monkeypatch.setattr(tiny, "run", reached.append)
    main()
    assert reached


@pytest.mark.parametrize("above", ["", "models/", "absolute"])
def test_prefix_may_have_folders_and_brackets(run, monkeypatch, tmp_path, capsys, above):
    prefix = f"{tmp_path if above == 'absolute' else '.'}/{above}run[1]"
    for name, value in (("EPOCHS", 1), ("CHECKPOINT_EVERY", 1), ("CHECKPOINT_PREFIX", prefix)):
        monkeypatch.setattr(script_unet, name, value)
    run()
    for what in ("last", "best_model"):
        checkpoint(what).unlink()
    checkpoint("epoch_1").with_name("run1_epoch_9.pt").touch()   # another's, which [1] would match
    monkeypatch.setattr(script_unet, "EPOCHS", 2)
    run()
    assert re.search(r"resuming   .*run\[1\]_epoch_1.pt", capsys.readouterr().out)


# Faults

def diverge_at(monkeypatch, number, spoil):
    """Have the loss of the training step of that number spoiled."""
    loss, steps = script_unet.diffusion_loss, itertools.count(1)

    def spoiled(*args):
        losses = loss(*args)
        return spoil(losses) if torch.is_grad_enabled() and next(steps) == number else losses

    monkeypatch.setattr(script_unet, "diffusion_loss", spoiled)


def nan_loss(losses):
    return losses * float("nan")


def huge_loss(losses):
    return losses * 1e6


def nan_gradient(losses):
    losses.register_hook(lambda gradient: gradient * float("nan"))
    return losses


@pytest.mark.parametrize("spoil, step", [
    (nan_loss, STEPS + 2), (huge_loss, STEPS + 2), (nan_gradient, STEPS + 2),
    (nan_gradient, 2 * STEPS)])     # whose losses are all good
def test_divergence_stops_the_run_before_anything_good_is_overwritten(
        run, undisturbed, monkeypatch, spoil, step):
    with monkeypatch.context() as patch:
        diverge_at(patch, step, spoil)
        with pytest.raises(UserError, match="diverged.*LEARNING_RATE"):
            run()
    state = read_checkpoint(checkpoint("last"))     # raises if it holds what is not finite
    assert state["progress"]["epoch"] == 1
    assert len(list(Path().glob("*.pt"))) == 2      # and the best, both of epoch 1
    assert len(log_rows()) == 1
    if spoil is nan_loss:   # from the same files as the others
        run()
        assert_as_undisturbed(undisturbed)


@pytest.mark.parametrize("loss", [10.0, 20.0, float("inf"), float("nan")])
def test_loss_of_a_dozen_times_an_untrained_models_is_divergence(loss):
    assert script_unet.check_loss(9.9) == 9.9
    with pytest.raises(UserError, match="diverged"):
        script_unet.check_loss(loss)


def test_batch_may_be_all_images_or_two(run, monkeypatch, pictures):
    monkeypatch.setattr(script_unet, "BATCH_SIZE", 600)
    run()
    assert [int(row["step"]) for row in log_rows()] == list(range(1, script_unet.EPOCHS + 1))
    monkeypatch.setattr(script_unet, "BATCH_SIZE", 2)
    trainer = Trainer(CPU)
    trainer.step(*pictures)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_of_equally_good_epochs_the_first_is_the_best(run, monkeypatch):
    plan_heldout_losses(monkeypatch, 0.5, 0.5, 0.5)
    run()
    progress = read_checkpoint(checkpoint("last"))["progress"]
    assert (progress["epoch"], progress["best_epoch"]) == (script_unet.EPOCHS, 1)


def test_divergence_in_an_epochs_last_steps_is_not_hidden_by_the_others(run, monkeypatch):
    monkeypatch.setattr(script_unet, "BATCH_SIZE", 24)      # 25 steps an epoch
    # On average of the epoch's steps 6 more, of the last ten, from the 41st of all on, 15
    diverge_at(monkeypatch, 47, lambda losses: losses + 150)
    with pytest.raises(UserError, match="diverged"):
        run()
    assert read_checkpoint(checkpoint("last"))["progress"]["epoch"] == 1


def test_divergence_is_noticed_within_the_epoch(run, monkeypatch):
    monkeypatch.setattr(script_unet, "BATCH_SIZE", 20)      # 30 steps an epoch
    diverge_at(monkeypatch, 3, nan_loss)
    before_step(monkeypatch, 21, fail)
    with pytest.raises(UserError, match="diverged"):
        run()


@pytest.mark.parametrize("spoil", [huge_loss, nan_gradient])
def test_signal_after_divergence_overwrites_nothing_good(run, monkeypatch, spoil):
    diverge_at(monkeypatch, STEPS + 2, spoil)
    before_step(monkeypatch, STEPS + 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(UserError, match="diverged"):
        run()
    assert read_checkpoint(checkpoint("last"))["progress"]["epoch"] == 1


@pytest.mark.parametrize("channels", [(16, 48), 64, ()])
def test_checkpoint_whose_constants_do_not_fit_its_weights_is_refused_by_name(
        tmp_path, undisturbed, channels):
    state = read_checkpoint(checkpoint("last", undisturbed[0]))
    state["constants"]["CHANNELS"] = channels
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt does not fit"):
        load_denoiser(tmp_path / "other.pt")


@pytest.mark.parametrize("part", ["average", "guide"])
def test_checkpoint_that_lacks_a_weight_is_refused(tmp_path, undisturbed, part):
    state = read_checkpoint(checkpoint("last", undisturbed[0]))
    del state[part]["norm.weight"]
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt does not fit"):
        load_denoiser(tmp_path / "other.pt")


def test_checkpoint_of_a_gpu_is_read_where_there_is_none(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _storage: "cuda:0")
        Trainer(CPU).save("last")
    with pytest.raises(RuntimeError, match="CUDA"):     # or this would be no GPU's
        torch.load(checkpoint("last"), weights_only=True)
    assert newest_checkpoint(tiny.model_constants())[0] == checkpoint("last")
    assert load_denoiser(checkpoint("last"), "cpu").abar.device == CPU


def test_checkpoint_is_loaded_to_the_device_of_training_unless_another_is_named(
        undisturbed, monkeypatch):
    path, meta = checkpoint("last", undisturbed[0]), torch.device("meta")
    monkeypatch.setattr(script_unet, "pick_device", lambda: meta)
    for model, device in ((load_denoiser(path), meta), (load_denoiser(path, "cpu"), CPU)):
        assert model.abar.device == model.guide[0].abar.device == device


def test_code_of_the_readme_samples_from_a_checkpoint(undisturbed, tmp_path, monkeypatch):
    code = re.search("(?s)```python\n(.*?)```", (ROOT / "README.md").read_text())[1]
    shutil.copy(checkpoint("best_model", undisturbed[0]), tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    with Image.open("bags.png") as image:
        assert image.size == (4 * 30 - 2, 4 * 30 - 2) and np.asarray(image).std() > 10


def test_missing_checkpoint_is_refused_by_name():
    with pytest.raises(UserError, match="nowhere.pt"):
        load_denoiser("nowhere.pt")


def test_failed_write_leaves_the_old_file_and_no_half_one(tmp_path, monkeypatch):
    full, path = raising(OSError(28, "No space left on device")), tmp_path / "file"
    atomic_write(path, b"old")
    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, full)
            with pytest.raises(UserError, match="file.*No space left"):
                atomic_write(path, b"new")
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with monkeypatch.context() as patch:    # a disk that has become read-only
        for function in ("fsync", "unlink"):
            patch.setattr(os, function, full)
        with pytest.raises(UserError, match="file.*No space left"):
            atomic_write(path, b"new")
    with pytest.raises(UserError, match="in a file .Not a directory|in a file .File exists"):
        atomic_write(path / "in a file", b"new")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("refused, system", [(4, "win32"), (5, "win32"), (1, "linux")])
def test_file_that_another_program_reads_is_tried_again_for_ten_seconds_on_windows_alone(
        tmp_path, monkeypatch, refused, system):
    errors, waited, replace = iter([PermissionError(13, "in use")] * refused), [], os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (
        raising(error)() if (error := next(errors, None)) else replace(*paths)))
    monkeypatch.setattr(script_unet.time, "sleep", waited.append)
    monkeypatch.setattr(sys, "platform", system)
    with (contextlib.nullcontext() if refused == 4 else
          pytest.raises(UserError, match="a.txt .in use.")):
        atomic_write(tmp_path / "a.txt", b"new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"] * (refused == 4)
    assert waited == [0.1, 0.5, 2, 8] * (system == "win32")


def test_folder_that_is_deleted_during_a_run_is_made_again(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "PICTURE_COLUMNS", 2)
    monkeypatch.setattr(tiny, "draw_losses", lambda _history: None)
    before_step(monkeypatch, STEPS + 1, lambda: shutil.rmtree(tiny.PICTURE_DIR))
    main()
    assert len(list(Path(tiny.PICTURE_DIR).iterdir())) == 2     # the second epoch's


def test_working_directory_that_is_deleted_is_an_error_with_the_files_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    with pytest.raises(UserError, match="cannot write training_log.csv .No such file"):
        atomic_write("training_log.csv", b"")


def test_figures_do_not_outlive_their_epoch(tiny, monkeypatch):
    drawn, inner = [], tiny.Figure

    def watched(*args, **options):
        figure = inner(*args, **options)
        drawn.append(weakref.ref(figure))
        return figure

    monkeypatch.setattr(tiny, "Figure", watched)
    monkeypatch.setattr(tiny, "PICTURE_COLUMNS", 2)
    alive = []
    before_step(monkeypatch, STEPS + 1, lambda: alive.extend(ref() for ref in drawn) or fail())
    gc.disable()    # figures are cyclic, and a collection may happen at any time
    try:
        with pytest.raises(RuntimeError, match="power cut"):
            main()
    finally:
        gc.enable()
    assert alive == [None] * 3


def test_messages_say_what_to_set_so_that_the_next_start_goes_on(tmp_path, monkeypatch):
    def messages():
        for act in (lambda: atomic_write(path / "in a file", b""),
                    lambda: script_unet.check_loss(float("nan"))):
            with pytest.raises(UserError) as caught:
                act()
            yield str(caught.value)

    atomic_write(path := tmp_path / "file", b"")
    assert all(text.endswith("run the same command again") for text in messages())
    monkeypatch.setattr(script_unet, "RESUME", False)   # which would set aside what is there
    assert all(text.endswith("again with RESUME = True") for text in messages())


def test_whole_file_is_handed_to_the_system_before_it_is_flushed_to_the_disk(
        tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size))
    atomic_write(tmp_path / "file", b"new")
    assert sizes == [3]


def test_process_other_than_the_first_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(script_unet, "RANK", 1)
    atomic_write(tmp_path / "file", b"new")
    assert not list(tmp_path.iterdir())


# Best

def test_stop_and_resume_within_an_epoch_leave_the_finished_epochs_checkpoints_alone(
        run, monkeypatch):
    monkeypatch.setattr(script_unet, "CHECKPOINT_EVERY", 1)
    stop_at(run, monkeypatch, STEPS + 2)
    crash_at(run, monkeypatch, STEPS + 4)
    for what, step in (("last", STEPS + 2), ("best_model", STEPS), ("epoch_1", STEPS)):
        assert read_checkpoint(checkpoint(what))["progress"]["step"] == step, what


def test_best_is_the_lowest_heldout_loss_of_the_averaged_weights_which_are_drawn(run, monkeypatch):
    losses, judged, drawn = iter([1.0, 0.5, 0.7]), [], []

    def weights(model):
        return {name: value.clone() for name, value in model.state_dict().items()}

    def planned(model, images, labels):
        judged.append(weights(model))
        assert len(images) == 200
        return dict.fromkeys(("loss", "early", "middle", "late"), next(losses))

    monkeypatch.setattr(script_unet, "heldout_loss", planned)
    monkeypatch.setattr(script_unet, "generate_visualizations",
                        lambda model, epoch, final=False: drawn.append(weights(model)))
    run()
    assert same(drawn, [*judged, judged[2]])            # three epochs and the final pictures
    best, last = (read_checkpoint(checkpoint(what)) for what in ("best_model", "last"))
    assert same(best["average"], judged[1]) and same(last["average"], judged[2])
    assert best["progress"]["epoch"] == 2 and last["progress"]["best_epoch"] == 2
    assert not same(best["average"], best["model"])


def test_damaged_best_checkpoint_is_replaced_by_the_best_of_what_is_left(run, monkeypatch):
    plan_heldout_losses(monkeypatch, 0.5, 0.6, 0.7, 0.55)
    monkeypatch.setattr(script_unet, "EPOCHS", 2)
    run()
    checkpoint("best_model").write_bytes(b"damaged")
    for epochs, best in ((3, 2), (4, 4)):
        monkeypatch.setattr(script_unet, "EPOCHS", epochs)
        run()
        assert read_checkpoint(checkpoint("best_model"))["progress"]["epoch"] == best


def test_best_checkpoint_that_is_lost_has_a_successor_at_once_and_after_a_crash(run, monkeypatch):
    plan_heldout_losses(monkeypatch, 0.5, 0.7, 0.6)     # the third is the best of what is left
    stop_at(run, monkeypatch, 2 * STEPS + 2)
    checkpoint("best_model").unlink()
    crash_at(run, monkeypatch, 2 * STEPS + 3)
    last = read_checkpoint(checkpoint("last"))["progress"]
    assert (last["best_epoch"], last["best_loss"], last["step"]) == (2, 0.7, 2 * STEPS + 2)
    assert same(*(read_checkpoint(checkpoint(what)) for what in ("last", "best_model")))
    run()
    assert read_checkpoint(checkpoint("best_model"))["progress"]["epoch"] == 3


@pytest.mark.parametrize("epochs, images, batch_size, step", [
    (150, 60_000, 256, 702), (8, 60_000, 256, 702), (7, 60_000, 256, 614), (1, 60_000, 256, 87),
    (400, 2_000, 256, 702), (100, 2_000, 256, 262), (150, 60_000, 2048, 702), (1, 512, 256, 1),
    (150, 60_000, 128, 1404), (150, 60_000, 100, 1800)])    # smaller batches: as many images
def test_guide_stays_at_three_usual_epochs_or_at_three_eighths_of_the_run_if_these_are_earlier(
        monkeypatch, epochs, images, batch_size, step):
    for name, value in (("EPOCHS", epochs), ("BATCH_SIZE", batch_size)):
        monkeypatch.setattr(script_unet, name, value)
    assert script_unet.guide_step(images) == step


def test_guide_is_the_average_for_three_epochs_and_then_stays_behind(run, monkeypatch):
    sources = (0, 1, 2, 2)
    for name, value in (("EPOCHS", 14), ("CHECKPOINT_EVERY", 1)):
        monkeypatch.setattr(script_unet, name, value)
    crash_at(run, monkeypatch, len(sources) * STEPS + 1)
    states = [read_checkpoint(checkpoint(f"epoch_{n + 1}")) for n in range(len(sources))]
    for state, source in zip(states, sources):
        guide, average = dict(state["guide"]), dict(states[source]["average"])
        classes, any_class = average.pop(embedding := "class_embedding.weight").split([10, 1])
        seen, null = guide.pop(embedding).split([10, 1])
        assert same(guide, average) and same(null, any_class)
        torch.testing.assert_close(seen, 0.8 * classes + 0.2 * any_class)
    assert not same(states[1]["guide"], states[0]["guide"])


@pytest.mark.parametrize("epochs", [2, 4])
def test_guide_of_a_short_run_is_the_average_after_three_eighths_of_it(
        tiny, run, monkeypatch, epochs):
    monkeypatch.setattr(tiny, "EPOCHS", epochs)
    averages, update, step = {}, tiny.update_average, epochs * 3 * STEPS // 8

    def keep(average, model, step):
        update(average, model, step)
        averages[step] = {name: p.clone() for name, p in average.named_parameters()}

    monkeypatch.setattr(tiny, "update_average", keep)
    run()
    guide, name = read_checkpoint(checkpoint("last"))["guide"], "class_embedding.weight"
    assert step % STEPS     # within an epoch
    classes, any_class = averages[step].pop(name).split([10, 1])
    assert same(averages[step], {name: guide[name] for name in averages[step]})
    torch.testing.assert_close(guide[name], torch.cat([classes.lerp(any_class, 0.2), any_class]))
    assert guide["epochs"] == step // STEPS + 1


@pytest.mark.parametrize("epochs, batch_size, numbers", [(2, 90, (3, 4, 5)), (1, 300, (1,))])
def test_run_stopped_near_the_step_of_its_guide_is_resumed_exactly(
        tiny, run, monkeypatch, epochs, batch_size, numbers):
    monkeypatch.setattr(tiny, "EPOCHS", epochs)
    monkeypatch.setattr(tiny, "BATCH_SIZE", batch_size)
    states = []
    for number in (None, *numbers):
        monkeypatch.setattr(tiny, "CHECKPOINT_PREFIX", f"stopped_{number}")
        if number:
            stop_at(run, monkeypatch, number)
        run()
        states.append(read_checkpoint(Path(f"stopped_{number}_last.pt")))
    assert all(same(state, states[0]) for state in states[1:])


def test_batch_size_changed_before_the_guides_step_does_not_leave_it_out(tiny, run, monkeypatch):
    monkeypatch.setattr(tiny, "EPOCHS", 2)
    stop_at(run, monkeypatch, 2)
    stopped = read_checkpoint(checkpoint("last"))["guide"]
    monkeypatch.setattr(tiny, "BATCH_SIZE", 50)     # the guide is due after 9, 3/8 of 2 * 12
    run()
    state = read_checkpoint(checkpoint("last"))
    assert not same(state["guide"], stopped) and state["guide"]["epochs"] == 2


def test_guide_is_made_in_a_run_whose_first_batch_goes_beyond_three_eighths(
        tiny, run, monkeypatch):
    monkeypatch.setattr(tiny, "EPOCHS", 1)
    monkeypatch.setattr(tiny, "BATCH_SIZE", 300)
    run()
    assert read_checkpoint(checkpoint("last"))["guide"]["epochs"] == 1


def test_guide_is_not_led_towards_a_null_class_that_never_was_trained(tiny, monkeypatch, pictures):
    monkeypatch.setattr(tiny, "LABEL_DROPOUT", 0.0)
    trainer = Trainer(CPU)
    finish_average(trainer, *pictures)
    assert same(dict(trainer.guide.state_dict()), dict(trainer.average.state_dict()))


def test_device_that_is_not_there_is_not_called_the_checkpoints_fault(undisturbed):
    with pytest.raises(RuntimeError, match="nowhere"):
        load_denoiser(checkpoint("last", undisturbed[0]), "nowhere")


def test_loaded_denoiser_is_guided_by_the_checkpoints_guide(undisturbed):
    path = checkpoint("last", undisturbed[0])
    model, state = load_denoiser(path, CPU), read_checkpoint(path)
    assert same(dict(model.guide[0].state_dict()), dict(state["guide"]))
    assert not model.guide[0].training and not same(state["guide"], state["average"])
    assert not any(p.requires_grad for p in model.guide[0].parameters())
    drawn = [sample(model, [1, 2], guidance_scale=scale) for scale in (1.0, 3.0)]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3


def test_samples_and_heldout_loss_take_500_images_at_a_time_without_gradients(tiny):
    model, sizes = FashionMNISTUNetDenoiser().eval(), []
    model.register_forward_hook(lambda _model, _args, v: sizes.append((len(v), v.requires_grad)))
    sample(model, [0] * 501, steps=1)
    heldout_loss(model, torch.zeros(501, 1, 28, 28).byte(), torch.zeros(501).long())
    assert sizes == [(500, False), (1, False)] * 2


def test_heldout_loss_is_fixed_and_by_noise_level(tiny, monkeypatch):
    heldout = load_fashion_mnist("test")
    model = awake(FashionMNISTUNetDenoiser())
    first = heldout_loss(model, *heldout)
    torch.rand(7)
    monkeypatch.setattr(tiny, "SEED", 1)    # one measure for all trainings
    again = heldout_loss(model, *heldout, batch_size=33)
    assert again == pytest.approx(first, rel=1e-4)
    t = torch.arange(200) % 20      # 140 steps in the first two thirds of 0 ... 19, 60 in the last
    counts = torch.tensor([(t * 3 // 20 == level).sum() for level in range(3)])
    thirds = torch.tensor([first[level] for level in ("early", "middle", "late")])
    assert (thirds * counts).sum() / 200 == pytest.approx(first["loss"], rel=1e-4)
    assert thirds.diff().abs().min() > 1e-3


def test_heldout_loss_of_fewer_images_than_steps_is_of_steps_from_all_noise_levels(tiny):
    images, labels = (part[:7] for part in load_fashion_mnist("test"))
    seen = []
    model = Predictor(lambda x_t, t, y: seen.extend(t.tolist()) or 0 * x_t, steps=100)
    losses = heldout_loss(model, images, labels)
    assert seen == [0, 14, 28, 42, 57, 71, 85] and all(np.isfinite(list(losses.values())))


def test_heldout_loss_asks_about_every_image_with_its_label_and_noise_of_its_own(tiny):
    images, labels = load_fashion_mnist("test")
    seen = []
    model = Predictor(lambda *asked: seen.append(asked) or 0 * asked[0], steps=20)
    heldout_loss(model, images, labels)
    x_t, t, y = map(torch.cat, zip(*seen))
    assert torch.equal(y, labels) and torch.equal(t, torch.arange(200) % 20)
    a = model.abar[t].view(-1, 1, 1, 1)
    noise = ((x_t - a.sqrt() * tiny.to_float(images)) / (1 - a).sqrt()).flatten(1)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert noise.corrcoef().fill_diagonal_(0).abs().max() < 0.25


def test_batch_statistics_are_measured_on_5120_noisy_training_images_with_their_labels(
        tiny, monkeypatch, pictures):
    seen, loss, model = [], tiny.diffusion_loss, FashionMNISTUNetDenoiser()
    monkeypatch.setattr(tiny, "diffusion_loss",
                        lambda model, *args: seen.append(args) or loss(model, *args))
    means = []
    model.norm.register_forward_pre_hook(lambda _norm, x: means.append(x[0].mean((0, 2, 3))))
    refresh_batch_norm(model, *pictures)
    torch.testing.assert_close(model.norm.running_mean, torch.stack(means).mean(0))
    x_start, t, y, noise = map(torch.cat, zip(*seen))
    assert labels_of(tiny.to_uint8(x_start), pictures) == y.tolist()
    assert len(t) == len(noise.flatten(1).unique(dim=0)) == 5120 and len(set(t.tolist())) == 20
    assert len(x_start.flatten(1).unique(dim=0)) > 580      # of 600
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_batch_statistics_are_measured_on_draws_of_the_seed(tiny, monkeypatch, pictures):
    noises = []
    monkeypatch.setattr(tiny, "diffusion_loss", lambda *args: noises.append(args[-1]))
    for seed in (0, 0, 1):
        monkeypatch.setattr(tiny, "SEED", seed)
        refresh_batch_norm(FashionMNISTUNetDenoiser(), *pictures, batches=1, batch_size=10)
    assert torch.equal(*noises[:2]) and not torch.equal(*noises[1:])


def test_losses_are_averaged_in_thirds_of_the_steps():
    t, losses = torch.tensor([0, 2, 3, 5, 6, 8]), torch.tensor([1.0, 3.0, 4.0, 6.0, 8.0, 14.0])
    sums = script_unet.by_noise_level(losses, t, 9)
    assert script_unet.mean_losses(sums + sums) == {
        "loss": 6.0, "early": 2.0, "middle": 5.0, "late": 11.0}


# Randomness

def test_pictures_and_metrics_leave_all_random_state_alone(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "SAMPLING_ETA", 1.0)
    monkeypatch.setattr(tiny, "GUIDANCE_SCALE", 2.0)
    monkeypatch.setattr(tiny, "PICTURE_COLUMNS", 2)
    trainer, (images, labels) = Trainer(CPU), load_fashion_mnist("test")
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    refresh_batch_norm(trainer.average, images, labels)
    losses = heldout_loss(trainer.average, images, labels)
    generate_visualizations(trainer.average, 1)
    generate_visualizations(trainer.average, 1, final=True)
    draw_losses([{"epoch": 1, **{f"{kind}_{level}": loss for level, loss in losses.items()
                                 for kind in ("train", "heldout")}}])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(map(np.array_equal, np.random.get_state(), before[2]))


@pytest.mark.parametrize("ends", [lambda _stop: None, raising(SystemExit)])
def test_a_run_gives_its_caller_the_signal_handlers_back(tiny, monkeypatch, ends):
    own = {number: lambda *_args: None for number in (signal.SIGINT, signal.SIGTERM)}
    for number in own:
        signal.signal(number, own[number])
    monkeypatch.setattr(tiny, "run", ends)
    with contextlib.suppress(SystemExit):
        main()
    assert {number: signal.getsignal(number) for number in own} == own


def test_a_run_leaves_its_callers_random_numbers_alone(run):
    state = torch.get_rng_state()
    run()
    assert torch.equal(torch.get_rng_state(), state)


def test_training_is_the_same_bit_for_bit_whatever_pictures_do(run, undisturbed, monkeypatch):
    def rude(*_args, **_kwargs):
        torch.manual_seed(torch.randint(1000, ()).item() + 1)
        np.random.seed(1)
        torch.rand(17)

    monkeypatch.setattr(script_unet, "generate_visualizations", rude)
    monkeypatch.setattr(script_unet, "draw_losses", rude)
    run()
    assert_as_undisturbed(undisturbed)


@pytest.fixture
def steps_of(tiny, monkeypatch, pictures):
    """A function that trains `count` steps and returns each step's (x_start, t, labels, noise)."""
    def record(count, seed=0, disturb=lambda: None):
        monkeypatch.setattr(tiny, "SEED", seed)
        monkeypatch.setattr(tiny, "EPOCHS", 100)
        monkeypatch.setattr(tiny, "usual_epoch", lambda: 100)   # else the guide's are among them
        seen, loss, trainer = [], tiny.diffusion_loss, Trainer(CPU)
        with monkeypatch.context() as patch:
            patch.setattr(tiny, "diffusion_loss",
                          lambda model, *args: seen.append(args) or loss(model, *args))
            for step in range(count):
                if step % STEPS == 0:
                    trainer.progress.update(epoch=step // STEPS, position=0)
                disturb()
                trainer.step(*pictures)
        return seen

    return record


def test_randomness_of_a_step_is_a_function_of_seed_and_step(tiny, steps_of, monkeypatch):
    monkeypatch.setattr(tiny, "NUM_DIFFUSION_STEPS", 30)    # does not divide a batch of 100
    seen = steps_of(3)
    assert same(steps_of(3, disturb=lambda: torch.manual_seed(torch.seed())), seen)
    seen += steps_of(1, seed=1)     # not what seed 0 draws at the same step, nor at the next one
    for one, other in itertools.combinations(seen, 2):
        for number, part in enumerate(("images", "steps", "labels", "noise")):
            assert not torch.equal(one[number], other[number]), part


def test_each_process_trains_on_images_and_noise_levels_from_all_over_the_batch(
        tiny, steps_of, monkeypatch):
    whole, = steps_of(1)
    monkeypatch.setattr(tiny, "WORLD_SIZE", 3)
    monkeypatch.setattr(tiny.nn.parallel, "DistributedDataParallel", lambda model: model)
    monkeypatch.setattr(tiny.dist, "all_reduce", lambda *_args: None)
    for rank in range(3):
        monkeypatch.setattr(tiny, "RANK", rank)
        share, = steps_of(1)
        assert same(share, tuple(part[rank::3] for part in whole))


def test_images_come_in_another_order_each_epoch_and_for_each_seed():
    orders = [epoch_order(seed, epoch, 600, CPU) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(600))
    assert not any(torch.equal(*pair) for pair in itertools.combinations(orders, 2))
    assert epoch_order(1, 1, 600, CPU) is orders[-1]    # kept, as every step asks for it


def test_default_model_learns_the_same_bits_again_with_two_threads(pictures):
    threads, states = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(2):
            trainer = Trainer(CPU)
            awake(trainer.model)    # so that all of it learns in one step
            trainer.step(*pictures)
            states.append(dict(trainer.model.state_dict()))
    finally:
        torch.set_num_threads(threads)
    assert same(*states)


def test_average_is_measured_on_all_training_images(tiny, monkeypatch, pictures):
    asked = []
    monkeypatch.setattr(tiny, "refresh_batch_norm",
                        lambda *args, **options: asked.append((args, options)))
    trainer = Trainer(CPU)
    finish_average(trainer, *pictures)
    ((model, images, labels), options), = asked
    assert model is trainer.average and not options     # 20 batches of 256, the function's defaults
    assert images is pictures[0] and labels is pictures[1]


def test_first_weights_are_a_function_of_seed(tiny, monkeypatch):
    weights = []
    for seed in (0, 1, 1):
        monkeypatch.setattr(tiny, "SEED", seed)
        weights.append(dict(Trainer(CPU).model.state_dict()))
    assert same(weights[1], weights[2]) and not same(weights[0], weights[1])


def test_epoch_sees_every_image_with_its_label_and_every_step(
        tiny, steps_of, pictures, monkeypatch):
    monkeypatch.setattr(tiny, "LABEL_DROPOUT", 0.0)
    seen = steps_of(2 * STEPS)
    first, second = (list(map(torch.cat, zip(*part))) for part in (seen[:STEPS], seen[STEPS:]))
    images, labels = pictures
    expected = sorted((bytes(x.flatten().tolist()), y) for x, y in zip(images, labels.tolist()))
    for x_start, t, y, noise in (first, second):
        pixels = tiny.to_uint8(x_start)
        assert expected == sorted(
            (bytes(x.flatten().tolist()), label) for x, label in zip(pixels, y.tolist()))
        assert t.bincount().tolist() == [600 // 20] * 20    # the noisiest as often as the others
        assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[3], second[3])


def test_label_dropout_is_the_share_of_null_labels_whatever_the_noise(
        tiny, steps_of, monkeypatch):
    monkeypatch.setattr(tiny, "LABEL_DROPOUT", 0.3)
    _, t, labels, _ = map(torch.cat, zip(*steps_of(4 * STEPS)))
    for level in (t < 10, t >= 10):
        null = (labels[level] == tiny.NUM_CLASSES).float().mean().item()
        assert null == pytest.approx(0.3, abs=0.06)


def test_draw_that_rounding_makes_the_whole_batch_is_still_a_step_below_t(
        tiny, monkeypatch, pictures):
    trainer = Trainer(CPU)
    monkeypatch.setattr(torch, "rand", lambda *size, **_options: torch.full(size, 1 - 2**-24))
    trainer.step(*pictures)     # in float32, 99 + 0.99999994 is 100, of which t would be T
    assert trainer.progress["step"] == 1 and trainer.progress["sums"].isfinite().all()


# One step's update

@pytest.mark.parametrize("epochs, usual, share, power", [
    (5, STEPS, 1.0, 1), (10, STEPS, 1.0, 5 / 3), (80, STEPS, 0.5, 2),   # four times twenty: half
    (80, 10 * STEPS, 1.0, 8 / 6)])      # as few updates as eight usual epochs
def test_learning_rate_warms_up_to_a_peak_lower_in_long_runs_and_falls_to_zero(
        tiny, monkeypatch, pictures, epochs, usual, share, power):
    monkeypatch.setattr(tiny, "usual_epoch", lambda: usual)
    monkeypatch.setattr(tiny, "EPOCHS", epochs)
    monkeypatch.setattr(tiny, "WARMUP_STEPS", 4)
    trainer, rates, steps = Trainer(CPU), {"muon": [], "adamw": []}, epochs * STEPS
    visited = [*range(4), *range(4, steps, epochs // 5)]   # of 5 epochs, each step
    for step in visited:
        trainer.progress.update(epoch=step // STEPS, position=step % STEPS * 100, step=step)
        trainer.step(*pictures)
        for name, seen in rates.items():
            seen.append(getattr(trainer, name).param_groups[0]["lr"])
    step = np.array(visited)
    fall = ((steps - step) / steps) ** power
    for name, peak in (("muon", tiny.MUON_LEARNING_RATE), ("adamw", tiny.LEARNING_RATE)):
        np.testing.assert_allclose(
            rates[name], share * peak * np.minimum(1, (step + 1) / 4) * fall, rtol=1e-6)


def test_every_weight_learns_and_kernels_by_nearly_orthogonal_updates(
        tiny, monkeypatch, pictures):
    monkeypatch.setattr(tiny, "WEIGHT_DECAY", 0.0)
    monkeypatch.setattr(tiny, "WARMUP_STEPS", 1)
    trainer = Trainer(CPU)
    for _ in range(3):      # until the zero-initialised weights let gradients through
        trainer.step(*pictures)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step(*pictures)
    assert not trainer.progress["sums"].requires_grad   # or all steps' maps would be kept
    rate, kernels = trainer.muon.param_groups[0]["lr"], 0
    for name, p in trainer.model.named_parameters():
        update = (p.detach() - before[name]).flatten(1) if p.ndim == 4 else p - before[name]
        assert update.any(), name
        if p.ndim == 4 and min(p.shape[:2]) >= 16:
            kernels += 1
            scale = rate * max(1, update.shape[0] / update.shape[1]) ** 0.5
            values = torch.linalg.svdvals(update) / scale
            assert 0.5 < values.median() and values.max() < 1.3, name
    assert kernels > 0


def test_muons_matrices_are_the_kernels_and_their_gradients(tiny, monkeypatch, pictures):
    trainer, grads, clip = Trainer(CPU), [], torch.nn.utils.clip_grad_norm_
    for _ in range(3):      # until the zero-initialised weights let gradients through
        trainer.step(*pictures)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: (
        clip(*args), grads.extend(kernel.grad.clone() for kernel in trainer.kernels)))
    trainer.step(*pictures)
    assert all(map(torch.any, grads)) and any(len(grad[0, 0]) == 3 for grad in grads)
    for kernel, matrix, grad in zip(trainer.kernels, trainer.matrices, grads, strict=True):
        for part, whole in ((matrix, kernel), (matrix.grad, grad)):     # (out, h * w * in)
            part = part.view(len(kernel), *kernel.shape[2:], kernel.shape[1]).movedim(3, 1)
            assert torch.equal(part, whole)


@pytest.mark.parametrize("setting, least, most", [
    ("fp32", 0, 1e-4), ("bf16", 1e-3, 0.05), ("auto", 0, 1e-4)])
def test_updates_are_orthogonalised_in_the_precision_of_training(
        tiny, monkeypatch, pictures, setting, least, most):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)     # no bf16
    for name, value in (("PRECISION", setting), ("WEIGHT_DECAY", 0.0), ("WARMUP_STEPS", 1)):
        monkeypatch.setattr(tiny, name, value)
    trainer, compared = Trainer(CPU), 0
    before = [kernel.detach().clone() for kernel in trainer.kernels]
    trainer.step(*pictures)
    rate = trainer.muon.param_groups[0]["lr"]
    for kernel, matrix, old in zip(trainer.kernels, trainer.matrices, before):
        x = trainer.muon.state[matrix]["momentum_buffer"].double()  # so far a share of the gradient
        if x.any():         # behind weights that start at zero, there is none yet
            scale, x = rate * max(1, len(x) / x.shape[1]) ** 0.5, x / x.norm()
            for _ in range(3):
                gram = x @ x.T
                x = 3.4445 * x - 4.775 * gram @ x + 2.0315 * gram @ gram @ x
            update = (old - kernel.detach()).movedim(1, 3).flatten(1) / scale
            assert least <= (update - x).norm() / x.norm() < most
            compared += 1
    assert compared > 0


def test_optimizers_have_the_momentum_and_betas_that_were_measured(tiny, pictures):
    trainer = Trainer(CPU)
    trainer.step(*pictures)
    assert trainer.adamw.param_groups[0]["betas"] == (0.9, 0.99)
    for matrix in trainer.matrices:     # a tenth of the first gradient: a momentum of 0.9
        buffer = trainer.muon.state[matrix]["momentum_buffer"]
        torch.testing.assert_close(buffer, 0.1 * matrix.grad)


@pytest.mark.parametrize("size, patch", [
    (16, 4), (16, 1), (17, 3), (17, 2), (33, 2), (33, 4), (64, 1), (64, 3)])
def test_every_image_and_patch_size_trains_and_samples(tiny, monkeypatch, size, patch):
    for name, value in (("IMG_SIZE", size), ("PATCH_SIZE", patch), ("BATCH_SIZE", 4)):
        monkeypatch.setattr(tiny, name, value)
    images, labels = (part[:40] for part in load_fashion_mnist("train"))
    trainer = Trainer(CPU)
    for _ in range(2):
        trainer.step(images, labels)
    refresh_batch_norm(trainer.average, images, labels, batches=1, batch_size=4)
    drawn = sample(trainer.average, [0, 9], steps=2)
    assert drawn.shape == (2, 1, size, size) and drawn.isfinite().all()
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.isfinite(trainer.progress["sums"]).all() and trainer.progress["step"] == 2


def test_gradient_of_the_mean_loss_is_clipped(tiny, monkeypatch, pictures):
    norms, losses = [], []
    clip, loss = torch.nn.utils.clip_grad_norm_, tiny.diffusion_loss

    def norm(gradients):
        return torch.stack([g.norm() for g in gradients]).norm().item()

    def watched(parameters, limit):
        parameters = list(parameters)
        norms.append(norm([p.grad for p in parameters]))
        total = clip(parameters, limit)
        norms.append(norm([p.grad for p in parameters]))
        return total

    def kept(model, *args):
        each = loss(model, *args)
        mean = sum(each) / len(each)
        losses.append(norm(torch.autograd.grad(mean, list(model.parameters()), retain_graph=True)))
        return each

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    monkeypatch.setattr(tiny, "diffusion_loss", kept)
    monkeypatch.setattr(tiny, "GRADIENT_CLIP", 1e-3)
    Trainer(CPU).step(*pictures)
    assert norms == [pytest.approx(losses[0], rel=1e-4), pytest.approx(1e-3, rel=0.01)]


@pytest.mark.parametrize("gamma", [0.0, 4.0, 16.0])
def test_average_of_weights_is_the_power_function_of_their_age(monkeypatch, gamma):
    monkeypatch.setattr(script_unet, "EMA_GAMMA", gamma)
    model, average = (torch.nn.Linear(3, 2).double() for _ in range(2))
    history, count = torch.randn(25, 2, 3, dtype=torch.float64), 25
    for step, weight in enumerate(history, start=1):
        model.weight.data.copy_(weight)
        update_average(average, model, step)
        if step == 1:       # nothing of the initial weights is left
            assert torch.equal(average.weight, model.weight)
    edges = (torch.arange(count + 1, dtype=torch.float64) / count) ** (gamma + 1)
    expected = torch.einsum("n,nij->ij", edges.diff(), history)
    torch.testing.assert_close(average.weight.data, expected)


def test_training_averages_the_weights_after_each_step(tiny, pictures):
    trainer, history = Trainer(CPU), []
    for _ in range(5):
        trainer.step(*pictures)
        history.append([p.detach().clone() for p in trainer.model.parameters()])
    shares = np.diff((np.arange(6) / 5) ** (tiny.EMA_GAMMA + 1))
    for average, *weights in zip(trainer.average.parameters(), *history):
        expected = sum(share * weight for share, weight in zip(shares, weights))
        torch.testing.assert_close(average.data, expected, rtol=1e-4, atol=1e-6)


def test_dropout_is_the_constants(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "DROPOUT", 0.3)
    model = Trainer(CPU).model
    assert {part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)} == {0.3}


@pytest.mark.parametrize("cuda, mps, wanted", [
    (True, False, "cuda"), (False, True, "cpu"), (False, False, "cpu")])
def test_nvidias_gpu_is_used_when_there_is_one_and_apples_is_not(monkeypatch, cuda, mps, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device().type == wanted


def test_training_in_bf16_keeps_float32_weights_and_nearly_the_losses(
        tiny, monkeypatch, pictures):
    sums = []
    for precision in ("fp32", "bf16"):
        monkeypatch.setattr(tiny, "PRECISION", precision)
        trainer = Trainer(CPU)
        for _ in range(STEPS):
            trainer.step(*pictures)
        sums.append(trainer.progress["sums"])
        for p in (*trainer.model.parameters(), *trainer.average.parameters()):
            assert p.dtype == torch.float32 and p.isfinite().all()
    torch.testing.assert_close(*sums, rtol=0.02, atol=0)
    assert not torch.equal(*sums)


@pytest.mark.parametrize("capabilities, wanted", [
    ({}, torch.float32), ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
    ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16)])
def test_cpu_computes_in_bf16_only_where_torch_reports_the_hardware(
        tiny, monkeypatch, capabilities, wanted):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    model, kinds = FashionMNISTUNetDenoiser(), []
    model.register_forward_hook(lambda _model, _args, v: kinds.append(v.dtype))
    for setting in ("auto", "fp32", "bf16"):
        monkeypatch.setattr(tiny, "PRECISION", setting)
        assert sample(model, [0], steps=1).dtype == torch.float32
    assert kinds == [wanted, torch.float32, torch.bfloat16]


def test_torch_still_has_the_names_that_precision_asks_for():
    assert "including_emulation" in inspect.signature(torch.cuda.is_bf16_supported).parameters
    if hasattr(torch.cpu, "get_capabilities") and platform.machine() == "x86_64":
        assert {"avx512_bf16", "amx_bf16"} <= set(torch.cpu.get_capabilities())


@pytest.mark.parametrize("supported, wanted", [(False, "fp32"), (True, "bf16")])
def test_gpu_computes_in_bf16_unless_it_only_emulates_it(monkeypatch, supported, wanted):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: (
        supported or including_emulation))
    assert script_unet.precision(torch.device("cuda")) == wanted


def test_model_too_thin_for_muon_trains(tiny, monkeypatch, pictures):
    for name, value in (("CHANNELS", (8,)), ("BLOCKS", (1,)), ("ATTENTION_HEAD_DIM", 8),
                        ("WEIGHT_DECAY", 0.0)):     # which changes weights that do not learn
        monkeypatch.setattr(tiny, name, value)
    trainer = Trainer(CPU)
    before = trainer.model.class_embedding.weight.detach().clone()
    for _ in range(3):
        trainer.step(*pictures)
    assert not trainer.kernels and (trainer.model.class_embedding.weight != before).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_run_on_the_gpu_learns_and_its_checkpoint_samples_on_the_cpu(
        tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        available = torch.cuda.is_available
        set_tiny(patch, tmp_path, PRECISION="auto", EPOCHS=3)
        patch.setattr(torch.cuda, "is_available", available)
        main()
        assert "device     cuda" in capsys.readouterr().out
        losses = [row["heldout_loss"] for row in
                  read_checkpoint(checkpoint("last"))["progress"]["history"]]
        assert losses[-1] < losses[0]
        on_gpu, on_cpu = (load_denoiser(checkpoint("last"), device) for device in ("cuda", "cpu"))
        patch.setattr(script_unet, "PRECISION", "fp32")
        images = sample(on_gpu, range(10)).cpu()
        assert (sample(on_cpu, range(10)) - images).abs().mean() < 0.02
