"""Metrics of a run: definitions, reduction over ranks, routing statistics, console line, files."""
