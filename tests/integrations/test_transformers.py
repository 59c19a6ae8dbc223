"""Patched models of transformers, saved, loaded and trained as its users do it."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import upswap
from invariants import Given, assert_close, outputs
from models import patched
from pages import run_page
from upswap import PlanError, SourceError, UpswapWarning
from upswap.apps.cli import run
from upswap.integrations import transformers as integration
from upswap.integrations.peft import with_upsamplers
from zoos.transformers_zoo import CASES

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
MORE = ("upernet-swin", "glpn", "depth-anything", "mask2former-swin", "rt-detr-v2")
NAMES = ("upernet-convnext", "dpt", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    integration.disable()


@contextlib.contextmanager
def opted_in() -> Iterator[None]:
    integration.enable()
    yield
    integration.disable()


def of_the_zoo(name: str) -> tuple[Any, Given]:
    """A tiny model and inputs for it."""
    case = next(case for case in CASES if case.name == name)
    model = case.build()
    return model, case.inputs(model, 0)


def segformer(cls: Any = transformers.SegformerForSemanticSegmentation) -> Any:
    settings = {
        "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2], "mlp_ratios": [2] * 4,
        "decoder_hidden_size": 16, "num_labels": 5, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "classifier_dropout_prob": 0.0, "drop_path_rate": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    return cls(transformers.SegformerConfig(**settings)).eval()


def trained() -> Any:
    """A patched model whose upsamplers move what they read."""
    return patched(segformer())


def assert_same(got: nn.Module, expected: nn.Module, given: Given = IMAGES) -> None:
    """The same weights, upsamplers among them, the same plan and the same outputs."""
    assert upswap.plan_of(got) == upswap.plan_of(expected)
    assert_equal_but_for_the_plan(got, expected, given)


def assert_equal_but_for_the_plan(got: nn.Module, expected: nn.Module, given: Given = IMAGES) -> None:
    old, new = expected.state_dict(), got.state_dict()
    assert set(new) == set(old)
    assert all(torch.equal(new[name], old[name]) for name in old)
    with torch.no_grad():
        assert_close(outputs(got.eval(), given), outputs(expected.eval(), given), tolerance=1e-6)


def without_plan(folder: Path) -> None:
    """What a folder is whose model was patched by an upswap before 0.2."""
    found = json.loads((folder / "config.json").read_text())
    del found["upswap_plan"]
    (folder / "config.json").write_text(json.dumps(found))


# What is written, and read again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_save_pretrained_wrote_comes_back_in_every_way(name: str, tmp_path: Path) -> None:
    model, given = of_the_zoo(name)
    patched(model).save_pretrained(tmp_path / "folder")
    with opted_in():
        loaded, info = type(model).from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(loaded, model, given)
    assert_same(upswap.load(tmp_path / "folder"), model, given)


def test_every_way_that_upswap_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = trained(), tmp_path / "folder"
    model.save_pretrained(folder)
    assert_same(upswap.load(folder), model)
    assert_same(upswap.load(folder, segformer()), model)
    assert_same(upswap.load(folder, upswap.patch(segformer())), model)
    for source, name in ((f"hf:{folder}", "of-spec.pt"), (str(folder), "of-path.pt")):
        assert run(["convert", source, "-o", str(tmp_path / name)]) == 0
        assert "is patched already" in capsys.readouterr().err
        assert_same(upswap.load(tmp_path / name), model)
    assert run(["revert", str(folder), "-o", str(tmp_path / "reverted")]) == 0
    capsys.readouterr()
    assert_close(
        outputs(upswap.load(tmp_path / "reverted"), IMAGES), outputs(upswap.unpatch(model), IMAGES), tolerance=1e-6
    )


def test_auto_classes_types_and_shards(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "folder", max_shard_size="40KB")
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    with opted_in():
        auto = transformers.AutoModelForSemanticSegmentation
        loaded = auto.from_pretrained(tmp_path / "folder", device_map="cpu")
        assert_same(loaded, model)
        assert upswap.status(loaded).ok  # what was loaded is known, though it looks like noise
        half = auto.from_pretrained(tmp_path / "folder", dtype=torch.bfloat16)
        with pytest.warns(UpswapWarning, match="of which this SegformerModel has 0: it was not patched"):
            base = transformers.AutoModel.from_pretrained(tmp_path / "folder")
    assert not upswap.is_patched(base)
    assert {parameter.dtype for parameter in upswap.parameters(half)} == {torch.bfloat16}
    expected = copy.deepcopy(model).to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in half.state_dict().items())
    assert_same(upswap.load(tmp_path / "folder"), model)


MAPS = [torch.randn(1, width, size, size) for width, size in zip([8, 8, 16, 16], [16, 8, 4, 2], strict=True)]


class OtherHead(type(segformer().decode_head)):  # type: ignore[misc]
    """Another class of decoder."""


class TwoHeads(transformers.SegformerForSemanticSegmentation):
    """Two parts of one configuration that resize."""

    other: type = OtherHead

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.other_head = self.other(config)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        maps = self.segformer(*args, output_hidden_states=True, **kwargs).hidden_states
        return self.decode_head(maps) - self.other_head(maps)


def test_a_part_that_was_patched(tmp_path: Path) -> None:
    model = segformer()
    upswap.patch(model.decode_head, (MAPS,))
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "folder")
    with opted_in():
        loaded = type(model).from_pretrained(tmp_path / "folder")
    assert_same(loaded, model)
    assert_same(upswap.load(tmp_path / "folder"), model)
    assert_same(upswap.load(tmp_path / "folder", segformer()), model)


def test_unpatching_takes_the_plan_out_of_the_config(tmp_path: Path) -> None:
    model, original = segformer(), segformer()
    before = model.config.to_dict()
    upswap.unpatch(upswap.patch(model))
    assert model.config.to_dict() == before
    patch = upswap.patch(original, inplace=False)
    assert original.config.to_dict() == before
    assert patch.config.to_dict() != before


def test_without_the_call_it_is_the_original_which_says_so_when_it_is_patched(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "folder")
    loaded = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "folder")
    assert not upswap.is_patched(loaded)
    with pytest.warns(
        UpswapWarning, match=r"without its upsamplers.*import upswap\.integrations\.transformers as t; t\.enable"
    ):
        upswap.patch(loaded)
    segformer().save_pretrained(tmp_path / "original")
    upswap.patch(transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "original"))


def test_upsamplers_without_a_plan_are_an_error_that_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model = tmp_path / "folder", trained()
    model.save_pretrained(folder)
    without_plan(folder)
    out = str(tmp_path / "out.pt")
    assert run(["convert", f"hf:{folder}", "-o", out]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"upswap convert hf:{folder} --weights {folder}" in said
    assert not Path(out).exists()
    assert run(["convert", f"hf:{folder}", "--weights", str(folder), "-o", out]) == 0
    assert_same(upswap.load(out), model)
    with pytest.raises(SourceError, match="name it hf:"):
        upswap.load(folder)
    assert run(["convert", f"hf:{folder}", "--weights", str(folder), "--groups", "2", "-o", out, "--force"]) == 1
    assert "Leave out --groups 2" in capsys.readouterr().err  # 4 is the default


def test_a_model_of_the_config_of_a_patched_one_is_the_original(tmp_path: Path) -> None:
    first = trained()
    second = type(first)(first.config)
    assert not upswap.is_patched(second)
    first.save_pretrained(tmp_path / "first")
    made = transformers.AutoModelForSemanticSegmentation.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path / "first")
    )
    assert not upswap.is_patched(made.eval())
    for model in (second.eval(), made):
        folder = tmp_path / "original"
        model.save_pretrained(folder)
        with pytest.warns(UpswapWarning, match="no weights of its upsamplers: taken for the original"):
            loaded = upswap.load(folder)
        with opted_in(), pytest.warns(UpswapWarning, match="no weights of its upsamplers: taken for the original"):
            again, info = type(first).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        for each in (loaded, again):
            assert not hasattr(each.config, "upswap_plan")
            assert_equal_but_for_the_plan(each, model)
            upswap.patch(each)
        upswap.patch(model)  # lost nothing
    with opted_in():
        assert_same(type(first).from_pretrained(tmp_path / "first"), first)


def two_heads(cls: type = TwoHeads) -> Any:
    torch.manual_seed(0)
    return cls(segformer().config).eval()


def test_several_parts_that_were_patched(tmp_path: Path) -> None:
    model = two_heads()
    for head in (model.decode_head, model.other_head):
        upswap.patch(head, (MAPS,))
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "folder")
    with opted_in():
        loaded = TwoHeads.from_pretrained(tmp_path / "folder")
    for each in (loaded, upswap.load(tmp_path / "folder", two_heads())):
        for head in ("decode_head", "other_head"):
            assert_same(getattr(each, head), getattr(model, head), ((MAPS,), {}))
    upswap.unpatch(model.other_head)
    model.save_pretrained(tmp_path / "one")
    with opted_in():
        assert_same(TwoHeads.from_pretrained(tmp_path / "one"), model)
    upswap.unpatch(model.decode_head)
    assert not hasattr(model.config, "upswap_plan")


class Twins(TwoHeads):
    other = type(segformer().decode_head)


def test_a_part_of_which_there_are_two_is_not_lost_in_silence(tmp_path: Path) -> None:
    model = two_heads(Twins)
    upswap.patch(model.decode_head, (MAPS,))
    model.save_pretrained(tmp_path / "folder")
    said = pytest.warns(UpswapWarning, match="has 2: it was not patched")
    with opted_in(), said:
        Twins.from_pretrained(tmp_path / "folder")
    with pytest.raises(SourceError, match=r"weights of upsamplers at decode_head\.\w+"), said:
        upswap.load(tmp_path / "folder", two_heads(Twins))


@pytest.mark.parametrize("weights", ["host", "ours", "file"])
def test_weights_of_a_folder(weights: str, tmp_path: Path) -> None:
    model = trained()
    if weights == "host":
        model.save_pretrained(tmp_path / "weights")
    else:
        upswap.save(model, tmp_path / "weights")
    segformer().save_pretrained(tmp_path / "original")
    path = tmp_path / "weights"
    if weights == "file":
        upswap.save(model, tmp_path / "weights.pt")
        path = tmp_path / "weights.pt"
    done = upswap.convert(f"hf:{tmp_path / 'original'}", tmp_path / "out.pt", weights=path)
    assert_same(done.model, model)
    assert_same(upswap.load(tmp_path / "out.pt"), model)


def test_a_folder_of_upswaps_own_by_the_hosts_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained()
    upswap.save(model, tmp_path / "ours")
    assert run(["convert", f"hf:{tmp_path / 'ours'}", "-o", str(tmp_path / "out.pt")]) == 0
    assert "is patched already" in capsys.readouterr().err
    assert_same(upswap.load(tmp_path / "out.pt"), model)


def test_a_folder_of_upswaps_own_says_how_it_is_read(tmp_path: Path) -> None:
    model = trained()
    upswap.save(model, tmp_path / "ours")
    assert "upswap_plan" not in (tmp_path / "ours" / "config.json").read_text()
    with opted_in(), pytest.warns(UpswapWarning, match=r"upswap\.load\("):
        type(model).from_pretrained(tmp_path / "ours")


def test_of_a_model_that_is_passed_the_configuration_is_its_own(tmp_path: Path) -> None:
    folder, model = tmp_path / "folder", trained()
    model.save_pretrained(folder)
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, "hidden_sizes": [4] * 4, "backbone": "some/where"}))
    assert_same(upswap.load(folder, segformer()), model)
    with pytest.raises(SourceError, match="a Sequential is none"):
        upswap.load(folder, nn.Sequential())
    other = segformer()
    other.decode_head.classifier = nn.Conv2d(16, 7, 1)
    before = set(other.state_dict())
    with pytest.raises(SourceError, match="classifier"):
        upswap.load(folder, other)
    assert not upswap.is_patched(other)
    assert set(other.state_dict()) == before


def test_a_plan_that_does_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    trained().save_pretrained(folder)
    found = json.loads((folder / "config.json").read_text())
    for plan, says in (
        (found["upswap_plan"].replace('"channels": 16', '"channels": 8'), "decode_head:1"),
        ("nonsense", "is no plan"),
    ):
        (folder / "config.json").write_text(json.dumps({**found, "upswap_plan": plan}))
        with pytest.raises(PlanError, match=says):
            upswap.load(folder)
        with opted_in(), pytest.raises(PlanError, match=says):
            transformers.SegformerForSemanticSegmentation.from_pretrained(folder)


def test_the_call_may_be_repeated_and_undone() -> None:
    before = vars(transformers.PreTrainedModel)["from_pretrained"]
    integration.enable()
    integration.enable()
    integration.disable()
    assert vars(transformers.PreTrainedModel)["from_pretrained"] is before
    integration.disable()


def test_a_class_derived_from_that_which_was_patched(tmp_path: Path) -> None:
    model, given = of_the_zoo("upernet-convnext")
    upswap.patch(model.eval(), given, kinds=("feature", "logits"))  # a resize in the class's own forward too
    assert any(not site.owner for site in upswap.plan_of(model).swapped)
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "folder")

    class Mine(transformers.UperNetForSemanticSegmentation):
        pass

    with opted_in():
        loaded = Mine.from_pretrained(tmp_path / "folder")
        assert isinstance(loaded, Mine)
        assert_equal_but_for_the_plan(loaded, model, given)
        loaded.save_pretrained(tmp_path / "again")
        assert_same(Mine.from_pretrained(tmp_path / "again"), loaded, given)


def test_a_configuration_of_the_users_own(tmp_path: Path) -> None:
    model, cls = trained(), transformers.SegformerForSemanticSegmentation
    model.save_pretrained(tmp_path / "folder" / "inner")
    own = segformer().config
    own.save_pretrained(tmp_path / "own")
    with opted_in():
        for config in (own, str(tmp_path / "own")):
            assert_same(cls.from_pretrained(tmp_path / "folder" / "inner", config=config), model)
        assert_same(cls.from_pretrained(tmp_path / "folder", config=own, subfolder="inner"), model)
        again = transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "folder" / "inner", config=own)
        assert_same(again, model)
        segformer().save_pretrained(tmp_path / "plain")
        assert not upswap.is_patched(cls.from_pretrained(tmp_path / "plain", config=own))
    assert not hasattr(own, "upswap_plan")
    again.save_pretrained(tmp_path / "again")
    assert_same(upswap.load(tmp_path / "again"), model)


def test_a_model_made_of_a_loaded_configuration_has_lost_nothing(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path / "folder")
    made = transformers.SegformerForSemanticSegmentation(transformers.AutoConfig.from_pretrained(tmp_path / "folder"))
    assert upswap.is_patched(upswap.patch(made))
    loaded = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "folder")
    for one in (copy.deepcopy(loaded), loaded.train()):
        with pytest.warns(UpswapWarning, match="loaded without its upsamplers"):
            upswap.patch(one)


def test_what_others_put_over_the_call_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, folder = transformers.SegformerForSemanticSegmentation, tmp_path / "folder"
    trained().save_pretrained(folder)
    before = vars(transformers.PreTrainedModel)["from_pretrained"]
    integration.enable()
    function, calls = vars(transformers.PreTrainedModel)["from_pretrained"].__func__, []

    def others(cls: type, *args: Any, **kwargs: Any) -> Any:
        calls.append(cls)
        return function(cls, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(others))
    assert upswap.is_patched(cls.from_pretrained(folder))
    integration.disable()
    assert not upswap.is_patched(cls.from_pretrained(folder))
    integration.enable()
    assert upswap.is_patched(cls.from_pretrained(folder))
    integration.disable()
    assert len(calls) == 3
    transformers.PreTrainedModel.from_pretrained = before  # all of it is taken away again
    integration.enable()
    assert upswap.is_patched(cls.from_pretrained(folder))
    integration.disable()
    assert vars(transformers.PreTrainedModel)["from_pretrained"] is before


def test_models_of_one_config_that_are_patched_differently() -> None:
    first = segformer()
    second, third = type(first)(first.config), type(first)(first.config)
    upswap.patch(first)
    plan = first.config.upswap_plan
    upswap.patch(second)  # alike
    with pytest.warns(UpswapWarning, match=r"SegformerFor\w+ had the plan of another patch.*copy.deepcopy\(config\)"):
        upswap.patch(third, style="pl")
    assert first.config.upswap_plan == upswap.plan_of(third).to_json() != plan
    upswap.unpatch(first)
    assert third.config.upswap_plan == upswap.plan_of(third).to_json()
    upswap.unpatch(third)
    assert not hasattr(third.config, "upswap_plan")
    one, other = (type(first)(copy.deepcopy(first.config)) for _ in range(2))
    upswap.patch(one)
    upswap.patch(other, style="pl")


# Initialisation -------------------------------------------------------------------------------------------------------------


class Own(transformers.SegformerForSemanticSegmentation):
    """A class of the user's own that patches itself, and whose initialisation goes over all there is."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        upswap.patch(self, dyscope=True)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            if not getattr(parameter, "_is_hf_initialized", False):
                nn.init.normal_(parameter, std=0.02)


def test_a_class_that_patches_itself(tmp_path: Path) -> None:
    made = segformer(Own)
    assert all(upsampler.is_as_initialised() for upsampler in upswap.upsamplers(made).values())
    assert upswap.status(made).ok

    made.save_pretrained(tmp_path / "patched")
    host = {name: tensor for name, tensor in made.state_dict().items() if "upsample" not in name}
    model, info = Own.from_pretrained(None, config=made.config, state_dict=host, output_loading_info=True)
    assert len(info["missing_keys"]) == 12
    for upsampler in upswap.upsamplers(model).values():
        assert upsampler.is_as_initialised()
        assert upsampler.misfit() is None
        assert upsampler.reinitialised() is None
    assert_same(model, made)

    with torch.no_grad():
        for parameter in upswap.parameters(made):
            parameter.normal_(std=0.3)
    made.save_pretrained(tmp_path / "trained")
    assert_same(Own.from_pretrained(tmp_path / "trained"), made)
    with opted_in():
        assert_same(Own.from_pretrained(tmp_path / "trained"), made)
    assert_same(upswap.load(tmp_path / "trained", segformer(Own)), made)


def test_what_is_missing_is_made_and_what_is_there_stays() -> None:
    model = segformer(Own)
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.normal_(std=0.3)
    state = {
        name: value for name, value in model.state_dict().items() if not name.endswith(("scope.weight", "init_pos"))
    }
    loaded = Own.from_pretrained(None, config=model.config, state_dict=state)
    for path, upsampler in upswap.upsamplers(loaded).items():
        assert torch.equal(upsampler.offset.weight, state[f"{path}.offset.weight"])
        assert not upsampler.scope.weight.any()
        assert upsampler.misfit() is None


def test_a_second_initialisation_leaves_what_was_trained() -> None:
    model = trained()
    for again in (model, copy.deepcopy(model)):
        before = {name: value.clone() for name, value in again.state_dict().items()}
        again.init_weights()
        assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


# Trainer --------------------------------------------------------------------------------------------------------------------


class Pixels(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A few images and their classes."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {
            "pixel_values": torch.randn(3, 64, 64, generator=generator),
            "labels": torch.randint(0, 5, (64, 64), generator=generator),
        }


class Killed(Exception):
    """The end of a process, as a test has it."""


class Kill(transformers.TrainerCallback):
    """Ends the training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def upernet() -> Any:
    """A model whose names of weights are those in its files, as `resume_from_checkpoint` of transformers 5.24 needs them."""
    return of_the_zoo("upernet-convnext")[0]


class Begin(transformers.TrainerCallback):
    """Keeps the model as it is when training begins."""

    model: nn.Module

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.model = copy.deepcopy(model)


def trainer(model: nn.Module, folder: Path, *callbacks: Any, **settings: Any) -> transformers.Trainer:
    arguments = {
        "output_dir": str(folder), "max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2,
        "learning_rate": 0.01, "report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    args = transformers.TrainingArguments(**{**arguments, **settings})
    return transformers.Trainer(model, args, train_dataset=Pixels(), eval_dataset=Pixels(), callbacks=[*callbacks])


def test_a_plain_trainer(tmp_path: Path) -> None:
    model = upswap.patch(upernet())
    plain = trainer(model, tmp_path / "run")
    plain.train()
    assert upswap.status(model, plain.optimizer).ok
    assert {row.state for row in upswap.status(model).rows} == {"trained"}
    last = tmp_path / "run" / "checkpoint-4"
    assert_same(upswap.load(last), model)
    with opted_in():
        loaded = transformers.AutoModelForSemanticSegmentation.from_pretrained(last)
    assert_same(loaded, model)

    # Killed between two checkpoints, and taken up again by a new process.
    with pytest.raises(Killed):
        trainer(upswap.patch(upernet()), tmp_path / "killed", Kill(3)).train()
    resumed, begin = upswap.patch(upernet()), Begin()
    trainer(resumed, tmp_path / "killed", begin).train(resume_from_checkpoint=True)
    assert_same(begin.model, upswap.load(tmp_path / "killed" / "checkpoint-2"))
    assert_same(upswap.load(tmp_path / "killed" / "checkpoint-4"), resumed)

    # A second fine-tuning, of what the first one left.
    with opted_in():
        again = transformers.AutoModelForSemanticSegmentation.from_pretrained(last)
    start = {name: value.clone() for name, value in again.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UpswapWarning)
        trainer(again, tmp_path / "second").train()
    assert all(not torch.equal(value, start[name]) for name, value in again.named_parameters() if "upsample" in name)
    assert_same(upswap.load(tmp_path / "second" / "checkpoint-4"), again)
    trainer(upswap.load(last), tmp_path / "third", max_steps=1).train()


def test_the_best_model_at_the_end(tmp_path: Path) -> None:
    model = upswap.patch(upernet())
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    worse = trainer(model, tmp_path, learning_rate=0.05, metric_for_best_model="eval_loss", **settings)
    worse.train()
    assert_same(upswap.load(Path(worse.state.best_model_checkpoint)), model)
    worse.save_model(str(tmp_path / "final"))
    assert_same(upswap.load(tmp_path / "final"), model)
    assert worse.predict(Pixels()).predictions.shape[0] == 8


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21 asks for it
def test_a_trainer_of_an_adapter(tmp_path: Path) -> None:
    def adapted() -> Any:
        base = upswap.patch(segformer())
        return peft.get_peft_model(
            base, with_upsamplers(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        )

    model, resumed, begin = adapted(), adapted(), Begin()
    plain = trainer(model, tmp_path, label_names=["labels"])
    plain.train()
    assert upswap.status(model, plain.optimizer).ok
    trainer(resumed, tmp_path, begin, label_names=["labels"], max_steps=5).train(resume_from_checkpoint=True)
    expected = dict(model.named_parameters())
    trained = [name for name, parameter in expected.items() if parameter.requires_grad]
    assert any("upsample" in name for name in trained)
    assert all(torch.equal(value, expected[name]) for name, value in begin.model.named_parameters() if name in trained)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("integrations/transformers.md", {"make_model": upernet, "dataset": Pixels()})
    integration.disable()
    assert_same(names["model"], upswap.load(tmp_path / "run" / "checkpoint-2"))
    assert upswap.status(segformer(names["Net"])).ok
