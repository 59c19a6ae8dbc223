"""What the `config.json` of transformers and segmentation_models_pytorch says of an architecture: read, checked and written.

A configuration may not bring code along, nor have any fetched.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...architectures import host_config
from ...architectures.libraries import DOWNLOADS, build, call
from ...architectures.packages import first_line, import_for
from ...architectures.spec import Spec
from ...errors import SourceError, UntrustedFileError
from ..safety.memory_limit import Budget

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

# What the mixin of huggingface_hub adds to the options that an SMP model was made with.
SMP_CLASS = "_model_class"

# What the libraries raise where they would have fetched something, in `apart`.
_OFFLINE = ("OfflineModeIsEnabled", "LocalEntryNotFoundError")
_BUILD_IT = "build the model in Python and pass it: upswap.patch(model), or upswap.load(folder, model)"

# No setting of a model of images is larger, unless a tensor is. transformers expands some in plain Python: a dict of labels.
_LARGEST_NUMBER = 10**5


def has_plan(folder: Path) -> bool:
    """Whether the host's configuration there has the plan of a patched model."""
    return has_config(folder) and host_config.kept_in(read_config(folder)) is not None


def build_from_config(folder: Path, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The architecture that a folder's `config.json` describes, which has the weights `tensors`, but without them.

    Raises as `open_folder`.
    """
    config = read_config(folder)
    if SMP_CLASS in config:
        return build_smp(folder, config, tensors)
    with apart(folder):
        spec, cls, settings = transformers_class(folder, config, tensors)
        return call(spec, cls, settings)


def has_config(folder: Path) -> bool:
    """Whether a host's configuration is there."""
    return (folder / CONFIG).is_file()


def config_of(model: nn.Module, spec: str | None) -> str | None:
    """What the host's own `save_pretrained` would write to `config.json` for a model, patched or not; None where it is of
    neither host, or is an SMP model that its options do not build (`spec` is the spec that does)."""
    names = [_top(cls) for cls in type(model).__mro__]
    if "transformers" in names:
        config: Any = host_config.without_plan(copy.deepcopy(model.config))  # `upswap.json` has it
        config.architectures = [type(model).__name__]
        config.dtype = str(next((p.dtype for p in model.parameters()), torch.float32)).removeprefix("torch.")
        return str(config.to_json_string())
    if "segmentation_models_pytorch" in names and spec is not None and spec.startswith("smp:"):
        import segmentation_models_pytorch as smp

        known = set(smp.MODEL_ARCHITECTURES_MAPPING.values())
        name = next(cls.__name__ for cls in type(model).__mro__ if cls in known)
        return json.dumps({**_smp_options(model), SMP_CLASS: name}, indent=2, sort_keys=True)
    return None


def skeleton(model: nn.Module, config: str) -> nn.Module | None:
    """What transformers builds from `config`, which `config_of` gave for `model`, without memory for weights.

    None for a class that is not transformers' own: a name in a file does not lead to it.
    """
    base = next((cls for cls in type(model).__mro__ if _top(cls) == "transformers"), None)
    # The class of a patched model is one made on the spot, which goes by the name of the original.
    if base is None or (base.__module__, base.__qualname__) != (type(model).__module__, type(model).__qualname__):
        return None
    cls: Any = base
    try:
        with apart(), torch.device("meta"):
            return cast(nn.Module, cls(cls.config_class.from_dict(json.loads(config))))
    except Exception:  # noqa: BLE001 - whatever a constructor raises, the configuration is not enough for it
        return None


def _top(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _smp_options(model: nn.Module) -> dict[str, Any]:
    options = {key: value for key, value in getattr(model, "_hub_mixin_config", {}).items() if key[:1] != "_"}
    return {**options, "encoder_weights": None}  # the folder's own weights are loaded, no others before them


def read_config(folder: Path) -> dict[str, Any]:
    """What the `config.json` in a folder holds, not yet checked; `SourceError` where there is none that can be read."""
    if not folder.is_dir():
        raise SourceError(
            f"there is no folder {folder}. A model on the Hugging Face hub is fetched first: "
            f"hf download {folder} --local-dir my_model, then hf:my_model"
        )
    if not has_config(folder):
        raise SourceError(f"{folder} is not a model folder of transformers or SMP: there is no {CONFIG} in it")
    return read_json(folder / CONFIG)


def read_json(path: Path) -> dict[str, Any]:
    """What a file of JSON holds; `SourceError` unless that is a dict that can be gone through."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        pytree.tree_leaves(found)  # not nested too deep to be looked through
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path} is not what it is named for: it holds a {type(found).__name__}")
    return found


def build_smp(folder: Path, config: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The SMP model that a configuration describes; `UntrustedFileError` where it would fetch something."""
    options = {key: value for key, value in config.items() if key[:1] != "_" and value is not None}
    options.pop("encoder_weights", None)  # the folder has weights
    spec = Spec("smp", str(config[SMP_CLASS]), options)
    for key, value in _entries(options):
        # Options of a `tu-` encoder go on to timm, which takes paths and repositories.
        if (key in DOWNLOADS and value) or (isinstance(value, str) and re.search(r"[:/\\]", value)):
            raise _elsewhere(folder, key, value)
    Budget(tensors, str(folder / CONFIG)).check_numbers(options)
    return build(spec)


@contextlib.contextmanager
def apart(folder: Path = Path()) -> Iterator[None]:
    """Inside, the libraries of Hugging Face fetch nothing, which is an error, and neither log nor draw progress bars.

    `_check_config` refuses what is known to fetch; this is for what is not.
    """
    spec = Spec("hf", str(folder), {})
    logging: Any = import_for("transformers.utils.logging", spec)
    constants: Any = import_for("huggingface_hub.constants", spec)
    outside = constants.HF_HUB_OFFLINE, logging.get_verbosity(), logging.is_progress_bar_enabled()
    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    except SourceError as error:
        cause: Any = error.__cause__
        seen: set[int] = set()  # causes can go round in a circle
        while cause is not None and type(cause).__name__ not in _OFFLINE and id(cause) not in seen:
            seen.add(id(cause))
            cause = cause.__cause__ or cause.__context__
        if cause is None or id(cause) in seen:
            raise
        raise UntrustedFileError(
            f"{folder / CONFIG} asks for files from elsewhere: {first_line(cause)}. {_BUILD_IT}"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = outside[0]
        logging.set_verbosity(outside[1])
        if outside[2]:
            logging.enable_progress_bar()


def transformers_class(
    folder: Path, config: dict[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[Spec, Any, Any]:
    """How messages name the folder, the class it names, and its configuration as that class takes it."""
    spec = Spec("hf", str(folder), {})
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        if "architecture" in config:
            raise SourceError(
                f"{folder} is a model folder of timm: name its architecture, "
                f"timm:{config['architecture']} --weights {folder / WEIGHTS}"
            )
        raise SourceError(f"{folder / CONFIG} names no architecture of transformers or SMP")
    _check_config(folder, config)
    whole = [number for number in pytree.tree_leaves(config) if isinstance(number, int)]
    Budget(tensors, str(folder / CONFIG)).check_numbers(whole, _LARGEST_NUMBER)
    transformers = import_for("transformers", spec)
    try:
        found = getattr(transformers, names[0], None)
    except (ImportError, RuntimeError) as error:  # imported now, by name
        raise SourceError(f"{spec} needs {names[0]} of transformers, whose import fails: {error}") from error
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise SourceError(
            f"{folder} holds a {names[0]}, which transformers {transformers.__version__}, installed here, does not have. "
            f"For a class of your own: {_BUILD_IT}"
        )
    cls: Any = found
    try:
        settings = cls.config_class.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # a library's own reading of a file; whatever it raises is about the file
        raise SourceError(f"{folder / CONFIG} cannot be read by {names[0]}: {first_line(error)}") from error
    if json.dumps(read_config(folder)) != json.dumps(config):  # transformers has read it once more, unchecked
        raise SourceError(f"{folder / CONFIG} was written to while it was read; load it again when that is done")
    return spec, cls, settings


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a configuration that brings code along, has something fetched, or is not of a plain model.

    transformers downloads an attention implementation that is named like a repository, and runs it; likewise the
    configuration and weights of a named backbone. What it looks up for `configuration_files` is another configuration.
    """
    for key, value in _entries(config):
        if _is_from_elsewhere(key, value):
            raise _elsewhere(folder, key, value)
        if key == "quantization_config" and value:
            raise SourceError(
                f"{folder} holds a quantised model, whose weights cannot be trained on; name the original"
            )


def _is_from_elsewhere(key: str, value: Any) -> bool:
    if key in ("auto_map", "use_pretrained_backbone", "configuration_files"):
        return bool(value)
    if key.endswith("_implementation"):
        return not re.fullmatch(r"\w+", str(value))
    if key in ("backbone", "architecture"):
        return isinstance(value, str) and re.search(r"[:/\\]", value) is not None
    return key == "model_args" and any(name in DOWNLOADS and bool(given) for name, given in _entries(value))


def _elsewhere(folder: Path, key: str, value: Any) -> UntrustedFileError:
    return UntrustedFileError(
        f"{folder / CONFIG} asks for code or files from elsewhere: {key}: {str(value)[:80]}. If you trust it: {_BUILD_IT}"
    )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of every dict inside `value`."""
    queue = [value]
    while queue:
        value = queue.pop()
        if isinstance(value, dict):
            yield from ((str(key), item) for key, item in value.items())
        queue += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
