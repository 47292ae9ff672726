#!/usr/bin/env bash
# A Slurm of two nodes on this machine's loopback, for the tests of the job templates. As root:
#     tests/slurm/setup.sh start DIR     everything that it writes is in DIR; then: export SLURM_CONF=DIR/slurm.conf
#     tests/slurm/setup.sh stop DIR
# Needs the packages slurm-wlm and munge. The daemons end by themselves after 30 minutes.
# Partitions: `low`, whose jobs have 60 s before they are requeued for a job in `high`.

set -Eeuo pipefail
PATH=$PATH:/usr/sbin

# Waits up to two minutes for a command to succeed.
await() {
  for ((i = 0; i < 1200; i++)); do
    if "$@" 2>/dev/null; then return; fi
    sleep 0.1
  done
  echo "error: still not so after two minutes: $* (logs: $dir/log)" >&2
  return 1
}

daemon() {
  timeout 1800 "$@" >>"$dir/log/${1##*/}" 2>&1 </dev/null &
  echo $! >>"$dir/pids"
}

nodes_are_idle() { [[ $(sinfo --noheader --partition=low --format='%t %D') == "idle 2" ]]; }
no_jobs() { [[ -z $(squeue --noheader) ]]; }

start() {
  mkdir -p "$dir"/{log,state,spool-127.0.0.1,spool-127.0.0.2}
  chmod 755 "$dir"
  (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
  local ports
  mapfile -t ports < <(python3 -c 'import socket
taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in taken), sep="\n")')

  # The nodes are named by addresses, because the job templates take the name of a node to reach it.
  cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
NodeName=127.0.0.1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=8
NodeName=127.0.0.2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=8
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL State=UP PriorityTier=2
CONF
  daemon munged --foreground --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
    --pid-file="$dir/munged.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed"
  await test -S "$dir/munge.socket"
  daemon slurmctld -D -i
  daemon slurmd -D -N 127.0.0.1
  daemon slurmd -D -N 127.0.0.2
  await nodes_are_idle
}

stop() {
  if timeout 10 scancel --user="$(id -un)"; then await no_jobs || true; fi
  xargs kill <"$dir/pids" || true
}

dir=$(realpath -m "$2")
export SLURM_CONF=$dir/slurm.conf
case $1 in
  start) trap stop ERR && start ;;
  stop) stop ;;
  *) echo "usage: $0 start|stop DIR" >&2 && exit 2 ;;
esac
