#!/usr/bin/env bash
# A real Slurm cluster of several nodes on this one machine, for tests: no systemd, nothing written to /etc.
#
#   slurm/local_cluster.sh up           start it (installs Debian's packages where they are missing); prints SLURM_CONF
#   slurm/local_cluster.sh down         end it, with every process of every node; removes its folder
#   slurm/local_cluster.sh status       nodes and jobs
#   slurm/local_cluster.sh node-down N  node N loses power: all its processes are killed at once
#   slurm/local_cluster.sh node-up N    node N boots again
#
# Each node is one slurmd in namespaces of its own: network (an address on a private bridge, its own loopback and ports,
# no way out), host name, processes, and an /etc/hosts that names the nodes. They share the file system. GPUs are device
# files that lead nowhere: Slurm counts them and sets CUDA_VISIBLE_DEVICES.
#
# Settings, as variables: NODES GPUS CPUS MEM (MB), ACCOUNTING=1 for slurmdbd and MariaDB (sacct, which NeMo-Run needs),
# URLVR_SLURM_ROOT (the folder of everything that is written).
set -euo pipefail
NODES=${NODES:-4} GPUS=${GPUS:-8} CPUS=${CPUS:-16} MEM=${MEM:-32000} ACCOUNTING=${ACCOUNTING:-0}
ROOT=${URLVR_SLURM_ROOT:-/tmp/urlvr-slurm}
NETWORK=10.77.0 BRIDGE=urlvr-slurm CONTROLLER=10.77.0.254
export SLURM_CONF=$ROOT/etc/slurm.conf
HALF=$(((NODES + 1) / 2))

die() { echo "local_cluster.sh: $*" >&2; exit 1; }
alive() { [[ -s $1 ]] && kill -0 "$(<"$1")" 2>/dev/null; }
started() { echo "$2" >"$ROOT/run/$1.pid"; disown "$2" 2>/dev/null || true; }   # started NAME PID: what `down` ends
until_true() {                                        # until_true SECONDS COMMAND...
  local deadline=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS >= deadline)); then return 1; fi
    sleep 0.1
  done
}

preconditions() {
  ((EUID == 0)) || die "needs root, for network namespaces and Slurm's daemons; this is $(id -un)."
  command -v ip nsenter unshare >/dev/null || die "needs ip, nsenter and unshare (Debian: iproute2, util-linux)."
  unshare --net --uts --mount --pid --fork --mount-proc true 2>/dev/null ||
    die "this machine does not let root make namespaces (unshare failed); containers need --privileged."
  if ip link show "$BRIDGE" >/dev/null 2>&1; then
    die "another cluster is up, or was not ended (network bridge $BRIDGE exists): run 'down' first, with its URLVR_SLURM_ROOT."
  fi
}

packages() {
  local wanted=(slurmctld slurmd slurm-client munge) missing=()
  if ((ACCOUNTING)); then wanted+=(slurmdbd mariadb-server); fi
  for package in "${wanted[@]}"; do dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package"); done
  if ((${#missing[@]} == 0)); then return; fi
  command -v apt-get >/dev/null || die "needs ${missing[*]}, and there is no apt-get to install them with."
  echo "installing ${missing[*]}" >&2
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$ROOT/log/apt.log" 2>&1 ||
    die "apt-get could not install ${missing[*]}: $(tail -n 3 "$ROOT/log/apt.log")"
}

configure() {
  umask 022
  for i in $(seq "$NODES"); do mkdir -p "$ROOT/spool/node$i"; done
  for g in $(seq 0 $((GPUS - 1))); do mknod "$ROOT/dev/nvidia$g" c 1 3; done   # what /dev/null is
  (umask 077; dd if=/dev/urandom of="$ROOT/munge/key" bs=1024 count=1 status=none)
  chown -R munge:munge "$ROOT/munge"
  { echo "127.0.0.1 localhost"; echo "$CONTROLLER slurmctl"
    for i in $(seq "$NODES"); do echo "$NETWORK.$i node$i"; done; } >"$ROOT/etc/hosts"
  echo "NodeName=node[1-$NODES] Name=gpu File=$ROOT/dev/nvidia[0-$((GPUS - 1))]" >"$ROOT/etc/gres.conf"
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$ROOT/etc/cgroup.conf"
  # cred_expire: a requeued job waits so long before it starts (120 s by default). NoInAddrAny, without "Ctld", would
  # make srun hang inside of jobs. config_overrides: nodes may claim more cores than there are.
  cat >"$SLURM_CONF" <<CONF
ClusterName=urlvr
SlurmctldHost=slurmctl($CONTROLLER)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$ROOT/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$ROOT/run/slurmctld.own
SlurmdPidFile=$ROOT/run/slurmd.%n.own
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=10
GresTypes=gpu
$(accounting_lines)
$(for i in $(seq "$NODES"); do
  echo "NodeName=node$i NodeAddr=$NETWORK.$i Port=$((17000 + i)) CPUs=$CPUS Boards=1 SocketsPerBoard=1" \
    "CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM Gres=gpu:$GPUS State=UNKNOWN"
done)
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=train Nodes=node[1-$HALF] MaxTime=INFINITE State=UP
$( ((NODES > HALF)) && echo "PartitionName=rollout Nodes=node[$((HALF + 1))-$NODES] MaxTime=INFINITE State=UP")
CONF
}

accounting_lines() {
  if ! ((ACCOUNTING)); then echo "AccountingStorageType=accounting_storage/none"; return; fi
  printf 'AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n'
  printf 'AccountingStoragePort=16819\nAccountingStoragePass=%s/munge/socket\nAccountingStorageTRES=gres/gpu\n' "$ROOT"
}

start_munge() {
  runuser -u munge -- munged --force --key-file="$ROOT/munge/key" --socket="$ROOT/munge/socket" \
    --pid-file="$ROOT/munge/pid" --log-file="$ROOT/munge/log" --seed-file="$ROOT/munge/seed" 2>"$ROOT/log/munged.out"
  started munged "$(<"$ROOT/munge/pid")"
}

start_accounting() {
  local socket=$ROOT/db/socket
  mkdir -p "$ROOT/db/data"; chown -R mysql:mysql "$ROOT/db"
  mariadb-install-db --no-defaults --user=mysql --datadir="$ROOT/db/data" --auth-root-authentication-method=socket \
    --skip-test-db >"$ROOT/log/mariadb-install.out" 2>&1 || die "no database: $(tail -n 3 "$ROOT/log/mariadb-install.out")"
  setsid mariadbd --no-defaults --user=mysql --datadir="$ROOT/db/data" --socket="$socket" --skip-networking \
    --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 \
    </dev/null >"$ROOT/log/mariadbd.out" 2>&1 &
  started mariadbd $!
  until_true 120 mariadb-admin --no-defaults --socket="$socket" ping || die "MariaDB did not start: see $ROOT/log."
  (umask 077; cat >"$ROOT/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$ROOT/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
LogFile=$ROOT/log/slurmdbd.log
PidFile=$ROOT/run/slurmdbd.own
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
CONF
  )
  MYSQL_UNIX_PORT=$socket setsid slurmdbd -D </dev/null >"$ROOT/log/slurmdbd.out" 2>&1 &
  started slurmdbd $!
  until_true 120 sacctmgr -n show cluster || die "slurmdbd did not start: see $ROOT/log."
  { sacctmgr -i add cluster urlvr; sacctmgr -i add account urlvr description=urlvr organization=urlvr
    sacctmgr -i add user root account=urlvr; } >"$ROOT/log/sacctmgr.out" 2>&1 || true   # some exist from the start
}

start_network() {
  ip link add "$BRIDGE" type bridge
  ip addr add "$CONTROLLER/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  for i in $(seq "$NODES"); do
    ip netns add "urlvr-node$i"
    ip link add "urlvr-veth$i" type veth peer name eth0 netns "urlvr-node$i"
    ip link set "urlvr-veth$i" master "$BRIDGE" up
    ip -n "urlvr-node$i" link set lo up
    ip -n "urlvr-node$i" addr add "$NETWORK.$i/24" dev eth0
    ip -n "urlvr-node$i" link set eth0 up
  done
}

stop_network() {
  for name in $(ip netns list | awk '/^urlvr-node[0-9]+/ {print $1}'); do ip netns del "$name"; done   # and its veth
  ip link del "$BRIDGE" 2>/dev/null || true
}

# nsenter, not "ip netns exec", which would hide the cgroups. The shell is the node's process 1: it reaps, and when it is
# killed the kernel kills every process of the node.
node_up() {
  if alive "$ROOT/run/node$1.pid"; then return; fi
  [[ -d $ROOT/spool/node$1 ]] || die "there is no node $1 in $ROOT."
  setsid nsenter --net="/run/netns/urlvr-node$1" unshare --uts --mount --pid --fork --kill-child=KILL --mount-proc \
    bash -c "hostname node$1; mount --bind $ROOT/etc/hosts /etc/hosts
      env -i PATH=\"\$PATH\" HOME=\"\$HOME\" SLURM_CONF=$SLURM_CONF slurmd -D -N node$1 -f $SLURM_CONF & wait \$!" \
    </dev/null >"$ROOT/log/node$1.out" 2>&1 &
  started "node$1" $!
}

stop() {   # stop NAME SIGNAL: our own pid, then wait for its end
  local file=$ROOT/run/$1.pid pid
  [[ -s $file ]] || return 0
  pid=$(<"$file")
  kill "-$2" "$pid" 2>/dev/null || true
  gone() { ! kill -0 "$pid" 2>/dev/null || [[ $(awk '{print $3}' "/proc/$pid/stat") == Z ]]; }
  until_true 10 gone || kill -KILL "$pid" 2>/dev/null || true
  rm -f "$file"
}

nodes_ready() { (($(sinfo -h -N -p batch -t idle,alloc,mix -o %N | wc -l) == NODES)); }

up() {
  if alive "$ROOT/run/slurmctld.pid" && nodes_ready; then echo "export SLURM_CONF=$SLURM_CONF"; return; fi
  preconditions
  mkdir -p "$ROOT"/{etc,log,run,state,munge,dev,spool} && chmod 755 "$ROOT"
  packages
  trap 'status=$?; trap - EXIT; if ((status)); then echo "local_cluster.sh: giving up; logs were in $ROOT/log:" >&2
    tail -qn 5 "$ROOT"/log/*.out "$ROOT"/log/slurm*.log >&2; down; fi; exit $status' EXIT
  configure
  start_network
  start_munge
  if ((ACCOUNTING)); then start_accounting; fi
  setsid unshare --uts --mount bash -c "hostname slurmctl; mount --bind $ROOT/etc/hosts /etc/hosts
    exec slurmctld -D -c -f $SLURM_CONF" </dev/null >"$ROOT/log/slurmctld.out" 2>&1 &
  started slurmctld $!
  for i in $(seq "$NODES"); do node_up "$i"; done
  until_true 60 nodes_ready || die "not all of the $NODES nodes came up."
  trap - EXIT
  echo "export SLURM_CONF=$SLURM_CONF"
}

down() {
  [[ -d $ROOT ]] || return 0
  for file in "$ROOT"/run/node*.pid; do if [[ -e $file ]]; then stop "$(basename "$file" .pid)" KILL; fi; done
  for name in slurmctld slurmdbd mariadbd munged; do stop "$name" TERM; done
  stop_network
  rm -rf "$ROOT"
}

case "${1:-}" in
  up) up ;;
  down) down ;;
  status) alive "$ROOT/run/slurmctld.pid" || die "no cluster is up in $ROOT."; sinfo -N -o '%N %P %T %G'; squeue ;;
  node-down) stop "node${2:?which node}" KILL ;;
  node-up) node_up "${2:?which node}" ;;
  *) die "give one of up, down, status, node-down N, node-up N." ;;
esac
