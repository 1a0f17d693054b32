"""tests/benchmarks/throughput.py and ten_minutes.py: what is timed, and how long is trained."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, checkpoint, labels_of, log_rows, raising
from torch.utils.flop_counter import FlopCounterMode

import peers
import ten_minutes
import throughput
from script_unet import Trainer, UserError, read_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["evaluate", "ten_minutes", "throughput", "trials"])
def test_commands_of_readme_find_the_script_and_say_more_by_help(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != ROOT])
    for module in ("script_unet", "evaluate", "peers", "throughput"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tests" / "benchmarks" / f"{name}.py"), run_name="__main__")
    assert not ended.value.code and f"usage: {name}.py" in capsys.readouterr().out


def test_rate_is_of_whole_steps_after_the_first(monkeypatch):
    now, durations = [0.0], iter([60, 3, 3, 60])    # the first compiles; two reach five seconds
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def step():
        now[0] += next(durations)
        return 12

    assert throughput.rate(step, 5, CPU) == 24 / 6


def test_what_a_gpu_has_still_to_do_counts_as_time(monkeypatch):
    now, queued = [0.0], [0.0]

    def step():     # handed over in a second, done in three
        now[0], queued[0] = now[0] + 1, queued[0] + 3
        return 12

    def synchronize():
        now[0], queued[0] = now[0] + queued[0], 0.0

    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    assert throughput.rate(step, 2, torch.device("cuda")) == 24 / 8


def test_timed_steps_are_training_steps_of_one_epoch_after_another(
        tiny, monkeypatch, pictures):
    monkeypatch.setattr(tiny, "EPOCHS", 1)
    trainer = Trainer(CPU)
    step = throughput.our_step(trainer, *pictures)
    assert [step() for _ in range(8)] == [100] * 8      # 600 images
    assert [trainer.progress[name] for name in ("epoch", "position", "step")] == [1, 200, 8]
    for optimizer in (trainer.muon, trainer.adamw):     # beyond the last epoch
        assert optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize("options", [[], ["--keep-freed-memory"]])
def test_contenders_take_turns_and_the_table_has_medians_and_the_rounds_own_ratios(
        tiny, monkeypatch, capsys, options):
    rates = {"ours": iter([100, 400, 300]), "diffusers": iter([10, 10, 20])}
    turns, built = [], []

    class Process:      # in place of a real one
        def __init__(self, workers, context):
            assert (workers, context.get_start_method()) == (1, "spawn")    # inherits no allocator

        def submit(self, function, *args):
            if function is throughput.set_up:
                built.append(args)
                self.name, result = args[0], (1234, {"ours": 5e7, "diffusers": 6e8}[args[0]],
                                              args[0])
            else:
                assert (function, args) == (throughput.turn, (2.0,))
                turns.append(self.name)
                result = next(rates[self.name])
            return SimpleNamespace(result=lambda: result)

        def shutdown(self):
            pass

    for name, value in (("ProcessPoolExecutor", Process), ("MATRIX_SIZE", 8), (
            "rate", lambda *_args: turns.append("product") or 1e11)):
        monkeypatch.setattr(throughput, name, value)
    monkeypatch.setattr(tiny, "keep_freed_memory", lambda: None)
    monkeypatch.setattr("sys.argv", ["throughput.py", "--rounds", "3", "--peers", "diffusers",
                                     "--peer-batch-size", "64", "--seconds", "2", *options])
    throughput.main()
    assert built == [("ours", True, 64), ("diffusers", bool(options), 64)]      # the allocator
    assert turns == ["ours", "product", "diffusers"] * 3
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if "1,234" in line]
    assert rows == [["ours", "fp32", "1,234", "50.0", "300", "1.0", "1.0", "to", "1.0"],
                    ["diffusers", "fp32", "1,234", "600.0", "10", "15.0", "10.0", "to", "40.0"]]
    # 3 * 50 MFLOP * (100, 400, 300) images/s of 100 GFLOP/s: 15, 60 and 45%
    assert "45 GFLOP/s (a step as three forward passes of 50.0 MFLOP), 45% of the 100" in printed


def test_peer_whose_package_is_missing_is_left_out_of_throughput(tiny, monkeypatch, capsys):
    class Process:
        def __init__(self, *_args):
            pass

        def submit(self, function, *args):
            if args[0] == "diffusers":
                return SimpleNamespace(result=raising(UserError("no package")))
            result = (1234, 5e7, "ours") if function is throughput.set_up else 100
            return SimpleNamespace(result=lambda: result)

        def shutdown(self):
            pass

    for name, value in (("ProcessPoolExecutor", Process), ("MATRIX_SIZE", 8),
                        ("rate", lambda *_args: 1e11)):
        monkeypatch.setattr(throughput, name, value)
    monkeypatch.setattr(tiny, "keep_freed_memory", lambda: None)
    monkeypatch.setattr("sys.argv", ["throughput.py", "--rounds", "1", "--peers", "diffusers"])
    throughput.main()
    said = capsys.readouterr().out
    assert "left out: no package" in said and "ours took in 100 to 100" in said


@pytest.fixture
def alone(monkeypatch):
    """A contender's set_up(), in a process that has no parent to end with."""
    monkeypatch.setattr(throughput, "threading", SimpleNamespace(
        Thread=lambda **_: SimpleNamespace(start=lambda: None)))
    monkeypatch.setattr(throughput, "contender", {})


def test_batch_above_the_data_is_refused_before_it_is_timed(tiny, alone, monkeypatch):
    monkeypatch.setattr(tiny, "BATCH_SIZE", 601)
    with pytest.raises(UserError, match="BATCH_SIZE must be at most 600, .*got 601"):
        throughput.set_up("ours", False, 128)


def test_matrix_product_is_of_as_many_operations_as_it_says(monkeypatch):
    monkeypatch.setattr(throughput, "MATRIX_SIZE", 8)
    step = throughput.matrix_product(CPU, torch.float32)
    with FlopCounterMode(display=False) as counter:
        assert step() == 2 * 8**3
    assert counter.get_total_flops() == 2 * 8**3


@pytest.mark.parametrize("seconds, epochs", [(4.5, 2), (6.3, 2), (0.1, 1)])
def test_ten_minutes_are_as_many_whole_epochs_as_fit_by_the_measured_rate(
        tiny, monkeypatch, pictures, seconds, epochs):
    monkeypatch.setattr(tiny, "BATCH_SIZE", 90)     # an epoch is 540 of the 600 images
    monkeypatch.setattr(throughput, "rate", lambda *_args: 250.0)   # 2.16 s an epoch
    for name in ("generate_visualizations", "draw_losses"):
        monkeypatch.setattr(tiny, name, lambda *_args: None)
    path, trained = ten_minutes.train_ours(*pictures, pictures, seconds)
    assert (trained["epochs"], trained["updates"]) == (epochs, 6 * epochs)
    assert tiny.EPOCHS == epochs        # so the learning rate ends at 0
    assert read_checkpoint(path)["progress"]["epoch"] == epochs == len(log_rows())


def test_training_time_is_that_of_the_steps_alone(tiny, monkeypatch, pictures):
    now, given = [0.0], []

    def clock(_device):     # waits a second for the device
        now[0] += 1
        return now[0]

    def step(trainer, *_args):
        now[0] += 1
        trainer.progress["step"] += 1

    def finish_epoch(trainer, *args):
        given.append(args)
        now[0] += 100
        trainer.progress["history"].append({"epoch": 1, "train_loss": 1.0, "heldout_loss": 1.0})

    monkeypatch.setattr(ten_minutes, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(throughput, "clock", clock)
    monkeypatch.setattr(throughput, "rate", lambda *_args: 100.0)
    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(tiny, "finish_epoch", finish_epoch)
    _, trained = ten_minutes.train_ours(*pictures, "held out", 12)  # two epochs of six batches
    assert [trained[name] for name in ("seconds", "images/s", "seconds between the epochs")] == [
        14, pytest.approx(1200 / 14), 200]
    assert given == [(*pictures, "held out")] * 2


@pytest.fixture
def judged(tiny, monkeypatch):
    """ten_minutes.py on 600 black training images and white test images, without its judge: a
    list of what was to be judged."""
    labels, judged = torch.arange(600) % 10, []
    data = {split: (torch.full((600, 1, 28, 28), gray).byte(), labels)
            for split, gray in (("train", 0), ("test", 255))}
    for name, value in (("real_images", data.get), ("evaluate_real", lambda *_: []),
                        ("evaluate", lambda *args: judged.append(args) or {"n": 20}),
                        ("print_table", lambda *_: None),
                        ("load_classifier", lambda _seed: SimpleNamespace(name="judge"))):
        monkeypatch.setattr(ten_minutes.evaluate, name, value)
    monkeypatch.setattr(tiny, "keep_freed_memory", lambda: None)
    return judged


def test_ten_minutes_write_to_their_folder_alone_and_say_which_constants_were_changed(
        tiny, judged, monkeypatch, tmp_path):
    for name, value in (("CHECKPOINT_PREFIX", str(tmp_path / "long")), ("SAMPLING_ETA", 0.5),
                        ("PICTURE_DIR", str(tmp_path / "long_pictures"))):
        monkeypatch.setattr(tiny, name, value)

    def train(*_args):
        with pytest.raises(UserError, match="another run holds"), tiny.hold_folder():
            pass
        assert tiny.SEED == 7
        trainer = Trainer(CPU)
        trainer.save("last")
        tiny.generate_visualizations(trainer.average, 1)
        return checkpoint("last").absolute(), {"updates": 0}

    monkeypatch.setattr(ten_minutes, "train_ours", train)
    monkeypatch.setattr("sys.argv", ["ten_minutes.py", "--samples", "2", "--output", "results",
                                     "--seed", "7", "BLOCKS=(0, 1)"])
    ten_minutes.main()
    assert not list(tmp_path.glob("long*"))
    assert {path.name for path in Path("results").rglob("*.p*")} == {
        "fashion_mnist_diffusion_last.pt", "samples.pt", "samples.png", "epoch_1_samples.png",
        "epoch_1_generation.png"}
    figures = json.loads(Path("results", "figures.json").read_text())
    assert figures["trained"] == {"updates": 0} and figures["seed"] == 7
    for said in ("SAMPLING_ETA = 0.5", "EMA_GAMMA = 4.0", "BLOCKS = (0, 1)"):
        assert f", {said}," in f", {figures['constants']},"
    with pytest.raises(SystemExit, match="results holds an earlier run"):
        ten_minutes.main()


@pytest.mark.parametrize("given, said", [
    ("CHANELS=(64,)", "CHANELS is no constant"), ("EPOCHS=3", "EPOCHS is no constant"),
    ("CHANNELS=(64", "constants are given as"), ("DROPOUT", "constants are given as")])
def test_ten_minutes_refuse_what_is_no_constant_or_no_value(
        tiny, monkeypatch, capsys, given, said):
    monkeypatch.setattr("sys.argv", ["ten_minutes.py", "--output", "here", given])
    with pytest.raises(SystemExit):
        ten_minutes.main()
    assert said in capsys.readouterr().err and not Path("here").exists()


def test_ten_minutes_that_fail_are_to_be_begun_anew(tiny, judged, monkeypatch):
    monkeypatch.setattr(ten_minutes, "train_ours", lambda *_args: tiny.check_loss(float("nan")))
    monkeypatch.setattr("sys.argv", ["ten_minutes.py", "--output", "of (1, 2)"])
    with pytest.raises(SystemExit, match=r"\(loss nan\): begin anew, with another --output"):
        ten_minutes.main()
    Path("of (1, 2)", "a").mkdir()
    monkeypatch.setattr(ten_minutes, "train_ours", lambda *_args: tiny.atomic_write("a", b"b"))
    with pytest.raises(SystemExit, match=r"cannot write .*of \(1, 2\)/a \(Is a.*\): begin anew"):
        ten_minutes.main()


class Line(peers.Peer):
    """A peer of one weight, 0 at first, that pulls it towards the batch's sum of labels."""

    gradient_clip, averaged = 0.5, 0

    def build(self):
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.batches = []

    def loss(self, x, labels):
        self.batches.append((x, labels))
        return (self.model.weight - labels.sum()).square().sum()

    def update_average(self):
        self.averaged += self.model.weight.item()

    def generate(self, labels):
        return (labels / 127.5 - 1).view(-1, 1, 1, 1)


def test_operations_of_a_peer_are_those_of_one_images_loss(tiny):
    assert Line(CPU).operations() == 0      # no product, no convolution
    peer = Line(CPU)
    peer.loss = lambda x, labels: F.conv2d(x, torch.ones(4, 1, 3, 3), padding=1).sum()
    assert peer.operations() == 2 * 28 * 28 * 9 * 4
    tokens = torch.ones(1, 1, 28, 4)
    peer.loss = lambda x, labels: F.scaled_dot_product_attention(tokens, tokens, tokens).sum()
    assert peer.operations() == 2 * 2 * 28 * 28 * 4     # two products


@pytest.fixture
def line(monkeypatch):
    """Line in the place of diffusers, drawing images of 28 x 28."""
    monkeypatch.setattr(Line, "package", "torch", raising=False)
    monkeypatch.setattr(Line, "generate", lambda self, labels: (labels / 127.5 - 1).view(
        -1, 1, 1, 1).expand(-1, 1, 28, 28))
    monkeypatch.setitem(peers.PEERS, "diffusers", Line)


def test_contender_takes_the_batches_and_the_allocator_that_it_is_given(
        tiny, alone, line, pictures, monkeypatch):
    asked, seen = [], []
    monkeypatch.setattr(tiny, "keep_freed_memory", lambda: asked.append(True))
    monkeypatch.setattr(Line, "batch_size", 7)
    monkeypatch.setattr(Line, "step", lambda _peer, *batch: seen.append(batch))
    for keep in (False, True):
        throughput.set_up("diffusers", keep, 64)
        assert throughput.contender["step"]() == 64 == len(seen[-1][1])
        assert labels_of(seen[-1][0], pictures) == seen[-1][1].tolist()
        assert len(asked) == keep


@pytest.mark.parametrize("options, batch_size", [
    ([], None), (["--peer", "diffusers"], 64), (["--peer", "diffusers", "--batch-size", "32"], 32)])
def test_ten_minutes_are_of_the_training_images_for_so_long_and_the_classes_asked_for(
        tiny, judged, line, monkeypatch, options, batch_size):
    taken = []
    monkeypatch.setattr(Line, "batch_size", 64)
    monkeypatch.setattr(Line, "conditional", True)

    def train_ours(*args):
        Trainer(CPU).save("last")
        return checkpoint("last").absolute(), taken.extend(args)

    monkeypatch.setattr(ten_minutes, "train_ours", train_ours)
    monkeypatch.setattr(ten_minutes, "train_peer", lambda peer, *args: taken.extend(args))
    monkeypatch.setattr(tiny, "keep_freed_memory", lambda: taken.append("memory kept"))
    monkeypatch.setattr("sys.argv", ["ten_minutes.py", "--samples", "2", "--output", "here",
                                     "--seconds", "5", "--seed", "3", *options])
    ten_minutes.main()
    memory, images, labels, *rest = taken
    assert memory == "memory kept"
    assert not images.any() and len(labels) == 600 and torch.initial_seed() == 3
    if options:
        assert rest == [5, batch_size]
    else:
        assert rest[0][0].eq(255).all() and rest[1:] == [5]     # held out
    assert judged[0][1].tolist() == [c for c in range(10) for _ in range(2)]


def test_diffusers_peer_learns_the_noise_of_a_class_and_samples_by_it(monkeypatch):
    peer, labels = peers.Diffusers(CPU), torch.arange(10)
    clean = torch.linspace(-0.9, 0.9, 10).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    with torch.no_grad():
        one, other = (peer.noise(clean[:1], torch.tensor(5), labels[i:i + 1]) for i in (0, 1))
    assert (one - other).abs().max() > 1e-3 and peer.conditional
    abar = peer.scheduler.alphas_cumprod.view(-1, 1, 1, 1)
    monkeypatch.setattr(peer, "noise", lambda x, t, labels: (       # without any error
        x - abar[t].sqrt() * clean[labels]) / (1 - abar[t]).sqrt())
    assert peer.loss(clean, labels) < 1e-6
    images = peer.sample(labels)[:, 0, 0, 0] / 127.5 - 1
    torch.testing.assert_close(images, clean[:, 0, 0, 0], rtol=0, atol=0.01)


def test_ddpm_pytorch_peer_learns_images_as_they_come_and_samples_by_its_average(monkeypatch):
    pytest.importorskip("denoising_diffusion_pytorch")
    peer, x = peers.DdpmPytorch(CPU), torch.tensor([-1.0, 0.0, 1.0])
    assert torch.equal(peer.model.normalize(x), x) and torch.equal(peer.model.unnormalize(x), x)
    monkeypatch.setattr(peer.model, "sample", None)
    monkeypatch.setattr(peer.average.ema_model, "sample",
                        lambda batch_size: torch.full((batch_size, 1, 28, 28), 0.2))
    assert peer.sample(torch.zeros(3)).eq(153).all()


def test_smalldiffusion_peer_samples_by_the_average_of_its_weights(monkeypatch):
    package = pytest.importorskip("smalldiffusion")
    peer, asked = peers.SmallDiffusion(CPU), []
    for value in (1.0, 2.0, 3.0):
        for p in peer.model.parameters():
            p.data.fill_(value)
        peer.update_average()
    monkeypatch.setattr(package, "samples", lambda model, *_args, batchsize, **_options: (
        asked.append(model), [torch.zeros(batchsize, 1, 28, 28)])[1])
    peer.sample(torch.zeros(3))
    second = 2 - 2 / 11     # decays of 2 / 11, then 3 / 12
    expected = torch.tensor(3 - 3 / 12 * (3 - second))
    assert all(torch.allclose(p, expected) for p in asked[0].parameters())


def test_peers_ten_minutes_are_judged_and_kept(tiny, judged, line, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ten_minutes.py", "--samples", "2", "--output", "results",
                                     "--peer", "diffusers", "--seconds", ".001", "--seed", "3"])
    seeds, build, generate = [], Line.build, Line.generate
    monkeypatch.setattr(Line, "build", lambda peer: (
        seeds.append(torch.initial_seed()), build(peer)))
    monkeypatch.setattr(Line, "generate", lambda peer, labels: (
        Path("peer.pt").stat(), generate(peer, labels))[1])     # kept before it samples
    ten_minutes.main()
    assert seeds == [3]
    assert {path.name for path in Path("results").glob("[!.]*")} == {
        "peer.pt", "samples.pt", "samples.png", "figures.json"}
    assert set(torch.load("results/peer.pt")["model"]) == {"weight"}
    samples = torch.load("results/samples.pt")
    assert samples[:, 0, 0, 0].tolist() == [c for c in range(10) for _ in range(2)]
    (images, asked, seed), = judged
    assert torch.equal(images, samples) and asked is None and seed == 0     # not conditional
    figures = json.loads(Path("results", "figures.json").read_text())
    assert figures["figures"] == {"n": 20} and figures["constants"] is None
    assert figures["trained"]["batch size"] == 128 and figures["seed"] == 3
    assert figures["data"] == str(tiny.find_data().absolute())


def test_samples_and_as_many_real_images_have_the_judge_that_is_asked_for(
        judged, line, monkeypatch):
    asked, shown = [], []
    for name, value in (
            ("evaluate_real", lambda *args: asked.append(args) or [{"n": 21}]),
            ("load_classifier", lambda seed: SimpleNamespace(name=f"judge {seed}")),
            ("print_table", lambda *args: shown.append(args))):
        monkeypatch.setattr(ten_minutes.evaluate, name, value)
    monkeypatch.setattr("sys.argv", [
        "ten_minutes.py", "--samples", "2", "--output", "here", "--peer", "diffusers",
        "--seconds", ".001", "--classifier-seed", "3"])
    ten_minutes.main()
    assert asked == [(2, 3)] and judged[0][2] == 3
    assert shown == [({"n": 20}, [{"n": 21}], "judge 3")]


def test_peer_that_diverges_is_not_judged(judged, line, monkeypatch):
    monkeypatch.setattr(Line, "step", lambda self, *_: self.model.weight.data.fill_(torch.nan))
    monkeypatch.setattr("sys.argv", ["ten_minutes.py", "--samples", "2", "--output", "here",
                                     "--peer", "diffusers", "--seconds", ".001"])
    with pytest.raises(SystemExit, match="training diverged: begin anew, with another --output"):
        ten_minutes.main()
    assert not judged


def test_peer_whose_package_is_missing_is_said_to_be_installed_not_begun_anew(
        judged, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr("sys.argv", ["ten_minutes.py", "--output", "here", "--peer", "diffusers"])
    with pytest.raises(UserError, match="diffusers.*pip install -r tests/benchmarks/req.*txt$"):
        ten_minutes.main()


@pytest.mark.parametrize("what, options", [
    ("samples.pt", []), ("samples.png", []), ("peer.pt", ["--peer", "diffusers"])])
def test_results_that_cannot_be_kept_are_judged_all_the_same(
        judged, line, monkeypatch, capsys, what, options):
    def train(*_args):
        Trainer(CPU).save("last")
        Path(what).mkdir()      # so it cannot be written
        return checkpoint("last").absolute(), {"updates": 0}

    monkeypatch.setattr(ten_minutes, "train_ours", train)
    monkeypatch.setattr(ten_minutes, "train_peer", lambda *args: train()[1])
    monkeypatch.setattr("sys.argv", ["ten_minutes.py", "--samples", "2", "--output", "here",
                                     *options])
    ten_minutes.main()
    assert f"{what} (Is a directory)\n" in capsys.readouterr().out
    assert json.loads(Path("here", "figures.json").read_text())["figures"] == {"n": 20}


def test_step_of_a_peer_is_an_update_along_its_batchs_clipped_gradient():
    peer, images = Line(CPU), torch.tensor([0, 255]).byte()
    for labels in ([3, 4], [0, 0]):     # gradients -14 and then 2 * .5 = 1, both clipped to .5
        peer.step(images, torch.tensor(labels))
        assert peer.batches[-1][0].tolist() == [-1, 1]
    assert peer.model.weight.item() == pytest.approx(0, abs=1e-5)
    assert peer.averaged == pytest.approx(0.5)
    samples = peer.sample(torch.arange(5), batch_size=2)
    assert samples.dtype == torch.uint8 and samples.flatten().tolist() == [0, 1, 2, 3, 4]


def test_peer_is_trained_on_each_image_once_an_epoch_until_the_time_is_up(monkeypatch, capsys):
    peer, labels = Line(CPU), torch.arange(10)
    monkeypatch.setattr(ten_minutes, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.setattr(throughput, "clock", lambda _device: float(len(peer.batches)))
    trained = ten_minutes.train_peer(peer, labels.byte(), labels, 7, 4)     # a second a step
    assert trained["updates"] == 7 and trained["batch size"] == 4
    assert [len(batch) for _, batch in peer.batches] == [4, 4, 2, 4, 4, 2, 4]
    for x, batch in peer.batches:
        assert torch.equal((127.5 * (x + 1)).round().long(), batch)
    epoch = torch.cat([batch for _, batch in peer.batches[:3]])
    assert sorted(epoch.tolist()) == list(range(10))
    again = torch.cat([batch for _, batch in peer.batches[3:6]])
    assert sorted(again.tolist()) == list(range(10)) and not torch.equal(again, epoch)
    assert "trained 7 s, 7 updates of 4 images, 3 images/s" in capsys.readouterr().out
