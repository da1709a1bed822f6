"""The command line: one clear sentence for bad values, and real processes that run, print and stop as they should."""

import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import warnings

import matplotlib.pyplot as plt
import pytest
import sklearn.datasets
from conftest import NUMBERS, PATHS, QUICK, ROOT, TINY, UNIX, in_background, no_group_left, run_lesson

# What Python and its libraries will not do for ever; a warning from a lesson's own line is an error here.
CHANGES = [FutureWarning, DeprecationWarning]
BAD_VALUES = {
    "--epochs": ["0", "1.5"],
    "--batch-size": ["0"],
    "--lr": ["0", "nan", "inf"],
    "--subset": ["0"],
    "--data": ["mnist"],
    "--device": ["toaster", "cuda:99"],
}
MORE_BAD_VALUES = {
    "04": {"--schedulers": ["OneCycleLR"]},
    "05": {"--group-size": ["0"]},
    "06": {"--group-size": ["0"]},
}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_bad_value_gets_one_sentence_and_status_2(lessons, number, capsys):
    """The sentence names the flag, and says so if the machine has no such device."""
    flags = BAD_VALUES | MORE_BAD_VALUES.get(number, {})
    for flag, value in [(flag, value) for flag, values in flags.items() for value in values]:
        with pytest.raises(SystemExit) as error:
            lessons[number].main([flag, value])
        sentence = capsys.readouterr().err.splitlines()[-1]
        assert error.value.code == 2 and flag in sentence, (flag, value)
        assert flag != "--device" or sentence.endswith(f"--device {value} is not available on this machine")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", [number for number in NUMBERS if number not in ["09", "10"]])
def test_one_image_is_enough_for_a_run(lessons, tmp_path, number):
    assert "Epoch  1/1" in run_lesson(lessons[number], tmp_path, "--subset", 1, "--batch-size", 1)


@pytest.mark.parametrize("number", NUMBERS[1:])
def test_the_printed_tensorboard_command_works_for_a_folder_with_spaces(finished, lessons, number):
    """The folder stays one argument in a shell, and holds the curves of the run."""
    assert " " in finished(number).folder.name
    [line] = [line for line in finished(number).output.splitlines() if line.startswith("Curves: ")]
    folder = finished(number).folder / "tensor_board" / lessons[number].LESSON
    assert shlex.split(line) == ["Curves:", "tensorboard", "--logdir", str(folder)]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", NUMBERS)
def test_a_lesson_runs_as_a_script_from_another_folder(tmp_path, monkeypatch, capsys, number):
    """As `python lesson.py`, but for the seconds that a new process needs to import PyTorch. Nothing warns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lesson.py", *QUICK, *TINY[number], "--output-dir", "here"])
    with warnings.catch_warnings():
        for category in CHANGES:
            warnings.filterwarnings("error", category=category, module="__main__")
        runpy.run_path(str(PATHS[number]), run_name="__main__")
    output, errors = capsys.readouterr()
    assert "Device: cpu" in output and "Warning" not in errors
    assert "%|" not in errors, "no bar without a terminal"
    assert {path.name for path in tmp_path.iterdir()} == {"here"}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_copy_elsewhere_uses_the_working_directory(lessons, tmp_path, monkeypatch, number):
    """A lesson stands alone, so that its file can be taken anywhere. Its pictures open no window."""
    (tmp_path / "content").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    plt.switch_backend("svg")
    copy = runpy.run_path(shutil.copy(PATHS[number], tmp_path / "content" / "x.py"))
    assert plt.get_backend() == ("agg" if "plt" in copy else "svg")
    args = copy["parse_args"](["--device", "cpu"])
    assert args.output_dir == tmp_path / "work" and args.data_dir == tmp_path / "work" / "data"
    args = lessons[number].parse_args(["--device", "cpu"])
    assert args.output_dir == ROOT and args.data_dir == ROOT / "data"


@pytest.mark.parametrize("number", NUMBERS)
def test_ctrl_c_gives_one_line_and_status_1(tmp_path, monkeypatch, number):
    """No traceback follows the line, and where a run can be resumed, it says so. A text means status 1."""

    def press_ctrl_c():
        raise KeyboardInterrupt

    monkeypatch.setattr(sklearn.datasets, "load_digits", press_ctrl_c)
    monkeypatch.setattr(sys, "argv", ["lesson.py", *QUICK, "--output-dir", str(tmp_path)])
    with no_group_left(), pytest.raises((SystemExit, KeyboardInterrupt)) as error:
        runpy.run_path(str(PATHS[number]), run_name="__main__")
    assert error.type is SystemExit
    assert error.value.code.startswith("\nStopped.") and error.value.code.count("\n") == 1
    assert ("--resume" in error.value.code) == (number in ["03", "04", "05", "08", "12"])


# A shell lets its background jobs ignore Ctrl-C, and the processes that they start too.
HEARS_CTRL_C = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@in_background
def stopped(folder):
    """Lesson 02 through a pipe, with Ctrl-C as soon as the line of an epoch arrives. Returns output, status, errors."""
    flags = ["--data", "digits", "--subset", "32", "--device", "cpu", "--epochs", "100000"]
    command = [sys.executable, "-c", HEARS_CTRL_C, str(PATHS["02"]), *flags, "--output-dir", str(folder)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    output = b""
    while b"\nEpoch " not in output and process.poll() is None:
        output += os.read(process.stdout.fileno(), 100_000)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    return output.decode(), process.returncode, errors.decode()


@UNIX
def test_the_line_of_an_epoch_arrives_at_once(stopped):
    """Through a pipe too, as `| tee log.txt`, and not when a buffer of many epochs is full."""
    assert 1 <= stopped[0].count("\nEpoch ") < 10


@UNIX
def test_ctrl_c_ends_a_process_in_one_line(stopped):
    """With status 1, and without a traceback."""
    assert stopped[1:] == (1, "\nStopped.\n")
