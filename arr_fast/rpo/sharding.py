"""Networks split over the ranks (FSDP2): a rank holds its share and gathers a block while it runs.

An adapter stays whole on every rank: it is small, and its gradients are averaged as in data
parallelism. Split are the network that it adapts, or, where everything is trained, the network with
its gradients and optimizer state, and its frozen copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from arr_fast.errors import TrainingError
from arr_fast.rpo.policies.base import Policy


def shard(policy: Policy, device: torch.device, *, compile: bool) -> None:
    """Splits a policy's networks over all ranks, block by block; parameters become DTensors.

    Args:
        policy: The generator, whole and alike on every rank; it can be in host memory.
        device: Where this rank's share goes; a block at a time is there as a whole.
        compile: torch.compile each block; what is gathered between them stays outside the graphs.

    Raises:
        TrainingError: There is one process only.
    """
    if not torch.distributed.is_initialized():
        raise TrainingError(
            "shard: true splits the networks over the processes of a run, and there is one only: "
            "start several with accelerate launch"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in policy.frozen_parts().values():
        part.to(device)
    for network in policy.networks():
        adapter = {p for name, p in network.named_parameters() if ".lora_" in name}
        for parameter in adapter:
            parameter.data = parameter.data.to(device)
        for block in blocks_of(network):
            if compile:
                block.compile(fullgraph=True, dynamic=False)
            fully_shard(block, mesh=mesh, ignored_params=adapter)
        fully_shard(network, mesh=mesh, ignored_params=adapter)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a network: the members of its lists of modules."""
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    return [block for each in lists for block in each]


def is_split(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Whether every rank holds a share of a tensor only."""
    return isinstance(tensor, DTensor)


def own_share(tensor: Tensor) -> Tensor:
    """What this rank holds."""
    return tensor.to_local() if is_split(tensor) else tensor


def whole(value: Any, *, keep: bool) -> Any:
    """Gathers split tensors within dictionaries, lists and tuples. Every rank has to call it.

    Args:
        value: Nested containers of tensors and plain values.
        keep: Whether this rank wants the result; others get None for a split tensor.

    Returns:
        The same with whole tensors in host memory where they were split.
    """
    if is_split(value):
        gathered = value.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: whole(each, keep=keep) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(each, keep=keep) for each in value)
    return value


def split_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's share of a whole tensor, as a parameter of that shape is split."""
    if not is_split(parameter) or tensor.shape != parameter.shape:
        return tensor
    mesh = parameter.device_mesh
    # Every rank read the same file: nothing is sent.
    return distribute_tensor(
        tensor.to(parameter.device), mesh, parameter.placements, src_data_rank=None
    )
