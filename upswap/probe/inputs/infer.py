"""Example inputs for a model that came with none: what its library, its configuration and its forward say it takes.

A recogniser reads a model and gives a `Recipe`, or None where it does not know the kind of model; the first that does is
followed. None of them runs the model or imports its library. A recipe is a list of image sizes and what to make at each, most
likely first; whoever wants inputs tries them until the model runs (`probe.first_that_runs`).
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ...errors import InputError
from .inputs import Inputs

Size = tuple[int, int]

#: Sides tried, in pixels, until the model runs, the cheapest that mostly do before the others: cost grows with the area, and
#: smaller images leave too little of the deeper maps. Multiples of 32 suit every stride up to 32; 224, 256, 384, 448, 512 and
#: 518 are the sides that fixed-size transformers are built for.
SIDES = (64, 128, 32, 224, 256, 384, 448, 512, 518)

#: The short side of images for models that resize their images themselves, and so decide their size by the long one.
SHORT_SIDE = 32

#: Words in a made-up text; texts shorter than this are cut to what the model takes.
WORDS = 8

_HOW = "pass example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or (args, kwargs)"


class Recipe(NamedTuple):
    """How to make inputs: `make(height, width)` for each of `sizes`, in the order to be tried.

    `declared` are those of the sizes that the model's own settings name.
    """

    sizes: Sequence[Size]
    make: Callable[[int, int], Iterator[Inputs]]
    declared: Collection[Size] = ()


class Candidate(NamedTuple):
    """Inputs to try. Those of one `choice` differ in their size alone; `declared` says that the model names that size."""

    inputs: Inputs
    choice: int = 0
    declared: bool = True


def candidates(model: nn.Module, size: int | Size | None = None) -> Iterator[Candidate]:
    """Inferred inputs to try in order, at the size given or at each that the model may take.

    The values are random and the same each time; no global random state is used. Raises `InputError` where nothing is
    known of what the model takes; it says what its forward needs.
    """
    if size is not None:
        size = (size, size) if isinstance(size, int) else (size[0], size[1])
        if min(size) < 1:
            raise InputError(f"an image of {size[0]}x{size[1]} pixels has no area; pass a positive size")
    recipe = next(filter(None, (recognise(model) for recognise in RECOGNISERS)), None)
    if recipe is None:
        raise InputError(
            f"{type(model).__name__} has no convolution to read the number of input channels from, and upswap does not know its "
            f"library; its forward takes {_signature(model)}: {_HOW}"
        )
    sizes = recipe.sizes if size is None else [size]
    for choice in itertools.count():
        # The likeliest at every size first: what has too few channels fails at once, an image too small only in the depths.
        more = False
        for height, width in sizes:
            for inputs in itertools.islice(recipe.make(height, width), choice, choice + 1):
                more = True
                yield Candidate(inputs, choice, (height, width) in recipe.declared)
        if not more:
            return


def example_inputs_for(model: nn.Module, size: int | Size | None = None) -> Inputs:
    """The likeliest inputs at one size: `(height, width)` in pixels, an int means a square; the smallest by default.

    Raises `InputError` as `candidates` does.
    """
    return next(candidates(model, size)).inputs


# Recognisers ----------------------------------------------------------------------------------------------------------------


def torchvision_detection(model: nn.Module) -> Recipe | None:
    """Faster, Mask and Keypoint R-CNN, RetinaNet, FCOS, SSD: a list of images (C, H, W), which the model resizes itself.

    It makes an image's short side `min_size` unless that would make its long side exceed `max_size`: a narrow image as
    long as that is left as it is, and is small. A wider one then gives larger maps, a longer one would not.
    """
    transform = getattr(model, "transform", None)
    if not is_of(model, "torchvision.models.detection") or transform is None:
        return None
    longest = int(getattr(transform, "max_size", 0) or SHORT_SIDE)
    size = (longest, min(SHORT_SIDE, longest))
    maker = _Maker(model)
    channels = len(getattr(transform, "image_mean", ())) or 3
    return Recipe([size], lambda height, width: iter([Inputs(([maker.image(channels, height, width)],), {})]))


def transformers_model(model: nn.Module) -> Recipe | None:
    """Any transformers model: keyword arguments, sized by its configuration, as its forward's signature asks for them."""
    config = getattr(model, "config", None)
    if not is_of(model, "transformers") or not hasattr(config, "model_type"):
        return None
    maker = _Maker(model)
    required, optional = _parameters(model)
    main = getattr(model, "main_input_name", None)
    main = main if isinstance(main, str) else required[0] if required else "pixel_values"
    channels = _setting(config, "num_channels", "in_channels", "in_chans") or next(iter(_channels(model)), 3)
    frames = _setting(config, "num_frames", "frames_per_clip") or 2
    plain, choices = _argument_choices(required, optional, main)
    unknown = [name for name in plain if not _TRANSFORMERS.fullmatch(name)]

    def make(height: int, width: int) -> Iterator[Inputs]:
        if unknown:
            raise _needs(model, plain, unknown)
        # SegGPT sets its image below its prompt, and sizes itself for both.
        image = (channels, height // 2 if "prompt_pixel_values" in plain else height, width)
        tries = [(1, *image)] * len(choices), [(1, frames, *image)]  # a video, or a pair of images to be matched
        for shapes in tries if main != "pixel_values_videos" else tries[::-1]:
            for shape, choice in zip(shapes, choices, strict=False):
                yield Inputs((), {name: _transformers_argument(maker, config, name, shape) for name in choice})

    return Recipe(_sizes(model), make, _declared_sizes(model))


def _argument_choices(
    required: Sequence[str], optional: Sequence[str], main: str
) -> tuple[list[str], list[tuple[str, ...]]]:
    """The arguments a forward has to have, and the sets of arguments to try it with, in order."""
    declared = [*required, *optional]
    pixels = [name for name in _PIXELS if name in declared][:1]
    text = [name for name in ("input_ids", "attention_mask") if name in declared]
    plain = list(required) or pixels or [main]
    names = [[*plain, *pixels], plain, [*plain, *pixels, *(name for name in declared if _EXTRA.fullmatch(name))]]
    if "input_ids" in text:
        names = [[*plain, *pixels, *text], *names, [*plain, *text]]
    return plain, list(dict.fromkeys(tuple(dict.fromkeys(choice)) for choice in names))


def _transformers_argument(maker: _Maker, config: Any, name: str, image: tuple[int, ...]) -> Any:
    """The argument of that name, for images of the shape `image`."""
    words = min(WORDS, *(_setting(config, name) or WORDS for name in ("max_position_embeddings", "max_text_len")))
    vocabulary = _setting(config, "vocab_size", "text_encoder_vocab_size") or 2
    if name in ("pixel_values", "pixel_values_videos", "prompt_pixel_values", "prompt_masks", "inputs"):
        return maker.image(*image)
    if name == "prompt_depth":
        return maker.image(1, 1, *image[-2:])
    if name == "task_inputs":
        return maker.integers(vocabulary, 1, _setting(config, "task_seq_len") or WORDS)
    if name.endswith("input_ids"):
        return maker.integers(vocabulary, 1, words)
    if name == "pixel_mask":
        return maker.ones(1, *image[-2:])
    if name == "classes_structure":
        return maker.ones(1)
    return maker.ones(1, words)


_PIXELS: tuple[str, ...] = ("pixel_values", "pixel_values_videos")
_TRANSFORMERS = re.compile(
    r"pixel_values(_videos)?|prompt_pixel_values|prompt_masks|inputs|prompt_depth|task_inputs|pixel_mask|classes_structure"
    r"|(\w+_)?(input_ids|attention_mask)"
)
#: Optional arguments without which some models do not run.
_EXTRA = re.compile(r"prompt_depth|pixel_mask|attention_mask|(\w+_)?input_ids")


def image_model(model: nn.Module) -> Recipe | None:
    """Anything else with a convolution, or with a timm configuration: a batch of one image (or volume, or signal).

    Its channels are those of the first convolution registered, which nearly always is the first to run; then those of timm's
    configuration, and 3 and 1, which images have. Further required arguments of the forward are made where their names leave no
    doubt: second images and time steps.
    """
    dimensions = next((n for n in _CONVOLUTIONS if _channels(model, n)), None)
    if dimensions is None:
        return None
    maker = _Maker(model)
    required, optional = _parameters(model, positional=True)
    names = required or optional[:1] or ["x"]
    unknown = [name for name in names[1:] if not (_IMAGE.fullmatch(name) or _STEP.fullmatch(name))]
    keyword_only = _keyword_only(model)
    counts = _channels(model, dimensions)
    images = len(names) - sum(map(bool, map(_STEP.fullmatch, names[1:])))
    counts += [count // images for count in counts if images > 1 and count % images == 0]  # stacked by the model
    if dimensions == 2:  # a convolution may be handed what the model makes of the image: gradients, luminance
        counts += [count for count in (3, 1) if count not in counts]

    def make(height: int, width: int) -> Iterator[Inputs]:
        if unknown:
            raise _needs(model, names, unknown)
        grid = (min(height, width), height, width)[-dimensions:]
        for channels in counts:
            values = {
                name: maker.steps(1) if _STEP.fullmatch(name) and name != names[0] else maker.image(1, channels, *grid)
                for name in names
            }
            args = tuple(value for name, value in values.items() if name not in keyword_only)
            yield Inputs(args, {name: value for name, value in values.items() if name in keyword_only})

    sizes, declared = _sizes(model), _declared_sizes(model)
    if dimensions == 3:  # a cube costs its side more than a square does
        sizes = [(height // 2, width // 2) for height, width in sizes]
    return Recipe(sizes, make, declared)


_CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d, 1: nn.Conv1d}
_IMAGE = re.compile(r"(x|y|im|img|image|images|imgs|input|inputs|frame|left|right|moving|fixed|source|target)_?\d*")
_STEP = re.compile(r"t|ts|time|times|timestep|timesteps|time_step|time_steps")

#: In order: the first that knows a model's kind is followed.
RECOGNISERS: tuple[Callable[[nn.Module], Recipe | None], ...] = (torchvision_detection, transformers_model, image_model)


# What recognisers read from a model -----------------------------------------------------------------------------------------


def is_of(model: nn.Module, package: str) -> bool:
    """Whether the model's class, or one it derives from, is defined in a package."""
    return any(cls.__module__ == package or cls.__module__.startswith(f"{package}.") for cls in type(model).__mro__)


def _parameters(model: nn.Module, *, positional: bool = False) -> tuple[list[str], list[str]]:
    """The names of the forward's required and optional parameters; with `positional`, no optional keyword-only ones."""
    required, optional = [], []
    for name, parameter in _forward_of(model).items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            required.append(name)
        elif not (positional and parameter.kind is parameter.KEYWORD_ONLY):
            optional.append(name)
    return required, optional


def _keyword_only(model: nn.Module) -> set[str]:
    return {name for name, parameter in _forward_of(model).items() if parameter.kind is parameter.KEYWORD_ONLY}


def _signature(model: nn.Module) -> str:
    """The forward's parameters as they are written in a call, without their annotations."""
    return f"({', '.join(str(p.replace(annotation=p.empty)) for p in _forward_of(model).values())})"


def _forward_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of the forward; none where Python cannot tell (a compiled function)."""
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}


def _needs(model: nn.Module, names: Sequence[str], unknown: Sequence[str]) -> InputError:
    example = ", ".join(f"{name!r}: ..." for name in names)
    return InputError(
        f"the forward of {type(model).__name__} needs {', '.join(names)}, and upswap cannot make up {', '.join(unknown)}; "
        f"pass example_inputs={{{example}}} (or a tuple of positional arguments, or (args, kwargs))"
    )


def _channels(model: nn.Module, dimensions: int = 2) -> list[int]:
    """The counts of input channels to try, small ones first where several are known; none where nothing tells them."""
    kind = _CONVOLUTIONS[dimensions]
    first, *others = dict.fromkeys(m.in_channels for m in model.modules() if isinstance(m, kind)) or [0]
    timm = [shape[0] for shape in _timm_shapes(model) if len(shape) == dimensions + 1]
    counts = dict.fromkeys([first, *timm, *(count for count in others if count in (1, 3, 4))])
    # A stem may be given coordinates beside the image: two, or three with the distance from the middle.
    counts |= dict.fromkeys(first - more for more in (dimensions, dimensions + 1) if 0 < first - more <= 4)
    return sorted(filter(None, counts), key=lambda count: count > 16)


def _sizes(model: nn.Module) -> list[Size]:
    """The sizes to try, in order: `SIDES`, those the model's own settings name, and whole numbers of its patches."""
    sizes = {(side, side) for side in SIDES} | _declared_sizes(model)
    for value in _settings(model, "patch_size"):
        patch = max(_as_size(value) or (1, 1))
        if SIDES[0] % patch:
            sizes.add((patch * -(-SIDES[0] // patch),) * 2)
        if 128 < patch <= 512:  # a tile, of an image that is cut at several scales (Depth Pro)
            sizes.add((4 * patch,) * 2)
    return sorted(sizes, key=lambda size: (abs(math.log(size[0] * size[1] / SIDES[0] ** 2)), size))


def _declared_sizes(model: nn.Module) -> set[Size]:
    """The sizes of images that the model's own settings name."""
    declared = map(_as_size, (*_settings(model, "image_size", "img_size"), *_timm_shapes(model)))
    return {size for size in declared if size and min(size) >= 8 and max(size) <= 2048}


def _as_size(value: Any) -> Size | None:
    """(height, width) from an int, a pair, a shape (C, H, W) or a dict of height and width; None for anything else."""
    if isinstance(value, Mapping) and {"height", "width"} <= set(value):
        value = (value["height"], value["width"])
    if type(value) is int:
        return value, value
    if isinstance(value, tuple | list) and len(value) in (2, 3) and all(type(side) is int for side in value):
        return value[-2], value[-1]
    return None


def _settings(model: nn.Module, *names: str) -> Iterator[Any]:
    """The values that the model's configuration and its modules give to any of some names."""
    for holder in (*_configs(getattr(model, "config", None)), *model.modules()):
        own = vars(holder)
        yield from (own[name] for name in names if name in own)


def _timm_shapes(model: nn.Module) -> Iterator[Sequence[int]]:
    """The (channels, height, width) that timm's configurations in a model name."""
    for module in model.modules():
        config = vars(module).get("pretrained_cfg") or vars(module).get("default_cfg")
        if isinstance(config, Mapping) and isinstance(config.get("input_size"), tuple | list):
            yield config["input_size"]


def _setting(config: Any, *names: str) -> int:
    """The first whole number that a configuration or one nested in it gives to one of some names; 0 where there is none."""
    for inner in _configs(config):
        for name in names:
            value = getattr(inner, name, None)
            if type(value) is int and value > 0:
                return value
    return 0


def _configs(config: Any) -> Iterator[Any]:
    """A transformers configuration and those nested in it, outer ones first."""
    queue = [config] if hasattr(config, "model_type") else []
    for inner in queue:
        yield inner
        queue += [value for value in vars(inner).values() if hasattr(value, "model_type")]


class _Maker:
    """Makes tensors for a model: on its device, in its dtype, the same values each time."""

    def __init__(self, model: nn.Module) -> None:
        kinds = tuple(_CONVOLUTIONS.values())
        weights = (m.weight for m in model.modules() if isinstance(m, kinds))
        floats = (p for p in model.parameters() if p.is_floating_point())
        weight = next(weights, None)
        weight = next(floats, torch.empty(0)) if weight is None else weight
        self.device, self.dtype = weight.device, weight.dtype
        self._generator = torch.Generator().manual_seed(0)

    def image(self, *shape: int) -> torch.Tensor:
        """Normal values."""
        return torch.randn(shape, generator=self._generator).to(device=self.device, dtype=self.dtype)

    def integers(self, limit: int, *shape: int) -> torch.Tensor:
        """Whole numbers from 1 to below `limit`: no padding, which 0 often stands for."""
        return torch.randint(min(1, limit - 1), limit, shape, generator=self._generator).to(self.device)

    def ones(self, *shape: int) -> torch.Tensor:
        """Ones, as whole numbers."""
        return torch.ones(shape, dtype=torch.int64, device=self.device)

    def steps(self, batch: int) -> torch.Tensor:
        """Time steps of a diffusion model."""
        return self.ones(batch)
