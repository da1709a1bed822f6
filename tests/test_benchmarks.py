"""src/benchmarks/: every figure is of what its name says, and of the lessons' own training."""

import json
import platform
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import augmentation_cost
import common
import group_size
import mistakes
import numpy as np
import processes
import pytest
import recipes
import results
import tables
import throughput
import time_to_accuracy
import torch
from conftest import PATHS
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.tensorboard import SummaryWriter

CLIPPINGS = ["none", "norm", "value"]

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


def test_a_median_is_of_what_was_reached():
    assert common.median_and_each([1.0, 3.24, 2.0]) == "2.0 (1.0, 3.2, 2.0)"
    assert common.median_and_each([4.0, None, 5.0]) == "5.0 (4.0, -, 5.0)", "the third takes longer than both"
    assert common.median_and_each([None, 4.0, None]) == "- (-, 4.0, -)"


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

    def note_epoch(number, *args):
        spy.epochs.append((number, *args))

    for number in ["02", "05"]:
        monkeypatch.setattr(lessons[number], "train_one_epoch", partial(note_epoch, number))
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

    def no_gradient(model, images):
        return model(images) * 0

    throughput.train_step(model, nn.CrossEntropyLoss(), optimizer, images, labels, no_gradient)
    torch.testing.assert_close(model.weight.detach(), weight)


def test_all_ways_train_on_the_same_numbers(lessons):
    """The usual way's transforms and the lesson's to_input() make the same input of the same image."""
    transform = throughput.transforms.Compose(throughput.TO_TENSOR)
    dataset = throughput.PILDataset(IMAGES[:4].numpy(), [3, 2, 1, 0], transform)
    assert len(dataset) == 4 and [dataset[i][1] for i in range(4)] == [3, 2, 1, 0]
    usual = torch.stack([dataset[i][0] for i in range(4)])
    torch.testing.assert_close(usual, lessons["02"].to_input(IMAGES[:4], CPU))


def test_the_usual_augmentation_is_that_of_the_lesson(lessons):
    def settings(transforms):
        flip, crop, turn, apply, erasing = transforms
        [jitter], [rotation] = apply.transforms, turn.transforms
        colours = [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue]
        moves = [flip.p, crop.size, np.max(crop.padding), rotation.degrees, rotation.interpolation]
        return [*moves, turn.p, apply.p, *map(tuple, colours), erasing.p, erasing.scale, erasing.ratio]

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
    ratios = {  # name: (whose time is above the line, whose is below it); half the time is twice the speed
        "speed: lesson / ceiling": ("ceiling: ready-made batches", "lesson"),
        "speed: lesson / usual way": ("usual way", "lesson"),
        "speed: lesson / usual way, 2 workers": ("usual way, 2 workers", "lesson"),
        "speed: lesson / usual way, pooling last": ("usual way, pooling last", "lesson"),
        "speed, augmented: lesson / usual way": ("usual way, augmented", "lesson, augmented"),
        "speed, augmented: lesson / usual way, 2 workers": (TASKS[-1], "lesson, augmented"),
        "time, lesson: augmented / plain": ("lesson, augmented", "lesson"),
        "time, usual way: augmented / plain": ("usual way, augmented", "usual way"),
    }
    assert list(report["ratios"]) == list(ratios)
    for name, (above, below) in ratios.items():
        assert report["ratios"][name] == of_rounds(seconds[above] / seconds[below]), name


COMPARED = {
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
}
REPORT = {"machine": MACHINE, "data": "random images", "rounds": 3, "images": 2048, **COMPARED}
REPORT["time_per_image_by_size"] = {1000: figures(1, 1, 1), 20_000: figures(0.98, 0.9, 1.2)}
REPORT["peak_memory_bytes"] = 1_380_000_000


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


@pytest.mark.parametrize("count", [50, 90])  # fewer than the largest size, and more
def test_throughput_times_the_images_rounds_and_sizes_it_is_told(monkeypatch, tmp_path, count):
    asked = []

    def cifar10(folder, train):
        asked.append(("data", folder, train))
        return SimpleNamespace(data=IMAGES.numpy(), targets=LABELS.tolist())

    def build_tasks(images, labels):
        asked.append(("all", images, labels))
        return {"all": None}

    def lesson_task(lesson, images, labels):
        asked.append((lesson.LESSON, images, labels))

    def measure(tasks, rounds):
        asked.append(("rounds", list(tasks), rounds))
        return {"all": "seconds"} if "all" in tasks else {20: np.array([1.0, 2.0]), 80: np.array([8.0, 4.0])}

    def compare(seconds, images):
        asked.append(("compare", seconds, images))
        return COMPARED

    for stand_in in [build_tasks, lesson_task, measure, compare]:
        monkeypatch.setattr(throughput, stand_in.__name__, stand_in)
    monkeypatch.setattr(throughput, "CIFAR10", cifar10)
    monkeypatch.setattr(throughput, "plot_rates", lambda report, path: asked.append(("plot", report, path)))
    flags = ["--data-dir", "photos", "--rounds", "7", "--images", str(count), "--sizes", "20", "80"]
    throughput.main([*flags, "--output-dir", str(tmp_path), "--json", str(tmp_path / "t.json")])

    data, everything, rounds, compared, small, large, rounds_by_size, plot = asked
    assert data == ("data", Path("photos"), True)
    for (name, images, labels), expected, length in [
        (everything, "all", count),
        (small, "02_with_validation", 20),
        (large, "02_with_validation", 80),
    ]:
        assert name == expected
        assert torch.equal(images, IMAGES[:length]) and torch.equal(labels, LABELS[:length])
    assert rounds == ("rounds", ["all"], 7) and rounds_by_size == ("rounds", [20, 80], 5)
    assert compared == ("compare", {"all": "seconds"}, count)
    report = read_json(tmp_path / "t.json")
    assert (report["data"], report["rounds"], report["images"]) == ("CIFAR-10", 7, count)
    assert report["machine"] == common.describe_machine()
    # An image takes 1/20 s and 2/20 s of 20 images, 8/80 s and 4/80 s of 80: twice and half as long.
    assert report["time_per_image_by_size"] == {"20": figures(1, 1, 1), "80": figures(1.25, 0.5, 2)}
    assert plot[2] == tmp_path / "artifacts" / "throughput.png"
    assert json.loads(json.dumps(plot[1])) == report, "the picture is of the figures that are written"


def test_throughput_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(throughput, "MATRIX_SIZE", 64)
    flags = ["--rounds", "1", "--images", "32", "--sizes", "16", "32"]
    throughput.main([*flags, "--output-dir", str(tmp_path), "--json", str(tmp_path / "t.json")])
    report = read_json(tmp_path / "t.json")
    assert list(report["images_per_second"]) == TASKS and report["data"] == "random images"
    assert all(1 < rate["median"] < 1e6 for rate in report["images_per_second"].values())
    if sys.platform != "win32":
        assert 1e8 < report["peak_memory_bytes"] < 1e10  # bytes, not kilobytes
    output = capsys.readouterr().out
    for name, rate in report["images_per_second"].items():
        assert f"  {name:32} {common.in_words(rate, 0):>24}" in output
    assert (tmp_path / "artifacts" / "throughput.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "flags", [["--rounds", "0"], ["--images", "50001"], ["--sizes", "x"], ["--no-such-flag"]]
)
@pytest.mark.parametrize("benchmark", [throughput, augmentation_cost])
def test_bad_flags_are_refused(benchmark, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(flags)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


# augmentation_cost.py


def test_every_transform_is_timed_in_the_groups_that_its_name_says(lessons, monkeypatch):
    timed = []
    monkeypatch.setattr(augmentation_cost, "load_lesson", lessons.get)
    monkeypatch.setattr(augmentation_cost, "transform_in_groups", lambda *args: timed.append(args))
    tasks = augmentation_cost.build_tasks(IMAGES)
    for task in tasks.values():
        task()
    assert all(images is IMAGES for _, images, _ in timed)
    size = lessons["05"].parse_args(["--device", "cpu"]).group_size
    alone = lessons["05"].TRANSFORMS
    names = [f"{name}, groups of {size}" for name in [*alone, "ColorJitter without hue"]]
    assert list(tasks) == names + [f"all together, groups of {size}" for size in [1, 8, 16, 128]]
    *singles, (without_hue, _, hue_size) = timed[:-4]
    assert [(transform, size) for transform, _, size in singles] == [(one, size) for one in alone.values()]
    jitter = alone["ColorJitter"]
    assert type(without_hue) is type(jitter) and without_hue.hue is None and jitter.hue and hue_size == size
    for name in ["brightness", "contrast", "saturation"]:
        assert getattr(without_hue, name) == getattr(jitter, name)
    together = [(transform.transforms, size) for transform, _, size in timed[-4:]]
    assert together == [(lessons["05"].AUGMENTATION, size) for size in [1, 8, 16, 128]]


def test_a_transform_is_drawn_once_for_every_group():
    groups = []
    augmentation_cost.transform_in_groups(groups.append, IMAGES, 128)
    assert [group.shape for group in groups] == [(128, 3, 32, 32), (72, 3, 32, 32)]
    assert torch.equal(torch.cat(groups).permute(0, 2, 3, 1), IMAGES)


def test_costs_are_printed_and_written_in_ms_for_1000_images(monkeypatch, tmp_path, capsys):
    asked = []

    def measure(tasks, rounds):
        asked.append((tasks, rounds))
        return {"a transform": np.array([0.5, 0.002, 0.003])}

    monkeypatch.setattr(augmentation_cost, "build_tasks", lambda images: images)
    monkeypatch.setattr(augmentation_cost, "measure", measure)
    augmentation_cost.main(["--rounds", "3", "--images", "200", "--json", str(tmp_path / "a.json")])
    [(images, rounds)] = asked
    assert images.shape == (200, 32, 32, 3) and images.dtype == torch.uint8 and rounds == 3
    report = read_json(tmp_path / "a.json")
    # 0.002 s of 200 images are 2 ms of 200, or 10 ms of 1,000.
    assert report.pop("ms_per_1000_images") == {"a transform": pytest.approx(figures(15, 10, 2500))}
    assert report == {"machine": common.describe_machine(), "rounds": 3, "images": 200}
    machine, title, row = capsys.readouterr().out.splitlines()
    assert machine == common.machine_in_words(common.describe_machine())
    assert title == "ms per 1,000 images: median (least to greatest) of 3 rounds of 200 images"
    assert row.split(maxsplit=2) == ["a", "transform", "15.0 (10.0 to 2,500.0)"]


def test_augmentation_cost_runs(capsys):
    augmentation_cost.main(["--rounds", "1", "--images", "16"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 11 and all(" (" in row for row in rows)


# results.py


def write_run(folder, accuracies, gaps, first_epoch=1):
    """Write a TensorBoard run as the lessons do, with these curves."""
    with SummaryWriter(folder, purge_step=first_epoch) as writer:
        for epoch, (accuracy, gap) in enumerate(zip(accuracies, gaps, strict=True), start=first_epoch):
            writer.add_scalar("Accuracy/train", accuracy + gap, epoch)
            writer.add_scalar("Accuracy/val", accuracy, epoch)
            writer.add_scalar("Overfitting/accuracy_gap", gap, epoch)


def run_folder(folder, output=""):
    """Make the output folder of a run, with what the lesson printed."""
    folder.mkdir()
    (folder / "output.txt").write_text(output, encoding="utf-8")
    return folder


def test_results_of_lesson_01_are_its_last_line(tmp_path):
    epochs = (
        "Epoch  1/2 | train loss 1.2095, acc 56.42 % | 20 s\nEpoch  2/2 | train loss 0.9, acc  7.50 % | 9 s\n"
    )
    folder = run_folder(tmp_path / "run", "  batch 1/9  loss 2.3\n" + epochs + "Done: see a.png.\n")
    assert results.collect("01", folder) == {"": {"train_accuracy": 7.5}}


@pytest.mark.parametrize("number", ["02", "03"])
def test_results_are_the_best_accuracy_and_the_last_gap(tmp_path, number):
    folder = run_folder(tmp_path / "run")
    write_run(folder / "tensor_board" / "the_lesson" / "cifar10_run_1", [50, 75, 75, 62.5], [1, 2, 4, 8])
    best = {"val_accuracy": 75, "best_epoch": 2, "epochs": 4, "gap": 8}
    assert results.collect(number, folder) == {"": best}


def test_results_of_a_resumed_run_are_of_all_its_epochs(tmp_path):
    run_dir = run_folder(tmp_path / "run") / "tensor_board" / "03_save_load_model" / "cifar10_run_1"
    write_run(run_dir, [50, 75, 99], [1, 2, 3])  # the third epoch was not saved, and is done again
    write_run(run_dir, [70, 60], [4, 5], first_epoch=3)
    best = {"val_accuracy": 75, "best_epoch": 2, "epochs": 4, "gap": 5}
    assert results.collect("03", tmp_path / "run") == {"": best}


def test_results_of_lesson_04_are_told_apart_by_arm(tmp_path):
    folder = run_folder(tmp_path / "run")
    run_dir = folder / "tensor_board" / "04_lr_scheduler" / "cifar10_run_1"
    write_run(run_dir / "StepLR", [50, 75, 62.5], [1, 2, 4])
    write_run(run_dir / "Constant", [80, 70, 60], [8, 16, 32])
    with SummaryWriter(run_dir) as writer:
        writer.add_image("Comparison/lr_comparison", np.zeros((3, 4, 4)))
    assert results.collect("04", folder) == {
        "StepLR": {"val_accuracy": 75, "best_epoch": 2, "epochs": 3, "gap": 4},
        "Constant": {"val_accuracy": 80, "best_epoch": 1, "epochs": 3, "gap": 32},
    }


def test_gaps_of_lesson_05_are_those_it_prints(tmp_path):
    """They are of the best models and images as they are, the curves of the last epoch and augmented ones."""
    output = """
  with_augmentation              75.00 % in epoch  2
  {0}: training 86.69 %, validation 75.00 %
    gap {1} points: hardly overfits. 665 s of training.
  without_augmentation: training 100.00 %, validation 80.00 %
    gap 20.00 points: overfits. 612 s of training.
"""
    before, after = output.format("with_augmentation", 99), output.format("with_augmentation", -0.25)
    folder = run_folder(tmp_path / "run", before + after)  # stopped while it drew the pictures, and resumed
    run_dir = folder / "tensor_board" / "05_data_augmentation" / "cifar10_run_1"
    write_run(run_dir / "with_augmentation", [50, 75, 62.5], [1, 2, 4])
    write_run(run_dir / "without_augmentation", [80, 70, 60], [8, 16, 32])
    assert results.collect("05", folder) == {
        "with_augmentation": {"val_accuracy": 75, "best_epoch": 2, "epochs": 3, "gap": -0.25},
        "without_augmentation": {"val_accuracy": 80, "best_epoch": 1, "epochs": 3, "gap": 20},
    }


def test_rules_of_lesson_08_are_those_it_prints(lessons, finished, tmp_path):
    output = """
What each rule makes of this training, of at most 6 epochs (0.32 minutes each):
  watches       patience  stops after  brings back  saves         accuracy  loses
  Loss/val             1     epoch  2     epoch  1   1.3 minutes   50.00 %  25.00 points
  Accuracy/val         1     epoch  {}     epoch {:2}   1.0 minutes   75.00 %   0.00 points
  Accuracy/val         3    not in  3     epoch  2   0.0 minutes   75.00 %   0.00 points
"""
    # Stopped while it drew the picture, and resumed: the second table counts.
    folder = run_folder(tmp_path / "run", output.format(2, 1) + output.format(3, 12))
    write_run(folder / "tensor_board" / "08_early_stopping" / "cifar10_run_1", [50, 75, 62.5], [1, 2, 4])
    [arm] = results.collect("08", folder).values()
    assert arm["rules"] == {
        "Loss/val 1": {"stops_after": 2, "brings_back": 1, "saved_epochs": 4, "lost_points": 25},
        "Accuracy/val 1": {"stops_after": 3, "brings_back": 12, "saved_epochs": 3, "lost_points": 0},
        "Accuracy/val 3": {"stops_after": None, "brings_back": 2, "saved_epochs": 0, "lost_points": 0},
    }
    run = finished("08")
    shutil.copytree(run.folder, run_folder(tmp_path / "other", run.output), dirs_exist_ok=True)
    [arm] = results.collect("08", tmp_path / "other").values()
    rules = [f"{curve} {patience}" for curve in lessons["08"].WATCHED for patience in lessons["08"].PATIENCES]
    assert list(arm["rules"]) == rules


def test_results_of_lesson_09_are_of_the_last_epoch(tmp_path):
    folder = run_folder(tmp_path / "run")
    runs = folder / "tensor_board" / "09_gradient_clipping" / "cifar10_run_1"
    write_run(runs / "none_clipping_norm", [50, 75, 62.5], [1, 2, 4])
    arm = {"val_accuracy": 62.5, "best_epoch": 3, "epochs": 3, "gap": 4}
    assert results.collect("09", folder) == {"none_clipping_norm": arm}


def test_results_of_lesson_06_are_in_its_report(tmp_path):
    folder = run_folder(tmp_path / "run")
    run_dir = folder / "tensor_board" / "06_detailed_evaluation" / "cifar10_run_1"
    write_run(run_dir / "training", [50, 75, 62.5], [1, 2, 4])
    with SummaryWriter(run_dir / "evaluation") as writer:
        writer.add_scalar("Test/accuracy", 87.5)
    report = {"accuracy": 0.5, "top_k": {"1": 0.5, "3": 0.75, "5": 0.875}, "mean_confidence": 0.25}
    (folder / "artifacts").mkdir()
    path = folder / "artifacts" / "evaluation_report.json"
    path.write_text(json.dumps(report | {"expected_calibration_error": 0.125}), encoding="utf-8")
    arm = {"val_accuracy": 75, "best_epoch": 2, "epochs": 3, "test_accuracy": 50, "top_3_accuracy": 75}
    assert results.collect("06", folder) == {"": arm | {"mean_confidence": 25, "calibration_error": 12.5}}


CLIPPING_RUNS = {
    danger: [f"{danger} clipping {clipping}".replace(" ", "_").replace(",", "") for clipping in CLIPPINGS]
    for danger in tables.DANGERS
}


@pytest.mark.parametrize("number", ["01", "02", *[f"{n:02}" for n in range(4, 13)]])
def test_the_lessons_print_and_write_what_is_collected(lessons, finished, tmp_path, number):
    run = finished(number)
    folder = run_folder(tmp_path / "run", run.output)
    shutil.copytree(run.folder, folder, dirs_exist_ok=True)
    arms = results.collect(number, folder)
    expected = {"04": list(lessons["04"].SCHEDULERS), "05": list(lessons["05"].ARMS)}
    expected |= {
        "07": ["float32", "bfloat16"],
        "09": [run for runs in CLIPPING_RUNS.values() for run in runs],
        "10": ["pretraining", *[f"{arm}_10" for arm in lessons["10"].ARMS]],
        "11": ["by_file", "by_group"],
    }
    assert sorted(arms) == sorted(expected.get(number, [""]))
    for arm, found in arms.items():
        line = {
            "01": "acc {train_accuracy:5.2f} % | ",
            "02": "Best validation accuracy on digits: {val_accuracy:.2f} % in epoch {best_epoch}.",
            "04": "  {arm:30} {val_accuracy:5.2f} % in epoch  1",
            "05": ", validation {val_accuracy:.2f} %\n    gap {gap:.2f} points",
            "06": "its accuracy {test_accuracy:.1f} %.",
            "07": "  {arm:30} {val_accuracy:5.2f} % in epoch  1",
            "08": "Brought back: epoch {best_epoch} of {epochs}, with {val_accuracy:.2f} % on the validation",
            "09": " {val_accuracy:.2f} %",
            "10": ", acc {val_accuracy:5.2f} % | lr" if arm == "pretraining" else " {val_accuracy:.1f} +- ",
            "11": "  {arm:10} {val_accuracy:9.2f} % {test_accuracy:17.2f} %",
            "12": "Best validation accuracy on digits: {val_accuracy:.2f} % in epoch {best_epoch}.",
        }[number]
        assert line.format(arm=arm, **found) in run.output
    assert results.can_resume(PATHS[number].stem, folder) == (number in ["04", "05", "07", "08", "11", "12"])


STUB = """
import sys
import time
from pathlib import Path
time.sleep(0.2)
with Path(__file__).with_name("calls.txt").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
print("Epoch  5/5 | train loss 0.1234, acc 81.25 % | 9 s")
sys.exit(EXIT)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Run results.py with a launcher that notes its arguments and prints an epoch's line, and no lesson."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "docs" / "results.json")

    def run(*flags, lesson="01", exit_status=0):
        launcher = tmp_path / "stub.py"
        launcher.write_text(STUB.replace("EXIT", str(exit_status)), encoding="utf-8")
        flags = ["--launcher", launcher, "--work-dir", tmp_path / "work", "--lessons", lesson, *flags]
        results.main(list(map(str, flags)))
        return (tmp_path / "calls.txt").read_text(encoding="utf-8").splitlines()

    return run


def test_results_are_kept_and_not_run_again(stub, tmp_path):
    calls = stub("--data-name", "some photographs", "--data-dir", "photos")
    folder = tmp_path / "work" / "01_basic_training_seed_42"
    lesson = common.LESSONS / "01_basic_training.py"
    assert calls == [f"{lesson} --seed 42 --output-dir {folder} --data cifar10 --data-dir photos"]
    [entry] = read_json(results.RESULTS)
    assert 0.2 <= entry.pop("seconds") < 60
    assert 1e7 < (entry.pop("peak_memory_bytes") or 1e8) < 1e11  # bytes, not kilobytes; none on Windows
    arms = {"": {"train_accuracy": 81.25}}
    settled = {"lesson": "01", "seed": 42, "data": "some photographs", "arms": arms}
    assert entry == settled | {"machine": common.describe_machine()}
    assert len(stub()) == 1, "it ran again"
    assert "--seed 43 " in stub("--first-seed", "43", "--untimed")[1]
    entries = [(entry["seed"], entry["seconds"] is None) for entry in read_json(results.RESULTS)]
    assert entries == [(42, False), (43, True)]


def test_a_failed_run_is_no_result(stub):
    with pytest.raises(SystemExit, match="01_basic_training.py failed: see .*output.txt"):
        stub(exit_status=1)
    assert not results.RESULTS.exists()


@pytest.mark.parametrize(
    "lesson, path",
    [
        ("03_save_load_model", "cifar10_run_1/latest_checkpoint.pth"),
        ("04_lr_scheduler", "cifar10_run_1/StepLR/latest_checkpoint.pth"),
        ("05_data_augmentation", "cifar10_run_1/with_augmentation/latest_checkpoint.pth"),
        ("06_detailed_evaluation", "cifar10_run_1_unfinished.pth"),
    ],
)
def test_a_stopped_run_goes_on_from_its_checkpoint_if_it_has_one(stub, monkeypatch, tmp_path, lesson, path):
    folder = tmp_path / "work" / f"{lesson}_seed_42"
    checkpoint = folder / "artifacts" / "checkpoints" / lesson / path
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    (folder / "output.txt").write_text("before it was stopped\n", encoding="utf-8")
    monkeypatch.setattr(results, "SEEDS", {lesson[:2]: 1})
    monkeypatch.setattr(results, "collect", lambda number, folder: {"": {"collected": [number, folder.name]}})
    [call] = stub(lesson=lesson[:2])
    [entry] = read_json(results.RESULTS)
    assert entry["arms"] == {"": {"collected": [lesson[:2], folder.name]}}
    output = (folder / "output.txt").read_text(encoding="utf-8")
    if lesson.startswith("06"):
        assert not call.endswith(" --resume") and not checkpoint.exists(), "it starts anew"
        assert entry["seconds"] and not output.startswith("before it was stopped")
    else:
        assert call.endswith(" --resume") and checkpoint.exists()
        assert entry["seconds"] is None, "only a part of it was timed"
        assert output.startswith("before it was stopped\nEpoch")


def test_every_lesson_runs_once_before_any_runs_again(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.json")
    runs, kept = [], []

    def run(number, seed, args):
        runs.append((number, seed))
        kept.append(len(results.load_results()))
        return {"lesson": number, "seed": seed}

    monkeypatch.setattr(results, "run", run)
    results.main(["--lessons", "05", "01", "02", "--first-seed", "7"])
    assert runs == [("05", 7), ("01", 7), ("02", 7), ("05", 8), ("02", 8), ("05", 9), ("02", 9)]
    assert kept == [0, 1, 2, 3, 4, 5, 6], "every run is kept at once"
    found = [(entry["lesson"], entry["seed"]) for entry in read_json(tmp_path / "results.json")]
    assert found == sorted(runs)


# tables.py


def entry(number, seed, seconds=60.0, memory=1.5e9, **arms):
    """An entry as in docs/results.json. arms: {arm: (validation accuracy, gap)}."""
    arms = {arm: {"val_accuracy": accuracy, "gap": gap} for arm, (accuracy, gap) in arms.items()}
    found = {"lesson": number, "seed": seed, "seconds": seconds, "peak_memory_bytes": memory, "arms": arms}
    return found | {"machine": MACHINE, "data": "random images"}


def test_the_table_of_clipping_has_a_row_for_every_danger(lessons):
    """Mean and deviation over the seeds; without entries, three dots."""
    assert tables.DANGERS == list(lessons["09"].DANGERS) and CLIPPINGS == lessons["09"].CLIPPINGS
    found = []
    for seed, shift in [(42, -1.0), (43, 0.0), (44, 1.0)]:
        arms = {
            run: (10.0 * row + 3 * column + shift, 0.0)
            for row, runs in enumerate(CLIPPING_RUNS.values())
            for column, run in enumerate(runs)
        }
        found.append(entry("09", seed, **arms))
    lines = tables.clipping_table(found, tables.words("en")).splitlines()
    assert lines[0] == "| danger | no clipping | norm clipped | values clipped |"
    for row, (danger, line) in enumerate(zip(tables.DANGERS, lines[2:], strict=True)):
        cells = " | ".join(f"{10.0 * row + 3 * column:.1f} ± 1.0" for column in range(3))
        assert line == f"| {danger} | {cells} |"
    assert tables.clipping_table([], tables.words("en")) == "..."
    headline = tables.headline(found, tables.words("en"))
    assert headline == "23.0 ± 1.0 % on validation images, images x 255, norm clipped", (
        "not the best: the point"
    )
    chinese = tables.clipping_table(found, tables.words("zh"))
    assert "| 异常情况 | 不裁剪 |" in chinese and "| 学习率 x 4 |" in chinese


ENTRIES = [  # not in order: the tables sort them
    entry("02", 44, None, 1.25e9, **{"": (76.0, 24.0)}),
    entry("02", 42, 50.0, 1.5e9, **{"": (74.0, 20.0)}),
    entry("02", 43, 99.0, 1.0e9, **{"": (75.0, 22.0)}),
    entry("04", 42, 700.0, worse=(70.0, 1.0), tie=(79.0, 2.0), steady=(80.0, 9.0)),
    entry("04", 43, 860.0, worse=(71.0, 1.0), tie=(81.5, 4.0), steady=(80.0, 9.0)),
    entry("04", 44, 900.0, worse=(72.0, 1.0), tie=(79.0, 6.0), steady=(80.0, 9.0)),
    entry("01", 42, None, None) | {"arms": {"": {"train_accuracy": 86.33}}},
    entry("06", 42, 100.0) | {"arms": {"": {"val_accuracy": 82.0, "test_accuracy": 81.5}}},
]


def cells(text):
    """Return the rows of a Markdown table as lists of cells, without the line under the header."""
    lines = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in text.splitlines()]
    assert set(text.splitlines()[1]) == {"|", "-"} and len({len(row) for row in lines[:1] + lines[2:]}) == 1
    return lines[:1] + lines[2:]


def test_table_of_runs():
    assert cells(tables.runs_table(ENTRIES, tables.words("en"))) == [
        ["lesson", "accuracy", "gap", "time", "peak memory", "seeds"],
        ["01", "86.3 % on training images", "-", "-", "-", "42"],
        # The times are 50 and 99 s, and one unknown; the memory is the largest of the three.
        ["02", "75.0 ± 1.0 % on validation images", "22.0 ± 2.0", "74 s", "1.50 GB", "42, 43, 44"],
        ["04", "80.0 ± 0.0 % on validation images, steady", "-", "14 min", "1.50 GB", "42, 43, 44"],
        ["06", "81.5 % on test images", "-", "2 min", "1.50 GB", "42"],
    ]


def test_table_of_arms_calls_a_difference_inside_its_spread_a_tie():
    assert cells(tables.arms_table(ENTRIES, "04", tables.words("en"))) == [
        ["schedule", "validation accuracy", "gap", "behind the first"],
        ["`steady`", "80.00 ± 0.00", "9.0 ± 0.0", ""],
        ["`tie`", "79.83 ± 1.44", "4.0 ± 2.0", "0.17 ± 1.44 (a tie)"],  # behind by 1, -1.5 and 1
        ["`worse`", "71.00 ± 1.00", "1.0 ± 0.0", "9.00 ± 1.00"],
    ]
    assert tables.arms_table(ENTRIES, "05", tables.words("en")) == "...", "not measured yet"


def test_table_of_arms_compares_seed_by_seed():
    """Both arms change by 5 points from seed to seed, but one of them is ahead by 1 point in each."""
    found = [entry("05", 1, first=(70.0, 1.0), second=(69.0, 1.0))]
    found += [entry("05", 2, second=(74.0, 1.0), first=(75.0, 1.0))]
    [_, _, second] = cells(tables.arms_table(found, "05", tables.words("en")))
    assert second == ["`second`", "71.50 ± 3.54", "1.0 ± 0.0", "1.00 ± 0.00"]
    [_, _, second] = cells(tables.arms_table(found[:1], "05", tables.words("en")))
    assert second == ["`second`", "69.00", "1.0", "1.00"], "one seed has no spread"


def test_table_of_lessons_gets_time_and_accuracy_in_both_languages():
    row = "| `02_with_validation.py` | an idea | a view | - | - |"
    other = "| `03_save_load_model.py` | an idea | a view | - | - |"
    filled = tables.fill_lessons(f"{row}\n{other}", ENTRIES, tables.words("en"))
    first = "| `02_with_validation.py` | an idea | a view | 74 s | 75.0 ± 1.0 % on validation images |"
    assert filled == f"{first}\n{other}", "lesson 03 has not been measured"
    assert tables.fill_lessons(filled, ENTRIES, tables.words("en")) == filled
    assert "| 74 秒 | 75.0 ± 1.0%（验证图片） |" in tables.fill_lessons(row, ENTRIES, tables.words("zh"))
    linked = "| [02 with validation](02_with_validation.md) | a question | - | - |"
    assert "| a question | 74 s | 75.0" in tables.fill_lessons(linked, ENTRIES, tables.words("en"))


def test_tables_of_throughput():
    report = json.loads(json.dumps(REPORT))  # from a file, in which all keys are texts
    assert cells(tables.throughput_table(report, tables.words("en"))) == [
        ["", "images per second", "share of the arithmetic limit"],
        ["this course", "2,000 (1,900 - 2,300)", "0.50"],
        ["ceiling: ready-made batches", "2,500 (2,400 - 2,550)", "0.62"],
        ["usual way", "1,000 (400 - 1,100)", "0.25"],
    ]
    assert cells(tables.ratios_table(report, tables.words("en"))) == [
        ["ratio", "median (least to greatest)"],
        ["speed: this course / usual way", "2.00 (1.75 - 5.00)"],
        ["time for an image: of 20,000 / of 1,000", "0.98 (0.90 - 1.20)"],
    ]


GROUP_SIZES = {"accuracy": {"1": [70.0, 72.0, 74.0], "16": [71.0, 71.5, 72.0]}}


def test_table_of_group_sizes():
    assert cells(tables.group_size_table(GROUP_SIZES, tables.words("en"))) == [
        ["images in a group", "mean", "standard error", "every seed"],
        ["1", "72.00 %", "1.15", "70.00, 72.00, 74.00"],  # 2 / sqrt(3)
        ["16", "71.50 %", "0.29", "71.00, 71.50, 72.00"],
    ]


DRAWS = {"pretraining": {"val_accuracy": 82.0}}
DRAWS |= {"scratch_10": {"draws": [40.0, 50.0]}, "scratch_50": {"draws": [60.0, 60.0]}}
DRAWS |= {"new_last_layer_10": {"draws": [70.0, 72.0]}, "new_last_layer_50": {"draws": [80.0, 81.0]}}


def test_table_of_transfer_has_every_draw_of_every_seed():
    entries = [{"lesson": "10", "seed": seed, "arms": DRAWS} for seed in [42, 43]]
    assert cells(tables.transfer_table(entries, tables.words("en"))) == [
        ["arm", "10 images of a class", "50 images of a class"],
        ["`scratch`", "45.0 ± 5.8", "60.0 ± 0.0"],  # the deviation of 40, 50, 40, 50
        ["`new_last_layer`", "71.0 ± 1.2", "80.5 ± 0.6"],
    ]
    assert tables.transfer_table(ENTRIES, tables.words("en")) == "...", "not measured yet"


def test_table_of_rules_has_every_seed():
    def with_rules(seed, stops_after, lost):
        rule = {"stops_after": stops_after, "brings_back": 2, "saved_epochs": 0, "lost_points": lost}
        found = entry("08", seed, **{"": (72.0, 27.0)})
        found["arms"][""]["rules"] = {"Loss/val 1": rule, "Accuracy/val 5": rule | {"saved_epochs": 13}}
        return found

    found = [with_rules(43, None, 0.0), with_rules(42, 3, 11.46)]
    assert cells(tables.rules_table(found, tables.words("en"))) == [
        ["watches", "patience", "stops after epoch", "brings back", "saved", "lost"],
        ["`Loss/val`", "1", "3, -", "2, 2", "0, 0", "11.46, 0.00"],
        ["`Accuracy/val`", "5", "3, -", "2, 2", "13, 13", "11.46, 0.00"],
    ]
    assert tables.rules_table(ENTRIES, tables.words("en")) == "...", "not measured yet"
    assert "| 看的指标 | 耐心值 |" in tables.rules_table(found, tables.words("zh"))


def test_table_of_splits_has_promise_and_truth():
    entries = [
        {"lesson": "11", "seed": seed, "arms": {"by_file": {"val_accuracy": promise, "test_accuracy": 40.0}}}
        for seed, promise in [(42, 80.0), (43, 82.0)]
    ]
    assert cells(tables.splits_table(entries, tables.words("en"))) == [
        ["split", "validation", "test (new scenes)"],
        ["`by_file`", "81.0 ± 1.4", "40.0 ± 0.0"],
    ]
    assert tables.splits_table(ENTRIES, tables.words("en")) == "..."


PROCESSES = {
    "machine": MACHINE,
    "data": "random images",
    "images_per_second": {
        "1 x 2": {"median": 2000.0, "min": 1900.0, "max": 2100.0},
        "2 x 1": {"median": 1500.0, "min": 1400.0, "max": 1600.0},
    },
    "ratio": {
        "1 x 2": {"median": 1.0, "min": 1.0, "max": 1.0},
        "2 x 1": {"median": 0.75, "min": 0.7, "max": 0.8},
    },
}


TIMES = {
    "machine": MACHINE,
    "data": "JPEG copy of CIFAR-10",
    "goal": 75.0,
    "ways": {
        "lesson": {
            "minutes": [1.0, 3.0, 2.0],
            "epochs": [4, 5, 4],
            "accuracy": [75.0, 76.0, 77.0],
            "time_per_epoch": {"median": 1.0, "min": 1.0, "max": 1.0},
        },
        "Keras": {
            "minutes": [4.0, None, 5.0],
            "epochs": [5, 6, 6],
            "accuracy": [75.1, 74.94, 75.3],
            "time_per_epoch": {"median": 2.0, "min": 1.5, "max": 2.5},
        },
    },
}


def test_table_of_times_shows_what_never_got_there():
    assert cells(tables.time_table(TIMES, tables.words("en"))) == [
        ["way", "minutes to 75 %", "epochs", "accuracy after them", "time for an epoch, ratio"],
        ["this course", "2.0 (1.0, 3.0, 2.0)", "4, 5, 4", "75.00, 76.00, 77.00 %", "1.00 (1.00 - 1.00)"],
        ["Keras", "5.0 (4.0, -, 5.0)", "5, 6, 6", "75.10, 74.94, 75.30 %", "2.00 (1.50 - 2.50)"],
    ]
    assert tables.time_table(None, tables.words("en")) == "...", "not measured yet"


RECIPES = {"accuracy": {"lesson 05": {"42": 81.0, "43": 82.0}, "no warm-up": {"42": 80.0, "43": 80.5}}}
RECIPES |= {"machine": MACHINE, "data": "JPEG copy of CIFAR-10"}


def test_table_of_recipes_compares_seed_by_seed():
    assert cells(tables.recipes_table(RECIPES, tables.words("en"))) == [
        ["way", "validation accuracy", "difference"],
        ["lesson 05", "81.50 ± 0.71", ""],
        ["no warm-up", "80.25 ± 0.35", "-1.25 ± 0.35"],
    ]
    assert tables.recipes_table(None, tables.words("en")) == "...", "not measured yet"
    assert set(recipes.WAYS) <= set(tables.CHINESE)


def test_table_of_processes():
    assert cells(tables.processes_table(PROCESSES, tables.words("en"))) == [
        ["processes", "threads in each", "images per second", "ratio to the first row"],
        ["1", "2", "2,000 (1,900 - 2,100)", "1.00"],
        ["2", "1", "1,500 (1,400 - 1,600)", "0.75"],
    ]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Let tables.py find these results, in place of those in docs/."""
    (tmp_path / "docs").mkdir()
    other = {"machine": MACHINE | {"processor": "Slide rule"}, "data": "JPEG copy of CIFAR-10"}
    found = {"results": [*ENTRIES, ENTRIES[0] | other], "throughput": REPORT, "group_size": GROUP_SIZES}
    found |= {"processes": PROCESSES, "time_to_accuracy": TIMES, "recipes": RECIPES}
    found |= {"time_to_accuracy_6_epochs": TIMES | {"goal": 80.0}}
    for name, content in found.items():
        (tmp_path / "docs" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return found


def test_every_table_goes_between_its_own_markers(measured):
    say = tables.words("en")
    report = json.loads(json.dumps(REPORT))
    other = MACHINE_IN_WORDS.replace("Abacus", "Slide rule")
    expected = {
        "lessons": "| lesson | time |\n| `01_basic_training.py` | - | 86.3 % on training images |",
        "runs": tables.runs_table(measured["results"], say),
        "runs machine": f"Measured on {MACHINE_IN_WORDS} / {other}; data: random images, JPEG copy of CIFAR-10."
        " Of several seeds: the mean ± the standard deviation.",
        "schedulers": tables.arms_table(ENTRIES, "04", say),
        "augmentation": "...",
        "throughput": tables.throughput_table(report, say),
        "ratios": tables.ratios_table(report, say),
        "throughput machine": f"Measured on {MACHINE_IN_WORDS}; data: random images.",
        "group size": tables.group_size_table(GROUP_SIZES, say),
        "transfer": "...",
        "splits": "...",
        "rules": "...",
        "clipping": "...",
        "precisions": "...",
        "processes": tables.processes_table(PROCESSES, say),
        "processes machine": f"Measured on {MACHINE_IN_WORDS}; data: random images.",
        "recipes": tables.recipes_table(RECIPES, say),
        "recipes machine": f"Measured on {MACHINE_IN_WORDS}; data: JPEG copy of CIFAR-10.",
        "time": tables.time_table(TIMES, say),
        "time, 6 epochs": tables.time_table(TIMES | {"goal": 80.0}, say),
        "time machine": f"Measured on {MACHINE_IN_WORDS}; data: JPEG copy of CIFAR-10.",
        "run 04": tables.runs_table(ENTRIES[3:6], say)
        + f"\n\nMeasured on {MACHINE_IN_WORDS}; data: random images."
        " Of several seeds: the mean ± the standard deviation.",
        "run 05": "...\n\n...",
        "machine 04": f"Measured on {MACHINE_IN_WORDS}; data: random images."
        " Of several seeds: the mean ± the standard deviation.",
    }
    text = "# A guide\n\n<!-- table: {} -->\n{}\n<!-- end of table -->\nand so on\n"
    old = "| lesson | time |\n| `01_basic_training.py` | old | old |"
    for name, table in expected.items():
        assert tables.fill(text.format(name, old), "en") == text.format(name, table)
    both = text.format("throughput", old) + text.format("augmentation", old)
    new = text.format("throughput", expected["throughput"]) + text.format("augmentation", "...")
    assert tables.fill(both, "en") == new


def test_each_guide_is_filled_in_its_own_language(measured, monkeypatch, tmp_path):
    guides = [tmp_path / "README.md", tmp_path / "README.zh-CN.md"]
    for guide in guides:
        guide.write_text("<!-- table: throughput machine -->\n<!-- end of table -->\n", encoding="utf-8")
    monkeypatch.setattr(tables, "GUIDES", guides)
    tables.main()
    english, chinese = [guide.read_text(encoding="utf-8").splitlines()[1] for guide in guides]
    assert english == f"Measured on {MACHINE_IN_WORDS}; data: random images."
    assert chinese == f"测量环境：{MACHINE_IN_WORDS}；数据：随机图片。"
    assert sorted(tmp_path.glob("README*")) == guides, "no temporary file is left"


# group_size.py


def test_a_group_size_is_judged_by_the_lessons_own_training(lessons, monkeypatch, capsys):
    noted = []

    def load_data(name, data_dir, train):
        noted.append(("data", name, data_dir, train))
        return "images", "labels", "classes", "the data"

    def split_train_val(*args):
        noted.append(("split", *args))
        return "train set", "val set"

    def train(*args):
        noted.append(args)
        print("an epoch's line, which nobody wants to see")
        return [{"Accuracy/val": accuracy, "Accuracy/train": 99.0} for accuracy in [50.0, 80.0, 70.0]]

    for stand_in in [load_data, split_train_val, train]:
        monkeypatch.setattr(lessons["05"], stand_in.__name__, stand_in)
    flags = ["--epochs", "3", "--subset", "9", "--data", "digits", "--data-dir", "photos"]
    accuracy = group_size.final_accuracy(lessons["05"], flags, group_size=8, seed=5)
    assert accuracy == 70, "after the last epoch, not after the best"
    data, split, (args, arm, *rest, folder) = noted
    assert data == ("data", "digits", Path("photos"), True)
    assert split == ("split", "images", "labels", 5, 9)
    assert (args.group_size, args.seed, args.epochs, args.subset, args.data) == (8, 5, 3, 9, "the data")
    assert arm == "with_augmentation" and rest == ["train set", "val set", "classes"]
    assert args.output_dir in folder.parents and not args.output_dir.exists(), "all in a temporary folder"
    assert capsys.readouterr().out == ""


def test_group_sizes_are_compared_with_the_first(monkeypatch, tmp_path, capsys):
    runs = []

    def final_accuracy(lesson, flags, size, seed):
        runs.append((lesson.LESSON, flags, size, seed))
        return {16: 70.0, 1: 60.0}[size] + 2 * seed

    monkeypatch.setattr(group_size, "final_accuracy", final_accuracy)
    flags = ["--epochs", "3", "--subset", "9", "--data", "digits", "--data-dir", "photos"]
    wanted = ["--seeds", "1", "2", "3", "--group-sizes", "16", "1", "--json", str(tmp_path / "g.json")]
    group_size.main([*flags, *wanted])
    assert runs == [("05_data_augmentation", flags, size, seed) for seed in [1, 2, 3] for size in [16, 1]]
    report = read_json(tmp_path / "g.json")
    assert report.pop("machine") == common.describe_machine()
    assert report == {"seeds": [1, 2, 3], "accuracy": {"16": [72, 74, 76], "1": [62, 64, 66]}}
    error = "standard error of the mean 1.15"  # 2 / sqrt(3)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "Validation accuracy after 3 epochs on 9 images, seeds [1, 2, 3]:",
        f"  groups of  16: mean 74.00 %, {error}  (72.00, 74.00, 76.00)",
        f"  groups of   1: mean 64.00 %, {error}, 10.00 points behind groups of 16  (62.00, 64.00, 66.00)",
    ]


@pytest.mark.parametrize("flags", [["--epochs", "0"], ["--group-sizes", "16", "0"], ["--data", "photos"]])
def test_group_size_refuses_bad_flags_before_it_trains(monkeypatch, flags, capsys):
    monkeypatch.setattr(group_size, "final_accuracy", None)
    with pytest.raises(SystemExit) as stop:
        group_size.main(flags)
    assert stop.value.code == 2


def test_group_size_runs(tmp_path, capsys):
    flags = ["--seeds", "1", "--group-sizes", "64", "--epochs", "1", "--subset", "64", "--data", "digits"]
    group_size.main([*flags, "--json", str(tmp_path / "g.json")])
    [accuracy] = read_json(tmp_path / "g.json")["accuracy"]["64"]
    assert 0 <= accuracy <= 100 and f"mean {accuracy:.2f} %" in capsys.readouterr().out


# processes.py


def test_processes_are_measured_in_turn_against_the_threads_of_one(monkeypatch, tmp_path, capsys):
    asked, rates = [], iter([2000, 1500, 1000, 1000, 800, 600, 3000, 2100, 1200])
    monkeypatch.setattr(
        processes, "train", lambda count, threads, args: (asked.append((count, threads)), next(rates))[1]
    )
    path = tmp_path / "p.json"
    processes.main(["--rounds", "3", "--json", str(path), "--data-name", "some images"])
    assert asked == [(1, 2), (2, 1), (1, 1)] * 3
    output, report = capsys.readouterr().out, json.loads(path.read_text(encoding="utf-8"))
    assert report["data"] == "some images" and report["machine"]["cores"]
    assert report["images_per_second"]["2 x 1"] == {"median": 1500, "min": 800, "max": 2100}
    assert report["ratio"]["2 x 1"] == {"median": 0.75, "min": 0.7, "max": 0.8}, "round by round"
    assert list(report["ratio"]) == ["1 x 2", "2 x 1", "1 x 1"] and report["ratio"]["1 x 2"]["max"] == 1
    assert "2 x 1 | 1,500 (800 to 2,100) images/s | ratio 0.75 (0.70 to 0.80)" in output


@pytest.mark.parametrize("count", [1, 2])
def test_processes_are_those_of_torchrun_and_the_second_epoch_counts(lessons, monkeypatch, tmp_path, count):
    calls = []

    def start(command, env, **_):
        calls.append((command, env))
        folder = Path(command[command.index("--output-dir") + 1])
        history = [{"ImagesPerSecond": 1.0}, {"ImagesPerSecond": 7.0}]
        torch.save({"history": history}, folder / "latest_checkpoint.pth")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(processes.subprocess, "run", start)
    args = processes.build_parser().parse_args(
        ["--launcher", "launch.py", "--data", "digits", "--subset", "9"]
    )
    assert processes.train(count, 3, args) == 7.0
    [(command, environment)] = calls
    assert environment["OMP_NUM_THREADS"] == "3"
    assert ("--nproc_per_node=2" in command) == ("torch.distributed.run" in command) == (count == 2)
    at = command.index("launch.py")
    assert command[at + 1] == str(PATHS["12"])
    flags = lessons["12"].parse_args(command[at + 2 :])
    assert (flags.epochs, flags.subset, flags.data, flags.device.type) == (2, 9, "digits", "cpu")
    monkeypatch.setattr(
        processes.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="why")
    )
    with pytest.raises(SystemExit, match="Lesson 12 in .* processes failed: why"):
        processes.train(count, 3, args)


# time_to_accuracy.py


def test_ways_train_in_turn_until_each_has_reached_the_goal(monkeypatch):
    clock, calls = [0.0], []
    accuracies = {"lesson": [60.0, 75.0, 99.0], "slow": [50.0, 70.0, 74.9]}

    def way(name, seconds):
        def run(epoch, rate):
            calls.append((name, epoch, rate))
            clock[0] += seconds
            return accuracies[name][epoch - 1]

        return run

    monkeypatch.setattr(time_to_accuracy.time, "perf_counter", lambda: clock[0])
    ways = {"lesson": way("lesson", 30.0), "slow": way("slow", 90.0)}
    epochs = time_to_accuracy.train_in_turn(ways, [0.3, 0.2, 0.1], 75.0)
    assert calls == [
        ("lesson", 1, 0.3),
        ("slow", 1, 0.3),
        ("lesson", 2, 0.2),
        ("slow", 2, 0.2),
        ("slow", 3, 0.1),
    ]
    assert epochs["lesson"] == [(30.0, 60.0), (30.0, 75.0)] and len(epochs["slow"]) == 3
    figures = time_to_accuracy.summarize({42: epochs, 43: epochs}, 75.0)
    assert figures["lesson"]["minutes"] == [1.0, 1.0] and figures["slow"]["minutes"] == [None, None]
    assert figures["slow"]["epochs"] == [3, 3] and figures["slow"]["accuracy"] == [74.9, 74.9]
    assert figures["slow"]["time_per_epoch"] == {"median": 3.0, "min": 3.0, "max": 3.0}
    assert figures["slow"]["seconds_per_epoch"]["median"] == 90.0


def test_the_rates_are_those_of_lesson_04(lessons):
    args = SimpleNamespace(schedule="StepLR", epochs=6, lr=0.5)
    rates = time_to_accuracy.learning_rates(lessons["04"], args)
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])


@pytest.mark.parametrize("way", ["lesson_way", "usual_way"])
def test_both_ways_train_at_the_rate_they_are_given_and_validate(lessons, monkeypatch, way):
    lesson, made, new_training = lessons["04"], [], time_to_accuracy.new_training
    monkeypatch.setattr(
        time_to_accuracy, "new_training", lambda *args: made.append(new_training(*args)) or made[-1]
    )
    args = SimpleNamespace(seed=42, lr=0.05, batch_size=16)
    images, labels, *_ = lesson.load_data("digits", None, train=True)
    train_set, val_set = lesson.split_train_val(images, labels, 42, 80)
    run = getattr(time_to_accuracy, way)(lesson, args, train_set, val_set)
    model = made[0][0]
    before = [weights.clone() for weights in model.parameters()]
    run(1, 0.0)
    assert all(map(torch.equal, before, model.parameters())), "a rate of 0 moves nothing"
    accuracy = run(2, 0.05)
    assert not any(map(torch.equal, before, model.parameters()))
    model.eval()
    forward = model if way == "lesson_way" else partial(time_to_accuracy.pooling_last, model)
    right = forward(lesson.to_input(val_set.tensors[0], CPU)).argmax(dim=1) == val_set.tensors[1]
    assert accuracy == pytest.approx(100 * right.float().mean().item())


def test_time_to_accuracy_runs(monkeypatch, tmp_path, capsys):
    find_spec = time_to_accuracy.importlib.util.find_spec
    monkeypatch.setattr(
        time_to_accuracy.importlib.util,
        "find_spec",
        lambda name: None if name == "keras" else find_spec(name),
    )
    path = tmp_path / "times.json"
    flags = ["--data", "digits", "--subset", "64", "--epochs", "1", "--seeds", "1", "2", "--goal", "10"]
    time_to_accuracy.main([*flags, "--data-name", "digits", "--json", str(path)])
    printed, report = capsys.readouterr().out, read_json(path)
    assert "Keras is not installed" in printed and list(report["ways"]) == [
        "lesson",
        "usual way, pooling last",
    ]
    assert report["goal"] == 10 and report["seeds"] == [1, 2] and report["data"] == "digits"
    assert "Minutes of training to 10 % validation accuracy, seeds [1, 2]:" in printed
    for name, figures in report["ways"].items():
        assert len(figures["minutes"]) == 2
        minutes, ratio = common.median_and_each(figures["minutes"]), figures["time_per_epoch"]
        line = (
            f"  {name:24} {minutes}, after {figures['epochs']} epochs; time for an epoch against the lesson: "
        )
        assert f"{line}{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})\n" in printed
    with pytest.raises(SystemExit, match="ReduceLROnPlateau is none of Constant, StepLR"):
        time_to_accuracy.main(["--schedule", "ReduceLROnPlateau"])


# recipes.py


def test_the_first_recipe_is_the_lessons_own(lessons, monkeypatch):
    lesson, own = lessons["05"], recipes.OWN | recipes.WAYS["lesson 05"]
    args = lesson.parse_args(["--device", "cpu"])
    assert [args.epochs, args.lr, args.batch_size] == [own["epochs"], own["lr"], own["batch_size"]]
    _, crop, rotation, *_ = lesson.AUGMENTATION
    assert set(crop.padding) == {own["padding"]} and rotation.p == own["rotation"] and args.group_size == 16


def test_a_recipe_trains_in_the_way_that_its_name_says(monkeypatch, tmp_path, capsys):
    """By what reaches the lesson's own loop: rates, batches, transforms; and a finished training is not repeated."""
    seen = []
    load_lesson = recipes.load_lesson

    def load(number):
        lesson = load_lesson(number)
        original = lesson.train_one_epoch

        def spy(model, loader, loss_fn, optimizer, device, epoch, augment):
            names = [type(transform).__name__ for transform in lesson.AUGMENTATION]
            crop, rotation = lesson.AUGMENTATION[-4:-2]
            names += [f"padding {crop.padding[0]}", f"rotation {rotation.p}"]
            images = next(iter(torch.utils.data.DataLoader(loader.dataset, len(loader.dataset))))[0]
            seen.append((optimizer.param_groups[0]["lr"], loader.batch_size, names, images))
            return original(model, loader, loss_fn, optimizer, device, epoch, augment)

        lesson.train_one_epoch = spy
        return lesson

    monkeypatch.setattr(recipes, "load_lesson", load)
    monkeypatch.setattr(recipes, "OWN", recipes.OWN | {"epochs": 4})
    path = tmp_path / "recipes.json"
    flags = [
        "--data",
        "digits",
        "--subset",
        "32",
        "--seeds",
        "1",
        "--json",
        str(path),
        "--data-name",
        "digits",
    ]
    ways = ["lesson 05", "no warm-up", "alternating flips", "batches of 64, half the rate"]
    ways += ["padding 4", "rotation always"]
    recipes.main([*flags, "--ways", *ways])
    cosine = [(1 + np.cos(np.pi * t / 4)) / 2 for t in range(4)]
    rates = [rate for rate, *_ in seen]
    warm = [0.1 / 3 * cosine[0], 0.2 / 3 * cosine[1], 0.1 * cosine[2], 0.1 * cosine[3]]
    assert rates[:4] == pytest.approx(warm) and rates[4:8] == pytest.approx(
        [0.1 * factor for factor in cosine]
    )
    assert rates[12:16] == pytest.approx([rate / 2 for rate in warm])
    assert [size for _, size, *_ in seen] == [128] * 12 + [64] * 4 + [128] * 8
    flips = ["RandomHorizontalFlip" in names for _, _, names, _ in seen]
    assert flips == [True] * 8 + [False] * 4 + [True] * 12
    moves = [names[-2:] for _, _, names, _ in seen]
    assert moves[:16] == [["padding 2", "rotation 0.5"]] * 16
    assert moves[16:] == [["padding 4", "rotation 0.5"]] * 4 + [["padding 2", "rotation 1.0"]] * 4
    odd, even = seen[8][3], seen[9][3]
    assert torch.equal(odd, even.flip(2)) and not torch.equal(odd, even), "every image, in turn"
    printed, report = capsys.readouterr().out, read_json(path)
    assert list(report["accuracy"]) == ways and report["data"] == "digits"
    for way in ways:
        assert f"  {way:66} {report['accuracy'][way]['1']:.2f}  (" in printed
    recipes.main([*flags, "--ways", *ways])
    assert len(seen) == 24, "what is in the file is not trained again"


# mistakes.py


@pytest.mark.parametrize("number", list(mistakes.MISTAKES))
def test_every_mistake_changes_its_lesson_in_one_place(number):
    """And what comes out is still a script; test_documents.py compares the pages with the figures."""
    source = PATHS[number].read_text(encoding="utf-8")
    for mistake, change in mistakes.MISTAKES[number].items():
        changed = mistakes.with_mistake(source, *change)
        compile(changed, mistake, "exec")
        assert (changed == source) == (mistake == "none" or mistake.startswith("--"))
    with pytest.raises(ValueError, match="is not exactly once in the lesson"):
        mistakes.with_mistake(source, "import", "export")
    report = read_json(common.ROOT / "docs" / "mistakes.json")[number]
    assert report.pop("flags") == mistakes.FLAGS[number] and list(report) == list(mistakes.MISTAKES[number])


def test_curves_are_what_a_lesson_prints(finished):
    """Of lesson 01, that has no validation, and of lesson 05, that has arms."""
    folder = finished("05").folder
    [run] = (folder / "tensor_board" / PATHS["05"].stem).glob("*_run_1")
    found = mistakes.curves(finished("05").output)
    assert list(found) == ["without_augmentation", "with_augmentation", "with_augmentation_and_dropout"]
    for arm, printed in found.items():
        drawn = common.read_scalars(run / arm)
        for curve, tag in {"train_loss": "Loss/train", "val_accuracy": "Accuracy/val"}.items():
            assert printed[curve] == pytest.approx([value for _, value in drawn[tag]], abs=0.0051), arm
    [(arm, printed)] = mistakes.curves(finished("01").output).items()
    assert arm == "" and list(printed) == ["train_loss", "train_accuracy"]
    assert (
        f"train loss {printed['train_loss'][-1]:.4f}, acc {printed['train_accuracy'][-1]:5.2f} %"
        in (finished("01").output.split("Epoch")[-1])
    )


MISTAKEN = r"""
import sys
from pathlib import Path
with Path(__file__).with_name("calls.txt").open("a") as file:
    file.write(" ".join([Path(sys.argv[1]).name, *sys.argv[2:]]) + "\n")
forgets = "        optimizer.zero_grad()\n" not in Path(sys.argv[1]).read_text(encoding="utf-8")
for epoch in [1, 2]:
    print(f"Epoch  {epoch}/2 | train loss {epoch + forgets}.1234, acc {11 * epoch}.25 % | 9 s")
"""


def test_mistakes_are_made_in_a_copy_of_the_lesson(tmp_path, capsys):
    launcher, path = tmp_path / "launcher.py", tmp_path / "mistakes.json"
    launcher.write_text(MISTAKEN, encoding="utf-8")
    source = PATHS["01"].read_bytes()
    flags = ["--lessons", "01", "--launcher", launcher, "--json", path]
    mistakes.main(list(map(str, [*flags, "--data-dir", tmp_path, "--data-name", "some photographs"])))
    assert PATHS["01"].read_bytes() == source
    report = read_json(path)
    assert [report.pop(key) for key in ["data", "seed", "machine"]] == [
        "some photographs",
        42,
        common.describe_machine(),
    ]
    accuracy = {"train_accuracy": [11.25, 22.25]}
    right, wrong = {"train_loss": [1.1234, 2.1234]} | accuracy, {"train_loss": [2.1234, 3.1234]} | accuracy
    assert report == {
        "01": {"flags": "--subset 5000 --epochs 5"}
        | {name: {"": wrong if name == "no zero_grad" else right} for name in mistakes.MISTAKES["01"]}
    }
    calls = (tmp_path / "calls.txt").read_text(encoding="utf-8").splitlines()
    assert len(calls) == 5 and all(call.startswith("01_basic_training.py --subset 5000") for call in calls)
    assert all("--seed 42 " in call and f"--data-dir {tmp_path}" in call for call in calls)
    assert [call for call in calls if "--lr 0.0005" in call] == calls[-1:]
    assert "  no zero_grad" in capsys.readouterr().out
    launcher.write_text("import sys; sys.exit('no photographs')", encoding="utf-8")
    with pytest.raises(
        SystemExit, match="01_basic_training.py with the mistake 'none' failed:\nno photographs"
    ):
        mistakes.main(list(map(str, [*flags, "--data-dir", tmp_path])))
    assert read_json(path)["01"], "the figures that were there are still there"
