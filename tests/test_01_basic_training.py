"""Lesson 01: what it prints and draws. Its training is tested in test_training.py."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_lesson, use_results
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, TensorDataset


@pytest.fixture
def lesson(lessons):
    return lessons["01"]


def test_prints_and_draws_the_losses_of_its_epochs(lesson, tmp_path, monkeypatch):
    """One line and one point for every epoch, and the names of the pictures at the end."""
    drawn = {}
    use_results(monkeypatch, lesson, [(2.25, 11.5), (1.75, 33.25), (1.5, 44.0)])
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.update({path: figure.axes[0]}))
    output = run_lesson(lesson, tmp_path, "--epochs", 3)
    results = [("2.2500", "11.50"), ("1.7500", "33.25"), ("1.5000", "44.00")]
    for epoch, (loss, accuracy) in enumerate(results, start=1):
        assert f"Epoch  {epoch}/3 | train loss {loss}, acc {accuracy} % | 0 s\n" in output
    ax = drawn[tmp_path / "artifacts" / "01_basic_training.png"]
    assert ax.lines[0].get_xydata().tolist() == [[1, 2.25], [2, 1.75], [3, 1.5]]
    assert "digits" in ax.get_title() and (ax.get_xlabel(), ax.get_ylabel()) == (
        "epoch",
        "mean training loss",
    )
    assert f"Pictures in {tmp_path / 'artifacts'}: 01_samples.png, 01_basic_training.png\n" in output


def test_prints_the_loss_of_every_hundredth_batch(lesson, images, capsys):
    """Of the first batch, which random guessing explains, of every hundredth after it, and of the last one."""
    torch.manual_seed(0)
    model, losses = lesson.SimpleCNN(), []

    def loss_fn(logits, labels):
        losses.append(F.cross_entropy(logits, labels))
        return losses[-1]

    pixels, labels = images.tensors
    loader = DataLoader(TensorDataset(pixels.repeat(11, 1, 1, 1)[:210], labels.repeat(11)[:210]), 2)
    lesson.train_one_epoch(model, loader, loss_fn, torch.optim.SGD(model.parameters(), 0.001), "cpu")
    printed = re.findall(r"batch +(\d+)/105  loss ([\d.]+)", capsys.readouterr().out)
    assert [int(batch) for batch, _ in printed] == [1, 101, 105]
    for batch, loss in printed:
        assert float(loss) == pytest.approx(losses[int(batch) - 1].item(), abs=0.0001)


def test_shows_an_image_of_every_class_with_its_name(lesson, tmp_path):
    """Upright and in its colors: the first image of the class."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(29, -1, -1) % 10
    names = [f"class {i}" for i in range(10)]
    figure = lesson.plot_samples(images, labels, names)
    assert [ax.get_title() for ax in figure.axes] == names
    for label, ax in enumerate(figure.axes):
        [shown] = ax.images
        assert np.array_equal(shown.get_array(), images[9 - label].numpy().transpose(1, 2, 0))


def test_the_images_are_drawn_before_training_begins(lesson, tmp_path, monkeypatch):
    """So that they can be looked at meanwhile. One of every class, even if the training uses fewer images."""
    plot_samples, classes = lesson.plot_samples, []

    def note_classes(images, labels, class_names):
        classes.extend(labels.unique().tolist())
        return plot_samples(images, labels, class_names)

    def train_one_epoch(*_):
        assert (tmp_path / "artifacts" / "01_samples.png").stat().st_size > 1000
        raise KeyboardInterrupt

    monkeypatch.setattr(lesson, "plot_samples", note_classes)
    monkeypatch.setattr(lesson, "train_one_epoch", train_one_epoch)
    with pytest.raises(KeyboardInterrupt):
        run_lesson(lesson, tmp_path, "--subset", 3)
    assert classes == list(range(10))
