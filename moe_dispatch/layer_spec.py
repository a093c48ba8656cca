"""What all layers of a kind have in common, as one object."""

import weakref
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from moe_dispatch.problem import MoEProblem


class LayerSpec:
    """Everything about a layer that a plan depends on. Alike layers share one object while any of them lives."""

    __slots__ = ("__weakref__", "facts", "problems")

    def __init__(self, facts: tuple[object, ...]) -> None:
        self.facts = facts
        self.problems: dict[tuple[object, ...], MoEProblem] = {}  # calls of one token, by all but their token count

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what is loaded, is the object that alike layers share here."""
        return shared_spec, (self.facts,)


_SPECS: Final[weakref.WeakValueDictionary[tuple[object, ...], LayerSpec]] = weakref.WeakValueDictionary()


def shared_spec(facts: tuple[object, ...]) -> LayerSpec:
    """The object that layers of these facts share."""
    return _SPECS.setdefault(facts, LayerSpec(facts))
