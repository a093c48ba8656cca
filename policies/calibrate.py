"""Measures every eligible backend and configuration on this machine and keeps the result.

Each token count is a race (see `race`), run in a worker process. The token counts come coarse to fine, so that most
of them lie between two measured ones; who was far behind at both does not start again.
"""

import datetime
import importlib.metadata
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from moe_dispatch.backend import Backend
from moe_dispatch.benchmarks.rows import commit
from moe_dispatch.errors import BackendUnavailableError, InvalidInputError, PolicyFileError
from moe_dispatch.machine import Machine
from moe_dispatch.problem import DType, Mode
from moe_dispatch.quarantine import Quarantine
from moe_dispatch.registry import BACKENDS
from moe_dispatch.workloads import ROUTINGS, Workload, workload

from .calibrated import calibration_path
from .merge import Measured, save
from .race import Arena, Race
from .schema import Candidate, Layer, LayerKey, read_calibration
from .supervisor import NotPreparedError, Supervisor
from .table import Identity, calm_winners
from .versions import changes, relevant_versions

DEFAULT_TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
QUICK_TOKENS: Final = (1, 16, 256, 4096)
DEFAULT_ROUTINGS: Final = ("uniform", "dirichlet-4")
# Two measured neighbours decide who starts between them if both are within this factor of tokens,
NEIGHBOURS: Final = 8
# and then whoever was within this factor of the leader's time at either does.
CLOSE: Final = 1.5
REFINE: Final = 1.5  # boundaries are refined until the neighbours are this close


@dataclass(frozen=True)
class Progress:
    """Where a calibration stands.

    Attributes:
        done: Points finished.
        total: Points in all, refinements as they are found.
        what: The point at work, for a person.
        left_s: Estimated seconds to the end; None before the first point is done.
    """

    done: int
    total: int
    what: str
    left_s: float | None


@dataclass
class CalibrationReport:
    """What a calibration did.

    Attributes:
        path: The file that holds the result.
        measured: Every measurement of this run.
        skipped: Points that were not measured, each with the reason.
        unavailable: Backends that could not take part, each with its reasons.
        interrupted: Whether it was stopped before its end; what was measured is kept.
        seconds: It took.
    """

    path: Path
    measured: list[Measured] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = 0.0

    def winners(self) -> dict[tuple[str, Mode], dict[int, tuple[Identity, float]]]:
        """Per layer and mode the calm winner at each token count, with its time in µs."""
        scores: dict[tuple[str, Mode], dict[int, dict[Identity, float | None]]] = {}
        for one in self.measured:
            at = scores.setdefault((str(one.layer), one.mode), {}).setdefault(one.M, {})
            at[one.candidate.identity] = one.measurement.score
        found: dict[tuple[str, Mode], dict[int, tuple[Identity, float]]] = {}
        for key, by_tokens in scores.items():
            timed = {M: by_tokens[M] for M in sorted(by_tokens) if any(by_tokens[M].values())}
            found[key] = {M: (winner, timed[M][winner] or math.nan) for M, winner in calm_winners(timed).items()}
        return found

    def disqualified(self) -> list[Measured]:
        """Candidates that may not win somewhere."""
        return [one for one in self.measured if one.measurement.disqualified]


def calibrate(
    models: Sequence[str | Workload],
    dtypes: Sequence[DType] = ("bf16",),
    *,
    tokens: Sequence[int] | None = None,
    budget_s: float | None = None,
    quick: bool = False,
    resume: bool = False,
    device: torch.device | str | None = None,
    backends: Sequence[str] | None = None,
    routings: Sequence[str] = DEFAULT_ROUTINGS,
    timeout_s: float = 60.0,
    directory: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> CalibrationReport:
    """Measure layers on this machine and merge the result into its calibration file.

    Args:
        models: Workloads by name, ``E,topk,K,N``, path of a config.json, or as they are.
        dtypes: Of the weights.
        tokens: Token counts; 1 to 16384 in powers of two if None.
        budget_s: Stop after this many seconds; what was measured is kept. None for no limit.
        quick: Few token counts and few configurations.
        resume: Leave out the points that were measured with today's versions.
        device: The current CUDA device if None, else the CPU.
        backends: Only these.
        routings: Names of routing distributions; the winner is the best over all of them.
        timeout_s: After which one candidate counts as hung.
        directory: In place of the cache directory.
        on_progress: Told before each point.

    Raises:
        InvalidInputError: No models, token counts below 1, an unknown routing.
        PolicyFileError: The result cannot be written.
    """
    if not models or not dtypes:
        raise InvalidInputError(f"calibrate needs models and dtypes, got {list(models)} and {list(dtypes)}")
    counts = sorted(set(tokens or (QUICK_TOKENS if quick else DEFAULT_TOKENS)))
    if counts[0] < 1:
        raise InvalidInputError(f"tokens must be at least 1, got {counts[0]}")
    if unknown := [name for name in routings if name not in ROUTINGS]:
        raise InvalidInputError(f"routings must be among {', '.join(ROUTINGS)}, got {', '.join(unknown)}")
    machine = Machine.inspect(device)
    run = _Calibration(machine, device, backends, tuple(routings), timeout_s, directory, quick=quick)
    layers = [
        Layer.of(found.problem(1, dtype, machine))
        for found in (workload(model) if isinstance(model, str) else model for model in models)
        for dtype in dtypes
    ]
    return run.measure(layers, counts, budget_s, on_progress, resume=resume)


class _Calibration:
    def __init__(
        self,
        machine: Machine,
        device: torch.device | str | None,
        backends: Sequence[str] | None,
        routings: tuple[str, ...],
        timeout_s: float,
        directory: Path | None,
        *,
        quick: bool,
    ) -> None:
        self._machine, self._quick = machine, quick
        self.report = CalibrationReport(calibration_path(machine, directory))
        self._quarantine = Quarantine(machine, directory)
        self._backends = self._eligible(backends)
        named = {name: f"{type(made).__module__}:{type(made).__qualname__}" for name, made in self._backends.items()}
        self._worker = Supervisor(str(device or machine.device), named, timeout_s)
        self._arena = Arena(self._worker, routings, self._tolerance, self._bar)
        # Layer and mode -> M -> candidate -> its time over the leader's; infinite for who did not start.
        self._behind: dict[tuple[LayerKey, Mode], dict[int, dict[Identity, float]]] = {}
        self._now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._package = importlib.metadata.version("moe-dispatch")
        self._commit = commit(Path(__file__).parent)

    def measure(
        self,
        layers: Sequence[Layer],
        tokens: Sequence[int],
        budget_s: float | None,
        on_progress: Callable[[Progress], None] | None,
        *,
        resume: bool,
    ) -> CalibrationReport:
        begin = time.monotonic()
        deadline = begin + budget_s if budget_s is not None else math.inf
        modes: tuple[Mode, ...] = ("graph", "eager") if self._machine.device == "cuda" else ("eager",)
        known = self._known() if resume else set()
        done, total = 0, len(layers) * len(tokens)

        def tell(what: str) -> None:
            if on_progress is not None:
                left = (time.monotonic() - begin) / done * (total - done) if done else None
                on_progress(Progress(done, total, what, left))

        try:
            for place, layer in enumerate(layers):
                # What is left of the time is shared by the layers that are left.
                share = time.monotonic() + (deadline - time.monotonic()) / (len(layers) - place)
                try:
                    self._worker.layer(layer)
                except NotPreparedError as error:
                    self.report.skipped.append(f"{layer}: its weights could not be made: {error}")
                    total -= len(tokens)
                    continue
                queue = coarse_to_fine(tokens)
                while queue:
                    M = queue.pop(0)
                    if time.monotonic() > share:
                        late = ", ".join(map(str, sorted([M, *queue])))
                        self.report.skipped.append(f"{layer}: no time left for M of {late}; --resume measures them")
                        total -= 1 + len(queue)
                        break
                    tell(f"{layer} M={M}")
                    if not all((layer.key, M, mode) in known for mode in modes):
                        self._point(layer, M, modes)
                    done += 1
                    if not queue:
                        queue = self._boundaries(layer, tokens)
                        total += len(queue)
        except KeyboardInterrupt:
            self.report.interrupted = True
        finally:
            self._worker.close()
        tell("done")
        self.report.seconds = time.monotonic() - begin
        return self.report

    def _eligible(self, wanted: Sequence[str] | None) -> dict[str, Backend]:
        found: dict[str, Backend] = {}
        for name in wanted or BACKENDS.names():
            try:
                made = BACKENDS.load(name)(self._machine)
            except BackendUnavailableError as error:
                self.report.unavailable[name] = "; ".join(error.reasons)
                continue
            if reasons := made.unavailable_reasons():
                self.report.unavailable[name] = "; ".join(reasons)
            else:
                found[name] = made
        return found

    def _known(self) -> set[tuple[object, int, Mode]]:
        try:
            file = read_calibration(self.report.path, self._machine)
        except (FileNotFoundError, PolicyFileError):
            return set()
        current = [
            (made := self._backends.get(candidate.backend)) is not None
            and not changes(candidate.versions, relevant_versions(made))
            for candidate in file.candidates
        ]
        return {
            (file.layers[point.layer].key, point.M, point.mode)
            for point in file.points
            if point.measurements and all(current[one.candidate] for one in point.measurements)
        }

    def _candidates(self, layer: Layer, M: int, mode: Mode) -> list[Candidate]:
        problem = layer.problem(M, self._machine, mode)
        found = []
        for name, made in self._backends.items():
            if made.unsupported_reasons(problem):
                continue
            if cause := self._quarantine.cause(name, problem):
                note = f"{layer} M={M}: {name} is quarantined: {cause}"
                self.report.skipped.extend([note] if note not in self.report.skipped else [])
                continue
            configs = made.configs(problem)
            found += [
                Candidate(
                    backend=name,
                    config=config.model_dump(mode="json"),
                    versions=relevant_versions(made),
                    measured=self._now,
                    package=self._package,
                    commit=self._commit,
                )
                for config in (configs[:3] if self._quick else configs)
            ]
        return found

    def _point(self, layer: Layer, M: int, modes: Iterable[Mode]) -> None:
        """Measure one token count in each mode; the later modes start from the first one's finalists."""
        news: list[Measured] = []
        finalists: set[Identity] | None = None
        for mode in modes:
            candidates = self._candidates(layer, M, mode)
            if finalists is None:
                starting = self._starting(layer, M, mode, candidates)
            else:
                ran = {one.candidate.backend for one in news}
                starting = [one for one in candidates if one.identity in finalists or one.backend not in ran]
            race = Race(self._arena, layer, M, mode, starting)
            try:
                results = race.run()
            except NotPreparedError as error:
                self.report.skipped.append(f"{layer} M={M} ({mode}): its inputs could not be made: {error}")
                break
            self._remember(layer, M, mode, candidates, results)
            news += results
            if finalists is None and race.finalists:
                finalists = race.finalists
        self.report.measured += news
        if news:
            save(self.report.path, news, self._machine)

    def _starting(self, layer: Layer, M: int, mode: Mode, candidates: list[Candidate]) -> list[Candidate]:
        """Everyone, or between two near measured token counts whoever was close, or unknown, at either."""
        at = self._behind.get((layer.key, mode), {})
        below, above = max((m for m in at if m < M), default=0), min((m for m in at if m > M), default=0)
        if not below or not above or NEIGHBOURS * below < M or above > NEIGHBOURS * M:
            return candidates
        return [one for one in candidates if min(at[near].get(one.identity, 1.0) for near in (below, above)) <= CLOSE]

    def _remember(
        self, layer: Layer, M: int, mode: Mode, candidates: Iterable[Candidate], results: Iterable[Measured]
    ) -> None:
        scores = {one.candidate.identity: one.measurement.score for one in results}
        fastest = min((score for score in scores.values() if score is not None), default=None)
        if fastest is None:
            return
        behind = {one.identity: math.inf for one in candidates if one.identity not in scores}
        behind |= {identity: score / fastest for identity, score in scores.items() if score is not None}
        # Each backend's best stays close: its fallback is wanted everywhere.
        best: dict[str, Identity] = {}
        for identity in sorted(behind, key=lambda one: behind[one]):
            best.setdefault(identity[0], identity)
        behind |= dict.fromkeys(best.values(), 1.0)
        self._behind.setdefault((layer.key, mode), {})[M] = behind

    def _boundaries(self, layer: Layer, tokens: Sequence[int]) -> list[int]:
        """Token counts between measured neighbours whose winners differ, half way on the logarithmic scale."""
        if self._quick:
            return []
        found = set()
        measured = {one.M for one in self.report.measured if one.layer == layer}
        for (name, _), winners in self.report.winners().items():
            if name != str(layer):
                continue
            ordered = sorted(winners)
            for lower, upper in itertools.pairwise(ordered):
                middle = round(math.sqrt(lower * upper))
                if winners[lower][0] != winners[upper][0] and upper / lower > REFINE and middle not in measured:
                    found.add(middle)
        return sorted(middle for middle in found if tokens[0] < middle < tokens[-1])

    def _bar(self, backend: str, layer: Layer, M: int, mode: Mode, cause: str) -> None:
        """Remember what kills a process."""
        self._quarantine.bar(backend, layer.problem(M, self._machine, mode), cause, lethal=True)

    def _tolerance(self, backend: str, layer: Layer) -> float:
        """What the backend promises for this layer."""
        limits = self._backends[backend].tolerance
        return max(limits.get(layer.dtype, 0.0), limits.get(layer.act_dtype, 0.0))


def coarse_to_fine(tokens: Sequence[int]) -> list[int]:
    """The ends first, then halves: whatever the budget, what was measured spans the range."""
    order: list[int] = []
    spans = [(0, len(tokens) - 1)]
    for index in (0, len(tokens) - 1):
        if tokens[index] not in order:
            order.append(tokens[index])
    while spans:
        lower, upper = spans.pop(0)
        if upper - lower > 1:
            middle = (lower + upper) // 2
            order.append(tokens[middle])
            spans += [(lower, middle), (middle, upper)]
    return order
