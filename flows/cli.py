"""The command line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra.redaction import redact, redact_process
from schemas.base import UserError

if TYPE_CHECKING:
    from flows.plan import Plan
    from flows.runs import RunRecord
    from flows.sync import Synced
    from infra.environment import Home
    from schemas.pipeline import PipelineConfig

EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_INTERRUPT = 130
EXIT_TERMINATED = 143

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Post-train a language model from one recipe, and promote it if it is better.",
)

HomeOption = Annotated[
    str | None,
    typer.Option(
        "--home",
        metavar="DIR",
        help="Folder of the store, MLflow and Prefect; else POSTTRAIN_HOME, else .posttrain here.",
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="One JSON document on standard output, all else on the other."),
]
RecipeArgument = Annotated[str, typer.Argument(help="Name of a shipped recipe, or a .yaml file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Change a field of the recipe; repeatable."),
]
TimezoneOption = Annotated[
    str | None,
    typer.Option("--timezone", metavar="TZ", help="Such as Europe/Berlin; else UTC."),
]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Name of the deployment; else the recipe's.")
]
CatchupOption = Annotated[
    Literal["latest", "skip"],
    typer.Option(
        "--catchup", help="Of the runs that were missed, run the newest, or skip them all."
    ),
]
LateOption = Annotated[
    float,
    typer.Option(
        "--late-after", metavar="SECONDS", min=1, help="With skip: so late is a run missed."
    ),
]
RecoveriesOption = Annotated[
    int,
    typer.Option("--recoveries", min=0, help="How often a run whose process died is brought back."),
]
SilenceOption = Annotated[
    float,
    typer.Option(
        "--silence",
        metavar="SECONDS",
        min=90,
        help="A run that gives no sign of life for so long has crashed.",
    ),
]


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    home: HomeOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, and stop.")
    ] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Say why each stage would be reused or run, and stop."),
    ] = False,
    rerun_changed_code: Annotated[
        bool,
        typer.Option("--rerun-changed-code", help="Do again what other code than today's did."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe from data to a promoted model; what is already done is reused."""
    with _exit_codes("run the same command again to go on"):
        _on_sigterm()
        from flows.recipes import load_recipe

        config = load_recipe(recipe, set_)
        place = _home(home)
        from flows.display import make_console, plan_table
        from flows.plan import make_plan

        console = make_console(stderr=as_json)
        if explain:
            _explain(config, place, console, as_json, rerun_changed_code)
            return
        plan = make_plan(config, place, rerun_changed_code=rerun_changed_code)
        console.print(plan_table(plan))
        if dry_run:
            if as_json:
                _print_json(_plan_document(plan))
            return
        with _syncing(place, console):
            record = _reused(config, place, plan, console)
            if record is None:
                record = _run(config, place, console, rerun_changed_code)
        _show(record, place, console, as_json)


@app.command()
def deploy(
    recipe: RecipeArgument,
    cron: Annotated[
        str | None, typer.Option("--cron", help="When it runs, such as '0 2 * * *'.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option("--work-pool", metavar="NAME", help="Prefect work pool.")
    ] = None,
    timezone: TimezoneOption = None,
    set_: SetOption = None,
    name: NameOption = None,
    catchup: CatchupOption = "latest",
    late_after: LateOption = 3600.0,
    recoveries: RecoveriesOption = 3,
    silence: SilenceOption = 300.0,
    paused: Annotated[
        bool, typer.Option("--paused", help="Register it without starting its schedule.")
    ] = False,
    pause: Annotated[
        bool | None,
        typer.Option("--pause/--resume", help="Only pause an existing schedule, or go on with it."),
    ] = None,
    home: HomeOption = None,
) -> None:
    """Schedule a recipe on a Prefect work pool, one run at a time, on the data of the day."""
    with _exit_codes():
        from flows.deploy import Schedule, build_deployment, set_paused
        from flows.deploy import deploy as register
        from flows.recipes import load_recipe

        config = load_recipe(recipe, set_)
        place = _prefect_server(home)
        if pause is not None:
            full_name = set_paused(name or config.name, pause)
            typer.echo(f"{full_name} is {'paused' if pause else 'scheduled again'}")
            return
        if cron is None or pool is None:
            raise UserError("--cron and --work-pool are needed to schedule a recipe")
        schedule = Schedule(cron, timezone, catchup, late_after, recoveries, silence)
        made = build_deployment(config, place, name=name or config.name, schedule=schedule)
        is_paused = register(made, pool, schedule, paused=paused)
        typer.echo(f"{made.full_name} runs at {cron} ({timezone or 'UTC'}) on work pool {pool}")
        if is_paused:
            typer.echo(f"it is paused: posttrain deploy {recipe} --resume starts it")
        typer.echo(f"a worker for it: prefect worker start --pool {pool} --type process")


@app.command()
def serve(
    recipe: RecipeArgument,
    cron: Annotated[str, typer.Option("--cron", help="When it runs, such as '0 2 * * *'.")],
    timezone: TimezoneOption = None,
    set_: SetOption = None,
    name: NameOption = None,
    catchup: CatchupOption = "latest",
    late_after: LateOption = 3600.0,
    recoveries: RecoveriesOption = 3,
    silence: SilenceOption = 300.0,
    home: HomeOption = None,
) -> None:
    """Run a recipe on a schedule from this process, without a work pool, until it is stopped."""
    with _exit_codes():
        from flows.deploy import Schedule, build_deployment
        from flows.deploy import serve as run_forever
        from flows.recipes import load_recipe

        config = load_recipe(recipe, set_)
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO")
        place = _prefect_server(home)
        schedule = Schedule(cron, timezone, catchup, late_after, recoveries, silence)
        deployment = build_deployment(config, place, name=name or config.name, schedule=schedule)
        typer.echo(f"{deployment.full_name} runs at {cron} ({timezone or 'UTC'}); Ctrl-C ends it")
        run_forever(deployment, schedule)


@app.command()
def show(
    run_name: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or `latest`.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run did and what came of it."""
    with _exit_codes():
        from flows.display import make_console
        from flows.runs import Runs

        place = _home(home)
        record = Runs(place.store.root).read(run_name)
        console = make_console(stderr=as_json)
        console.print(Text(f"{record.run}: {record.status}, started {record.started:%F %T} UTC"))
        _show(record, place, console, as_json)


@app.command()
def credit(
    run_name: Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or `latest`.")],
    rollout: Annotated[
        int | None,
        typer.Option("--rollout", metavar="N", help="Which of the kept ones; else a newest one."),
    ] = None,
    home: HomeOption = None,
) -> None:
    """Show a rollout of a run token by token, as every estimator would have credited it."""
    with _exit_codes():
        from flows.credit import load, newest, render
        from flows.runs import Runs

        place = _home(home)
        table = load(Runs(place.store.root).read(run_name), place.store.root)
        sys.stdout.write(render(table, newest(table) if rollout is None else rollout))


@app.command()
def runs(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the runs, the newest first."""
    with _exit_codes():
        from flows.display import make_console, runs_table
        from flows.runs import Runs

        records = Runs(_home(home).store.root).all()
        if as_json:
            _print_json([_run_line(record) for record in records])
        elif records:
            make_console(stderr=False).print(runs_table(records))
        else:
            make_console(stderr=False).print("Nothing has run here yet.")


@app.command()
def sync(home: HomeOption = None) -> None:
    """Tell MLflow what runs could not tell it while it was away."""
    with _exit_codes("what waits is kept"):
        from flows import sync as outboxes

        place = _home(home)
        records = outboxes.waiting(place)
        if not records:
            typer.echo("MLflow has been told everything.")
        for one in outboxes.sync(place, records):
            typer.echo(_synced_text(one))


@app.command()
def models(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List the registered models, their versions and aliases."""
    with _exit_codes():
        from flows.display import make_console

        versions = _registry(_home(home)).list_models()
        if as_json:
            _print_json(
                [
                    {
                        "name": one.name,
                        "version": one.version,
                        "aliases": list(one.aliases),
                        "sha256": one.sha256,
                        "fingerprint": one.fingerprint,
                    }
                    for one in versions
                ]
            )
            return
        table = Table(box=None, pad_edge=False)
        for column in ("model", "version", "aliases", "content", "note"):
            table.add_column(column, overflow="fold")
        for one in versions:
            aliases = ", ".join(f"@{alias}" for alias in one.aliases)
            note = one.tags.get("posttrain.rolled_back", "")
            table.add_row(one.name, one.version, aliases, one.sha256[:12], note)
        console = make_console(stderr=False)
        console.print(table if versions else "No model is registered here yet.")


@app.command()
def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what would be deleted.")
    ] = False,
    keep_days: Annotated[
        int,
        typer.Option("--keep-days", min=1, help="Keep what is younger, or in a younger run."),
    ] = 30,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete old artifacts that no registry alias and no recent run needs."""
    with _exit_codes():
        from flows import gc as collector
        from flows.display import make_console

        place = _home(home)
        found = collector.find_waste(place, keep_days)
        gone = found if dry_run else collector.delete(place, found)
        if as_json:
            _print_json(collector.document(gone, deleted=not dry_run))
        else:
            collector.print_waste(make_console(stderr=False), gone, deleted=not dry_run)


@app.command()
def lineage(
    model: Annotated[
        str,
        typer.Argument(metavar="NAME[@ALIAS|@VERSION]", help="Registered model; else @champion."),
    ],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a registered model came from: evaluation, models, data, configuration, code."""
    with _exit_codes():
        from flows.display import make_console
        from flows.lineage import document, lineage_of, tree

        found = lineage_of(_home(home), model)
        if as_json:
            _print_json(document(found))
        else:
            make_console(stderr=False).print(tree(found))


@app.command()
def promote(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME[@ALIAS|@VERSION]",
            help="Registered model; with --explain also the name of a run, or `latest`.",
        ),
    ],
    version: Annotated[
        str | None, typer.Argument(help="Version number or alias, if not in NAME.")
    ] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Why; it is written down.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only show every check of the gate, and its numbers.")
    ] = False,
    approve: Annotated[
        bool | None,
        typer.Option("--approve/--reject", help="Decide on a version that awaits approval."),
    ] = None,
    by: Annotated[
        str | None, typer.Option("--by", help="Who approves or rejects; else the user's name.")
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Explain a decision, approve one that waits, or make a version the champion by hand."""
    with _exit_codes():
        from flows import promotion
        from flows.archive import Archive
        from flows.display import make_console

        place = _home(home)
        if explain:
            target = model if version is None else f"{model}@{version.removeprefix('@')}"
            found = promotion.document(place, promotion.find_decision(place, target))
            if as_json:
                _print_json(found)
            else:
                promotion.print_decision(make_console(stderr=False), found)
            return
        if not reason:
            raise UserError("--reason is needed: it is written down with the version")
        name, which = promotion.split(model, version)
        if approve is not None:
            text = promotion.approve(
                place, f"{name}@{which}", granted=approve, by=by, reason=reason
            )
        else:
            archive = Archive(place, name)
            chosen = archive.registry.chosen(name, which)
            archive.promote_by_hand(chosen.version, reason)
            text = f"{name} version {chosen.version} is @champion"
        make_console(stderr=False).print(Text(text))


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="Registered model.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; it is written down.")],
    home: HomeOption = None,
) -> None:
    """Make the previous champion the champion again."""
    with _exit_codes():
        from flows.archive import Archive
        from flows.display import make_console

        bad, good = Archive(_home(home), name).rollback(reason)
        text = f"{name}: version {good} is @champion again in place of version {bad}"
        make_console(stderr=False).print(Text(text))


def main() -> None:
    """Entry point of `posttrain`."""
    redact_process()
    # A script's own folder is on the path; the user's functions are where the user is.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    app()


def _syncing(place: Home, console: Console) -> contextlib.AbstractContextManager[None]:
    from flows.sync import syncing

    return syncing(place, lambda one: console.print(Text(_synced_text(one))))


def _synced_text(one: Synced) -> str:
    if one.at_work:
        return f"{one.run}: at work, and tells MLflow itself"
    return f"{one.run}: MLflow has now been told what it had missed ({one.sent} entries)"


def _explain(
    config: PipelineConfig, place: Home, console: Console, as_json: bool, rerun: bool
) -> None:
    from flows.explain import document, explain, print_explanations

    explanations = explain(config, place, rerun_changed_code=rerun)
    if as_json:
        _print_json(document(explanations))
    else:
        print_explanations(console, explanations)


def _run(
    config: PipelineConfig, place: Home, console: Console, rerun_changed_code: bool
) -> RunRecord:
    """Run the flow in this process, on a Prefect server of its own unless there is another."""
    from flows.display import make_progress
    from flows.listener import watched_by
    from flows.runs import Runs

    with contextlib.ExitStack() as stack:
        with console.status("starting Prefect"):
            # Before Prefect is imported: its threads read the environment, not a context.
            if "PREFECT_API_URL" not in os.environ and "prefect" not in sys.modules:
                from flows.local_server import start_local_server

                os.environ["PREFECT_API_URL"] = start_local_server(place)
            from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

            from flows.pipeline import post_train

        # The heartbeat is for flows that nobody watches; joining it would cost a second.
        stack.enter_context(temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}))
        progress = make_progress(console)
        stack.enter_context(progress)
        stack.enter_context(watched_by(progress))
        document = post_train(config, home=str(place.root), rerun_changed_code=rerun_changed_code)
    return Runs(place.store.root).read(document["run"])


def _reused(config: PipelineConfig, place: Home, plan: Plan, console: Console) -> RunRecord | None:
    """The record of the run that did all of this, or None if there is something left to do."""
    from flows.runs import Runs, StageRow, config_digest

    if not plan.all_reused:
        return None
    record = Runs(place.store.root).latest_finished(config_digest(config))
    if record is None:
        return None
    rows: list[StageRow] = []
    for stage in plan.stages:
        assert stage.artifact is not None
        rows.append(
            StageRow(
                name=stage.name,
                status="reused",
                seconds=0.0,
                peak_memory_bytes=None,
                fingerprint=stage.artifact.fingerprint,
                artifact=stage.artifact.uri,
            )
        )
    console.print()
    console.print(
        Text(f"Nothing to do: all {len(rows)} stages are reused from {record.run}.", style="green")
    )
    return record.model_copy(update={"stages": tuple(rows), "decision": _decision_now(plan, place)})


def _decision_now(plan: Plan, place: Home) -> dict[str, Any]:
    from flows.archive import Archive
    from flows.session import decision_document
    from schemas.artifacts import PromotionDecision

    decision = plan.stages[-1].artifact
    assert isinstance(decision, PromotionDecision)
    return decision_document(decision, Archive(place, decision.registered_model))


def _show(record: RunRecord, place: Home, console: Console, as_json: bool) -> None:
    from flows.display import print_places, print_run

    print_run(console, record)
    print_places(console, record, place)
    if as_json:
        _print_json(record.document())


def _home(flag: str | None) -> Home:
    """The home, and an environment in which the libraries stay quiet and inside it."""
    from infra.environment import Home, quiet_environment

    home = Home.resolve(flag)
    for name, value in quiet_environment(home).items():
        os.environ.setdefault(name, value)
    # Prefect's lines go to its page; the terminal has its own display.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    return home


def _prefect_server(flag: str | None) -> Home:
    """The home, once a Prefect server that stays answers at PREFECT_API_URL."""
    place = _home(flag)
    from flows.deploy import DEFAULT_API, require_server

    require_server(os.environ.setdefault("PREFECT_API_URL", DEFAULT_API), place)
    return place


def _registry(home: Home) -> Any:
    from infra.registry import Registry

    return Registry(home.mlflow_uri, home.locks)


def _plan_document(plan: Plan) -> dict[str, Any]:
    return {
        "plan": [
            {
                "name": stage.name,
                "action": stage.action,
                "reason": stage.reason,
                "needs": list(stage.needs),
                "fingerprint": stage.fingerprint,
            }
            for stage in plan.stages
        ]
    }


def _run_line(record: RunRecord) -> dict[str, Any]:
    fields = {"run", "recipe", "seed", "status", "started", "ended", "decision", "outcome"}
    return record.model_dump(mode="json", include=fields)


def _print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=2) + "\n")
    sys.stdout.flush()


def _on_sigterm() -> None:
    """Turn SIGTERM into an ordinary exit, which stops the stage and closes the run."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(EXIT_TERMINATED)

    signal.signal(signal.SIGTERM, leave)


@contextlib.contextmanager
def _exit_codes(remedy: str | None = None) -> Iterator[None]:
    """One clear message and the right exit code for whatever goes wrong inside."""
    try:
        yield
    except UserError as error:
        _complain(str(error))
        raise typer.Exit(EXIT_USER) from None
    except KeyboardInterrupt:
        _complain(f"stopped; {remedy}" if remedy else "stopped")
        raise typer.Exit(EXIT_INTERRUPT) from None
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("POSTTRAIN_TRACEBACK"):
            raise
        _complain(_failure_text(error))
        if remedy:
            _complain(remedy, label="")
        raise typer.Exit(EXIT_FAILURE) from None


def _failure_text(error: Exception) -> str:
    from infra.launch import StageFailed
    from infra.manifest import CorruptArtifact

    text = str(error) or type(error).__name__
    if isinstance(error, StageFailed | OSError | CorruptArtifact):
        return "\n".join([text, *getattr(error, "__notes__", [])])
    return f"{type(error).__name__}: {text} (POSTTRAIN_TRACEBACK=1 shows where)"


def _complain(text: str, label: str = "error: ") -> None:
    sys.stderr.write(redact(f"{label}{text}\n"))
