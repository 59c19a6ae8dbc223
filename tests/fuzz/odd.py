"""What entries, specs and names are replaced by."""

from __future__ import annotations

from typing import Any

#: Text and numbers that an entry is replaced by: of another type, impossible, huge, or of use to an attacker.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**30, 1.5, -0.5, 1e308, float("nan"), float("inf"),
    "", "a", "x" * 5000, "\x00", "é", "\u217c", "../../etc/passwd", "/dev/zero", "__class__", "__init__.__globals__",
    "lambda: 0", "os", "system", "builtins", "torch.hub", "eval", "int8", "float64", "bfloat16", "complex64", "quint8",
    "load", "hub", "nearest", "bilinear", "bicubic", "linear", "graph", "source", "module", "interpolate", "feature",
    "logits", "decoder", "decoder.blocks", "encoder", "upsample", "forward", "F.interpolate(x)", "exec('1')",
    "self.__class__", "torch.nn.functional", "functools", "transformers", "AutoModel", "dysample", "paper", "pl", [],
    [[]], {}, [None], ["a"], {"a": 1}, [1, 2, 3, 4], [2.0, 2.0], [1, 64, 10**6, 10**6], [0, 0], [-1, -1], [1e9, 1e9],
    {"tensor": [1, 8, 10**9, 10**9], "dtype": "float32"}, {"dtype": "hub"}, {"value": 10**18},
    {"instance": ["builtins", "type", {}]}, {"instance": ["subprocess", "Popen", {"args": "true"}]},
    {"instance": ["transformers", "AutoModel", {}]}, {"tuple": []}, {"args": {"tuple": []}, "kwargs": {"dict": {}}},
)  # fmt: skip

#: What is small enough to be a size, and what is not.
COUNTS = (100, 4096, 65_535, 99_999, 10**6, 10**7, 10**9, 2**31 - 1, 10**12, 10**18)

SPECS = (
    "smp:unet?classes=100000000", "smp:unet?encoder_name=resnet18&decoder_channels=(65536,65536,65536,65536,65536)",
    "timm:resnet18?num_classes=1000000000", "timm:vit_tiny_patch16_224?depth=1000000000", "timm:hf-hub:evil/model",
    "timm:vit_tiny_patch16_224?embed_dim=3000000", "timm:resnet18?pretrained=True",
    "torchvision:resnet18?weights='DEFAULT'", "torchvision:resnet18?num_classes=4096",
    "smp:unet?encoder_weights=imagenet", "hf:/etc", "python:os:system", "python:subprocess:run",
    "smp:unet?classes=(((((((1,),),),),),),)", "smp:", ":", "x" * 5000,
    "timm:swin_tiny_patch4_window7_224?window_size=4000", "a:b",
    "smp:unet?encoder_name=tu-test_byobnet&encoder_depth=3&decoder_channels=(8,8,8)&classes=-1",
    "timm:resnet18?block_args={'a':1}",
)  # fmt: skip

NAMES = (
    "os system", "posix system", "builtins eval", "builtins exec", "builtins getattr", "builtins bytearray",
    "subprocess Popen", "functools partial", "torch.hub load", "torch.serialization load",
    "torch.nn.modules.container Sequential", "torch Tensor", "torch.nn.modules.module Module",
    "torch.nn.modules.conv Conv2d", "torch.fx.graph_module GraphModule", "numpy dtype", "numpy.core.multiarray scalar",
    "collections OrderedDict", "_codecs encode", "builtins set", "torch FloatStorage", "torch.storage UntypedStorage",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch.jit._script RecursiveScriptModule",
    "torch._utils _rebuild_wrapper_subclass", "torch._tensor _rebuild_from_type_v2", "upswap.surgery restore",
    "upswap.surgery.rewritten_class Pending", "upswap.nn DySample", "torchvision.ops.boxes box_iou",
    "timm.layers.norm_act BatchNormAct2d", "torch Size", "torch device", "torch.nn.parameter Parameter",
    "torch.nn.modules.activation MultiheadAttention", "torch.nn.modules.rnn LSTM", "builtins complex",
    "monai.utils.enums UpsampleMode", "no_such_package Thing", "torch.nn.modules.nowhere Layer",
    "torch.nn.modules.conv.Conv2d __init__", "timm.models.resnet ResNet", "upswap.apps.cli main",
    "torch._utils _rebuild_sparse_tensor", "torch.serialization _get_layout", "__builtin__ xrange", "builtins slice",
    "builtins frozenset", "builtins list", "collections deque", "collections defaultdict", "collections Counter",
    "pathlib PosixPath", "pathlib WindowsPath", "re _compile", "numpy._core.multiarray _reconstruct", "numpy ndarray",
    "argparse Namespace", "types SimpleNamespace", "transformers.core_model_loading WeightRenaming",
    "torch.ao.nn.quantized.modules.functional_modules FloatFunctional",
)  # fmt: skip
