"""The command line: real processes from elsewhere, and one clear sentence for bad input."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import NUMBERS, PATHS, QUICK, run_lesson

STRICT = ["-W", "error::FutureWarning:__main__", "-W", "error::DeprecationWarning:__main__"]


def test_they_run_as_processes_from_another_folder(tmp_path):
    """All at the same time, because starting takes longer than running. (03 and 04: see test_checkpoints.py.)"""
    processes = {}
    for number in ["01", "02", "05", "06"]:
        (tmp_path / number).mkdir()
        command = [
            sys.executable,
            *STRICT,
            str(PATHS[number]),
            *QUICK,
            "--subset",
            "32",
            "--output-dir",
            "here",
        ]
        processes[number] = subprocess.Popen(
            command,
            cwd=tmp_path / number,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # four processes must not quarrel over the cores
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    for number, process in processes.items():
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "Warning" not in errors and "%|" not in errors, "no warning, and no bar without a terminal"
        assert {path.name for path in (tmp_path / number).iterdir()} == {"here"}


def test_two_runs_with_one_seed_print_the_same_losses(lessons, finished, tmp_path):
    for number in ["01", "03"]:
        outputs = [finished(number).output, run_lesson(lessons[number], tmp_path)]
        lines = [[line.rsplit("|", 1)[0] for line in out.splitlines() if "Epoch" in line] for out in outputs]
        assert lines[0] == lines[1] and lines[0]
        assert run_lesson(lessons[number], tmp_path, "--seed", 1).count("Epoch") == len(lines[0])


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--epochs", "0"), ("--epochs", "-1"), ("--epochs", "x"), ("--epochs", "1.5"), ("--epochs", ""),
        ("--batch-size", "0"), ("--batch-size", "nan"), ("--batch-size", "9" * 30),
        ("--lr", "nan"), ("--lr", "-1"), ("--lr", "inf"), ("--lr", "fast"),
        ("--seed", "-1"), ("--seed", "9" * 30), ("--subset", "0"), ("--data", "mnist"),
        ("--device", "toaster"), ("--device", "meta"), ("--device", ""), ("--device", "cuda:99"),
    ],
)  # fmt: skip
def test_bad_arguments_get_one_sentence_and_status_2(lessons, number, flag, value, capsys):
    with pytest.raises(SystemExit) as error:
        lessons[number].build_parser().parse_args([flag, value])
    message = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and flag in message and "Traceback" not in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_missing_is_named(lessons, capsys):
    for lesson in lessons.values():
        with pytest.raises(SystemExit) as error:
            lesson.main(["--device", "cuda"])
        assert error.value.code == 2
        assert "'cuda' is not available on this machine" in capsys.readouterr().err


@pytest.mark.parametrize("number", NUMBERS)
def test_unusable_folders_are_noticed_before_training(lessons, tmp_path, number, monkeypatch):
    """The lines below main() make a sentence of the error: see test_a_disk_that_fills_up in test_faults.py."""
    monkeypatch.setattr(lessons[number], "train_one_epoch", None)
    (tmp_path / "file").write_text("", encoding="utf-8")
    good = str(tmp_path / "good")
    for data_dir, output_dir in [
        (tmp_path / "file", good),
        (tmp_path / "file" / "below", good),
        (good, tmp_path / "file"),
    ]:
        data = "digits" if data_dir == good else "auto"
        with pytest.raises(OSError, match="file"):
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


@pytest.mark.parametrize("number", NUMBERS)
def test_very_small_runs_work(lessons, tmp_path, number):
    run_lesson(lessons[number], tmp_path, "--subset", 1, "--batch-size", 1)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", NUMBERS[1:])
def test_a_second_run_never_draws_over_the_first(lessons, tmp_path, number):
    runs = []
    for _ in range(2):
        run_lesson(lessons[number], tmp_path, "--subset", 32)
        runs.append({path.parent for path in (tmp_path / "tensor_board").rglob("events*")})
    assert len(runs[1]) == 2 * len(runs[0])
    assert all(len(list(run.iterdir())) == 1 for run in runs[1])
