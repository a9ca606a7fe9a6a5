"""To and from other people's models: export to and import from Hugging Face, dense models made MoE.

`names` says which part of which of our tensors each of theirs is, for either direction; `architectures` which of our
options theirs can express, and `sections` the reverse. Tensors are moved one at a time (`files`, `tensors`), so that
memory is bounded by the largest; `logits` compares what two models compute. `transformers` is imported only here, and
only to read their configs and to run their models.
"""
