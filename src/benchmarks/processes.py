"""Measure what processes are worth against threads: images per second of lesson 12, in turn.

    python src/benchmarks/processes.py --json docs/processes.json    # about five minutes on 2 CPU cores

On as many cores as there are processes: one process with a thread on every core, then as many processes with
one thread each, then one process with one thread, round by round. The rate is that of the second epoch, because
the first one includes what happens only once.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import LAUNCHER, PATHS, describe_machine, make_parser, spread, write_json
from tables import processes_table
from tqdm import tqdm


def train(processes, threads, args):
    """Train for two epochs in that many processes. Return the second epoch's images per second."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else [])]
    command += [args.launcher] if args.launcher else []
    with tempfile.TemporaryDirectory() as folder:
        command += [PATHS["12"], "--epochs", "2", "--subset", str(args.subset), "--device", "cpu"]
        command += ["--data", args.data, "--data-dir", args.data_dir, "--output-dir", folder]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        if process.returncode != 0:
            sys.exit(f"Lesson 12 in {processes} processes failed: {process.stderr}")
        [path] = Path(folder).rglob("latest_checkpoint.pth")
        return torch.load(path, weights_only=True)["history"][1]["ImagesPerSecond"]


def build_parser():
    """Return the parser of this command line."""
    parser = make_parser()
    add = parser.add_argument
    add("--processes", type=int, default=2, help="processes, and threads of the one they are compared with")
    add("--rounds", type=int, default=5, help="how often each way is measured")
    add("--subset", type=int, default=10_000, help="as in lesson 12")
    add("--launcher", type=Path, help=LAUNCHER)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    ways = [(1, args.processes), (args.processes, 1), (1, 1)]
    rates = {f"{processes} x {threads}": [] for processes, threads in ways}
    for _ in tqdm(range(args.rounds), unit="round", disable=None):
        for (processes, threads), row in zip(ways, rates.values(), strict=True):
            row.append(train(processes, threads, args))

    rates = {way: np.array(row) for way, row in rates.items()}
    first = rates[f"1 x {args.processes}"]
    report = {"machine": describe_machine(), "data": args.data_name}
    report["images_per_second"] = {way: spread(row) for way, row in rates.items()}
    report["ratio"] = {way: spread(row / first) for way, row in rates.items()}
    print(processes_table(report))
    write_json(args.json, report)


if __name__ == "__main__":
    main()
