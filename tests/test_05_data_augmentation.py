"""Lesson 05: training images change at random, validation images never, and the recipe is the promised one.

Lesson 06 trains with the same recipe, so what both do is tested for both. test_training.py tests how lesson 05 keeps
and resumes its runs.
"""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import draw_nothing, run_lesson
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

VARIANTS = ["without_augmentation", "with_augmentation", "strong_augmentation"]


@pytest.fixture
def lesson(lessons):
    yield lessons["05"]
    plt.close("all")


@pytest.fixture
def photos():
    """64 times the same image, uint8 (64, 3, 32, 32), without any symmetry."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(60, 200, (3, 32, 32), dtype=torch.uint8, generator=generator).repeat(64, 1, 1, 1)


def as_a_set(images):
    """Return the images as a set of bytes."""
    return {image.numpy().tobytes() for image in images}


# The transforms


def test_gentle_and_strong_augmentation_are_the_promised_lists(lesson):
    """The gentle one rotates and changes colors only sometimes, and crops half as far. The strong one has dropout."""
    flip, crop, rotation, jitter, erasing = lesson.AUGMENTATION
    assert isinstance(rotation, v2.RandomApply) and isinstance(jitter, v2.RandomApply)
    gentle = [flip, crop, *rotation.transforms, *jitter.transforms, erasing]
    assert (rotation.p, jitter.p) == (0.5, 0.3)
    for transforms, padding in [(gentle, 2), (lesson.STRONG_AUGMENTATION, 4)]:
        kinds = "RandomHorizontalFlip RandomCrop RandomRotation ColorJitter RandomErasing".split()
        assert [type(transform).__name__ for transform in transforms] == kinds
        flip, crop, rotation, jitter, erasing = transforms
        assert flip.p == 0.5 and list(crop.size) == [32, 32] and list(crop.padding) == [padding] * 4
        assert list(rotation.degrees) == [-15, 15] and rotation.interpolation.value == "bilinear"
        for light in [jitter.brightness, jitter.contrast, jitter.saturation]:
            assert list(light) == pytest.approx([0.8, 1.2])
        assert list(jitter.hue) == pytest.approx([-0.05, 0.05])
        assert (erasing.p, list(erasing.scale)) == (0.3, [0.02, 0.15])
    recipes = [([], 0.0), (lesson.AUGMENTATION, 0.0), (lesson.STRONG_AUGMENTATION, 0.5)]
    assert lesson.VARIANTS == dict(zip(VARIANTS, recipes, strict=True))


def test_augmented_images_keep_their_order_shape_and_dtype(lesson, photos):
    """Each image is recognized by its shade of red."""
    photos[:, 0] = 3 * torch.arange(64, dtype=torch.uint8).view(-1, 1, 1)
    torch.manual_seed(0)
    result = lesson.augment(photos, lesson.compose(lesson.AUGMENTATION, "cifar10"), 16)
    assert result.shape == photos.shape and result.dtype == torch.uint8
    shades = [image[0].median().item() for image in result]
    assert np.corrcoef(shades, range(64))[0, 1] > 0.9


def test_the_images_of_a_group_are_transformed_alike_and_the_groups_differently(lesson, photos):
    """With --group-size 1, almost every image gets random numbers of its own."""
    transform = lesson.compose(lesson.AUGMENTATION, "cifar10")
    torch.manual_seed(0)
    first, second = lesson.augment(photos, transform, 16), lesson.augment(photos, transform, 16)
    groups = first.split(16)
    assert not torch.equal(first, second), "every batch has other random numbers"
    assert all(torch.equal(group[0], image) for group in groups for image in group)
    assert len(as_a_set(group[0] for group in groups)) == 4
    assert len(as_a_set(lesson.augment(photos, transform, 1))) > 60


def test_photographs_are_mirrored_and_digits_never(lesson):
    """The flip is the first of the transforms."""
    assert lesson.compose(lesson.AUGMENTATION, "cifar10").transforms == lesson.AUGMENTATION
    assert lesson.compose(lesson.AUGMENTATION, "digits").transforms == lesson.AUGMENTATION[1:]


# A run, as the network sees it


@pytest.fixture(scope="module", params=["05", "06"])
def seen(request, lessons, tmp_path_factory):
    """What reaches the network and the optimizer in three epochs on 80 images that pass for photographs."""
    lesson, generator = lessons[request.param], torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (80, 3, 32, 32), dtype=torch.uint8, generator=generator)
    test_images = torch.randint(0, 256, (80, 3, 32, 32), dtype=torch.uint8, generator=generator)
    run = SimpleNamespace(number=request.param, lesson=lesson, inputs=[], epochs=[], groups=set())
    train, val = lesson.split_train_val(images, torch.arange(80) % 10, 42, 80)
    run.train, run.val = (as_a_set(lesson.normalize(part.tensors[0])) for part in [train, val])
    run.test = as_a_set(lesson.normalize(test_images))
    forward, train_one_epoch, augment = lesson.SimpleCNN.forward, lesson.train_one_epoch, lesson.augment

    def load_data(*_, train):
        return images if train else test_images, torch.arange(80) % 10, list("0123456789"), "cifar10"

    def record_inputs(model, x):
        run.inputs.append((model.training, x.clone()))
        return forward(model, x)

    def record_epoch(model, loader, loss_fn, optimizer, device, transform, group_size):
        transforms = transform.transforms if transform else []
        run.epochs.append((optimizer.param_groups[0]["lr"], model.dropout.p, transforms))
        return train_one_epoch(model, loader, loss_fn, optimizer, device, transform, group_size)

    def record_groups(images, transform, group_size):
        run.groups.add(group_size)
        return augment(images, transform, group_size)

    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch, [lesson])
        patch.setattr(lesson, "load_data", load_data)
        patch.setattr(lesson.SimpleCNN, "forward", record_inputs)
        patch.setattr(lesson, "train_one_epoch", record_epoch)
        patch.setattr(lesson, "augment", record_groups)
        output = run_lesson(
            lesson, tmp_path_factory.mktemp("seen"), "--epochs", 3, "--batch-size", 32, "--group-size", 8
        )
    run.rates = [float(rate) for rate in re.findall(r"^Epoch .* lr (\S+)", output, re.MULTILINE)]
    return run


def test_every_variant_trains_with_its_transforms_and_dropout(seen):
    """Photographs may be mirrored, whatever --data was."""
    recipes = seen.lesson.VARIANTS.values() if seen.number == "05" else [(seen.lesson.AUGMENTATION, 0.0)]
    assert [(transforms, p) for _, p, transforms in seen.epochs] == [
        recipe for recipe in recipes for _ in range(3)
    ]
    assert seen.groups == {8}, "--group-size"


def test_the_learning_rate_is_the_warm_up_times_the_cosine(seen):
    """The cosine is multiplied by 1/3 and 2/3 in the first two epochs. The printed learning rate is the one used."""
    used = [rate for rate, *_ in seen.epochs]
    cosine = [0.1 * (1 + math.cos(math.pi * t / 3)) / 2 for t in range(3)]
    expected = [factor * rate for factor, rate in zip([1 / 3, 2 / 3, 1], cosine, strict=True)]
    assert used == pytest.approx(expected * (3 if seen.number == "05" else 1), rel=1e-6)
    assert seen.rates == pytest.approx(used, abs=1e-5)


def test_training_images_look_different_in_every_epoch(seen):
    """Without augmentation, they are the same images in every epoch."""
    batches = [inputs for training, inputs in seen.inputs if training]  # two of every epoch
    epochs = [as_a_set(torch.cat(batches[i : i + 2])) for i in range(0, len(batches), 2)]
    if seen.number == "05":
        assert epochs[:3] == [seen.train] * 3
        epochs = epochs[3:]
    for first, second in zip(epochs, epochs[1:], strict=False):
        assert len(first - seen.train) > 32 and len(first - second) > 32


def test_images_that_the_network_is_measured_on_never_change(seen):
    """After each epoch the validation images, and in the end, for the gaps, training images, or the test images."""
    measured = [as_a_set(inputs) for training, inputs in seen.inputs if not training]
    expected = [seen.val] * 9 + [seen.train] * 3 if seen.number == "05" else [seen.val] * 3 + [seen.test]
    assert measured == expected


# The comparison


def test_gaps_are_those_of_the_best_models_on_at_most_10000_training_images(lesson, monkeypatch, capsys):
    """Training minus validation accuracy. Without augmentation, because on augmented images they look too small."""
    accuracies = {"without_augmentation": 99.0, "with_augmentation": 85.5, "strong_augmentation": 70.0}
    sizes = []

    def load_model(path, device):
        assert path.name == "best_model.pth"
        return accuracies[path.parent.name], {"best_accuracy": 75.0}

    def evaluate(model, loader, device):
        sizes.append(len(loader.dataset))
        return 1.0, model

    monkeypatch.setattr(lesson, "load_model", load_model)
    monkeypatch.setattr(lesson, "evaluate", evaluate)
    images = TensorDataset(torch.zeros(10_001, 1), torch.zeros(10_001))
    gaps = lesson.measure_gaps(SimpleNamespace(device="cpu"), Path("folder"), images)
    output = capsys.readouterr().out
    assert gaps == dict(zip(VARIANTS, [24.0, 10.5, -5.0], strict=True)) and sizes == [10_000] * 3
    assert "on 10,000 training images without augmentation:" in output
    for name, accuracy in accuracies.items():
        words = f"training {accuracy:.2f} %, validation 75.00 %, gap {gaps[name]:5.2f} points"
        assert f"  {name:20} {words}\n" in output


def test_the_picture_shows_the_accuracies_of_all_epochs_and_the_gaps(lesson):
    """A line at 10 points marks what lesson 02 calls a sign of overfitting."""
    histories = {
        "one": [{"Accuracy/val": 60, "Accuracy/train": 90}, {"Accuracy/val": 70, "Accuracy/train": 91}],
        "other": [{"Accuracy/val": 40, "Accuracy/train": 80}, {"Accuracy/val": 50, "Accuracy/train": 81}],
    }
    left, right = lesson.plot_comparison(histories, {"one": 12.5, "other": -1.25}, "some data").axes
    assert {line.get_label(): line.get_xydata().tolist() for line in left.lines} == {
        "one: val": [[1, 60], [2, 70]],
        "one: train": [[1, 90], [2, 91]],
        "other: val": [[1, 40], [2, 50]],
        "other: train": [[1, 80], [2, 81]],
    }
    assert "some data" in left.get_title() and "augmented images" in left.get_title()
    assert [bar.get_width() for bar in right.patches] == [12.5, -1.25]
    labels = [label.get_text() for label in right.get_yticklabels()]
    assert labels == ["one\n12.5 points", "other\n-1.2 points"]
    assert right.lines[0].get_xdata()[0] == 10 and "without augmentation" in right.get_title()


def test_the_picture_shows_an_image_and_four_draws_of_every_transform(lesson, photos):
    """The first six rows have a transform each, the last two the gentle and the strong recipe."""
    torch.manual_seed(1)
    figure, image = lesson.plot_transforms(photos[0], "digits"), photos[0].permute(1, 2, 0).numpy()
    names = [ax.get_title() for ax in figure.axes if ax.get_title()]
    single = "HorizontalFlip Crop Rotation ColorJitter Grayscale Erasing".split()
    assert [name.removeprefix("Random") for name in names] == [*single, *VARIANTS[1:]]
    assert "digits" in figure.get_suptitle() and len(figure.axes) == 5 * len(names)
    for i, name in enumerate(names):
        original, *draws = [ax.images[0].get_array() for ax in figure.axes[5 * i : 5 * i + 5]]
        assert (original == image).all()
        if name == "RandomHorizontalFlip":
            assert all((drawn == image[:, ::-1]).all() for drawn in draws)
        elif name == "RandomGrayscale":
            assert all((drawn[..., 0] == drawn[..., 2]).all() for drawn in draws)
        else:
            assert len({drawn.tobytes() for drawn in [original, *draws]}) > 3, name


@pytest.mark.parametrize(("data", "mirrored"), [("cifar10", True), ("digits", False)])
def test_the_picture_shows_the_recipes_without_a_flip_of_digits(lesson, photos, monkeypatch, data, mirrored):
    """Here every draw would mirror, and the other transforms do nothing."""
    recipe = ([v2.RandomHorizontalFlip(p=1.0), torch.nn.Identity()], 0.0)
    monkeypatch.setattr(lesson, "VARIANTS", {"recipe": recipe})
    drawn = lesson.plot_transforms(photos[0], data).axes[-1].images[0].get_array()
    expected = photos[0].flip(2) if mirrored else photos[0]
    assert (drawn == expected.permute(1, 2, 0).numpy()).all()
