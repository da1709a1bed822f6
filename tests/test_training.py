"""What the training and evaluation loops do, against references worked out here."""

import copy
import math

import pytest
import torch
from conftest import run_lesson
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.usefixtures("no_pictures")
NUMBERS = ["01", "02", "03", "04", "05", "06"]
WITH_VALIDATION = NUMBERS[1:]


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
    inputs = lessons[number].to_input(pixels, "cpu")
    assert inputs.shape == (2, 3, 32, 32) and inputs.dtype == torch.float32
    expected = [(1 - 0.4914) / 0.2470, (0.2 - 0.4822) / 0.2435, -0.4465 / 0.2616]
    assert torch.allclose(inputs[0, :, 5, 6], torch.tensor(expected), atol=1e-5)
    assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_the_constants_are_the_pixel_deviations_not_the_mean_of_the_images(lessons):
    for lesson in lessons.values():
        assert lesson.MEAN.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
        assert lesson.STD.flatten().tolist() == pytest.approx([0.2470, 0.2435, 0.2616])


def test_network_is_three_convolutions_and_two_linear_layers(lessons):
    for lesson in lessons.values():
        kinds = [type(module) for module in lesson.SimpleCNN().modules()]
        assert (
            kinds.count(nn.Conv2d) == 3 and kinds.count(nn.Linear) == 2 and kinds.count(nn.BatchNorm2d) == 3
        )
        assert lesson.SimpleCNN().dropout.p == 0.0
        logits = make(lesson).eval()(torch.randn(4, 3, 32, 32))
        assert logits.shape == (4, 10)
        assert not torch.allclose(logits.sum(dim=1), torch.ones(4)), "logits, not probabilities"


@pytest.mark.parametrize("number", NUMBERS)
def test_training_loss_and_accuracy_are_weighted_by_images(lessons, images, number):
    model, loss_fn = make(lessons[number]), nn.CrossEntropyLoss()
    reference = copy.deepcopy(model).train()
    total, correct = 0.0, 0
    for first, last in [(0, 8), (8, 16), (16, 20)]:
        pixels, labels = images[first:last]
        logits = reference(lessons[number].to_input(pixels, "cpu"))
        total += loss_fn(logits, labels).item() * (last - first)
        correct += (logits.argmax(dim=1) == labels).sum().item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # no learning, so that the reference holds
    loss, accuracy = lessons[number].train_one_epoch(
        model, DataLoader(images, 8), loss_fn, optimizer, "cpu", 1
    )
    assert loss == pytest.approx(total / 20, abs=1e-5) and accuracy == pytest.approx(100 * correct / 20)


@pytest.mark.parametrize("number", WITH_VALIDATION)
def test_evaluation_does_not_depend_on_the_batch_size_and_changes_nothing(lessons, images, number):
    model, loss_fn = make(lessons[number], dropout=0.5), nn.CrossEntropyLoss()
    before = copy.deepcopy(model.state_dict())
    results = [
        lessons[number].evaluate(model, DataLoader(images, size), loss_fn, "cpu") for size in [20, 8, 3]
    ]
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5) == pytest.approx(results[2][0], abs=1e-5)
    assert results[0][1] == pytest.approx(results[1][1]) == pytest.approx(results[2][1])
    logits = model.eval()(lessons[number].to_input(images[:][0], "cpu"))
    assert results[0][0] == pytest.approx(loss_fn(logits, images[:][1]).item(), abs=1e-5)
    assert all(torch.equal(before[name], weights) for name, weights in model.state_dict().items())


@pytest.mark.parametrize("number", WITH_VALIDATION)
def test_modes_and_gradients_are_right_in_every_epoch(lessons, images, number):
    model = make(lessons[number])
    seen = []
    model.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train_loader, val_loader = DataLoader(images, 8), DataLoader(images, 20)
    for _ in range(2):
        lessons[number].run_epoch(model, train_loader, val_loader, nn.CrossEntropyLoss(), optimizer, "cpu", 1)
    assert seen == [(True, True)] * 3 + [(False, False)] + [(True, True)] * 3 + [(False, False)]


def test_01_trains_in_train_mode_after_its_look_at_the_first_loss(lessons, images):
    model = make(lessons["01"]).eval()
    seen = []
    model.register_forward_hook(lambda module, *_: seen.append(module.training))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lessons["01"].train_one_epoch(model, DataLoader(images, 8), nn.CrossEntropyLoss(), optimizer, "cpu", 1)
    assert seen == [True] * 3


@pytest.mark.parametrize("number", NUMBERS)
def test_one_epoch_takes_the_steps_of_plain_sgd(lessons, images, number):
    """Gradients are those of the batch alone, and every batch moves the weights once."""
    model, loss_fn = make(lessons[number]), nn.CrossEntropyLoss()
    reference = copy.deepcopy(model)
    for first, last in [(0, 8), (8, 16), (16, 20)]:
        pixels, labels = images[first:last]
        gradients = torch.autograd.grad(
            loss_fn(reference(lessons[number].to_input(pixels, "cpu")), labels), list(reference.parameters())
        )
        with torch.no_grad():
            for weights, gradient in zip(reference.parameters(), gradients, strict=True):
                weights -= 0.01 * gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lessons[number].train_one_epoch(model, DataLoader(images, 8), loss_fn, optimizer, "cpu", 1)
    for weights, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(weights, expected, atol=1e-6)


@pytest.mark.parametrize("number", NUMBERS)
def test_batches_come_in_a_new_order_every_epoch_by_the_seed_alone(lessons, tmp_path, monkeypatch, number):
    orders = []

    def spy(model, loader, *_):
        orders.append(torch.cat([images.flatten(1).sum(dim=1) for images, _ in loader]).tolist())
        return 1.0, 50.0

    monkeypatch.setattr(lessons[number], "train_one_epoch", spy)
    monkeypatch.setattr(
        torch.optim.lr_scheduler.LRScheduler, "step", lambda self, *_: None
    )  # nothing was trained
    for seed in [1, 1, 2]:
        run_lesson(
            lessons[number], tmp_path / str(len(orders)), "--epochs", 2, "--seed", seed, "--subset", 64
        )
    first, again, other = (orders[i * len(orders) // 3 : (i + 1) * len(orders) // 3] for i in range(3))
    assert first[0] != first[1] and sorted(first[0]) == sorted(first[1])
    assert first == again and first != other


@pytest.mark.parametrize("number", NUMBERS)
def test_the_network_can_learn_64_images_by_heart(lessons, number):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=generator)
    loader = DataLoader(TensorDataset(pixels, torch.arange(64) % 10), 64)
    model = make(lessons[number])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(30):
        loss, accuracy = lessons[number].train_one_epoch(
            model, loader, nn.CrossEntropyLoss(), optimizer, "cpu", 1
        )
    assert accuracy == 100 and loss < 0.1


def test_cross_entropy_on_probabilities_could_not_fall_that_low():
    """The reason why logits go into CrossEntropyLoss: certain and right probabilities still cost 1.461."""
    certain = nn.functional.one_hot(torch.arange(10)).float()
    loss = nn.CrossEntropyLoss()(certain, torch.arange(10)).item()
    assert loss == pytest.approx(math.log(1 + 9 / math.e), abs=1e-4)


@pytest.mark.parametrize("number", NUMBERS)
def test_loss_function_gets_logits(lessons, images, number):
    def check(logits, labels):
        assert not torch.allclose(logits.sum(dim=1), torch.ones(len(logits)), atol=1e-3)
        assert (logits < 0).any()
        return nn.functional.cross_entropy(logits, labels)

    model = make(lessons[number])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lessons[number].train_one_epoch(model, DataLoader(images, 8), check, optimizer, "cpu", 1)


def test_02_modes_are_shown_on_a_copy(lessons, images, capsys):
    model = make(lessons["02"])
    before = copy.deepcopy(model.state_dict())
    lessons["02"].show_modes(model, images[:][0], "cpu")
    assert all(torch.equal(before[name], weights) for name, weights in model.state_dict().items())
    assert model.dropout.p == 0.0


def rows(*figures):
    """Return a history from tuples of training accuracy, validation accuracy, training loss, validation loss."""
    names = ["train_accuracy", "val_accuracy", "train_loss", "val_loss"]
    return [dict(zip(names, row, strict=True)) for row in figures]


def test_02_finds_the_epoch_in_which_overfitting_sets_in(lessons):
    find = lessons["02"].find_overfitting
    assert find(rows((50, 50, 1.5, 1.5), (60, 50, 1.2, 1.4))) == {}, "10 points are not more than 10"
    gap = find(rows((50, 50, 1.5, 1.5), (60.1, 50, 1.2, 1.4), (70, 50, 1.0, 1.3)))
    assert list(gap.values()) == [2] and "10 points" in list(gap)[0]
    rising = [
        (50, 50, 1.5, 1.0),
        (50, 50, 1.4, 1.1),
        (50, 50, 1.3, 1.2),
        (50, 50, 1.2, 1.3),
        (50, 50, 1.1, 1.4),
    ]
    assert list(find(rows(*rising)).values()) == [4]
    assert find(rows(*rising[:3])) == {}, "risen for 2 epochs only"
    rising[2] = (50, 50, 1.45, 1.2)
    assert find(rows(*rising[:4])) == {}, "the training loss rose as well"
    assert find(rows(*[(50, 50, 1.0, 1.0)] * 9)) == {}, "level is not rising"


@pytest.mark.parametrize("number", NUMBERS)
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
    for batch_size in [20, 2]:
        reads.clear()
        lessons[number].train_one_epoch(model, DataLoader(images, batch_size), loss_fn, optimizer, "cpu", 1)
        if number != "01":
            lessons[number].evaluate(model, DataLoader(images, batch_size), loss_fn, "cpu")
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("number", NUMBERS)
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
    monkeypatch.setattr(lesson, "existing_device", torch.device)
    monkeypatch.setattr(lesson.SimpleCNN, "to", to)
    with pytest.raises(GoesToDevice):
        run_lesson(lesson, tmp_path, "--device", device)
    assert pinned == [device == "cuda"] * (1 if number == "01" else 2)
