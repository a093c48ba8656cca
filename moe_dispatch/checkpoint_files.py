"""The expert weights of one layer, read from safetensors files as transformers and the hub lay them out."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from moe_dispatch.activations import Activation, allowed
from moe_dispatch.checkpoint_sources import Part
from moe_dispatch.checkpoints import expert_names, listed, stack
from moe_dispatch.errors import InvalidInputError
from moe_dispatch.model_config import DOWNLOAD, ConfiguredLayer, configured_layer
from moe_dispatch.problem import QUANT_BLOCK
from moe_dispatch.system.files import read_json

INDEX: Final = "model.safetensors.index.json"
INDEX_BYTES: Final = 256 << 20  # 384 experts in 60 layers take 13.4 MB, with their scales.
# A layer's number, whatever lies between it and "experts.", and what precedes both.
_EXPERTS: Final = re.compile(r"(?P<prefix>(?:.*\.)?(?:layers|blocks|h)\.(?P<layer>\d{1,5})\.(?:.*\.)?experts\.)")


class Checkpoint:
    """Safetensors files as one `TensorSource`. Files are opened when a tensor of theirs is asked for.

    Args:
        path: A ``.safetensors`` file, an ``….index.json``, or a folder with one of them or with several files.

    Attributes:
        origin: The path, for messages.
        folder: The folder of the files.

    Raises:
        InvalidInputError: There is no such checkpoint, or its index is damaged.
        ImportError: safetensors is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import safetensors
        except ImportError as error:
            raise ImportError("reading checkpoints needs safetensors: pip install safetensors") from error
        self._open = safetensors.safe_open
        self.origin = str(path)[:300]
        try:
            path = Path(path).expanduser()
        except RuntimeError as error:
            raise InvalidInputError(f"{self.origin} cannot be expanded: {error}") from error
        self.folder = path if os.path.isdir(path) else path.parent
        self._files: dict[Path, Any] = {}
        self._file_of = self._index(path)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is read from the file's header."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, *index: slice) -> Tensor:
        """A tensor, or the part of it that the slices select; only that is read from the file."""
        if not self.shape(name):  # a scalar has no slices
            return self._whole(name)
        part: Tensor = self._slice(name)[index or (slice(None),)]
        return part

    def _whole(self, name: str) -> Tensor:
        scalar: Tensor = self._opened(self._file_of[name]).get_tensor(name)
        return scalar

    def _slice(self, name: str) -> Any:
        path = self._file_of[name]
        file = self._opened(path)
        try:
            return file.get_slice(name)
        except Exception as error:  # safetensors has an exception of its own for a name that a file lacks
            raise InvalidInputError(
                f"{path} does not have {name}, which the index says it has ({error}); download both again"
            ) from error

    def _opened(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = self._open(path, framework="pt")
            except Exception as error:  # safetensors has an exception of its own for damaged files
                raise InvalidInputError(f"{path} cannot be read as safetensors: {error}") from error
        return self._files[path]

    def _index(self, path: Path) -> dict[str, Path]:
        if path.name.endswith(".index.json"):
            return self._from_index(path)
        if os.path.isfile(path):
            return dict.fromkeys(self._opened(path).keys(), path)
        if not os.path.isdir(path):
            why = "of another kind"
            try:
                path.stat()
            except (OSError, ValueError) as error:
                why = (error.strerror if isinstance(error, OSError) else "") or str(error)
            raise InvalidInputError(f"{self.origin} is neither a file nor a folder ({why}); {DOWNLOAD}")
        if os.path.isfile(path / INDEX):
            return self._from_index(path / INDEX)
        try:
            names = sorted(os.listdir(path))
        except OSError as error:
            raise InvalidInputError(f"{path} cannot be listed: {error.strerror}") from error
        files = [path / name for name in names if name.endswith(".safetensors")]
        if not files:
            raise InvalidInputError(f"{self.origin} has no *.safetensors; there is {listed(names)}")
        return {name: file for file in files for name in self._opened(file).keys()}  # noqa: SIM118 - no dictionary

    def _from_index(self, path: Path) -> dict[str, Path]:
        try:
            weight_map: Any = read_json(path, limit=INDEX_BYTES)["weight_map"]  # type: ignore[index] # what is no index is refused below
            files = {str(name): self.folder / str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInputError(f"{path} is no index of safetensors files: {error!r}") from error
        if missing := {file.name for file in set(files.values()) if not os.path.isfile(file)}:
            raise InvalidInputError(f"{path} names files that are missing: {listed(missing)}; download them")
        return files


def read_experts(
    path: str | Path,
    layer: int,
    *,
    tp: tuple[int, int] = (0, 1),
    activation: Activation | None = None,
    interleaved: bool | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """The arguments of `ExpertWeights` for one layer of a checkpoint; see `ExpertWeights.from_safetensors`."""
    if type(layer) is not int:
        raise InvalidInputError(f"layer must be the layer's number, an integer, got {layer!r}")
    part = Part.named(tp)
    checkpoint = Checkpoint(path)
    prefix = experts_prefix(checkpoint, layer)
    experts = expert_names(checkpoint.names, prefix, checkpoint.origin)
    config = _config(checkpoint)
    described = None
    if config is None:
        if activation is None:
            raise InvalidInputError(
                f"{checkpoint.origin} has no config.json beside it, which would tell the activation; give activation= "
                f"one of {allowed()}"
            )
    else:
        described = configured_layer(config, str(checkpoint.folder / "config.json"))
        _check_quantization(config, str(checkpoint.folder / "config.json"))
    if interleaved is None:
        interleaved = -1 in experts and described is not None and described.interleaved
    tensors = stack(checkpoint, experts, part, interleaved=interleaved, device=device)
    if described:
        _check_agreement(tensors, described, part, checkpoint.origin)
        activation = activation or described.activation
    return {**tensors, "activation": activation, "interleaved": interleaved}


def experts_prefix(checkpoint: Checkpoint, layer: int) -> str:
    """What precedes the names of a layer's experts.

    Raises:
        InvalidInputError: The layer has no experts, or there are several such layers (of a model's encoder, say).
    """
    prefixes: dict[int, set[str]] = {}
    for name in checkpoint.names:
        if match := _EXPERTS.match(name):
            prefixes.setdefault(int(match["layer"]), set()).add(match["prefix"])
    here = prefixes.get(layer, set())
    if len(here) == 1:
        return here.pop()
    if here:
        raise InvalidInputError(f"{checkpoint.origin} has experts of layer {layer} under several names: {listed(here)}")
    others = [name for name in checkpoint.names if re.search(rf"(?:^|\.)(?:layers|blocks|h)\.{layer}\.", name)]
    layers = f"layers {_ranges(sorted(prefixes))} have" if prefixes else "no layer has any"
    there = f". The layer's tensors are {listed(others)}" if others else ""
    raise InvalidInputError(f"{checkpoint.origin} has no experts of layer {layer}; {layers}{there}")


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers with runs shortened: 0, 3–60."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def _config(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    path = checkpoint.folder / "config.json"
    if not os.path.isfile(path):
        return None
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read: {error}") from error
    return config if isinstance(config, dict) else None


def _check_quantization(config: Mapping[str, Any], origin: str) -> None:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return
    block = quantization.get("weight_block_size")
    if block not in (None, [QUANT_BLOCK, QUANT_BLOCK]):
        raise InvalidInputError(
            f"{origin} has FP8 blocks of {block}, and {QUANT_BLOCK}×{QUANT_BLOCK} is what the backends take"
        )
    if quantization.get("activation_scheme", "dynamic") != "dynamic":
        raise InvalidInputError(
            f"{origin} has activation_scheme={quantization['activation_scheme']!r}, and the backends quantise "
            "activations dynamically"
        )
    groups = quantization.get("config_groups")  # of compressed-tensors
    for group in groups.values() if isinstance(groups, dict) else ():
        activations = group.get("input_activations") if isinstance(group, dict) else None
        if isinstance(activations, dict) and not activations.get("dynamic", False):
            raise InvalidInputError(
                f"{origin} has input_activations with dynamic={activations.get('dynamic', False)!r}, and the backends "
                "quantise activations dynamically"
            )


def _check_agreement(tensors: Mapping[str, Tensor], described: ConfiguredLayer, part: Part, origin: str) -> None:
    E, K, n = tensors["down"].shape
    n = 2 * n if tensors["down"].dtype == torch.uint8 else n  # two codes of MXFP4 in a byte
    read = {"E": E, "K": K, "N": n * part.size}
    expected = {"E": described.E, "K": described.K, "N": described.N}
    if read != expected:
        raise InvalidInputError(f"{origin} has experts of {read}, and its config.json describes {expected}")
