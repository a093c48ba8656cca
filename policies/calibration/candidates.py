"""Who takes part in a calibration's races, and where: of everyone who can, those whom no neighbour has ruled out."""

import contextlib
import datetime
import importlib.metadata
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import pydantic

from moe_dispatch.backend import Backend
from moe_dispatch.dispatch.quarantine import Quarantine
from moe_dispatch.errors import BackendUnavailableError, PolicyFileError
from moe_dispatch.machine import Machine
from moe_dispatch.measure.provenance import commit
from moe_dispatch.policies.calibration.successive_halving import FALLBACK
from moe_dispatch.policies.measurements.schema import CalibrationFile, Candidate, Layer, LayerKey, read_calibration
from moe_dispatch.policies.measurements.table import Identity, tables
from moe_dispatch.policies.measurements.versions import changes, relevant_versions
from moe_dispatch.problem import Mode
from moe_dispatch.registry import make_backend

# Two measured neighbours decide who starts between them if both are within this factor of tokens,
NEIGHBOURS: Final = 8
# and then whoever was within this factor of the leader's time at either does, and each backend's best, to fall back on.
CLOSE: Final = 1.2

Place = tuple[LayerKey, int, Mode]  # a point's name


def eligible(names: Sequence[str], machine: Machine) -> tuple[dict[str, Backend], dict[str, str]]:
    """The backends that can run on a machine, and why each of the others cannot.

    Raises:
        UnknownNameError: Nothing is registered under a name.
    """
    found: dict[str, Backend] = {}
    unavailable: dict[str, str] = {}
    for name in names:
        try:
            made = make_backend(name, machine)
        except BackendUnavailableError as error:
            unavailable[name] = "; ".join(error.reasons)
            continue
        if reasons := made.unavailable_reasons():
            unavailable[name] = "; ".join(reasons)
        else:
            found[name] = made
    return found, unavailable


class CandidateSource:
    """Candidates, what the calibration before said of them, and how far behind they were in the races so far.

    Args:
        machine: Whose.
        backends: Those that can run on it, by name.
        path: Of the calibration file.
        quarantine: Who is in it does not take part.
        most_configs: Of each backend, the likeliest first; all that it offers if None.
        skipped: Who is left out is added to it, with the reason, once.
    """

    def __init__(
        self,
        machine: Machine,
        backends: Mapping[str, Backend],
        path: Path,
        quarantine: Quarantine,
        most_configs: int | None,
        skipped: list[str],
    ) -> None:
        self._machine, self._backends, self._quarantine = machine, backends, quarantine
        self._most_configs, self._skipped = most_configs, skipped
        self._behind: dict[tuple[LayerKey, Mode], dict[int, dict[Identity, float]]] = {}
        try:
            self._file = read_calibration(path, machine)
        except (FileNotFoundError, PolicyFileError):
            self._file = CalibrationFile(machine=machine)
        self._before = tables(self._file)
        self._now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._package = importlib.metadata.version("moe-dispatch")
        self._commit = commit(Path(__file__).parent)

    @property
    def calibrated_before(self) -> bool:
        """Whether this machine's file decides anything, with today's versions or others."""
        return bool(self._before)

    def behind(self, layer: Layer, mode: Mode) -> Mapping[int, Mapping[Identity, float]]:
        """Token count -> candidate -> its time over the leader's there; infinite for who did not start."""
        return self._behind.get((layer.key, mode), {})

    def known(self, tokens: Sequence[int]) -> set[Place]:
        """Points measured with today's versions; what they say of who is far behind counts as if measured now."""
        held = self._file.candidates
        current = [
            (made := self._backends.get(candidate.backend)) is not None
            and not changes(candidate.versions, relevant_versions(made))
            for candidate in held
        ]
        found = set()
        for point in self._file.points:
            layer = self._file.layers[point.layer]
            if point.measurements and all(current[one.candidate] for one in point.measurements):
                found.add((layer.key, point.M, point.mode))
                scores = {held[one.candidate].identity: one.score for one in point.measurements}
                if point.M in tokens:
                    candidates = self.candidates(layer, point.M, point.mode)
                    self.remember(layer, point.M, point.mode, candidates, scores)
        return found

    def candidates(self, layer: Layer, M: int, mode: Mode) -> list[Candidate]:
        """Everyone who can run a point, in every configuration that is worth it there."""
        problem = layer.problem(M, self._machine, mode)
        chosen = self._choice_before(layer, M, mode)
        found: list[Candidate] = []
        for name, made in self._backends.items():
            if made.unsupported_reasons(problem):
                continue
            if cause := self._quarantine.cause(name, problem):
                note = f"{layer} M={M}: {name} is quarantined: {cause}"
                self._skipped.extend([note] if note not in self._skipped else [])
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

    def starting(self, layer: Layer, M: int, mode: Mode, candidates: list[Candidate]) -> list[Candidate]:
        """Everyone, or between two measured token counts that are near whoever was close, or unknown, at either."""
        at = self.behind(layer, mode)
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

    def remember(
        self,
        layer: Layer,
        M: int,
        mode: Mode,
        candidates: Iterable[Candidate],
        scores: Mapping[Identity, float | None],
    ) -> None:
        """Keep how far behind everyone was at a point; nothing where nobody had a time.

        Args:
            layer: Of the point.
            M: Its token count.
            mode: Its mode.
            candidates: Everyone who could have started.
            scores: Time in µs of everyone who did; None for who was disqualified.
        """
        fastest = min((score for score in scores.values() if score is not None), default=None)
        if fastest is None:
            return
        behind = {one.identity: math.inf for one in candidates if one.identity not in scores}
        behind |= {one: score / fastest if score is not None else math.inf for one, score in scores.items()}
        self._behind.setdefault((layer.key, mode), {})[M] = behind

    def winner_before(self, layer: Layer, M: int, mode: Mode) -> Identity | None:
        """Who won the point in the calibration before, if it was measured."""
        table = self._before.get((layer.key, mode))
        return table.winners.get(M) if table else None

    def _choice_before(self, layer: Layer, M: int, mode: Mode) -> Identity | None:
        """The winner where M was measured, between that what was made of the neighbours."""
        table = self._before.get((layer.key, mode))
        ranked = table.rank(M) if table else ()
        return ranked[0][0] if ranked else None


def _best_of(backend: str, behind: Mapping[Identity, float]) -> Identity | None:
    """The backend's fastest candidate, if any had a time that is worth a fallback."""
    timed = {one: ratio for one, ratio in behind.items() if one[0] == backend and ratio <= FALLBACK}
    return min(timed, key=lambda one: timed[one], default=None)
