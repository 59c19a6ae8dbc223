"""Model folders as the hosts write them, transformers and segmentation_models_pytorch: their `config.json` read and written.

A folder from elsewhere is a stranger's too: its configuration may not bring code along, nor have any fetched.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import warnings
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
from ...errors import SourceError, UntrustedFileError, UpswapError, UpswapWarning
from ...nn.state_dicts import upsamplers_in
from ...shown import listed
from ...surgery.apply import unpatched_on_error
from ...surgery.replay import Within
from ...surgery.rewritten_class import original_class
from ..safety.memory_limit import Budget
from ..safety.time_limit import loading_within_bounds
from ..state_dict import assign
from . import description
from . import pt as pickled
from . import safetensors as portable
from .host_class import patch_as_kept, patching, undo_without_weights

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

# What the mixin of huggingface_hub adds to the options that an SMP model was made with.
_SMP_CLASS = "_model_class"

_LFS = b"version https://git-lfs"

# What the libraries raise where they would have fetched something, in `_apart`.
_OFFLINE = ("OfflineModeIsEnabled", "LocalEntryNotFoundError")

_BUILD_IT = "build the model in Python and pass it: upswap.patch(model), or upswap.load(folder, model)"

# No setting of a model of images is larger, unless a tensor is. transformers expands some in plain Python: a dict of labels.
_LARGEST_NUMBER = 10**5


def open_folder(folder: Path, like: nn.Module | None = None) -> nn.Module:
    """The model in a folder, with its weights, as the host's own `from_pretrained` gives it; patched where it was.

    Weights that the folder does not have, or has too many of, are named in an `UpswapWarning`. `like` is a model of the
    caller's own, of whose class and configuration it then is; of SMP it is that model itself.

    Raises:
        SourceError: the folder is not one that transformers or SMP wrote, or they cannot load it; or it has upsamplers, and
            does not say how the model was patched.
        UntrustedFileError: its configuration asks for code or files from elsewhere.
        PlanError: its plan does not fit the model.
    """
    model, left = open_host(folder, like)
    if left:
        raise SourceError(
            f"{folder} has the weights of upsamplers at {listed(upsamplers_in(left))}, and its {CONFIG} does not say how the "
            f"model was patched. With the options it was patched with: upswap convert hf:{folder} --weights {folder} (in "
            f"Python: upswap.convert({f'hf:{folder}'!r}, weights={str(folder)!r}))"
        )
    return model


def open_host(folder: Path, like: nn.Module | None = None) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """As `open_folder`, with the weights of upsamplers of which the folder has no plan; the model is then the original."""
    config = _read_config(folder)
    with loading_within_bounds(folder) if like is None else contextlib.nullcontext():
        return _open_smp(folder, config, like) if _SMP_CLASS in config else _open_transformers(folder, config, like)


def has_plan(folder: Path) -> bool:
    """Whether the host's configuration there has the plan of a patched model."""
    return has_config(folder) and host_config.kept_in(_read_config(folder)) is not None


def state_dict_in(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a folder of a host's, by the names that the model has for them; those of upsamplers among them."""
    if _SMP_CLASS in _read_config(folder):
        return read_weights(folder)
    model, left = open_host(folder)
    return {**model.state_dict(), **left}


def _open_smp(
    folder: Path, config: dict[str, Any], like: nn.Module | None
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    tensors = read_weights(folder)
    budget = Budget(tensors, str(folder))
    plan = host_config.kept_in(config)
    left: dict[str, torch.Tensor] = {}
    building, patched, running = _bounds(budget, like)
    with unpatched_on_error(*() if like is None else (like,)):
        with building():
            model = _build_smp(folder, config, tensors) if like is None else like
            if not upsamplers_in(tensors):
                if plan is not None:
                    _warn(
                        f"{folder} has the plan of a patched model, and no weights of upsamplers: taken for the original"
                    )
            elif plan is not None:
                patch_as_kept(model, budget, patched, running, plan)
            else:
                known = model.state_dict()
                paths = tuple(f"{path}." for path in upsamplers_in(tensors))
                left = {name: value for name, value in tensors.items() if name not in known and name.startswith(paths)}
        kept = {name: value for name, value in tensors.items() if name not in left}
        assign(model, kept, folder, keep_dtype=like is not None)
    return model.eval(), left


def _bounds(budget: Budget, like: nn.Module | None) -> tuple[Within, Within, Within]:
    """What a model is built in, patched, and run.

    What the caller has may take what it takes; what a plan patches onto it is the folder's, as all of it is without one.
    """
    unbound: Within = contextlib.nullcontext
    return (budget.building, unbound, budget.running) if like is None else (unbound, budget.building, unbound)


def build_from_config(folder: Path, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The architecture that a folder's `config.json` describes, which has the weights `tensors`, but without them.

    Raises as `open_folder`.
    """
    config = _read_config(folder)
    if _SMP_CLASS in config:
        return _build_smp(folder, config, tensors)
    with _apart(folder):
        spec, cls, settings = _transformers_class(folder, config, tensors)
        return call(spec, cls, settings)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in the weight files that hosts write to a folder: one or several, `.safetensors` or `.bin`."""
    for name in (WEIGHTS, "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_tensors(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts: dict[str, torch.Tensor] = {}
            for shard in _shards(index):
                parts |= read_tensors(shard)
            return parts
    raise SourceError(f"{folder} has a {CONFIG} but no weights: there is no {WEIGHTS} in it")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in one weight file; `SourceError` says what it holds instead."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(_LFS))
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    if head == _LFS:
        raise SourceError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
    if path.suffix == ".safetensors":
        tensors, header = portable.read(path)
        return description.all_names(tensors, header, path)
    contents = pickled.read(path, ())
    if "" not in contents.weights:
        contents.nothing()  # which tells what is refused
        raise SourceError(f"{path} holds no state dict, but a {type(contents.found).__name__}")
    return contents.state_dict("")


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
        return json.dumps({**_smp_options(model), _SMP_CLASS: name}, indent=2, sort_keys=True)
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
        with _apart(), torch.device("meta"):
            return cast(nn.Module, cls(cls.config_class.from_dict(json.loads(config))))
    except Exception:  # noqa: BLE001 - whatever a constructor raises, the configuration is not enough for it
        return None


def _top(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _smp_options(model: nn.Module) -> dict[str, Any]:
    options = {key: value for key, value in getattr(model, "_hub_mixin_config", {}).items() if key[:1] != "_"}
    return {**options, "encoder_weights": None}  # the folder's own weights are loaded, no others before them


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise SourceError(
            f"there is no folder {folder}. A model on the Hugging Face hub is fetched first: "
            f"hf download {folder} --local-dir my_model, then hf:my_model"
        )
    if not has_config(folder):
        raise SourceError(f"{folder} is not a model folder of transformers or SMP: there is no {CONFIG} in it")
    return _read_json(folder / CONFIG)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        pytree.tree_leaves(found)  # not nested too deep to be looked through
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path} is not what it is named for: it holds a {type(found).__name__}")
    return found


def _build_smp(folder: Path, config: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    options = {key: value for key, value in config.items() if key[:1] != "_" and value is not None}
    options.pop("encoder_weights", None)  # the folder has weights
    spec = Spec("smp", str(config[_SMP_CLASS]), options)
    for key, value in _entries(options):
        # Options of a `tu-` encoder go on to timm, which takes paths and repositories.
        if (key in DOWNLOADS and value) or (isinstance(value, str) and re.search(r"[:/\\]", value)):
            raise _elsewhere(folder, key, value)
    Budget(tensors, str(folder / CONFIG)).check_numbers(options)
    return build(spec)


def _open_transformers(
    folder: Path, config: dict[str, Any], like: nn.Module | None
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    tensors = read_weights(folder)
    found: dict[str, Any] = {}
    budget = Budget(tensors, str(folder))
    building, patched, running = _bounds(budget, like)
    with _apart(folder), building():
        spec, cls, settings = (
            _transformers_class(folder, config, tensors) if like is None else _like(folder, config, like)
        )
        settings.name_or_path = str(folder)
        parts: list[nn.Module] = []

        def make() -> Any:
            # With the tensors instead of the folder: in a folder transformers also looks for adapters, which lead to other
            # folders, and for forms of weights that are pickles.
            model, info = patching(cls, budget, patched, running, patched=parts).from_pretrained(
                None, config=settings, state_dict=tensors, torch_dtype="auto", output_loading_info=True
            )
            found.update(info)
            return model

        try:
            model: Any = call(spec, make)
        except SourceError as error:
            if isinstance(error.__cause__, UpswapError):  # of the plan
                raise error.__cause__ from None
            raise
    missing, unexpected = found.get("missing_keys", ()), sorted(found.get("unexpected_keys", ()))
    if len(unexpected) == len(tensors):
        raise SourceError(f"{folder} does not hold the weights of a {cls.__name__}: none is of that model")
    missing = sorted(set(missing) - undo_without_weights(model, parts, missing, folder))
    if missing:
        # No error: published checkpoints lack weights that their model does not use.
        _warn(f"{folder} does not hold {listed(missing)} of a {cls.__name__}; random now, as transformers makes them")
    spare = {name: tensors[name] for name in unexpected if name in tensors}
    paths = tuple(f"{path}." for path in upsamplers_in(spare))
    left = {name: tensor for name, tensor in spare.items() if name.startswith(paths)}
    others = [name for name in unexpected if name not in left]
    if others:
        _warn(f"{folder} holds weights that are of no part of a {cls.__name__} and are left out: {listed(others)}")
    return cast(nn.Module, model), left


def _warn(text: str) -> None:
    warnings.warn(text, UpswapWarning, stacklevel=5)


@contextlib.contextmanager
def _apart(folder: Path = Path()) -> Iterator[None]:
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


def _shards(index: Path) -> list[Path]:
    """The files that an index of weights lists; they may only be beside it."""
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise SourceError(f"{index} is not an index of weights: it has no weight_map")
    files = sorted(set(names.values()))
    outside = next((name for name in files if name != Path(name).name or "\\" in name), None)
    if outside is not None:
        raise UntrustedFileError(f"{index} names a file outside its folder: {outside[:80]!r}")
    missing = next((name for name in files if not (index.parent / name).is_file()), None)
    if missing is not None:
        raise SourceError(f"{index.parent} is not whole: there is no {missing} in it")
    return [index.with_name(name) for name in files]


def _transformers_class(
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
    return spec, cls, settings


def _like(folder: Path, config: dict[str, Any], like: nn.Module) -> tuple[Spec, Any, Any]:
    """As `_transformers_class`, of a model that the caller has: of the folder's configuration the plan alone is read."""
    cls: Any = original_class(like)
    if not hasattr(cls, "from_pretrained") or not hasattr(like, "config"):
        raise SourceError(f"{folder} holds a model of transformers, and a {cls.__name__} is none")
    settings = host_config.without_plan(copy.deepcopy(like.config))
    plan = host_config.kept_in(config)
    if plan is not None:
        host_config.put(settings, plan)
    return Spec("hf", str(folder), {}), cls, settings


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
