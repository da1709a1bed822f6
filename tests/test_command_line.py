"""The command line: real processes from elsewhere, and one clear sentence for bad input."""

import subprocess
import sys

import pytest
import torch
from conftest import FILES, QUICK, run_lesson

PATHS = {path.stem[:2]: path for path in FILES}
NUMBERS = list(PATHS)
STRICT = ["-W", "error::FutureWarning:__main__", "-W", "error::DeprecationWarning:__main__"]


@pytest.mark.parametrize("number", ["01", "02", "05", "06"])  # 03 and 04 run as processes in test_checkpoints.py
def test_runs_as_a_process_from_another_folder(tmp_path, number):
    command = [sys.executable, *STRICT, str(PATHS[number]), *QUICK, "--subset", "32", "--output-dir", "here"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert "Warning" not in process.stderr and "%|" not in process.stderr, "no warning, and no bar without a terminal"
    assert {path.name for path in tmp_path.iterdir()} == {"here"}


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


def test_unusable_folder_gets_one_sentence_and_status_1(tmp_path):
    """In a process, because the sentence comes from the lines below main(), which test_sync.py holds alike."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    command = [sys.executable, str(PATHS["01"]), "--output-dir", str(tmp_path / "file"), "--data", "digits"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1 and "Epoch" not in process.stdout, "before the training, not after it"
    (line,) = process.stderr.splitlines()
    assert str(tmp_path / "file") in line and "--output-dir" in line


@pytest.mark.parametrize("number", NUMBERS)
def test_unusable_folders_are_noticed_before_training(lessons, tmp_path, number, monkeypatch):
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
                ["--data", data, "--data-dir", str(data_dir), "--output-dir", str(output_dir), "--device", "cpu"]
            )


@pytest.mark.parametrize("number", NUMBERS)
def test_very_small_runs_work(lessons, tmp_path, number):
    run_lesson(lessons[number], tmp_path, "--subset", 1, "--batch-size", 1)


@pytest.mark.parametrize("number", NUMBERS[1:])
def test_a_second_run_never_draws_over_the_first(lessons, tmp_path, number):
    runs = []
    for _ in range(2):
        run_lesson(lessons[number], tmp_path, "--subset", 32)
        runs.append({path.parent for path in (tmp_path / "tensor_board").rglob("events*")})
    assert len(runs[1]) == 2 * len(runs[0])
    assert all(len(list(run.iterdir())) == 1 for run in runs[1])
