"""Where a sample comes from: `python -m ring_train.jobs.explain run=RUN_DIR sample=N [text=true]`.

Names the phase, the domain and, piece by piece, the documents with the tokens taken of each.
"""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from ring_train.config import ExplainConfig, compose
from ring_train.errors import UserError
from ring_train.runtime.errors import run_job


def main(overrides: list[str]) -> None:
    """Print what the sample that the overrides name is made of."""
    request: ExplainConfig = compose("explain", overrides)

    from ring_train.jobs.recorded_run import open_run

    plan, batches = open_run(Path(request.run))
    end = sum(phase.num_samples for phase in plan.phases)
    if not 0 <= request.sample < end:
        raise UserError(f"sample={request.sample} is not one of the run's; choose 0 to {end - 1}")
    place = batches.mixture.place(request.sample)
    name = batches.mixture.domains[place.domain]
    stream = batches.mixture.streams[name]
    pieces = stream.pieces(place.position, place.phase.batch.seq_length)
    row = batches.mixture.row(request.sample)
    sys.stdout.write(
        f"sample {request.sample}: phase {place.phase.name}, domain {name}, position "
        f"{place.position}, {place.phase.batch.seq_length - row.num_padding} tokens of "
        f"{stream.shard.prefix}\n"
    )
    decode = _decoder(plan.config.data.tokenizer) if request.text else None
    ids = document_ids(stream.shard.prefix, pieces.documents.tolist())
    for place_in_row, document in enumerate(pieces.documents.tolist()):
        begin, end_of = int(pieces.begins[place_in_row]), int(pieces.ends[place_in_row])
        length = int(stream.shard.lengths[document])
        source = source_of(stream.shard.manifest, document)
        sys.stdout.write(
            f"  document {document} {json.dumps(ids.get(document))}{source}, epoch "
            f"{int(pieces.epochs[place_in_row])}: tokens {begin} to {end_of} of {length}\n"
        )
        if decode is not None:
            first = int(stream.shard.begins(pieces.documents[[place_in_row]])[0])
            part = stream.shard.tokens[first + begin : first + end_of]
            sys.stdout.write(f"    {json.dumps(decode(part.tolist()), ensure_ascii=False)}\n")
    if place.phase.batch.seq_length not in row.document_starts and not row.num_padding:
        sys.stdout.write("the last token is only the label of the one before\n")


def document_ids(prefix: str, documents: list[int]) -> dict[int, str]:
    """Return {document: id} from PREFIX.ids, a JSON string a line; empty where there is none."""
    path = Path(f"{prefix}.ids")
    if not path.is_file():
        return {}
    wanted = sorted(set(documents))
    found: dict[int, str] = {}
    with path.open("rb") as lines:
        place = 0
        for document in wanted:
            line = next(islice(lines, document - place, None), None)
            place = document + 1
            if line is None:
                raise UserError(f"{path} ends before document {document}; tokenize again")
            found[document] = json.loads(line)
    return found


def source_of(manifest: dict[str, Any], document: int) -> str:
    """Return " from FILE" for a document, where the manifest says how many each file has."""
    first = 0
    for entry in manifest.get("inputs") or []:
        count = entry.get("documents")
        if count is None:
            return ""
        if document < first + count:
            return f" from {entry['name']}"
        first += count
    return ""


def _decoder(folder: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
