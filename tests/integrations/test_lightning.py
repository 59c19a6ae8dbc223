"""Lightning keeps the upsamplers wherever a module may be patched, or it is said before the training is spent."""

from __future__ import annotations

import copy
import logging
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

import upswap
from pages import run_page
from tiny_training import IMAGES, TRAINED, Net, assert_kept, loader, loss_of, output, states
from upswap.integrations.lightning import UpswapCallback, callbacks, load_patched

pytestmark = [
    # Of Lightning 2.6 itself, and of its advice on loaders and callbacks.
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*tensorboardX"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*overrides the configure_model"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


class Lit(pl.LightningModule):
    """Not patched in its own code."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return loss_of(self.net, *batch)

    def validation_step(self, batch, index):
        self.log("loss", loss_of(self.net, *batch))

    def predict_step(self, batch, index):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


class InInit(Lit):
    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        upswap.patch(self.net, IMAGES[:1])


class InConfigure(Lit):
    def configure_model(self) -> None:
        if not upswap.is_patched(self.net):
            upswap.patch(self.net, IMAGES[:1])


class InFitStart(Lit):
    def on_fit_start(self) -> None:
        upswap.patch(self.net, IMAGES[:1])


class InTrainStart(Lit):
    def on_train_epoch_start(self) -> None:
        if not upswap.is_patched(self.net):
            upswap.patch(self.net, IMAGES[:1])


def outside() -> Lit:
    lit = Lit()
    upswap.patch(lit.net, IMAGES[:1])
    return lit


def trainer(folder: Path, epochs: int = 2, *more: Any, library: Any = pl, **options: Any) -> Any:
    return library.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[library.callbacks.ModelCheckpoint(folder, save_last=True, filename="x"), UpswapCallback(), *more],
        **options,
    )


WAYS = [InInit, InConfigure, outside]


@pytest.mark.parametrize("make", WAYS)
def test_train_checkpoint_resume_reload_predict(make: Callable[[], Lit], tmp_path: Path) -> None:
    lit = make()
    trainer(tmp_path).fit(lit, loader(), loader())
    assert states(lit) == TRAINED
    last = tmp_path / "last.ckpt"
    assert list(torch.load(last, weights_only=True)["upswap"]) == ["net"]
    if make is not outside:
        assert_kept(type(lit).load_from_checkpoint(last), lit)
    assert_kept(load_patched(type(lit), last), lit)
    assert_kept(upswap.load(last, upswap.patch(Net(), IMAGES[:1])), lit.net)
    batches = trainer(tmp_path / "predict").predict(make(), loader(), ckpt_path=last)
    torch.testing.assert_close(torch.cat(batches), output(lit), rtol=0, atol=0)
    # Cut off after two epochs of four, and not.
    resumed, whole = make(), make()
    trainer(tmp_path / "resumed", 4).fit(resumed, loader(), ckpt_path=last)
    trainer(tmp_path / "whole", 4).fit(whole, loader())
    assert_kept(resumed, whole)
    # A second fine-tuning starts from what was trained.
    again = load_patched(type(lit), last, lr=0.0)
    trainer(tmp_path / "again", 1).fit(again, loader())
    for key, tensor in lit.net.state_dict().items():
        if "norm" not in key:  # its statistics go on
            torch.testing.assert_close(again.net.state_dict()[key], tensor, rtol=0, atol=0)


def test_a_checkpoint_goes_into_a_module_that_is_not_patched_yet(tmp_path: Path) -> None:
    lit = outside()
    trainer(tmp_path).fit(lit, loader())
    last = tmp_path / "last.ckpt"
    resumed, whole = Lit(), outside()
    trainer(tmp_path / "resumed", 4).fit(resumed, loader(), ckpt_path=last)
    trainer(tmp_path / "whole", 4).fit(whole, loader())
    assert_kept(resumed, whole)
    batches = trainer(tmp_path).predict(Lit(), loader(), ckpt_path=last)
    torch.testing.assert_close(torch.cat(batches), output(lit), rtol=0, atol=0)
    assert not {"on_save_checkpoint", "on_load_checkpoint"} & set(vars(resumed))


def test_checkpoints_of_weights_alone_have_the_plan(tmp_path: Path) -> None:
    lit = outside()
    trainer(tmp_path).fit(lit, loader())
    weights = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True, every_n_train_steps=1)
    trainer(tmp_path, 1, weights).fit(lit, loader())
    assert_kept(load_patched(Lit, tmp_path / "weights.ckpt"), lit)


def test_a_checkpoint_without_the_plan_says_what_to_do(tmp_path: Path) -> None:
    lit = outside()
    lit.strict_loading = False  # without a word otherwise
    plain = trainer(tmp_path)
    plain.callbacks = [each for each in plain.callbacks if not isinstance(each, UpswapCallback)]
    plain.fit(lit, loader())
    last = tmp_path / "last.ckpt"
    with pytest.raises(
        upswap.PlanError, match=r"has trained upsamplers at net.up, net.upsample, which this Lit has not"
    ):
        load_patched(Lit, last, strict=False)
    again = outside()
    again.load_state_dict(torch.load(last, weights_only=True)["state_dict"])
    assert_kept(again, lit)


@pytest.mark.parametrize("make", [InFitStart, InTrainStart])
def test_patched_too_late_is_an_error_before_the_first_step(make: Callable[[], Lit], tmp_path: Path) -> None:
    lit = make()
    with pytest.raises(
        upswap.OptionError, match=r"net.up, net.upsample are in no optimizer .* on_fit_start is too late"
    ):
        trainer(tmp_path).fit(lit, loader())
    assert lit.global_step == 0
    assert not {"on_save_checkpoint", "on_load_checkpoint"} & set(vars(lit))


def test_patched_too_late_is_said_without_the_callback_too(tmp_path: Path) -> None:
    """By the upsamplers themselves, after 100 forwards."""
    plain = trainer(tmp_path, 60)
    plain.callbacks = []
    with pytest.warns(upswap.UpswapWarning, match="its weights have not changed"):
        plain.fit(InFitStart(), loader())


def ema() -> Any:
    return EMAWeightAveraging(decay=0.5)


def swa() -> Any:
    return StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)


@pytest.mark.filterwarnings("ignore:.*Swapping scheduler")  # what SWA is for
@pytest.mark.parametrize(
    ("average", "make"), [(ema, InInit), (ema, InConfigure), (ema, outside), (swa, InInit), (swa, outside)]
)
def test_averaged_weights(average: Callable[[], Any], make: Callable[[], Lit], tmp_path: Path) -> None:
    lit = make()
    trainer(tmp_path, 3, average()).fit(lit, loader())
    assert states(lit) == TRAINED
    last = tmp_path / "last.ckpt"
    reloaded = load_patched(type(lit), last)
    assert states(reloaded) == TRAINED
    if average is ema:
        assert_kept(reloaded, lit)
    resumed, whole = make(), make()
    trainer(tmp_path / "resumed", 5, average()).fit(resumed, loader(), ckpt_path=last)
    if average is ema:  # SWA begins anew: its schedule counts epochs
        trainer(tmp_path / "whole", 5, average()).fit(whole, loader())
        assert_kept(resumed, whole)


@pytest.mark.parametrize(("average", "make"), [(swa, InConfigure), (ema, InFitStart)])
def test_averages_made_before_the_patch_are_an_error_before_the_first_step(
    average: Callable[[], Any], make: Callable[[], Lit], tmp_path: Path
) -> None:
    class Late(make):  # type: ignore[misc, valid-type]
        def configure_optimizers(self):
            upswap.is_patched(self.net) or upswap.patch(self.net, IMAGES[:1])
            return super().configure_optimizers()

        def on_fit_start(self) -> None:
            pass

    lit = Late()
    with pytest.raises(upswap.OptionError, match=r"the averaged weights have no upsamplers at net.up, net.upsample"):
        trainer(tmp_path, 3, average()).fit(lit, loader())
    assert lit.global_step == 0


def test_a_module_that_is_patched_itself(tmp_path: Path) -> None:
    class Whole(Lit):
        def forward(self, x):
            return nn.functional.interpolate(self.net.first(x), scale_factor=2)

        def training_step(self, batch, index):
            return self(batch[0]).square().mean()

    lit = upswap.patch(Whole(), IMAGES[:1], kinds="logits")
    trainer(tmp_path).fit(lit, loader())
    assert states(lit) == ["trained"]
    again = load_patched(Whole, tmp_path / "last.ckpt")
    assert type(again).__name__ == "Whole"
    torch.testing.assert_close(output(again), output(lit), rtol=0, atol=0)


def test_frozen_upsamplers_are_said(tmp_path: Path) -> None:
    lit = outside()
    for parameter in upswap.parameters(lit):
        parameter.requires_grad_(False)
    with pytest.warns(upswap.UpswapWarning) as said:
        trainer(tmp_path, 1).fit(lit, loader())
    texts = [str(each.message) for each in said if each.category is upswap.UpswapWarning]
    assert "net.up is frozen" in texts[0]  # before the upsamplers say it, at no place


def test_an_unpatched_module_is_left_alone(tmp_path: Path) -> None:
    lit, plain = Lit(), Lit()
    trainer(tmp_path / "a").fit(lit, loader())
    trainer(tmp_path / "b").fit(plain, loader())
    assert "upswap" not in torch.load(tmp_path / "a" / "last.ckpt", weights_only=True)
    torch.testing.assert_close(output(lit), output(plain), rtol=0, atol=0)


def test_copies_have_hooks_of_their_own(tmp_path: Path) -> None:
    lit = outside()
    UpswapCallback().setup(trainer(tmp_path), lit, "fit")
    twin = copy.deepcopy(lit)
    upswap.unpatch(lit)
    checkpoint: dict[str, Any] = {}
    twin.on_save_checkpoint(checkpoint)
    assert list(checkpoint["upswap"]) == ["net"]


def test_the_other_name_of_the_library(tmp_path: Path) -> None:
    class Other(pytorch_lightning.LightningModule):
        __init__, training_step = Lit.__init__, Lit.training_step
        forward, configure_optimizers = Lit.forward, Lit.configure_optimizers

    Other.__init__ = lambda self: (pytorch_lightning.LightningModule.__init__(self), setattr(self, "net", Net()))[0]
    Other.configure_optimizers = lambda self: torch.optim.AdamW(self.parameters(), lr=0.05)
    lit = Other()
    upswap.patch(lit.net, IMAGES[:1])
    trainer(tmp_path, library=pytorch_lightning).fit(lit, loader())
    assert_kept(load_patched(Other, tmp_path / "last.ckpt"), lit)


def test_every_trainer_has_it_where_upswap_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for group in ("lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory"):
        assert project["entry-points"][group] == {"upswap": f"{callbacks.__module__}:{callbacks.__name__}"}
    assert [type(each) for each in callbacks()] == [UpswapCallback]
    lit = InFitStart()
    with pytest.raises(upswap.OptionError, match="in no optimizer"):
        trainer(tmp_path, 1, *callbacks()).fit(lit, loader())  # beside one of the user's own


class Theirs(nn.Module):
    """Not of upswap, with names of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("init_pos", torch.zeros(1, 8, 1, 1))
        self.offset = nn.Conv2d(16, 8, 1)


def test_what_nobody_asked_upswap_for_goes_on(tmp_path: Path) -> None:
    def added(epochs: int) -> Any:
        made = trainer(tmp_path, epochs)
        made.callbacks = [each for each in made.callbacks if not isinstance(each, UpswapCallback)] + callbacks()
        return made

    lit = Lit()
    lit.net.theirs = Theirs()
    added(1).fit(lit, loader())
    assert "upswap" not in torch.load(tmp_path / "last.ckpt", weights_only=True)
    less = Lit()
    less.strict_loading = False
    with pytest.warns(upswap.UpswapWarning, match=r"upsamplers at net.theirs, which this Lit has not"):
        added(1).validate(less, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert not upswap.is_patched(less)
    torch.testing.assert_close(output(less), output(lit), rtol=0, atol=0)
    with pytest.raises(upswap.PlanError, match=r"net.theirs, which this Lit has not"):
        trainer(tmp_path, 1, *callbacks()).validate(less, loader(), ckpt_path=tmp_path / "last.ckpt")


def test_plans_in_a_checkpoint_are_carried_out_by_whichever_callback(tmp_path: Path) -> None:
    lit = outside()
    trainer(tmp_path).fit(lit, loader())
    again = trainer(tmp_path)
    again.callbacks = callbacks()
    plain = Lit()
    plain.strict_loading = False
    again.validate(plain, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert_kept(plain, lit)
    other = Lit()
    upswap.patch(other.net, IMAGES[:1], exclude="up")
    other.strict_loading = False
    with pytest.raises(upswap.PlanError, match=r"net.up, which this Lit has not"):
        again.validate(other, loader(), ckpt_path=tmp_path / "last.ckpt")


def test_export_of_a_trained_module(tmp_path: Path) -> None:
    lit = outside()
    trainer(tmp_path).fit(lit, loader())
    again = load_patched(Lit, tmp_path / "last.ckpt").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        exported = torch.export.export(again.net, (IMAGES,))
    torch.testing.assert_close(exported.module()(IMAGES), output(lit))


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("integrations/lightning.md", {"make_model": Net, "batches": loader()})
    assert_kept(names["again"].net, names["lit"].net)
    torch.testing.assert_close(output(upswap.load("trained.safetensors", Net())), output(names["lit"].net))
