"""Checks before a long job: every device, node and link is like the others, and as the config promises."""
