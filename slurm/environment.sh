# Settings of the environment of every job and rank: threads, network, diagnosis, caches.
# shellcheck shell=bash
#
# Each is set only where it is unset: export another value before sbatch to override it. Site-wide
# choices (which InfiniBand devices, which interface) belong into your shell or into a copy of a line
# below.

# Processors
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}" # threads of a rank on CPUs: what --cpus-per-task gave it
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}" # ranks tokenize nothing that is worth threads
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # kernels start in the order of launch, so that megatron's TP and SP communication overlaps (before Blackwell)
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}" # less fragmentation where the sizes of expert batches vary

# Network
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" # INFO prints which devices, rings and trees NCCL chose: look once on a new cluster
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-^lo,docker,virbr}" # interfaces of NCCL's bootstrap: all but these prefixes; a name such as ib0 on clusters with several networks
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}" # 17 s: a fabric that reroutes round a broken link takes longer than the default of 1 s
export NCCL_NET_GDR_LEVEL="${NCCL_NET_GDR_LEVEL:-PHB}" # GPU direct RDMA to network cards below the same CPU, not across sockets
[[ -z ${RING_TRAIN_INTERFACE:-} ]] || export GLOO_SOCKET_IFNAME="$RING_TRAIN_INTERFACE" # interface of gloo (CPU ranks, control messages); unset: that of the host's name

# Diagnosis
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}" # a failed collective ends the rank, and so the job learns of it
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}" # flight recorder: the last collectives of each rank
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}" # write them when a collective hangs
[[ -z ${RING_TRAIN_RUN_DIR:-} ]] || export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$RING_TRAIN_RUN_DIR/stacks/collectives_${SLURM_JOB_ID:-0}_}" # to there; the rank is appended
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}" # stacks in the log when native code crashes
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}" # the log ends where the job ended

# Caches
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # nothing is downloaded in a job
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-${UID}-${SLURM_JOB_ID:-0}}" # compiled kernels on the node's own disk: shared file systems are slow and race
