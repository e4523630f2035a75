"""The batch script of a job: the options of sbatch, the environment, the ranks, and what happens when they end.

The script is written to be read: it stays in the run's folder, and its comments explain it to whoever opens it there.

Tested in tests/launch/start/test_launch_slurm.py.
"""

from __future__ import annotations

import shlex

from launch.start.config import SlurmConfig
from launch.start.job import Job
from runtime.errors import Interrupted, RecipeError, RunHeld, Superseded

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that torchrun passes on to its ranks."""


def render(job: Job) -> str:
    """Return the whole script."""
    parts = [_head(job), _environment(job), _tasks(job), MEETING, _ranks(job), SUPERVISION.format(**_exit_codes())]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _exit_codes() -> dict[str, int]:
    # Taken from the error classes, so that the script and the ranks cannot disagree about a code.
    kinds = (RecipeError, RunHeld, Superseded, Interrupted)
    return {kind.__name__: kind.exit_code for kind in kinds}


def _head(job: Job) -> str:
    """Return the `#SBATCH` lines. A site option that sbatch takes is rendered here."""
    config, folder = job.config, job.tasks[0].folder
    torchrun = config.launcher == "torchrun"
    cores = config.cpus_per_task or 1
    options = {
        "job-name": job.name,
        "chdir": job.working_folder,
        "output": folder / "logs" / ("job-%A_%a.log" if job.array else "job-%j.log"),
        # A requeued start writes into the same log, and must not erase what earlier starts wrote.
        "open-mode": "append",
        "array": f"0-{job.array - 1}" if job.array else None,
        "nodes": config.nodes,
        "ntasks-per-node": 1 if torchrun else config.ranks_per_node,
        # Not --gpus-per-task: it hides a node's other GPUs, and every rank would see its own as device 0.
        "gpus-per-node": ":".join(filter(None, [config.gpu_type, str(config.gpus_per_node)]))
        if config.gpus_per_node
        else None,
        "cpus-per-task": cores * config.ranks_per_node if torchrun else cores,
        "mem": config.memory,
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        # To the script alone (B:), which passes it on: so the tasks of every launcher and container get it.
        "signal": f"B:USR1@{config.stop_before}",
    }
    lines = [f"#SBATCH --{name}={_quote_option(value)}" for name, value in options.items() if value is not None]
    # A site may set JobRequeue=0; then SLURM requeues only jobs that ask for it.
    lines += ["#SBATCH --requeue", *(f"#SBATCH {line}" for line in config.sbatch)]
    return "\n".join(["#!/bin/bash", "# Written by `ligature launch slurm`; launch again rather than edit it.", *lines])


def _quote_option(value: object) -> str:
    """Return an option's value, in double quotes if it has unusual characters; sbatch reads quotes as a shell does."""
    text = str(value)
    if all(letter.isalnum() or letter in "-_./:%@+=,^~&|[]*" for letter in text):
        return text
    return '"' + text.replace('"', '\\"') + '"'


def _environment(job: Job) -> str:
    """Return the lines that set up modules, Python environment and variables."""
    config = job.config
    lines = ["# --- environment"]
    if config.modules:
        lines.append(f"module load {shlex.join(config.modules)}")
    if config.conda:
        lines += ['source "$(conda info --base)/etc/profile.d/conda.sh"', f"conda activate {_shell_path(config.conda)}"]
    if config.venv:
        lines.append(f"source {_shell_path(config.venv)}/bin/activate")
    variables = {"OMP_NUM_THREADS": str(job.threads)}
    if config.network_interface:
        variables |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), config.network_interface)
    lines += [f"export {name}={shlex.quote(value)}" for name, value in (variables | config.environment).items()]
    # `set -u` comes last: scripts of modules and conda use variables that are not set.
    return "\n".join([*lines, *config.setup, "set -u -o pipefail"])


def _shell_path(path: str) -> str:
    """Return a path in quotes, except for a leading ~, which the shell expands."""
    return "~/" + shlex.quote(path[2:]) if path.startswith("~/") else shlex.quote(path)


def _tasks(job: Job) -> str:
    """Return the lines that name the task's folder and command; an array has a list of each."""
    lines = ["# --- what to run"]
    if len(job.tasks) > 1:
        lines += ["folders=(", *(f"  {shlex.quote(str(task.folder))}" for task in job.tasks), ")"]
        lines += ["commands=(", *(f"  {shlex.quote(task.command)}" for task in job.tasks), ")"]
        lines += ["folder=${folders[$SLURM_ARRAY_TASK_ID]}", "command=${commands[$SLURM_ARRAY_TASK_ID]}"]
    else:
        lines += [f"folder={shlex.quote(str(job.tasks[0].folder))}", f"command={shlex.quote(job.tasks[0].command)}"]
    lines += [
        f"ligature={shlex.quote(job.ligature)}",
        f"ranks_per_node={job.config.ranks_per_node}",
        f"world={job.config.world}",
        f"max_crashes={job.config.max_crashes}",
        f"resumes={'yes' if job.resumes else ''}",
        "export folder command ligature ranks_per_node",
    ]
    return "\n".join(lines)


# The script itself runs on the first node, so its test of a port on 127.0.0.1 holds for the meeting place.
# The port depends on job and start, so two jobs that share a node do not collide.
MEETING = r"""
# --- where the ranks meet: the first node, by its name or, where names do not resolve, by its address; each start has its own port
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
start=${SLURM_RESTART_COUNT:-0}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if ! getent hosts "$first" > /dev/null; then
  first=$(scontrol --oneliner show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
fi
port=$((20000 + (SLURM_JOB_ID * 7 + start) % 12000))
while (: > "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done
export MASTER_ADDR=$first MASTER_PORT=$port job start
mkdir -p "$folder/launch" "$folder/logs"
events=$folder/launch/events.log
export exits=$folder/launch/exits-$job-$start
rm -f "$exits"
"""

# A signal may come before the rank's process id is known, so it is sent again after `read`.
# The subshell must survive a signal to report the code.
# It traps with `:`, as an ignored signal would stay ignored in the rank.
# An empty pipe instead of a code means that the subshell was killed as well: 137 is 128 + SIGKILL.
RANK = r"""
# --- a rank: its variables, its node's log, and its exit code on file (the first failure is the reason, later ones follow from it)
rank=$(cat <<'END'
VARIABLES
exec >> "$folder/logs/${SLURM_ARRAY_TASK_ID:+$SLURM_ARRAY_TASK_ID-}$SLURMD_NODENAME.log" 2>&1
[ "$LOCAL_RANK" = 0 ] && echo "=== $(date +%FT%T) job $job start $start on $SLURMD_NODENAME: $command"
process= asked=
hand_on() { # where SLURM tracks processes by cgroups, it signals this shell alone, not what the shell has started
  asked=$1
  [ -z "$process" ] || kill -s "$1" "$process" 2> /dev/null
}
for signal in TERM USR1 INT; do trap "hand_on $signal" "$signal"; done
trap : HUP
# The process id and then the exit code come through a pipe: `wait` of bash 5.2 loses the code of a background process that ends
# while a trap runs.
exec {pipe}< <(
  trap : TERM USR1 INT HUP
  (echo "$BASHPID"; eval "exec $ligature $command" >&2)
  echo $?
)
read -r process <&"$pipe"
[ -z "$asked" ] || kill -s "$asked" "$process"
read -r code <&"$pipe" || code=137
echo "$code rank $RANK on $SLURMD_NODENAME" >> "$exits"
exit "$code"
END
)
"""

VARIABLES = (
    """export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$ranks_per_node"""
)

NODE = r"""
# --- a node: torchrun starts its ranks and passes on the signals that ask them to stop
node=$(cat <<'END'
exec {}
END
)
export rank
"""


def _ranks(job: Job) -> str:
    """Return the definition of a rank, and the command line (`ranks`) that starts all of them."""
    config, container = job.config, job.config.container
    # --export=ALL: the ranks need the script's variables, even where a site's jobs are submitted with --export=NONE.
    # --kill-on-bad-exit, not --wait: a rank that ends early and well must not start a countdown for the others.
    srun = ["srun", "--export=ALL", "--kill-on-bad-exit=1", f"--cpus-per-task={_cores_of_a_task(config)}"]
    inside: list[str] = []
    # Commands hold absolute paths of these folders, so the container must show them under the same names.
    mounts = [
        f"{path}:{path}" for path in dict.fromkeys(str(p) for p in [job.working_folder, *(t.folder for t in job.tasks)])
    ]
    if container.kind == "pyxis":
        srun += [f"--container-image={container.image}", f"--container-mounts={','.join(mounts + container.mounts)}"]
        srun += [f"--container-workdir={job.working_folder}", *container.options]
    elif container.kind == "apptainer":
        binds = [f"--bind={mount}" for mount in mounts + container.mounts]
        inside = ["apptainer", "exec", *(["--nv"] if config.gpus_per_node else []), *binds]
        inside += [f"--pwd={job.working_folder}", *container.options, container.image]
    # torchrun sets its ranks' variables by itself.
    text = RANK.replace("VARIABLES\n", "" if config.launcher == "torchrun" else f"{VARIABLES}\n")
    program = '"$rank"'
    if config.launcher == "torchrun":
        torchrun = ["python", "-m", "torch.distributed.run", f"--nnodes={config.nodes}", "--node-rank=$SLURM_NODEID"]
        torchrun += [f"--nproc-per-node={config.ranks_per_node}", "--master-addr=$MASTER_ADDR"]
        torchrun += ["--master-port=$MASTER_PORT"]
        # A day, so that torchrun never kills ranks that are saving: SLURM ends what takes too long.
        # By default torchrun does not pass on SIGUSR1, SLURM's warning before the time limit.
        # Each rank runs under our own shell, which files its exit code: torchrun keeps none.
        torchrun += [f"--signals-to-handle={SIGNALS}", "--shutdown-timeout=86400", '--no-python bash -c "$rank"']
        # No environment is named, so `python` on the node could be another one than the launching Python.
        if job.ligature != "ligature":
            torchrun[0] = job.ligature.split(" -m ")[0]
        text += NODE.format(" ".join(torchrun))
        program = '"$node"'
    lines = "\n".join(f"  {word}" for word in map(shlex.quote, [*srun, *inside]))
    return text + f"\nranks=(\n{lines}\n  bash -c {program}\n)\n"


def _cores_of_a_task(config: SlurmConfig) -> int:
    """Return the cores of one task of srun.

    Since SLURM 22.05 srun does not take the number over from sbatch. Without it all loader workers share one core.
    """
    return (config.cpus_per_task or 1) * (config.ranks_per_node if config.launcher == "torchrun" else 1)


# `ours` comes before every requeue. Otherwise a cancelled job would rise again,
# and a script that outlived its node would requeue its own successor.
# At the time limit SLURM no longer shows RUNNING, but COMPLETING with Reason=TimeLimit.
# Crashes are counted over the job's life, not since its last progress: a run that crashes every night needs a look.
# Braces of the shell are doubled, as `render` fills in the exit codes by `str.format`.
SUPERVISION = r"""
# --- stop when asked, resume in the next start
say() {{ echo "$(date +%FT%T) job $job start $start: $*" | tee -a "$events"; }}

ours() {{ # whether SLURM still counts on this start: the job was not cancelled, requeued, or started elsewhere meanwhile
  state=
  for _ in {{1..60}}; do
    state=" $(scontrol --oneliner show job "$job") " && break
    sleep 30 # the controller does not answer
  done
  [[ $state =~ " JobState=RUNNING "|" Reason=TimeLimit " && $state == *" Restarts=$start "* ]]
}}

requeued= over= state=
requeue() {{
  requeued=yes
  say "$1; requeued, resumes from its last checkpoint"
  scontrol requeue "$job" || say "cannot be requeued here; launch it again"
}}

step= asked=
near_the_limit() {{
  [ -n "$resumes" ] || return # the stage may use the remaining time to finish
  asked="the time limit is near"
  say "asked to stop: $asked"
  [ -z "$step" ] || kill -USR1 "$step" # srun hands it to the ranks
}}
ending() {{ # SLURM has sent SIGTERM to the ranks too, and SIGKILL follows: a rank that has not saved by then resumes from an older checkpoint
  if ours && [[ $state == *" Reason=TimeLimit "* ]] && [ -z "$resumes" ]; then
    over=yes
    say "failed, not requeued: the time limit came, and this stage would start anew; launch it again with a longer --time"
  elif ours; then requeue "ended by the time limit before the ranks had stopped"; else say "being ended by SLURM (cancelled, requeued or preempted)"; fi
}}
trap near_the_limit USR1
trap ending TERM

say "started on $SLURM_JOB_NODELIST, ranks meet at $MASTER_ADDR:$MASTER_PORT"
"${{ranks[@]}}" &
step=$!
[ -z "$asked" ] || kill -USR1 "$step"
while true; do
  wait "$step"
  code=$?
  kill -0 "$step" 2> /dev/null || break # srun has ended; else a signal interrupted `wait`
done
wait "$step" 2> /dev/null # if srun ended while a signal interrupted `wait`, its own code is still available
last=$?
first_exit=$(grep -m 1 -v '^0 ' "$exits" 2> /dev/null) # `137 rank 3 on n2`
finished=$(grep -c '^0 ' "$exits" 2> /dev/null)
why=${{first_exit%% *}}
case $last in
  127) ;; # the loop has its code already
  -1 | 255) [ "$finished" = "$world" ] && code=0 || code=${{why:-$code}} ;; # bash 5.2 loses it if a trap was running: the codes of the ranks decide
  *) code=$last ;;
esac
why=${{why:-$code}}

last_error() {{ # of this start, in the log of the node whose rank ended first
  awk '/^=== / {{ line = "" }} /^(ligature[^:]*|srun: error): / || /^[A-Za-z_.]*(Error|Exception)(:|$)/ {{ line = $0 }} END {{ print line }}' \
    "$folder"/logs/*"${{first_exit##* }}.log" | tail -n 1 | cut -c 1-300
}}

if [ "$code" = 0 ] && [ "$finished" = "$world" ]; then # srun ends with 0 as well when it loses a node
  say "finished"
  exit 0
fi
[ -z "$over" ] || exit "$code"
if [ -n "$requeued" ] || ! ours; then
  say "ended with code $why, after SLURM had taken the job away"
  exit "$code"
fi
[ "$why" != 0 ] || why="0, though not every rank has finished"
case $why in
  {Interrupted} | 138 | 143) # saved, or ended by a signal before there was anything to save
    requeue "stopped: ${{asked:-asked by a signal (preemption)}}"
    exit {Interrupted} ;;
  {RecipeError}) say "failed, not requeued: $(last_error)"; exit "$code" ;;
  {RunHeld} | {Superseded}) say "failed, not requeued, as another process has the run: $(last_error)"; exit "$code" ;;
esac
if [ -n "$asked" ]; then
  requeue "stopped with code $why: $asked"
  exit {Interrupted}
fi
error=$(last_error)
crash="crashed with code ${{first_exit:-$why}}${{error:+: $error}}"
crashes=$(awk -v job="$job" '$3 == job && / start [0-9]+: held / {{ n = 0 }} $3 == job && / start [0-9]+: crashed / {{ n++ }} END {{ print n + 1 }}' "$events")
if [ "$crashes" -le "$max_crashes" ]; then
  requeue "$crash (crash $crashes of $max_crashes)"
else
  say "$crash"
  say "held after crash $crashes; fix the cause, then: scontrol release $job"
  scontrol update JobId="$job" Comment="held after crash $crashes: $crash"
  scontrol requeuehold "$job"
fi
exit $((code ? code : 1))
"""
