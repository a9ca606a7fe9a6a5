"""Launching on a cluster: hostfiles, Slurm scripts and compose files, written from the YAML file of a run."""
