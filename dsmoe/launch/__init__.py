"""What starts a run on a cluster, written from its YAML file: hostfiles, Slurm scripts, compose files."""
