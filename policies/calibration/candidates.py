"""Which candidates are measured at a point: all that can run there, except those that measured neighbours rule out."""

import contextlib
import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import pydantic

from moe_dispatch.backend import Backend
from moe_dispatch.dispatch.quarantine import Quarantine
from moe_dispatch.errors import PolicyFileError
from moe_dispatch.machine import Machine
from moe_dispatch.measure.provenance import commit
from moe_dispatch.policies.calibration.import_trial import import_faults
from moe_dispatch.policies.calibration.request import CalibrationRequest
from moe_dispatch.policies.calibration.successive_halving import FALLBACK
from moe_dispatch.policies.measurements.schema import (
    CalibrationFile,
    Candidate,
    Identity,
    LayerKey,
    LayerShape,
    PointKey,
    read_calibration,
)
from moe_dispatch.policies.measurements.table import tables
from moe_dispatch.policies.measurements.versions import changes, relevant_versions
from moe_dispatch.problem import Mode
from moe_dispatch.registry import LAST_RESORT, make_backend
from moe_dispatch.system.version import installed_version
from moe_dispatch.workspace import excess

# Measured neighbours within this factor of tokens on both sides rule out candidates between them,
NEIGHBOURS: Final = 8
# namely those that were at both more than this factor behind the fastest, unless they are their backend's best.
CLOSE: Final = 1.2


def eligible(names: Sequence[str], machine: Machine, timeout_s: float) -> tuple[dict[str, Backend], dict[str, str]]:
    """The backends that can run on a machine, by name, and the reason against each of the others.

    An import of another package's backend that takes longer than `timeout_s` counts as hung.

    Raises:
        UnknownNameError: A name is not registered.
    """
    backends: dict[str, Backend] = {}
    unavailable = import_faults(names, timeout_s)
    for name in names:
        if name in unavailable:
            continue
        made = make_backend(name, machine)
        if made.registered and made.reasons:
            unavailable[name] = "; ".join(made.reasons)
        else:
            backends[name] = made.require()
    return backends, unavailable


class CandidateSource:
    """Knows the candidates of each point, the last calibration's choices, and how far behind each candidate was so far.

    Backends in the quarantine do not take part; `skipped` gets a line for each one that is left out, with the reason,
    once.
    """

    def __init__(
        self, request: CalibrationRequest, backends: Mapping[str, Backend], quarantine: Quarantine, skipped: list[str]
    ) -> None:
        self._request, self._backends, self._quarantine, self._skipped = request, backends, quarantine, skipped
        self._behind: dict[tuple[LayerKey, Mode], dict[int, dict[Identity, float]]] = {}
        try:
            self._file = read_calibration(request.path, request.machine)
        except (FileNotFoundError, PolicyFileError):
            self._file = CalibrationFile(machine=request.machine)
        self._before = tables(self._file)
        self._now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._package = installed_version()
        self._commit = commit(Path(__file__).parent)

    @property
    def calibrated_before(self) -> bool:
        """Whether this machine's file has measurements, under today's versions or others."""
        return bool(self._before)

    def behind(self, layer: LayerShape, mode: Mode) -> Mapping[int, Mapping[Identity, float]]:
        """Token count -> candidate -> its time over the fastest's there; infinite for one that did not start."""
        return self._behind.get((layer.key, mode), {})

    def known(self) -> set[PointKey]:
        """Points of the layers at which today's versions of every backend were measured; their lags count as if now.

        Backends that do not take part now have no say.
        """
        stored = self._file.candidates
        current = [
            (backend := self._backends.get(candidate.backend)) is not None
            and not changes(candidate.versions, relevant_versions(backend))
            for candidate in stored
        ]
        requested = {layer.key for layer in self._request.layers}
        known: set[PointKey] = set()
        for point in self._file.points:
            layer = self._file.layers[point.layer]
            if layer.key not in requested:
                continue
            candidates = self.candidates(layer, point.M, point.mode)
            measured = [each for each in point.measurements if stored[each.candidate].backend in self._backends]
            missing = {each.backend for each in candidates} - {stored[each.candidate].backend for each in measured}
            lacks_energy = self._request.energy_s > 0 and all(each.joules is None for each in measured)
            if measured and not missing and not lacks_energy and all(current[each.candidate] for each in measured):
                known.add((layer.key, point.M, point.mode))
                if point.M in self._request.tokens:
                    scores = {stored[each.candidate].identity: each.score for each in measured}
                    self.remember(layer, point.M, point.mode, candidates, scores)
        return known

    def candidates(self, layer: LayerShape, M: int, mode: Mode) -> list[Candidate]:
        """Every backend that can run a point, in each configuration that it offers there."""
        problem = layer.problem(M, self._request.machine, mode)
        chosen = self._choice_before(layer, M, mode)
        candidates: list[Candidate] = []
        for name, backend in self._backends.items():
            if backend.unsupported_reasons(problem):
                continue
            if name != LAST_RESORT and (cause := self._quarantine.cause(name, problem)):
                self._skip(f"{layer} M={M}: {name} is quarantined: {cause}")
                continue
            configs = list(backend.configs(problem)[: self._request.most_configs])
            # Today's choice takes part, though the backend may offer it at other token counts only.
            if chosen and chosen[0] == name:
                with contextlib.suppress(pydantic.ValidationError):
                    configs.append(backend.config_type.model_validate(dict(chosen[1])))
            fitting = []
            for config in dict.fromkeys(configs):
                if reason := excess(backend, problem, config):  # for which it would not be chosen
                    self._skip(f"{layer} M={M}: {name} with {config.label} {reason}")
                else:
                    fitting.append(config)
            versions = relevant_versions(backend)
            candidates += [
                Candidate(
                    backend=name,
                    config=config.model_dump(mode="json"),
                    versions=versions,
                    measured=self._now,
                    package=self._package,
                    commit=self._commit,
                )
                for config in fitting
            ]
        return candidates

    def starters(self, layer: LayerShape, M: int, mode: Mode, candidates: list[Candidate]) -> list[Candidate]:
        """All candidates, or between two near measured token counts those that were close, or unknown, at either."""
        behind = self.behind(layer, mode)
        below, above = max((m for m in behind if m < M), default=0), min((m for m in behind if m > M), default=0)
        if not below or not above or NEIGHBOURS * below < M or above > NEIGHBOURS * M:
            return candidates
        kept = {_best_of(backend, behind[near]) for near in (below, above) for backend in self._backends}
        kept.add(self._choice_before(layer, M, mode))
        return [
            candidate
            for candidate in candidates
            if candidate.identity in kept
            or min(behind[near].get(candidate.identity, 1.0) for near in (below, above)) <= CLOSE
        ]

    def remember(
        self,
        layer: LayerShape,
        M: int,
        mode: Mode,
        candidates: Iterable[Candidate],
        scores: Mapping[Identity, float | None],
    ) -> None:
        """Keep how far behind each candidate was at a point; no-op where no candidate has a time.

        `candidates` are those that could have started, and `scores` the times in µs of those that did, None where
        disqualified.
        """
        fastest = min((score for score in scores.values() if score is not None), default=None)
        if fastest is None:
            return
        behind = {candidate.identity: math.inf for candidate in candidates if candidate.identity not in scores}
        behind |= {identity: score / fastest if score is not None else math.inf for identity, score in scores.items()}
        self._behind.setdefault((layer.key, mode), {})[M] = behind

    def winner_before(self, layer: LayerShape, M: int, mode: Mode) -> Identity | None:
        """The point's winner in the calibration before; None if it was not measured."""
        table = self._before.get((layer.key, mode))
        return table.winners.get(M) if table else None

    def _choice_before(self, layer: LayerShape, M: int, mode: Mode) -> Identity | None:
        """What the calibration before chooses at a point, interpolated where it did not measure."""
        table = self._before.get((layer.key, mode))
        ranked = table.rank(M) if table else ()
        return ranked[0][0] if ranked else None

    def _skip(self, note: str) -> None:
        if note not in self._skipped:
            self._skipped.append(note)


def _best_of(backend: str, behind: Mapping[Identity, float]) -> Identity | None:
    """The backend's fastest candidate, if it is fast enough to be a fallback."""
    timed = {identity: ratio for identity, ratio in behind.items() if identity[0] == backend and ratio <= FALLBACK}
    return min(timed, key=lambda identity: timed[identity], default=None)
