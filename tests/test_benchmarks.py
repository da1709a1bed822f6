"""src/benchmarks/: every number is of what its name says, and of the lessons' own training."""

import re
from types import SimpleNamespace

import common
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
from conftest import NUMBERS, PATHS, TINY, run_lesson
from torch import nn
from torch.utils.data import RandomSampler
from torch.utils.tensorboard import SummaryWriter

IMAGES = torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(200) % 10
MACHINE = {"processor": "Abacus", "cores": 7, "instructions": "BEADS", "threads": 3, "system": "Wood"}
MACHINE |= {"python": "3.1", "torch": "4.1", "torchvision": "5.9"}
CLIPPING_RUNS = [tables.clipping_run(d, remedy) for d in tables.DANGERS for remedy in tables.REMEDIES]
EN = tables.words("en")
# Runs in place of a lesson: notes its arguments, and prints a larger loss if the lesson forgets zero_grad().
LAUNCHER = r"""
import sys
from pathlib import Path
with Path(__file__).with_name("calls.txt").open("a") as file:
    print(*sys.argv[1:], file=file)
forgets = "optimizer.zero_grad()" not in Path(sys.argv[1]).read_text(encoding="utf-8")
for epoch in [1, 2]:
    print(f"Epoch  {epoch}/2 | train loss {epoch + forgets}.1234, acc {40.5 * epoch} % | 9 s")
sys.exit("no photographs" if "44" in sys.argv else 0)
"""


@pytest.fixture
def launch(tmp_path):
    """A function that runs main() of a benchmark with the launcher, and returns all calls until then."""
    (tmp_path / "launcher.py").write_text(LAUNCHER, encoding="utf-8")

    def run(script, *flags):
        script.main(["--launcher", str(tmp_path / "launcher.py"), *map(str, flags)])
        return (tmp_path / "calls.txt").read_text(encoding="utf-8").splitlines()

    return run


def figures(median, least, greatest):
    """Return three numbers as the benchmarks write them."""
    return {"median": median, "min": least, "max": greatest}


# throughput.py


def test_tasks_are_timed_in_turn_and_the_first_round_does_not_count(monkeypatch):
    durations = {"one": [100, 1, 9, 2], "other": [200, 3, 5, 4]}
    clock, calls = [0], []

    def work(name):
        clock[0] += durations[name][calls.count(name)]
        calls.append(name)

    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    seconds = common.measure({"one": lambda: work("one"), "other": lambda: work("other")}, rounds=3)
    assert calls == ["one", "other"] * 4
    assert [common.spread(values) for values in seconds.values()] == [figures(2, 1, 9), figures(4, 3, 5)]


def test_every_way_trains_as_its_name_says(lessons, monkeypatch):
    """By what reaches train_one_epoch() of a lesson, or train_batches()."""
    *on_pictures, erasing = augmentation = lessons["05"].AUGMENTATION
    plain, augmented = throughput.TO_TENSOR, [*on_pictures, *throughput.TO_TENSOR, erasing]
    monkeypatch.setattr(throughput, "load_lesson", lessons.get)
    monkeypatch.setattr(throughput, "train_batches", lambda *args: (args[0], args[2], args[1]))
    for number in ["02", "05"]:
        monkeypatch.setattr(lessons[number], "train_one_epoch", lambda *args: (*args[:2], *args[3:]))
    *tasks, _ = throughput.build_tasks(IMAGES, LABELS).items()
    for name, task in tasks:
        model, loader, optimizer, *others = task()
        is_usual = "usual way" in name
        assert model.conv2.weight.is_contiguous() == is_usual, "the lessons' is channels-last"
        assert (type(model).__name__ == "SimpleCNN") == ("pooling last" not in name)
        assert type(optimizer) is torch.optim.SGD and optimizer.param_groups[0]["momentum"] == 0.9
        if name == "ceiling: ready-made batches":
            images, labels = map(torch.cat, zip(*loader, strict=True))
            assert torch.equal(images, lessons["05"].normalize(IMAGES)) and torch.equal(labels, LABELS)
            assert [len(labels) for _, labels in loader] == [128, 72]
            continue
        assert (loader.batch_size, type(loader.sampler), len(loader.dataset)) == (128, RandomSampler, 200)
        assert loader.num_workers == (2 if "workers" in name else 0)
        if is_usual:
            assert loader.dataset.transform.transforms == (augmented if "augmented" in name else plain)
        elif "augmented" in name:
            assert others[1].transforms == augmentation and others[2] == 16


def test_the_usual_way_trains_on_the_same_numbers_and_pools_last(lessons):
    dataset = throughput.InMemoryCIFAR10(IMAGES, LABELS)
    images = torch.stack([dataset[i][0] for i in range(4)]).as_subclass(torch.Tensor)
    torch.testing.assert_close(images, lessons["02"].normalize(IMAGES[:4]))
    model, blocks = throughput.make_pooling_last(lessons["02"]), []
    for conv, bn in [(model.conv1, model.bn1), (model.conv2, model.bn2), (model.conv3, model.bn3)]:
        blocks += [conv, bn, nn.ReLU(), nn.MaxPool2d(2)]
    expected = nn.Sequential(*blocks, nn.Flatten(), model.fc1, nn.ReLU(), model.fc2)(images)
    torch.testing.assert_close(model(images), expected)


RATIOS = {  # name: (whose time is above the line, whose is below it); half the time is twice the speed
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


def test_rates_and_ratios_come_from_the_times():
    # A convolution takes 2 operations for each weight and output position, and again for each gradient: by the
    # weights and by the inputs, but nobody needs the gradient of the images.
    conv1, conv2, conv3 = 27 * 32 * 32 * 32, 288 * 64 * 16 * 16, 576 * 128 * 8 * 8
    operations = 6 * (conv1 + conv2 + conv3 + 2048 * 256 + 256 * 10) - 2 * conv1
    names = sorted({name for pair in RATIOS.values() for name in pair}) + ["matrix multiplication"]
    seconds = dict(zip(names, np.random.default_rng(0).uniform(1, 9, size=(9, 3)), strict=True))
    report = throughput.compare(seconds, images=600)

    def of_rounds(values):  # of three numbers; the median is the second
        least, median, greatest = sorted(values)
        return pytest.approx(figures(median, least, greatest))

    matrix_rates = 10 * 2 * 2048**3 / seconds.pop("matrix multiplication")
    assert report["operations_per_image"] == operations
    assert report["matrix_operations_per_second"] == of_rounds(matrix_rates)
    for name in seconds:
        rates = 600 / seconds[name]
        assert report["images_per_second"][name] == of_rounds(rates)
        assert report["share_of_arithmetic_limit"][name] == of_rounds(rates * operations / matrix_rates)
    assert list(report["ratios"]) == list(RATIOS)
    for name, (above, below) in RATIOS.items():
        assert report["ratios"][name] == of_rounds(seconds[above] / seconds[below]), name


def test_throughput_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(throughput, "MATRIX_SIZE", 64)
    throughput.main(["--rounds", "1", "--images", "16", "--json", str(tmp_path / "t.json")])
    report, printed = common.read_json(tmp_path / "t.json"), capsys.readouterr().out
    assert report["data"] == "random images" and report["machine"].keys() == MACHINE.keys()
    assert tables.throughput_table(report) in printed and tables.ratios_table(report) in printed


# results.py


def write_run(folder, variant, accuracies, gaps, first_epoch=1):
    """Write a TensorBoard run as the lessons do, with these curves, and an empty output."""
    (folder / "output.txt").touch()
    run_dir = folder / "tensor_board" / "00_a_lesson" / variant / "20261128-024000"
    with SummaryWriter(run_dir, purge_step=first_epoch) as writer:
        for epoch, (accuracy, gap) in enumerate(zip(accuracies, gaps, strict=True), start=first_epoch):
            writer.add_scalar("Accuracy/val", accuracy, epoch)
            writer.add_scalar("Overfitting/accuracy_gap", gap, epoch)


def test_results_are_the_best_accuracy_and_the_last_gap_of_every_variant(tmp_path):
    write_run(tmp_path, "StepLR", [80, 70], [1, 2])
    write_run(tmp_path, "Constant", [50, 75, 99], [1, 2, 3])
    write_run(tmp_path, "Constant", [75, 60], [4, 5], first_epoch=3)  # resumed: the third was not saved
    assert results.collect("04", tmp_path) == {
        "StepLR": {"val_accuracy": 80, "best_epoch": 1, "epochs": 2, "gap": 2},
        "Constant": {"val_accuracy": 75, "best_epoch": 2, "epochs": 4, "gap": 5},
    }
    assert results.collect("09", tmp_path)["StepLR"]["val_accuracy"] == 70, "of lesson 09, the last epoch"


PRINTED = {  # in the output of a run, with the numbers that are collected from it
    "01": "acc {train_accuracy:5.2f} % | ",
    "02": "Best validation accuracy: {val_accuracy:.2f} % in epoch {best_epoch}",
    "05": "  {variant:20} training {train:.2f} %, validation {val_accuracy:.2f} %, gap {gap:5.2f} points",
    "06": "accuracy {test_accuracy:.2f} % (95 %",
    "11": "  {variant:8} {val_accuracy:10.2f} % {test_accuracy:17.2f} %",
}


@pytest.mark.parametrize("number", NUMBERS)
def test_the_lessons_print_and_write_what_is_collected(lessons, no_pictures, tmp_path, number):
    output = run_lesson(lessons[number], tmp_path, *TINY[number])
    (tmp_path / "output.txt").write_text(output, encoding="utf-8")
    found = results.collect(number, tmp_path)
    expected = {"04": lessons["04"].SCHEDULERS, "05": list(lessons["05"].VARIANTS)}
    expected |= {"07": ["float32", "bfloat16"], "11": ["by_file", "by_group"]}
    expected["09"] = [run for run in CLIPPING_RUNS if re.match("none|images_of_nan|BatchNorm_lr", run)]
    expected["10"] = [f"{variant}_4" for variant in lessons["10"].VARIANTS["simplecnn"]]
    assert sorted(found) == sorted(expected.get(number, [""]))
    for variant, metrics in found.items():
        train = metrics.get("val_accuracy", 0) + metrics.get("gap", 0)
        assert PRINTED.get(number, "").format(variant=variant, train=train, **metrics) in output
    for variant, curves in mistakes.curves(output).items() if number in mistakes.MISTAKES else []:
        for curve in {"train_accuracy", "val_accuracy"} & found[variant].keys():
            assert curves[curve] == pytest.approx([found[variant][curve]], abs=0.0051)
    resumable = "--resume" in PATHS[number].read_text(encoding="utf-8")
    assert results.can_resume(PATHS[number].stem, tmp_path) == resumable


def test_the_rules_of_lesson_08_are_collected(lessons, tmp_path, capsys):
    accuracies = [50.0, 70.0, 69.5, 70.1, 70.0, 70.0, 70.0]
    write_run(tmp_path, "", accuracies, accuracies)
    history = [{"Accuracy/val": value, "Loss/val": -value} for value in accuracies]
    lessons["08"].print_rules(history, epochs=30)
    (tmp_path / "output.txt").write_text(capsys.readouterr().out)
    rules = results.collect("08", tmp_path)[""]["rules"]
    assert list(rules) == [f"{metric} {n} {delta}" for metric, _, n, delta in lessons["08"].RULES]
    stopped = {"stops_after": 3, "best_epoch": 2, "saved_epochs": 27, "lost_points": 0.1}
    assert rules["Accuracy/val 1 0.0"] == rules["Loss/val 1 0.0"] == stopped
    never = {"stops_after": None, "best_epoch": 4, "saved_epochs": 0, "lost_points": 0.0}
    assert rules["Accuracy/val 5 0.0"] == never


def test_results_are_kept_and_not_run_again(launch, monkeypatch, tmp_path):
    times = iter([5.0, 95.04, *range(9)])
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(results, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    flags = ["--lessons", "01", "--work-dir", tmp_path / "work", "--data-name", "some photographs"]
    folder = tmp_path / "work" / "01_basic_training_seed_42"
    [call] = launch(results, *flags, "--data-dir", "photos")
    assert call == f"{PATHS['01']} --seed 42 --output-dir {folder} --data cifar10 --data-dir photos"
    [entry] = common.read_json(results.RESULTS)
    assert 1e7 < (entry.pop("peak_memory_bytes") or 1e8) < 1e11  # bytes, not kilobytes; none on Windows
    expected = {"lesson": "01", "seed": 42, "data": "some photographs", "machine": common.describe_machine()}
    assert entry == expected | {"seconds": 90.0, "arms": {"": {"train_accuracy": 81.0}}}
    assert len(launch(results, *flags)) == 1, "it ran again"
    assert "--seed 43 " in launch(results, *flags, "--first-seed", 43, "--untimed")[1]
    with pytest.raises(SystemExit, match="01_basic_training.py failed: see .*output.txt"):
        launch(results, *flags, "--first-seed", 44)
    entries = [(entry["seed"], entry["seconds"]) for entry in common.read_json(results.RESULTS)]
    assert entries == [(42, 90.0), (43, None)], "a failed run is no result"


@pytest.mark.parametrize("name", ["latest_checkpoint.pth", "other.pth"])
def test_a_stopped_run_resumes_from_its_checkpoint_if_it_has_one(launch, monkeypatch, tmp_path, name):
    checkpoints = tmp_path / "08_early_stopping_seed_42" / "artifacts" / "checkpoints"
    checkpoint = checkpoints / "08_early_stopping" / name
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(results, "SEEDS", {"08": 1})
    monkeypatch.setattr(results, "collect", lambda number, folder: {})
    [call] = launch(results, "--lessons", "08", "--work-dir", tmp_path)
    assert " --run-all-epochs" in call, "its rules need them"
    resumed = name == "latest_checkpoint.pth"
    assert call.endswith(" --resume") == checkpoint.exists() == resumed
    [entry] = common.read_json(results.RESULTS)
    assert (entry["seconds"] is None) == resumed, "of a resumed run only a part was timed"


# tables.py


def cells(text):
    """Return the rows of a Markdown table as lists of cells, without the line under the header."""
    header, line, *rows = [row[2:-2].split(" | ") for row in text.splitlines()]
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
    entry("04", 42, 700.0, worse=(77.7, 1.0), near=(78.0, 2.0), first=(79.0, 9.0)),
    entry("04", 43, 860.0, worse=(77.7, 1.0), near=(78.0, 4.0), first=(80.0, 9.0)),
    entry("04", 44, 900.0, worse=(80.7, 1.0), near=(81.0, 6.0), first=(81.0, 9.0)),
    entry("01", 42, None, None) | {"arms": {"": {"train_accuracy": 86.33}}},
    entry("06", 42, 100.0) | {"arms": {"": {"val_accuracy": 82.0, "test_accuracy": 81.5}}},
]


def test_table_of_runs():
    assert cells(tables.runs_table(ENTRIES, EN)) == [
        ["lesson", "accuracy", "gap", "time", "peak memory", "seeds"],
        ["01", "86.3 % on training images", "-", "-", "-", "42"],
        # The times are 50 and 99 s, and one unknown; the memory is the largest of the three.
        ["02", "75.0 ± 1.0 % on validation images", "22.0 ± 2.0", "74 s", "1.50 GB", "42, 43, 44"],
        ["04", "80.0 ± 1.0 % on validation images, first", "-", "14 min", "1.50 GB", "42, 43, 44"],
        ["06", "81.5 % on test images", "-", "2 min", "1.50 GB", "42"],
    ]


def test_table_of_variants_compares_seed_by_seed():
    assert cells(tables.variants_table(tables.pick(ENTRIES, "04"), EN)) == [
        ["schedule", "validation accuracy", "gap", "behind the first"],
        ["`first`", "80.00 ± 1.00", "9.0 ± 0.0", ""],
        # Behind by 1, 2 and 0: two standard errors are 2 * 1 / sqrt(3) = 1.15 points.
        ["`near`", "79.00 ± 1.73", "4.0 ± 2.0", "1.00 ± 1.00, not distinguishable"],
        ["`worse`", "78.70 ± 1.73", "1.0 ± 0.0", "1.30 ± 1.00"],
    ]


def test_tables_of_lessons_with_metrics_of_their_own():
    rule = {"stops_after": None, "best_epoch": 2, "saved_epochs": 0, "lost_points": 11.46}
    ruled = [
        {"arms": {"": {"rules": {"Loss/val 1 0.2": rule | {"stops_after": stop}}}}} for stop in [None, 9]
    ]
    row = ["`Loss/val`", "1", "0.2", "-, 9", "2, 2", "0, 0", "11.46, 11.46"]
    assert cells(tables.rules_table(ruled, EN))[1] == row
    arms = {f"scratch_{count}": {"draws": [count, count + 10.0]} for count in [10, 50]}
    assert cells(tables.transfer_table([{"arms": arms}] * 2, EN)) == [
        ["variant", "10 images per class", "50 images per class"],
        ["`scratch`", "15.0 ± 5.8", "55.0 ± 5.8"],  # over the draws of both seeds: 10, 20, 10, 20
    ]
    splits = [{"arms": {"by_file": {"val_accuracy": val, "test_accuracy": 40.0}}} for val in [80.0, 82.0]]
    assert cells(tables.splits_table(splits, EN))[1] == ["`by_file`", "81.0 ± 1.4", "40.0 ± 0.0"]
    clipped = entry("09", 42, **{run: (float(i), 0.0) for i, run in enumerate(CLIPPING_RUNS)})
    rows = cells(tables.clipping_table([clipped], EN))[1:]
    assert [row[0] for row in rows] == [f"`{danger}`" for danger in common.load_lesson("09").DANGERS]
    assert [float(cell) for row in rows for cell in row[1:]] == list(range(len(CLIPPING_RUNS)))


def test_table_of_times_shows_what_never_got_there():
    lesson = {"minutes": [4.0, None, 5.0], "epochs": [5, 6, 6], "accuracy": [75.1, 74.94, 75.3]}
    report = {"goal": 75.0, "ways": {"lesson": lesson | {"time_per_epoch": figures(2.0, 1.5, 2.5)}}}
    assert cells(tables.time_table(report)) == [
        ["way", "minutes to 75 %", "epochs", "accuracy after them", "time for an epoch (ratio)"],
        ["this course", "5.0 (4.0, -, 5.0)", "5, 6, 6", "75.10, 74.94, 75.30 %", "2.00 (1.50 - 2.50)"],
    ]


def test_tables_of_recipes():
    def runs(name, values, metric="best_accuracy"):
        return [{"recipe": name, "lr": 0.1, "seed": seed, metric: value} for seed, value in enumerate(values)]

    assert cells(tables.recipes_table(runs("lesson 05", [81, 82]) + runs("no warm-up", [80, 80.5]), EN)) == [
        ["recipe", "validation accuracy", "difference"],
        ["lesson 05", "81.50 ± 0.71", ""],
        ["no warm-up", "80.25 ± 0.35", "-1.25 ± 0.35"],  # seed by seed: -1 and -1.5
    ]
    groups = tables.group_size_table(runs("groups of 1", [70, 72, 74], "last_accuracy"), EN)
    assert cells(groups)[1] == ["1", "72.00 %", "1.15", "70.00, 72.00, 74.00"]  # 2 / sqrt(3)


def test_tables_go_between_their_own_markers_in_the_guides_language(monkeypatch, tmp_path):
    (tmp_path / "docs").mkdir()
    slide_rule = ENTRIES[0] | {"machine": MACHINE | {"processor": "Slide rule"}, "data": "CIFAR-10"}
    common.write_json(tmp_path / "docs" / "results.json", [*ENTRIES, slide_rule])
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    machine = "Abacus, 7 cores, BEADS, Wood, Python 3.1, torch 4.1, torchvision 5.9"
    machines = f"{machine} / {machine.replace('Abacus', 'Slide rule')}"
    seeds = " Of several seeds, mean ± standard deviation is shown."
    en = f"Measured on {machines}; data: random images, CIFAR-10.{seeds}"
    zh = f"测量环境：{machines}；数据：随机图片，CIFAR-10。有多个种子时，给出平均值 ± 标准差。"
    row = "| 02_a | 74 s | 75.2 ± 1.0 % on validation images |"
    for name, *contents in [
        ("machine 02", en, zh),
        ("lessons", row, row.replace(" s ", " 秒 ").replace(" % on validation images", "%（验证集）")),
        ("time machine", "...", "..."),  # not measured yet
    ]:
        text = f"a\n<!-- table: {name} -->\n{{}}\n<!-- end of table -->\nb\n"
        for language, written in zip(["en", "zh"], contents, strict=True):
            assert tables.fill(text.format("| 02_a | - | - |"), language) == text.format(written)


# recipes.py and time_to_accuracy.py


@pytest.mark.parametrize("number, recipe", [("04", "SGD, cosine"), ("05", "lesson 05")])
def test_what_is_compared_with_a_lesson_begins_with_its_own_training(lessons, tmp_path, number, recipe):
    """The first recipe of lessons 04 and 05, and lesson 04's way in time_to_accuracy.py: bit for bit."""
    lesson, recipe = lessons[number], recipes.RECIPES[recipe]
    variant = {"04": "CosineAnnealingLR", "05": "with_augmentation"}[number]
    args = lesson.parse_args(["--device", "cpu", "--data", "digits", "--output-dir", str(tmp_path)])
    assert [args.epochs, args.lr, args.batch_size] == [recipe["epochs"], recipe["lr"], recipe["batch_size"]]
    args.epochs = 4
    images, labels, class_names, _ = lesson.load_data("digits", None, train=True)
    splits = lesson.split_train_val(images, labels, args.seed, 64)
    accuracies = [row["Accuracy/val"] for row in lesson.train(args, variant, *splits, class_names, tmp_path)]
    recipe = recipe | {"epochs": 4, "subset": 64}
    assert recipes.train(lessons["05"], recipe, images, labels, "digits", args.seed) == accuracies
    if number == "04":
        way = time_to_accuracy.lesson_way(lesson, args.seed, *splits)
        assert [way(rate) for rate in time_to_accuracy.learning_rates(lesson, 4)] == accuracies


def test_a_recipe_trains_in_the_way_that_its_name_says(lessons, monkeypatch):
    """By what reaches the lesson's own loop: learning rates, batches, transforms."""
    lesson, epochs = lessons["05"], []

    def spy(model, loader, loss_fn, optimizer, device, transform=None, group_size=None):
        rates = []
        for _ in loader:
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
        moves = [vars(one).get("p", vars(one).get("padding")) for one in getattr(transform, "transforms", [])]
        settings = [type(optimizer).__name__, len(loader), *moves[:2], group_size, loss_fn.label_smoothing]
        epochs.append(SimpleNamespace(settings=settings, rates=rates, images=loader.dataset.tensors[0]))

    def train(name):
        epochs.clear()
        recipes.train(lesson, recipes.RECIPES[name] | {"subset": 150, "epochs": 4}, *data, "digits", 1)
        return [epoch.rates[0] for epoch in epochs], epochs[0].settings

    data = lesson.load_data("digits", None, train=True)[:2]
    monkeypatch.setattr(lesson, "train_one_epoch", spy)
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (0.0, 0.0))
    cosine = np.array([(1 + np.cos(np.pi * t / 4)) / 2 for t in range(4)])
    warm, own = cosine * [1 / 3, 2 / 3, 1, 1], ["SGD", 2, [2] * 4, 0.5, 16, 0.1]
    for name, rates, settings in [
        ("lesson 05", 0.1 * warm, own),
        ("no warm-up", 0.1 * cosine, own),
        ("warm-up and linear decay", [0.1 / 3, 0.2 / 3, 0.05, 0.025], own),
        ("padding 4", 0.1 * warm, ["SGD", 2, [4] * 4, 0.5, 16, 0.1]),
        ("rotation always", 0.1 * warm, ["SGD", 2, [2] * 4, 1.0, 16, 0.1]),
        ("batches of 64, half the learning rate", 0.05 * warm, ["SGD", 3, *own[2:]]),
        ("groups of 128", 0.1 * warm, ["SGD", 2, [2] * 4, 0.5, 128, 0.1]),
        ("SGD, cosine", 0.05 * cosine, ["SGD", 2, None, 0.0]),
        ("AdamW, cosine", 0.001 * cosine, ["AdamW", 2, None, 0.0]),
    ]:
        assert train(name) == (pytest.approx(list(rates)), settings), name
    plain = epochs[0].images
    assert train("alternating flips")[1] == own
    first, second, third = [epoch.images for epoch in epochs[:3]]
    assert torch.equal(first, third) and torch.equal(first.flip(3), second), "every image, in turn"
    assert 50 < sum(map(torch.equal, first, plain.flip(3))) < 100, "half of them at a time"
    train("SGD, one cycle")
    rates = [rate for epoch in epochs for rate in epoch.rates]
    assert len(set(rates)) == 8 and 0.09 < max(rates) <= 0.1 and rates[-1] < 0.01, "a step after every batch"


def test_runs_of_recipes_are_kept_and_not_repeated(monkeypatch, tmp_path, capsys):
    seen, path = [], tmp_path / "recipes.json"

    def train(lesson, recipe, images, labels, data, seed):
        seen.append((recipe["lr"], recipe["epochs"], seed))
        return [50.0, 70.0, 60.0]

    monkeypatch.setattr(recipes, "train", train)
    flags = ["--data", "digits", "--epochs", "3", "--untimed", "--json", str(path), "--recipes", "no warm-up"]
    recipes.main([*flags, "--seeds", "1", "2"])
    recipes.main([*flags, "AdamW, cosine", "--seeds", "1", "--lr", "0.1", "0.3"])
    assert seen == [(0.1, 3, 1), (0.1, 3, 2), (0.3, 3, 1), (0.1, 3, 1), (0.3, 3, 1)]
    assert "| AdamW, cosine | 0.3 | 70.00 | 1 |" in capsys.readouterr().out
    runs = [("AdamW, cosine", 0.1, 1), ("AdamW, cosine", 0.3, 1)]
    runs += [("no warm-up", lr, seed) for lr, seed in [(0.1, 1), (0.1, 2), (0.3, 1)]]
    assert [(run["recipe"], run["lr"], run["seed"]) for run in common.read_json(path)] == runs
    assert all((run["best_accuracy"], run["last_accuracy"]) == (70, 60) for run in common.read_json(path))


def test_ways_train_in_turn_until_each_has_reached_the_goal(monkeypatch):
    clock, calls = [0.0], []
    accuracies = {"lesson": iter([60.0, 75.0, 99.0]), "slow": iter([50.0, 70.0, 74.9])}

    def train(name, seconds, rate):
        clock[0] += seconds
        calls.append((name, rate))
        return next(accuracies[name])

    monkeypatch.setattr(time_to_accuracy.time, "perf_counter", lambda: clock[0])
    ways = {"lesson": lambda rate: train("lesson", 30, rate), "slow": lambda rate: train("slow", 90, rate)}
    epochs = time_to_accuracy.train_in_turn(ways, [0.3, 0.2, 0.1], 75.0)
    assert calls == [("lesson", 0.3), ("slow", 0.3), ("lesson", 0.2), ("slow", 0.2), ("slow", 0.1)]
    summary = time_to_accuracy.summarize({42: epochs, 43: epochs}, 75.0)
    assert summary["lesson"]["minutes"] == [1.0, 1.0]
    slow = {"minutes": [None, None], "epochs": [3, 3], "accuracy": [74.9, 74.9]}
    slow |= {"seconds_per_epoch": figures(90, 90, 90), "time_per_epoch": figures(3, 3, 3)}
    assert summary["slow"] == slow


def test_time_to_accuracy_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(time_to_accuracy.importlib.util, "find_spec", lambda name: None)
    flags = ["--data", "digits", "--subset", "200", "--epochs", "2", "--seeds", "1", "--goal", "101"]
    time_to_accuracy.main([*flags, "--data-name", "digits", "--json", str(tmp_path / "t.json")])
    printed, report = capsys.readouterr().out, common.read_json(tmp_path / "t.json")
    assert "Keras is not installed" in printed and tables.time_table(report) in printed
    assert (report["goal"], report["seeds"], report["data"]) == (101, [1], "digits")
    for way in ["lesson", "usual way, pooling last"]:
        [accuracy] = report["ways"][way]["accuracy"]
        assert accuracy > 20 and (accuracy * 200 / 100).is_integer(), "in percent, better than guessing"


# processes.py


def test_processes_are_measured_in_turn_against_the_threads_of_one(lessons, monkeypatch, tmp_path, capsys):
    calls, rates = [], iter([2000.0, 1500.0, 1000.0, 1000.0, 800.0, 600.0, 3000.0, 2100.0, 1200.0])

    def start(command, env, **_):
        """Note how many processes and threads there would be, and what lesson 12 would do."""
        processes = 2 if "--nproc_per_node=2" in command else 1
        calls.append((processes, int(env["OMP_NUM_THREADS"])))
        args = lessons["12"].parse_args(map(str, command[command.index(PATHS["12"]) + 1 :]))
        assert (args.epochs, args.subset, args.data, args.device) == (2, 9, "digits", "cpu")
        history = [{"ImagesPerSecond": 1.0}, {"ImagesPerSecond": next(rates)}]  # the second epoch counts
        torch.save({"history": history}, args.output_dir / "latest_checkpoint.pth")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(processes.subprocess, "run", start)
    path, flags = tmp_path / "p.json", ["--rounds", "3", "--subset", "9", "--data", "digits"]
    processes.main([*flags, "--data-name", "some images", "--json", str(path)])
    assert calls == [(1, 2), (2, 1), (1, 1)] * 3
    report = common.read_json(path)
    assert report["data"] == "some images" and report["machine"] == common.describe_machine()
    assert report["images_per_second"]["2 x 1"] == figures(1500, 800, 2100)
    assert report["ratio"]["2 x 1"] == figures(0.75, 0.7, 0.8), "round by round"
    assert "| 2 | 1 | 1,500 (800 - 2,100) | 0.75 |" in capsys.readouterr().out


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


def test_mistakes_are_made_in_a_copy_of_the_lesson(launch, tmp_path):
    path, source = tmp_path / "mistakes.json", PATHS["01"].read_bytes()
    common.write_json(path, {"04": "kept"})
    flags = ["--lessons", "01", "--json", path, "--data-name", "some photographs"]
    calls = launch(mistakes, *flags)
    assert PATHS["01"].read_bytes() == source
    report = common.read_json(path)
    assert (report["data"], report["seed"], report["04"]) == ("some photographs", 42, "kept")
    for name in mistakes.MISTAKES["01"]:
        loss = [2.1234, 3.1234] if name == "no zero_grad" else [1.1234, 2.1234]
        assert report["01"][name] == {"": {"train_loss": loss, "train_accuracy": [40.5, 81.0]}}
    assert len(calls) == 5 and " --subset 5000 --epochs 5 --seed 42 " in calls[0]
    assert " --subset 5000 --epochs 5 --lr 0.0005 --seed 42 " in calls[-1]
    with pytest.raises(SystemExit, match="with the mistake 'none' failed:\nno photographs"):
        launch(mistakes, *flags, "--data", "44")
