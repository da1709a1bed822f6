"""Run the lessons at their defaults with several seeds, and keep what they reach in docs/results.json.

    python src/benchmarks/results.py               # everything that is not in docs/results.json yet: hours
    python src/benchmarks/results.py --lessons 02  # this lesson only

Every finished run is added to the file at once, so the command can be stopped at any time and started again:
what is in the file is not run again, and a lesson that saves checkpoints resumes after its last epoch. To repeat
a run, delete its entry. Nothing else should run on the machine meanwhile, because times are measured too; if
something must, add --untimed.

src/benchmarks/tables.py writes the results into the guides.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import LAUNCHER, PATHS, ROOT, describe_machine, read_json, read_scalars, write_json
from tqdm import tqdm

RESULTS = ROOT / "docs" / "results.json"
# How many seeds of each lesson; lesson 03 trains exactly as lesson 02, and lesson 10 repeats everything by itself
SEEDS = {f"{number:02}": 3 for number in range(1, 13)} | {"01": 1, "03": 1, "10": 1}


def collect(number, folder):
    """Read the metrics of a finished run from its output folder. Accuracies in percent, gaps in points.

    Return {variant: metrics}; a lesson that trains one network has the single variant "". A variant is named by
    the folder of its curves, tensor_board/<lesson>/<variant>/<run>.
    """
    output = (folder / "output.txt").read_text(encoding="utf-8")

    def printed(pattern):
        return re.findall(pattern, output, flags=re.MULTILINE)

    if number == "01":  # prints its metrics, and writes no others
        return {"": {"train_accuracy": float(printed(r"train loss .*acc +([\d.]+) %")[-1])}}
    if number == "10":  # the accuracies of a variant, by the number of labelled images per class
        return {
            f"{variant}_{count}": {"test_accuracy": sum(draws) / len(draws), "draws": draws}
            for variant, rows in read_json(folder / "artifacts" / "transfer_learning.json").items()
            for count, draws in rows.items()
        }
    variants, tensor_board = {}, folder / "tensor_board"
    for run_dir in sorted({path.parent for path in tensor_board.rglob("events.out.tfevents.*")}):
        curves = read_scalars(run_dir)
        points = curves["Accuracy/val"]
        if number == "09":  # where some runs lose what they have learned: what the last epoch has left of it
            points = points[-1:]
        best_epoch, val_accuracy = max(points, key=lambda point: point[1])  # the first of equal ones
        variants["/".join(run_dir.relative_to(tensor_board).parts[1:-1])] = {
            "val_accuracy": val_accuracy,
            "best_epoch": best_epoch,
            "epochs": len(curves["Accuracy/val"]),
            "gap": curves["Overfitting/accuracy_gap"][-1][1],
        }
    if number == "05":  # of the best model, without augmentation: see measure_gaps() in the lesson
        for variant, gap in printed(r"^  (\w+) +training .*, gap +(-?[\d.]+) points$"):
            variants[variant]["gap"] = float(gap)
    if number == "06":
        del variants[""]["gap"]  # its training images are augmented, so harder than the validation images
        report = read_json(folder / "artifacts" / "evaluation_report.json")
        variants[""] |= {
            "test_accuracy": 100 * report["accuracy"],
            "top_3_accuracy": 100 * report["top_k"]["3"],
            "mean_confidence": 100 * report["mean_confidence"],
            "calibration_error": 100 * report["expected_calibration_error"],
        }
    if number == "08":  # what each rule would have made of the run
        rule = r"^  (\w+/val) +(\d+) +([\d.]+) +(?:epoch +(\d+)|not in +\d+) +(\d+) +(\d+) epochs .* ([\d.]+) points$"
        variants[""]["rules"] = {
            f"{metric} {patience} {min_delta}": {
                "stops_after": int(stop) if stop else None,
                "best_epoch": int(epoch),
                "saved_epochs": int(saved),
                "lost_points": float(lost),
            }
            for metric, patience, min_delta, stop, epoch, saved, lost in printed(rule)
        }
    if number == "11":
        for split, accuracy in printed(r"^  (\w+) +[\d.]+ % +([\d.]+) %$"):
            variants[split]["test_accuracy"] = float(accuracy)
    return variants


def can_resume(lesson, folder):
    """Return whether a run of the lesson, "01_basic_training" and so on, left a checkpoint in its folder."""
    return any((folder / "artifacts" / "checkpoints" / lesson).rglob("latest_checkpoint.pth"))


def run(number, seed, args):
    """Run a lesson in a process of its own. Return its entry for docs/results.json."""
    lesson = PATHS[number]
    folder = args.work_dir / f"{lesson.stem}_seed_{seed}"
    flags = ["--seed", str(seed), "--output-dir", folder, "--data", "cifar10"]
    flags += ["--data-dir", args.data_dir] if args.data_dir else []
    flags += ["--run-all-epochs"] if number == "08" else []  # so that its rules can be compared
    resumed = can_resume(lesson.stem, folder)
    if resumed:
        flags += ["--resume"]
    elif folder.exists():
        shutil.rmtree(folder)  # what a stopped run left behind
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-u", *([args.launcher] if args.launcher else []), lesson, *flags]
    start = time.perf_counter()
    with open(folder / "output.txt", "a", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        peak_memory = None
        if hasattr(os, "wait4"):  # Linux and macOS also say how much memory the process took
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            # On Linux this is no less than what this process took when it started the other, about 0.7 GB.
            peak_memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        process.wait()
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        sys.exit(f"{lesson.name} failed: see {folder / 'output.txt'}.")
    timed = not (resumed or args.untimed)  # of a resumed run only a part was timed
    return {
        "lesson": number,
        "seed": seed,
        "data": args.data_name,
        "seconds": round(seconds, 1) if timed else None,
        "peak_memory_bytes": peak_memory,
        "machine": describe_machine(),
        "arms": collect(number, folder),
    }


def build_parser():
    """Return the parser of this command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--lessons", nargs="+", choices=list(SEEDS), default=list(SEEDS), help="the lessons to run")
    add("--first-seed", type=int, default=42, help="the seeds are this one and those that follow")
    add("--data-dir", type=Path, help="folder of CIFAR-10; the lessons' own default if it is not given")
    add("--data-name", default="CIFAR-10", help="what the tables call the data")
    add(
        "--work-dir", type=Path, default=ROOT / "artifacts" / "results", help="folder for what the runs write"
    )
    add("--untimed", action="store_true", help="keep no times, because the machine has other things to do")
    add("--launcher", type=Path, help=LAUNCHER)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    results = read_json(RESULTS, [])
    done = {(entry["lesson"], entry["seed"]) for entry in results}
    # The first seed of every lesson comes before the second of any: soon there is something to look at.
    rounds = range(max(SEEDS.values()))
    wanted = [(number, args.first_seed + i) for i in rounds for number in args.lessons if i < SEEDS[number]]
    for number, seed in tqdm([pair for pair in wanted if pair not in done], unit="run"):
        results.append(run(number, seed, args))
        write_json(RESULTS, sorted(results, key=lambda entry: (entry["lesson"], entry["seed"])))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command continues.")
