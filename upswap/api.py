"""The functions a user calls on a model."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from .architectures import host_config
from .errors import InputError, OptionError, UpswapWarning
from .files import checkpoint
from .files.finetuned import give_trained
from .files.formats import upsamplers as alone
from .files.naming import converted_name
from .files.open_source import open_source
from .files.paths import check_target
from .nn.configs import DySampleConfig, UpsamplerConfig, describe
from .plan.plan import Plan
from .probe.inputs.infer import example_inputs_for
from .shown import one_line, tag
from .surgery import apply as rewrite
from .surgery.checking.verification import Report, capture, compare
from .surgery.operation import Operation
from .surgery.options import check_same_options, make_options
from .surgery.planning import check_model, decide
from .surgery.replay import check_plan
from .surgery.wrappers import held, the_patched
from .training.groups import add_to_optimizer, check_can_join

M = TypeVar("M", bound=nn.Module)

Patterns = str | Iterable[str] | None


def patch(
    model: M,
    example_inputs: Any = None,
    *,
    upsampler: str | UpsamplerConfig = "dysample",
    kinds: str | Iterable[str] = ("feature",),
    include: Patterns = None,
    exclude: Patterns = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    plan: Plan | None = None,
    strict: bool = False,
    share_layers: bool = False,
    unguided: str = "dysample",
    inplace: bool = True,
    **options: Any,
) -> M:
    r"""Replace the model's feature upsampling by learned upsamplers, and give the model back.

    The model stays the same object of the same class (as `isinstance` sees it), with every state-dict key it had; new
    keys are added. With `init="match"` dysample computes what the model computed before, until it is trained.

    Args:
        model: any module that runs, or an object that holds one, such as a YOLO of ultralytics; left as it was if anything
            fails.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or `(args, kwargs)`. Left out, a
            batch of one small image is made, with the channels of the model's first convolution.
        upsampler: "dysample", "carafe", "lda_aqu", "fade", "fade-lite", "sapa-b", "freqfusion", one that is registered or in an
            installed package (docs/upsamplers.md); or a
            config such as `upswap.DySampleConfig(style="pl")`.
        kinds: the kinds of resize to replace; `upswap.KINDS` has them all.
        include: patterns over site names, as `upswap.inspect` lists them; only sites that match one are replaced.
        exclude: patterns over site names; sites that match one are kept.
        overrides: options that differ at some sites: `{"decoder.p2": {"groups": 8}, "re:backbone\..*": {"style": "pl"}}`. An
            exact name goes before a pattern; one that matches no site is an error.
        optimizer: one that exists already and holds `model`'s parameters: it gets the upsamplers' too, as a group with its own
            defaults and no weight decay. One made after the patch needs nothing.
        plan: a Plan made before, carried out as it is; the options above are then not read.
        strict: raise where the default is to fall back and say so in the plan.
        share_layers: one upsampler for an `nn.Upsample` that is called at several places; each place gets its own otherwise.
        unguided: the upsampler, with its default options, of sites that have no guide, where `upsampler` takes one: the
            feature that the upsampled map is fused with. `upswap.inspect` says which these are.
        inplace: whether to change `model` or a deep copy of it.
        options: the options of the upsampler; those of dysample are listed below.

    Raises:
        NothingToSwapError: no resize call may be replaced; the message says what there is instead.
        InputError: no example inputs were found that the model runs on.
        FilterError, OptionError: a pattern matches nothing, an option cannot be used.
        PlanError: `plan` does not fit the model; each site that does not is named.

    A model that is patched already is given back as it is, with an `UpswapWarning`.
    """
    host = _held(model)
    if optimizer is not None:
        if not inplace:
            raise OptionError("optimizer= has the parameters of model, and inplace=False patches a copy of it")
        if not rewrite.is_patched(host):
            check_can_join(model, optimizer)
    if host_config.came_without(host) and not rewrite.is_patched(host):
        warnings.warn(
            f"this {type(host).__name__} was loaded without its upsamplers: its config has the plan of a patched model. These "
            "are new ones. For the trained ones, upswap.load(folder); of transformers also, before from_pretrained, "
            "import upswap.integrations.transformers as t; t.enable()",
            UpswapWarning,
            stacklevel=2,
        )
    with rewrite.unpatched_on_error(host):
        if rewrite.is_patched(host):
            count = len(rewrite.plan_of(host).swapped)
            warnings.warn(
                f"this {type(host).__name__} is patched already ({count} upsamplers); nothing was changed. "
                "upswap.unpatch(model) first to patch it in another way.",
                UpswapWarning,
                stacklevel=2,
            )
        elif plan is None:
            asked = make_options(
                upsampler,
                kinds=kinds,
                include=include,
                exclude=exclude,
                overrides=overrides,
                strict=strict,
                share_layers=share_layers,
                unguided=unguided,
                **options,
            )
            operation = Operation(host, example_inputs, asked)
            operation.check_swaps()
            model = model if inplace else copy.deepcopy(model)
            operation.apply(held(model))
        else:
            rewritings = check_plan(host, plan)
            model = model if inplace else copy.deepcopy(model)
            rewrite.apply(held(model), plan, rewritings)
        if optimizer is not None:
            add_to_optimizer(model, optimizer)
    return model


def _held(model: Any) -> nn.Module:
    """The model that `model` holds, or is; `OptionError` for what cannot be rewritten."""
    host: nn.Module = held(model) if isinstance(model, nn.Module) else model
    check_model(host)
    return host


@dataclasses.dataclass(frozen=True, repr=False)
class Conversion:
    """What `convert` did: the patched model, its Plan, how it compared with the original, and where it was saved.

    `parameters_added` counts what the upsamplers added; `path` is None where nothing was saved. `taken` says what was taken of
    a checkpoint, None where it was all of a file or a spec. Weights of upsamplers are loaded after the comparison.
    """

    model: nn.Module
    plan: Plan
    report: Report
    path: Path | None
    parameters_added: int
    taken: str | None = None

    def __repr__(self) -> str:
        saved = "nothing saved" if self.path is None else f"saved as {one_line(self.path)}"
        return f"<Conversion: {self.plan!r}, {self.report!r}, {saved}>"

    def __str__(self) -> str:
        saved = "nothing (dry run)" if self.path is None else one_line(self.path)
        taken = "" if self.taken is None else f"{one_line(self.taken)}\n"
        return f"{self.plan}\n\n{taken}parameters added  {self.parameters_added:,}\n{self.report}\nsaved  {saved}"

    def _repr_html_(self) -> str:
        """The Plan's table in a notebook, and what became of it."""
        return self.plan._repr_html_() + tag("p", repr(self.report)) + tag("p", str(self.path))


def convert(
    source: str | Path,
    output: str | Path | None = None,
    *,
    example_inputs: Any = None,
    input_size: int | tuple[int, int] | None = None,
    trust: Iterable[str] = (),
    weights: str | Path | None = None,
    key: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    **options: Any,
) -> Conversion:
    """Open a model, patch it, verify that it computes what it did, and save it: `upswap convert` in Python.

    Args:
        source: a file (.pt, .safetensors), a folder, or a spec such as `smp:unet?encoder_name=resnet34`.
        output: the file or folder to write; beside the source, with `.upswap` in its name, where it is left out.
        example_inputs: what `patch` takes; made for the model where it is left out.
        input_size: (height, width) in pixels of the example image that is made, or one number for both.
        trust: packages of your own that a file may use.
        weights: a file with the weights to load into the source first: a state dict, a model, or the checkpoint of a training
            loop. Those of a patched model that was trained go into its upsamplers too.
        key: what to take of a checkpoint in which several things could be meant, such as "ema": of `weights`, or else of
            `source`.
        force: whether an output that exists may be replaced.
        dry_run: whether to save nothing.
        progress: called with the name of each step; the step runs inside the context that it gives.
        options: what `patch` takes besides.

    Raises:
        SaveError: the output exists, or is the source, or cannot be written. What was there before still is.
        SourceError, UntrustedFileError: the source cannot be opened, or the weights are of another model or another patch.
        OptionError: the source is patched already, in another way than the options say.
        VerificationError: the patched model does not compute what the original did; nothing is saved.
        And what `patch` raises.
    """
    source = str(source)
    asked = make_options(**options)
    target = Path(output) if output is not None else converted_name(source)
    if not dry_run:  # before the work, not after it
        check_target(target, source=source, force=force)
    if example_inputs is not None and input_size is not None:
        raise InputError("give example_inputs or input_size, not both")
    with progress("looking at the model"):
        opened = open_source(source, trust=trust, weights=weights, key=key, patched=True)
        model = opened.model
        if input_size is not None:
            example_inputs = example_inputs_for(model, input_size)
    before = _count(model)
    with progress("swapping"):
        check_model(model)
        if rewrite.is_patched(model):
            check_same_options(rewrite.plan_of(model), options, source, trust=trust)
            captured = capture(model, example_inputs)
            patch(model, example_inputs)  # which says that it is patched
        elif opened.weights is not None and opened.weights.plan is not None:
            check_same_options(opened.weights.plan, options, str(opened.weights.path), alone=True)
            captured = capture(model, example_inputs)
            alone.patch(model, opened.weights.plan, opened.weights.tensors, opened.weights.path)
        else:
            operation = Operation(model, example_inputs, asked)
            operation.check_swaps()
            captured = operation.capture()
            operation.apply()
    plan = rewrite.plan_of(model)
    with progress("verifying"):
        report = compare(captured, model)
    report.check(plan)
    if opened.weights is not None and opened.weights.added:
        opened = dataclasses.replace(opened, weights=give_trained(model, plan, opened.weights))
    path = None
    if not dry_run:
        with progress(f"saving {target}"):
            path = checkpoint.save(model, target, source=opened.spec or opened.path, force=force)
    return Conversion(model, plan, report, path, _count(model) - before, opened.said)


def inspect(model: nn.Module, example_inputs: Any = None, **options: Any) -> Plan:
    """What `patch` with the same options would do: every resize call, what was decided and why. The model is not changed.

    For a patched model, the Plan it was patched with.

    Args:
        model: any module that runs.
        example_inputs: as `patch` takes them.
        options: the other options of `patch`, but `plan` and `inplace`.

    Raises:
        InputError, FilterError, OptionError: as `patch`.
    """
    host = _held(model)
    if rewrite.is_patched(host):
        return rewrite.plan_of(host)
    return decide(host, example_inputs, make_options(**options)).plan


def unpatch(model: M) -> M:
    """Undo `patch`: the original classes, modules and state-dict keys, with the host's weights as they are now.

    Raises `PlanError` where the model is not patched.
    """
    rewrite.undo(the_patched(model))
    return model


def plan_of(model: nn.Module) -> Plan:
    """The Plan a model was patched with, also of one inside a wrapper; `PlanError` where it is not patched."""
    return rewrite.plan_of(the_patched(model))


def is_patched(model: nn.Module) -> bool:
    """Whether a model, or one inside it, was patched: `upsamplers`, `status` and `param_groups` find something in it then."""
    return any(rewrite.is_patched(module) for module in model.modules())


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Each option is described once, beside its definition.
patch.__doc__ = f"{patch.__doc__}\n    The options of dysample:\n\n{describe(DySampleConfig, ' ' * 8)}\n    "
