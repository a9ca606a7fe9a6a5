"""Conversion to and from other people's models: Hugging Face export and import, dense models upcycled to MoE.

`architectures` has an entry for each Hugging Face architecture, for both directions: what its config says of dsmoe's
options, and what either side cannot express. `names` maps each of its tensors to a box of one of dsmoe's. Tensors are
moved one at a time (`model_files`, `tensors`), so that memory is bounded by the largest; `logits` compares two models.
`transformers` is imported only in this package, and only to read its configs and to run its models.

In names, `ours` is dsmoe's and `hf` is Hugging Face's.
"""
