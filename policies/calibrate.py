"""Measures every eligible backend and configuration on this machine and keeps the result.

Whatever has to be compiled is compiled first, on all cores (see `compile_ahead`). Then each token count is a race (see
`race`), run in a worker process. The token counts come coarse to fine, so that most of them lie between two measured
ones; who was far behind at both does not start again.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import math
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pydantic
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
from .compile_ahead import Job, compile_ahead, compiled_path
from .merge import Measured, save, settle
from .race import FALLBACK, Arena, Race
from .schema import Candidate, Layer, LayerKey, read_calibration
from .supervisor import NotPreparedError, Supervisor
from .table import Identity, LayerTable, calm_winners, tables
from .versions import changes, relevant_versions

DEFAULT_TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
QUICK_TOKENS: Final = (1, 16, 256, 4096)
QUICK_CONFIGS: Final = 3
# Of a budget; what is not compiled by then is compiled in the race, one after another.
COMPILE_SHARE: Final = 0.5
DEFAULT_ROUTINGS: Final = ("uniform", "dirichlet-4")
# Token counts that every layer gets before any gets the others: enough to tell who may win between them.
COARSE: Final = 5
# Two measured neighbours decide who starts between them if both are within this factor of tokens,
NEIGHBOURS: Final = 8
# and then whoever was within this factor of the leader's time at either does, and each backend's best, to fall back on.
CLOSE: Final = 1.2
REFINE: Final = 1.5  # boundaries are refined until the neighbours are this close
# and only where each neighbour's winner loses this much at the other, so that much can be lost between them.
DISAGREE: Final = 0.025


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
        spent: Of them, on each kind of work.
    """

    path: Path
    measured: list[Measured] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)

    def winners(self) -> dict[tuple[str, Mode], dict[int, tuple[Identity, float]]]:
        """Per layer and mode the calm winner at each token count, with its time in µs."""
        scores: dict[tuple[str, Mode], dict[int, dict[Identity, float | None]]] = {}
        for one in self.measured:
            at = scores.setdefault((str(one.layer), one.mode), {}).setdefault(one.M, {})
            at[one.candidate.identity] = one.measurement.score
        before = {
            (str(one.layer), one.mode, one.M): one.candidate.identity
            for one in self.measured
            if one.measurement.incumbent
        }
        found: dict[tuple[str, Mode], dict[int, tuple[Identity, float]]] = {}
        for key, by_tokens in scores.items():
            timed = {M: by_tokens[M] for M in sorted(by_tokens) if any(by_tokens[M].values())}
            incumbents = {M: before[*key, M] for M in timed if (*key, M) in before}
            winners = calm_winners(timed, incumbents)
            found[key] = {M: (winner, timed[M][winner] or math.nan) for M, winner in winners.items()}
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
    most_configs: int | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    backends: Sequence[str] | None = None,
    routings: Sequence[str] = DEFAULT_ROUTINGS,
    modes: Sequence[Mode] | None = None,
    compile_only: bool = False,
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
        most_configs: Of each backend, the likeliest first; all that it offers if None.
        resume: Leave out the points that were measured with today's versions.
        device: The current CUDA device if None, else the CPU.
        backends: Only these.
        routings: Names of routing distributions; the winner is the best over all of them.
        modes: Graph, eager, or both, which is what None means where there are graphs.
        compile_only: Only compile what would be measured, so that a later calibration need not.
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
    if quick:
        most_configs = min(most_configs or QUICK_CONFIGS, QUICK_CONFIGS)
    run = _Calibration(machine, device, backends, tuple(routings), timeout_s, directory, most_configs, refine=not quick)
    layers = [
        Layer.of(found.problem(1, dtype, machine))
        for found in (workload(model) if isinstance(model, str) else model for model in models)
        for dtype in dtypes
    ]
    possible: tuple[Mode, ...] = ("graph", "eager") if machine.device == "cuda" else ("eager",)
    chosen = tuple(mode for mode in possible if modes is None or mode in modes)
    if not chosen:
        raise InvalidInputError(f"modes must be among {', '.join(possible)} on this machine, got {modes}")
    return run.measure(layers, counts, chosen, budget_s, on_progress, resume=resume, compile_only=compile_only)


class _Calibration:
    def __init__(
        self,
        machine: Machine,
        device: torch.device | str | None,
        backends: Sequence[str] | None,
        routings: tuple[str, ...],
        timeout_s: float,
        directory: Path | None,
        most_configs: int | None,
        *,
        refine: bool,
    ) -> None:
        self._machine, self._directory = machine, directory
        self._most_configs, self._refine = most_configs, refine
        self.report = CalibrationReport(calibration_path(machine, directory))
        self._quarantine = Quarantine(machine, directory)
        self._backends = self._eligible(backends)
        named = {name: f"{type(made).__module__}:{type(made).__qualname__}" for name, made in self._backends.items()}
        self._new_worker = functools.partial(Supervisor, str(device or machine.device), named, timeout_s)
        self._worker = self._new_worker()
        self._arena = Arena(self._worker, routings, self._tolerance, self._bar)
        # Layer and mode -> M -> candidate -> its time over the leader's; infinite for who did not start.
        self._behind: dict[tuple[LayerKey, Mode], dict[int, dict[Identity, float]]] = {}
        self._before = self._tables_before()
        self._now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._package = importlib.metadata.version("moe-dispatch")
        self._commit = commit(Path(__file__).parent)

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
        begin = time.monotonic()
        deadline = begin + budget_s if budget_s is not None else math.inf
        known = self._known(tokens) if resume else set()
        # One that goes on is still deciding what it has.
        if self._before and not resume and not compile_only:
            settle(self.report.path, self._machine)
        order = coarse_to_fine(tokens)
        # Coarse for all layers, then fine for all: whatever the time is enough for, it was spent on every layer.
        legs = [(layer, part) for part in (order[:COARSE], order[COARSE:]) for layer in layers if part]
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
            while legs and not compile_only:
                layer, counts = legs.pop(0)
                missing = [M for M in counts if not all((layer.key, M, mode) in known for mode in modes)]
                done += len(counts) - len(missing)
                if missing and time.monotonic() <= deadline and not self._prepared(layer):
                    total -= len(missing) + sum(len(others) for other, others in legs if other == layer)
                    legs = [leg for leg in legs if leg[0] != layer]
                    continue
                for place, M in enumerate(missing):
                    if time.monotonic() > deadline:
                        self._late(layer, missing[place:])
                        total -= len(missing) - place
                        break
                    tell(f"{layer} M={M}")
                    self._point(layer, M, modes)
                    done += 1
                if not legs and time.monotonic() <= deadline:
                    legs = [(one, found) for one in layers if (found := self._boundaries(one, tokens, known))]
                    total += sum(len(found) for _, found in legs)
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

    def _compile(
        self,
        layers: Sequence[Layer],
        tokens: Sequence[int],
        mode: Mode,
        known: Container[tuple[LayerKey, int, Mode]],
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
            for candidate in self._candidates(layer, M, mode)
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

    def _tables_before(self) -> dict[tuple[LayerKey, Mode], LayerTable]:
        """What this machine's calibration said before this run, with today's versions or others."""
        try:
            return tables(read_calibration(self.report.path, self._machine))
        except (FileNotFoundError, PolicyFileError):
            return {}

    def _known(self, tokens: Sequence[int]) -> set[tuple[LayerKey, int, Mode]]:
        """Points measured with today's versions; what they say of who is far behind counts as if measured now."""
        try:
            file = read_calibration(self.report.path, self._machine)
        except (FileNotFoundError, PolicyFileError):
            return set()
        current = [
            (made := self._backends.get(candidate.backend)) is not None
            and not changes(candidate.versions, relevant_versions(made))
            for candidate in file.candidates
        ]
        found = set()
        for point in file.points:
            layer = file.layers[point.layer]
            if point.measurements and all(current[one.candidate] for one in point.measurements):
                found.add((layer.key, point.M, point.mode))
                scores = {file.candidates[one.candidate].identity: one.score for one in point.measurements}
                if point.M in tokens:
                    candidates = self._candidates(layer, point.M, point.mode)
                    self._remember(layer, point.M, point.mode, candidates, scores)
        return found

    def _candidates(self, layer: Layer, M: int, mode: Mode) -> list[Candidate]:
        problem = layer.problem(M, self._machine, mode)
        chosen = self._choice_before(layer, M, mode)
        found: list[Candidate] = []
        for name, made in self._backends.items():
            if made.unsupported_reasons(problem):
                continue
            if cause := self._quarantine.cause(name, problem):
                note = f"{layer} M={M}: {name} is quarantined: {cause}"
                self.report.skipped.extend([note] if note not in self.report.skipped else [])
                continue
            configs = list(made.configs(problem)[: self._most_configs])
            # What would run now takes part, though it may be offered at other token counts only.
            if chosen and chosen[0] == name:
                with contextlib.suppress(pydantic.ValidationError):
                    configs.append(made.config_type.model_validate(dict(chosen[1])))
            found += [
                Candidate(
                    backend=name,
                    config=config.model_dump(mode="json"),
                    versions=relevant_versions(made),
                    measured=self._now,
                    package=self._package,
                    commit=self._commit,
                )
                for config in dict.fromkeys(configs)
            ]
        return found

    def _point(self, layer: Layer, M: int, modes: Iterable[Mode]) -> None:
        """Measure one token count in each mode; the later modes start from the first one's finalists."""
        news: list[Measured] = []
        finalists: dict[Identity, float] = {}
        for mode in modes:
            candidates = self._candidates(layer, M, mode)
            starting = self._starting(layer, M, mode, candidates)
            if finalists:
                # Who could not run in the first mode knows no better than this one's neighbours.
                ran = {one.candidate.backend for one in news}
                others = {one.identity for one in starting if one.backend not in ran}
                starting = [one for one in candidates if one.identity in finalists or one.identity in others]
            race = Race(self._arena, layer, M, mode, starting, finalists)
            try:
                results = race.run()
            except NotPreparedError as error:
                self.report.skipped.append(f"{layer} M={M} ({mode}): its inputs could not be made: {error}")
                break
            scores = {one.candidate.identity: one.measurement.score for one in results}
            self._remember(layer, M, mode, candidates, scores)
            news += [self._marked(one) for one in results]
            finalists = finalists or race.finalists
        self.report.measured += news
        if news:
            save(self.report.path, news, self._machine)

    def _marked(self, one: Measured) -> Measured:
        """With the incumbent marked as such."""
        if self._winner_before(one.layer, one.M, one.mode) != one.candidate.identity:
            return one
        return dataclasses.replace(one, measurement=one.measurement.model_copy(update={"incumbent": True}))

    def _winner_before(self, layer: Layer, M: int, mode: Mode) -> Identity | None:
        table = self._before.get((layer.key, mode))
        return table.winners.get(M) if table else None

    def _choice_before(self, layer: Layer, M: int, mode: Mode) -> Identity | None:
        """The winner where M was measured, between that what was made of the neighbours."""
        table = self._before.get((layer.key, mode))
        ranked = table.rank(M) if table else ()
        return ranked[0][0] if ranked else None

    def _starting(self, layer: Layer, M: int, mode: Mode, candidates: list[Candidate]) -> list[Candidate]:
        """Everyone, or between two measured token counts that are near whoever was close, or unknown, at either."""
        at = self._behind.get((layer.key, mode), {})
        below, above = max((m for m in at if m < M), default=0), min((m for m in at if m > M), default=0)
        if not below or not above or NEIGHBOURS * below < M or above > NEIGHBOURS * M:
            return candidates
        best = {_best_of(backend, at[near]) for near in (below, above) for backend in self._backends}
        best.add(self._choice_before(layer, M, mode))
        return [
            one
            for one in candidates
            if one.identity in best or min(at[near].get(one.identity, 1.0) for near in (below, above)) <= CLOSE
        ]

    def _remember(
        self,
        layer: Layer,
        M: int,
        mode: Mode,
        candidates: Iterable[Candidate],
        scores: Mapping[Identity, float | None],
    ) -> None:
        fastest = min((score for score in scores.values() if score is not None), default=None)
        if fastest is None:
            return
        behind = {one.identity: math.inf for one in candidates if one.identity not in scores}
        behind |= {one: score / fastest if score is not None else math.inf for one, score in scores.items()}
        self._behind.setdefault((layer.key, mode), {})[M] = behind

    def _boundaries(
        self, layer: Layer, tokens: Sequence[int], known: Container[tuple[LayerKey, int, Mode]]
    ) -> list[int]:
        """Token counts half way, logarithmically, between neighbours of which each one's winner loses at the other."""
        if not self._refine:
            return []
        found = set()
        measured = {one.M for one in self.report.measured if one.layer == layer}
        for (name, mode), winners in self.report.winners().items():
            if name != str(layer):
                continue
            behind = self._behind.get((layer.key, mode), {})
            for lower, upper in itertools.pairwise(sorted(winners)):
                middle = round(math.sqrt(lower * upper))
                lost = min(
                    behind.get(lower, {}).get(winners[upper][0], math.inf),
                    behind.get(upper, {}).get(winners[lower][0], math.inf),
                )
                new = middle not in measured and (layer.key, middle, mode) not in known
                if new and lost > 1 + DISAGREE and upper / lower > REFINE:
                    found.add(middle)
        return sorted(middle for middle in found if tokens[0] < middle < tokens[-1])

    def _bar(self, backend: str, layer: Layer, M: int, mode: Mode, cause: str) -> None:
        """Remember what kills a process."""
        self._quarantine.bar(backend, layer.problem(M, self._machine, mode), cause, lethal=True)

    def _tolerance(self, backend: str, layer: Layer) -> float:
        """What the backend promises for this layer."""
        limits = self._backends[backend].tolerance
        return max(limits.get(layer.dtype, 0.0), limits.get(layer.act_dtype, 0.0))


def _best_of(backend: str, behind: Mapping[Identity, float]) -> Identity | None:
    """The backend's fastest candidate, if any had a time that is worth a fallback."""
    timed = {one: ratio for one, ratio in behind.items() if one[0] == backend and ratio <= FALLBACK}
    return min(timed, key=lambda one: timed[one], default=None)


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
