"""Each planted fault of a machine becomes one finding that names it; a healthy one none."""

import pytest

from megatron_amrlhf.doctor.judge_ranks import judge_devices, judge_disks, judge_limits, judge_locks
from megatron_amrlhf.doctor.judge_versions import judge_versions
from megatron_amrlhf.doctor.records import CheckpointRoom, Disk, Lock, listed, ranks_text
from tests.unit.doctor.samples import PINS, VERSIONS, facts, gpu, gpu_facts, only

GIB = 2**30
LIMITS = facts().limits


def test_healthy_machines_have_no_findings():
    for ranks in ([facts(0), facts(1)], [gpu_facts(0), gpu_facts(1, "node2")]):
        only(judge_versions(ranks, PINS), "ok")
        only(judge_devices(ranks), "ok")
        only(judge_limits(ranks), "ok")
        only(judge_disks(ranks, None), "ok")
        only(judge_locks(ranks), "ok")


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("0.19.7", ("deepspeed 0.19.7", "requirements.txt wants deepspeed==0.19.8")),
        (None, ("deepspeed is not installed",)),
    ],
)
def test_a_wrong_version_is_named_with_its_host(version, words):
    wrong = facts(1, "node2", versions=VERSIONS | {"deepspeed": version})
    errors = judge_versions([facts(0), wrong], PINS)
    assert errors[0].level == "error" and errors[0].message.startswith("node2: ")
    assert all(word in errors[0].message for word in words)
    assert errors[0].fix == "pip install 'deepspeed==0.19.8'"


def test_a_wrong_python_is_named():
    errors = judge_versions([facts(python="3.13.0")], PINS)
    assert "Python 3.13.0" in only(errors, "error").message


def test_versions_that_all_fit_but_differ_are_an_error():
    other = facts(1, "node2", versions=VERSIONS | {"rich": "13.0"})
    message = only(judge_versions([facts(0), other, facts(2)], PINS), "error").message
    assert message == "rich differs: 14.0 on node1 (ranks 0, 2); 13.0 on node2 (rank 1)"


def test_a_gpu_that_torch_does_not_find_is_an_error():
    assert "finds no GPU" in only(judge_devices([facts(hidden_gpu=True)]), "error").message


def test_a_gpu_in_use_is_a_warning():
    busy = gpu_facts(gpus=[gpu("a", index=3, free_gib=20.0)])
    message = only(judge_devices([busy]), "warning").message
    assert message == "node1: 60.0 of 80 GiB of GPU 3 are in use"


def test_two_ranks_with_one_gpu_are_an_error():
    same = [gpu_facts(rank, gpus=[gpu("a")]) for rank in (4, 5)]
    assert "ranks 4-5 of node1 have the same GPU" in only(judge_devices(same), "error").message


@pytest.mark.parametrize(
    ("other", "level"),
    [
        (facts(1, "node2"), "error"),
        (gpu_facts(1, "node2", gpus=[gpu("b", name="A100")]), "warning"),
        (gpu_facts(1, "node2", driver="535.2"), "warning"),
    ],
)
def test_devices_that_differ_are_named(other, level):
    message = only(judge_devices([gpu_facts(0), other]), level).message
    assert "node1 (rank 0)" in message and "node2 (rank 1)" in message


def test_more_ranks_or_threads_than_cores_are_a_warning():
    crowded = [facts(rank, cores=[0, 1]) for rank in range(4)]
    assert "4 ranks share 2 CPU cores" in only(judge_devices(crowded), "warning").message
    threaded = [facts(rank, cores=[0, 1, 2, 3], threads=4) for rank in range(2)]
    assert only(judge_devices(threaded), "warning").fix == "export OMP_NUM_THREADS=2"
    bound = [facts(rank, cores=[2 * rank, 2 * rank + 1], threads=2) for rank in range(2)]
    only(judge_devices(bound), "ok")


def test_little_memory_is_a_warning():
    full = facts(free_memory_gib=0.5)
    assert "0.5 GiB of memory" in only(judge_devices([full]), "warning").message


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("open files", 100, "error"),
        ("open files", 512, "warning"),
        ("open files", 1024, "ok"),
        ("processes", 32, "error"),
        ("processes", 1000, "warning"),
        ("processes", 4096, "ok"),
        ("locked memory", 65536, "ok"),  # no RDMA here
        ("core size", 0, "ok"),
    ],
)
def test_a_tiny_ulimit_is_found(name, value, level):
    found = only(judge_limits([facts(limits=LIMITS | {name: value})]), level)
    if level != "ok":
        assert found.message.startswith(f"node1: {value} {name}") and "ulimit -" in found.fix


def test_open_files_are_judged_by_the_number_of_ranks():
    def level(count: int) -> str:
        many = [facts(rank, limits=LIMITS | {"open files": 1024}) for rank in range(count)]
        return judge_limits(many)[0].level

    assert [level(count) for count in (32, 33, 200)] == ["ok", "warning", "error"]


def test_locked_memory_counts_with_rdma():
    small = gpu_facts(infiniband=True, limits=LIMITS | {"locked memory": 64 * 2**20})
    assert "64 MiB of locked memory" in only(judge_limits([small]), "error").message


@pytest.mark.parametrize(
    ("ranks", "gib", "level"), [(1, 0.0625, "warning"), (8, 0.0625, "error"), (8, 4.0, "ok")]
)
def test_a_small_shared_memory_is_found_where_gpus_need_it(ranks, gib, level):
    found = judge_limits([gpu_facts(rank, shm_gib=gib) for rank in range(ranks)])
    assert level == "ok" or "/dev/shm has 64 MiB" in only(found, level).message
    only(judge_limits([facts(shm_gib=gib)]), "ok")


@pytest.mark.parametrize(
    ("free", "level"), [(20.0, "error"), (40.0, "warning"), (99.0, "ok"), (0.01, "error")]
)
def test_room_is_compared_with_the_checkpoints(free, level):
    disk = Disk("run folder", "/data/runs/x", free, True)
    room = CheckpointRoom(30 * GIB, 3)
    assert "30.0 GiB" in only(judge_disks([facts(disks=[disk])], room), level).message


def test_a_full_or_forbidden_folder_is_found():
    for disk, level in (
        (Disk("temporary files", "/tmp", 0.5, True), "warning"),
        (Disk("temporary files", "/tmp", 0.01, True), "error"),
        (Disk("temporary files", "/tmp", 50.0, False), "error"),
    ):
        message = only(judge_disks([facts(disks=[disk])], None), level).message
        assert message.startswith("node1: temporary files /tmp")


@pytest.mark.parametrize(("age", "words"), [(30.0, "wait"), (7200.0, "waits for ever")])
def test_a_lock_file_is_named_once_for_all_hosts_that_see_it(age, words):
    lock = Lock("/home/me/.cache/torch_extensions/x/lock", age)
    ranks = [facts(0, locks=[lock]), facts(1, "node2", locks=[lock])]
    found = only(judge_locks(ranks), "warning")
    assert found.message.startswith(f"{lock.path} on node1, node2, ") and words in found.fix
    assert "delete" in found.fix


def test_one_fault_of_many_hosts_is_one_line():
    many = [facts(r, f"node{r}", limits=LIMITS | {"processes": 100}) for r in range(512)]
    message = only(judge_limits(many), "warning").message
    assert message.startswith("node0, node1, node2, node3, node4 and 507 more: ")


def test_names_and_ranks_are_summarised():
    assert listed(["a", "b", "a"]) == "a, b"
    assert ranks_text([3]) == "rank 3" and ranks_text([7, 0, 1, 2]) == "ranks 0-2, 7"
