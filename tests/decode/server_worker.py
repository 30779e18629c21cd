"""Run by ``test_server_generator.py`` on two processes: process 0 sends the weights, the other waits."""

import sys
import time

import torch.distributed as dist

from generation_server import GenerationServer
from stemma.decode.rollout import LocalGenerator
from stemma.decode.server import ServerGenerator
from stemma.errors import ServerError
from stemma.models.tiny import tiny_model

dist.init_process_group("gloo")
rank = dist.get_rank()
model = tiny_model("llama", vocab_size=64, hidden_size=32, seed=1)
with GenerationServer(tiny_model("llama", vocab_size=64, hidden_size=32, seed=2)) as server:
    urls = [server.url]
    dist.broadcast_object_list(urls, src=0)
    generator = ServerGenerator(urls[0], weights="sync", weights_dir=sys.argv[1], eos_token_id=None, temperature=0.0)
    options = {"num_generations": 2, "max_new_tokens": 3}
    if rank == 0:
        time.sleep(1)  # so that the other has to wait
    rollouts = generator(model, [[rank + 1]], seed=rank, **options)
    local = LocalGenerator(eos_token_id=None, temperature=0.0)
    assert rollouts.completions == local(model, [[rank + 1]], seed=rank, **options).completions
    dist.barrier()
    assert len(server.bodies("/collective_rpc")) == (1 if rank == 0 else 0)
    assert len(server.bodies("/v1/completions")) == (4 if rank == 0 else 0)
    dist.barrier()

    if rank == 0:
        assert generator(model, [[1]], seed=rank, **options)  # not a collective call
    server.answer = lambda path, answer: (500, "out of memory")
    model.lm_head.weight.data.add_(1)
    generator.timeout = 2.0
    try:
        generator(model, [[rank + 1]], seed=rank, **options)
        raise AssertionError("the failure was not told")
    except ServerError as error:
        if ("process 0 did not send" if rank else "out of memory") not in str(error):
            raise
    dist.barrier()
dist.destroy_process_group()
print(f"rank {rank}: told")
