"""Elastic checkpoints: named boxes of global tensors, which any layout reads, and nothing that is executed.

`manifest` and `folder` say what is on the disk and whether it is whole, without torch. `state` says which boxes of
which tensors an engine of DeepSpeed's has here, `sharing` which of them this rank writes, `planning` and `storage` let
`torch.distributed.checkpoint` move them, and `checkpoints` is what the trainer calls.
"""
