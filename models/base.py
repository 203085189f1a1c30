"""A network the tool knows by name: how to build it, what to feed it, and where its weights come from."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from intarsia.ir import registry
from intarsia.ir.errors import UsageError
from intarsia.models.sampler import Conditioning, FlowMatchEuler

MODELS: dict[str, str] = {
    "cogvideox-5b": "intarsia.models.cogvideox:cogvideox_5b",
    "cogvideox-mini": "intarsia.models.cogvideox:cogvideox_mini",
    "cogvideox1.5-5b": "intarsia.models.cogvideox:cogvideox15_5b",
    "cogvideox1.5-mini": "intarsia.models.cogvideox:cogvideox15_mini",
    "efficientnet-lite0": "intarsia.models.efficientnet:efficientnet_lite0",
    "hunyuanvideo": "intarsia.models.hunyuanvideo:hunyuanvideo",
    "hunyuanvideo-mini": "intarsia.models.hunyuanvideo:hunyuanvideo_mini",
    "inceptionv3": "intarsia.models.inception:inceptionv3",
    "ltx-2b": "intarsia.models.ltx:ltx_2b",
    "ltx-mini": "intarsia.models.ltx:ltx_mini",
    "resnet18": "intarsia.models.resnet:resnet18",
    "resnet20-cifar10": "intarsia.models.resnet20_cifar10:resnet20_cifar10",
    "resnet50": "intarsia.models.resnet:resnet50",
    "wan-mini": "intarsia.models.wan:wan_mini",
    "wan2.1-t2v-1.3b": "intarsia.models.wan:wan21_t2v_1_3b",
    "wan2.1-t2v-14b": "intarsia.models.wan:wan21_t2v_14b",
    "wan2.1-t2v-14b-720p": "intarsia.models.wan:wan21_t2v_14b_720p",
}
ENTRY_POINTS = "intarsia.models"


@dataclass(frozen=True)
class Model:
    """A network by name.

    `build` gives the module in eval mode with random weights, `inputs` example inputs by the names of the forward's
    arguments; both work on the current default device, so that `torch.device("meta")` costs no memory.
    """

    name: str
    summary: str
    source: str
    dtype: torch.dtype
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    outputs: tuple[str, ...]
    # Arguments of the forward that are no tensors, the same in every call.
    static: Mapping[str, object] = field(default_factory=dict)
    # Input -> axis -> name of the size, for the axes that may vary.
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    # Trained weights that ship with the package: a safetensors file.
    weights: Path | None = None
    # Trained weights, by name, that another package holds; raises MissingEnvironment where it is not installed.
    packaged: Callable[[], Mapping[str, Tensor]] | None = None
    # What names in weight files start with that only training uses: such tensors are left out.
    training_only: tuple[str, ...] = ()
    sampler: FlowMatchEuler | None = None
    # Text the network understands, and what turns it into conditioning; absent where the text encoder is not ours.
    prompts: tuple[str, ...] = ()
    condition: Callable[[Sequence[str]], Conditioning] | None = None


class UnknownModel(UsageError):
    """A name that no model and no entry point has."""


class WeightsNotFound(UsageError):
    """A path that holds no safetensors file."""


class WeightsUnreadable(UsageError):
    """A file that is not safetensors, or is cut short."""


class WeightsMismatch(UsageError):
    """Weights whose names or shapes are not the network's."""


def names() -> tuple[str, ...]:
    """Every known name: ours first, then those of installed entry points, sorted."""
    return registry.known_names(MODELS, group=ENTRY_POINTS)


def find(name: str) -> Model:
    """The model called `name`; raises UnknownModel with the nearest name and all known ones."""
    if name not in names():
        raise UnknownModel(registry.unknown("model", name, names()))
    return cast(Model, registry.find(name, MODELS, group=ENTRY_POINTS, kind="model")())


def load(
    model: Model,
    *,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The module with weights, frozen, in eval mode, its parameters in `dtype` (the model's own unless given).

    `weights` is a safetensors file or a folder of them (one, several, sharded with an index, or a diffusers folder with
    `transformer/` in it); without it, the shipped weights, or those of a package, or random ones of a fixed seed where
    there are none. No more than one tensor of a file is held beside the module. Raises WeightsNotFound,
    WeightsUnreadable, WeightsMismatch, or MissingEnvironment where the package is not installed.
    """
    dtype = dtype or model.dtype
    path = weights or model.weights
    if path is None and model.packaged is None:
        return _random(model, device, dtype)
    files = weight_files(path) if path else []
    packaged = model.packaged() if model.packaged and not path else {}
    with _parameters_on_meta():
        module = model.build()
    shapes = {**dict(_shapes(files)), **{key: tuple(value.shape) for key, value in packaged.items()}}
    _check(model, str(path or "of the package"), module, shapes)
    kept = _kept_in_f32(module, dtype)
    for name, buffer in list(module.named_buffers()):
        _assign(module, name, buffer.to(device))
    parameters = {name for name, _ in module.named_parameters()}
    for name, tensor in chain(_tensors(files), packaged.items()):
        if name.startswith(model.training_only):
            continue
        wanted = torch.float32 if name in kept else dtype
        value = tensor.to(device, wanted if tensor.is_floating_point() else None)
        _assign(module, name, nn.Parameter(value, requires_grad=False) if name in parameters else value)
    return module.eval()


def meta(model: Model) -> nn.Module:
    """The module on the meta device, in the model's dtype: shapes without memory."""
    with torch.device("meta"):
        return model.build()


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same module with its parameters in `dtype`, in place.

    Buffers, and what diffusers declares as kept in f32 (`_keep_in_fp32_modules`), stay as they are.
    """
    kept = _kept_in_f32(module, dtype)
    for name, parameter in module.named_parameters():
        if name not in kept and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return module


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that `path` stands for; raises WeightsNotFound."""
    if path.is_file():
        return [path]
    for folder in (path, path / "transformer"):
        for index in sorted(folder.glob("*.safetensors.index.json")):
            shards = sorted({folder / shard for shard in _weight_map(index).values()})
            absent = [shard.name for shard in shards if not shard.is_file()]
            if absent:
                raise WeightsNotFound(f"{index}: lists {', '.join(absent)}, which the folder does not hold")
            return shards
        files = sorted(folder.glob("*.safetensors"))
        if files:
            return files
    what = "holds no *.safetensors, nor does its transformer/" if path.is_dir() else "does not exist"
    raise WeightsNotFound(f"weights {path}: {what}")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return cast(dict[str, str], json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsUnreadable(f"weights {index}: no index of shards ({error!r})") from error


def _random(model: Model, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        module = model.build()
    return cast_parameters(module, dtype).to(device).requires_grad_(False).eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without memory, and buffers (tables such as RoPE's) with their values."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(cast(Callable[..., None], to_meta))
    try:
        yield
    finally:
        handle.remove()


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, value)


def _kept_in_f32(module: nn.Module, dtype: torch.dtype) -> frozenset[str]:
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if dtype not in (torch.float16, torch.bfloat16):
        return frozenset()
    return frozenset(name for name, _ in module.named_parameters() if kept & set(name.split(".")))


def _check(model: Model, place: str, module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {key: shape for key, shape in shapes.items() if not key.startswith(model.training_only)}
    differing = sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key])
    faults = (
        _listed("missing", sorted(expected.keys() - found.keys())),
        _listed("unexpected", sorted(found.keys() - expected.keys())),
        _listed("mis-shaped", [f"{key} is {found[key]}, not {expected[key]}" for key in differing]),
    )
    if any(faults):
        raise WeightsMismatch(f"weights {place} are not {model.name}'s: {'; '.join(filter(None, faults))}")


def _listed(what: str, keys: Sequence[str]) -> str:
    if not keys:
        return ""
    rest = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{len(keys)} {what}: {', '.join(keys[:3])}{rest}"


def _shapes(files: Sequence[Path]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for file in files:
        with _opened(file) as opened:
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                yield key, tuple(opened.get_slice(key).get_shape())


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with _opened(file) as opened:
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                yield key, opened.get_tensor(key)


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise WeightsUnreadable(f"weights {file}: not a whole safetensors file ({error})") from error
