"""Slurm: the job scripts `pretrain.sbatch` and `preflight.sbatch`, in which srun starts the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dsmoe.config.schema import Config
from dsmoe.exit_codes import DONE, FAILED, STOPPED, USER_ERROR
from dsmoe.launch.attempts import MOST_FAILURES
from dsmoe.launch.hosts import named_hosts
from dsmoe.launch.job import Job, Request
from dsmoe.launch.quoting import path_argument, shell_word, slurm_folder, slurm_option
from dsmoe.plan.text import quantity

SAVING_SECONDS = 300
"""The time from the signal to the time limit; Slurm checks every 30 seconds."""

_PARTITION = {"partition=gpu": "the line to change: one of those that `sinfo` lists"}
_AGAIN = {
    "time=24:00:00": "of one attempt, not of the run",
    f"signal=USR1@{SAVING_SECONDS}": "so many seconds before its end, the ranks are told to save and to stop",
    "requeue": "after a preemption or the failure of a node, Slurm queues the job again,",
    "open-mode=append": "... and what it then prints comes after what is there",
    "dependency=singleton": "another job of this name waits until this one is over",
    "output=%x-%j.out": "what this script says; the ranks have a file for each node, see below",
}
_ONCE = {"time=00:30:00": "", "no-requeue": "", "output=%x-%j.out": ""}

_SURROUNDINGS = """
# Python as `make install` has put it here. Another one: `module load ...`, `conda activate ...` in place of this line.
export PATH="$PWD/.venv/bin:$PATH"
export PYTHONUNBUFFERED=1
# Ranks share their node's cores: more threads for each make all of them slower, where they compute on the CPU.
export OMP_NUM_THREADS=1
# The ranks meet on the first node, at another port for each attempt; to choose them, export MASTER_ADDR, MASTER_PORT.
"""
_NCCL = """
# NCCL: WARN says what is wrong with a link, INFO which network it has chosen. A line that says NET/Socket where there
# is InfiniBand or RoCE is why a run is slow. The interface by which ranks find each other: cluster.interface.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# export NCCL_IB_HCA=mlx5_0,mlx5_1   # the adapters to use, where some are for storage: `ibstat` lists them
"""
_TASKS = """
# srun starts Python itself as each task: Slurm sends signals to every process of a task, and a shell would die of them.
#   --kill-on-bad-exit=0 --wait=120   when one rank has ended, the others have two minutes to say what they saw; then
#                                     they are killed. (On 1, they would be killed at once, also while they save.)
#   --cpu-bind=none                   a rank may use all cores of its node; --cpu-bind=cores ties it to its share
# In a container (docs/containers.md), with Pyxis: srun ... --container-image="$PWD/dsmoe.sqsh" \\
#     --container-mounts="$PWD:$PWD" --container-workdir="$PWD" python /opt/dsmoe/launch/...
# With Apptainer: srun ... apptainer exec --nv --bind "$PWD" dsmoe.sif python /opt/dsmoe/launch/...
"""
_TORCHRUN = """\
# One task per node, and torchrun in it: --ntasks-per-node=1 above, and in place of `python`
#   torchrun --nnodes "$SLURM_NNODES" --nproc-per-node {devices} --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \\
#     --rdzv-endpoint "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29400" launch/pretrain.py ...
# It kills ranks that still save 30 s after a signal, and turns their exit code, {stopped}, into 1, which \
counts as a failure.
"""
_WATCHED = """
srun {options} \\
    --label --output="${{logs//%/%%}}/%j-%N.log" --open-mode=append \\
    python {program} &
step=$!

# Before the time limit, Slurm sends USR1 to the ranks; to this shell only where that is asked for (`--signal=B:`,
# `scancel --batch`), and then it hands it on. When Slurm ends the job (preemption, scancel, requeue, time limit), all
# of them get TERM. At either signal the ranks agree on a step, save a checkpoint and exit with {stopped}.
trap 'interrupted=1; kill -USR1 "$step"' USR1
trap 'interrupted=1 ending=1' TERM

code='' ending=''
until [[ $code ]]; do # a signal ends `wait`, not what is waited for
    interrupted=''
    wait "$step"
    status=$?
    [[ $interrupted ]] || code=$status
done

# srun's code is 0 also where it could start nothing. Ranks that have begun write this file anew.
if [[ $code == {done} && ! $run/.token -nt $run/.lock ]]; then
    say "srun has ended with 0, and no rank has begun: see above"
    code={failed}
fi

# What Slurm itself ends, it queues again, unless somebody has cancelled it. Else dsmoe.launch.attempts looks at the
# exit code: {stopped}, again; {done}, the run is done; {user_error}, the input \
is wrong and stays so; any other is a failure: again, but not
# when {failures} attempts have failed and none got further than those before.
for pause in 10 20 40 0; do # Slurm may be busy, or be restarted, for a moment
    state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T) && [[ $state || $ending ]] && break
    sleep "$pause"
done
[[ $state || $ending ]] || state=RUNNING
if [[ $state != RUNNING ]]; then
    say "exit code $code; Slurm ends this attempt (${{state:-unknown}})"
elif why=$(python3 -m dsmoe.launch.attempts "$run" "$code"); then
    say "$why; queueing the job again"
    scontrol requeue "$SLURM_JOB_ID" || [[ $ending ]] || say "which failed: submit it again, and it goes on"
else
    say "$why"
fi
exit "$code"
"""


def job(request: Request) -> Job:
    """Return both scripts; the partition's name is the line to change on another cluster."""
    files = {"pretrain.sbatch": _pretrain(request), "preflight.sbatch": _preflight(request)}
    return Job(files, f"sbatch {request.path_of('pretrain.sbatch')}")


def _pretrain(request: Request) -> str:
    config = request.config
    devices = config.cluster.devices_per_node
    run = slurm_folder(str(Path(config.runs_dir) / config.name), "runs_dir")
    config_file = shell_word(path_argument(request.path), "the config's path")
    title = f"Pretrain {config.name} on {_ranks(config)}, attempt after attempt until its last step is done."
    folder = rf"""
set -u
run={run}
config={config_file}
logs=$run/logs # of the ranks: JOB-NODE.log
say() {{ echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }}
if [[ ! -f $config ]]; then
    say "there is no $config here, in $PWD: submit this where \`dsmoe launch\` was typed"
    exit {USER_ERROR}
fi
if ! {{ mkdir -p "$logs" && touch "$run/.lock" && [[ -w $logs ]]; }}; then
    say "cannot write in $run: runs_dir must be a folder that you may write to, on storage that all nodes share"
    exit {USER_ERROR}
fi
# On a node that cannot open the ranks' log, srun starts none, and those of the others would wait for it.
if ! srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --label test -w "$logs"; then
    say "not every node can write in $run: runs_dir, and this folder, must be on storage that all nodes share"
    exit {USER_ERROR}
fi
attempt=${{SLURM_RESTART_COUNT:-0}}
[[ $attempt =~ ^[0-9]{{1,9}}$ ]] && attempt=$((10#$attempt + 1)) # of anything else, bash would make what it likes
say "attempt $attempt on $SLURM_JOB_NODELIST; its ranks write to $logs/$SLURM_JOB_ID-*.log"

# A node that Slurm has lost may still run rank 0 of the last attempt: it holds the run's folder until it finds out.
flock --nonblock --conflict-exit-code 9 "$run/.lock" true
if [[ $? == 9 ]]; then
    say "waiting for a process that still trains in $run"
    flock --wait 3600 "$run/.lock" true
fi
"""
    watched = _WATCHED.format(
        options="--kill-on-bad-exit=0 --wait=120 --cpu-bind=none",
        program=request.program(),
        failures=MOST_FAILURES,
        **{"done": DONE, "failed": FAILED, "user_error": USER_ERROR, "stopped": STOPPED},
    )
    return "".join(
        [
            _header(request, "pretrain.sbatch", title, config.name, _AGAIN),
            _surroundings(config),
            folder,
            _TASKS,
            _TORCHRUN.format(devices=devices, stopped=STOPPED),
            watched,
        ]
    )


def _preflight(request: Request) -> str:
    config = request.config
    title = (
        f"Check {_ranks(config)} before {config.name} trains on them: exit code {FAILED} where something is far off."
    )
    start = f"srun --kill-on-bad-exit=0 --wait=120 --cpu-bind=none python {request.program('preflight')}\n"
    return "".join(
        [
            _header(request, "preflight.sbatch", title, f"{config.name}_preflight", _ONCE),
            _surroundings(config),
            _TASKS,
            start,
        ]
    )


def _header(request: Request, script: str, title: str, name: str, options: Mapping[str, str]) -> str:
    """The lines that Slurm reads: the job's name and sizes, and the options of this script."""
    cluster = request.config.cluster
    elastic = "; another number will do, by cluster.elastic" if cluster.elastic else ""
    sizes = {
        f"job-name={slurm_option(name, 'name')}": "",
        f"nodes={cluster.nodes}": f"cluster.nodes{elastic}",
        f"ntasks-per-node={cluster.devices_per_node}": "a task is a rank, and drives one device",
    }
    if named_hosts(request.config):
        sizes[f"nodelist={slurm_option(str(cluster.hosts), 'cluster.hosts')}"] = (
            "cluster.hosts; without this line, Slurm chooses"
        )
    if cluster.device != "cpu":
        sizes[f"gpus-per-node={cluster.devices_per_node}"] = "each rank sees all of its node's, as NCCL wants it"
    whole = {"exclusive": "whole nodes: all cores,", "mem=0": "... and all memory"}
    lines = [
        f"#SBATCH --{option:<26}{f'# {comment}' if comment else ''}".rstrip()
        for option, comment in {**_PARTITION, **sizes, **whole, **options}.items()
    ]
    lines.insert(1, f"# #SBATCH --{'account=...':<24}# where your site wants one")
    return (
        f"#!/bin/bash\n# {title}\n# Written by: {request.written_by('--slurm')}\n"
        f"# Submit it in the folder where that was typed, which all nodes share: sbatch {request.path_of(script)}\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _surroundings(config: Config) -> str:
    return _SURROUNDINGS if config.cluster.device == "cpu" else _SURROUNDINGS + _NCCL


def _ranks(config: Config) -> str:
    cluster = config.cluster
    return f"{quantity(cluster.nodes, 'node')} with {quantity(cluster.devices_per_node, 'device')} each"
