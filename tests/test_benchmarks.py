"""src/benchmarks/: every number is of what its name says, and of the lessons' own training."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import common
import mistakes
import mutants
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
from torch import nn
from torch.utils.data import RandomSampler
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms import v2

IMAGES = torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(200) % 10
TASKS = ["lesson", "lesson, augmented", "ceiling: ready-made batches", "usual way", "usual way, 2 workers"]
TASKS += ["usual way, pooling last", "usual way, augmented", "usual way, augmented, 2 workers"]
MACHINE = {"processor": "Abacus", "cores": 7, "instructions": "BEADS", "threads": 3, "system": "Wood"}
MACHINE |= {"python": "3.1", "torch": "4.1", "torchvision": "5.9"}
MACHINE_IN_WORDS = "Abacus, 7 cores, BEADS, Wood, Python 3.1, torch 4.1, torchvision 5.9"
CLIPPING_RUNS = [tables.clipping_run(d, remedy) for d in tables.DANGERS for remedy in tables.REMEDIES]
EN, ZH = tables.words("en"), tables.words("zh")


def figures(median, least, greatest):
    """Return three numbers as the benchmarks write them."""
    return {"median": median, "min": least, "max": greatest}


def is_channels_last(weight):
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def read_lines(path):
    return path.read_text(encoding="utf-8").splitlines()


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


def test_medians_and_the_machine():
    assert common.spread(np.array([9.0, 1.0, 2.0])) == figures(2, 1, 9)
    assert tables.median_and_each([1.0, 3.24, 2.0]) == "2.0 (1.0, 3.2, 2.0)"
    assert tables.median_and_each([4.0, None, 5.0]) == "5.0 (4.0, -, 5.0)", "the third takes longer than both"
    machine = common.describe_machine()
    assert machine.keys() == MACHINE.keys() and machine["torch"] == torch.__version__.split("+")[0]
    assert common.machine_in_words(MACHINE) == MACHINE_IN_WORDS


# throughput.py


@pytest.mark.parametrize("name, number", [("lesson", "02"), ("lesson, augmented", "05")])
def test_a_lessons_task_trains_as_the_lesson_does(lessons, monkeypatch, tmp_path, name, number):
    """By what reaches train_one_epoch() from the lesson's own main() and from the benchmark."""
    seen, lesson = [], lessons[number]
    train_one_epoch = lesson.train_one_epoch
    monkeypatch.setattr(lesson, "train_one_epoch", lambda *args: seen.append(args) or train_one_epoch(*args))
    monkeypatch.setattr(throughput, "load_lesson", lessons.get)
    if number == "05":
        monkeypatch.setattr(lesson, "VARIANTS", {"with_augmentation": (lesson.AUGMENTATION, 0.0)})
    flags = ["--data", "digits", "--epochs", "1", "--subset", "8", "--device", "cpu"]
    lesson.main([*flags, "--output-dir", str(tmp_path)])
    throughput.build_tasks(IMAGES, LABELS)[name]()
    for model, loader, loss_fn, optimizer, device, *augmentation in seen:
        assert type(model) is lesson.SimpleCNN and model.dropout.p == 0
        assert is_channels_last(model.conv2.weight)
        assert (loader.batch_size, loader.num_workers, type(loader.sampler)) == (128, 0, RandomSampler)
        assert type(loss_fn) is nn.CrossEntropyLoss and device == "cpu"
        [group] = optimizer.param_groups
        assert type(optimizer) is torch.optim.SGD and group["momentum"] == 0.9
        assert all(one is other for one, other in zip(group["params"], model.parameters(), strict=True))
        assert [size for _, size in [augmentation]] == [16] if number == "05" else augmentation == []
    images, labels = seen[1][1].dataset.tensors
    assert torch.equal(images, IMAGES) and torch.equal(labels, LABELS)
    if number == "05":
        assert seen[1][5].transforms == lesson.AUGMENTATION, "with the flip, which digits do without"


@pytest.fixture
def batches_seen(lessons, monkeypatch):
    """Let throughput.py note the arguments of train_batches(), in place of training."""
    seen = []
    monkeypatch.setattr(throughput, "train_batches", lambda *args: seen.append(args))
    monkeypatch.setattr(throughput, "load_lesson", lessons.get)
    return seen


def test_the_ceiling_finds_its_batches_ready(lessons, monkeypatch, batches_seen):
    task = throughput.build_tasks(IMAGES, LABELS)["ceiling: ready-made batches"]
    monkeypatch.setattr(lessons["02"], "normalize", None)  # there is nothing left to prepare
    task()
    [(model, _, batches)] = batches_seen
    assert is_channels_last(model.conv2.weight) and [len(labels) for _, labels in batches] == [128, 72]
    images, labels = map(torch.cat, zip(*batches, strict=True))
    assert torch.equal(images, lessons["05"].normalize(IMAGES)) and torch.equal(labels, LABELS)


@pytest.mark.parametrize("name", TASKS[3:])
def test_a_usual_way_is_what_its_name_says(lessons, batches_seen, name):
    throughput.build_tasks(IMAGES, LABELS)[name]()
    [(model, optimizer, loader)] = batches_seen
    assert model.conv2.weight.is_contiguous(), "PyTorch's default memory format"
    assert ("pooling last" in name) == (type(model) is not lessons["02"].SimpleCNN)
    assert (loader.batch_size, type(loader.sampler)) == (128, RandomSampler)
    assert loader.num_workers == (2 if "workers" in name else 0)
    assert type(optimizer) is torch.optim.SGD and optimizer.param_groups[0]["momentum"] == 0.9
    *on_pictures, erasing = lessons["05"].AUGMENTATION
    augmented = [*on_pictures, *throughput.TO_TENSOR, erasing]
    assert loader.dataset.transform.transforms == (augmented if "augmented" in name else throughput.TO_TENSOR)
    image, label = loader.dataset[3]
    assert (len(loader.dataset), label) == (200, 3)
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32


def test_all_ways_train_on_the_same_numbers(lessons):
    """torchvision's CIFAR10 with the usual transforms and the lesson's normalize() make the same of an image."""
    dataset = throughput.InMemoryCIFAR10(IMAGES, LABELS, v2.Compose(throughput.TO_TENSOR))
    usual = torch.stack([dataset[i][0] for i in range(4)]).as_subclass(torch.Tensor)
    torch.testing.assert_close(usual, lessons["02"].normalize(IMAGES[:4]))


def test_pooling_last_is_the_same_network_with_the_pooling_last(lessons):
    model, lesson_model = throughput.make_pooling_last(lessons["02"]), lessons["02"].SimpleCNN()
    lesson_model.load_state_dict(model.state_dict())
    images, blocks = torch.randn(4, 3, 32, 32), []
    for conv, bn in [(model.conv1, model.bn1), (model.conv2, model.bn2), (model.conv3, model.bn3)]:
        blocks += [conv, bn, nn.ReLU(), nn.MaxPool2d(2)]
    expected = nn.Sequential(*blocks, nn.Flatten(), model.fc1, nn.ReLU(), model.fc2)(images)
    torch.testing.assert_close(model(images), expected)
    # In train mode BatchNorm takes mean and variance from other values than in the lesson.
    assert not torch.allclose(lesson_model(images), expected, atol=0.01)


def test_rates_and_ratios_come_from_the_times(lessons, monkeypatch):
    # A convolution takes 2 operations for each weight and output position, and again for each gradient: by the
    # weights and by the inputs, but nobody needs the gradient of the images.
    conv1, conv2, conv3 = 27 * 32 * 32 * 32, 288 * 64 * 16 * 16, 576 * 128 * 8 * 8
    operations = 6 * (conv1 + conv2 + conv3 + 2048 * 256 + 256 * 10) - 2 * conv1
    rounds = np.random.default_rng(0).uniform(1, 9, size=(len(TASKS) + 1, 3))
    seconds = dict(zip([*TASKS, "matrix multiplication"], rounds, strict=True))
    report = throughput.compare(seconds, images=600)

    def of_rounds(values):  # of three numbers; the median is the second
        least, median, greatest = sorted(values)
        return pytest.approx(figures(median, least, greatest))

    matrix_rates = 10 * 2 * 2048**3 / seconds["matrix multiplication"]
    assert report["operations_per_image"] == operations
    assert report["matrix_operations_per_second"] == of_rounds(matrix_rates)
    assert list(report["images_per_second"]) == list(report["share_of_arithmetic_limit"]) == TASKS
    for name in TASKS:
        assert report["images_per_second"][name] == of_rounds(600 / seconds[name])
        shares = 600 * operations / seconds[name] / matrix_rates
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


def test_throughput_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(throughput, "MATRIX_SIZE", 64)
    throughput.main(["--rounds", "1", "--images", "16", "--json", str(tmp_path / "t.json")])
    report, printed = common.read_json(tmp_path / "t.json"), capsys.readouterr().out
    assert list(report["images_per_second"]) == TASKS and report["data"] == "random images"
    assert all(1 < rate["median"] < 1e6 for rate in report["images_per_second"].values())
    assert tables.throughput_table(report) in printed and tables.ratios_table(report) in printed


# results.py


def write_run(folder, accuracies, gaps, first_epoch=1):
    """Write a TensorBoard run as the lessons do, with these curves."""
    with SummaryWriter(folder, purge_step=first_epoch) as writer:
        for epoch, (accuracy, gap) in enumerate(zip(accuracies, gaps, strict=True), start=first_epoch):
            writer.add_scalar("Accuracy/val", accuracy, epoch)
            writer.add_scalar("Overfitting/accuracy_gap", gap, epoch)


@pytest.fixture
def folder(tmp_path):
    """The output folder of a run that has printed nothing yet."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "output.txt").touch()
    return tmp_path / "run"


def test_results_are_the_best_accuracy_and_the_last_gap(folder):
    """Also of a run that was resumed: the third epoch was not saved, and is done again."""
    run_dir = folder / "tensor_board" / "03_save_load_model" / "20261128-024000"
    write_run(run_dir, [50, 75, 99], [1, 2, 3])
    write_run(run_dir, [75, 60], [4, 5], first_epoch=3)
    assert results.collect("03", folder) == {"": {"val_accuracy": 75, "best_epoch": 2, "epochs": 4, "gap": 5}}


def test_results_are_told_apart_by_variant(folder):
    lesson = folder / "tensor_board" / "04_lr_scheduler"
    write_run(lesson / "StepLR" / "20261128-024000", [50, 75, 62.5], [1, 2, 4])
    write_run(lesson / "Constant" / "20261128-024000", [80, 70, 60], [8, 16, 32])
    assert results.collect("04", folder) == {
        "StepLR": {"val_accuracy": 75, "best_epoch": 2, "epochs": 3, "gap": 4},
        "Constant": {"val_accuracy": 80, "best_epoch": 1, "epochs": 3, "gap": 32},
    }
    assert results.collect("09", folder)["StepLR"]["val_accuracy"] == 62.5, (
        "of lesson 09, the last epoch counts"
    )


PRINTED = {  # in the output of a quick run, with the numbers that are collected from it
    "01": "acc {train_accuracy:5.2f} % | ",
    "02": "Best validation accuracy: {val_accuracy:.2f} % in epoch {best_epoch}",
    "04": "  {variant:21} {val_accuracy:5.2f} % in epoch {best_epoch:2d}",
    "05": "  {variant:20} training {train:.2f} %, validation {val_accuracy:.2f} %, gap {gap:5.2f} points",
    "06": "accuracy {test_accuracy:.2f} % (95 %",
}


@pytest.mark.parametrize("number", list(PATHS))
def test_the_lessons_print_and_write_what_is_collected(lessons, finished, folder, number):
    run = finished(number)
    shutil.copytree(run.folder, folder, dirs_exist_ok=True)
    (folder / "output.txt").write_text(run.output, encoding="utf-8")
    found = results.collect(number, folder)
    expected = {"04": lessons["04"].SCHEDULERS, "05": list(lessons["05"].VARIANTS)}
    expected |= {"07": ["float32", "bfloat16"], "11": ["by_file", "by_group"]}
    expected["09"] = [
        run for run in CLIPPING_RUNS if run.startswith(("none", "images_of_nan", "BatchNorm_lr"))
    ]
    assert number == "10" or sorted(found) == sorted(expected.get(number, [""]))
    for variant, metrics in found.items():
        train = metrics.get("val_accuracy", 0) + metrics.get("gap", 0)
        assert PRINTED.get(number, "").format(variant=variant, train=train, **metrics) in run.output
    resumable = any((run.folder / "artifacts" / "checkpoints").rglob("latest_checkpoint.pth"))
    assert results.can_resume(PATHS[number].stem, folder) == resumable


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
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.json")

    def run(*flags, lesson="01", exit_status=0):
        launcher = tmp_path / "stub.py"
        launcher.write_text(STUB.replace("EXIT", str(exit_status)), encoding="utf-8")
        flags = ["--launcher", launcher, "--work-dir", tmp_path / "work", "--lessons", lesson, *flags]
        results.main(list(map(str, flags)))
        return read_lines(tmp_path / "calls.txt")

    return run


def test_results_are_kept_and_not_run_again(stub, tmp_path):
    calls = stub("--data-name", "some photographs", "--data-dir", "photos")
    folder = tmp_path / "work" / "01_basic_training_seed_42"
    assert calls == [f"{PATHS['01']} --seed 42 --output-dir {folder} --data cifar10 --data-dir photos"]
    [entry] = common.read_json(results.RESULTS)
    assert 0.2 <= entry.pop("seconds") < 60
    assert 1e7 < (entry.pop("peak_memory_bytes") or 1e8) < 1e11  # bytes, not kilobytes; none on Windows
    expected = {"lesson": "01", "seed": 42, "data": "some photographs", "machine": common.describe_machine()}
    assert entry == expected | {"arms": {"": {"train_accuracy": 81.25}}}
    assert len(stub()) == 1, "it ran again"
    assert "--seed 43 " in stub("--first-seed", "43", "--untimed")[1]
    entries = [(entry["seed"], entry["seconds"] is None) for entry in common.read_json(results.RESULTS)]
    assert entries == [(42, False), (43, True)]
    with pytest.raises(SystemExit, match="01_basic_training.py failed: see .*output.txt"):
        stub("--first-seed", "44", exit_status=1)
    assert len(common.read_json(results.RESULTS)) == 2, "a failed run is no result"


@pytest.mark.parametrize("path", ["StepLR/latest_checkpoint.pth", "latest_checkpoint.pth", "other.pth"])
def test_a_stopped_run_resumes_from_its_checkpoint_if_it_has_one(stub, monkeypatch, tmp_path, path):
    folder = tmp_path / "work" / "04_lr_scheduler_seed_42"
    checkpoint = folder / "artifacts" / "checkpoints" / "04_lr_scheduler" / path
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    monkeypatch.setattr(results, "SEEDS", {"04": 1})
    monkeypatch.setattr(results, "collect", lambda number, folder: {})
    [call] = stub(lesson="04")
    [entry] = common.read_json(results.RESULTS)
    resumed = path != "other.pth"
    assert call.endswith(" --resume") == checkpoint.exists() == resumed
    assert (entry["seconds"] is None) == resumed, "of a resumed run only a part was timed"


# tables.py


def cells(text):
    """Return the rows of a Markdown table as lists of cells, without the line under the header."""
    header, line, *rows = [
        row.removeprefix("| ").removesuffix(" |").split(" | ") for row in text.splitlines()
    ]
    assert set(line[0]) == {"|", "-"} and {len(row) for row in rows} == {len(header)}
    return [header, *rows]


def entry(number, seed, seconds=60.0, memory=1.5e9, **variants):
    """Return an entry as in docs/results.json. variants: {name: (validation accuracy, gap)}."""
    arms = {name: {"val_accuracy": accuracy, "gap": gap} for name, (accuracy, gap) in variants.items()}
    found = {"lesson": number, "seed": seed, "seconds": seconds, "peak_memory_bytes": memory, "arms": arms}
    return found | {"machine": MACHINE, "data": "random images"}


ENTRIES = [  # not in order: the tables sort them
    entry("02", 44, None, 1.25e9, **{"": (76.0, 24.0)}),
    entry("02", 42, 50.0, 1.5e9, **{"": (74.0, 20.0)}),
    entry("02", 43, 99.0, 1.0e9, **{"": (75.0, 22.0)}),
    entry("04", 42, 700.0, worse=(70.0, 1.0), near=(79.0, 2.0), steady=(80.0, 9.0)),
    entry("04", 43, 860.0, worse=(71.0, 1.0), near=(81.5, 4.0), steady=(80.0, 9.0)),
    entry("04", 44, 900.0, worse=(72.0, 1.0), near=(79.0, 6.0), steady=(80.0, 9.0)),
    entry("01", 42, None, None) | {"arms": {"": {"train_accuracy": 86.33}}},
    entry("06", 42, 100.0) | {"arms": {"": {"val_accuracy": 82.0, "test_accuracy": 81.5}}},
]


def test_table_of_runs():
    assert cells(tables.runs_table(ENTRIES, EN)) == [
        ["lesson", "accuracy", "gap", "time", "peak memory", "seeds"],
        ["01", "86.3 % on training images", "-", "-", "-", "42"],
        # The times are 50 and 99 s, and one unknown; the memory is the largest of the three.
        ["02", "75.0 ± 1.0 % on validation images", "22.0 ± 2.0", "74 s", "1.50 GB", "42, 43, 44"],
        ["04", "80.0 ± 0.0 % on validation images, steady", "-", "14 min", "1.50 GB", "42, 43, 44"],
        ["06", "81.5 % on test images", "-", "2 min", "1.50 GB", "42"],
    ]


def test_table_of_variants_compares_seed_by_seed():
    assert cells(tables.variants_table(tables.pick(ENTRIES, "04"), EN)) == [
        ["schedule", "validation accuracy", "gap", "behind the first"],
        ["`steady`", "80.00 ± 0.00", "9.0 ± 0.0", ""],
        # Behind by 1, -1.5 and 1: two standard errors are 2 * 1.44 / sqrt(3) = 1.67 points.
        ["`near`", "79.83 ± 1.44", "4.0 ± 2.0", "0.17 ± 1.44, not distinguishable"],
        ["`worse`", "71.00 ± 1.00", "1.0 ± 0.0", "9.00 ± 1.00"],
    ]
    # Both variants change by 5 points with the seed, but one is ahead by 1 point in each.
    found = [entry("05", 1, a=(70.0, 1.0), b=(69.0, 1.0)), entry("05", 2, b=(74.0, 1.0), a=(75.0, 1.0))]
    assert cells(tables.variants_table(found, EN))[2] == ["`b`", "71.50 ± 3.54", "1.0 ± 0.0", "1.00 ± 0.00"]
    assert cells(tables.variants_table(found[:1], EN))[2] == ["`b`", "69.00", "1.0", "1.00"], "no spread"


def test_table_of_lessons_gets_time_and_accuracy_in_both_languages():
    row = "| `02_with_validation.py` | an idea | a view | - | - |"
    other = "| `03_save_load_model.py` | an idea | a view | - | - |"
    filled = tables.fill_lessons(f"{row}\n{other}", ENTRIES, EN)
    first = "| `02_with_validation.py` | an idea | a view | 74 s | 75.0 ± 1.0 % on validation images |"
    assert filled == f"{first}\n{other}", "lesson 03 has not been measured"
    assert "| 74 秒 | 75.0 ± 1.0%（验证图片） |" in tables.fill_lessons(row, ENTRIES, ZH)
    linked = "| [02 with validation](02_with_validation.md) | a question | - | - |"
    assert "| a question | 74 s | 75.0" in tables.fill_lessons(linked, ENTRIES, EN)


def test_tables_of_lessons_with_metrics_of_their_own():
    rule = {"stops_after": None, "best_epoch": 2, "saved_epochs": 0, "lost_points": 11.46}
    ruled = [{"arms": {"": {"rules": {"Loss/val 1 0.2": rule}}}}] * 2
    row = ["`Loss/val`", "1", "0.2", "-, -", "2, 2", "0, 0", "11.46, 11.46"]
    assert cells(tables.rules_table(ruled, EN))[1] == row
    draws = {"scratch_10": {"draws": [40.0, 50.0]}}
    transfer = tables.transfer_table([{"lesson": "10", "arms": draws}] * 2, EN)
    assert cells(transfer) == [
        ["variant", "10 images per class"],
        ["`scratch`", "45.0 ± 5.8"],
    ]  # 40, 50, 40, 50
    splits = [{"arms": {"by_file": {"val_accuracy": val, "test_accuracy": 40.0}}} for val in [80.0, 82.0]]
    assert cells(tables.splits_table(splits, EN))[1] == ["`by_file`", "81.0 ± 1.4", "40.0 ± 0.0"]
    clipped = entry("09", 42, **{run: (float(i), 0.0) for i, run in enumerate(CLIPPING_RUNS)})
    rows = cells(tables.clipping_table([clipped], EN))[1:]
    assert [row[0] for row in rows] == [f"`{danger}`" for danger in tables.DANGERS]
    assert [float(cell) for row in rows for cell in row[1:]] == list(range(len(CLIPPING_RUNS)))


def test_table_of_times_shows_what_never_got_there():
    lesson = {"minutes": [4.0, None, 5.0], "epochs": [5, 6, 6], "accuracy": [75.1, 74.94, 75.3]}
    report = {"goal": 75.0, "ways": {"lesson": lesson | {"time_per_epoch": figures(2.0, 1.5, 2.5)}}}
    assert cells(tables.time_table(report)) == [
        ["way", "minutes to 75 %", "epochs", "accuracy after them", "time for an epoch (ratio)"],
        ["this course", "5.0 (4.0, -, 5.0)", "5, 6, 6", "75.10, 74.94, 75.30 %", "2.00 (1.50 - 2.50)"],
    ]


def trained(recipe, seed, best, last=None, lr=0.1, seconds=None):
    """Return a run as in docs/recipes.json, with what the tables need."""
    run = {"recipe": recipe, "lr": lr, "seed": seed, "best_accuracy": best, "last_accuracy": last}
    return run | {"seconds": seconds, "machine": MACHINE, "data": "JPEG copy of CIFAR-10"}


def test_tables_of_recipes():
    runs = [trained("lesson 05", 42, 81.0), trained("lesson 05", 43, 82.0)]
    runs += [trained("no warm-up", 42, 80.0), trained("no warm-up", 43, 80.5)]
    assert cells(tables.recipes_table(runs, EN)) == [
        ["recipe", "validation accuracy", "difference"],
        ["lesson 05", "81.50 ± 0.71", ""],
        ["no warm-up", "80.25 ± 0.35", "-1.25 ± 0.35"],  # seed by seed: -1 and -1.5
    ]
    groups = [trained("groups of 1", seed, None, last) for seed, last in [(42, 70.0), (43, 72.0), (44, 74.0)]]
    row = ["1", "72.00 %", "1.15", "70.00, 72.00, 74.00"]  # 2 / sqrt(3)
    assert cells(tables.group_size_table(groups, EN))[1] == row
    optimizers = [trained("AdamW, cosine", 42, 76.0, lr=lr, seconds=60) for lr in [0.001, 0.002]]
    optimizers.append(trained("AdamW, cosine", 43, 77.0, lr=0.002, seconds=70))
    assert cells(tables.optimizers_table(optimizers))[1:] == [
        ["AdamW, cosine", "0.001", "76.00", "42", "60 s"],
        ["AdamW, cosine", "0.002", "76.50 ± 0.71", "42, 43", "65 s"],
    ]


def test_tables_go_between_their_own_markers_in_the_guides_language(monkeypatch, tmp_path):
    (tmp_path / "docs").mkdir()
    other = MACHINE | {"processor": "Slide rule"}
    measured = [*ENTRIES, ENTRIES[0] | {"machine": other, "data": "JPEG copy of CIFAR-10"}]
    runs = [trained("lesson 05", 42, 81.0), trained("groups of 1", 42, 1, 2), trained("SGD, cosine", 42, 3)]
    common.write_json(tmp_path / "docs" / "results.json", measured)
    common.write_json(tmp_path / "docs" / "recipes.json", runs)
    guides = [tmp_path / "README.md", tmp_path / "README.zh-CN.md"]
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "GUIDES", guides)
    both = MACHINE_IN_WORDS + " / " + MACHINE_IN_WORDS.replace("Abacus", "Slide rule")
    end = "\n<!-- end of table -->\n"
    for name, written in {
        "schedulers": tables.variants_table(ENTRIES[3:6], EN) + end,
        "runs machine": f"Measured on {both}; data: random images, JPEG copy of CIFAR-10.",
        "recipes": tables.recipes_table(runs[:1], EN) + end,
        "optimizers": tables.optimizers_table(runs[2:]) + end,
        "time machine": "..." + end,  # not measured yet
    }.items():
        for guide in guides:
            guide.write_text(f"a\n<!-- table: {name} -->\n| old |{end}b\n<!-- table: splits -->{end}")
        tables.main()
        english, chinese = [guide.read_text(encoding="utf-8") for guide in guides]
        assert english.startswith(f"a\n<!-- table: {name} -->\n{written}")
        assert english.endswith(f"{end}b\n<!-- table: splits -->\n...{end}")
        assert (re.search("[一-鿿]", chinese) is not None) == (name != "time machine")
    assert sorted(tmp_path.glob("README*")) == guides, "no temporary file is left"


def test_every_table_of_the_guides_can_be_written_in_chinese():
    for name in tables.build_tables()[1]:
        tables.fill(f"<!-- table: {name} -->\n<!-- end of table -->", "zh")
    assert all(ZH(name) for name in recipes.RECIPES if not name.startswith("groups of"))


# recipes.py


@pytest.mark.parametrize(
    "number, recipe, variant",
    [("04", "SGD, cosine", "CosineAnnealingLR"), ("05", "lesson 05", "with_augmentation")],
)
def test_the_first_recipe_of_a_lesson_is_its_own(lessons, tmp_path, number, recipe, variant):
    lesson, recipe = lessons[number], recipes.RECIPES[recipe]
    args = lesson.parse_args(["--device", "cpu", "--data", "digits", "--output-dir", str(tmp_path)])
    assert [args.epochs, args.lr, args.batch_size] == [recipe["epochs"], recipe["lr"], recipe["batch_size"]]
    args.epochs, args.subset = 4, 64
    images, labels, class_names, _ = lesson.load_data("digits", None, train=True)
    train_set, val_set = lesson.split_train_val(images, labels, 42, args.subset)
    history = lesson.train(args, variant, train_set, val_set, class_names, tmp_path)
    recipe = recipe | {"epochs": 4, "subset": 64}
    accuracies = recipes.train(lessons["05"], recipe, images, labels, "digits", 42)
    assert accuracies == [row["Accuracy/val"] for row in history]


def test_a_recipe_trains_in_the_way_that_its_name_says(lessons, monkeypatch, tmp_path, capsys):
    """By what reaches the lesson's own loop: learning rates, batches, transforms. No run is repeated."""
    lesson, path = lessons["05"], tmp_path / "recipes.json"
    rates, epochs = [], []  # of every batch, of every epoch

    def spy(model, loader, loss_fn, optimizer, device, transform=None, group_size=None):
        for _ in loader:
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
        moves = [vars(one).get("p", vars(one).get("padding")) for one in getattr(transform, "transforms", [])]
        images = loader.dataset.tensors[0]
        epochs.append(
            (type(optimizer).__name__, len(loader), moves[:2], group_size, loss_fn.label_smoothing, images)
        )

    def run(*flags):
        rates.clear()
        epochs.clear()
        flags = [*flags, "--data", "digits", "--subset", "150", "--seeds", "1", "--epochs", "4"]
        recipes.main(["--json", str(path), "--recipes", *flags])
        return epochs[0] if epochs else None

    monkeypatch.setattr(lesson, "train_one_epoch", spy)
    monkeypatch.setattr(recipes, "load_lesson", lessons.get)
    cosine = np.array([(1 + np.cos(np.pi * t / 4)) / 2 for t in range(4)])
    warm = 0.1 * cosine * [1 / 3, 2 / 3, 1, 1]
    *own, plain = run("lesson 05")
    assert own == ["SGD", 2, [[2] * 4, 0.5], 16, 0.1] and rates[::2] == pytest.approx(warm)
    assert run("no warm-up") and rates[::2] == pytest.approx(0.1 * cosine)
    assert run("warm-up and linear decay") and rates[::2] == pytest.approx([0.1 / 3, 0.2 / 3, 0.05, 0.025])
    assert run("padding 4")[2] == [[4] * 4, 0.5] and run("rotation always")[2] == [[2] * 4, 1.0]
    assert run("batches of 64, half the learning rate")[1] == 3 and rates[::3] == pytest.approx(warm / 2)
    assert run("groups of 128")[3] == 128 and run("groups of 1")[3] == 1
    odd = run("alternating flips")[-1]
    assert torch.equal(odd, epochs[2][-1]) and torch.equal(odd.flip(3), epochs[1][-1]), "every image, in turn"
    assert 50 < sum(map(torch.equal, odd, plain.flip(3))) < 100, "half of them at a time"
    assert run("SGD, cosine")[:5] == ("SGD", 2, [], None, 0.0), "no augmentation, no label smoothing"
    assert run("AdamW, cosine", "--lr", "0.004", "0.001")[0] == "AdamW"
    assert rates[::2] == pytest.approx([*0.004 * cosine, *0.001 * cosine])
    assert run("SGD, one cycle", "--lr", "0.2") and len(set(rates)) == 8, "a step after every batch"
    assert rates[0] == pytest.approx(0.2 / 25) and 0.18 < max(rates) <= 0.2 and rates[-1] < 0.02
    assert "| SGD, one cycle | 0.2 |" in capsys.readouterr().out

    stored = common.read_json(path)
    assert len(stored) == 13 and [run["recipe"] for run in stored][:2] == ["SGD, cosine", "SGD, one cycle"]
    assert {run["lr"] for run in stored if run["recipe"] == "AdamW, cosine"} == {0.004, 0.001}
    assert all(0 <= run["last_accuracy"] <= run["best_accuracy"] <= 100 for run in stored)
    assert run("padding 4", "AdamW, cosine", "--lr", "0.1")[0] == "AdamW"
    assert len(epochs) == 4, "the new one alone"
    recorded = common.read_json(common.ROOT / "docs" / "recipes.json")
    assert {run["recipe"] for run in recorded} <= set(recipes.RECIPES)


# processes.py


def test_processes_are_measured_in_turn_against_the_threads_of_one(monkeypatch, tmp_path, capsys):
    asked, rates = [], iter([2000, 1500, 1000, 1000, 800, 600, 3000, 2100, 1200])
    monkeypatch.setattr(processes, "train", lambda *args: asked.append(args[:2]) or next(rates))
    processes.main(["--rounds", "3", "--json", str(tmp_path / "p.json"), "--data-name", "some images"])
    assert asked == [(1, 2), (2, 1), (1, 1)] * 3
    report = common.read_json(tmp_path / "p.json")
    assert report["data"] == "some images" and report["machine"] == common.describe_machine()
    assert report["images_per_second"]["2 x 1"] == figures(1500, 800, 2100)
    assert report["ratio"]["2 x 1"] == figures(0.75, 0.7, 0.8), "round by round"
    assert "| 2 | 1 | 1,500 (800 - 2,100) | 0.75 |" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 2])
def test_processes_are_those_of_torchrun_and_the_second_epoch_counts(lessons, monkeypatch, count):
    calls = []

    def start(command, env, **_):
        calls.append((command, env))
        folder = Path(command[command.index("--output-dir") + 1])
        history = [{"ImagesPerSecond": 1.0}, {"ImagesPerSecond": 7.0}]
        torch.save({"history": history}, folder / "latest_checkpoint.pth")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(processes.subprocess, "run", start)
    args = processes.build_parser().parse_args(["--launcher", "l.py", "--data", "digits", "--subset", "9"])
    assert processes.train(count, 3, args) == 7.0
    [(command, environment)] = calls
    assert environment["OMP_NUM_THREADS"] == "3"
    assert ("--nproc_per_node=2" in command) == ("torch.distributed.run" in command) == (count == 2)
    script, *flags = command[command.index("l.py") + 1 :]
    flags = lessons["12"].parse_args(flags)
    assert script == str(PATHS["12"])
    assert (flags.epochs, flags.subset, flags.data, str(flags.device)) == (2, 9, "digits", "cpu")


# time_to_accuracy.py


def test_ways_train_in_turn_until_each_has_reached_the_goal(monkeypatch):
    clock, calls = [0.0], []
    accuracies = {"lesson": iter([60.0, 75.0, 99.0]), "slow": iter([50.0, 70.0, 74.9])}

    def way(name, seconds):
        def run(rate):
            clock[0] += seconds
            calls.append((name, rate))
            return next(accuracies[name])

        return run

    monkeypatch.setattr(time_to_accuracy.time, "perf_counter", lambda: clock[0])
    ways = {"lesson": way("lesson", 30.0), "slow": way("slow", 90.0)}
    epochs = time_to_accuracy.train_in_turn(ways, [0.3, 0.2, 0.1], 75.0)
    assert calls == [("lesson", 0.3), ("slow", 0.3), ("lesson", 0.2), ("slow", 0.2), ("slow", 0.1)]
    assert epochs["lesson"] == [(30.0, 60.0), (30.0, 75.0)]
    summary = time_to_accuracy.summarize({42: epochs, 43: epochs}, 75.0)
    assert summary["lesson"]["minutes"] == [1.0, 1.0] and summary["slow"]["minutes"] == [None, None]
    assert summary["slow"]["epochs"] == [3, 3] and summary["slow"]["accuracy"] == [74.9, 74.9]
    assert summary["slow"]["time_per_epoch"] == figures(3.0, 3.0, 3.0)
    assert summary["slow"]["seconds_per_epoch"] == figures(90.0, 90.0, 90.0)


@pytest.mark.parametrize("way", ["lesson_way", "usual_way"])
def test_both_ways_train_at_the_rate_they_are_given_and_validate(lessons, monkeypatch, way):
    lesson, made, sgd = lessons["04"], [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **more: made.append(sgd(*args, **more)) or made[-1])
    images, labels, *_ = lesson.load_data("digits", None, train=True)
    splits = lesson.split_train_val(images, labels, 42, 80)
    run = getattr(time_to_accuracy, way)(lesson, 42, *splits)
    weights = made[0].param_groups[0]["params"]
    assert is_channels_last(weights[3]) == (way == "lesson_way")
    before = [weight.detach().clone() for weight in weights]
    run(0.0)
    assert all(map(torch.equal, before, weights)), "a rate of 0 moves nothing"
    accuracies = [run(0.05) for _ in range(4)]
    assert not any(map(torch.equal, before, weights))
    assert 15 < max(accuracies) <= 100 and all((accuracy * 80 / 100).is_integer() for accuracy in accuracies)


def test_time_to_accuracy_runs(lessons, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(time_to_accuracy.importlib.util, "find_spec", lambda name: None)
    flags = ["--data", "digits", "--subset", "64", "--epochs", "1", "--seeds", "1", "2", "--goal", "10"]
    time_to_accuracy.main([*flags, "--data-name", "digits", "--json", str(tmp_path / "t.json")])
    printed, report = capsys.readouterr().out, common.read_json(tmp_path / "t.json")
    assert "Keras is not installed" in printed and tables.time_table(report) in printed
    assert list(report["ways"]) == ["lesson", "usual way, pooling last"]
    assert (report["goal"], report["seeds"], report["data"]) == (10, [1, 2], "digits")
    rates = time_to_accuracy.learning_rates(lessons["04"], 4)
    assert rates == pytest.approx([0.05 * (1 + np.cos(np.pi * t / 4)) / 2 for t in range(4)])


# mistakes.py


@pytest.mark.parametrize("number", list(mistakes.MISTAKES))
def test_every_mistake_changes_its_lesson_in_one_place(number):
    """And what comes out is still a script. The file in docs/ holds each of them."""
    source = PATHS[number].read_text(encoding="utf-8")
    for mistake, change in mistakes.MISTAKES[number].items():
        changed = mistakes.with_mistake(source, *change)
        compile(changed, mistake, "exec")
        assert (changed == source) == (mistake == "none" or mistake.startswith("--"))
    with pytest.raises(ValueError, match="is not exactly once in the lesson"):
        mistakes.with_mistake(source, "import", "export")
    report = common.read_json(common.ROOT / "docs" / "mistakes.json")[number]
    assert report.pop("flags") == mistakes.FLAGS[number] and list(report) == list(mistakes.MISTAKES[number])


def test_curves_are_what_a_lesson_prints(lessons, finished):
    """Of lesson 01, which has no validation, and of lesson 05, which has variants."""
    found = mistakes.curves(finished("05").output)
    assert list(found) == list(lessons["05"].VARIANTS)
    for variant, printed in found.items():
        [run_dir] = (finished("05").folder / "tensor_board" / PATHS["05"].stem / variant).iterdir()
        drawn = common.read_scalars(run_dir)
        for curve, tag in {"train_loss": "Loss/train", "val_accuracy": "Accuracy/val"}.items():
            assert printed[curve] == pytest.approx([value for _, value in drawn[tag]], abs=0.0051), variant
    [(variant, printed)] = mistakes.curves(finished("01").output).items()
    assert variant == "" and list(printed) == ["train_loss", "train_accuracy"]


MISTAKEN = r"""
import sys
from pathlib import Path
with Path(__file__).with_name("calls.txt").open("a") as file:
    file.write(" ".join([Path(sys.argv[1]).name, *sys.argv[2:]]) + "\n")
forgets = "        optimizer.zero_grad()\n" not in Path(sys.argv[1]).read_text(encoding="utf-8")
for epoch in [1, 2]:
    print(f"Epoch  {epoch}/2 | train loss {epoch + forgets}.1234, acc {11 * epoch}.25 % | 9 s")
"""


def test_mistakes_are_made_in_a_copy_of_the_lesson(tmp_path):
    launcher, path = tmp_path / "launcher.py", tmp_path / "mistakes.json"
    launcher.write_text(MISTAKEN, encoding="utf-8")
    common.write_json(path, {"04": "kept"})
    source = PATHS["01"].read_bytes()
    flags = ["--lessons", "01", "--launcher", launcher, "--json", path, "--data-dir", tmp_path]
    mistakes.main(list(map(str, [*flags, "--data-name", "some photographs"])))
    assert PATHS["01"].read_bytes() == source
    report = common.read_json(path)
    assert report["data"] == "some photographs" and report["04"] == "kept"
    assert report["01"].pop("flags") == "--subset 5000 --epochs 5"
    for name in mistakes.MISTAKES["01"]:
        loss = [2.1234, 3.1234] if name == "no zero_grad" else [1.1234, 2.1234]
        assert report["01"].pop(name) == {"": {"train_loss": loss, "train_accuracy": [11.25, 22.25]}}
    calls = read_lines(tmp_path / "calls.txt")
    assert len(calls) == 5 and all(call.startswith("01_basic_training.py --subset 5000") for call in calls)
    assert [call for call in calls if "--lr 0.0005" in call] == calls[-1:]
    launcher.write_text("import sys; sys.exit('no photographs')", encoding="utf-8")
    with pytest.raises(SystemExit, match="with the mistake 'none' failed:\nno photographs"):
        mistakes.main(list(map(str, flags)))
    assert common.read_json(path)["04"] == "kept"


# tests/mutants.py


def test_a_mutant_changes_one_place_in_all_lessons_that_have_the_function():
    found = mutants.find_mutants(["02"])
    names = {name: texts for name, texts, _ in found}
    assert len(names) > 100 and "evaluate: model.eval()  ->  ..." in names
    assert any(name.startswith("normalize") and {"01", "06"} <= texts.keys() for name, texts in names.items())
    for name, texts, new in found[::10]:
        for number, old in texts.items():
            source = PATHS[number].read_text(encoding="utf-8")
            changed = source.replace(old, new)
            assert changed != source and compile(changed, name, "exec")
