"""A calibration run: compiles ahead on all cores, then measures one point after another in a worker process.

Token counts come coarse to fine (see `schedule`), so that most of them lie between two measured ones; candidates that
were far behind at both do not start again (see `candidates`). At each point the fastest candidate is selected by
successive halving (see `successive_halving`).
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moe_dispatch.dispatch.quarantine import Quarantine
from moe_dispatch.policies.calibration.candidates import CandidateSource, eligible
from moe_dispatch.policies.calibration.compile_ahead import (
    COMPILE_SHARE,
    Job,
    compile_ahead,
    compiled_path,
    libraries_of,
)
from moe_dispatch.policies.calibration.memory import weight_bytes
from moe_dispatch.policies.calibration.report import CalibrationReport, Progress
from moe_dispatch.policies.calibration.request import CalibrationRequest
from moe_dispatch.policies.calibration.schedule import boundaries, schedule
from moe_dispatch.policies.calibration.successive_halving import MeasurementContext, SuccessiveHalving
from moe_dispatch.policies.calibration.worker_process import (
    BudgetSpentError,
    NotPreparedError,
    StartWorker,
    Worker,
    WorkerDiedError,
    WorkerProcess,
    worker_targets,
)
from moe_dispatch.policies.measurements.merge import promote_winners, require_writable, save
from moe_dispatch.policies.measurements.schema import LayerShape, Measurement, PointKey
from moe_dispatch.problem import Mode
from moe_dispatch.registry import BACKENDS, LAST_RESORT
from moe_dispatch.workspace import gibibytes

if TYPE_CHECKING:
    from moe_dispatch.policies.measurements.schema import Identity


class CalibrationRun:
    """Measures what a request asks for, and saves it point by point.

    Args:
        request: What to measure.
        on_progress: Called before each point.
        start_worker: Makes a worker.
        clock: Monotonic clock in seconds, by which the budget is kept.

    Raises:
        UnknownNameError: A backend is not registered.
    """

    def __init__(
        self,
        request: CalibrationRequest,
        on_progress: Callable[[Progress], None] | None = None,
        *,
        start_worker: StartWorker = WorkerProcess,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._request, self._on_progress, self._clock = request, on_progress, clock
        self._begin = clock()
        self._deadline = self._begin + (math.inf if request.budget_s is None else request.budget_s)
        self.report = CalibrationReport(request.path)
        self._backends, self.report.unavailable = eligible(
            request.backends or BACKENDS.names(), request.machine, request.timeout_s
        )
        self._quarantine = Quarantine(request.machine, request.directory)
        self._source = CandidateSource(request, self._backends, self._quarantine, self.report.skipped)
        self._start_worker = start_worker
        self._worker = self._new_worker()
        self._context = MeasurementContext(
            self._worker, request.routings, self._tolerance, self._on_death, request.energy_s
        )
        self._known: set[PointKey] = set()
        # Points to measure, layer by layer; the worker holds the weights of one layer at a time.
        self._waiting: deque[tuple[LayerShape, int]] = deque()
        self._visited: set[tuple[LayerShape, int]] = set()
        self._done = 0

    def measure(self) -> CalibrationReport:
        """Measure everything, and return the report.

        Raises:
            PolicyFileError: The result cannot be written.
        """
        request = self._request
        if not request.compile_only:
            require_writable(request.path)
        self._known = self._source.known() if request.resume else set()
        # A resumed calibration is still deciding about what it has measured.
        if self._source.calibrated_before and not request.resume and not request.compile_only:
            promote_winners(request.path, request.machine)
        layers = [layer for layer in request.layers if self._fits(layer)]
        points = schedule(layers, request.tokens)
        self._waiting.extend(point for point in points if not self._is_known(*point))
        self._done = self.report.known = len(points) - len(self._waiting)
        try:
            self._compile_ahead(layers)
            self.report.spent["compiling ahead"] = self._clock() - self._begin
            if not request.compile_only:
                self._measure_points()
                self._report_late()
        except BudgetSpentError:
            self._report_late()
        except KeyboardInterrupt:
            self.report.interrupted = True
        finally:
            self._worker.close()
        self._tell("done")
        self.report.seconds = self._clock() - self._begin
        self.report.spent |= {op: seconds for op, seconds in self._worker.spent.items() if op != "compile"}
        return self.report

    def _measure_points(self) -> None:
        begin, known = self._clock(), self._done
        loaded: LayerShape | None = None
        while self._waiting and self._clock() <= self._deadline:
            layer, M = self._waiting[0]
            if layer != loaded:
                if not self._prepared(layer):
                    self._waiting = deque(point for point in self._waiting if point[0] != layer)
                    continue
                loaded = layer
            finished, spent_s = self._done - known, self._clock() - begin
            self._tell(f"{layer} M={M}", spent_s / finished * len(self._waiting) if finished else None)
            self._point(layer, M)
            self._visited.add(self._waiting.popleft())
            self._done += 1
            if not self._waiting and self._clock() <= self._deadline:
                layers = {layer for layer, _ in self._visited}
                refined = [
                    (layer, M) for layer in self._request.layers if layer in layers for M in self._refinements(layer)
                ]
                self._waiting.extend(refined)

    def _fits(self, layer: LayerShape) -> bool:
        """Whether the device could hold the layer's weights if it were empty; the worker asks what is free."""
        machine = self._request.machine
        needed = weight_bytes(layer.problem(1, machine))
        if machine.memory_bytes and needed > machine.memory_bytes:
            self._skip_unprepared(
                f"{layer}: its weights need {gibibytes(needed)}, and the device has {gibibytes(machine.memory_bytes)}"
            )
            return False
        return True

    def _skip_unprepared(self, note: str) -> None:
        self.report.unprepared = True
        self.report.skipped.append(note)

    def _prepared(self, layer: LayerShape) -> bool:
        try:
            self._worker.layer(layer)
        except NotPreparedError as error:
            self._skip_unprepared(f"{layer}: its weights could not be made: {error}")
            return False
        return True

    def _report_late(self) -> None:
        """Report the points that the budget was not enough for."""
        late: dict[str, list[int]] = {}
        for layer, M in self._waiting:
            if M in self._request.tokens:  # refinements are a bonus
                late.setdefault(str(layer), []).append(M)
        self.report.late = bool(late)
        for name, tokens in late.items():
            listed = ", ".join(map(str, sorted(tokens)))
            self.report.skipped.append(f"{name}: no time left for M of {listed}; --resume measures them")

    def _compile_ahead(self, layers: Sequence[LayerShape]) -> None:
        """Compile the candidates that will start and need no weights for it; no-op on a CPU, where nothing compiles."""
        request = self._request
        if request.machine.device != "cuda":
            return
        mode = request.modes[0]
        jobs = [
            Job(layer, M, candidate)
            for layer in layers
            for M in request.tokens
            if (layer.key, M, mode) not in self._known
            for candidate in self._source.candidates(layer, M, mode)
            if not self._backends[candidate.backend].reads_whole_layer(layer.problem(M, request.machine))
        ]

        def tell(done: int, total: int) -> None:
            if self._on_progress is not None:
                self._on_progress(Progress(done, total, "compiling", None))

        failed = compile_ahead(
            jobs, self._new_worker, compiled_path(request.machine, request.directory),
            self._begin + COMPILE_SHARE * (self._deadline - self._begin), tell,
            libraries=libraries_of(self._backends), measuring_worker=self._worker,
        )  # fmt: skip
        if failed:
            self.report.skipped.append(f"{len(failed)} of {len(jobs)} were not compiled ahead; the first: {failed[0]}")

    def _point(self, layer: LayerShape, M: int) -> None:
        """Measure one token count in each mode; the later modes start from the first one's finalists."""
        ran: set[str] = set()
        finalists: dict[Identity, float] = {}
        for mode in self._request.modes:
            candidates = self._source.candidates(layer, M, mode)
            starters = self._source.starters(layer, M, mode, candidates)
            if finalists:
                # Backends that could not run in the first mode start by what the neighbours say of them.
                others = {candidate.identity for candidate in starters if candidate.backend not in ran}
                starters = [one for one in candidates if one.identity in finalists or one.identity in others]
            halving = SuccessiveHalving(self._context, layer, M, mode, starters, finalists)
            try:
                measured = halving.run()
            except NotPreparedError as error:
                self._skip_unprepared(f"{layer} M={M} ({mode}): its inputs could not be made: {error}")
                return
            scores = {measurement.candidate.identity: measurement.score for measurement in measured}
            self._source.remember(layer, M, mode, candidates, scores)
            self._keep(measured)
            ran |= {measurement.candidate.backend for measurement in measured}
            finalists = finalists or halving.finalists

    def _keep(self, measured: list[Measurement]) -> None:
        """Save measurements, with the incumbent marked."""
        marked = [
            dataclasses.replace(one, incumbent=True)
            if self._source.winner_before(one.layer, one.M, one.mode) == one.candidate.identity
            else one
            for one in measured
        ]
        self.report.measured += marked
        if marked:
            save(self._request.path, marked, self._request.machine)

    def _refinements(self, layer: LayerShape) -> list[int]:
        """Token counts to be measured next, in all modes, because the winner of some mode changes about them."""
        if not self._request.refine:
            return []
        tokens = self._request.tokens
        middles = set()
        for (name, mode), by_tokens in self.report.winners().items():
            if name == str(layer):
                winners = {M: winner for M, (winner, _) in by_tokens.items()}
                middles |= {
                    middle
                    for middle in boundaries(winners, self._source.behind(layer, mode))
                    if (layer, middle) not in self._visited and (layer.key, middle, mode) not in self._known
                }
        return sorted(middle for middle in middles if tokens[0] < middle < tokens[-1])

    def _is_known(self, layer: LayerShape, M: int) -> bool:
        return all((layer.key, M, mode) in self._known for mode in self._request.modes)

    def _new_worker(self) -> Worker:
        targets = worker_targets({name: BACKENDS.load(name) for name in self._backends})
        return self._start_worker(str(self._request.device), targets, self._request.timeout_s, self._deadline)

    def _on_death(self, backend: str, layer: LayerShape, M: int, mode: Mode, error: WorkerDiedError) -> None:
        """Quarantine a backend that took its worker process down.

        Not the last resort, without which no call could run, and not a backend that was only slow on a CPU.
        """
        if backend == LAST_RESORT or (error.timed_out and self._request.device.type == "cpu"):
            return
        self._quarantine.bar(backend, layer.problem(M, self._request.machine, mode), error.cause, fatal=True)

    def _tolerance(self, backend: str, layer: LayerShape) -> float:
        """The relative error that the backend promises for this layer."""
        limits = self._backends[backend].tolerance
        return max(limits.get(layer.dtype, 0.0), limits.get(layer.act_dtype, 0.0))

    def _tell(self, what: str, left_s: float | None = None) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(self._done, self._done + len(self._waiting), what, left_s))
