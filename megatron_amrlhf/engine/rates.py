"""The learning rate over a run: a warm-up, then a decay, which goes on where a run was changed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR

from megatron_amrlhf.config.schema import OptimizerSection


@dataclass(frozen=True)
class Course:
    """How a factor on the peak learning rate goes, over the optimizer steps of a role.

    Attributes:
        warmup: optimizer steps of linear warm-up; 0 where it is over.
        start: optimizer step at which the decay begins, or has begun anew.
        behind: share of the decay that lies behind it then, in [0, 1].
        end: optimizer step at which the decay is complete.
    """

    warmup: int
    start: int
    behind: float
    end: int

    def progress(self, step: int) -> float:
        """Share of the decay that is done, in [0, 1]."""
        share = (step - self.start) / max(1, self.end - self.start)
        return self.behind + (1 - self.behind) * min(1.0, max(0.0, share))

    def factor(self, kind: str, step: int) -> float:
        """Factor on the peak, in [0, 1], for the optimizer step after ``step`` ones.

        Without a change these are, to the last bit, the rates of ``transformers.get_scheduler``.

        Args:
            kind: ``optimizer.schedule``.
            step: optimizer steps that are done.

        Raises:
            ValueError: unknown kind.
        """
        if kind not in ("constant", "linear", "cosine"):
            raise ValueError(f"unknown schedule {kind!r}")
        if step < self.warmup:
            return step / self.warmup
        if kind == "constant":
            return 1.0
        if kind == "linear":
            # Not 1 - progress, which rounds otherwise than the rates of transformers do.
            left = max(0.0, (self.end - step) / max(1, self.end - self.start))
            return (1 - self.behind) * left
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * self.progress(step))))

    def stretched(self, step: int, warmup: int, left: int, behind: float) -> Course:
        """From here on, with ``left`` more optimizer steps than ``step``.

        What is left of the decay is spread over the steps that are left, so the rate never rises
        once the warm-up is over. A decay that is complete would leave the rate at 0: it goes on
        where a run of the new length would be.

        Args:
            step: optimizer steps that are done.
            warmup: of the configuration, for a warm-up that is not over.
            left: optimizer steps that are left.
            behind: share of the new run's steps that is done.
        """
        if step < self.warmup:
            return Course(warmup, max(step, warmup), 0.0, step + left)
        progress = self.progress(step)
        return Course(0, step, behind if progress >= 1 else progress, step + left)


class Schedule:
    """The learning rate of a role's optimizer.

    Args:
        optimizer: its groups have the peak rate.
        section: schedule and warm-up.
        total_steps: optimizer steps of the whole run.
        steps_at_once: optimizer steps of the role in one step of the run.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        section: OptimizerSection,
        total_steps: int,
        steps_at_once: int,
    ):
        self._kind, self._warmup = section.schedule, section.warmup_steps
        self._planned = [max(total_steps, 1), steps_at_once]
        self._optimizer, self._resumed = optimizer, (0, 0)  # after (steps, optimizer steps)
        self.course = Course(self._warmup, self._warmup, 0.0, max(total_steps, 1))
        self.scheduler = LambdaLR(optimizer, lambda step: self.course.factor(self._kind, step))

    @property
    def rate(self) -> float:
        """Of the next optimizer step."""
        return self._optimizer.param_groups[0]["lr"]

    def state(self) -> dict:
        """Where it stands, JSON-able."""
        return {
            "last_epoch": self.scheduler.last_epoch,
            "step_count": self.scheduler._step_count,
            "lr": self.scheduler.get_last_lr(),
            "planned": self._planned,
            "course": asdict(self.course),
        }

    def restore(self, state: dict, steps: int) -> str | None:
        """Goes on where ``state`` was; rates are this run's configuration's.

        Args:
            state: of ``state()``; older ones have no course.
            steps: steps of the run that are done.

        Returns:
            One line about the new rates if the run's number of optimizer steps is another one.
        """
        done, (total, at_once) = state["last_epoch"], self._planned
        left, self._resumed = total - steps * at_once, (steps, done)
        if "course" in state:
            course, changed = Course(**state["course"]), state["planned"] != self._planned
        else:
            course, changed = self.course, done != steps * at_once
            course = Course(self._warmup, self._warmup, 0.0, done) if changed else course
        if changed:
            course = course.stretched(done, self._warmup, left, steps * at_once / total)
        elif done < course.warmup != self._warmup:
            course = Course(self._warmup, max(done, self._warmup), 0.0, course.end)
        self.course = course
        factor = self._place(done)
        if not changed or self._kind == "constant":
            return None
        after = ", after the warm-up," if done < course.warmup else ""
        return (
            f"{self._kind} schedule over another number of optimizer steps: on from "
            f"{self.rate:.4g} ({factor:.4g} of the peak){after} to 0 over the {left} that are left"
        )

    def reach(self, steps: int) -> None:
        """Goes on to where it is after so many steps of the run, whatever was left out in them.

        Optimizer steps without answers or without finite gradients do not take place; the rate
        follows the run's progress all the same, and comes to its end with it.
        """
        before, done = self._resumed
        place = done + (steps - before) * self._planned[1]
        if self.scheduler.last_epoch < place:
            self._place(place)

    def _place(self, done: int) -> float:
        """Stands after ``done`` optimizer steps; gives the factor on the peak there."""
        scheduler, factor = self.scheduler, self.course.factor(self._kind, done)
        # By hand: the scheduler's step() goes on by one, and it has counted one at its start.
        scheduler.last_epoch, scheduler._step_count = done, done + 1
        scheduler._last_lr = [base * factor for base in scheduler.base_lrs]
        for group, rate in zip(self._optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate
        return factor
