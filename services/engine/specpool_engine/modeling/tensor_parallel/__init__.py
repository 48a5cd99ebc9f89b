"""Tensor parallelism: one model split over the devices of one machine, a process per device.

Rank 0 is the engine's own process. It decides everything: what runs, which blocks hold what. Before each forward it
sends the other ranks, its *followers*, the block tables and tokens; then all ranks compute the same forward on their
part of the weights, with their part of the heads in their own KV cache, and `transformers` adds the parts up and
gathers the logits. Followers never decide and never sample.

    settings   how a model is split, and what can be
    messages   what rank 0 tells its followers
    shard      one rank's part: joining the process group, loading, allocating
    follower   the process of a rank above 0
    leader     rank 0: starts followers, watches them, and is the model that an engine sees

Messages travel over a socket pair per follower, not over the process group: a follower waits for the next one without
a deadline, and whoever outlives the other sees it at once. `transformers` splits over the *default* process group, so a
process has at most one such model, and other uses of `torch.distributed` need groups of their own.
"""
