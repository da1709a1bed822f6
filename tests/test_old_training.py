"""What the training and evaluation loops do, against references worked out here."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from common import read_scalars
from conftest import CPU, run_lesson
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.usefixtures("no_pictures")
NUMBERS = ["07", "08", "09", "10", "11", "12"]
TRAIN = ["08", "10", "11"]  # what differs in the other loops has tests of its own
EVALUATE = ["08", "09", "10", "11"]
ONE_ARM = {"07": ["--precisions", "float32"]}


@pytest.fixture
def images():
    """20 random images uint8 (20, 32, 32, 3) with labels, so that batches of 8 leave a last one of 4."""
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return TensorDataset(pixels, torch.randint(0, 10, (20,), generator=generator))


def make(lesson, dropout=0.0):
    """Return a seeded network of the lesson."""
    torch.manual_seed(0)
    return lesson.SimpleCNN(dropout=dropout)


@pytest.mark.parametrize("number", NUMBERS)
def test_input_is_normalized_and_channels_last(lessons, number):
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    pixels[0, 5, 6] = torch.tensor([255, 51, 0])
    inputs = lessons[number].to_input(pixels, CPU)
    assert inputs.shape == (2, 3, 32, 32) and inputs.dtype == torch.float32
    expected = [(1 - 0.4914) / 0.2470, (0.2 - 0.4822) / 0.2435, -0.4465 / 0.2616]
    assert torch.allclose(inputs[0, :, 5, 6], torch.tensor(expected), atol=1e-5)
    assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_the_constants_are_the_pixel_deviations_not_the_mean_of_the_images(lessons):
    for lesson in [lessons[number] for number in NUMBERS]:
        assert lesson.MEAN.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
        assert lesson.STD.flatten().tolist() == pytest.approx([0.2470, 0.2435, 0.2616])


def test_network_is_three_convolutions_and_two_linear_layers(lessons):
    for lesson in [lessons[number] for number in NUMBERS]:
        kinds = [type(module) for module in lesson.SimpleCNN().modules()]
        assert (
            kinds.count(nn.Conv2d) == 3 and kinds.count(nn.Linear) == 2 and kinds.count(nn.BatchNorm2d) == 3
        )
        assert lesson.SimpleCNN().dropout.p == 0.0
        logits = make(lesson).eval()(torch.randn(4, 3, 32, 32))
        assert logits.shape == (4, 10)
        assert not torch.allclose(logits.sum(dim=1), torch.ones(4)), "logits, not probabilities"


@pytest.mark.parametrize("number", TRAIN)
def test_training_loss_and_accuracy_are_weighted_by_images(lessons, images, number):
    model, loss_fn = make(lessons[number]), nn.CrossEntropyLoss()
    reference = copy.deepcopy(model).train()
    total, correct = 0.0, 0
    for first, last in [(0, 8), (8, 16), (16, 20)]:
        pixels, labels = images[first:last]
        logits = reference(lessons[number].to_input(pixels, CPU))
        total += loss_fn(logits, labels).item() * (last - first)
        correct += (logits.argmax(dim=1) == labels).sum().item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # no learning, so that the reference holds
    loss, accuracy = lessons[number].train_one_epoch(model, DataLoader(images, 8), loss_fn, optimizer, CPU, 1)
    assert loss == pytest.approx(total / 20, abs=1e-5) and accuracy == pytest.approx(100 * correct / 20)


@pytest.mark.parametrize("number", EVALUATE)
def test_evaluation_does_not_depend_on_the_batch_size_and_changes_nothing(lessons, images, number):
    model, loss_fn = make(lessons[number], dropout=0.5), nn.CrossEntropyLoss()
    before = copy.deepcopy(model.state_dict())
    results = [lessons[number].evaluate(model, DataLoader(images, size), CPU) for size in [20, 8, 3]]
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5) == pytest.approx(results[2][0], abs=1e-5)
    assert results[0][1] == pytest.approx(results[1][1]) == pytest.approx(results[2][1])
    logits = model.eval()(lessons[number].to_input(images[:][0], CPU))
    assert results[0][0] == pytest.approx(loss_fn(logits, images[:][1]).item(), abs=1e-5)
    assert all(torch.equal(before[name], weights) for name, weights in model.state_dict().items())


@pytest.mark.parametrize("number", ["07", "08", "09", "12"])
def test_modes_and_gradients_are_right_in_every_epoch(lessons, tmp_path, monkeypatch, number):
    """Seen at the network while main() runs: 2 batches of training in train mode, 1 of validation in eval mode."""
    seen, forward = [], lessons[number].SimpleCNN.forward

    def spy(self, x):
        seen.append((len(x), self.training, torch.is_grad_enabled()))
        return forward(self, x)

    monkeypatch.setattr(lessons[number].SimpleCNN, "forward", spy)
    arms = ONE_ARM.get(number, [])
    run_lesson(lessons[number], tmp_path, "--epochs", 2, "--subset", 48, "--batch-size", 32, *arms)
    epoch = [(32, True, True), (16, True, True)] + [(48, False, False)]
    assert seen[: 2 * len(epoch)] == epoch * 2


@pytest.mark.parametrize("number", TRAIN)
def test_one_epoch_takes_the_steps_of_plain_sgd(lessons, images, number):
    """Gradients are those of the batch alone, and every batch moves the weights once."""
    model, loss_fn = make(lessons[number]), nn.CrossEntropyLoss()
    reference = copy.deepcopy(model)
    for first, last in [(0, 8), (8, 16), (16, 20)]:
        pixels, labels = images[first:last]
        gradients = torch.autograd.grad(
            loss_fn(reference(lessons[number].to_input(pixels, CPU)), labels), list(reference.parameters())
        )
        with torch.no_grad():
            for weights, gradient in zip(reference.parameters(), gradients, strict=True):
                weights -= 0.01 * gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lessons[number].train_one_epoch(model, DataLoader(images, 8), loss_fn, optimizer, CPU, 1)
    for weights, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(weights, expected, atol=1e-6)


@pytest.mark.parametrize("number", ["07", "08", "11", "12"])
def test_batches_come_in_a_new_order_every_epoch_by_the_seed_alone(lessons, tmp_path, monkeypatch, number):
    orders = []

    def spy(model, loader, *_):
        torch.seed()  # all other random numbers: they change no order
        orders.append(torch.cat([images.flatten(1).sum(dim=1) for images, _ in loader]).tolist())
        return 1.0, 50.0

    monkeypatch.setattr(lessons[number], "train_one_epoch", spy)
    monkeypatch.setattr(
        torch.optim.lr_scheduler.LRScheduler, "step", lambda self, *_: None
    )  # nothing was trained
    arms = ONE_ARM.get(number, [])
    for seed in [1, 1, 2]:
        folder = tmp_path / str(len(orders))
        run_lesson(lessons[number], folder, "--epochs", 2, "--seed", seed, "--subset", 64, *arms)
    first, again, other = (orders[i * len(orders) // 3 : (i + 1) * len(orders) // 3] for i in range(3))
    assert first[0] != first[1] and sorted(first[0]) == sorted(first[1])
    assert first == again and first != other


@pytest.mark.parametrize("number", ["08"])
def test_the_network_can_learn_64_images_by_heart(lessons, number):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=generator)
    loader = DataLoader(TensorDataset(pixels, torch.arange(64) % 10), 64)
    model = make(lessons[number])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(30):
        loss, accuracy = lessons[number].train_one_epoch(
            model, loader, nn.CrossEntropyLoss(), optimizer, CPU, 1
        )
    assert accuracy == 100 and loss < 0.1


@pytest.mark.parametrize("number", TRAIN)
def test_loss_function_gets_logits(lessons, images, number):
    def check(logits, labels):
        assert not torch.allclose(logits.sum(dim=1), torch.ones(len(logits)), atol=1e-3)
        assert (logits < 0).any()
        return nn.functional.cross_entropy(logits, labels)

    model = make(lessons[number])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lessons[number].train_one_epoch(model, DataLoader(images, 8), check, optimizer, CPU, 1)


@pytest.mark.parametrize("number", TRAIN)
def test_nothing_in_the_loops_waits_for_a_gpu(lessons, images, number, monkeypatch):
    """Reading a number from a tensor waits until a GPU is done, so it happens once an epoch and not once a batch."""
    reads = []
    for name in ["item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"]:
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda *args, _original=original, **kw: reads.append(1) or _original(*args, **kw),
        )
    model, loss_fn = make(lessons[number]), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counts = []
    for batch_size in [5, 1]:  # 4 batches, and 20
        reads.clear()
        lessons[number].train_one_epoch(model, DataLoader(images, batch_size), loss_fn, optimizer, CPU, 1)
        lessons[number].evaluate(model, DataLoader(images, batch_size), CPU)
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("number", ["08", "09", "10"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_come_from_pinned_memory_for_cuda_only(lessons, number, device, monkeypatch, tmp_path):
    """The loaders are made before the model goes to the device, so no GPU is needed to look at them."""
    lesson, pinned = lessons[number], []

    class GoesToDevice(Exception):
        pass

    class Loader(DataLoader):
        def __init__(self, *args, pin_memory=False, **kwargs):
            pinned.append(pin_memory)
            super().__init__(*args, **kwargs)

    def to(self, *args, **kwargs):
        raise GoesToDevice

    monkeypatch.setattr(lesson, "DataLoader", Loader)
    parse_args = lesson.parse_args

    def parse(*args):  # a device that this machine need not have
        parsed = parse_args(*args)
        parsed.device = torch.device(device)
        return parsed

    monkeypatch.setattr(lesson, "parse_args", parse)
    monkeypatch.setattr(lesson.SimpleCNN, "to", to)
    with pytest.raises(GoesToDevice):
        run_lesson(lesson, tmp_path)
    assert pinned[-2:] == [device == "cuda"] * 2 and len(pinned) == (3 if number == "10" else 2)


class Anywhere(torch.Tensor):
    """A tensor that goes to any device by staying here, and notes how it was asked to."""

    asked = []

    def to(self, device, non_blocking=False):
        Anywhere.asked.append(non_blocking)
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_a_macs_gpu_gets_contiguous_images_and_only_cuda_copies_that_nobody_waits_for(
    lessons, monkeypatch, number, kind
):
    """A stand-in takes the place of the device."""
    lesson = lessons[number]
    for constant in ["MEAN", "STD"]:
        monkeypatch.setattr(lesson, constant, getattr(lesson, constant).as_subclass(Anywhere))
    monkeypatch.setattr(Anywhere, "asked", [])
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8).as_subclass(Anywhere)
    inputs = lesson.to_input(images, SimpleNamespace(type=kind))
    assert inputs.is_contiguous() == (kind == "mps")
    assert inputs.is_contiguous(memory_format=torch.channels_last) == (kind != "mps")
    assert Anywhere.asked == [kind == "cuda"] * 3


@pytest.mark.parametrize("number", ["07", "08", "12"])
def test_main_trains_by_the_flags(lessons, tmp_path, monkeypatch, number):
    """Batch size, rate, momentum, epochs and the network's size, as the optimizer and the loader see them."""
    lesson, seen = lessons[number], []
    train_one_epoch = lesson.train_one_epoch

    def spy(model, loader, loss_fn, optimizer, device, *args):
        group = optimizer.param_groups[0]
        seen.append((loader.batch_size, len(loader.dataset), group["lr"], group["momentum"], device, loss_fn))
        assert {id(p) for p in model.parameters()} == {id(p) for p in group["params"]}
        return train_one_epoch(model, loader, loss_fn, optimizer, device, *args)

    monkeypatch.setattr(lesson, "train_one_epoch", spy)
    arms = ONE_ARM.get(number, [])
    run_lesson(lesson, tmp_path, "--epochs", 1, "--batch-size", 24, "--lr", 0.03, "--subset", 40, *arms)
    assert len(seen) == 1
    for batch_size, images, lr, momentum, device, loss_fn in seen:
        assert (batch_size, images, lr, momentum, device) == (24, 40, 0.03, 0.9, CPU)
        assert isinstance(loss_fn, nn.CrossEntropyLoss) and loss_fn.label_smoothing == 0


@pytest.mark.parametrize("number", ["07", "08", "12"])
def test_printed_and_written_validation_figures_are_those_of_the_validation_images(
    lessons, tmp_path, monkeypatch, number
):
    """Loss and accuracy are worked out again, from the network as it is after each epoch, on the split's images.

    The loss is the plain cross-entropy in every lesson, so that it compares with those of all others.
    """
    lesson, expected = lessons[number], []
    train_one_epoch = lesson.train_one_epoch
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))
    chosen = order[len(order) * 4 // 5 :][:70]

    def spy(model, *args):
        result = train_one_epoch(model, *args)
        reference = copy.deepcopy(getattr(model, "module", model)).eval()  # lesson 12 wraps it
        with torch.no_grad():
            logits = reference(lesson.to_input(images[chosen], CPU))
        loss = nn.functional.cross_entropy(logits, labels[chosen]).item()
        accuracy = 100 * (logits.argmax(dim=1) == labels[chosen]).double().mean().item()
        expected.append((*result, loss, accuracy))
        return result

    monkeypatch.setattr(lesson, "train_one_epoch", spy)
    arms = ONE_ARM.get(number, [])
    output = run_lesson(lesson, tmp_path, "--epochs", 2, "--subset", 70, "--seed", 3, "--lr", 0.1, *arms)
    printed = re.findall(
        r"^Epoch .*train loss ([\d.]+), acc +([\d.]+) % \| val loss ([\d.]+), acc +([\d.]+) %"
        r" \| (?:lr [\d.]+|[\d,]+ images/s) \| \d+ s$",
        output,
        flags=re.MULTILINE,
    )
    # Lesson 07 begins a file for each epoch.
    curves = [read_scalars(folder) for folder in {events.parent for events in tmp_path.rglob("events*")}]
    curves = [curve for curve in curves if "Loss/val" in curve]
    assert len(printed) == len(expected) == 2 * len(curves) > 0
    for i, (row, figures) in enumerate(zip(printed, expected, strict=True)):
        assert [float(value) for value in row[:4]] == pytest.approx(figures, abs=0.00501)
        curve = curves[i // 2]
        for name, value in zip(
            ["Loss/train", "Accuracy/train", "Loss/val", "Accuracy/val"], figures, strict=True
        ):
            assert curve[name][i % 2] == (i % 2 + 1, pytest.approx(value, rel=1e-5)), name
        gap = curve["Overfitting/accuracy_gap"][i % 2][1]
        assert gap == pytest.approx(figures[1] - figures[3], abs=1e-4)
    assert len({round(figures[2], 6) for figures in expected}) == len(expected), "first, last and best differ"
