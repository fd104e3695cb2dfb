"""Loaded by every Python with this folder in PYTHONPATH: two hosts of two ranks, and a fault.

PLANT is what goes wrong on rank PLANT_RANK of the doctor: "slow" delays what it sends, "stuck"
keeps it from the first all-reduce, "die" ends it before the network is measured. Ranks 2 and 3 take
themselves for another host, whose clock is SKEW_SECONDS ahead.
"""

import builtins
import os
import socket
import time

COMMAND = "megatron_amrlhf.doctor.command"
SKEW_SECONDS, DELAY_SECONDS = 5.0, 0.1
RANK = int(os.environ["RANK"])
real_import, real_time = builtins.__import__, time.time


def plant(name: str) -> None:
    import torch.distributed as dist  # noqa: PLC0415 - not in every Python that starts

    real_send, real_start = dist.batch_isend_irecv, dist.init_process_group

    def send_late(operations):
        time.sleep(DELAY_SECONDS)
        return real_send(operations)

    def start_and_stick(*arguments, **options):
        real_start(*arguments, **options)
        time.sleep(3600)

    if name == "slow":
        dist.batch_isend_irecv = send_late
    elif name == "stuck":
        dist.init_process_group = start_and_stick
    elif name == "die":
        dist.init_process_group = lambda *arguments, **options: os._exit(9)


planted = []


def import_and_plant(name, *arguments, **options):
    """Python's own import; the fault comes once the doctor has been imported."""
    found = real_import(name, *arguments, **options)
    if name == COMMAND and not planted and RANK == int(os.environ["PLANT_RANK"]):
        planted.append(name)
        plant(os.environ["PLANT"])
    return found


builtins.__import__ = import_and_plant
socket.gethostname = lambda: f"node{1 + RANK // 2}"
if RANK >= 2:
    time.time = lambda: real_time() + SKEW_SECONDS
