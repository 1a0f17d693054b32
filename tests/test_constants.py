"""The constants: their defaults, what is refused and how; importing and running the file."""

import ast
import contextlib
import importlib.util
import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import symtable
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, awake, checkpoint, raising, same

import script_unet
from script_unet import UserError, check_constants, main

SCRIPT = ROOT / "script_unet.py"

BAD = [
    ("EPOCHS", 0), ("EPOCHS", 1.5), ("EPOCHS", None), ("BATCH_SIZE", 1), ("BATCH_SIZE", True),
    ("LEARNING_RATE", -1e-3), ("LEARNING_RATE", 0), ("LEARNING_RATE", float("nan")),
    ("LEARNING_RATE", "fast"), ("MUON_LEARNING_RATE", float("inf")), ("WARMUP_STEPS", 0),
    ("WEIGHT_DECAY", -0.1), ("GRADIENT_CLIP", 0), ("DROPOUT", 1.0), ("DROPOUT", -0.1),
    ("LABEL_DROPOUT", 1.5), ("LABEL_DROPOUT", 1.0), ("EMA_GAMMA", -1), ("SEED", -1), ("SEED", "0"),
    ("IMG_SIZE", 15), ("IMG_SIZE", 65), ("IMG_SIZE", 28.0), ("IMG_SIZE", (28, 28)),
    ("PATCH_SIZE", 0), ("PATCH_SIZE", 56),
    ("CHANNELS", (0, 32)), ("CHANNELS", (32.0, 64)), ("CHANNELS", [64, 96, 128]),
    ("BLOCKS", (1, -1)), ("BLOCKS", 1), ("BLOCKS", (0, 0, 0)),
    ("EMBEDDING_DIM", 0), ("ATTENTION_HEAD_DIM", 0), ("ATTENTION_HEAD_DIM", 48),
    ("NUM_DIFFUSION_STEPS", 2), ("NUM_DIFFUSION_STEPS", 20_000), ("NUM_DIFFUSION_STEPS", 100.0),
    ("BETA_SCHEDULE", "cosin"), ("BETA_SCHEDULE", None), ("BETA_START", 0), ("BETA_END", -0.02),
    ("SAMPLING_STEPS", 0), ("SAMPLING_ETA", -0.1), ("SAMPLING_ETA", 1.1), ("GUIDANCE_SCALE", -1),
    ("CHECKPOINT_EVERY", 0), ("PICTURE_COLUMNS", 0),
    ("PICTURE_COLUMNS", 1), ("RESUME", 1), ("EPOCHS", True),
    # Checkpoints of these could not be read
    ("NUM_CLASSES", np.int64(10)), ("NUM_CLASSES", 10.0), ("BETA_END", np.float64(0.02)),
    ("LEARNING_RATE", np.float64(1e-3)),
    ("BETA_SCHEDULE", np.str_("cosine")), ("CHANNELS", np.array([64, 96, 128]))]


def refused():
    """The message of check_constants' UserError."""
    with pytest.raises(UserError) as caught:
        check_constants()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def constants_section():
    """The lines of the script that set the constants."""
    text = SCRIPT.read_text()
    return text[text.index("# Training"):text.index("CLASS_NAMES")]


def load(path):
    """The module as that file defines it, whatever other tests have set."""
    spec = importlib.util.spec_from_file_location("fresh", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fresh():
    return load(SCRIPT)


@pytest.fixture
def edited(tmp_path):
    """A function that loads the script with one constant edited in the file, as users do."""
    def edit(name, value):
        text, count = re.subn(rf"(?m)^{name} = \S.*?(?=\s+#)", f"{name} = {value!r}",
                              SCRIPT.read_text())
        assert count == 1
        (path := tmp_path / "edited.py").write_text(text)
        return load(path)

    return edit


@pytest.mark.parametrize("name, value", BAD)
def test_bad_constant_is_refused_with_its_name_and_its_value(monkeypatch, name, value):
    monkeypatch.setattr(script_unet, name, value)
    message = refused()
    assert f"{name} must " in message and f"got {value!r}" in message
    assert message.count(" must ") == 1     # the others are fine


@pytest.mark.parametrize("name, value, allowed", [
    ("EPOCHS", 1_000_001, "an integer from 1 to 1e+06"), ("RESUME", "no", "True or False"),
    ("WEIGHT_DECAY", 11, "a number from 0 to 10"), ("SAMPLING_GRAIN", -1, "a number from 0 to 10"),
    ("SAMPLING_GRAIN", 10.1, "a number from 0 to 10"), ("PATCH_SIZE", 5, "an integer from 1 to 4"),
    ("CHANNELS", 64, "a tuple, each an integer from 1 to 10000"),
    ("PRECISION", "fp16", "'auto' or 'bf16' or 'fp32'")])
def test_message_says_what_is_allowed(monkeypatch, name, value, allowed):
    monkeypatch.setattr(script_unet, name, value)
    assert refused() == f"{name} must be {allowed}, got {value!r}"


@pytest.mark.parametrize("name, value", [
    ("SAMPLING_STEPS", 20.0), ("IMG_SIZE", "28"), ("CHANNELS", 64), ("RESUME", None)])
def test_bad_constant_edited_in_the_file_is_refused_as_well(edited, name, value):
    module = edited(name, value)
    with pytest.raises(module.UserError, match=f"^{name} must .*got {value!r}$"):
        module.check_constants()


@pytest.mark.parametrize("name, value", [("PICTURE_COLUMNS", 3), ("BLOCKS", (1, 2, 1))])
def test_constant_edited_in_the_file_is_printed_as_differing_from_its_default(
        edited, fresh, tmp_path, monkeypatch, capsys, name, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 10**12}))
    said = []
    for module in (fresh, edited(name, value)):
        module.report(module.FashionMNISTUNetDenoiser(), "folder", [], [], 1)
        said.append(re.search(r"(?m)^constants  (.*)$", capsys.readouterr().out)[1])
    assert said == ["all at their defaults", f"{name} = {value!r}"]


def test_class_names_of_another_number_than_the_models_are_refused(monkeypatch):
    monkeypatch.setattr(script_unet, "CLASS_NAMES", ("shoe", "bag"))    # from a notebook
    assert refused() == "NUM_CLASSES=10 must be len(CLASS_NAMES)=2"
    monkeypatch.setattr(script_unet, "NUM_CLASSES", 2)
    script_unet.check_constants()


def test_class_names_in_the_file_are_as_many_as_one_likes(tmp_path):
    text, found = re.subn(r"(?s)CLASS_NAMES = \(.*?\)", 'CLASS_NAMES = ("shoe", "bag")',
                          SCRIPT.read_text(), count=1)
    (tmp_path / "edited.py").write_text(text)
    edited = load(tmp_path / "edited.py")
    edited.check_constants()
    assert found and edited.FashionMNISTUNetDenoiser().class_embedding.num_embeddings == 3


@pytest.mark.parametrize("channels, blocks", [
    ((), ()), ((32,) * 5, (1,) * 5), ((32, 64), (1,)), ((32,), (1, 1))])
def test_channels_and_blocks_must_be_one_to_four_and_as_many(monkeypatch, channels, blocks):
    monkeypatch.setattr(script_unet, "CHANNELS", channels)
    monkeypatch.setattr(script_unet, "BLOCKS", blocks)
    message = refused()
    assert "CHANNELS" in message and "BLOCKS" in message and "1 to 4" in message


def test_all_bad_constants_are_named_at_once(monkeypatch):
    for name in ("EPOCHS", "WARMUP_STEPS", "PATCH_SIZE"):
        monkeypatch.setattr(script_unet, name, -1)
    assert refused().count("got -1") == 3


@pytest.mark.parametrize("start, end", [
    (1e-4, 0.01), (1e-4, 0.0125), (1e-4, 0.12), (1e-9, 0.02), (1e-8, 0.02), (0.02, 1e-9)])
def test_linear_schedule_that_leaves_some_image_or_has_equal_steps_in_float32_is_refused(
        monkeypatch, start, end):
    for name, value in (("SCHEDULE", "linear"), ("START", start), ("END", end)):
        monkeypatch.setattr(script_unet, f"BETA_{name}", value)
    message = refused()
    assert "BETA_START" in message and "BETA_END" in message and f"got {start} and {end}" in message


def test_the_limits_themselves_are_allowed(monkeypatch):
    good = [("EPOCHS", 1), ("EPOCHS", 1_000_000), ("BATCH_SIZE", 2), ("BATCH_SIZE", 100_000),
            ("LEARNING_RATE", 1e-9), ("LEARNING_RATE", 10), ("MUON_LEARNING_RATE", 10),
            ("WARMUP_STEPS", 1), ("WEIGHT_DECAY", 0), ("WEIGHT_DECAY", 10),
            ("GRADIENT_CLIP", 1e9), ("DROPOUT", 0.99), ("LABEL_DROPOUT", 0),
            ("LABEL_DROPOUT", 0.99), ("EMA_GAMMA", 0), ("SEED", 10**9), ("IMG_SIZE", 16),
            ("IMG_SIZE", 64), ("PATCH_SIZE", 1), ("PATCH_SIZE", 4), ("CHANNELS", (1, 1, 9984)),
            ("BLOCKS", (0, 0, 100)), ("EMBEDDING_DIM", 1), ("ATTENTION_HEAD_DIM", 1),
            ("NUM_DIFFUSION_STEPS", 3), ("NUM_DIFFUSION_STEPS", 10_000),
            ("BETA_SCHEDULE", "linear"), ("SAMPLING_STEPS", 1), ("SAMPLING_ETA", 1),
            ("GUIDANCE_SCALE", 0), ("GUIDANCE_SCALE", 100), ("PRECISION", "bf16"),
            ("RESUME", False), ("CHECKPOINT_EVERY", 1), ("PICTURE_COLUMNS", 2),
            ("PICTURE_COLUMNS", 100)]
    for name, value in good:
        with monkeypatch.context() as patch:
            patch.setattr(script_unet, name, value)
            check_constants()


def test_bad_constant_stops_main_before_anything_is_loaded_or_written(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "EPOCHS", 0)
    monkeypatch.setattr(tiny, "find_data", raising(AssertionError("looked for data")))
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match="EPOCHS must be .*, got 0"):
        main()
    assert sorted(Path().rglob("*")) == before


def test_batch_above_the_data_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "BATCH_SIZE", 601)
    with pytest.raises(UserError, match="BATCH_SIZE must be .*600.*, got 601"):
        main()


def without_others(monkeypatch):
    """Be one of two processes; returns a list that grows when it takes leave of the other."""
    left = []
    monkeypatch.setattr(script_unet, "WORLD_SIZE", 2)
    for name in ("init_process_group", "broadcast_object_list"):
        monkeypatch.setattr(script_unet.dist, name, lambda *_args: None)
    monkeypatch.setattr(script_unet.dist, "destroy_process_group", lambda: left.append(True))
    return left


@pytest.mark.parametrize("size", [2, 33])    # one image a process has no statistics; 33 is odd
def test_batch_that_does_not_suit_the_processes_is_refused(tiny, monkeypatch, size):
    without_others(monkeypatch)
    monkeypatch.setattr(tiny, "BATCH_SIZE", size)
    with pytest.raises(UserError, match=f"^BATCH_SIZE must be from 4 .* of 2, .*, got {size}"):
        main()


@pytest.mark.parametrize("error, leaves", [
    (None, True), (SystemExit, True), (UserError, False), (RuntimeError, False)])
def test_processes_take_leave_of_each_other_unless_one_fails(tiny, monkeypatch, error, leaves):
    left = without_others(monkeypatch)
    monkeypatch.setattr(tiny, "run", raising(error) if error else lambda stop: None)
    with (pytest.raises(UserError if error is RuntimeError else error) if error else
          contextlib.nullcontext()):
        main()
    assert bool(left) == leaves


def test_process_that_lost_another_says_so_though_torchrun_sends_it_a_signal(tiny, monkeypatch):
    without_others(monkeypatch)
    monkeypatch.setattr(tiny, "run", raising(RuntimeError("Connection closed")))
    with pytest.raises(UserError, match="process 0 of 2 failed or lost another .*closed"):
        main()
    signal.raise_signal(signal.SIGTERM)     # before the message is printed


def test_signal_to_several_processes_before_the_first_step_reaches_training(tiny, monkeypatch):
    without_others(monkeypatch)
    monkeypatch.setattr(tiny.nn.parallel, "DistributedDataParallel", lambda model: model)
    monkeypatch.setattr(tiny, "report", lambda *_args: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(tiny, "train", lambda *args: sys.exit(f"asked by {args[-1]}"))
    with pytest.raises(SystemExit, match=re.escape(f"asked by {[signal.SIGTERM.value]}")):
        main()


def test_signals_of_several_processes_stop_all_by_the_greatest(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "WORLD_SIZE", 2)
    monkeypatch.setattr(tiny, "finish_average", lambda *_args: None)
    join = {tiny.dist.ReduceOp.MAX: max, tiny.dist.ReduceOp.SUM: lambda mine, other: mine + other}
    monkeypatch.setattr(tiny.dist, "all_reduce", lambda number, operation: number.fill_(
        join[operation](number.item(), signal.SIGTERM)))    # another process's
    for stop in ([], [signal.SIGINT], [signal.SIGTERM]):
        with pytest.raises(SystemExit) as ended:
            tiny.exit_if_asked(SimpleNamespace(save=lambda _name: None), None, None, stop)
        assert ended.value.code == 128 + signal.SIGTERM


def test_each_process_takes_its_own_gpu_and_both_ways_to_the_others(tiny, monkeypatch):
    without_others(monkeypatch)
    asked = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(tiny.dist, "init_process_group", asked.append)
    monkeypatch.setattr(tiny, "run", raising(SystemExit))
    with pytest.raises(SystemExit):
        main()
    assert asked == [3, "cpu:gloo,cuda:nccl"]   # exit_if_asked() speaks of the CPU's numbers


def test_statistics_between_gpus_are_of_the_whole_batch_and_the_averages_are_measured(
        tiny, monkeypatch):
    without_others(monkeypatch)
    to = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to",
                        lambda module, _gpu, **options: to(module, **options))
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel",
                        lambda model: SimpleNamespace(module=model))
    trainer = tiny.Trainer(SimpleNamespace(type="cuda"))
    for model, kind in ((trainer.network.module, torch.nn.SyncBatchNorm),
                        (trainer.average, torch.nn.BatchNorm2d),
                        (trainer.guide, torch.nn.BatchNorm2d)):
        norms = [part for part in model.modules() if hasattr(part, "running_mean")]
        assert norms and all(type(part) is kind for part in norms)


def test_picture_dir_that_is_a_file_is_refused(tiny, monkeypatch):
    Path("taken").touch()
    monkeypatch.setattr(tiny, "PICTURE_DIR", "taken")
    with pytest.raises(UserError, match="PICTURE_DIR = 'taken'"):
        main()


@pytest.mark.parametrize("folder", [".", script_unet.PICTURE_DIR, "models"])
def test_folder_that_cannot_be_written_to_is_refused_before_training(tiny, monkeypatch, folder):
    probe, refuse = tiny.tempfile.TemporaryFile, raising(PermissionError(13, "Permission denied"))
    monkeypatch.setattr(tiny, "CHECKPOINT_PREFIX", "models/run")
    monkeypatch.setattr(tiny.tempfile, "TemporaryFile", lambda **options: (
        refuse if options["dir"] == Path(folder) else probe)(**options))  # root may write anywhere
    with pytest.raises(UserError, match="PICTURE_DIR.*CHECKPOINT_PREFIX.*writable.*denied"):
        main()
    assert not list(Path().rglob("*.p[tn]*"))


def test_too_little_disk_where_the_checkpoints_go_is_refused_before_training(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "CHECKPOINT_PREFIX", "models/run")
    monkeypatch.setattr(tiny.shutil, "disk_usage", lambda path: type(
        "usage", (), {"free": 10**6 if path == Path("models") else 10**12}))
    with pytest.raises(UserError, match="1 MB free.*CHECKPOINT_EVERY"):
        main()
    assert not list(Path().rglob("*.p[tn]*"))


def test_default_run_needs_the_free_disk_that_readme_names(fresh, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(fresh.UserError, match="MB free") as caught:
        fresh.report(fresh.FashionMNISTUNetDenoiser(), "folder", [], [], fresh.EPOCHS)
    needed, = re.findall(r"(\d+) needed", str(caught.value))
    assert f"does not start with less than {int(needed) / 1000:.1f} free" in (
        ROOT / "README.md").read_text()


def test_process_of_another_machine_goes_on_from_the_first_ones_checkpoint(tiny, monkeypatch):
    first, trained = tiny.Trainer(torch.device("cpu")), []
    awake(first.model)
    first.progress.update(step=3, position=300)
    first.save("last")
    found = tiny.newest_checkpoint(tiny.model_constants())
    checkpoint("last").unlink()         # this machine has none
    without_others(monkeypatch)
    monkeypatch.setattr(tiny, "RANK", 1)
    monkeypatch.setattr(tiny.dist, "broadcast_object_list",
                        lambda objects: objects.__setitem__(0, ("folder", *found)))
    monkeypatch.setattr(tiny.nn.parallel, "DistributedDataParallel", lambda model: model)
    monkeypatch.setattr(tiny, "train", lambda trainer, *_: sys.exit(trained.append(trainer)))
    with pytest.raises(SystemExit):
        main()
    assert trained[0].progress["step"] == 3
    assert same(dict(trained[0].model.state_dict()), dict(first.model.state_dict()))


def test_process_that_writes_nothing_needs_no_disk(tiny, monkeypatch):
    full = type("usage", (), {"free": 10**6})
    monkeypatch.setattr(tiny.shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(tiny, "RANK", 1)
    model, (images, _) = tiny.FashionMNISTUNetDenoiser(), tiny.load_fashion_mnist("test")
    tiny.report(model, "folder", images, images, 1)


def test_other_processes_neither_look_for_data_nor_set_checkpoints_aside(tiny, monkeypatch):
    without_others(monkeypatch)
    monkeypatch.setattr(tiny, "RANK", 1)
    checkpoint("last").write_bytes(b"damaged")
    monkeypatch.setattr(tiny.dist, "broadcast_object_list", lambda found: sys.exit(str(found)))
    with pytest.raises(SystemExit, match=r"^\[None\]$"):
        main()
    assert checkpoint("last").exists()


def test_every_constant_but_paths_is_checked(fresh):
    names = set(re.findall(r"^([A-Z_]+) = ", constants_section(), re.MULTILINE))
    paths = {"DATA_DIR", "SYSTEM_DATA_DIR", "PICTURE_DIR", "CHECKPOINT_PREFIX"}
    assert set(fresh.ALLOWED) == names - paths | {"NUM_CLASSES"}
    fresh.check_constants()


def test_script_imports_what_requirements_names_each_with_a_lower_bound_alone():
    needs = (ROOT / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", need) for need in needs)
    nodes = [node for node in ast.walk(ast.parse(SCRIPT.read_text()))
             if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name.split(".")[0] for node in nodes for name in (
        [node.module] if isinstance(node, ast.ImportFrom) else [x.name for x in node.names])}
    own = names - set(sys.stdlib_module_names) - {"PIL"}    # which matplotlib needs
    assert own == {need.split(">=")[0] for need in needs}


def test_readme_lists_each_constant_with_its_default_and_its_words():
    constants = re.findall(r"^([A-Z_]+) = (\S.*?)(?:\s+# (.*))?$", constants_section(),
                           re.MULTILINE)
    rows = re.findall(r"^\| `([A-Z_]+)` \| `(.*?)` \| (.+) \|$", (ROOT / "README.md").read_text(),
                      re.MULTILINE)
    assert len(constants) > 30 and [row[:2] for row in rows] == [c[:2] for c in constants]
    differing = [(row, c) for row, c in zip(rows, constants) if row[2] != c[2]]
    assert not differing


def test_constants_that_a_resumed_run_may_not_change_are_those_that_readme_names():
    names = re.findall(r"^([A-Z_]+) = ", constants_section(), re.MULTILINE)
    named = {"IMG_SIZE", *names[names.index("PATCH_SIZE"):names.index("BETA_END") + 1]}
    assert set(script_unet.model_constants()) == named | {"FORMAT", "NUM_CLASSES"}
    assert "(`IMG_SIZE`, and `PATCH_SIZE` to `BETA_END`)" in " ".join(
        (ROOT / "README.md").read_text().split())


def test_import_prints_nothing_writes_nothing_and_reads_no_data(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.addaudithook(lambda event, args: "
            "event == 'open' and 'ubyte' in str(args[0]) and sys.exit(9)); import script_unet")
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, text=True,
                          capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_mistake_of_the_user_ends_the_command_with_one_line_and_no_traceback(tmp_path):
    text = SCRIPT.read_text()
    wrong = text.replace("\nEPOCHS = 150 ", "\nEPOCHS = 0   ", 1)
    assert wrong != text
    (tmp_path / "script_unet.py").write_text(wrong)
    done = subprocess.run([sys.executable, "script_unet.py"], cwd=tmp_path, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "EPOCHS must be" in done.stderr


def test_letters_that_standard_output_does_not_know_are_no_error(tmp_path):
    text = SCRIPT.read_text()
    for constant in (f"DATA_DIR = '{DATA}'", "CHECKPOINT_PREFIX = 'größe'", "BATCH_SIZE = 601"):
        text = re.sub(rf"(?m)^{constant.split()[0]} = \S+", constant, text)
    (tmp_path / "script_unet.py").write_text(text, encoding="utf-8")
    (tmp_path / "größe_last.pt").write_bytes(b"damaged")
    done = subprocess.run([sys.executable, "script_unet.py"], cwd=tmp_path, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"},
                          capture_output=True, timeout=120)
    assert "BATCH_SIZE must be" in done.stderr and "Traceback" not in done.stderr
    assert r"is kept as gr\xf6\xdfe_last.pt.1" in done.stdout


@pytest.mark.parametrize("notebook, answer", [(False, script_unet.__doc__),
                                              (True, "script_unet.py: PICTURE_DIR")])
def test_arguments_are_answered_by_what_to_edit_unless_they_are_a_notebooks(
        tmp_path, monkeypatch, notebook, answer):
    monkeypatch.chdir(tmp_path)
    Path(script_unet.PICTURE_DIR).touch()       # so main() goes no further
    monkeypatch.setattr(sys, "argv", ["script_unet.py", "--epochs", "4"])
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    if not notebook:
        del sys.modules["ipykernel"]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))     # which is set up
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code.startswith(answer)


@pytest.mark.parametrize("stream", [io.StringIO(), None])   # a notebook's; where it is closed
def test_command_needs_no_standard_output_that_can_be_set_up(tmp_path, monkeypatch, stream):
    monkeypatch.chdir(tmp_path)
    Path(script_unet.PICTURE_DIR).touch()       # so main() goes no further
    monkeypatch.setattr(sys, "argv", ["script_unet.py"])
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit, match="script_unet.py: PICTURE_DIR"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_program_fits_900_lines_of_at_most_100_characters():
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) <= 900 and max(map(len, lines)) <= 100


def test_each_function_and_class_uses_only_what_stands_above_it():
    source = SCRIPT.read_text()
    home = {}
    for node in ast.parse(source).body:
        names = [node.name] if hasattr(node, "name") else [
            part.id for part in ast.walk(node)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
        home |= dict.fromkeys(names, node.lineno)

    def uses(table):
        names = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        return names.union(*map(uses, table.get_children()))

    definitions = symtable.symtable(source, "script_unet.py", "exec").get_children()
    late = [(definition.get_name(), name) for definition in definitions
            for name in uses(definition) if home.get(name, 0) > definition.get_lineno()]
    assert len(definitions) > 60 and "q_sample" in home and not late


def test_links_of_the_readme_lead_to_files():
    links = re.findall(r"\]\(([^):]+)\)", (ROOT / "README.md").read_text())
    assert len(links) > 4 and all((ROOT / link).exists() for link in links)


def test_messages_and_docstrings_name_constants_that_are_there():
    texts = " ".join(node.value for node in ast.walk(ast.parse(SCRIPT.read_text()))
                     if isinstance(node, ast.Constant) and isinstance(node.value, str))
    names = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", texts))
    assert len(names) > 20 and names <= vars(script_unet).keys() | {"LOCAL_RANK"}
