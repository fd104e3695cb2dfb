"""``amrlhf doctor``: the checks in their order."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from pydantic import TypeAdapter

from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.doctor import machine, software
from megatron_amrlhf.doctor.clocks import compare_clocks
from megatron_amrlhf.doctor.judge_dtypes import judge_dtypes
from megatron_amrlhf.doctor.judge_job import (
    judge_absent,
    judge_clocks,
    judge_network,
    judge_shared_files,
    links_of,
)
from megatron_amrlhf.doctor.judge_ranks import judge_devices, judge_disks, judge_limits, judge_locks
from megatron_amrlhf.doctor.judge_run import judge_run
from megatron_amrlhf.doctor.judge_versions import judge_versions
from megatron_amrlhf.doctor.links import LINK_BYTES, Measurement
from megatron_amrlhf.doctor.meeting import Absent, Ended, Meeting, Unreachable
from megatron_amrlhf.doctor.options import HOSTS_VARIABLE, read_config, run_folder
from megatron_amrlhf.doctor.plan import plan_links
from megatron_amrlhf.doctor.records import (
    CheckpointRoom,
    Finding,
    RankFacts,
    listed,
    ranks_by_host,
)
from megatron_amrlhf.doctor.report import EXIT_FOUND_ERROR, Report
from megatron_amrlhf.doctor.shared_files import look_from_everywhere
from megatron_amrlhf.errors import EXIT_USER_ERROR, UserError, printable
from megatron_amrlhf.files import expanded
from megatron_amrlhf.interrupts import loading
from megatron_amrlhf.parallel.dtypes import bfloat16_factor, own_choice
from megatron_amrlhf.slurm import host_names

START_SECONDS = 3600.0  # in which rank 0 reads the run's data


def run(arguments: argparse.Namespace) -> int:
    """Examines this machine, or the job whose rank this process is. Rank 0 prints.

    Returns:
        0, or 1 where a check has found an error or this rank has lost rank 0.

    Raises:
        UserError: the configuration or the environment is wrong.
    """
    config = read_config(arguments.config, arguments.overrides)
    folder = run_folder(config, arguments.folder)
    examination = None
    try:
        meeting = Meeting(arguments.timeout)
        examination = Examination(meeting, config, folder)
        code = examination.hold(arguments.json)
        meeting.leave()
    except Unreachable as error:
        print(printable(f"error   arrival      {error}"), file=sys.stderr, flush=True)
        code = EXIT_FOUND_ERROR
    if examination is not None and examination.hangs:  # the process would not end
        sys.stdout.flush()
        os._exit(code)
    return code


class Examination:
    """The checks of a job. Every rank does the same, rank 0 also judges and reports.

    Args:
        meeting: of all ranks.
        config: the run that is to be started; None: any.
        folder: its folder.
    """

    def __init__(self, meeting: Meeting, config: Config | None, folder: Path):
        self._meeting, self._config, self._folder = meeting, config, folder
        self._report = Report()
        self._hosts: list[str] = []  # of each rank, on rank 0
        self._measurement: Measurement | None = None

    @property
    def hangs(self) -> bool:
        """Whether a collective has not ended."""
        return self._measurement is not None and self._measurement.is_stuck

    def hold(self, json_file: str | None) -> int:
        """All checks and the report; the exit code, the same on all ranks that rank 0 reaches.

        Raises:
            Unreachable: this rank has lost rank 0.
            UserError: on rank 0, where the JSON file cannot be written.
        """
        meeting, report = self._meeting, self._report
        try:
            self._examine()
        except Ended as ended:
            return ended.code
        except Absent as absent:
            hosts = self._hosts or absent.values
            report.findings += judge_absent(absent, hosts, _expected_hosts())
        if not meeting.is_main:
            return meeting.end(EXIT_FOUND_ERROR)
        try:
            report.show()
            sys.stdout.flush()
            if json_file is not None:
                report.write(expanded(json_file))
        except OSError as error:
            meeting.end(EXIT_USER_ERROR)
            raise UserError(f"--json {json_file}: cannot be written ({error.strerror})") from None
        return meeting.end(report.exit_code)

    def _examine(self) -> None:
        meeting, report = self._meeting, self._report
        self._hosts = meeting.gather("arrival", meeting.host)
        if meeting.is_main and self._config:
            report.findings += judge_run(self._config, meeting.world_size)
            report.findings += self._judge_chat(self._config)
        self._examine_ranks()
        hosts = meeting.answer(ranks_by_host(report.facts))
        sights = look_from_everywhere(meeting, self._folder)
        if meeting.is_main:
            report.findings += judge_shared_files(sights)
            report.values["shared_files"] = [asdict(sight) for sight in sights]
        clocks = compare_clocks(meeting, hosts)
        if meeting.is_main:
            report.findings += judge_clocks(clocks)
            report.values["clocks"] = [asdict(clock) for clock in clocks]
        if meeting.world_size > 1:
            self._examine_network(hosts)
        if self._config is not None:
            if meeting.is_main:
                self._examine_start(self._config)
            meeting.answer(limit_seconds=START_SECONDS)

    def _judge_chat(self, config: Config) -> list[Finding]:
        """Of the run's models; nothing where transformers is not installed, which is told apart."""
        try:
            with loading():
                from megatron_amrlhf.doctor.judge_chat import judge_chat  # noqa: PLC0415 - heavy
            return judge_chat(config)
        except ImportError:
            return []

    def _examine_ranks(self) -> None:
        """Versions, devices, limits, disks and locks."""
        meeting, report, pins = self._meeting, self._report, software.read_pins()
        cache = self._config.model.cache_folder if self._config else None
        own = measure_facts(meeting, pins, self._folder, cache)
        facts = meeting.gather("versions", asdict(own))
        if not meeting.is_main:
            return
        report.facts = TypeAdapter(list[RankFacts]).validate_python(facts)
        if meeting.world_size > 1:
            hosts = f"{meeting.world_size} ranks on {listed(self._hosts)}"
            report.findings.append(Finding("arrival", "ok", hosts))
        report.findings += judge_versions(report.facts, pins)
        report.findings += judge_devices(report.facts)
        report.findings += judge_dtypes(report.facts, self._config)
        report.findings += judge_limits(report.facts)
        room = self._room(self._config) if self._config else None
        report.findings += judge_disks(report.facts, room)
        report.findings += judge_locks(report.facts)

    def _examine_start(self, config: Config) -> None:
        """Models and data, where the keys and the files are right."""
        findings = self._report.findings
        if any(each.check == "run" and each.level == "error" for each in findings):
            message = "models and data are not judged before that is mended"
            findings.append(Finding("start", "warning", message))
            return
        told = {each.message for each in findings}
        try:
            with loading():
                from megatron_amrlhf.doctor.start import judge_start  # noqa: PLC0415 - heavy
            start = judge_start(config)
            findings += [each for each in start if each.message not in told]
        except ImportError as error:
            findings.append(Finding("start", "error", f"nothing can be loaded: {error}"))

    def _room(self, config: Config) -> CheckpointRoom | None:
        """What the run's checkpoints take; a warning where that cannot be known."""
        try:
            with loading():
                from megatron_amrlhf.doctor.checkpoint_room import (  # noqa: PLC0415 - heavy
                    checkpoint_room,
                )
            return checkpoint_room(config, self._folder)
        except (UserError, ImportError) as error:
            message = f"the size of a checkpoint is not known: {error}"
            fix = "12 bytes for each trained parameter have to fit into the run folder"
            self._report.findings.append(Finding("disk", "warning", message, fix))
            return None

    def _examine_network(self, hosts: dict[str, list[int]]) -> None:
        self._measurement = Measurement(self._meeting, plan_links(hosts))
        traffic = self._measurement.gather()
        if not self._meeting.is_main:
            return
        device = machine.own_device().type
        links = links_of(traffic, LINK_BYTES[device])
        self._report.findings += judge_network(traffic, links, self._hosts, device)
        self._report.values["links"] = [asdict(link) for link in links]
        self._report.values["all_reduce_seconds"] = {
            size: max(each.all_reduce.get(size, 0.0) for each in traffic)
            for size in traffic[0].all_reduce
        }


def measure_facts(
    meeting: Meeting, pins: software.Pins, folder: Path, model_cache: str | None
) -> RankFacts:
    """What this rank sees without the others.

    Args:
        meeting: of all ranks.
        pins: whose distributions are looked for.
        folder: the run's.
        model_cache: folder of converted models; None: not looked at.
    """
    memory, free_memory = machine.memory_gib()
    choice = own_choice()
    return RankFacts(
        rank=meeting.rank,
        host=meeting.host,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        python=software.python_version(),
        versions=software.installed_versions(pins),
        gpus=machine.find_gpus(meeting.world_size == 1),
        driver=machine.driver_version(),
        nccl=machine.nccl_version(),
        hidden_gpu=machine.has_hidden_gpu(os.environ),
        cores=sorted(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        dtype=choice.dtype,
        dtype_why=choice.why,
        bfloat16_factor=None if torch.cuda.is_available() else bfloat16_factor(),
        memory_gib=memory,
        free_memory_gib=free_memory,
        limits=machine.soft_limits(),
        shm_gib=machine.shared_memory_gib(),
        infiniband=machine.has_infiniband(),
        disks=machine.find_disks(folder, model_cache),
        locks=machine.find_locks(os.environ),
    )


def _expected_hosts() -> list[str]:
    """Hosts of the job as its launcher names them; empty where it does not tell."""
    if hosts := os.environ.get(HOSTS_VARIABLE):
        return hosts.split(",")
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    return host_names(nodes) if nodes else []
