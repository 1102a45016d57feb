"""A whole run: make or load the models, distil, evaluate before and after, write the summary.

    Config -> run folder -> teachers, student -> distil (and each control) -> summary.json

Every finished model is saved in `models/`, so that a resumed run does not train it again.
"""

import dataclasses
import functools
import hashlib
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fireopd_jax.config import NothingLearnt
from fireopd_jax.data.identity import (
    ROWS_FILE,
    check_rows,
    check_sets,
    identity,
    recorded_rows,
    rows_digest,
)
from fireopd_jax.models.language_model import Params
from fireopd_jax.recipe.paths import absolute
from fireopd_jax.recipe.schema import Config, as_tree, methods
from fireopd_jax.report.page import write_report
from fireopd_jax.runs.folder import RunFolder, environment, state_of
from fireopd_jax.runs.log import Log
from fireopd_jax.runs.report import print_curve, print_results, write_card, write_failure
from fireopd_jax.runs.trackers.reporting import Trackers, check_installed
from fireopd_jax.runtime.compilation import compile_cache
from fireopd_jax.runtime.devices import first_line
from fireopd_jax.runtime.files import recorded
from fireopd_jax.runtime.processes import by_leader, count, fetched, leads, wait_for_leader
from fireopd_jax.runtime.signals import Interrupted, stop_on_signal
from fireopd_jax.session.described import log_setup
from fireopd_jax.session.exporting import export
from fireopd_jax.session.identity import (
    SOURCES,
    TEMPLATES,
    Written,
    check_sources,
    check_templates,
    recorded_templates,
)
from fireopd_jax.session.parameters import waiting
from fireopd_jax.session.served import check_served
from fireopd_jax.session.session import Figures, Session
from fireopd_jax.session.setup import Setup
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.terminal.interrupts import answer
from fireopd_jax.terminal.record import recording, say
from fireopd_jax.terminal.working import working
from fireopd_jax.text.clock import now
from fireopd_jax.training.ahead import naming_keys
from fireopd_jax.training.continuing import Continuation
from fireopd_jax.training.distill import Distillation
from fireopd_jax.training.interruptions import resumable
from fireopd_jax.training.plan import Plan
from fireopd_jax.training.prepare import (
    StudentStart,
    is_kept,
    kept,
    make_teacher,
    read_base,
)
from fireopd_jax.training.rehearsal import checked
from fireopd_jax.training.together import check_agreement, open_together

Summary = dict[str, Any]


def train(config: Config, notes: Sequence[str] = (), *, extend: bool = False) -> Summary:
    """Run the training that `config` describes, or resume it; return the run's summary.

    `notes` are logged first. With more steps than before, a run goes on; `extend` allows it where
    that changes the schedule of the steps to come.

    Raises `UserError` for an error in the configuration or the data, `NothingLearnt` for a run
    without a finite update, and `Interrupted` when a signal stopped the run after a save.
    """
    return _in_folder(config, _train, "summary.json", notes, extend)


def sft(config: Config, notes: Sequence[str] = (), *, extend: bool = False) -> Summary:
    """Run only the supervised training, of teachers and student; return its summary.

    The run is not complete: `train` on the same folder continues from there.
    """
    return _in_folder(config, _sft, "sft.json", notes, extend)


def _in_folder(
    config: Config,
    work: Callable[[Session], Summary],
    file: str,
    notes: Sequence[str],
    extend: bool,
) -> Summary:
    with recording() as record:
        if not record.texts:
            say(first_line())
        return _recorded(config, work, file, notes, extend)


def _recorded(
    config: Config,
    work: Callable[[Session], Summary],
    record: str,
    notes: Sequence[str],
    extend: bool,
) -> Summary:
    start = time.monotonic()
    check_installed(config.run.report_to)
    compile_cache(config.run.compilation_cache)
    config = absolute(config, Path.cwd())
    compare = Continuation(
        Path(config.run.dir or ".").expanduser(), extend, distils=work is not _sft
    )
    # Steps that are given as epochs are not known yet.
    known = config.run.epochs is None
    check_agreement(config)
    state = by_leader(lambda: state_of(config.run, as_tree(config), compare)) if known else "new"
    # Errors in the data must not leave a run folder behind.
    moment = by_leader(lambda: start_of(config))
    setup = None if state == "complete" else checked(config, moment)
    if setup is not None:  # steps of epochs
        config = dataclasses.replace(config, run=setup.config.run)
    with open_together(config, compare) as folder:
        if setup is None or folder.state == "complete":
            more = f"fireopd resume {quoted(folder)} run.steps=N goes on to N steps"
            print(f"{folder.path}: this run is complete, nothing to do; {more}")
            return recorded(folder.summary)
        stopping = stop_on_signal(answer, eager=True)
        with stopping as stop, Log(folder.logs) as log, resumable(folder):
            log(f"{'resuming' if folder.state == 'resume' else 'writing'} {folder.path}")
            for note in (*notes, *folder.changes.allowed):
                log(note)
            if folder.changes.extended is not None:
                for line in compare.effects(config, folder.changes.extended):
                    log(line)
            devices = environment([str(device) for device in jax.devices()])
            folder.write_json("env.json", devices | {"work": work.__name__.strip("_")})
            read_elsewhere = frozen(setup)
            hashing = f"hashing the files of {', '.join(spec.name for spec in read_elsewhere)}"
            with working(hashing) if read_elsewhere else nullcontext():
                check_sources(folder.path / SOURCES, read_elsewhere)
            check_templates(folder.path / TEMPLATES, Written.of(setup, moment))
            record_rows(setup, folder)
            session = Session(setup, folder, stop, log)
            log_setup(session)
            with trackers_of(config, folder, log) as session.trackers, reported(folder, log):
                try:
                    with naming_keys():
                        summary = work(session)
                finally:
                    if session.connections is not None:
                        session.connections.close()
                summary |= {"seconds": round(time.monotonic() - start, 1)}
                folder.write_json(record, summary)
                wait_for_leader()
            log(f"done in {summary['seconds']:.0f} s: {folder.path / record}")
    return summary


@contextmanager
def reported(folder: RunFolder, log: Log) -> Iterator[None]:
    """Write report.html at the end of the block, also where a signal stops it or it is in vain."""
    try:
        yield
    except NothingLearnt as failed:
        write_failure(folder, str(failed))
        write_page(folder, log)
        raise
    except Interrupted:
        write_page(folder, log)
        raise
    write_page(folder, log)


def write_page(folder: RunFolder, log: Log) -> None:
    """Write report.html of what a run has computed so far; a failure is one line of the log."""
    if not leads() or not folder.metrics.exists():
        return
    try:
        log(f"report: {write_report([str(folder.path)], live=False)}")
    except Exception as error:  # a page is not worth the run, whose results are saved
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        log(f"warning: no report ({reason}); fireopd report {quoted(folder)} makes it again")


def quoted(folder: RunFolder) -> str:
    """Return the path of a run for use in a shell."""
    return shlex.quote(str(folder.path))


def trackers_of(config: Config, folder: RunFolder, log: Log) -> Trackers:
    """Return the trackers of a run; a line of each says where its metrics can be seen."""
    run = config.run
    kinds = run.report_to if leads() else ()
    return Trackers(kinds, folder.path, as_tree(config), run.project, log)


def start_of(config: Config) -> str:
    """Return the date and time at which the run began: those of its record, or now."""
    folder = None if config.run.dir is None else Path(config.run.dir).expanduser()
    before = None if folder is None else recorded_templates(folder / TEMPLATES).moment
    return before or now()


def record_rows(setup: Setup, folder: RunFolder) -> None:
    """Write the identity of the run's rows, or compare them with those it began with."""
    recorded = recorded_rows(folder.path)
    sets = {each.name: rows_digest(each.own.rows) for each in setup.sets}
    if recorded is None:
        folder.write_json(ROWS_FILE, identity(setup.rows, Path.cwd()) | {"sets": sets})
    else:
        check_rows(setup.rows, recorded, folder.path)
        check_sets(sets, recorded, folder.path)


def frozen(setup: Setup) -> list[ModelSpec]:
    """Return the models that are loaded from their paths: of teachers, base policy, student."""
    base = () if setup.base is None else (setup.base,)
    others = (*setup.teachers, *base, setup.student)
    return [spec for spec in others if spec.read_each_time]


def _prepare(session: Session, plan: Plan) -> tuple[list[Params], StudentStart, Summary]:
    """Return teachers, student and summary: models made, and graded before distillation.

    Programs are compared with the memory of the device before the first evaluation.
    """
    setup = session.setup
    teachers = [
        waiting(spec, make_teacher(session, index, plan.ready))
        for index, spec in enumerate(setup.teachers)
    ]
    start = StudentStart(session, teachers, plan.ready)
    if not start.finished:
        start.read()
    session.folder.write_json("memory.json", plan.check())
    summary: Summary = {}
    if setup.config.eval.problems:
        figures = session.graded_teachers([functools.partial(_same, params) for params in teachers])
        summary |= {"teacher": by_teacher(session, figures)} if figures else {}
        summary["student_before"] = session.graded(setup.student, start.read, "student_before")
    if setup.sets:
        before = session.graded_sets(setup.student, start.read, "student_before")
        summary["sets"] = {name: {"student_before": figures} for name, figures in before.items()}
    return teachers, start, summary


def _same(params: Params) -> Params:
    return params


def _sft(session: Session) -> Summary:
    with closing(Plan.of_run(session, {})) as plan:
        _, start, summary = _prepare(session, plan)
    print_results(session.folder.path, session.setup.config, summary)
    return summary | {"params_sha256": params_sha256(start.read())}


def _train(session: Session) -> Summary:
    config, spec = session.setup.config, session.setup.student
    every = dict(zip(("student", *config.run.compare), methods(config), strict=True))
    trained = {name: method for name, method in every.items() if not is_kept(session, name)}
    check_served(session, list(trained.values()))
    with closing(Plan.of_run(session, trained)) as plan:
        teachers, start, summary = _prepare(session, plan)
    base = read_base(session)

    def distil(home: Path, name: str) -> Params:
        def make(_: Path) -> Params:
            own = plan.methods[name]
            trained = Distillation(session, own, teachers, start, base, home, name).run()
            start.drop()
            return trained

        return kept(session, spec, name, make)

    student = distil(session.folder.path, "student")
    summary |= {"steps": config.run.steps, "params_sha256": params_sha256(student)}
    exported = session.folder.path / "models" / "student_hf"
    if config.run.export and not by_leader(exported.exists):
        whole = student if count() == 1 else fetched(student)
        if leads():
            export(exported, spec, whole, session.folder.path)
        wait_for_leader()
        del whole
    if config.eval.problems:
        summary["student_after"] = session.graded(
            spec, functools.partial(_same, student), "student_after"
        )
        summary["controls"] = {}
    for name, figures in on_sets(session, student, "student_after").items():
        summary["sets"][name] |= {"student_after": figures, "controls": {}}
    del student
    failed: NothingLearnt | None = None
    for name in config.run.compare:
        try:
            control = distil(session.folder.path / "controls" / name, name)
        except NothingLearnt as error:  # which does not make the student worse
            session.log(f"control {error}")
            failed = error
            continue
        if config.eval.problems:
            figures = session.graded(spec, functools.partial(_same, control), f"control_{name}")
            summary["controls"][name] = figures
        for each, figures in on_sets(session, control, f"control_{name}").items():
            summary["sets"][each]["controls"][name] = figures
        del control
    print_results(session.folder.path, config, summary)
    print_curve(session.folder.path, config, session.log)
    write_card(session.folder, config, summary)
    session.trackers.summary(config.run.steps, summary)
    if failed is not None:
        summary["failed"] = str(failed)
    return summary


def on_sets(session: Session, params: Params, label: str) -> dict[str, Figures]:
    """Return the figures of the student, or a control, on each evaluation set."""
    return session.graded_sets(session.setup.student, functools.partial(_same, params), label)


def by_teacher(session: Session, figures: Sequence[Figures]) -> Mapping[str, Any]:
    """Return the figures of one teacher, or of several by name."""
    if len(figures) == 1:
        return figures[0]
    return dict(zip(session.setup.config.teachers, figures, strict=True))


def params_sha256(params: Params) -> str:
    """Return the SHA-256 over names, shapes, dtypes and bytes of all parameters, in tree order."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(fetched(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
