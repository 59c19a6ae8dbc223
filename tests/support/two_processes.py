"""One of two processes that train a patched model together; `python two_processes.py CASE RANK FOLDER`.

`ddp` and `fsdp` write what they trained to FOLDER, for rank 0, and fail where the upsamplers are not as they should be.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import upswap
from tiny_training import IMAGES, LABELS, Net, loss_of, patched_net

STEPS = 3


def without_norm() -> nn.Module:
    """In eval mode: whole batches and halves of them are normalised alike."""
    return patched_net().eval()


def steps(model: nn.Module, optimizer: Any, rank: int) -> None:
    half = slice(rank * 4, rank * 4 + 4)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, IMAGES[half], LABELS[half]).backward()
        optimizer.step()


def ddp(rank: int, folder: Path) -> None:
    model = nn.parallel.DistributedDataParallel(without_norm())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps(model, optimizer, rank)
    assert upswap.status(model, optimizer).ok
    assert list(upswap.upsamplers(model)) == ["module.up", "module.upsample"]
    torch.save({"inner": model.module.state_dict(), "wrapped": model.state_dict()}, folder / f"{rank}.pt")
    if rank == 0:
        upswap.save(model, folder / "saved.pt")
    with pytest.raises(upswap.OptionError, match=r"patch the model inside, model.module, before it is wrapped"):
        upswap.patch(nn.parallel.DistributedDataParallel(Net()), IMAGES[:1])
    late = Net()
    wrapped = nn.parallel.DistributedDataParallel(late)
    upswap.patch(late, IMAGES[:1])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loss_of(wrapped).backward()
    (folder / f"late{rank}.txt").write_text("\n".join(str(each.message) for each in said))


def fsdp(rank: int, folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = without_norm()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.second, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps(model, optimizer, rank)
    assert upswap.status(model, optimizer).ok
    assert [row.state for row in upswap.status(model).rows] == ["trained", "trained"]
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    again = without_norm()
    fully_shard(again, mesh=mesh)
    set_model_state_dict(again, get_model_state_dict(model))
    theirs = get_model_state_dict(again, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        assert list(theirs) == list(whole)
        assert all(torch.equal(theirs[name], tensor) for name, tensor in whole.items())
        torch.save({"inner": whole}, folder / "0.pt")
    unpatched = Net()
    fully_shard(unpatched, mesh=mesh)
    with pytest.raises(upswap.OptionError, match="is sharded by fully_shard, which would leave new parameters out"):
        upswap.patch(unpatched, IMAGES[:1])


if __name__ == "__main__":
    case, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    {"ddp": ddp, "fsdp": fsdp}[case](rank, folder)
    dist.destroy_process_group()
