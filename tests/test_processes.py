"""Real processes: killed at any moment, out of disk space, and several of them on one run."""

import io
import json
import os
import random
import resource
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, checkpoint, log_rows, same, set_tiny
from PIL import Image

import script_unet
from script_unet import UserError, main, read_checkpoint

LONG = ["EPOCHS = 24", "CHECKPOINT_EVERY = 5", "PICTURE_COLUMNS = 2", "GUIDANCE_SCALE = 0.0",
        "note_memory()", "plain_figures()"]


def start(folder, *lines, processes=1):
    """tests/tiny_run.py in that folder with these lines; several processes by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1",
                f"--nproc_per_node={processes}", f"--log-dir={folder}"]
    return subprocess.Popen(
        [sys.executable, *torchrun * (processes > 1), str(ROOT / "tests" / "tiny_run.py"), *lines],
        cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE if processes > 1 else None,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
             # Or the processes meet by way of the host's name, whatever network that is on
             "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
             "PYTHONUNBUFFERED": "",    # standard output to a file is buffered, unless flushed
             "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"),
                                            *filter(None, [os.environ.get("PYTHONPATH")])])})


def run_two(folder, *lines):
    """(exit status, standard output, standard error) of two processes on one run in the folder."""
    process = start(folder, *lines, processes=2)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that has one process run main() in the folder, with tiny constants and these
    lines, and returns its (exit status, standard output, standard error); both are appended to."""
    forks = start(tmp_path_factory.mktemp("forks"))

    def run_one(folder, *lines):
        print(json.dumps([str(folder), *lines]), file=forks.stdin, flush=True)
        assert (status := forks.stdout.readline()), f"the forks' parent ended: {forks.poll()}"
        return int(status), *(Path(f"{folder}.{name}").read_text() for name in ("out", "err"))

    yield run_one
    forks.kill()
    forks.communicate()


def losses(folder):
    """The rows of training_log.csv, as numbers."""
    return [list(row.values()) for row in log_rows(folder)]


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """The folder of a long undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    status, _, err = run(folder, *LONG)
    assert status == 0, err
    return folder


def test_run_killed_a_dozen_times_ends_as_the_undisturbed_one(run, undisturbed, tmp_path):
    draw = random.Random(0)
    for _ in range(12):     # an epoch has about twenty events
        status, _, err = run(tmp_path, *LONG, f"kill_at_event({draw.randint(1, 40)})")
        assert status == -signal.SIGKILL, err
    status, out, err = run(tmp_path, *LONG)
    assert status == 0, err
    assert out.count("resuming") > 7 and "\nepoch 1/24: loss" in out   # not lost in a buffer
    for path in undisturbed.rglob("*"):
        mine = tmp_path / path.relative_to(undisturbed)
        if path.suffix == ".pt":
            assert same(read_checkpoint(mine), read_checkpoint(path)), mine
        elif path.suffix in (".png", ".gif", ".csv"):
            assert mine.read_bytes() == path.read_bytes(), mine
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {
        path.name for path in undisturbed.iterdir() if not path.name.startswith(".")}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_over_twenty_epochs(undisturbed):
    resident = [int(line) for line in (undisturbed / "memory").read_text().split()]
    assert len(resident) == 24 and resident[-1] - resident[3] < 10e6


@pytest.mark.parametrize("epochs, kind", [(0, "png"), (1, "pt")])
def test_full_disk_leaves_the_last_files_and_a_run_that_goes_on(
        tmp_path, monkeypatch, epochs, kind):
    set_tiny(monkeypatch, tmp_path, EPOCHS=1)
    if epochs:
        main()
    before = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()
              and not path.name.endswith(".lock")}
    monkeypatch.setattr(script_unet, "EPOCHS", epochs + 1)
    # The kernel refuses what is written beyond the limit, as it does on a full disk
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    try:
        with pytest.raises(UserError, match=rf"cannot write .*{kind} .*too large"):
            main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not [path for path in Path().rglob("*.writing")]
    main()
    assert read_checkpoint(checkpoint("last"))["progress"]["epoch"] == epochs + 1


def test_reader_never_meets_half_a_file(tmp_path, monkeypatch):
    set_tiny(monkeypatch, tmp_path, EPOCHS=2, PICTURE_COLUMNS=2)
    seen = set()

    class Halves(io.FileIO):
        """A file; when half of what is written to it is there, somebody reads all other files."""

        def write(self, data):
            written = super().write(data[:len(data) // 2])
            for path in [*Path().rglob("*.png"), *Path().glob("*.pt")]:
                if path.suffix == ".pt":
                    read_checkpoint(path)
                else:
                    with Image.open(path) as image:
                        image.load()
                seen.add(path)
            return written + super().write(data[written:])

    monkeypatch.setattr(script_unet, "open", lambda path, mode: (
        Halves if mode == "wb" else open)(path, mode), raising=False)
    main()
    assert {Path("training_loss.png"), checkpoint("last")} <= seen


@pytest.mark.parametrize("processes, rank", [(1, 0), (2, 1)])
def test_rank_counts_only_among_several_processes(monkeypatch, processes, rank):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert runpy.run_path(str(ROOT / "script_unet.py"))["RANK"] == rank


@pytest.mark.parametrize("unread", [(), (1,), (1, 2)])     # of standard output and error
def test_stopped_process_says_how_to_go_on_and_ends_with_the_signals_status(run, tmp_path, unread):
    status, out, err = run(tmp_path, "kill_at(3, 0, signal.SIGINT)", f"break_pipe(*{unread})")
    assert status == 128 + signal.SIGINT
    assert read_checkpoint(checkpoint("last", tmp_path))["progress"]["step"] == 3
    assert "Traceback" not in err and "Exception" not in err
    if len(unread) < 2:
        said = (out, err)[len(unread)]
        assert "stopped by SIGINT" in said and "run the same command again" in said


def test_lock_of_a_dead_process_does_not_block(tmp_path, monkeypatch):
    set_tiny(monkeypatch, tmp_path, EPOCHS=1, PICTURE_COLUMNS=2)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, time; file = open('.fashion_mnist_diffusion.lock', "
         "'a'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(300)"],
        stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run"):
            main()
    finally:
        holder.kill()
        holder.communicate()
    main()


# Several processes

LINES = ["EPOCHS = 2", "PICTURE_COLUMNS = 2", "DROPOUT = 0.0"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, standard output) of two processes on one run."""
    folder = tmp_path_factory.mktemp("two")
    status, out, err = run_two(folder, *LINES)
    assert status == 0 and "Grad strides" not in err, err
    return folder, out


def test_two_processes_with_batch_statistics_of_their_own_train_nearly_as_one_does(
        run, two, tmp_path):
    status, _, err = run(tmp_path, *LINES)
    assert status == 0, err
    torch.testing.assert_close(losses(two[0]), losses(tmp_path), rtol=1e-2, atol=0)
    assert losses(two[0]) != losses(tmp_path)


def test_of_several_processes_one_speaks(two):
    assert two[1].count("device     cpu") == two[1].count("epoch 2/2") == 1
    assert two[1].count("finished") == 1


def test_two_processes_stop_together_within_an_epoch_and_go_on_bit_for_bit(two, tmp_path):
    asked = ["kill_at(9, 1, signal.SIGTERM)"] * 2       # as torchrun and the terminal may, both
    status, out, err = run_two(tmp_path, *LINES, *asked)
    assert status not in (0, None) and out.count("stopped by SIGTERM") == 1, err
    assert read_checkpoint(checkpoint("last", tmp_path))["progress"]["step"] == 9
    status, out, err = run_two(tmp_path, *LINES)
    assert status == 0 and "resuming" in out, err
    assert same(*(read_checkpoint(checkpoint("last", folder)) for folder in (tmp_path, two[0])))


def test_killed_worker_ends_the_job_and_one_process_goes_on_as_if_it_had_been_alone(
        run, tmp_path):
    lines = [*LINES, "without_batch_statistics()"]
    folders = [tmp_path / name for name in ("alone", "killed")]
    for folder in folders:
        folder.mkdir()
    status, _, err = run_two(folders[1], *lines, "kill_at(9, 1)")
    assert status not in (0, None)
    assert "lost another" in err and "run the same command again" in err, err
    assert read_checkpoint(checkpoint("last", folders[1]))["progress"]["epoch"] == 1
    for folder, resuming in zip(folders, (False, True)):
        status, out, err = run(folder, *lines)
        assert status == 0 and ("resuming" in out) is resuming, err
    torch.testing.assert_close(*map(losses, folders), rtol=1e-3, atol=0)


def test_process_that_cannot_join_the_others_says_what_to_do(run, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(taken.getsockname()[1])}
        status, _, err = run(tmp_path, f"os.environ.update({where})", "WORLD_SIZE = 2")
    assert status == 1 and "process 0 of 2 failed" in err and "Traceback" not in err
    assert "run the same command again to go on" in err
