"""Layers that dense and MoE models share: linear, norm, attention, feed-forward, activations, loss."""
