"""The pictures of an epoch, the losses' and the final ones: what they show, and where."""

import copy
import string
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from conftest import TINY, same
from matplotlib.figure import Figure
from PIL import Image, ImageSequence
from torchvision.datasets import FashionMNIST

import script_unet
from script_unet import (FashionMNISTUNetDenoiser, Trainer, draw_losses, generate_visualizations,
                         load_fashion_mnist, mosaic, sample)


def coded_sample(level):
    """A stand-in for sample(): image j of class c is at step k all of gray level(c, j, k)."""
    def fake(model, labels, *_args, callback, **_kwargs):
        column = torch.arange(len(labels)) - torch.searchsorted(labels, labels)
        for k, t in enumerate((19, 13, 6, 0, -1)):
            gray = level(labels, column, torch.full_like(labels, k)).float() / 127.5 - 1
            images = gray.view(-1, 1, 1, 1).expand(-1, -1, 28, 28)
            callback(t, images)
        return images

    return fake


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, as matplotlib's own, in a list that grows."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: (
        saved.append(figure), save(figure, *args, **options)))
    return saved


@pytest.mark.parametrize("folder, wanted", [("", "epoch_7_samples.png"),
                                            ("a/b/", "a/b/epoch_7_samples.png")])
def test_pictures_go_to_picture_dir_as_announced(tiny, monkeypatch, capsys, folder, wanted):
    Path("a/b").mkdir(parents=True)
    monkeypatch.setattr(tiny, "PICTURE_DIR", folder)
    model, (images, _) = FashionMNISTUNetDenoiser(), load_fashion_mnist("test")
    generate_visualizations(model, 7)
    assert Path(wanted).exists()
    script_unet.report(model, "folder", images, images, 1)
    assert f", {Path(wanted).parent}/\n" in capsys.readouterr().out


def centre_of(gray, level):
    """(x, y) of the middle of the cell of that gray level; fails when there is none."""
    rows, columns = np.nonzero(abs(gray - level) <= 1)     # matplotlib's rounding
    assert len(rows) > 300, level
    return np.median(columns), np.median(rows)


@pytest.mark.parametrize("kind", ["samples", "generation"])
def test_picture_has_a_row_a_class_and_columns_in_order_on_a_fixed_gray_scale(
        tiny, monkeypatch, kind):
    monkeypatch.setattr(tiny, "PICTURE_COLUMNS", 5)
    monkeypatch.setattr(tiny, "sample", coded_sample(
        lambda c, j, k: 17 + 4 * (5 * c + (j if kind == "samples" else k))))
    generate_visualizations(FashionMNISTUNetDenoiser(), 7)
    with Image.open(f"{tiny.PICTURE_DIR}/epoch_7_{kind}.png") as image:
        gray = np.asarray(image.convert("L")).astype(int)
    x, y = np.array([[centre_of(gray, 17 + 4 * (5 * c + column)) for column in range(5)]
                     for c in range(10)]).transpose(2, 0, 1)
    for along in (x, y.T):      # evenly spaced, and aligned within 2 pixels
        assert np.ptp(along, axis=0).max() <= 2
        assert np.diff(along[0]).min() > 20 and np.ptp(np.diff(along[0])) <= 4


def test_more_columns_make_a_wider_picture_not_smaller_clothes(tiny, monkeypatch, figures):
    monkeypatch.setattr(tiny, "PICTURE_COLUMNS", 30)
    monkeypatch.setattr(tiny, "sample", coded_sample(lambda c, j, k: 17 + c))
    generate_visualizations(FashionMNISTUNetDenoiser(), 7)
    with Image.open(f"{tiny.PICTURE_DIR}/epoch_7_samples.png") as image:
        assert image.width > 30 * 50 and image.height < 1000
    assert len(figures[1].axes[0].get_xticks()) == 5    # no step is shown twice


def test_style_of_a_users_does_not_change_the_clothes(tiny, monkeypatch, figures):
    monkeypatch.setattr(tiny, "sample", coded_sample(lambda c, j, k: 17 + c))
    style = {"axes.grid": True, "axes.grid.which": "both", "grid.color": "red",
             "image.origin": "lower", "image.aspect": "auto", "image.cmap": "hot",
             "image.interpolation": "bilinear",
             "xtick.minor.visible": True, "ytick.minor.visible": True}
    with matplotlib.rc_context(style):
        generate_visualizations(FashionMNISTUNetDenoiser(), 7)
    for path in Path(tiny.PICTURE_DIR).iterdir():
        with Image.open(path) as image:
            red, green, blue = np.asarray(image.convert("RGB")).astype(int).transpose(2, 0, 1)
        assert (red == green).all() and (red == blue).all(), path
    for figure in figures:
        axes, = figure.axes
        assert axes.yaxis_inverted() and axes.get_aspect() == 1     # the first class above
        assert axes.images[0].get_interpolation() == "nearest"


@pytest.mark.parametrize("scale, epochs, shown", [(2.5, 20, "2.5"), (0.0, 50, "1.65")])
def test_pictures_name_classes_steps_epoch_and_guidance(
        tiny, monkeypatch, figures, scale, epochs, shown):
    monkeypatch.setattr(tiny, "PICTURE_COLUMNS", 3)
    monkeypatch.setattr(tiny, "GUIDANCE_SCALE", scale)
    model = FashionMNISTUNetDenoiser()
    model.epochs.fill_(epochs)
    generate_visualizations(model, 7)
    assert len(figures) == 2
    for figure in figures:
        axes, = figure.axes
        for part in ("epoch 7", "4 of 20 steps", f"guidance {shown}"):
            assert part in axes.get_title()
        title = axes.title.get_window_extent()
        assert 0 < title.x0 and title.x1 < figure.bbox.x1
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == FashionMNIST.classes and axes.axison
        for ticks, count in ((axes.get_yticks(), 10), (axes.get_xticks(), 3)):
            assert list(ticks) == [30 * i + 15 for i in range(count)]   # the middle of each cell
    names = [[label.get_text() for label in figure.axes[0].get_xticklabels()]
             for figure in figures]
    kinds = [figure.axes[0].get_title().split(",")[0] for figure in figures]
    assert kinds == ["Samples", "Noise to image"] and names[0] == ["1", "2", "3"]
    visited = []
    sample(FashionMNISTUNetDenoiser(), [0], callback=lambda t, x_t: visited.append(t))
    assert visited[0] == 19 and visited[-1] == -1 and len(visited) == 5
    assert any(["t = 19", f"t = {t}", "image"] == names[1] for t in visited[1:3])


def test_steps_that_are_shown_are_spread_over_the_whole_way(tiny, monkeypatch, figures):
    def sample(_model, labels, callback):
        for t in range(22, -2, -1):
            callback(t, torch.zeros(len(labels), 1, 28, 28))
        return torch.zeros(len(labels), 1, 28, 28)

    monkeypatch.setattr(tiny, "sample", sample)
    monkeypatch.setattr(tiny, "PICTURE_COLUMNS", 4)
    generate_visualizations(FashionMNISTUNetDenoiser(), 7)
    names = [label.get_text() for label in figures[1].axes[0].get_xticklabels()]
    assert names == ["t = 22", "t = 14", "t = 7", "image"]      # 0, 7.7, 15.3 and 23 of 23


def test_class_names_are_drawn_as_they_are_written(tiny, monkeypatch, figures):
    names = ("$$", "$_$", "US$/A$", "{x}", "a_b^c", "\\alpha", "%d", "#", "&", "Größe")
    monkeypatch.setattr(tiny, "CLASS_NAMES", names)
    generate_visualizations(FashionMNISTUNetDenoiser(), 7)
    for figure in figures:
        drawn = figure.axes[0].get_yticklabels()
        assert tuple(label.get_text() for label in drawn) == names
        assert not any(label.get_parse_math() for label in drawn)


def test_pictures_of_a_run_are_guided(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "GUIDANCE_SCALE", 2.0)
    monkeypatch.setattr(tiny, "PICTURE_COLUMNS", 2)
    trainer, asked = Trainer(torch.device("cpu")), []
    trainer.guide.register_forward_hook(lambda *_: asked.append(1))
    before = copy.deepcopy(trainer.guide.state_dict())
    generate_visualizations(trainer.average, 1)
    assert len(asked) == TINY["SAMPLING_STEPS"]
    assert same(trainer.guide.state_dict(), before)     # batch normalization's statistics, too


def test_pictures_of_all_epochs_start_from_the_same_noise_in_one_batch(tiny, monkeypatch):
    noise, sizes, draw, model = [], [], tiny.sample, FashionMNISTUNetDenoiser()
    model.register_forward_hook(lambda _model, _args, v: sizes.append(len(v)))

    def watched(*args, callback, **options):
        def both(t, x_t):
            noise.extend([x_t.clone()] * (t == 19))
            callback(t, x_t)
        return draw(*args, callback=both, **options)

    monkeypatch.setattr(tiny, "PICTURE_COLUMNS", 3)
    monkeypatch.setattr(tiny, "sample", watched)
    for epoch in (1, 2):
        generate_visualizations(model, epoch)
    assert len(noise) == 2 and torch.equal(*noise)
    assert sizes == [3 * 10] * (2 * TINY["SAMPLING_STEPS"])


def test_loss_picture_draws_both_losses_by_noise_level_from_the_first_epoch(tiny, figures):
    row = {f"{kind}_{level}": 0.1 * number for number, (kind, level) in enumerate(
        ((kind, level) for kind in ("train", "heldout")
         for level in ("loss", "early", "middle", "late")), start=1)}
    draw_losses([{"epoch": 1, **row}])
    lines = [line for axes in figures[0].axes for line in axes.lines]
    named = {line.get_label().split(":")[0].replace(" ", "_"): line for line in lines}
    assert {name: line.get_ydata()[0] for name, line in named.items()} == pytest.approx(row)
    for line in lines:
        assert (line.get_linestyle() == "--") == line.get_label().startswith("train")
    for axes, title, levels in zip(figures[0].axes, ("All steps", "By noise level"), (1, 3)):
        assert axes.get_title().startswith(title) and len(axes.lines) == 2 * levels
        assert axes.get_yscale() == "log"
    assert Path("training_loss.png").exists()


@pytest.mark.parametrize("first", [0.33, 0.14, 9.9])
def test_loss_picture_shows_the_late_epochs_however_high_the_first_ones_losses_were(
        tiny, figures, first):
    history = [{"epoch": epoch, **{
        f"{kind}_{level}": first if epoch == 1 else last
        for kind, last in (("train", 0.1), ("heldout", 0.12))
        for level in ("loss", "early", "middle", "late")}} for epoch in (1, 2, 3)]
    history[-1]["train_early"] = float("nan")       # which no image of the epoch had
    draw_losses(history)
    for axes in figures[0].axes:
        bottom, top = axes.get_ylim()
        assert 0.06 < bottom < 0.1 and top == pytest.approx(1.2 * 0.12)


@pytest.mark.parametrize("epochs", [1, 3, 150])
def test_loss_picture_can_be_read_off_it_has_decimals_whole_epochs_and_the_last_losses(
        tiny, figures, epochs):
    draw_losses([{"epoch": epoch, **{
        f"{kind}_{level}": factor * (0.12 + 0.2 / epoch**2)
        for kind, factor in (("train", 1), ("heldout", 0.9))
        for level in ("loss", "early", "middle", "late")}} for epoch in range(1, epochs + 1)])
    for axes in figures[0].axes:
        assert axes.get_xlabel() == "epoch" and axes.get_ylabel() == "loss" and axes.get_title()
        for axis, (least, most) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            labels = {tick: label.get_text() for tick, label in
                      zip(axis.get_majorticklocs(), axis.get_majorticklabels())
                      if least <= tick <= most}
            assert all(float(text) == pytest.approx(tick) for tick, text in labels.items())
            if axis is axes.xaxis:
                assert labels and all(tick == int(tick) for tick in labels)
            else:
                assert 5 <= len(labels) <= 13
                assert not any(label.get_text() for label in axis.get_minorticklabels())
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            line.get_label() for line in axes.lines]
        for line in axes.lines:
            assert line.get_label().endswith(f": {line.get_ydata()[-1]:.4f}")
            assert list(line.get_xdata()) == list(range(1, epochs + 1))


@pytest.mark.parametrize("classes, columns", [(10, 2), (10, 30), (26, 2)])
@pytest.mark.parametrize("size", [28, 64])
def test_every_pixel_of_the_images_is_in_the_picture(tiny, monkeypatch, size, classes, columns):
    for name, value in (("NUM_CLASSES", classes), ("CLASS_NAMES", tuple(range(classes)))):
        monkeypatch.setattr(tiny, name, value)
    chessboard = torch.ones(classes * columns, 1, size, size)
    for axis in (2, 3):
        for line in range(0, size, 2):
            chessboard.select(axis, line).neg_()
    script_unet.draw_classes(chessboard, ["j"] * columns, "t", "picture.png")
    with Image.open("picture.png") as image:
        gray = np.asarray(image.convert("L")).astype(int)
    for lines, cells in ((gray, columns), (gray.T, classes)):
        changes = (abs(np.diff(lines, axis=1)) > 100).sum(1).max()
        assert changes >= (size - 1) * cells


@pytest.mark.parametrize("steps, seconds", [(22, 4.2), (100, 7), (250, 7), (300, 8)])
def test_gif_of_many_steps_stays_short(tiny, monkeypatch, steps, seconds):
    def fake(_model, labels, callback):
        for t in range(steps - 1, -2, -1):
            callback(t, images := torch.full((len(labels), 1, 28, 28), t % 2 / 2))
        return images

    monkeypatch.setattr(tiny, "sample", fake)
    monkeypatch.setattr(tiny, "PICTURE_COLUMNS", 2)
    generate_visualizations(FashionMNISTUNetDenoiser(), 7, final=True)
    with Image.open("final_fashion_mnist_generation.gif") as gif:
        assert sum(frame.info["duration"] for frame in ImageSequence.Iterator(gif)) == (
            pytest.approx(1000 * seconds))


def test_gif_ends_with_the_first_final_image_of_each_class(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "PICTURE_COLUMNS", 2)
    monkeypatch.setattr(tiny, "sample", coded_sample(lambda c, j, k: 2 * (5 * c + k) + 101 * j))
    generate_visualizations(FashionMNISTUNetDenoiser(), 7, final=True)
    with Image.open("final_fashion_mnist_generation.gif") as gif:
        for k in range(gif.n_frames):
            gif.seek(k)
            cells = np.asarray(gif.convert("L"))[14::30, 14::30]
            assert cells.tolist() == [[2 * (5 * (5 * row + c) + k) for c in range(5)]
                                      for row in range(2)]
    assert k == 4 and Path("final_fashion_mnist_samples.png").exists()


@pytest.mark.parametrize("classes, rows", [(7, 7), (15, 3), (26, 26)])
def test_pictures_of_another_number_of_classes_are_drawn(tiny, monkeypatch, classes, rows):
    for name, value in (("NUM_CLASSES", classes), ("PICTURE_COLUMNS", 2),
                        ("CLASS_NAMES", tuple(string.ascii_lowercase[:classes]))):
        monkeypatch.setattr(tiny, name, value)
    generate_visualizations(FashionMNISTUNetDenoiser(), 7, final=True)
    with Image.open("final_fashion_mnist_generation.gif") as gif:
        assert gif.size == (classes // rows * 30 - 2, rows * 30 - 2)
    with Image.open("final_fashion_mnist_samples.png") as picture:
        assert picture.height > 30 * classes    # no pixel of a sample is left out


def test_epoch_of_images_of_another_size_is_drawn_and_judged(tiny, monkeypatch, figures):
    for name, value in (("IMG_SIZE", 16), ("BATCH_SIZE", 20), ("PICTURE_COLUMNS", 2)):
        monkeypatch.setattr(tiny, name, value)
    images, labels = (part[:40] for part in load_fashion_mnist("train"))
    trainer = Trainer(torch.device("cpu"))
    trainer.step(images, labels)
    tiny.finish_epoch(trainer, images, labels, (images, labels))
    assert list(figures[0].axes[0].get_yticks()) == [18 * i + 9 for i in range(10)]
    generate_visualizations(trainer.average, 1, final=True)
    with Image.open("final_fashion_mnist_generation.gif") as gif:
        assert gif.size == (5 * 18 - 2, 2 * 18 - 2)


def test_pictures_keep_no_more_of_each_step_than_they_show(tiny, monkeypatch):
    frames, draw = [], tiny.mosaic

    def watched(images, columns):
        frames.append(images.untyped_storage().nbytes() / images.nbytes)
        return draw(images, columns)

    monkeypatch.setattr(tiny, "mosaic", watched)
    generate_visualizations(FashionMNISTUNetDenoiser(), 7, final=True)
    assert frames[1:] == [1] * (TINY["SAMPLING_STEPS"] + 1)


@pytest.mark.parametrize("gap", [2, 0])
def test_mosaic_places_images_row_by_row_between_white_lines(gap):
    grays, cell = torch.tensor([0, 50, 100, 150, 200, 250]), 4 + gap
    images = (grays.float() / 127.5 - 1).view(6, 1, 1, 1).expand(-1, -1, 4, 4)
    expected = np.full((2 * cell - gap, 3 * cell - gap), 255)
    for i, gray in enumerate(grays.tolist()):
        top, left = i // 3 * cell, i % 3 * cell
        expected[top:top + 4, left:left + 4] = gray
    np.testing.assert_array_equal(mosaic(images, 3, gap), expected)
