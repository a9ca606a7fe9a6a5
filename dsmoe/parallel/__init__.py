"""Live process groups, collectives that autograd understands, and pieces of tensors."""

from dsmoe.parallel.groups import ExpertGroup, Groups, TensorGroup

__all__ = ["ExpertGroup", "Groups", "TensorGroup"]
