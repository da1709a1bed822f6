"""src/benchmarks/: every figure is of what its name says, and what is measured is the lessons' own training."""

import contextlib
import io
import json
import platform
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import augmentation_cost
import common
import group_size
import numpy as np
import pytest
import results
import tables
import throughput
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.tensorboard import SummaryWriter

CPU = torch.device("cpu")
IMAGES = torch.randint(256, (200, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(200) % 10
TASKS = ["lesson", "lesson, augmented", "ceiling: ready-made batches", "usual way", "usual way, 2 workers"]
TASKS += ["usual way, pooling last", "usual way, augmented", "usual way, augmented, 2 workers"]
PIL_AUGMENTED = [*throughput.PIL_AUGMENTATION, *throughput.TO_TENSOR, *throughput.ERASING]
MACHINE = {"processor": "Abacus", "cores": 7, "instructions": "BEADS", "threads": 3, "system": "Wood"}
MACHINE |= {"python": "3.1", "torch": "4.1", "torchvision": "5.9"}
MACHINE_IN_WORDS = "Abacus, 7 cores, BEADS, Wood, Python 3.1, torch 4.1, torchvision 5.9"


def figures(median, least, greatest):
    """Return three figures as the benchmarks write them."""
    return {"median": median, "min": least, "max": greatest}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


# What the benchmarks share


def test_tasks_are_timed_in_turn_and_the_first_round_does_not_count(monkeypatch):
    durations = {"one": [100.0, 1.0, 2.0], "other": [200.0, 3.0, 5.0]}
    clock, calls = [0.0], []

    def work(name):
        clock[0] += durations[name][calls.count(name)]
        calls.append(name)

    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    seconds = common.measure({"one": lambda: work("one"), "other": lambda: work("other")}, rounds=2)
    assert calls == ["one", "other"] * 3
    assert {name: values.tolist() for name, values in seconds.items()} == {"one": [1, 2], "other": [3, 5]}


def test_a_spread_is_median_least_and_greatest():
    assert common.spread(np.array([9.0, 1.0, 2.0])) == figures(2, 1, 9)
    assert common.in_words(figures(2345.678, 0.5, 1e6), 1) == "2,345.7 (0.5 to 1,000,000.0)"


def test_the_machine_is_this_one():
    machine = common.describe_machine()
    assert machine.keys() == MACHINE.keys()
    assert machine["torch"] == torch.__version__.split("+")[0]
    assert machine["threads"] == torch.get_num_threads()
    assert (machine["system"], machine["python"]) == (platform.system(), platform.python_version())
    assert common.machine_in_words(MACHINE) == MACHINE_IN_WORDS


# throughput.py: what is timed


@pytest.fixture
def spy(lessons, monkeypatch):
    """Let throughput.py note what its tasks do, in place of doing it, and in one process.

    .epochs: the lesson's number and the arguments of every call of a lesson's train_one_epoch();
    .steps: the arguments of every call of train_step(); .loaders: the DataLoaders that were gone through.
    """
    spy = SimpleNamespace(epochs=[], steps=[], loaders=[])

    class Loader(DataLoader):
        def __init__(self, dataset, batch_size, **options):
            super().__init__(dataset, batch_size, shuffle=options["shuffle"])
            self.options = options  # with the number of workers, which are not started here

        def __iter__(self):
            spy.loaders.append(self)
            return super().__iter__()

    def note_epochs(number):
        stand_in = lambda *args: spy.epochs.append((number, *args))  # noqa: E731
        monkeypatch.setattr(lessons[number], "train_one_epoch", stand_in)

    note_epochs("02")
    note_epochs("05")
    monkeypatch.setattr(lessons["05"], "make_augmentation", lambda *args: ("augment", *args))
    monkeypatch.setattr(throughput, "load_lesson", lessons.get)
    monkeypatch.setattr(throughput, "DataLoader", Loader)
    monkeypatch.setattr(throughput, "train_step", lambda *args: spy.steps.append(args))
    return spy


def assert_new_training(lesson, model, loss_fn, optimizer):
    """The network is the lesson's, as it is made there, and the optimizer moves its weights."""
    assert type(model) is lesson.SimpleCNN and model.training and model.dropout.p == 0
    assert model.conv2.weight.is_contiguous(), "no lesson converts its network to channels-last"
    assert type(loss_fn) is nn.CrossEntropyLoss and type(optimizer) is torch.optim.SGD
    [group] = optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (0.02, 0.9)
    assert all(one is other for one, other in zip(group["params"], model.parameters(), strict=True))


@pytest.mark.parametrize("name, number", [("lesson", "02"), ("lesson, augmented", "05")])
def test_a_lessons_task_is_its_own_epoch(lessons, spy, name, number):
    throughput.build_tasks(IMAGES, LABELS)[name]()
    [(called, model, loader, loss_fn, optimizer, device, epoch, *augment)] = spy.epochs
    assert called == number and spy.steps == []
    assert_new_training(lessons[number], model, loss_fn, optimizer)
    assert loader.batch_size == 128 and isinstance(loader.sampler, RandomSampler)
    assert loader.options == {"shuffle": True}, "and no workers"
    images, labels = loader.dataset.tensors
    assert torch.equal(images, IMAGES) and torch.equal(labels, LABELS)
    assert (device, epoch) == (CPU, 1)
    group_size = lessons["05"].parse_args(["--device", "cpu"]).group_size
    assert augment == ([("augment", "cifar10", group_size)] if number == "05" else [])


def test_the_ceiling_finds_its_batches_ready(lessons, spy, monkeypatch):
    task = throughput.build_tasks(IMAGES, LABELS)["ceiling: ready-made batches"]
    monkeypatch.setattr(lessons["02"], "to_input", None)  # there is nothing left to prepare
    task()
    assert spy.epochs == spy.loaders == []
    for step, part in zip(spy.steps, [slice(0, 128), slice(128, 200)], strict=True):
        model, loss_fn, optimizer, images, labels = step
        assert_new_training(lessons["02"], model, loss_fn, optimizer)
        expected = lessons["05"].to_input(IMAGES[part], CPU)  # the same in all lessons
        assert torch.equal(images, expected) and images.stride() == expected.stride()
        assert torch.equal(labels, LABELS[part])


@pytest.mark.parametrize(
    "name, transforms, workers, forward",
    [
        ("usual way", throughput.TO_TENSOR, 0, nn.Module.__call__),
        ("usual way, 2 workers", throughput.TO_TENSOR, 2, nn.Module.__call__),
        ("usual way, pooling last", throughput.TO_TENSOR, 0, throughput.pooling_last),
        ("usual way, augmented", PIL_AUGMENTED, 0, nn.Module.__call__),
        ("usual way, augmented, 2 workers", PIL_AUGMENTED, 2, nn.Module.__call__),
    ],
)
def test_a_usual_way_is_what_its_name_says(lessons, spy, name, transforms, workers, forward):
    throughput.build_tasks(IMAGES, LABELS)[name]()
    assert spy.epochs == []
    [loader] = spy.loaders
    assert loader.options == {"shuffle": True, "num_workers": workers, "persistent_workers": workers > 0}
    assert loader.dataset.transform.transforms == transforms
    assert np.array_equal(loader.dataset.images, IMAGES) and loader.dataset.labels == LABELS.tolist()
    for model, loss_fn, optimizer, images, _, called in spy.steps:
        assert_new_training(lessons["02"], model, loss_fn, optimizer)
        assert images.is_contiguous(), "not channels-last"
        assert called is forward
    batches = [labels for *_, labels, _ in spy.steps]
    assert [len(labels) for labels in batches] == [128, 72]
    assert not torch.equal(torch.cat(batches), LABELS), "shuffled"


def test_the_arithmetic_limit_multiplies_matrices(spy, monkeypatch):
    monkeypatch.setattr(throughput, "MATRIX_SIZE", 8)
    monkeypatch.setattr(torch, "randn", torch.ones)
    products = throughput.build_tasks(IMAGES, LABELS)["matrix multiplication"]()
    assert len(products) == throughput.MATRICES_PER_TASK
    assert all(torch.equal(product, torch.full((8, 8), 8.0)) for product in products)


def test_a_step_of_training_follows_the_gradient_of_its_batch_alone():
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    weight = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        images, labels = torch.randn(8, 4), torch.arange(8) % 3
        # The gradient of the mean cross-entropy of x W: (softmax - one-hot)^T x / N
        error = (images @ weight.T).softmax(dim=1) - nn.functional.one_hot(labels, 3)
        weight -= 0.1 * error.T @ images / 8
        throughput.train_step(model, nn.CrossEntropyLoss(), optimizer, images, labels)
    torch.testing.assert_close(model.weight.detach(), weight)
    other = lambda model, images: model(images) * 0  # noqa: E731
    throughput.train_step(model, nn.CrossEntropyLoss(), optimizer, images, labels, other)
    torch.testing.assert_close(
        model.weight.detach(), weight, msg="another forward() gives another gradient, 0"
    )


def test_all_ways_train_on_the_same_numbers(lessons):
    """The usual way's transforms and the lesson's to_input() make the same network input of the same image."""
    transform = throughput.transforms.Compose(throughput.TO_TENSOR)
    dataset = throughput.PILDataset(IMAGES[:4].numpy(), [3, 2, 1, 0], transform)
    assert len(dataset) == 4 and [dataset[i][1] for i in range(4)] == [3, 2, 1, 0]
    usual = torch.stack([dataset[i][0] for i in range(4)])
    torch.testing.assert_close(usual, lessons["02"].to_input(IMAGES[:4], CPU))


def test_the_usual_augmentation_is_that_of_the_lesson(lessons):
    def settings(transforms):
        flip, crop, rotation, apply, erasing = transforms
        [jitter] = apply.transforms
        colours = [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue]
        moves = [flip.p, crop.size, np.max(crop.padding), rotation.degrees, rotation.interpolation]
        return [*moves, apply.p, *map(tuple, colours), erasing.p, erasing.scale, erasing.ratio]

    def names(transforms):
        return [type(transform).__name__ for transform in transforms]

    usual = throughput.PIL_AUGMENTATION + throughput.ERASING
    assert names(usual) == names(lessons["05"].AUGMENTATION)
    assert settings(usual) == settings(lessons["05"].AUGMENTATION)


def test_pooling_last_is_the_same_network_with_the_pooling_last(lessons):
    torch.manual_seed(0)
    model = lessons["02"].SimpleCNN()
    images = torch.randn(4, 3, 32, 32)
    blocks = []
    for conv, bn in [(model.conv1, model.bn1), (model.conv2, model.bn2), (model.conv3, model.bn3)]:
        blocks += [conv, bn, nn.ReLU(), nn.MaxPool2d(2)]
    expected = nn.Sequential(*blocks, nn.Flatten(), model.fc1, nn.ReLU(), model.fc2)(images)
    torch.testing.assert_close(throughput.pooling_last(model, images), expected)
    # In train mode BatchNorm takes mean and variance from other values than in the lesson, ...
    assert not torch.allclose(model(images), expected, atol=0.01)
    # ... and else the order makes no difference: max(), ReLU and a positive factor may change places.
    model.eval()
    torch.testing.assert_close(throughput.pooling_last(model, images), model(images))


def test_operations_are_those_of_the_layers(lessons):
    """A convolution takes 2 operations for each weight and output position, and again for each gradient."""
    conv1, conv2, conv3 = 27 * 32 * 32 * 32, 288 * 64 * 16 * 16, 576 * 128 * 8 * 8
    linear = 2048 * 256 + 256 * 10
    forward = 2 * (conv1 + conv2 + conv3 + linear)
    # Backward: by the weights and by the inputs, but nobody needs the gradient of the images.
    assert throughput.operations_per_image(lessons["02"]) == 3 * forward - 2 * conv1


# throughput.py: what becomes of the times


def test_rates_and_ratios_come_from_the_times(monkeypatch):
    monkeypatch.setattr(throughput, "operations_per_image", lambda lesson: 5e6)
    rounds = np.random.default_rng(0).uniform(1, 9, size=(len(TASKS) + 1, 3))
    seconds = dict(zip([*TASKS, "matrix multiplication"], rounds, strict=True))
    report = throughput.compare(seconds, images=600)

    def of_rounds(values):  # of three numbers; the median is the second
        least, median, greatest = sorted(values)
        return pytest.approx(figures(median, least, greatest))

    assert report["operations_per_image"] == 5e6
    matrix_rates = [10 * 2 * 2048**3 / s for s in seconds["matrix multiplication"]]
    assert report["matrix_operations_per_second"] == of_rounds(matrix_rates)
    assert list(report["images_per_second"]) == list(report["share_of_arithmetic_limit"]) == TASKS
    for name in TASKS:
        assert report["images_per_second"][name] == of_rounds([600 / s for s in seconds[name]])
        pairs = zip(seconds[name], matrix_rates, strict=True)
        shares = [600 * 5e6 / s / matrix_rate for s, matrix_rate in pairs]
        assert report["share_of_arithmetic_limit"][name] == of_rounds(shares)
    ratios = {  # of what takes the time above the line, to what takes the time below it
        "speed: lesson / ceiling": ("ceiling: ready-made batches", "lesson"),
        "speed: lesson / usual way": ("usual way", "lesson"),
        "speed: lesson / usual way, 2 workers": ("usual way, 2 workers", "lesson"),
        "speed: lesson / usual way, pooling last": ("usual way, pooling last", "lesson"),
        "speed, augmented: lesson / usual way": ("usual way, augmented", "lesson, augmented"),
        "speed, augmented: lesson / usual way, 2 workers": (
            "usual way, augmented, 2 workers",
            "lesson, augmented",
        ),
        "time, lesson: augmented / plain": ("lesson, augmented", "lesson"),
        "time, usual way: augmented / plain": ("usual way, augmented", "usual way"),
    }
    assert list(report["ratios"]) == list(ratios)
    for name, (above, below) in ratios.items():
        assert report["ratios"][name] == of_rounds(seconds[above] / seconds[below]), name


REPORT = {
    "machine": MACHINE,
    "data": "random images",
    "rounds": 3,
    "images": 2048,
    "operations_per_image": 50e6,
    "matrix_operations_per_second": figures(200e9, 100e9, 300e9),
    "images_per_second": {
        "lesson": figures(2000, 1900, 2300),
        "ceiling: ready-made batches": figures(2500, 2400, 2550),
        "usual way": figures(1000, 400, 1100),
    },
    "share_of_arithmetic_limit": {
        "lesson": figures(0.5, 0.4, 0.6),
        "ceiling: ready-made batches": figures(0.625, 0.6, 0.65),
        "usual way": figures(0.25, 0.1, 0.28),
    },
    "ratios": {"speed: lesson / usual way": figures(2, 1.75, 5)},
    "time_per_image_by_size": {1000: figures(1, 1, 1), 20_000: figures(0.98, 0.9, 1.2)},
    "peak_memory_bytes": 1_380_000_000,
}


def test_the_report_is_printed_as_it_is(capsys):
    throughput.print_report(REPORT)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "A step of training takes 50.0 million operations for an image. Multiplying 2048x2048 matrices, this "
        "machine does 200 billion a second.",
        "Median (least to greatest) of 3 rounds of 2,048 images in batches of 128:",
        "images/s share of the arithmetic limit",
        "lesson 2,000 (1,900 to 2,300) 0.50 (0.40 to 0.60)",
        "ceiling: ready-made batches 2,500 (2,400 to 2,550) 0.62 (0.60 to 0.65)",
        "usual way 1,000 (400 to 1,100) 0.25 (0.10 to 0.28)",
        "speed: lesson / usual way 2.00 (1.75 to 5.00)",
        "time for an image: of 1,000 / of 1,000 1.00 (1.00 to 1.00)",
        "time for an image: of 20,000 / of 1,000 0.98 (0.90 to 1.20)",
        "Peak memory of this process: 1.38 GB",
    ]


def test_the_bars_are_as_long_as_the_rates(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append((figure, path)))
    throughput.plot_rates(REPORT, tmp_path / "new" / "t.png")
    [(figure, path)] = drawn
    assert path == tmp_path / "new" / "t.png" and path.parent.is_dir()
    [ax] = figure.axes
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["usual way", "ceiling: ready-made batches", "lesson"], "from the bottom to the top"
    bars = [container for container in ax.containers if hasattr(container, "patches")]
    for height, (name, bar) in enumerate(zip(names, bars, strict=True)):
        rate = REPORT["images_per_second"][name]
        [patch] = bar.patches
        assert patch.get_y() + patch.get_height() / 2 == pytest.approx(height)
        assert patch.get_width() == rate["median"]
        [[start, end]] = bar.errorbar.lines[2][0].get_segments()
        assert (start[0], end[0]) == (rate["min"], rate["max"]) and start[1] == end[1] == height
        color = {"lesson": "C0", "ceiling: ready-made batches": "C2"}.get(name, "lightgrey")
        assert patch.get_facecolor() == to_rgba(color)
    [limit] = [line for line in ax.lines if line.get_label() == "arithmetic limit"]
    assert list(limit.get_xdata()) == [4000, 4000]
    assert ax.get_title() == "Training SimpleCNN on Abacus, 3 threads, BEADS"
    assert "images per second" in ax.get_xlabel()


@pytest.fixture
def unmeasured(monkeypatch, tmp_path):
    """A function that runs throughput.py without its work, and returns what was asked of whom, and the report."""

    def run(*flags):
        calls = SimpleNamespace(tasks=None, sizes={}, rounds=[])

        def build_tasks(images, labels):
            calls.tasks = images, labels
            return {"all": None}

        def lesson_task(lesson, images, labels):
            calls.sizes[lesson.LESSON, len(images)] = images, labels

        def measure(tasks, rounds):
            calls.rounds.append(rounds)
            return {size: np.array([float(size), 2.0 * i]) for i, size in enumerate(tasks) if size != "all"}

        monkeypatch.setattr(throughput, "build_tasks", build_tasks)
        monkeypatch.setattr(throughput, "lesson_task", lesson_task)
        monkeypatch.setattr(throughput, "measure", measure)
        compared = {key: REPORT[key] for key in list(REPORT)[4:9]}
        monkeypatch.setattr(throughput, "compare", lambda seconds, images: compared | {"compared": images})
        monkeypatch.setattr(throughput, "plot_rates", lambda report, path: None)
        throughput.main([*flags, "--output-dir", str(tmp_path), "--json", str(tmp_path / "t.json")])
        return calls, read_json(tmp_path / "t.json")

    return run
