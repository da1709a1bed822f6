"""Lesson 12: several processes do what one does, nothing is counted twice, and a killed process costs one epoch."""

import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import read_scalars
from conftest import ROOT, UNIX, assert_same_state, contents, in_background, load, resume, run_lesson
from torch import nn

IMAGES = 131  # of each split: two processes cannot share an odd number evenly
RUN = ["--data", "digits", "--subset", IMAGES, "--batch-size", 32, "--epochs", 3, "--device", "cpu"]
PLAIN = ["--data", "digits", "--subset", 160, "--batch-size", 32, "--epochs", 2, "--device", "cpu"]

# What torchrun does, but for the seconds that it takes each new process to import PyTorch: where fork() is safe, the
# processes are copies of this one. In the run "killed", process 1 kills itself in its second epoch, so that both are
# started again. The run "plain" has no BatchNorm. Process 1 has no function to save anything with.
WORKER = """
import json, os, signal, sys, time
import torch.distributed as dist
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

sys.path.insert(0, sys.argv[1])
from common import load_lesson

lesson = load_lesson("12")
train_one_epoch, started = lesson.train_one_epoch, []

def train_or_die(*args):
    if started:
        dist.barrier()  # process 0 has saved the first epoch
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)  # the launcher ends this process
    started.append(1)
    return train_one_epoch(*args)

def work(name, flags):
    if name == "killed" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        lesson.train_one_epoch = train_or_die
    if name == "plain":
        nn.BatchNorm2d = lambda features: nn.Identity()
    if os.environ["RANK"] == "1":
        lesson.save_checkpoint = None
    lesson.main(flags)

if __name__ == "__main__":
    place = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 1}
    place["start_method"] = "fork" if sys.platform == "linux" else "spawn"
    for name, flags in json.loads(sys.argv[2]).items():
        elastic_launch(LaunchConfig(1, 1, 2, run_id=name, **place), work)(name, flags)
"""


@pytest.fixture
def lesson(lessons):
    return lessons["12"]


def folder_of(output_dir):
    """Return the folder of the checkpoints."""
    return output_dir / "artifacts" / "checkpoints" / "12_distributed"


def latest(output_dir):
    return load(folder_of(output_dir) / "latest_checkpoint.pth")


@in_background
def two_processes(folder):
    """Run WORKER. Return its output, and the folders of its three runs of two processes."""
    worker, runs = folder / "worker.py", {"killed": RUN, "undisturbed": RUN, "plain": PLAIN}
    worker.write_text(WORKER, encoding="utf-8")
    runs = {name: [*map(str, flags), "--output-dir", str(folder / name)] for name, flags in runs.items()}
    command = [sys.executable, str(worker), str(ROOT / "src" / "benchmarks"), json.dumps(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    try:
        out, errors = process.communicate(timeout=900)  # a machine may be busy with other things
    finally:
        process.terminate()  # the launcher then ends its own processes
        process.wait(60)
    assert process.returncode == 0, errors
    return SimpleNamespace(out=out, **{name: folder / name for name in runs})


def be_one_of(patch, lesson, processes, attempt=0, run_id="one"):
    """Let the lesson believe that torchrun has started as many processes. The group has this one only."""

    def join_processes(device):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return 0

    variables = {"WORLD_SIZE": processes, "RANK": 0, "LOCAL_RANK": 0, "GROUP_WORLD_SIZE": 1}
    variables |= {"TORCHELASTIC_RUN_ID": run_id, "TORCHELASTIC_RESTART_COUNT": attempt}
    for name, value in variables.items():
        patch.setenv(name, str(value))
    patch.setattr(lesson, "join_processes", join_processes)


# Two processes


@UNIX
def test_two_processes_do_what_one_does(lesson, two_processes, tmp_path, monkeypatch):
    """They train by SGD with momentum, which is written out here, without BatchNorm, which is not synchronized."""
    monkeypatch.setattr(nn, "BatchNorm2d", lambda features: nn.Identity())
    run_lesson(lesson, tmp_path, *PLAIN)
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=True)
    images, labels = lesson.split_train_val(images, labels, 42, 160)[0].tensors
    torch.manual_seed(42)
    model, rows = lesson.SimpleCNN(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for epoch in [1, 2]:
        rows.append({"Loss/train": 0, "Accuracy/train": 0})
        order = torch.randperm(160, generator=torch.Generator().manual_seed(42 + epoch))
        for batch in order.split(32):
            logits = model(lesson.normalize(images[batch]))
            loss = F.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rows[-1]["Loss/train"] += loss.item() / 5
            rows[-1]["Accuracy/train"] += (logits.argmax(dim=1) == labels[batch]).sum().item() / 1.6
    for checkpoint in [latest(tmp_path), latest(two_processes.plain)]:
        for name, weights in model.state_dict().items():
            assert torch.allclose(checkpoint["model"][name], weights, atol=5e-4), name
        for row, expected in zip(checkpoint["history"], rows, strict=True):
            assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3)


@UNIX
def test_validation_counts_every_image_once(lesson, two_processes, tmp_path):
    """All processes use BatchNorm's running averages of process 0. A plain SimpleCNN loads the checkpoint."""
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=True)
    images, labels = lesson.split_train_val(images, labels, 42, IMAGES)[1].tensors
    checkpoint, model = latest(two_processes.undisturbed), lesson.SimpleCNN()
    model.load_state_dict(checkpoint["model"])
    with torch.no_grad():
        logits = model.eval()(lesson.normalize(images))
    row = checkpoint["history"][2]
    accuracy = 100 * (logits.argmax(dim=1) == labels).double().mean().item()
    assert row["Accuracy/val"] == pytest.approx(accuracy)
    assert row["Loss/val"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert row["Overfitting/accuracy_gap"] == row["Accuracy/train"] - row["Accuracy/val"]
    assert row["ImagesPerSecond"] == pytest.approx((IMAGES + 1) / row["Seconds"]), "one image comes twice"


@UNIX
def test_process_0_alone_writes_and_prints(two_processes):
    """Every epoch is one line, and every start has one event file."""
    lines = re.findall(r"^Epoch +\d+/\d+", two_processes.out, flags=re.MULTILINE)
    assert lines == [f"Epoch  {epoch}" for epoch in ["1/3", "2/3", "3/3"] * 2 + ["1/2", "2/2"]]
    assert two_processes.out.count("Processes: 2, started by torchrun | threads each: 1\n") == 4
    for folder, starts in [(two_processes.killed, 2), (two_processes.undisturbed, 1)]:
        assert len(list(folder.rglob("events*"))) == starts


@UNIX
def test_a_killed_process_costs_one_epoch_and_changes_nothing(two_processes):
    """The run continues after the last saved epoch, and ends like an undisturbed run, bit for bit."""
    assert two_processes.out.count("Resuming after epoch 1.") == 1
    for name in ["latest_checkpoint.pth", "best_model.pth"]:
        paths = [folder_of(folder) / name for folder in [two_processes.killed, two_processes.undisturbed]]
        assert_same_state(*map(load, paths))
    assert len(latest(two_processes.killed)["history"]) == 3


@UNIX
def test_a_run_of_two_processes_continues_in_one(two_processes, lesson, tmp_path):
    """A checkpoint does not depend on the number of processes."""
    shutil.copytree(two_processes.killed, tmp_path, dirs_exist_ok=True)
    output = resume(lesson, tmp_path, "--data", "digits", "--epochs", 5)
    assert "Resuming after epoch 3." in output and "Epoch  5/5" in output
    assert (folder_of(tmp_path) / "checkpoint_epoch_5.pth").exists()


# Restarts and resuming


@pytest.mark.usefixtures("seconds")
@pytest.mark.parametrize(("place", "flags"), [("load_data", []), ("train_one_epoch", ["--overwrite"])])
def test_a_restart_before_the_first_checkpoint_begins_anew(lesson, tmp_path, monkeypatch, place, flags):
    """It does not matter whether the run that died had already created its folder."""

    def die(*_, **__):
        raise KeyboardInterrupt

    be_one_of(monkeypatch, lesson, processes=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lesson, place, die)
        run_lesson(lesson, tmp_path, "--subset", 32, *flags)
    be_one_of(monkeypatch, lesson, processes=1, attempt=1)
    output = run_lesson(lesson, tmp_path, "--subset", 32, *flags)
    assert "Resuming" not in output and len(latest(tmp_path)["history"]) == 1


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_a_restart_continues_whatever_the_command_was(lesson, tmp_path, monkeypatch, flags):
    """torchrun repeats the command, and --overwrite must not delete what the run has just saved."""
    be_one_of(monkeypatch, lesson, processes=1)
    run_lesson(lesson, tmp_path, "--subset", 32)
    be_one_of(monkeypatch, lesson, processes=1, attempt=1)
    output = run_lesson(lesson, tmp_path, "--subset", 32, "--epochs", 2, *flags)
    assert "Resuming after epoch 1." in output and len(latest(tmp_path)["history"]) == 2


@pytest.mark.usefixtures("seconds")
def test_a_start_continues_or_replaces_no_other_run(lesson, tmp_path, monkeypatch):
    """It is refused, also when torchrun tries again. --overwrite replaces the run."""
    be_one_of(monkeypatch, lesson, processes=1)
    run_lesson(lesson, tmp_path, "--subset", 32)
    before = contents(tmp_path)
    for attempt in [0, 1]:
        be_one_of(monkeypatch, lesson, processes=1, attempt=attempt, run_id="two")
        with pytest.raises(SystemExit, match="holds a run on digits"):
            run_lesson(lesson, tmp_path, "--subset", 32, "--epochs", 2)
    assert contents(tmp_path) == before
    run_lesson(lesson, tmp_path, "--subset", 32, "--seed", 1, "--overwrite")
    assert latest(tmp_path)["hyperparameters"]["seed"] == 1


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(lesson, tmp_path, monkeypatch):
    """Here it is stopped when epoch 2 is logged, but not saved. The curve has no point twice."""
    whole, parts, save = tmp_path / "whole", tmp_path / "parts", lesson.save_checkpoint
    flags = ["--subset", 70, "--batch-size", 32, "--lr", 0.03, "--seed", 3, "--epochs", 3]

    def save_or_stop(checkpoint, path):
        if len(checkpoint["history"]) == 2:
            raise KeyboardInterrupt
        save(checkpoint, path)

    run_lesson(lesson, whole, *flags)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lesson, "save_checkpoint", save_or_stop)
        run_lesson(lesson, parts, *flags)
    resume(lesson, parts, "--data", "digits")
    for name in ["latest_checkpoint.pth", "best_model.pth"]:
        assert_same_state(*(load(folder_of(folder) / name) for folder in [whole, parts]))
    [run] = (parts / "tensor_board" / "12_distributed").iterdir()
    assert [step for step, _ in read_scalars(run)["Accuracy/val"]] == [1, 2, 3]


def test_a_resumed_run_keeps_its_settings_and_its_data(lesson, tmp_path, monkeypatch, capsys):
    """It asks for the data of the run, although --data auto might find others now. Another --lr has status 2."""
    run_lesson(lesson, tmp_path, "--subset", 32)
    names, load_data = [], lesson.load_data

    def record(name, data_dir, train):
        names.append(name)
        return load_data("digits", data_dir, train)

    monkeypatch.setattr(lesson, "load_data", record)
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path, "--subset", 32, "--resume", "--lr", 0.5)
    assert error.value.code == 2
    assert capsys.readouterr().err.endswith("a resumed run keeps its settings; leave out --lr\n")
    resume(lesson, tmp_path, "--epochs", 2)
    assert names == ["digits"] and latest(tmp_path)["hyperparameters"]["data"] == "digits"


def test_a_batch_must_be_a_multiple_of_the_processes(lesson, tmp_path, monkeypatch, capsys):
    """Otherwise it is one sentence with status 2. When a run is resumed, --batch-size may change to fit."""
    run_lesson(lesson, tmp_path, "--subset", 64, "--batch-size", 32)
    be_one_of(monkeypatch, lesson, processes=3)
    before = contents(tmp_path)
    for flags in [["--resume", "--epochs", 2], ["--batch-size", 32, "--overwrite"]]:
        with pytest.raises(SystemExit) as error:
            run_lesson(lesson, tmp_path, "--subset", 64, *flags)
        assert error.value.code == 2
        assert capsys.readouterr().err.endswith("--batch-size must be a multiple of the 3 processes\n")
    assert contents(tmp_path) == before
    resume(lesson, tmp_path, "--data", "digits", "--epochs", 2, "--batch-size", 33)
    resume(lesson, tmp_path, "--data", "digits", "--epochs", 3)  # although the default is no multiple of 3
    checkpoint = latest(tmp_path)
    assert len(checkpoint["history"]) == 3 and checkpoint["hyperparameters"]["batch_size"] == 33


# One process


def test_without_torchrun_one_process_trains(lesson, tmp_path, monkeypatch):
    """That is so even if something else than torchrun has set RANK and WORLD_SIZE, as some clusters do."""
    for name, value in [("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")]:
        monkeypatch.setenv(name, value)
    clock = {"perf_counter": itertools.count().__next__, "strftime": time.strftime}
    monkeypatch.setattr(lesson, "time", SimpleNamespace(**clock))
    flags = ["--epochs", 2, "--subset", 64, "--batch-size", 50]  # no multiple of 8
    output = run_lesson(lesson, tmp_path, *flags)
    assert f"Processes: 1, started without torchrun | threads each: {torch.get_num_threads()}\n" in output
    accuracies = [row["Accuracy/val"] for row in latest(tmp_path)["history"]]
    epoch = accuracies.index(max(accuracies)) + 1
    assert f"Best validation accuracy: {max(accuracies):.2f} % in epoch {epoch}\n" in output
    assert len(load(folder_of(tmp_path) / "best_model.pth")["history"]) == epoch
    assert output.count("| 64 images/s | 1 s\n") == 2


def test_a_loss_that_is_not_finite_gets_one_sentence(lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (math.nan, 10.0))
    with pytest.raises(SystemExit, match=r"^The loss is no longer a finite number\. Try a smaller"):
        run_lesson(lesson, tmp_path, "--subset", 32)


# The group of processes


@pytest.fixture
def group(monkeypatch):
    """What join_processes() passes to PyTorch, in a process that torchrun has started. Nothing is joined."""
    group = SimpleNamespace(rank=0, joined=[], gpus=[], handlers=[], store=dist.HashStore())

    def init_process_group(backend=None, *_, device_id=None, **__):
        group.joined.append((backend, device_id))

    for name, value in [("GROUP_WORLD_SIZE", "1"), ("TORCHELASTIC_RESTART_COUNT", "0")]:
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda *_: iter([(group.store, group.rank, 2)]))
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: group.rank)
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setattr(torch.cuda, "set_device", group.gpus.append)
    monkeypatch.setattr(signal, "signal", lambda *args: group.handlers.append(args))
    return group


def test_a_device_is_named_for_gpus_only(lesson, group):
    """gloo, which connects CPUs, has no device_id. nccl gets the GPU of this process."""
    lesson.join_processes("cpu")
    lesson.join_processes("cuda:1")
    assert group.joined == [("gloo", None), ("nccl", torch.device("cuda:1"))] and group.gpus == ["cuda:1"]


def test_each_attempt_has_a_meeting_place_of_its_own(lesson, group, monkeypatch):
    """On one machine: several machines do not agree on the number of restarts."""
    for machines, shared in [("1", False), ("2", True)]:
        monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
        stores = []
        for attempt in ["0", "1"]:
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
            place = lesson.meeting_place()
            stores.append(place.pop("store"))
            assert place == {"rank": 0, "world_size": 2}
        stores[0].set(f"address on {machines}", "of a process")
        assert stores[1].check([f"address on {machines}"]) == shared


@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_processes_are_silent_and_leave_ctrl_c_to_process_0(lesson, group, monkeypatch, rank):
    """Otherwise every line and the end of the run would appear once per process."""
    group.rank, terminal = rank, io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)  # after the test it is what it was
    assert lesson.join_processes("cpu") == rank
    print("a line")
    assert terminal.getvalue() == ("a line\n" if rank == 0 else "")
    assert group.handlers == ([] if rank == 0 else [(signal.SIGINT, signal.SIG_IGN)])
    if rank:
        sys.stdout.close()


def test_every_process_has_a_gpu_of_its_own(lesson, monkeypatch):
    """The default of --device is the GPU with the number of the process on its machine."""
    be_one_of(monkeypatch, lesson, processes=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)  # by which the lesson tests whether it is there
    assert lesson.parse_args([]).device == "cuda:1"


@pytest.mark.parametrize(
    ("rank", "local_rank", "expected"),
    [
        (0, 0, ["load auto", "receive", "wait for all"]),
        (1, 1, ["receive", "wait for all", "load digits"]),
        (2, 0, ["receive", "load digits", "wait for all"]),
    ],
)
def test_one_process_of_every_machine_downloads_the_data(lesson, monkeypatch, rank, local_rank, expected):
    """Process 1 waits for the download of process 0, and process 2 is the first one of another machine."""
    done, data = [], ("images", "labels", "class names", "digits")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "barrier", lambda: done.append("wait for all"))
    monkeypatch.setattr(lesson, "from_process_0", lambda _: done.append("receive") or "digits")
    monkeypatch.setattr(lesson, "load_data", lambda name, *_, train: done.append(f"load {name}") or data)
    assert lesson.load_data_once("auto", "data") == data and done == expected
