"""Lesson 12: several processes do what one does, nothing is counted twice, and a killed process costs an epoch at most.

One start of torchrun serves all tests, since every process takes seconds to import PyTorch.
"""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from common import read_scalars
from conftest import PATHS, UNIX, assert_same_state, in_background, load, resume, run_lesson
from torch import nn

IMAGES = 131  # of each split: two processes cannot share an odd number evenly
RUN = ["--data", "digits", "--subset", IMAGES, "--batch-size", 32, "--epochs", 4, "--device", "cpu"]
PLAIN = ["--subset", 320, "--batch-size", 32, "--epochs", 1, "--device", "cpu"]  # ten steps
TIMEOUT = 300  # seconds, for a machine that is busy with other things

# What runs in both processes: main() three times, of which every epoch is recorded. In the first one, process 1 kills
# itself in its third epoch, so that torchrun starts both again. The last one has no BatchNorm, and --data auto.
WORKER = """
import importlib.util, json, os, signal, sys, time
import torch
import torch.distributed as dist
from torch import nn

path, out, runs = sys.argv[1:]
spec = importlib.util.spec_from_file_location("lesson_12", path)
lesson = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lesson)
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
log = {"epochs": [], "loads": [], "saves": []}
run = 0

def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}

def train_one_epoch(model, loader, loss_fn, optimizer, device, original=lesson.train_one_epoch):
    if run == attempt == 0 and len(log["epochs"]) == 2:
        dist.barrier()  # now both have written what they saw in epoch 2
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)  # torchrun ends this process
    seen = {"run": run, "order": list(loader.sampler), "labels": [], "loss": 0.0, "correct": 0}
    seen["before"] = weights(model.module)
    def record(logits, labels):
        loss = loss_fn(logits, labels)
        seen["labels"].append(labels.tolist())
        seen["loss"] += loss.item() * len(labels)
        seen["correct"] += (logits.argmax(1) == labels).sum().item()
        return loss
    result = original(model, loader, record, optimizer, device)
    log["epochs"].append(seen)
    return result

def evaluate(model, loader, device, original=lesson.evaluate):
    result = original(model, loader, device)
    log["epochs"][-1] |= {"val": list(loader.dataset.indices), "after": weights(model), "result": result}
    torch.save(log, f"{out}/rank_{rank}_attempt_{attempt}.pt")
    return result

def load_data(name, data_dir, train, original=lesson.load_data):
    began = time.monotonic()
    time.sleep(0.2 * (1 - rank))
    result = original("digits", data_dir, train)
    log["loads"].append((run, name, began, time.monotonic()))
    return result

def save_checkpoint(checkpoint, path, original=lesson.save_checkpoint):
    log["saves"].append(str(path))
    original(checkpoint, path)

class Plain(lesson.SimpleCNN):
    def __init__(self, *args):
        super().__init__(*args)
        self.bn1 = self.bn2 = self.bn3 = nn.Identity()

for function in [train_one_epoch, evaluate, load_data, save_checkpoint]:
    setattr(lesson, function.__name__, function)
leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
for run, flags in enumerate(json.loads(runs)):
    if run == 2:
        lesson.SimpleCNN = Plain
    lesson.main([str(flag) for flag in flags])
    lesson.join_processes = lambda device: dist.get_rank()  # still the same group
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
leave()
"""


@pytest.fixture
def lesson(lessons):
    return lessons["12"]


def folder_of(output_dir):
    """Return the folder of the checkpoints."""
    return output_dir / "artifacts" / "checkpoints" / "12_distributed"


def latest(output_dir):
    return load(folder_of(output_dir) / "latest_checkpoint.pth")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@in_background
def two_processes(folder):
    """Run WORKER in two processes. Return its output, and what was recorded, by rank and attempt."""
    worker = folder / "worker.py"
    worker.write_text(WORKER, encoding="utf-8")
    names = ["killed", "undisturbed", "plain"]
    runs = [
        [*flags, "--output-dir", str(folder / name)]
        for flags, name in zip([RUN, RUN, PLAIN], names, strict=True)
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max-restarts=1",
    ]
    command += [worker, PATHS["12"], folder, json.dumps(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(list(map(str, command)), env=environment, **pipes)
    try:
        out, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.terminate()  # torchrun then ends its own processes
        process.wait(60)
    assert process.returncode == 0, errors
    logs = {(r, a): load(folder / f"rank_{r}_attempt_{a}.pt") for r in [0, 1] for a in [0, 1]}
    return SimpleNamespace(out=out, logs=logs, **{name: folder / name for name in names})


def epochs_of(two_processes, run=0):
    """Return the epochs of a run as [(recorded by process 0, by process 1)], with those before the kill."""
    recorded = ([], [])
    for (rank, _), log in sorted(two_processes.logs.items()):
        recorded[rank].extend(epoch for epoch in log["epochs"] if epoch["run"] == run)
    return list(zip(*recorded, strict=True))


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
def test_ten_steps_of_two_processes_are_those_of_one(lesson, two_processes, tmp_path, monkeypatch):
    """That is so without BatchNorm, which normalizes by the share of a process."""

    class Plain(lesson.SimpleCNN):
        def __init__(self, *args):
            super().__init__(*args)
            self.bn1 = self.bn2 = self.bn3 = nn.Identity()

    monkeypatch.setattr(lesson, "SimpleCNN", Plain)
    run_lesson(lesson, tmp_path, *PLAIN)
    one, two = latest(tmp_path), latest(two_processes.plain)
    [(seen, _)] = epochs_of(two_processes, run=2)
    assert len(seen["labels"]) == 10
    for name, weights in one["model"].items():
        assert (weights - two["model"][name]).abs().max() < 1e-6
        assert not torch.equal(weights, seen["before"][name]), "they have moved"
    for name in ["Loss/train", "Loss/val", "Accuracy/train", "Accuracy/val"]:
        assert one["history"][0][name] == pytest.approx(two["history"][0][name], rel=1e-5)


@UNIX
def test_the_shares_of_a_batch_are_disjoint_and_complete(lesson, two_processes, tmp_path):
    """Every epoch has another order. One image comes twice, because the shares must have the same size."""
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=True)
    _, labels = lesson.split_train_val(images, labels, 42, IMAGES)[0].tensors
    orders = []
    for first, second in epochs_of(two_processes):
        order = [i for pair in zip(first["order"], second["order"], strict=True) for i in pair]
        assert sorted(order[:-1]) == list(range(IMAGES)) and order[-1] == order[0]
        for process in [first, second]:
            assert [len(batch) for batch in process["labels"]] == [16, 16, 16, 16, 2]
            assert sum(process["labels"], []) == labels[process["order"]].tolist()
        orders.append(tuple(order))
    assert len(orders) == len(set(orders)) == 4


@UNIX
def test_validation_counts_every_image_once(lesson, two_processes, tmp_path):
    """Loss and accuracy are computed again on all images at once, and are the same in both processes."""
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=True)
    images, labels = lesson.split_train_val(images, labels, 42, IMAGES)[1].tensors
    for first, second in epochs_of(two_processes):
        assert sorted(first["val"] + second["val"]) == list(range(IMAGES))
        model = lesson.SimpleCNN()
        model.load_state_dict(first["after"])
        with torch.no_grad():
            logits = model.eval()(lesson.normalize(images))
        accuracy = 100 * (logits.argmax(dim=1) == labels).double().mean().item()
        loss = nn.functional.cross_entropy(logits, labels).item()
        assert first["result"] == second["result"] == pytest.approx((loss, accuracy), rel=1e-5)


@UNIX
def test_training_metrics_are_sums_over_both_processes(two_processes):
    """They are those of all images, and so is the number of images per second."""
    for row, seen in zip(latest(two_processes.killed)["history"], epochs_of(two_processes), strict=True):
        images = IMAGES + 1  # with the one that comes twice
        assert row["Loss/train"] == pytest.approx(sum(process["loss"] for process in seen) / images, rel=1e-5)
        assert row["Accuracy/train"] == pytest.approx(
            100 * sum(process["correct"] for process in seen) / images
        )
        assert row["ImagesPerSecond"] == pytest.approx(images / row["Seconds"])
        assert (row["Loss/val"], row["Accuracy/val"]) == seen[0]["result"]


@UNIX
def test_both_processes_have_the_same_weights(lesson, two_processes):
    """They are equal before every epoch, and at validation, where BatchNorm's running averages are equal, too."""
    torch.manual_seed(42)
    epochs = epochs_of(two_processes)
    assert_same_state(epochs[0][0]["before"], dict(lesson.SimpleCNN().state_dict()))
    for first, second in epochs:
        for moment in ["before", "after"]:
            assert_same_state(first[moment], second[moment])


@UNIX
def test_process_0_alone_writes_and_prints(lesson, two_processes):
    """Every epoch is one line, and every start has one event file. A plain SimpleCNN loads the checkpoint."""
    logs = two_processes.logs
    assert logs[1, 0]["saves"] == logs[1, 1]["saves"] == [] and logs[0, 0]["saves"] and logs[0, 1]["saves"]
    lines = re.findall(r"^Epoch +\d+/\d+", two_processes.out, flags=re.MULTILINE)
    assert lines == [f"Epoch  {epoch}/4" for epoch in [1, 2, 3, 4, 1, 2, 3, 4]] + ["Epoch  1/1"]
    assert two_processes.out.count("Processes: 2, started by torchrun | threads each: 1\n") == 4
    for folder, starts in [
        (two_processes.killed, 2),
        (two_processes.undisturbed, 1),
        (two_processes.plain, 1),
    ]:
        assert len(list(folder.rglob("events*"))) == starts
    lesson.SimpleCNN().load_state_dict(load(folder_of(two_processes.killed) / "best_model.pth")["model"])


@UNIX
def test_auto_means_what_process_0_has_found(two_processes):
    """It loads the data first. The other one then loads the same data, even where --data auto finds another."""
    loads = [[load for load in two_processes.logs[rank, 1]["loads"] if load[0] == 2] for rank in [0, 1]]
    [(_, first, _, ended)], [(_, second, began, _)] = loads
    assert (first, second) == ("auto", "digits") and began >= ended
    assert latest(two_processes.plain)["hyperparameters"]["data"] == "digits"


# Restarts and resuming


@UNIX
def test_a_killed_process_costs_one_epoch_and_changes_nothing(two_processes):
    """The run continues after the last saved epoch, and ends like an undisturbed run, bit for bit."""
    assert two_processes.out.count("Resuming after epoch 2.") == 1
    assert len(two_processes.logs[0, 0]["epochs"]) == 2
    for name in ["latest_checkpoint.pth", "best_model.pth"]:
        one, other = (
            load(folder_of(path) / name) for path in [two_processes.killed, two_processes.undisturbed]
        )
        assert_same_state(one, other)
    assert len(latest(two_processes.killed)["history"]) == 4
    [run] = (two_processes.killed / "tensor_board" / "12_distributed").iterdir()
    assert [step for step, _ in read_scalars(run)["Accuracy/val"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("place", ["load_data", "train_one_epoch"])
@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_restart_before_the_first_checkpoint_begins_anew(lesson, tmp_path, monkeypatch, place, flags):
    """It does not matter whether the run that died had already created its folder."""

    def die(*_, **__):
        raise KeyboardInterrupt

    be_one_of(monkeypatch, lesson, processes=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lesson, place, die)
        run_lesson(lesson, tmp_path, "--subset", 32, *flags)
    shutil.rmtree(tmp_path / "tensor_board", ignore_errors=True)  # named by the second of the start
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


def test_a_restart_continues_no_run_but_its_own(lesson, tmp_path, monkeypatch):
    """Without --resume, a run that was there before is refused again, as it was by the first attempt."""
    be_one_of(monkeypatch, lesson, processes=1)
    run_lesson(lesson, tmp_path, "--subset", 32)
    before = contents(tmp_path)
    for attempt in [0, 1]:
        be_one_of(monkeypatch, lesson, processes=1, attempt=attempt, run_id="two")
        with pytest.raises(SystemExit, match="holds a run on digits"):
            run_lesson(lesson, tmp_path, "--subset", 32, "--epochs", 2)
    assert contents(tmp_path) == before


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(lesson, tmp_path):
    """It may have more epochs."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_lesson(lesson, whole, *RUN)
    run_lesson(lesson, parts, *RUN, "--epochs", 2)
    resume(lesson, parts, "--data", "digits", "--epochs", 4)
    for name in ["latest_checkpoint.pth", "best_model.pth"]:
        one, other = (load(folder_of(folder) / name) for folder in [whole, parts])
        one["hyperparameters"]["epochs"] = other["hyperparameters"]["epochs"]  # of the best model, 2 or 4
        assert_same_state(one, other)


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
    names.clear()
    resume(lesson, tmp_path, "--epochs", 2)
    assert set(names) == {"digits"} and latest(tmp_path)["hyperparameters"]["data"] == "digits"


@UNIX
def test_a_run_of_two_processes_continues_in_one(two_processes, lesson, tmp_path):
    """A checkpoint does not depend on the number of processes."""
    shutil.copytree(two_processes.killed, tmp_path, dirs_exist_ok=True)
    output = resume(lesson, tmp_path, "--data", "digits", "--epochs", 5)
    assert "Resuming after epoch 4." in output and "Epoch  5/5" in output
    assert (folder_of(tmp_path) / "checkpoint_epoch_5.pth").exists()


def test_a_batch_must_be_a_multiple_of_the_processes(lesson, tmp_path, monkeypatch, capsys):
    """Otherwise it is one sentence with status 2. When a run is resumed, --batch-size may change to fit."""
    run_lesson(lesson, tmp_path, "--subset", 64, "--batch-size", 32)
    be_one_of(monkeypatch, lesson, processes=3)
    before = contents(tmp_path)
    for flags in [["--resume", "--epochs", 2], ["--batch-size", 32, "--overwrite"]]:
        with pytest.raises(SystemExit) as error:
            run_lesson(lesson, tmp_path, "--subset", 64, *flags)
        errors = capsys.readouterr().err
        assert error.value.code == 2 and errors.count("error: ") == 1
        assert errors.endswith("--batch-size must be a multiple of the 3 processes\n")
    assert contents(tmp_path) == before
    resume(lesson, tmp_path, "--data", "digits", "--epochs", 2, "--batch-size", 33)
    checkpoint = latest(tmp_path)
    assert len(checkpoint["history"]) == 2 and checkpoint["hyperparameters"]["batch_size"] == 33


def test_a_resumed_run_keeps_the_batch_size_that_fits_its_processes(lesson, tmp_path, monkeypatch):
    """--resume alone is enough, although the default of --batch-size is no multiple of three."""
    be_one_of(monkeypatch, lesson, processes=3)
    run_lesson(lesson, tmp_path, "--subset", 64, "--batch-size", 33)
    resume(lesson, tmp_path, "--data", "digits", "--epochs", 2)
    assert latest(tmp_path)["hyperparameters"]["batch_size"] == 33 and len(latest(tmp_path)["history"]) == 2


def test_a_second_run_needs_overwrite(lesson, tmp_path):
    """It exits with one sentence that names the data of the run that is there. --overwrite clears the folder."""
    run_lesson(lesson, tmp_path, "--subset", 32)
    (folder := folder_of(tmp_path)).joinpath("old").touch()
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path, "--subset", 32)
    sentence = f"{folder} holds a run on digits. Continue it (--resume) or replace it (--overwrite)."
    assert error.value.code == sentence and contents(tmp_path) == before
    shutil.rmtree(tmp_path / "tensor_board")  # both starts may fall into the same second, which names the run
    run_lesson(lesson, tmp_path, "--subset", 32, "--overwrite", "--seed", 1)
    assert not (folder / "old").exists() and latest(tmp_path)["hyperparameters"]["seed"] == 1


def test_resume_without_a_run_gets_one_sentence(lesson, tmp_path, capsys):
    """Nothing is created. --resume and --overwrite exclude each other."""
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path, "--resume")
    path = folder_of(tmp_path) / "latest_checkpoint.pth"
    assert error.value.code == f"{path} does not exist. Train a model first." and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as error:
        run_lesson(lesson, tmp_path, "--resume", "--overwrite")
    assert error.value.code == 2 and "not allowed with argument" in capsys.readouterr().err


# One process


def test_without_torchrun_one_process_trains(lesson, tmp_path, monkeypatch):
    """That is so even if something else than torchrun has set RANK and WORLD_SIZE, as some clusters do."""
    for name, value in [("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")]:
        monkeypatch.setenv(name, value)
    output = run_lesson(lesson, tmp_path, "--epochs", 2, "--batch-size", 50)  # no multiple of eight
    assert f"Processes: 1, started without torchrun | threads each: {torch.get_num_threads()}\n" in output
    images, labels, *_ = lesson.load_data("digits", tmp_path, train=True)
    images, labels = lesson.split_train_val(images, labels, 42, 256)[1].tensors
    best, model = load(folder_of(tmp_path) / "best_model.pth"), lesson.SimpleCNN()
    model.load_state_dict(best["model"])
    with torch.no_grad():
        accuracy = (
            100 * (model.eval()(lesson.normalize(images)).argmax(dim=1) == labels).double().mean().item()
        )
    assert f"Best validation accuracy: {accuracy:.2f} % in epoch {len(best['history'])}\n" in output
    for row, line in zip(
        latest(tmp_path)["history"], re.findall(r"^Epoch.*", output, re.MULTILINE), strict=True
    ):
        assert row["ImagesPerSecond"] == pytest.approx(256 / row["Seconds"])
        assert f"| {row['ImagesPerSecond']:,.0f} images/s |" in line


def test_a_loss_that_is_not_finite_gets_one_sentence(lesson, tmp_path, monkeypatch):
    """The sentence says what to try."""
    monkeypatch.setattr(lesson, "evaluate", lambda *_: (math.nan, 10.0))
    with pytest.raises(
        SystemExit, match=r"^The loss is no longer a finite number\. Try a smaller learning rate"
    ):
        run_lesson(lesson, tmp_path, "--subset", 32)


# The group of processes


@pytest.fixture
def group(monkeypatch):
    """What join_processes() passes to PyTorch, in a process that torchrun has started. Nothing is joined."""
    group = SimpleNamespace(rank=0, backends=[], device_ids=[], gpus=[], handlers=[])

    def init_process_group(backend=None, *_, device_id=None, **__):
        group.backends.append(backend)
        group.device_ids.append(device_id)

    for name, value in [("GROUP_WORLD_SIZE", "1"), ("TORCHELASTIC_RESTART_COUNT", "0")]:
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda *_: iter([(dist.HashStore(), group.rank, 2)]))
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: group.rank)
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setattr(torch.cuda, "set_device", group.gpus.append)
    monkeypatch.setattr(signal, "signal", lambda *args: group.handlers.append(args))
    return group


def test_a_device_is_named_for_gpus_only(lesson, group):
    """gloo, which connects CPUs, has no device_id. nccl gets the GPU of this process."""
    assert lesson.join_processes("cpu") == 0
    assert (group.backends, group.device_ids, group.gpus) == (["gloo"], [None], [])
    lesson.join_processes("cuda:1")
    assert group.backends[1] == "nccl" and group.device_ids[1] == torch.device("cuda:1")
    assert group.gpus == ["cuda:1"]


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


def test_one_process_of_every_machine_downloads_the_data(lesson, monkeypatch):
    """Four threads stand for four processes on two machines. The others of a machine wait for the download."""
    own, lock, meeting = threading.local(), threading.Lock(), threading.Barrier(4, timeout=60)
    loads, complete, sent = [], set(), []

    def broadcast_object_list(values):
        if own.rank == 0:
            sent.append(values[0])
        meeting.wait()
        values[0] = sent[-1]
        meeting.wait()

    def load_data(name, data_dir, train):
        machine = own.rank // 2
        with lock:
            loads.append((own.rank, name, machine in complete))
        time.sleep(0.1)
        complete.add(machine)
        return "images", "labels", "class names", "digits"

    def process(rank):
        own.rank = rank
        return lesson.load_data_once("auto", "data")

    def local_rank(name, default=None):
        return str(own.rank % 2)

    fake = SimpleNamespace(get_rank=lambda: own.rank, broadcast_object_list=broadcast_object_list)
    fake.barrier = meeting.wait
    monkeypatch.setattr(lesson, "dist", fake)
    monkeypatch.setattr(lesson, "os", SimpleNamespace(environ=SimpleNamespace(get=local_rank)))
    monkeypatch.setattr(lesson, "load_data", load_data)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(process, range(4)))
    assert results == [("images", "labels", "class names", "digits")] * 4
    expected = [(0, "auto", False), (1, "digits", True), (2, "digits", False), (3, "digits", True)]
    assert sorted(loads) == expected and loads[0][0] == 0
