"""The run of a calibration.

Whatever has to be compiled is compiled first, on all cores (see `compile_ahead`). Then each token count is a race (see
`race`), run in a worker process. The token counts come coarse to fine (see `points`), so that most of them lie between
two measured ones; who was far behind at both does not start again (see `entrants`).
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from moe_dispatch.dispatch.quarantine import Quarantine
from moe_dispatch.machine import Machine
from moe_dispatch.policies.calibrated import calibration_path
from moe_dispatch.policies.calibration.candidates import CandidateSource, Place, eligible
from moe_dispatch.policies.calibration.compile_ahead import Job, compile_ahead, compiled_path
from moe_dispatch.policies.calibration.report import CalibrationReport, Progress
from moe_dispatch.policies.calibration.schedule import boundaries, schedule
from moe_dispatch.policies.calibration.successive_halving import MeasurementContext, SuccessiveHalving
from moe_dispatch.policies.calibration.worker_process import NotPreparedError, WorkerProcess
from moe_dispatch.policies.measurements.merge import Measured, save, settle
from moe_dispatch.policies.measurements.schema import Layer
from moe_dispatch.problem import Mode
from moe_dispatch.registry import BACKENDS

if TYPE_CHECKING:
    from moe_dispatch.policies.measurements.table import Identity

# Of a budget; what is not compiled by then is compiled in the race, one after another.
COMPILE_SHARE: Final = 0.5


class CalibrationRun:
    """All that a calibration measures, saved point by point.

    Args:
        machine: Which is measured.
        device: Of the worker.
        backends: Only these; all that are registered if None.
        routings: Names of routing distributions; the first one screens.
        timeout_s: After which one candidate counts as hung.
        directory: In place of the cache directory.
        most_configs: Of each backend, the likeliest first; all that it offers if None.
        refine: Whether to measure between token counts where the winner changes.

    Attributes:
        report: What it did so far.

    Raises:
        UnknownNameError: A backend is not registered.
    """

    def __init__(
        self,
        machine: Machine,
        device: torch.device,
        backends: Sequence[str] | None,
        routings: tuple[str, ...],
        timeout_s: float,
        directory: Path | None,
        most_configs: int | None,
        *,
        refine: bool,
    ) -> None:
        self._machine, self._directory, self._refine = machine, directory, refine
        self.report = CalibrationReport(calibration_path(machine, directory))
        self._backends, self.report.unavailable = eligible(backends or BACKENDS.names(), machine)
        self._quarantine = Quarantine(machine, directory)
        self._source = CandidateSource(
            machine, self._backends, self.report.path, self._quarantine, most_configs, self.report.skipped
        )
        named = {name: f"{type(made).__module__}:{type(made).__qualname__}" for name, made in self._backends.items()}
        self._new_worker = functools.partial(WorkerProcess, str(device), named, timeout_s)
        self._worker = self._new_worker()
        self._context = MeasurementContext(self._worker, routings, self._tolerance, self._bar)

    def measure(
        self,
        layers: Sequence[Layer],
        tokens: Sequence[int],
        modes: Sequence[Mode],
        budget_s: float | None,
        on_progress: Callable[[Progress], None] | None,
        *,
        resume: bool,
        compile_only: bool,
    ) -> CalibrationReport:
        """Measure; see `calibrate` for the arguments.

        Raises:
            PolicyFileError: The result cannot be written.
        """
        begin = time.monotonic()
        deadline = begin + budget_s if budget_s is not None else math.inf
        known = self._source.known(tokens) if resume else set()
        # One that goes on is still deciding what it has.
        if self._source.calibrated_before and not resume and not compile_only:
            settle(self.report.path, self._machine)
        ahead = schedule(layers, tokens)
        done, total = 0, len(layers) * len(tokens)
        racing = begin

        def tell(what: str) -> None:
            if on_progress is not None:
                left = (time.monotonic() - racing) / done * (total - done) if done else None
                on_progress(Progress(done, total, what, left))

        try:
            compiling = begin + COMPILE_SHARE * (deadline - begin)
            self._compile(layers, tokens, modes[0], known, compiling, on_progress)
            racing = time.monotonic()
            self.report.spent["compiling ahead"] = racing - begin
            while ahead and not compile_only:
                layer, counts = ahead.pop(0)
                missing = [M for M in counts if not all((layer.key, M, mode) in known for mode in modes)]
                done += len(counts) - len(missing)
                if missing and time.monotonic() <= deadline and not self._prepared(layer):
                    total -= len(missing) + sum(len(others) for other, others in ahead if other == layer)
                    ahead = [leg for leg in ahead if leg[0] != layer]
                    continue
                for place, M in enumerate(missing):
                    if time.monotonic() > deadline:
                        self._late(layer, missing[place:])
                        total -= len(missing) - place
                        break
                    tell(f"{layer} M={M}")
                    self._point(layer, M, modes)
                    done += 1
                if not ahead and time.monotonic() <= deadline:
                    ahead = [(one, found) for one in layers if (found := self._refinements(one, tokens, known))]
                    total += sum(len(found) for _, found in ahead)
        except KeyboardInterrupt:
            self.report.interrupted = True
        finally:
            self._worker.close()
        tell("done")
        self.report.seconds = time.monotonic() - begin
        self.report.spent |= {what: seconds for what, seconds in self._worker.spent.items() if what != "compile"}
        return self.report

    def _prepared(self, layer: Layer) -> bool:
        try:
            self._worker.layer(layer)
        except NotPreparedError as error:
            self.report.skipped.append(f"{layer}: its weights could not be made: {error}")
            return False
        return True

    def _late(self, layer: Layer, tokens: Sequence[int]) -> None:
        late = ", ".join(map(str, sorted(tokens)))
        self.report.skipped.append(f"{layer}: no time left for M of {late}; --resume measures them")

    def _compile(
        self,
        layers: Sequence[Layer],
        tokens: Sequence[int],
        mode: Mode,
        known: Container[Place],
        deadline: float,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        """Have everything compiled that will start; nothing is where nothing compiles."""
        if self._machine.device != "cuda":
            return
        jobs = [
            Job(layer, M, candidate)
            for layer in layers
            for M in tokens
            if (layer.key, M, mode) not in known
            for candidate in self._source.candidates(layer, M, mode)
        ]

        def tell(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(Progress(done, total, "compiling", None))

        failed = compile_ahead(
            jobs, self._new_worker, compiled_path(self._machine, self._directory), deadline, tell,
            libraries=[name for name, made in self._backends.items() if made.requirements.libraries],
            racer=self._worker,
        )  # fmt: skip
        if failed:
            self.report.skipped.append(f"{len(failed)} of {len(jobs)} were not compiled ahead; the first: {failed[0]}")

    def _point(self, layer: Layer, M: int, modes: Iterable[Mode]) -> None:
        """Measure one token count in each mode; the later modes start from the first one's finalists."""
        news: list[Measured] = []
        finalists: dict[Identity, float] = {}
        for mode in modes:
            candidates = self._source.candidates(layer, M, mode)
            starting = self._source.starting(layer, M, mode, candidates)
            if finalists:
                # Who could not run in the first mode knows no better than this one's neighbours.
                ran = {one.candidate.backend for one in news}
                others = {one.identity for one in starting if one.backend not in ran}
                starting = [one for one in candidates if one.identity in finalists or one.identity in others]
            race = SuccessiveHalving(self._context, layer, M, mode, starting, finalists)
            try:
                results = race.run()
            except NotPreparedError as error:
                self.report.skipped.append(f"{layer} M={M} ({mode}): its inputs could not be made: {error}")
                break
            scores = {one.candidate.identity: one.measurement.score for one in results}
            self._source.remember(layer, M, mode, candidates, scores)
            news += [self._marked(one) for one in results]
            finalists = finalists or race.finalists
        self.report.measured += news
        if news:
            save(self.report.path, news, self._machine)

    def _marked(self, one: Measured) -> Measured:
        """With the incumbent marked as such."""
        if self._source.winner_before(one.layer, one.M, one.mode) != one.candidate.identity:
            return one
        return dataclasses.replace(one, measurement=one.measurement.model_copy(update={"incumbent": True}))

    def _refinements(self, layer: Layer, tokens: Sequence[int], known: Container[Place]) -> list[int]:
        """Token counts to be measured next, in any mode, since the winner changes about them."""
        if not self._refine:
            return []
        found = set()
        measured = {one.M for one in self.report.measured if one.layer == layer}
        for (name, mode), at in self.report.winners().items():
            if name != str(layer):
                continue
            winners = {M: winner for M, (winner, _) in at.items()}
            for middle in boundaries(winners, self._source.behind(layer, mode)):
                if middle not in measured and (layer.key, middle, mode) not in known:
                    found.add(middle)
        return sorted(middle for middle in found if tokens[0] < middle < tokens[-1])

    def _bar(self, backend: str, layer: Layer, M: int, mode: Mode, cause: str) -> None:
        """Remember what kills a process."""
        self._quarantine.bar(backend, layer.problem(M, self._machine, mode), cause, fatal=True)

    def _tolerance(self, backend: str, layer: Layer) -> float:
        """What the backend promises for this layer."""
        limits = self._backends[backend].tolerance
        return max(limits.get(layer.dtype, 0.0), limits.get(layer.act_dtype, 0.0))
