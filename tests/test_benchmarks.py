"""src/benchmarks/: the figures are of what they say, and what is measured is really the lessons' own training."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import common
import numpy as np
import pytest
import throughput
import torch

ROOT = Path(__file__).resolve().parents[1]
TASKS = ["lesson", "lesson, augmented", "ceiling: ready-made batches", "usual way", "usual way, 2 workers"]
TASKS += ["usual way, pooling last", "usual way, augmented", "usual way, augmented, 2 workers"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One small run of throughput.py in a process of its own: what it printed, its figures, and its output folder."""
    folder = tmp_path_factory.mktemp("throughput")
    flags = ["--rounds", "2", "--images", "256", "--sizes", "128", "256", "--output-dir", folder, "--json", "t.json"]
    command = [sys.executable, ROOT / "src" / "benchmarks" / "throughput.py", *flags]
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((folder / "t.json").read_text(encoding="utf-8"))
    return SimpleNamespace(output=done.stdout, figures=figures, folder=folder)


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
    seconds = {name: np.array([2.0, 4.0, 3.0]) for name in TASKS} | {"matrix multiplication": np.array([1.0, 1.0, 2.0])}
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


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--images", "50001"], ["--sizes", "x"], ["--no-such-flag"]])
def test_throughput_refuses_bad_flags(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        throughput.main(flags)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
