"""Lesson 05: training images change at random, validation images never, and the recipe is the promised one.

Lesson 06 trains with the same recipe, so what both do is tested for both. test_04_lr_scheduler.py tests how lesson 05
keeps, resumes and replaces its runs.
"""

import math
import re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from common import load_lesson
from conftest import draw_nothing, resume, run_lesson
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

VARIANTS = ["without_augmentation", "with_augmentation", "strong_augmentation"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
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


def described(transform):
    """Return the type and the parameters of a transform."""
    if isinstance(transform, v2.RandomApply):
        return "RandomApply", transform.p, [described(inner) for inner in transform.transforms]
    names = "p size padding degrees interpolation brightness contrast saturation hue scale".split()
    values = {name: getattr(transform, name, None) for name in names}
    for name in ["size", "padding", "degrees", "brightness", "contrast", "saturation", "hue", "scale"]:
        values[name] = values[name] and pytest.approx(list(values[name]))
    return type(transform).__name__, {name: value for name, value in values.items() if value is not None}


FLIP = ("RandomHorizontalFlip", {"p": 0.5})
ROTATION = "RandomRotation", {"degrees": [-15, 15], "interpolation": v2.InterpolationMode.BILINEAR}
LIGHT = dict.fromkeys(["brightness", "contrast", "saturation"], [0.8, 1.2])
JITTER = ("ColorJitter", LIGHT | {"hue": [-0.05, 0.05]})
ERASING = ("RandomErasing", {"p": 0.3, "scale": [0.02, 0.15]})


def crop(padding):
    return "RandomCrop", {"size": [32, 32], "padding": [padding] * 4}


@pytest.mark.parametrize("number", ["05", "06"])
def test_gentle_augmentation_is_the_promised_list(lessons, number):
    """Rotation and color jitter are applied only sometimes."""
    expected = [
        FLIP,
        crop(2),
        ("RandomApply", 0.5, [ROTATION]),
        ("RandomApply", 0.3, [JITTER]),
        ERASING,
    ]
    assert [described(transform) for transform in lessons[number].AUGMENTATION] == expected


def test_strong_augmentation_is_the_promised_list(lessons):
    """Rotation and color jitter are part of every draw, and the crop moves twice as far."""
    transforms = [described(transform) for transform in lessons["05"].STRONG_AUGMENTATION]
    assert transforms == [FLIP, crop(4), ROTATION, JITTER, ERASING]


def test_the_variants_are_none_gentle_and_strong_with_dropout(lessons):
    """Only the third one has dropout."""
    lesson = lessons["05"]
    gentle, strong = lesson.AUGMENTATION, lesson.STRONG_AUGMENTATION
    assert list(lesson.VARIANTS.items()) == list(
        zip(VARIANTS, [([], 0), (gentle, 0), (strong, 0.5)], strict=True)
    )


def test_augmented_images_keep_their_order_shape_and_dtype(lessons, photos):
    """Each image is recognized by its shade of red."""
    photos[:, 0] = 3 * torch.arange(64, dtype=torch.uint8).view(-1, 1, 1)
    lesson = lessons["05"]
    torch.manual_seed(0)
    result = lesson.augment(photos, lesson.compose(lesson.AUGMENTATION, "cifar10"), 16)
    assert result.shape == photos.shape and result.dtype == torch.uint8
    shades = [image[0].median().item() for image in result]
    assert np.corrcoef(shades, range(64))[0, 1] > 0.9


def test_the_images_of_a_group_are_transformed_alike_and_the_groups_differently(lessons, photos):
    """With --group-size 1, almost every image gets random numbers of its own."""
    lesson = lessons["05"]
    transform = lesson.compose(lesson.AUGMENTATION, "cifar10")
    torch.manual_seed(0)
    first, second = lesson.augment(photos, transform, 16), lesson.augment(photos, transform, 16)
    groups = first.split(16)
    assert not torch.equal(first, second), "every batch has other random numbers"
    assert all(torch.equal(group[0], image) for group in groups for image in group)
    assert len(as_a_set(group[0] for group in groups)) == 4
    assert len(as_a_set(lesson.augment(photos, transform, 1))) > 60


@pytest.mark.parametrize("number", ["05", "06"])
def test_photographs_are_mirrored_in_half_of_the_draws_and_digits_never(lessons, photos, number):
    """The other transforms do nothing here, so that an image is either mirrored or as it was."""
    lesson, nothing = lessons[number], [torch.nn.Identity()] * 4
    for data, expected in [("cifar10", range(16, 49)), ("digits", [0])]:
        torch.manual_seed(0)
        result = lesson.augment(photos, lesson.compose([lesson.AUGMENTATION[0], *nothing], data), 1)
        mirrored, same = (
            (result == images).flatten(1).all(dim=1).sum() for images in [photos.flip(3), photos]
        )
        assert mirrored in expected and mirrored + same == 64


# A run, as the network sees it


@pytest.fixture(scope="module", params=["05", "06"])
def seen(request, tmp_path_factory):
    """What reaches the network, the optimizer and the loss in two epochs on 64 digits, in batches of 32."""
    lesson, folder = load_lesson(request.param), tmp_path_factory.mktemp("seen")
    run = SimpleNamespace(number=request.param, lesson=lesson, folder=folder, inputs=[], epochs=[], groups=[])
    forward, train_one_epoch, augment = lesson.SimpleCNN.forward, lesson.train_one_epoch, lesson.augment

    def record_inputs(model, x):
        run.inputs.append((model.training, x.clone()))
        return forward(model, x)

    def record_epoch(model, loader, loss_fn, optimizer, *rest):
        run.epochs.append((model.dropout.p, loss_fn, dict(optimizer.param_groups[0])))
        return train_one_epoch(model, loader, loss_fn, optimizer, *rest)

    def record_groups(images, transform, group_size):
        run.groups.append(group_size)
        return augment(images, transform, group_size)

    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch, [lesson])
        patch.setattr(lesson.SimpleCNN, "forward", record_inputs)
        patch.setattr(lesson, "train_one_epoch", record_epoch)
        patch.setattr(lesson, "augment", record_groups)
        run_lesson(lesson, folder, "--epochs", 2, "--subset", 64, "--batch-size", 32, "--group-size", 8)
    return run


def test_training_images_look_different_in_every_epoch(seen):
    """Without augmentation, they are the same images in every epoch, in another order."""
    images, labels, *_ = seen.lesson.load_data("digits", seen.folder, train=True)
    plain = as_a_set(seen.lesson.normalize(seen.lesson.split_train_val(images, labels, 42, 64)[0].tensors[0]))
    batches = [inputs for training, inputs in seen.inputs if training]
    epochs = [as_a_set(torch.cat(batches[i : i + 2])) for i in range(0, len(batches), 2)]
    if seen.number == "05":
        assert epochs[0] == epochs[1] == plain
        epochs = epochs[2:]
    for first, second in zip(epochs[::2], epochs[1::2], strict=True):
        assert len(first & plain) < 32 and len(first & second) < 32
        assert len(first - plain) > 32


def test_images_that_the_network_is_measured_on_never_change(seen):
    """Those are validation images, in lesson 05 also training images, and in lesson 06 also test images."""
    lesson = seen.lesson
    images, labels, *_ = lesson.load_data("digits", seen.folder, train=True)
    train, val = (part.tensors[0] for part in lesson.split_train_val(images, labels, 42, 64))
    test, *_ = lesson.load_data("digits", seen.folder, train=False)
    other = train if seen.number == "05" else test[:64]
    measured = [as_a_set(inputs) for training, inputs in seen.inputs if not training]
    assert measured.count(as_a_set(lesson.normalize(val))) == (6 if seen.number == "05" else 2)
    assert measured.count(as_a_set(lesson.normalize(other))) == (3 if seen.number == "05" else 1)
    assert len(measured) == (9 if seen.number == "05" else 3)


def test_the_group_size_flag_reaches_the_augmentation(seen):
    """Two epochs of two batches are augmented, in lesson 05 for two variants."""
    assert seen.groups == [8] * (8 if seen.number == "05" else 4)


def test_label_smoothing_weight_decay_nesterov_and_dropout_are_in_use(seen):
    """Only the variant with strong augmentation has dropout."""
    assert [p for p, *_ in seen.epochs] == ([0, 0, 0, 0, 0.5, 0.5] if seen.number == "05" else [0, 0])
    for _, loss_fn, group in seen.epochs:
        assert loss_fn.label_smoothing == 0.1
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, True)


def test_dropout_acts_in_training_only(lessons):
    """With dropout, two predictions for the same images differ in train mode and agree in eval mode."""
    model, images = lessons["05"].SimpleCNN(10, 0.5), torch.randn(4, 3, 32, 32)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", ["05", "06"])
@pytest.mark.parametrize("data", ["cifar10", "digits"])
def test_a_run_mirrors_photographs_but_no_digits(lessons, photos, tmp_path, monkeypatch, number, data):
    """Here every draw would mirror, and the other transforms do nothing."""
    lesson, trained_on = lessons[number], set()
    transforms, labels = [v2.RandomHorizontalFlip(p=1.0), torch.nn.Identity()], torch.arange(64) % 10
    normalize = lesson.normalize

    def train_one_epoch(model, loader, loss_fn, optimizer, device, transform=None, group_size=1):
        for images, _ in loader if transform else []:
            trained_on.update(as_a_set(normalize(lesson.augment(images, transform, group_size))))
        optimizer.step()  # which the schedulers expect
        return 1.0, 50.0

    monkeypatch.setattr(lesson, "load_data", lambda *_, train: (photos, labels, list("abcdefghij"), data))
    monkeypatch.setattr(lesson, "train_one_epoch", train_one_epoch)
    monkeypatch.setattr(lesson, "AUGMENTATION", transforms)
    if number == "05":
        monkeypatch.setattr(lesson, "VARIANTS", {name: (transforms, 0.0) for name in VARIANTS})
    run_lesson(lesson, tmp_path)
    assert trained_on == as_a_set(normalize(photos[:1].flip(3) if data == "cifar10" else photos[:1]))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", ["05", "06"])
@pytest.mark.parametrize("epochs", [1, 2, 5, 16])
def test_the_learning_rate_is_the_warm_up_times_the_cosine(lessons, tmp_path, monkeypatch, number, epochs):
    """The cosine is multiplied by 1/3 and 2/3 in the first two epochs. The logged learning rate is the one used."""
    lesson, used, logged = lessons[number], [], []

    def train_one_epoch(model, loader, loss_fn, optimizer, *_):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()  # which the schedulers expect
        return 1.0, 50.0

    monkeypatch.setattr(lesson, "train_one_epoch", train_one_epoch)
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (1.0, 50.0))
    monkeypatch.setattr(
        lesson, "log_epoch", lambda writer, epoch, epochs, row: logged.append(row["LearningRate"])
    )
    run_lesson(lesson, tmp_path, "--subset", 16, "--epochs", epochs)
    cosine = [0.1 * (1 + math.cos(math.pi * t / epochs)) / 2 for t in range(epochs)]
    expected = [factor * lr for factor, lr in zip([1 / 3, 2 / 3] + [1] * 14, cosine, strict=False)]
    assert used == pytest.approx(expected * (3 if number == "05" else 1), rel=1e-6) and logged == used


@pytest.mark.usefixtures("no_pictures")
def test_a_resumed_run_keeps_its_group_size(lessons, tmp_path, capsys):
    """Another value is refused with status 2, as are the values of other settings."""
    lesson = lessons["05"]
    run_lesson(lesson, tmp_path, "--subset", 16)
    for flag, value in [("--group-size", 8), ("--epochs", 2), ("--lr", 0.2)]:
        with pytest.raises(SystemExit) as error:
            resume(lesson, tmp_path, flag, value)
        assert error.value.code == 2 and capsys.readouterr().err.endswith(f"leave out {flag}\n")


# The comparison


def test_gaps_are_those_of_the_best_models_on_images_without_augmentation(lessons, tmp_path, capsys):
    """They are the training accuracy of the saved model minus its validation accuracy, computed again here."""
    lesson, expected = lessons["05"], {}
    images = torch.randint(
        0, 256, (90, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(90) % 10
    for i, name in enumerate(VARIANTS):
        torch.manual_seed(i)
        model = lesson.SimpleCNN()
        inputs = lesson.normalize(images)
        model.train()(inputs)  # fills BatchNorm's running averages
        for file, weights in [
            ("best_model", model.state_dict()),
            ("latest_checkpoint", lesson.SimpleCNN().state_dict()),
        ]:
            (tmp_path / name).mkdir(exist_ok=True)
            checkpoint = {"model": weights, "class_names": list("0123456789"), "best_accuracy": 5.0 * i}
            torch.save(checkpoint, tmp_path / name / f"{file}.pth")
        accuracy = 100 * (model.eval()(inputs).argmax(dim=1) == labels).double().mean().item()
        expected[name] = accuracy - 5 * i
    gaps = lesson.measure_gaps(SimpleNamespace(device="cpu"), tmp_path, TensorDataset(images, labels))
    output = capsys.readouterr().out
    assert (
        gaps == pytest.approx(expected, abs=1e-4) and "on 90 training images without augmentation:" in output
    )
    for i, name in enumerate(VARIANTS):
        words = f"training {expected[name] + 5 * i:.2f} %, validation {5 * i:.2f} %, gap {expected[name]:5.2f} points"
        assert f"  {name:20} {words}\n" in output


def test_gaps_are_measured_on_at_most_10000_training_images(lessons, tmp_path, monkeypatch, capsys):
    """That is enough to measure them, and takes a quarter of the time."""
    lesson, sizes = lessons["05"], []
    monkeypatch.setattr(lesson, "load_model", lambda *_: (None, {"best_accuracy": 65.0}))
    monkeypatch.setattr(
        lesson, "evaluate", lambda _, loader, device: (1.0, sizes.append(len(loader.dataset)) or 99.0)
    )
    images = TensorDataset(torch.zeros(10_001, 1), torch.zeros(10_001))
    gaps = lesson.measure_gaps(SimpleNamespace(device="cpu"), tmp_path, images)
    assert sizes == [10_000] * 3 and gaps == dict.fromkeys(VARIANTS, 34.0)
    assert "on 10,000 training images without augmentation" in capsys.readouterr().out


def test_the_picture_shows_the_accuracies_of_all_epochs_and_the_gaps(lessons):
    """A line at 10 points marks what lesson 02 calls a sign of overfitting."""
    histories = {
        "one": [{"Accuracy/val": 60, "Accuracy/train": 90}, {"Accuracy/val": 70, "Accuracy/train": 91}],
        "other": [{"Accuracy/val": 40, "Accuracy/train": 80}, {"Accuracy/val": 50, "Accuracy/train": 81}],
    }
    left, right = lessons["05"].plot_comparison(histories, {"one": 12.5, "other": -1.25}, "some data").axes
    assert {line.get_label(): line.get_xydata().tolist() for line in left.lines} == {
        "one: val": [[1, 60], [2, 70]],
        "one: train": [[1, 90], [2, 91]],
        "other: val": [[1, 40], [2, 50]],
        "other: train": [[1, 80], [2, 81]],
    }
    assert "some data" in left.get_title() and "augmented images" in left.get_title()
    assert [bar.get_width() for bar in right.patches] == [12.5, -1.25]
    assert [label.get_text() for label in right.get_yticklabels()] == [
        "one\n12.5 points",
        "other\n-1.2 points",
    ]
    assert right.lines[0].get_xdata()[0] == 10 and "without augmentation" in right.get_title()


@pytest.mark.parametrize("data", ["cifar10", "digits"])
def test_the_picture_shows_an_image_and_four_draws_of_every_transform(lessons, photos, data):
    """The first six rows have a transform each, the last two the gentle and the strong recipe."""
    torch.manual_seed(1)
    figure, image = lessons["05"].plot_transforms(photos[0], data), photos[0].permute(1, 2, 0).numpy()
    names = [ax.get_title() for ax in figure.axes if ax.get_title()]
    single = "HorizontalFlip Crop Rotation ColorJitter Grayscale Erasing".split()
    assert [re.sub("^Random", "", name) for name in names] == [*single, *VARIANTS[1:]]
    assert data in figure.get_suptitle() and len(figure.axes) == 5 * len(names)
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
def test_the_picture_shows_the_recipes_without_a_flip_of_digits(lessons, photos, monkeypatch, data, mirrored):
    """Here every draw would mirror, and the other transforms do nothing."""
    recipe = ([v2.RandomHorizontalFlip(p=1.0), torch.nn.Identity()], 0.0)
    monkeypatch.setattr(lessons["05"], "VARIANTS", {"recipe": recipe})
    drawn = lessons["05"].plot_transforms(photos[0], data).axes[-1].images[0].get_array()
    expected = photos[0].flip(2) if mirrored else photos[0]
    assert (drawn == expected.permute(1, 2, 0).numpy()).all()
