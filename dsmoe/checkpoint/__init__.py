"""Elastic checkpoints: boxes of named global tensors, which any layout reads; nothing in one is executed.

`Shard`, `Box` and `ShardedTensor` (`dsmoe.parallel.sharding`) say where a rank's tensors lie in the global ones,
`placement` for every parameter of a model. A `Chunk` (`state`) is a box of a global tensor with its values in memory, a
`StoredChunk` (`manifest`) one with the place of its values on the disk. A save goes through

    checkpointer -> state (chunks of the engine) -> saving (copy, thread) -> dcp (planner, folder) -> safetensors

`manifest` and `folder` read the disk without torch; so do `compatibility`, `retention` and `inspection`.
"""
