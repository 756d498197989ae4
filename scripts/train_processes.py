"""Trains in several processes of this machine, each with devices of its own.

    python scripts/train_processes.py --processes 4 -- recurrent --run-dir logs/four
    python scripts/train_processes.py --processes 2 --devices-each 2 -- --run-dir logs/four --resume

What follows -- are the arguments of senano_jax.train; the same go to every process, and a run of several needs
--run-dir. SIGTERM, SIGINT and SIGHUP are passed on. When a process fails, the others have 10 seconds to end, and are
killed; the status is that of the first that failed, 128 + N for one that signal N ended.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from senano_jax.errors import UserError, check_counts, one_line_errors

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE_S = 10.0
LOOK_S = 0.1


def main(args: argparse.Namespace) -> int:
    """Returns the status to end with. Raises UserError for numbers that cannot be."""
    check_counts({"--processes": args.processes, "--devices-each": args.devices_each}, least=1)
    if not args.arguments:
        raise UserError("nothing to train; give the arguments of senano_jax.train behind --, such as -- demo")
    processes: list[subprocess.Popen] = []
    received: list[tuple[int, int]] = []  # signals, and how many processes got them when they came

    def pass_on(number: int, _) -> None:
        received.append((number, len(processes)))
        for process in processes:
            process.send_signal(number)

    for number in (n for n in PASSED_ON if signal.getsignal(n) != signal.SIG_IGN):  # as nohup leaves SIGHUP
        signal.signal(number, pass_on)
    address = f"127.0.0.1:{free_port()}"
    for index in range(args.processes):
        # In a group of its own, so that a terminal's Ctrl-C comes once, from here.
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "senano_jax.train", *args.arguments],
                env=os.environ | environment(index, args.processes, args.devices_each, address),
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        )
        for number, told in received:
            if told <= index:  # it came while this one was being started
                processes[index].send_signal(number)
    return wait_for(processes)


def free_port() -> int:
    """One of this machine, for process 0 to listen on."""
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def environment(index: int, processes: int, devices_each: int, address: str) -> dict[str, str]:
    """What process `index` is told: where the others are, and which GPUs of the visible ones, or how many CPU devices,
    are its own."""
    first = index * devices_each
    on_cpu = {"JAX_NUM_CPU_DEVICES": str(devices_each)} if os.environ.get("JAX_PLATFORMS") == "cpu" else {}
    return on_cpu | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
        "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(first, first + devices_each))),
    }


def wait_for(processes: Sequence[subprocess.Popen]) -> int:
    """0 once all have ended with it; else the status of the first that did not, once all have ended."""
    while True:
        statuses = [process.poll() for process in processes]
        failed = [index for index, status in enumerate(statuses) if status]
        if failed or None not in statuses:
            break
        time.sleep(LOOK_S)
    if not failed:
        return 0
    status = statuses[failed[0]]
    if status < 0:
        print(f"process {failed[0]} was ended by {signal.Signals(-status).name}; ending the others", file=sys.stderr)
    deadline = time.monotonic() + GRACE_S
    for process in processes:  # a common refusal, or a save, is theirs to end
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return status if status > 0 else 128 - status


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices-each", type=int, default=1, help="GPUs, or CPU devices, of each process")
    parser.add_argument("arguments", nargs="*", help="of senano_jax.train, behind --")
    return parser.parse_args()


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(parse_args()))
