"""Run by ``test_distributed.py`` on two processes: gradients under DDP and FSDP2 against plain ones of all data."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import stemma
from decoders import decoder, random_tree
from stemma.models.adapter import base_model

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()


def fresh():
    torch.manual_seed(0)
    return decoder(dtype=torch.float32)


reference, tree = fresh(), random_tree(rank)
for number in range(world):
    stemma.score(reference, random_tree(number), mode="plain").logprobs.sum().backward()

for kind in ("ddp", "fsdp2"):
    model = fresh()
    if kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        stemma.disable(model)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        stemma.enable(model)
    stemma.score(model, tree, mode="shared").logprobs.sum().backward()
    for (name, got), want in zip(base_model(model).named_parameters(), reference.parameters(), strict=True):
        grad = got.grad.full_tensor() if hasattr(got.grad, "full_tensor") else got.grad
        error = float((grad * world - want.grad).norm() / want.grad.norm())
        assert error < 1e-4, f"{kind}: gradient of {name} is off by {error:.1e}"
    # One rank has nothing to score: the others wait for its gradients, which are zeros.
    some = tree if rank == 0 else stemma.PrefixTree.from_groups([[1, 2, 3]], [[[], []]])
    half = fresh()
    stemma.score(half, random_tree(0), mode="shared").logprobs.sum().backward()
    for mode in ("shared", "plain"):
        model.zero_grad()
        stemma.score(model, some, mode=mode).logprobs.sum().backward()
        for (name, got), want in zip(base_model(model).named_parameters(), half.parameters(), strict=True):
            grad = got.grad.full_tensor() if hasattr(got.grad, "full_tensor") else got.grad
            error = float((grad * world - want.grad).norm() / want.grad.norm())
            assert error < 1e-4, f"{kind}, nothing scored on a rank: gradient of {name} is off by {error:.1e}"
    try:
        stemma.score(model, tree, mode="shared", max_tokens=12)
        raise AssertionError(f"{kind}: streaming was not refused")
    except stemma.UnsupportedModelError:
        pass
dist.barrier()
dist.destroy_process_group()
print(f"rank {rank}: equal")
