"""The whole curation: read, passes and searches, then one folder renamed into place.

Work in progress lies in OUTPUT.partial. A rerun with the same steps and inputs takes up whole
blocks from there and does the rest; with others it starts afresh.
"""

import dataclasses
import hashlib
import logging
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.config import PipelineError, nearest, typed_node
from data_pipeline.curation.arguments import Compression, Curate, Dropped
from data_pipeline.curation.contamination import build_index, evaluation_files
from data_pipeline.curation.duplicates import check_num_blocks, find_duplicates
from data_pipeline.curation.nodes import STEPS, WHOLE_CORPUS, Decontaminate, NearDedup, Sample
from data_pipeline.curation.output import FORMAT_VERSION, publish
from data_pipeline.curation.passes import NamedStep, Pass, prepared_folder, run_block, split_passes
from data_pipeline.curation.reading import Corpus, read_corpus
from data_pipeline.curation.rules import build_rule
from data_pipeline.curation.stages import Stage, read_tally, write_record
from data_pipeline.curation.tally import Tally
from data_pipeline.curation.words import word_tokenizer
from data_pipeline.curation.work_folder import claim, is_finished, locked
from data_pipeline.curation.workers import run_all, start_workers
from data_pipeline.documents import file_sha256
from data_pipeline.sources import Input, find_inputs

logger = logging.getLogger(__name__)


def curate(config: Curate) -> None:
    """Write the curated documents and their report to the output folder.

    Raises:
        PipelineError: a key, value, package, input or count is wrong; no output appears.
    """
    for name in ("block_documents", "file_bytes"):
        if getattr(config, name) < 1:
            raise PipelineError(f"{name}={getattr(config, name)} is below 1")
    steps = read_steps(config.steps)
    inputs = find_inputs(config.input)
    output, work = Path(config.output), Path(f"{config.output}.partial")
    identity = _identity(config, steps, inputs)
    if is_finished(output, identity):
        shutil.rmtree(work, ignore_errors=True)
        logger.info("%s is finished already", output)
        return
    started_s = time.monotonic()
    try:
        with locked(work), start_workers(config.workers) as pool:
            claim(work, identity)
            corpus, tally = _run(config, steps, inputs, work, pool)
            publish(config, steps, corpus, tally, work)
            shutil.rmtree(work)
    except OSError as error:
        raise PipelineError(
            f"{error.filename or work}: {error.strerror}; nothing was published, run again to go on"
        ) from error
    logger.info("%s: %.1f s", output, time.monotonic() - started_s)


def read_steps(steps: Mapping[str, Any]) -> list[NamedStep]:
    """Return the typed steps of a mapping of YAML; a null takes a step out.

    Raises:
        PipelineError: there is none, or a name, key or value is wrong; the nearest is named.
    """
    named = []
    for name, values in steps.items():
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise PipelineError(
                f"steps.{name}={values!r} is no mapping of parameters; write {{}} for the defaults "
                "or null to leave the step out"
            )
        parameters = {str(key): value for key, value in values.items()}
        kind = str(parameters.pop("step", name))
        if kind not in STEPS:
            raise PipelineError(f"steps.{name}: {kind!r} is not a step{nearest(kind, STEPS)}")
        named.append(NamedStep(str(name), typed_node(STEPS[kind], parameters, f"steps.{name}")))
    if not named:
        raise PipelineError("steps is empty; choose curation=NAME or list steps")
    _check_buildable(named)
    return named


def _check_buildable(steps: list[NamedStep]) -> None:
    """Build every rule once, so that a missing package is known before anything is read."""
    for name, step in ((named.name, named.step) for named in steps):
        try:
            if isinstance(step, Decontaminate):
                evaluation_files(step)
            if isinstance(step, NearDedup):
                word_tokenizer(step.language)
            elif not isinstance(step, WHOLE_CORPUS):
                build_rule(step, Path())
        except PipelineError as error:
            raise PipelineError(f"steps.{name}: {error}") from None


def _run(
    config: Curate, steps: list[NamedStep], inputs: list[Input], work: Path, pool: Executor
) -> tuple[Corpus, Tally]:
    """Return what was read and the tally of everything that happened to it."""
    source = Stage(work / "read")
    corpus = read_corpus(inputs, config.source_options(), source, config.block_documents)
    check_num_blocks(corpus.num_blocks)
    logger.info("%d documents in %d blocks", _num_documents(corpus), corpus.num_blocks)
    passes = split_passes(steps)
    removal = None
    tally = _sum_tallies(source, corpus.num_blocks)
    _check_domains(steps, tally.by_domain("read"))
    for number, (rules, signed_for) in enumerate(passes, start=1):
        stage = Stage(work / f"pass-{number}")
        task = Pass(
            source=source,
            stage=stage,
            removal=removal,
            rules=tuple(rules),
            signed_for=signed_for,
            write_dropped=config.dropped is not Dropped.none,
            with_text=config.dropped is Dropped.text,
            zstd=config.compression is Compression.zst,
        )
        if not stage.done.exists():
            _run_pass(task, corpus.num_blocks, pool, f"pass {number} of {len(passes)}")
        shutil.rmtree(source.folder / "blocks", ignore_errors=True)
        done = _sum_tallies(stage, corpus.num_blocks)
        _log_drops(done, removal, rules)
        tally.merge(done)
        source, removal = stage, signed_for
    for domain in sorted(tally.by_domain("read").keys() - tally.by_domain("kept").keys()):
        logger.warning("domain %s: no document is left", domain)
    return corpus, tally


def _check_domains(steps: list[NamedStep], domains: Iterable[str]) -> None:
    """Check that the steps name only domains that there are.

    Raises:
        PipelineError: a step would look at nothing; the nearest domain is named.
    """
    known = set(domains)
    for named in steps:
        fractions = named.step.by_domain if isinstance(named.step, Sample) else {}
        for domain in (*named.step.domains, *fractions):
            if domain not in known:
                raise PipelineError(
                    f"steps.{named.name} names the domain {domain!r}, which no document "
                    f"has{nearest(domain, known)}"
                )


def _run_pass(task: Pass, num_blocks: int, pool: Executor, title: str) -> None:
    """Do all blocks of a pass and the search that follows; `done` exists afterwards."""
    task.stage.make_folders()
    for named in task.rules:
        if isinstance(named.step, Decontaminate):
            build_index(named.step, prepared_folder(task.stage, named))
    run_all(pool, run_block, ((task, number) for number in range(num_blocks)), title)
    if task.signed_for is not None:
        find_duplicates(task.signed_for.step, task.stage, pool)
    write_record(task.stage.done, True)


def _sum_tallies(stage: Stage, num_blocks: int) -> Tally:
    tally = Tally()
    for number in range(num_blocks):
        tally.merge(read_tally(stage.tally(number)))
    return tally


def _log_drops(tally: Tally, removal: NamedStep | None, rules: list[NamedStep]) -> None:
    names = [removal.name if removal else "read", *(named.name for named in rules)]
    for name in names:
        documents, characters = tally.total("dropped", name)
        logger.info("%s: %d documents dropped, %d characters", name, documents, characters)


def _num_documents(corpus: Corpus) -> int:
    return sum(int(str(part["documents"])) for part in corpus.inputs)


def _identity(config: Curate, steps: list[NamedStep], inputs: list[Input]) -> str:
    """Return a hash of all that the output depends on; the number of workers is not in it."""
    evaluations = [s.step for s in steps if isinstance(s.step, Decontaminate)]
    content = {
        "config": {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if field.name not in ("input", "output", "steps", "workers")
        },
        "evaluation": [file_sha256(p) for step in evaluations for p in evaluation_files(step)],
        "inputs": [[part.name, part.num_bytes, part.mtime_ns] for part in inputs],
        "steps": [[s.name, type(s.step).__name__, dataclasses.asdict(s.step)] for s in steps],
        "version": FORMAT_VERSION,
    }
    data = orjson.dumps(content, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    return hashlib.sha256(data).hexdigest()
