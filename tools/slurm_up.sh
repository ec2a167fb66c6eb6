#!/usr/bin/env bash
# A Slurm cluster on this machine: munged, slurmctld and NODES slurmd, on the loopback interface only.
#
#   source <(tools/slurm_up.sh)       # start it, and point this shell's sbatch at it
#   tools/slurm_down.sh               # end it
#
# Needs the Debian packages munge, slurmctld, slurmd and slurm-client; no systemd, no cgroups, no GPU,
# and no root where they are installed. Everything it writes lies in RING_TRAIN_SLURM; no file outside
# is touched. Standard output is shell code that exports SLURM_CONF.
set -euo pipefail

state=${RING_TRAIN_SLURM:-/tmp/ring_train_slurm.$UID}  # configuration, sockets, logs, spool
nodes=${NODES:-2}     # virtual nodes node0, node1, ...
cpus=${CPUS:-4}       # CPUs that each says it has, more or fewer than this machine's share
gpus=${GPUS:-2}       # fake GPUs of a node: jobs get CUDA_VISIBLE_DEVICES and nothing behind it
port=${PORT:-26817}   # of slurmctld; node i has PORT + 1 + i
kill_wait_s=${KILL_WAIT_S:-20}  # from SIGTERM to SIGKILL of a job that is cancelled or timed out
PATH=$PATH:/usr/sbin:/sbin

say() { echo "slurm_up: $*" >&2; }
fail() { say "$*"; exit 1; }

for program in munged munge slurmctld slurmd sbatch; do
    command -v $program >/dev/null || fail "$program is not installed; apt-get install munge slurmctld slurmd slurm-client"
done
export SLURM_CONF=$state/slurm.conf
if [[ -e $SLURM_CONF ]] && scontrol ping 2>/dev/null | grep -q 'is UP'; then
    say "is up already, in $state"
    echo "export SLURM_CONF=$SLURM_CONF"
    exit 0
fi
mkdir -p "$state"/{control,log,devices}
chmod 755 "$state"

# Every daemon of this cluster and every command proves itself with this key.
head -c 1024 /dev/urandom >"$state/munge.key"
chmod 400 "$state/munge.key"
rm -f "$state"/munge.socket*
munged --force --num-threads 2 --key-file "$state/munge.key" --socket "$state/munge.socket" \
    --pid-file "$state/munged.pid" --log-file "$state/log/munged.log" --seed-file "$state/munge.seed" \
    2>"$state/log/munged.err" || { cat "$state/log/munged.err" >&2; fail "munged does not start"; }

host=$(hostname -s)
user=$(id -un)
{
    cat <<CONF
ClusterName=ring_train
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for the credentials of its last start to expire: 120 s by default.
AuthInfo=socket=$state/munge.socket,cred_expire=5
StateSaveLocation=$state/control
SlurmdSpoolDir=$state/spool-%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd-%n.pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdLogFile=$state/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=$kill_wait_s
OverTimeLimit=0
MinJobAge=7200
InactiveLimit=0
SlurmctldTimeout=60
SlurmdTimeout=120
MessageTimeout=30
SlurmdParameters=config_overrides
GresTypes=gpu
CONF
    for ((i = 0; i < nodes; i++)); do
        echo "NodeName=node$i NodeHostname=node$i NodeAddr=127.0.0.1 Port=$((port + 1 + i))" \
            "CPUs=$cpus RealMemory=16000 Gres=gpu:$gpus State=UNKNOWN"
    done
    echo "PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60"
    echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF"
} >"$SLURM_CONF"
echo "AutoDetect=off" >"$state/gres.conf"
for ((i = 0; i < gpus; i++)); do
    # slurmd wants character devices; a pseudo terminal's master will do where mknod is forbidden.
    device=$state/devices/gpu$i
    [[ -c $device ]] || mknod "$device" c 1 3 2>/dev/null || ln -sf /dev/null "$device"
    echo "NodeName=node[0-$((nodes - 1))] Name=gpu File=$device" >>"$state/gres.conf"
done

slurmctld -c -f "$SLURM_CONF"
for ((i = 0; i < nodes; i++)); do
    mkdir -p "$state/spool-node$i"
    slurmd -f "$SLURM_CONF" -N "node$i"
done
for ((tries = 0; tries < 300; tries++)); do
    idle=$(sinfo -h -N -p normal -t idle -o %N 2>/dev/null | sort -u | wc -l)
    [[ $idle == "$nodes" ]] && break
    sleep 0.1
done
[[ $idle == "$nodes" ]] || { tail -n 20 "$state"/log/*.log >&2; fail "$idle of $nodes nodes are idle after 30 s"; }
say "$nodes nodes of $cpus CPUs and $gpus fake GPUs are up; logs in $state/log"
echo "export SLURM_CONF=$SLURM_CONF"
