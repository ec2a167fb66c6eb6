"""Check a checkpoint byte by byte: `python -m ring_train.jobs.verify_checkpoint folder=DIR`.

DIR is RUN_DIR/checkpoints/step_00000100 or a run folder, which stands for its newest complete
checkpoint. Prints a digest of each full tensor, equal for equal states whatever layouts saved them,
and one of all. Exits 2 if the checkpoint is damaged.
"""

import hashlib
import sys
from pathlib import Path

from ring_train.config import VerifyCheckpointConfig, compose
from ring_train.runtime.errors import run_job


def main(overrides: list[str]) -> None:
    """Verify the checkpoint that the overrides name."""
    config: VerifyCheckpointConfig = compose("verify_checkpoint", overrides)

    from ring_train.checkpoint import find_checkpoint
    from ring_train.checkpoint.manifest import MERGED, read_manifest
    from ring_train.checkpoint.reading import tensor_digests

    folder = find_checkpoint(Path(config.folder), "folder")
    manifest = read_manifest(folder)
    digests = tensor_digests(folder, manifest)
    lines = [f"{digest}  {key}\n" for key, digest in sorted(digests.items())]
    sys.stdout.writelines(lines)
    total = hashlib.sha256("".join(lines).encode()).hexdigest()
    merged = manifest.saved_by.get(MERGED)
    origin = f"saved by {manifest.saved_by['world_size']} ranks"
    if merged:
        origin = f"merged from steps {merged['steps']} by curve={merged['curve']}"
    num_bytes = sum(file.num_bytes for file in manifest.files.values())
    sys.stdout.write(
        f"{folder} is whole: step {manifest.step}, {len(digests)} tensors, {num_bytes} bytes in "
        f"{len(manifest.files)} files, {origin}\n"
        f"{total}  all\n"
    )


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
