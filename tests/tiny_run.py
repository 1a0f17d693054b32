"""What `python script_unet.py` does, with the tests' constants: for tests that kill processes.

    python tests/tiny_run.py 'EPOCHS = 3' 'kill_at(9, 0)'

Each argument is Python, executed before main(): a constant to set, or a call of what is defined
here. Without any it does so for each line of its input, see fork_for_each_line().
"""

import gc
import itertools
import json
import os
import signal
import sys
from pathlib import Path

import torch
from conftest import TINY

import script_unet


def without_batch_statistics():
    """Have each image normalised on its own: the processes' shares then do not matter at all."""
    class Norm(torch.nn.GroupNorm):
        def __init__(self, channels):
            super().__init__(1, channels)

        def reset_running_stats(self):
            pass

    script_unet.nn.BatchNorm2d = Norm


def kill_at(step, rank, number=signal.SIGKILL):
    """Have that process receive the signal before its training step of that number."""
    inner = script_unet.Trainer.step

    def outer(trainer, *args):
        if trainer.progress["step"] + 1 == step and script_unet.RANK == rank:
            os.kill(os.getpid(), number)
        inner(trainer, *args)

    script_unet.Trainer.step = outer


def kill_at_event(number):
    """Have this process kill itself before its step, sampling, flush or rename of that number."""
    count = itertools.count(1)

    def counted(inner):
        def outer(*args, **kwargs):
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*args, **kwargs)
        return outer

    for owner, name in ((script_unet.Trainer, "step"), (script_unet, "sample"),
                        (os, "fsync"), (os, "replace")):
        setattr(owner, name, counted(getattr(owner, name)))


def break_pipe(*descriptors):
    """Have nobody read these any more, as after Ctrl-C nobody does in `... | tee run.log`."""
    reader, writer = os.pipe()
    os.close(reader)
    for descriptor in descriptors:
        os.dup2(writer, descriptor)


def fork_for_each_line():
    """For each line of standard input, a JSON list of a folder and of Python, let a fork go on.

    Returns, in the fork, the Python; it works in the folder and writes to FOLDER.out and
    FOLDER.err. As real a process as any, but torch, whose import takes seconds, is there already.
    Prints how each ended, and ends with the input.
    """
    import torch._dynamo  # noqa: F401 (which the optimizers import)
    for line in sys.stdin:
        folder, *lines = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.alarm(240)
            os.chdir(folder)
            for number, name in ((1, "out"), (2, "err")):
                path = f"{folder}.{name}"
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            return lines
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    os._exit(0)


def plain_figures():
    """Draw without a layout, which takes half of an epoch as short as the tests'."""
    inner = script_unet.Figure
    script_unet.Figure = lambda *args, layout, **options: inner(*args, **options)


def note_memory():
    """Have resident memory in bytes, a line an epoch, written to the file "memory"."""
    inner = script_unet.finish_epoch

    def outer(*args):
        inner(*args)
        if sys.platform == "linux":
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with open("memory", "a") as file:
                print(pages * os.sysconf("SC_PAGE_SIZE"), file=file)

    script_unet.finish_epoch = outer


if __name__ == "__main__":
    gc.freeze()     # the collection at the end of each epoch is faster so
    vars(script_unet).update(TINY)
    for line in sys.argv[1:] or fork_for_each_line():
        exec(line, globals(), vars(script_unet))
    try:
        script_unet.main()
    except script_unet.UserError as error:
        sys.exit(f"script_unet.py: {error}")
