"""tests/benchmarks/evaluate.py: its figures are what their definitions say, worked out by hand."""

import pytest
import torch

import evaluate


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


def test_figures_of_a_name_are_computed_once_and_a_failure_leaves_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "CACHE", tmp_path / "cache")
    with pytest.raises(ZeroDivisionError):
        evaluate.cached("one", lambda: 1 / 0)
    assert not list((tmp_path / "cache").iterdir())
    results = [evaluate.cached("one", lambda n=n: {"n": n}) for n in (1, 2)]
    assert results == [{"n": 1}, {"n": 1}]
