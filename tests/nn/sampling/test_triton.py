"""The Triton kernels: computed by triton's interpreter, and compiled for GPUs that need not be there."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from upswap.nn.sampling import triton_launch as triton_sampler
from upswap.nn.sampling.positions import Mapping, Scheme

TESTS = Path(__file__).parents[2]
NO_TRITON = importlib.util.find_spec("triton") is None
pytestmark = pytest.mark.skipif(NO_TRITON, reason="torch has no triton for this platform")


def before_3_7(reason: str) -> pytest.MarkDecorator:
    """A skip, with what triton lacked until then."""
    installed = "none" if NO_TRITON else importlib.import_module("triton").__version__
    return pytest.mark.skipif(
        not NO_TRITON and Version(installed) < Version("3.7"), reason=f"{reason}; this is {installed}"
    )


@before_3_7("the interpreter of triton before 3.7 fails with NumPy 2.4 (triton issue 9171)")
def test_what_they_compute_in_the_interpreter(tmp_path: Path) -> None:
    """In a process of its own: the interpreter has to be chosen before triton is imported, and for all kernels."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        str(TESTS / "support" / "triton_cases.py"),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS.parent, env=environment)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]


def test_importing_it_imports_no_triton() -> None:
    code = "import sys, upswap.nn.sampling.triton_launch; sys.exit('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Recorder:
    """In a kernel's place: keeps what it is launched with."""

    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int]) -> Recorder:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options


POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}


def compiled(kernel: Any, launch: Recorder, capability: int) -> Any:
    """The kernel, compiled as it is for this launch by a GPU with compute capability 8.0 or 9.0, as 80 or 90."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = dict(launch.options)
    settings = {name: options.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    values = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | options
    assert list(values) == list(kernel.arg_names)
    signature, constants, attributes = {}, {}, {}
    for position, (name, value) in enumerate(values.items()):
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[position,] = [["tt.divisibility", 16]]  # what torch allocates is aligned
        elif value is None or name in options:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=settings)


LAUNCHES = [
    # the paper's case, one too small to fill a GPU with large blocks, and channels no vector fits
    pytest.param((1, 256, 120, 120), False, torch.float32, True, False, 90, id="large"),
    pytest.param((1, 256, 8, 8), False, torch.bfloat16, True, False, 90, id="small"),
    pytest.param((1, 256, 120, 120), True, torch.float32, True, False, 90, id="channels_last"),
    pytest.param((1, 256, 8, 8), True, torch.bfloat16, False, True, 90, id="channels_last-small-deterministic"),
    pytest.param((8, 20, 56, 56), True, torch.float16, True, False, 80, id="channels_last-odd"),
    pytest.param((8, 128, 56, 56), False, torch.float32, False, True, 80, id="deterministic"),
]


@before_3_7("triton's compiler takes more registers before 3.7")
@pytest.mark.parametrize(("shape", "channels_last", "dtype", "scope", "deterministic", "capability"), LAUNCHES)
def test_they_compile_and_keep_to_registers(
    shape: tuple[int, int, int, int],
    channels_last: bool,
    dtype: torch.dtype,
    scope: bool,
    deterministic: bool,
    capability: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from upswap.nn.sampling import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernels = triton_kernels.forward_kernel, triton_kernels.backward_kernel
    launches = Recorder(), Recorder()
    monkeypatch.setattr(triton_kernels, "forward_kernel", launches[0])
    monkeypatch.setattr(triton_kernels, "backward_kernel", launches[1])
    scheme = Scheme(4, (2, 2), scope, Mapping("bilinear"))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)
    field = torch.empty(shape[0], (4 if scope else 2) * 4 * 4, *shape[2:], device="meta")
    assert triton_sampler.supports(x, field, scheme, (2.0, 2.0))
    out = triton_sampler.forward(x, field, scheme, (2.0, 2.0))
    triton_sampler.backward(out, x, field, scheme, (2.0, 2.0), deterministic=deterministic, needs=(True, True))
    for kernel, launch in zip(kernels, launches, strict=True):
        machine_code = tmp_path / "kernel.cubin"
        made = compiled(kernel, launch, capability)
        machine_code.write_bytes(made.asm["cubin"])
        usage = _usage(machine_code)
        # With 168 a thread, as for channels no vector fits, a multiprocessor has room for 12 of 64 warps; of the others,
        # 16 at the least.
        assert usage["REG"] <= (128 if shape[1] % 32 == 0 else 168), usage
        assert usage["STACK"] <= 16, usage
        vectors = re.search(r"ld\.global\.v[24]\.b32", made.asm["ptx"]) is not None
        assert vectors == (channels_last and shape[1] % 32 == 0)


def _usage(machine_code: Path) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this triton comes without cuobjdump")
    said = subprocess.run([tool, "-res-usage", machine_code], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", said)}
