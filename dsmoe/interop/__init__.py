"""To and from other people's models: export to and import from Hugging Face, dense models made MoE.

`architectures` has an entry for each architecture of theirs, for either direction: what its config says of our options,
and what either side cannot express. `names` says which part of which of our tensors each of theirs is. Tensors are
moved one at a time (`files`, `tensors`), so that memory is bounded by the largest; `logits` compares what two models
compute. `transformers` is imported only here, and only to read their configs and to run their models.
"""
