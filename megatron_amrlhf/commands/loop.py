"""The loop over steps of one attempt: resume, step, log, save, and leave early when asked to."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch.distributed as dist

from megatron_amrlhf.algorithms.contract import Algorithm
from megatron_amrlhf.checkpoint.export import export_role
from megatron_amrlhf.checkpoint.files import on_all_ranks, on_main_rank
from megatron_amrlhf.checkpoint.folders import (
    Retention,
    clear_leftovers,
    find_latest,
    step_folders,
    wait_until_seen,
)
from megatron_amrlhf.checkpoint.loading import load_checkpoint
from megatron_amrlhf.checkpoint.parts import SavedLayout
from megatron_amrlhf.checkpoint.store import CheckpointWriter
from megatron_amrlhf.commands.planned_memory import memory_line
from megatron_amrlhf.commands.precision import goes_on
from megatron_amrlhf.commands.saved_state import check_run_state
from megatron_amrlhf.engine.integrity import check_copies, check_frozen, frozen_checksums
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.experience.preemption import StepAbandoned, check_stop
from megatron_amrlhf.files import free_name, write_atomic
from megatron_amrlhf.parallel import compat
from megatron_amrlhf.parallel.collectives import max_over
from megatron_amrlhf.report.files import truncate_jsonl
from megatron_amrlhf.report.metrics import MetricsWriter
from megatron_amrlhf.run.status_file import State
from megatron_amrlhf.run.stop_request import EXIT_AGAIN, Reason, process_age
from megatron_amrlhf.slurm import job_id


def train(algorithm: Algorithm, context: Context, banner: str) -> bool:
    """Runs the steps that are left. Entered by every rank.

    Args:
        algorithm: built, its roles in the engine.
        context: the run.
        banner: what runs, printed before the first step.

    Returns:
        Whether all steps are done; if not, a checkpoint of all that was done is there.
    """
    roles = context.engine.roles
    frozen = frozen_checksums(roles)
    loop = Loop(algorithm, context)
    loop.resume()
    context.console.line(banner)
    try:
        loop.run()
    except StepAbandoned as request:
        loop.leave(request.reason)
        return False
    check_frozen(roles, frozen)
    loop.finish()
    return True


class Loop:
    """Where an attempt stands.

    A step's metrics are ``pending`` between its last update and its line in metrics.jsonl, so that
    an evaluation, which may take long, can be interrupted: the resumed run evaluates again.
    """

    def __init__(self, algorithm: Algorithm, context: Context):
        self.algorithm, self.context = algorithm, context
        self.total = algorithm.total_steps
        self.writer = MetricsWriter(context.folder)
        section = context.config.checkpoint
        self.saver = CheckpointWriter(
            context.engine,
            context.folder.checkpoints,
            Retention(section.keep, section.keep_gib),
            section.asynchronous,
        )
        self.first = self.done = self.saved = 0  # completed updates: at the start, now, on disk
        self.evaluation_seconds = 0.0  # of the one at the end, as the first one took
        self.pending: dict[str, float] | None = None
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def resume(self) -> None:
        """Loads the newest checkpoint, if any, and forgets what was logged after it.

        Raises:
            UserError: it is damaged, does not fit, or has more steps than the run.
        """
        self._check_copies()
        context, section = self.context, self.context.config.checkpoint
        latest: Path | None = None
        checkpoints = context.folder.checkpoints
        doing = f"cannot use {checkpoints}"
        is_main = context.mesh.is_main
        for line in on_main_rank(lambda: clear_leftovers(checkpoints), doing, is_main):
            context.console.line(f"note: {line}")
        if on_main_rank(lambda: goes_on(context.config), doing, is_main):
            # As rank 0 sees it: a shared file system may show other nodes less.
            latest = found = on_main_rank(lambda: find_latest(checkpoints), doing, is_main)
            on_all_ranks(lambda: wait_until_seen(found) if found else None, doing)
        else:
            on_main_rank(lambda: self._set_aside(checkpoints), doing, is_main)
        if latest is not None:
            context.console.progress.enter("load")
            loaded = load_checkpoint(context.engine, latest)
            state = check_run_state(latest, loaded.state)
            data = state["data"]
            self.algorithm.load_state_dict(state["algorithm"])
            self.algorithm.position.load_state_dict(
                data, state["step"], section.accept_changed_data, context.config.run.steps is None
            )
            self.first = self.done = self.saved = state["step"]
            if self.done > self.total:
                raise UserError(
                    f"{latest} has more steps than the run's {self.total}: raise run.steps, or "
                    "choose another run.name"
                )
            self.pending = state["pending"]
            self.before, self.after = state["before"], state["after"]
            for line in (_resumed_line(context, latest, loaded.layout, data), *loaded.notes):
                context.console.line(line)
        on_all_ranks(self._forget_later_steps, f"cannot go on in {context.folder.path}")

    def _forget_later_steps(self) -> None:
        if self.context.mesh.is_main:
            truncate_jsonl(self.context.folder.samples, self.done)
        logged = self.done - (self.pending is not None)
        # Step 0 is the evaluation before training, which is done anew where no step was.
        self.writer.truncate_after(logged if self.before else logged or -1)

    def _set_aside(self, checkpoints: Path) -> None:
        """What earlier attempts have left: a run from the start would mix with it."""
        folder = self.context.folder
        name = f"before-attempt-{folder.attempt}"
        if step_folders(checkpoints):
            checkpoints.rename(free_name(Path(f"{checkpoints}-{name}")))
        for file in (folder.metrics, folder.samples):
            if file.is_file() and file.stat().st_size:
                file.rename(free_name(file.with_name(f"{file.stem}-{name}{file.suffix}")))
        write_atomic(folder.from_start, job_id(os.environ))

    def run(self) -> None:
        """All steps that are left.

        Raises:
            StepAbandoned: on every rank; ``done`` and ``pending`` tell what to save.
        """
        algorithm, context = self.algorithm, self.context
        self._note_status("started")
        context.console.whole(self.done, self.total, None)
        if not self.before and algorithm.evaluates_at_start:
            start = time.monotonic()
            self.before = self.after = algorithm.evaluate()
            self.evaluation_seconds = time.monotonic() - start
            if self.before:
                context.console.step_table(self.done, self.total, self.before)
                if not self.done:
                    self.writer.write(0, self.before)
        if self.pending is not None:
            self._close_step()
        for step in range(self.done + 1, self.total + 1):
            check_stop(context, before_step=True)
            start, age = time.monotonic(), process_age()
            context.console.progress.enter("step", step)
            self.pending = algorithm.step(step)
            context.engine.end_step(step)
            self.done = step
            if step == self.first + 1:
                self._check_copies()
                context.console.line(f"step {step} began {age:.1f} s after the process")
                self._log_memory()
            self._close_step()
            context.stop.note_step(time.monotonic() - start)
            self._show_whole()
            self._note_status(f"{step} of {self.total} steps")
            if self.saver.poll() and self.saver.seconds is not None:
                context.stop.note_save(self.saver.seconds)
            every = context.config.checkpoint.every
            if every and step % every == 0:
                self._save()

    def _show_whole(self) -> None:
        left, seconds = self.total - self.done, self.context.stop.mean_step_seconds or 0.0
        final = self.evaluation_seconds if left else 0.0
        self.context.console.whole(self.done, self.total, left * seconds + final)

    def leave(self, reason: Reason) -> None:
        """Saves what is not saved yet and says that the run can go on."""
        context = self.context
        if reason is Reason.CLOCK and self.done == self.first:
            elapsed = process_age() / 60
            raise UserError(
                f"run.max_minutes = {context.config.run.max_minutes:g} leaves no time for a step: "
                f"{elapsed:.1f} minutes have passed since the start; raise it"
            )
        if self.saved < self.done:
            self._save()
        self._finish_saving()
        self.writer.close()
        message = f"stopped by {reason.text} after step {self.done} of {self.total}"
        context.folder.clear_stop()
        self._note_status(message, "preempted")
        how = "" if context.config.checkpoint.resume else " with checkpoint.resume: true"
        context.console.line(f"{message}; started again{how}, it goes on (exit code {EXIT_AGAIN})")
        dist.barrier()

    def finish(self) -> None:
        """Saves, exports and sums up a run whose steps are all done."""
        context = self.context
        console, folder = context.console, context.folder
        self.writer.close()
        if self.saved < self.total:
            self._save()
        self._finish_saving()
        if context.config.checkpoint.export:
            console.progress.enter("export")
            role = context.config.algorithm.roles(context.config)[0].name
            export_role(context.engine, role, folder.export, context.tokenizer)
        console.progress.enter("finish")
        if context.mesh.is_main:
            from megatron_amrlhf.report.plots import plot_run  # noqa: PLC0415 - heavy

            plot_run(folder.path)
        self._log_memory()
        folder.clear_stop()
        self._note_status("all steps done", "finished")
        console.final_summary(folder, self.before, self.after)

    def _close_step(self) -> None:
        """Evaluates where it is time to, and writes the step's line."""
        context, step, pending = self.context, self.done, self.pending
        assert pending is not None, "no step to close"
        every = context.config.evaluation.every
        if step == self.total or (every and step % every == 0):
            check_stop(context)
            self.after = self.algorithm.evaluate()
            pending |= self.after
        metrics = pending | {"memory/peak_gib": _peak_gib(context)}
        self.writer.write(step, metrics)
        self.pending = None
        context.console.step_table(step, self.total, metrics)
        kept = metrics.get("mask/kept_fraction", 1.0)
        if not kept > 0:  # NaN: there was no answer
            what = "no answer was learned from" if math.isnan(kept) else "the mask kept no token"
            context.console.line(f"warning: {what} in step {step}")

    def _save(self) -> None:
        context = self.context
        context.console.progress.enter("save")
        self._check_copies()
        state = {
            "step": self.done,
            "algorithm": self.algorithm.state_dict(),
            "data": self.algorithm.position.state_dict(self.done),
            "config": context.config.model_dump(mode="json"),
            "pending": self.pending,
            "before": self.before,
            "after": self.after,
        }
        seconds = self.saver.save(self.done, state)
        self.saved = self.done
        context.console.line(f"checkpoint of step {self.done}: training waited {seconds:.1f} s")
        if not context.config.checkpoint.asynchronous:
            context.stop.note_save(seconds)

    def _finish_saving(self) -> None:
        """Waits for a checkpoint that is still being written."""
        start = time.monotonic()
        self.saver.finish()
        self.context.stop.note_save(time.monotonic() - start)

    def _log_memory(self) -> None:
        self.context.console.line(memory_line(self.context, _peak_gib(self.context)))

    def _note_status(self, message: str, state: State = "running") -> None:
        seconds = self.context.stop.mean_step_seconds
        self.context.folder.status(state, self.done, message, self.total, seconds)

    def _check_copies(self) -> None:
        context = self.context
        if warning := check_copies(context.engine.roles, context.mesh):
            context.console.line(f"warning: {warning}")


def _resumed_line(context: Context, latest: Path, saved: SavedLayout, data: dict) -> str:
    roles = ", ".join(context.engine.trainable())
    line = (
        f"resumed from {latest}: weights, moments and schedule of {roles}; "
        f"{data['consumed_samples']} samples of the data behind it, epoch {data['epoch'] + 1}"
    )
    now = SavedLayout.of(context.mesh)
    return line if saved == now else f"{line}; saved at {saved}, now {now}"


def _peak_gib(context: Context) -> float:
    """The largest peak memory of a process, GiB."""
    mib = int(compat.peak_memory_gib() * 1024)
    return max_over(mib, dist.group.WORLD, context.mesh.device) / 1024
