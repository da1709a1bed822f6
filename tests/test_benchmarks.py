"""src/benchmarks/: the figures are of what they say, and what is measured is really the lessons' own training."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import common
import group_size
import numpy as np
import pytest
import results
import tables
import throughput
import torch

ROOT = Path(__file__).resolve().parents[1]
TASKS = ["lesson", "lesson, augmented", "ceiling: ready-made batches", "usual way", "usual way, 2 workers"]
TASKS += ["usual way, pooling last", "usual way, augmented", "usual way, augmented, 2 workers"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One small run of throughput.py: what it printed, its figures, and its output folder."""
    folder = tmp_path_factory.mktemp("throughput")
    flags = ["--rounds", "2", "--images", "256", "--sizes", "128", "256"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        throughput.main([*flags, "--output-dir", str(folder), "--json", str(folder / "t.json")])
    figures = json.loads((folder / "t.json").read_text(encoding="utf-8"))
    return SimpleNamespace(output=output.getvalue(), figures=figures, folder=folder)


def test_throughput_writes_every_figure_and_the_picture(report):
    assert list(report.figures["images_per_second"]) == TASKS
    assert list(report.figures["time_per_image_by_size"]) == ["128", "256"]
    assert report.figures["time_per_image_by_size"]["128"] == {"median": 1, "min": 1, "max": 1}
    assert report.figures["machine"]["torch"] == torch.__version__.split("+")[0]
    assert (report.folder / "artifacts" / "throughput.png").stat().st_size > 10_000
    if sys.platform != "win32":
        assert 1e8 < report.figures["peak_memory_bytes"] < 1e10  # bytes, not kilobytes


def test_throughput_prints_what_it_writes(report):
    for name, figures in report.figures["images_per_second"].items():
        assert f"  {name:32} " in report.output
        assert f"{figures['median']:,.0f} ({figures['min']:,.0f} to {figures['max']:,.0f})" in report.output
    for name in report.figures["ratios"]:
        assert name in report.output


def test_rates_and_ratios_come_from_the_times():
    seconds = {name: np.array([2.0, 4.0, 3.0]) for name in TASKS} | {
        "matrix multiplication": np.array([1.0, 1.0, 2.0])
    }
    seconds["lesson"] = np.array([1.0, 1.0, 3.0])
    figures = throughput.compare(seconds, 600)
    assert figures["images_per_second"]["lesson"] == {"median": 600, "min": 200, "max": 600}
    # 2 / 1, 4 / 1 and 3 / 3, round by round; the ratio of the medians, 3 / 1, would be another figure.
    assert figures["ratios"]["speed: lesson / usual way"] == {"median": 2, "min": 1, "max": 4}
    assert figures["ratios"]["time, lesson: augmented / plain"] == {"median": 2, "min": 1, "max": 4}
    matrix_rate = throughput.MATRICES_PER_TASK * 2 * throughput.MATRIX_SIZE**3
    assert figures["matrix_operations_per_second"]["max"] == matrix_rate
    share = 600 * figures["operations_per_image"] / matrix_rate
    assert figures["share_of_arithmetic_limit"]["lesson"]["max"] == pytest.approx(share)


def test_operations_are_those_of_the_layers():
    """A convolution takes 2 operations for each weight and output position, forward and again for each gradient."""
    conv1, conv2, conv3 = 27 * 32 * 32 * 32, 288 * 64 * 16 * 16, 576 * 128 * 8 * 8
    linear = 2048 * 256 + 256 * 10
    forward = 2 * (conv1 + conv2 + conv3 + linear)
    # Backward: by the weights and by the inputs, but nobody needs the gradient of the images.
    expected = 3 * forward - 2 * conv1
    assert throughput.operations_per_image(common.load_lesson("02")) == pytest.approx(expected)


def test_all_ways_train_on_the_same_numbers(lessons):
    """The usual way's transforms and the lesson's to_input() make the same network input of the same image."""
    images = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = throughput.transforms.Compose(throughput.TO_TENSOR)
    dataset = throughput.PILDataset(images.numpy(), [0, 1, 2, 3], transform)
    usual = torch.stack([dataset[i][0] for i in range(4)])
    torch.testing.assert_close(usual, lessons["02"].to_input(images, "cpu"))
    assert [dataset[i][1] for i in range(4)] == [0, 1, 2, 3]


def test_usual_augmentation_is_that_of_the_lesson(lessons):
    ours = [str(transform) for transform in lessons["05"].AUGMENTATION.transforms]
    usual = [str(transform) for transform in throughput.PIL_AUGMENTATION + throughput.ERASING]
    names = ["RandomHorizontalFlip", "RandomCrop", "RandomRotation", "RandomApply", "RandomErasing"]
    for our, other, name in zip(ours, usual, names, strict=True):
        assert our.startswith(name) and other.startswith(name)


def test_lesson_task_runs_the_lessons_own_code(lessons, monkeypatch):
    calls = []
    lesson = lessons["05"]
    monkeypatch.setattr(lesson, "train_one_epoch", lambda *args: calls.append(args))
    throughput.lesson_task(lesson, torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.zeros(4).long(), 16)()
    assert len(calls) == 1 and calls[0][-1] == 16


def test_pooling_last_is_the_same_function_of_the_weights_when_nothing_is_normalized(lessons):
    """max() and ReLU may change places; BatchNorm, with a positive weight as at the start, too, in eval mode."""
    model = lessons["02"].SimpleCNN().eval()
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(throughput.pooling_last(model, images), model(images))


@pytest.mark.parametrize(
    "flags", [["--rounds", "0"], ["--images", "50001"], ["--sizes", "x"], ["--no-such-flag"]]
)
def test_throughput_refuses_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        throughput.main(flags)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def with_output_file(run, folder):
    """Return a copy of a quick run's folder with what it printed, as results.py keeps it."""
    shutil.copytree(run.folder, folder)
    (folder / "output.txt").write_text(run.output, encoding="utf-8")
    return folder


def test_results_are_what_the_lessons_print_and_write(finished, tmp_path):
    runs = {number: finished(number) for number in ["01", "02", "04", "05", "06"]}
    arms = {
        number: results.collect(number, with_output_file(run, tmp_path / number))
        for number, run in runs.items()
    }
    assert f"accuracy {arms['01']['']['train_accuracy']:5.2f} %" in runs["01"].output
    best = arms["02"][""]
    assert (
        f"Best validation accuracy on digits: {best['val_accuracy']:.2f} % in epoch {best['best_epoch']}."
        in (runs["02"].output)
    )
    curves = results.read_scalars(next(runs["02"].folder.rglob("events*")).parent)
    assert best["gap"] == pytest.approx(
        curves["Accuracy/train"][0][1] - curves["Accuracy/val"][0][1], abs=1e-4
    )
    assert best["epochs"] == 1
    assert len(arms["04"]) == 6
    for arm, figures in arms["04"].items():
        assert f"  {arm:30} {figures['val_accuracy']:5.2f} % in epoch  1" in runs["04"].output
    assert set(arms["05"]) == {"without_augmentation", "with_augmentation", "with_augmentation_and_dropout"}
    for figures in arms["05"].values():
        assert f"    gap {figures['gap']:.2f} points" in runs["05"].output
    report = json.loads((runs["06"].artifacts / "evaluation_report.json").read_text(encoding="utf-8"))
    assert arms["06"][""]["test_accuracy"] == 100 * report["accuracy"]
    assert arms["06"][""]["top_3_accuracy"] == 100 * report["top_k"]["3"]


STUB = """
import sys
import time
from pathlib import Path
time.sleep(0.2)
Path(__file__).with_name("calls.txt").open("a").write(" ".join(sys.argv[1:]) + "\\n")
print("Epoch  5/5 | train loss 0.1234, accuracy 81.25 % | 9.0 s, 1,000 images/s")
sys.exit(EXIT)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Run results.py with a launcher that notes its arguments and prints the line of an epoch in place of a lesson."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "docs" / "results.json")

    def run(*flags, exit_status=0):
        (tmp_path / "stub.py").write_text(STUB.replace("EXIT", str(exit_status)), encoding="utf-8")
        flags = [
            "--launcher",
            tmp_path / "stub.py",
            "--work-dir",
            tmp_path / "work",
            "--lessons",
            "01",
            *flags,
        ]
        results.main(list(map(str, flags)))
        return (tmp_path / "calls.txt").read_text(encoding="utf-8").splitlines()

    return run


def test_results_are_kept_and_not_run_again(stub, tmp_path):
    calls = stub("--data-name", "some photographs")
    assert len(calls) == 1 and "01_basic_training.py --seed 42 --output-dir " in calls[0]
    [entry] = json.loads(results.RESULTS.read_text(encoding="utf-8"))
    assert (entry["lesson"], entry["seed"], entry["data"]) == ("01", 42, "some photographs")
    assert entry["arms"] == {"": {"train_accuracy": 81.25}}
    assert 0.2 <= entry["seconds"] < 60
    assert len(stub()) == 1, "it ran again"
    assert len(stub("--first-seed", "43", "--untimed")) == 2
    entries = json.loads(results.RESULTS.read_text(encoding="utf-8"))
    assert [(entry["seed"], entry["seconds"] is None) for entry in entries] == [(42, False), (43, True)]


def test_a_failed_run_is_no_result(stub):
    with pytest.raises(SystemExit, match="01_basic_training.py failed: see .*output.txt"):
        stub(exit_status=1)
    assert not results.RESULTS.exists()


def test_a_stopped_run_goes_on_from_its_checkpoint(stub, tmp_path):
    folder = (
        tmp_path / "work" / "01_basic_training_seed_42" / "artifacts" / "checkpoints" / "01_basic_training"
    )
    folder.mkdir(parents=True)
    (folder / "latest_checkpoint.pth").touch()
    assert stub()[0].endswith(" --resume")
    [entry] = json.loads(results.RESULTS.read_text(encoding="utf-8"))
    assert entry["seconds"] is None, "only a part of it was timed"


def entry(number, seed, seconds=60.0, **arms):
    """An entry as in docs/results.json, with the validation accuracies of the arms."""
    arms = {arm: {"val_accuracy": accuracy, "gap": 1.0} for arm, accuracy in arms.items()}
    return {"lesson": number, "seed": seed, "seconds": seconds, "peak_memory_bytes": 1.5e9, "arms": arms}


def test_table_calls_a_difference_inside_its_spread_a_tie():
    say = tables.words("en")
    found = [
        entry("04", 42, steady=80.0, tie=79.0, worse=70.0),
        entry("04", 43, steady=80.0, tie=81.5, worse=71.0),
        entry("04", 44, steady=80.0, tie=79.0, worse=72.0),
    ]
    rows = tables.arms_table(found, "04", say).splitlines()[2:]
    assert rows[0] == "| `steady` | 80.00 ± 0.00 | 1.0 ± 0.0 |  |"
    assert rows[1] == "| `tie` | 79.83 ± 1.44 | 1.0 ± 0.0 | 0.17 ± 1.44 (a tie) |"
    assert rows[2] == "| `worse` | 71.00 ± 1.00 | 1.0 ± 0.0 | 9.00 ± 1.00 |"


def test_table_of_lessons_gets_time_and_accuracy_in_both_languages():
    found = [
        entry("02", seed, seconds, **{"": 75.0 + seed - 43})
        for seed, seconds in [(42, 50), (43, 99), (44, None)]
    ]
    row = "| `02_with_validation.py` | an idea | a view | - | - |"
    filled = tables.fill_lessons(row, found, tables.words("en"))
    assert (
        filled == "| `02_with_validation.py` | an idea | a view | 74 s | 75.0 ± 1.0 % on validation images |"
    )
    assert tables.fill_lessons(filled, found, tables.words("en")) == filled
    assert "| 74 秒 | 75.0 ± 1.0%（验证图片） |" in tables.fill_lessons(row, found, tables.words("zh"))
    other = "| `03_save_load_model.py` | an idea | a view | - | - |"
    assert tables.fill_lessons(other, found, tables.words("en")) == other


def test_group_sizes_are_compared_by_the_lessons_own_training(tmp_path, capsys):
    flags = [
        "--seeds",
        "1",
        "2",
        "--group-sizes",
        "1",
        "64",
        "--epochs",
        "1",
        "--subset",
        "64",
        "--data",
        "digits",
    ]
    group_size.main([*flags, "--json", str(tmp_path / "g.json")])
    report = json.loads((tmp_path / "g.json").read_text(encoding="utf-8"))
    assert list(report["accuracy"]) == ["1", "64"] and report["seeds"] == [1, 2]
    output = capsys.readouterr().out
    for size, values in report["accuracy"].items():
        assert len(values) == 2 and all(0 <= value <= 100 for value in values)
        assert f"groups of {size:>3}: mean {np.mean(values):.2f} %" in output
