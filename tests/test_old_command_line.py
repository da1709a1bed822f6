"""The command line: real processes from elsewhere, and one clear sentence for bad input."""

import os
import runpy
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import PATHS, QUICK, ROOT, TINY, UNIX, in_background, no_group_left, run_lesson

NUMBERS = ["07", "08", "09", "10", "11", "12"]
# What Python and its libraries will not do for ever; a warning from a lesson's own line is an error here.
CHANGES = [FutureWarning, DeprecationWarning]
STRICT = [f"-Werror::{category.__name__}:__main__" for category in CHANGES]


@in_background
def old_processes(folder):
    """Lessons 08 and 11, started in a folder. (12 is started by tests below and elsewhere.)

    The environment is that of a command behind ! in a notebook, whose way of drawing is not installed here.
    """
    environment = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    ended = {}
    for number in ["08", "11"]:
        (folder / number).mkdir()
        command = [sys.executable, *STRICT, str(PATHS[number]), *QUICK, *TINY[number], "--output-dir", "here"]
        ended[number] = subprocess.run(
            command, cwd=folder / number, env=os.environ | environment, capture_output=True, text=True
        )
        ended[number].files = {path.name for path in (folder / number).iterdir()}
    return ended


@pytest.mark.parametrize("number", ["08", "11"])
def test_they_run_as_processes_from_another_folder(old_processes, number):
    process = old_processes[number]
    assert process.returncode == 0, process.stderr
    assert "Warning" not in process.stderr, "no warning"
    assert "%|" not in process.stderr, "no bar without a terminal"
    assert process.files == {"here"}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", NUMBERS)
def test_they_run_as_scripts_from_another_folder(tmp_path, monkeypatch, capsys, number):
    """As `python lesson.py`, but for the seconds that a new process needs to import PyTorch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lesson.py", *QUICK, *TINY[number], "--output-dir", "here"])
    with warnings.catch_warnings():
        for category in CHANGES:
            warnings.filterwarnings("error", category=category, module="__main__")
        runpy.run_path(str(PATHS[number]), run_name="__main__")
    output, errors = capsys.readouterr()
    assert "Done" in output and "Warning" not in errors and "%|" not in errors
    assert {path.name for path in tmp_path.iterdir()} == {"here"}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_copy_elsewhere_uses_the_working_directory(tmp_path, monkeypatch, number):
    """A lesson stands alone: its file can be taken anywhere. Here it is in its folder, and beside a folder src/."""
    (tmp_path / "content").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shutil.copy(PATHS[number], tmp_path / "content" / "x.py")
    copied = runpy.run_path(str(tmp_path / "content" / "x.py"))
    assert copied["ROOT"] == tmp_path / "work" and copied["parse_args"]([]).output_dir == tmp_path / "work"
    assert runpy.run_path(str(PATHS[number]))["ROOT"] == ROOT
    (tmp_path / "src").mkdir()
    assert runpy.run_path(str(tmp_path / "content" / "x.py"))["ROOT"] == tmp_path


@pytest.mark.parametrize("number", NUMBERS)
def test_pasted_into_a_notebook_it_says_how_to_run_it(number):
    code = compile(PATHS[number].read_text(encoding="utf-8"), "cell", "exec")
    with pytest.raises(SystemExit, match=r"^This cannot run in a notebook cell\. .*!python lesson\.py$"):
        exec(code, {"__name__": "__main__"})


@in_background
def old_piped(folder):
    """Lesson 12, whose reader goes away after one epoch's line. Returns what was read, its status and errors."""
    command = [sys.executable, str(PATHS["12"]), *QUICK, "--epochs", "100000", "--output-dir", str(folder)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    output = b""
    while b"\nEpoch " not in output and process.poll() is None:
        output += os.read(process.stdout.fileno(), 100_000)
    process.stdout.close()
    status, errors = process.wait(300), process.stderr.read()
    process.stderr.close()
    return output, status, errors


@UNIX
def test_each_epochs_line_arrives_at_once_and_a_reader_may_go_away(old_piped):
    """Through a pipe, without -u. The reader takes one epoch's line, as `| head` does; no traceback follows."""
    output, status, errors = old_piped
    assert 1 <= output.count(b"\nEpoch ") < 10, "not when a buffer of many epochs is full"
    assert status == 1 and errors == b""


def test_two_runs_with_one_seed_print_the_same_losses(lessons, finished, tmp_path):
    for number, clocks in [("08", 1), ("12", 2)]:  # columns that depend on the time
        outputs = [finished(number).output, run_lesson(lessons[number], tmp_path)]
        lines = [
            [line.rsplit("|", clocks)[0] for line in out.splitlines() if "Epoch" in line] for out in outputs
        ]
        assert lines[0] == lines[1] and lines[0]
        assert run_lesson(lessons[number], tmp_path, "--seed", 1).count("Epoch") == len(lines[0])


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--epochs", "0"), ("--epochs", "-1"), ("--epochs", "x"), ("--epochs", "1.5"), ("--epochs", ""),
        ("--batch-size", "0"), ("--batch-size", "nan"),
        ("--lr", "nan"), ("--lr", "-1"), ("--lr", "inf"), ("--lr", "fast"),
        ("--lr", "0"), ("--seed", "x"), ("--subset", "0"), ("--subset", "-5"), ("--data", "mnist"),
        ("--device", "toaster"), ("--device", "meta"), ("--device", ""), ("--device", "cuda:99"),
    ],
)  # fmt: skip
def test_bad_arguments_get_one_sentence_and_status_2(lessons, number, flag, value, capsys):
    with pytest.raises(SystemExit) as error:
        lessons[number].parse_args([flag, value])
    message = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and flag in message and "Traceback" not in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_missing_is_named(lessons, capsys):
    for number in NUMBERS:
        lesson = lessons[number]
        with pytest.raises(SystemExit) as error, no_group_left():
            lesson.main(["--device", "cuda"])
        assert error.value.code == 2
        assert "--device cuda is not available on this machine; use cpu" in capsys.readouterr().err


@pytest.mark.parametrize("number", NUMBERS)
def test_unusable_folders_are_noticed_before_training(lessons, tmp_path, number, monkeypatch):
    """The lines below main() make a sentence of the error: see test_a_disk_that_fills_up in test_old_faults.py."""
    monkeypatch.setattr(lessons[number], "train_one_epoch", None)
    (tmp_path / "file").write_text("", encoding="utf-8")
    good = str(tmp_path / "good")
    for data_dir, output_dir in [
        (tmp_path / "file", good),
        (tmp_path / "file" / "below", good),
        (good, tmp_path / "file"),
    ]:
        data = "digits" if data_dir == good else "auto"
        with pytest.raises(OSError, match="file"), no_group_left():
            lessons[number].main(
                [
                    "--data",
                    data,
                    "--data-dir",
                    str(data_dir),
                    "--output-dir",
                    str(output_dir),
                    "--device",
                    "cpu",
                ]
            )


# Lesson 10 refuses: see test_transfer.py.
@pytest.mark.parametrize("number", [number for number in NUMBERS if number != "10"])
def test_very_small_runs_work(lessons, tmp_path, number):
    run_lesson(lessons[number], tmp_path, "--subset", 1, "--batch-size", 1)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", NUMBERS)
def test_a_second_run_never_draws_over_the_first(lessons, tmp_path, number):
    contents = []
    for _ in range(2):
        run_lesson(lessons[number], tmp_path, *TINY[number])
        files = sorted((tmp_path / "tensor_board").rglob("events*"))
        assert len({path.parent for path in files}) == len(files), "one event file in each folder"
        contents.append({path: path.read_bytes() for path in files})
    first, both = contents
    assert first == {path: both[path] for path in first}
    assert both.keys() - first.keys() and all(
        "digits_run_2" in path.parts for path in both.keys() - first.keys()
    )
