"""Every experts class that transformers decorates, from its own sources, as a tiny layer with random weights."""

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

HIDDEN, INTERMEDIATE, EXPERTS = 64, 32, 4
_DECORATOR = "@use_experts_implementation"
_COUNT = re.compile(r"\b(?:self|config)\.\w*n(?:um)?_(?:local_|routed_)?experts\b")


@dataclass(frozen=True)
class Family:
    """A decorated class, the configuration class that its constructor is annotated with, and what that reads of it."""

    module: str
    name: str
    config: str
    reads: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def families() -> Iterator[Family]:
    """All classes under transformers/models with the decorator, found without importing them."""
    for path, text in _sources():
        if _DECORATOR not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and any("use_experts" in ast.unparse(d) for d in node.decorator_list):
                yield _family(f"transformers.models.{path.parent.name}.{path.stem}", node)


def families_without_interface() -> set[str]:
    """The folders under transformers/models whose modules count experts, and that decorate no class."""
    return {path.parent.name for path, text in _sources() if _COUNT.search(text) and _DECORATOR not in text}


def _sources() -> Iterator[tuple[Path, str]]:
    models = Path(transformers.__file__).parent / "models"
    for path in sorted(models.glob("*/modeling_*.py")):
        yield path, path.read_text(encoding="utf-8")


def _family(module: str, node: ast.ClassDef) -> Family:
    constructor = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    annotation = constructor.args.args[1].annotation
    reads = {
        each.attr
        for each in ast.walk(constructor)
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == "config"
    }
    return Family(module, node.name, ast.unparse(annotation) if annotation else "", tuple(sorted(reads)))


def build(family: Family, dtype: torch.dtype) -> Any:
    """A layer of the family with its configuration's defaults, but for the sizes."""
    module = importlib.import_module(family.module)
    config = _config(module, family)
    for name in family.reads:
        if isinstance(getattr(config, name, None), int | None) and (size := _size(name)):
            setattr(config, name, size)
    config._experts_implementation = "moe_dispatch"
    extra = {"intermediate_size": INTERMEDIATE} if "VLMoe" in family.name and "Ernie" in family.name else {}
    layer = getattr(module, family.name)(config, **extra)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.2)
    return layer.to(dtype).eval()


def _config(module: Any, family: Family) -> Any:
    """A default configuration with what the constructor reads: the annotated one, or a model's of the module."""
    annotated = getattr(module, family.config.strip("'\""), None)
    models = (getattr(each, "config_class", None) for each in vars(module).values() if isinstance(each, type))
    for kind in filter(None, (annotated, *models)):
        config = kind()
        for candidate in (config, config.get_text_config()):
            if all(hasattr(candidate, name) for name in family.reads):
                return candidate
    raise AssertionError(f"no configuration of {module.__name__} has {family.reads}")


def _size(name: str) -> int:
    if "expert" in name and "intermediate" not in name and "ffn" not in name:
        return EXPERTS
    if "intermediate" in name or "ffn" in name:
        return INTERMEDIATE
    return HIDDEN if name in ("hidden_size", "moe_latent_size", "d_model") else 0
