"""The command line: the one place that assembles, names a log, prints and sets up logging.

Stands around the way of an event. A command is a thin call of the module that does the work; that module is imported
inside of the command, so that `--help` is fast. Every command takes --config, --set and --transport.

Exit codes: 0 done; 1 an error of the program; 2 the configuration, the topics or the arguments cannot work; 3 fenced,
another process has this slot now; 4 stored data cannot be trusted, or too many records are bad; 5 gave up after
retries, e.g. on a broker that is gone.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stream.errors import ConfigError, Corrupt, DriftlineError, Fenced, Retryable
from stream.options import (
    ConfigOption,
    EncodingOption,
    Given,
    HeaderOption,
    InitialOption,
    MapOption,
    SepOption,
    SetOption,
    SortOption,
    StartOption,
    TransportOption,
    UnitOption,
    UsersOption,
    command,
    initial_set,
    transport_set,
)  # fmt: skip
from stream.process import (
    child,
    clean_code,
    collect_seldom,
    log_to,
    logs_to_file,
    quit_on_signals,
    stop_on_signals,
    use_threads,
)

if TYPE_CHECKING:
    from stream.config import Config
    from stream.replay import Clocks
    from stream.start import Start
    from stream.transport import Transport

EXIT_CODES: dict[type[DriftlineError], int] = {ConfigError: 2, Fenced: 3, Corrupt: 4, Retryable: 5, DriftlineError: 1}

PAGE_ALERTS_MAX = 10  # of a user, on a page

log = logging.getLogger("stream.cli")
app = typer.Typer(
    name="driftline",
    help="Forecasts of users' next interests and alerts on interest shifts, learned as the events come.",
    epilog="Exit codes: 0 done; 1 an error of the program; 2 configuration, topics or arguments cannot work; "
    "3 fenced, another process has this slot; 4 stored data cannot be trusted, or too many records are bad; "
    "5 gave up after retries.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
topics_app = typer.Typer(no_args_is_help=True, help="Make and list the topics of the application.")
app.add_typer(topics_app, name="topics")


@app.callback()
def _globals(
    ctx: typer.Context, config: ConfigOption = None, sets: SetOption = None, transport: TransportOption = None
) -> None:
    ctx.obj = Given(config=config, sets=(*transport_set(transport), *(sets or ())))


# ---------------------------------------------------------------------------------------------------- processes


@command(app)
def run(
    given: Given,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes, slots 0, 1, ...")] = 1,
    learner: Annotated[bool, typer.Option(help="Start a learner too.")] = True,
    start: StartOption = "earliest",
    initial_weights: InitialOption = None,
) -> None:
    """Start workers and a learner, each a process of its own, and keep them alive until Ctrl-C.

    Example: driftline run --transport kafka --set kafka.bootstrap_servers=127.0.0.1:9092
    """
    from stream.supervise import supervise

    given = given.plus(*initial_set(initial_weights))
    config = given.load().config
    begin = str(_start(start))  # an age becomes one moment for all
    log_to(config.app, "run")
    if config.learner.initial_weights:  # found out here, not by each process for itself
        from stream.saved_weights import check_there

        check_there(Path(config.learner.initial_weights), key="learner.initial_weights")
    with _opened(config) as transport:
        _prepare_topics(transport, config)
    children = [
        child(given, "worker", f"worker {slot}", "--slot", str(slot), "--from", begin) for slot in range(workers)
    ]
    if learner:
        children.append(child(given, "learner", "learner", "--from", begin))
    stop = stop_on_signals()
    code = supervise(children, stop, stop_s=config.worker.shutdown_s + 5)
    raise typer.Exit(clean_code(code, stop.is_set()))


@command(app)
def worker(
    given: Given,
    slot: Annotated[str | None, typer.Option(help="This worker's own name; worker.slot.")] = None,
    start: StartOption = "earliest",
    initial_weights: InitialOption = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """One worker: events in; forecasts, alerts and states out.

    Example: driftline worker --slot 1 --set worker.metrics_port=9100
    """
    quit_on_signals()
    from stream.assembly import check_rights, make_worker, names_of
    from stream.metrics import Exposition, Health, WorkerMetrics, new_registry
    from stream.warmup import warm_up

    slots = [] if slot is None else [f"worker.slot={slot}"]
    config = given.load(*slots, *initial_set(initial_weights)).config
    log_to(config.app, f"worker.{config.worker.slot}")
    use_threads(1)
    registry, health = new_registry(), Health()
    with _opened(config) as transport:
        _prepare_topics(transport, config)
        names = names_of(config)
        check_rights(transport, names.state, [*names.inputs, names.weights, names.state])
        warm_up(config)
        stop = stop_on_signals(config.worker.shutdown_s, parent)
        made = make_worker(config, transport, WorkerMetrics(registry, health), start=_start(start))
        server = None
        try:
            if config.worker.metrics_port:
                server = Exposition(registry, health, config.worker.metrics_host, config.worker.metrics_port)
            collect_seldom()
            made.run(stop)
        finally:
            if server is not None:
                server.close()


@command(app)
def learner(
    given: Given,
    start: StartOption = "earliest",
    initial_weights: InitialOption = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """The learner: events in, weights out. On a GPU where there is one.

    Example: driftline learner --set learner.device=cuda:0
    """
    quit_on_signals()
    from stream.assembly import check_rights, make_learner, names_of
    from stream.metrics import Exposition, Health, LearnerMetrics, new_registry

    config = given.load(*initial_set(initial_weights)).config
    log_to(config.app, "learner")
    use_threads(config.learner.threads)
    registry, health = new_registry(), Health()
    with _opened(config) as transport:
        _prepare_topics(transport, config)
        names = names_of(config)
        check_rights(transport, names.weights, [*names.inputs, names.weights])
        stop = stop_on_signals(config.worker.shutdown_s, parent)
        made = make_learner(config, transport, LearnerMetrics(registry, health), stop, start=_start(start))
        server = None
        try:
            if config.learner.metrics_port:
                server = Exposition(registry, health, config.learner.metrics_host, config.learner.metrics_port)
            collect_seldom()
            made.run(stop)
        finally:
            if server is not None:
                server.close()


@command(app)
def demo(
    given: Given,
    users: Annotated[int, typer.Option(min=50, help="Shoppers.")] = 3_000,
    events: Annotated[int, typer.Option(min=1_000, help="Events, about.")] = 240_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the generated stream.")] = 1,
    rate: Annotated[float, typer.Option(help="Events a second; 0 = as fast as they are handled.")] = 2_200.0,
    out: Annotated[
        Path, typer.Option(help="Folder of the log and the report; an older demo there is replaced.")
    ] = Path("var/demo"),
) -> None:
    """A generated shop stream through a real worker and learner, judged against what was planted in it.

    Example: driftline demo --events 60000 --users 1000
    """
    from rich.console import Console

    from stream.demo_run import run_demo
    from stream.simulate import ShopSettings, simulate
    from stream.terminal import demo_progress, print_summary, say

    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("log.db*"), *out.glob("*.log")]:
        old.unlink()
    demo_given = replace(
        given, sets=("worker.quality_share=1.0", *given.sets, "transport=embedded", f"embedded.path={out / 'log.db'}",
                     "events.fields={}", "events.time_unit=ms"),
    )  # fmt: skip
    config = demo_given.load(f"app.log_file={out / 'demo.log'}").config
    log_to(config.app, "demo")
    console = Console()
    say(console, f"generating about {events:,} events of {users:,} shoppers (seed {seed}) ...")
    stream = simulate(ShopSettings(users=users, events=events, seed=seed))
    children = [
        child(demo_given, name, name, "--set", f"app.log_file={out / name}.log") for name in ("worker", "learner")
    ]
    report = out / "report.html"
    with demo_progress(console) as show:
        judged = run_demo(
            lambda: _transport(config),
            config,
            stream,
            children,
            rate_per_s=rate or None,
            report=report,
            on_progress=show,
        )
    print_summary(console, judged)
    say(console, f"report: {report}")
    deaths = (out / "demo.log").read_text().count("event=child_died")
    if deaths:
        raise DriftlineError(f"worker or learner died and was started again, {deaths} times in all; see {out}/*.log")


# ---------------------------------------------------------------------------------------------------- events in


@command(app)
def simulate(
    given: Given,
    users: Annotated[int, typer.Option(min=1, help="Shoppers.")] = 3_000,
    events: Annotated[int, typer.Option(min=1, help="Events, about.")] = 240_000,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
    rate: Annotated[float | None, typer.Option(help="Records a second.")] = None,
    speed: Annotated[float | None, typer.Option(help="Seconds of event time in a second.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write JSON lines here (.gz too) instead of into the topic.")] = None,
    truth: Annotated[Path | None, typer.Option(help="Write what was planted here, as JSON lines.")] = None,
) -> None:
    """Send a generated shop stream with planted interest shifts into the events topic, or write it to a file.

    Example: driftline simulate --users 500 --events 40000 --out shop.jsonl.gz --truth truth.jsonl
    """
    from rich.console import Console

    from stream.replay import Pace
    from stream.replay import replay as send
    from stream.simulate import ShopSettings, write_events
    from stream.simulate import simulate as generate
    from stream.terminal import send_progress
    from stream.truth import write_truth

    config = given.load().config
    log_to(config.app, "simulate")
    if out is None and (config.events.fields or config.events.time_unit != "ms"):
        raise ConfigError("a generated stream has the plain field names; take events.fields and events.time_unit away")
    stream = generate(ShopSettings(users=users, events=events, seed=seed))
    if truth is not None:
        write_truth(truth, stream.truth)
    if out is not None:
        print(f"{out}: {write_events(stream, out):,} events")
        return
    with _opened(config) as transport, send_progress(Console(stderr=True)) as show:
        _prepare_topics(transport, config)
        report = send(
            stream.records(),
            transport,
            topic=config.topics.events[0],
            partitions=config.topics.partitions,
            clocks=_clocks(),
            pace=Pace(speed=speed, rate_per_s=rate),
            total=len(stream),
            on_progress=show,
        )
    print(f"{config.topics.events[0]}: {report.records:,} records in {report.elapsed_s:.1f} s")


@command(app)
def replay(
    given: Given,
    file: Annotated[str, typer.Argument(help="CSV, TSV or JSON lines, also .gz and .zip; - for standard input.")],
    columns: MapOption,
    header: HeaderOption = True,
    separator: SepOption = None,
    time_unit: UnitOption = None,
    sort: SortOption = False,
    encoding: EncodingOption = "utf-8",
    speed: Annotated[float | None, typer.Option(help="Seconds of event time in a second; 3600 = an hour.")] = None,
    rate: Annotated[float | None, typer.Option(help="Records a second.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a replay that was cut off.")] = False,
    topic: Annotated[str | None, typer.Option(help="Into this input topic; the first of topics.events.")] = None,
) -> None:
    """Send a file of events into the events topic, at a pace.

    Example: driftline replay events.csv.gz --map user=uid,interest=category,time=ts,type=action --speed 3600
    """
    from rich.console import Console

    from stream.replay import Pace, stored, to_records
    from stream.replay import replay as send
    from stream.terminal import file_form, open_source, say_counts, send_progress

    config = given.load().config
    console = Console(stderr=True)
    log_to(config.app, "replay")
    target = topic or config.topics.events[0]
    if target not in config.topics.events:
        raise ConfigError(f"--topic {target}: topics.events is {config.topics.events}; replay into one of them")
    source = open_source(console, file, columns, file_form(header, separator, time_unit, sort, encoding))
    with source, _opened(config) as transport, send_progress(console) as show:
        _prepare_topics(transport, config)
        kept = None
        if resume:
            reader = transport.reader()
            kept = stored(reader, target, config.topics.partitions)
            reader.close()
        report = send(
            to_records(source, config.events),
            transport,
            topic=target,
            partitions=config.topics.partitions,
            clocks=_clocks(),
            pace=Pace(speed=speed, rate_per_s=rate),
            limit=limit,
            resume=kept,
            fraction=source.fraction,
            on_progress=show,
        )
    say_counts(console, source)
    passed = sum(report.passed_over.values())
    print(
        f"{target}: {report.records:,} records in {report.elapsed_s:.1f} s"
        + (f" after {passed:,} that were there" if passed else "")
    )


@command(app)
def rekey(
    given: Given,
    source: Annotated[str, typer.Argument(help="The topic to read, keyed by a session, by nothing, ...")],
    target: Annotated[str, typer.Argument(help="The topic to write, keyed by the user.")],
    user: Annotated[
        str | None, typer.Option(help="Path of the user id in the values; events.fields.user, or user.")
    ] = None,
    start: StartOption = "earliest",
    until_end: Annotated[bool, typer.Option("--until-end", help="End when all that is there is moved.")] = False,
    slot: Annotated[str, typer.Option(help="This process's own name; several share the partitions.")] = "0",
) -> None:
    """Copy a topic into one that is keyed by the user id, exactly once: for topics keyed by something else.

    Example: driftline rekey clicks-by-session events --user who.id --until-end
    """
    from stream.assembly import prepare_rekey
    from stream.config import topic_names
    from stream.rekey import Rekey, RekeySettings

    config = given.load().config
    log_to(config.app, f"rekey.{slot}")
    worker = config.worker
    with _opened(config) as transport:
        positions = prepare_rekey(transport, config, source, target)
        stop = stop_on_signals(worker.shutdown_s)
        settings = RekeySettings(
            source=source,
            target=target,
            dead_letters=topic_names(config)["dead_letters"],
            positions=positions,
            user=user or config.events.fields.get("user", "user"),
            app=config.app.name,
            slot=slot,
            start=_start(start),
            until_end=until_end,
            batch_records_max=worker.batch_events_max,
            poll_timeout_s=worker.poll_timeout_s,
            retries_max=worker.retries_max,
            backoff_s=worker.backoff_s,
            bad_share_max=worker.poison_share_max,
            bad_window=worker.poison_window,
        )
        moved = Rekey(transport, settings, clock=time.monotonic, sleep=stop.wait).run(stop)
    print(f"{source} -> {target}: {moved.records:,} records moved, {moved.dead_letters:,} dead letters")


@command(app)
def evaluate(
    given: Given,
    file: Annotated[str, typer.Argument(help="CSV, TSV or JSON lines, also .gz and .zip; - for standard input.")],
    columns: MapOption,
    header: HeaderOption = True,
    separator: SepOption = None,
    time_unit: UnitOption = None,
    sort: SortOption = False,
    encoding: EncodingOption = "utf-8",
    report_from: Annotated[
        float, typer.Option(min=0, max=0.99, help="Count from this share of the events on; all are learned.")
    ] = 0.5,
    models: Annotated[
        str | None, typer.Option(help="Names with commas, module:Class of your own, or all; driftline and two rules.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Passes of what has a seed: 0, 1, ...")] = 1,
    first_seed: Annotated[
        int, typer.Option(min=0, help="In place of 0: seeds one by one, in processes beside each other.")
    ] = 0,
    horizon: Annotated[int | None, typer.Option(min=1, max=50, help="Steps ahead; forecast.steps.")] = None,
    weights_delay: Annotated[
        str,
        typer.Option(metavar="N|Ns", help="New weights only every N events, or N seconds of event time; 0: at once."),
    ] = "0",
    limit: Annotated[int | None, typer.Option(min=2, help="The first so many events only.")] = None,
    users: UsersOption = None,
    origin: Annotated[
        Path | None,
        typer.Option("--from", metavar="FOLDER", help="A checkpoint: models that go on from it, beside from scratch."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=1e-9, max=1, help="Of the fine-tune and the adapters; 1e-5, learning.rate.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, max=64, help="Of the adapters.")] = 4,
    new_interests: Annotated[
        bool, typer.Option("--new-interests", help="Forget the checkpoint's interests, the file has other ones.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with curves and a reliability plot.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The last line is JSON with all rows.")] = False,
) -> None:
    """How good the forecasts are: each event is ranked before it is learned, beside other models, in one pass.

    Example: driftline evaluate events.csv.gz --map user=uid,interest=category,time=ts --report-from 0.5 --json
    """
    from itertools import islice

    import msgspec
    from rich.console import Console

    from stream.config import plain_events

    config = plain_events(given.load().config)
    log_to(config.app, "evaluate")
    use_threads(config.learner.threads)
    from stream.evaluation import DEFAULT_MODELS, MODELS, TUNED, Delay, Wanted, read_stream
    from stream.evaluation import evaluate as run_models
    from stream.evaluation_purchases import purchase_rows
    from stream.evaluation_rows import rows_of
    from stream.saved_weights import load_initial
    from stream.terminal import (
        evaluation_progress,
        file_form,
        open_source,
        print_evaluation,
        print_purchases,
        say,
        say_counts,
    )  # fmt: skip
    from stream.tuning import Tuning
    from stream.user_share import UserShare

    tuned = () if origin is None else tuple(TUNED)
    share = UserShare.parse(users or "0-1")
    wanted = Wanted(
        models=(*DEFAULT_MODELS, *tuned)
        if models is None
        else (*MODELS, *tuned)
        if models == "all"
        else tuple(models.split(",")),
        report_from=report_from,
        seeds=seeds,
        first_seed=first_seed,
        horizon=horizon or config.forecast.steps,
        delay=Delay.parse(weights_delay),
        initial=None if origin is None else load_initial(origin, config.network, key="--from"),
        tuning=Tuning(rate=rate, rank=rank, new_interests=new_interests),
    )
    console = Console(stderr=True)
    source = open_source(console, file, columns, file_form(header, separator, time_unit, sort, encoding))
    with source:
        stream = read_stream(islice(share.of(source), limit), config)
    say_counts(console, source)
    for reason, count in stream.left_out.items():
        say(console, f"{source.facts.name}: {count:,} events left out: {reason}")
    collect_seldom()
    with evaluation_progress(console) as show:
        outcomes = run_models(stream, config, wanted, show)
    rows, purchases = rows_of(stream, outcomes, wanted), purchase_rows(stream, outcomes, wanted)
    print_evaluation(Console(), rows)
    print_purchases(Console(), purchases)
    if html is not None:
        from stream.evaluation_page import write_evaluation

        write_evaluation(html, f"Forecasts: {source.facts.name}", stream, outcomes, rows, wanted)
    if as_json:
        print(msgspec.json.encode({"rows": rows, "purchases": purchases}).decode())


@command(app)
def pretrain(
    given: Given,
    file: Annotated[str, typer.Argument(help="CSV, TSV or JSON lines, also .gz and .zip; - for standard input.")],
    columns: MapOption,
    header: HeaderOption = True,
    separator: SepOption = None,
    time_unit: UnitOption = None,
    sort: SortOption = False,
    encoding: EncodingOption = "utf-8",
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = Path("var/pretrain"),
    origin: Annotated[
        Path | None, typer.Option("--from", metavar="FOLDER", help="Go on from a checkpoint: a fine-tune.")
    ] = None,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="With --from: train low-rank adapters and new interests alone.")
    ] = False,
    rank: Annotated[int, typer.Option(min=1, max=64, help="Of the adapters.")] = 4,
    rate: Annotated[
        float | None,
        typer.Option(min=1e-9, max=1, help="Learning rate; learning.rate, with --from 1e-5, with --adapters as usual."),
    ] = None,
    new_interests: Annotated[
        bool, typer.Option("--new-interests", help="With --from: forget its interests, the file has other ones.")
    ] = False,
    kind: Annotated[str | None, typer.Option(help="What the interests are; the column's name.")] = None,
    epochs: Annotated[int, typer.Option(min=1, max=1_000, help="Passes over the file, at most.")] = 8,
    patience: Annotated[int, typer.Option(min=1, max=100, help="Epochs without a better one, then it ends.")] = 2,
    hold_out: Annotated[
        float, typer.Option(min=0.01, max=0.5, help="Share of the events, the last in time, that judges the epochs.")
    ] = 0.1,
    users: UsersOption = None,
    limit: Annotated[int | None, typer.Option(min=2, help="The first so many events only.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="app.seed.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume/--restart", help="Go on with an unfinished training in --out, or drop it.")
    ] = None,
    checkpoint_every: Annotated[float, typer.Option(min=0, help="Seconds between two marks to go on from.")] = 120.0,
    tensorboard: Annotated[bool, typer.Option(help="Curves for TensorBoard in the folder.")] = True,
    wandb: Annotated[str | None, typer.Option(metavar="PROJECT", help="Curves to Weights & Biases too.")] = None,
) -> None:
    """Train on a file, several times over, and keep the weights: learner.initial_weights starts from them.

    Example: driftline pretrain events.csv.gz --map user=uid,interest=category,time=ts --out var/pretrain
    """
    from itertools import islice

    from rich.console import Console

    from stream.config import plain_events

    config = plain_events(given.load().config)
    log_to(config.app, "pretrain")
    use_threads(config.learner.threads)
    from stream import pretrain_command as command_of
    from stream.evaluation import read_stream
    from stream.pretraining import Plan
    from stream.terminal import evaluation_progress, file_form, open_source, say_counts
    from stream.tuning import Tuning
    from stream.user_share import UserShare
    from stream.warmup import warm_up

    how: Literal["online", "fine", "adapters"] = "adapters" if adapters else "fine" if origin else "online"
    asked = command_of.Asked(
        columns=columns,
        out=out,
        plan=Plan(epochs=epochs, patience=patience, hold_out=hold_out, seed=config.app.seed if seed is None else seed),
        tuning=Tuning(how=how, rate=rate, rank=rank, new_interests=new_interests),
        origin=origin,
        kind=kind,
        resume=resume,
        every_s=checkpoint_every,
        tensorboard=tensorboard,
        wandb=wandb,
    )
    command_of.check_folder(asked)
    initial = command_of.origin(asked, config)
    console = Console(stderr=True)
    source = open_source(console, file, columns, file_form(header, separator, time_unit, sort, encoding))
    share = UserShare.parse(users or "0-1")
    with source:
        stream = read_stream(islice(share.of(source), limit), config)
    say_counts(console, source)
    stop = stop_on_signals()
    warm_up(config)
    with evaluation_progress(console) as show:
        training, trackers = command_of.make(asked, config, stream, initial, show, stop.is_set)
        try:
            found = training.run(resume=bool(resume))
        finally:
            for tracker in trackers:
                tracker.close()
    if found is None:
        print(f"{out}: stopped; the same command with --resume goes on")
        return
    for row in found:
        print(
            f"epoch {row.epoch}: -log p {row.train_loss:.4f}, of the last part {row.held_loss:.4f}, "
            f"MRR {row.held_mrr:.4f}, HR@10 {row.held_hr_10:.4f}"
        )
    best = min(found, key=lambda row: row.held_loss)
    print(
        f"{out}: {len(stream):,} events of {stream.users:,} users, best epoch {best.epoch}, "
        f"{training.trained_share:.2%} of the numbers trained"
    )


@command(app)
def evaluate_shifts(
    given: Given,
    file: Annotated[str, typer.Argument(help="CSV, TSV or JSON lines, also .gz and .zip; - for standard input.")],
    columns: MapOption,
    header: HeaderOption = True,
    separator: SepOption = None,
    time_unit: UnitOption = None,
    sort: SortOption = True,
    encoding: EncodingOption = "utf-8",
    suites: Annotated[str | None, typer.Option(help="S0 to S7 with commas; all that the file allows.")] = None,
    detectors: Annotated[str | None, typer.Option(help="Names with commas; all.")] = None,
    arl0: Annotated[str, typer.Option(help="Events between false alarms, with commas.")] = "500",
    labels: Annotated[Path | None, typer.Option(help="Labelled blocks (S5).")] = None,
    test_users: Annotated[
        float, typer.Option(min=0.05, max=1, help="Share of users to report on; the rest is tuned on. 1: all are both.")
    ] = 0.5,
    window: Annotated[int | None, typer.Option(min=20, help="A made shift is missed after so many events.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the halves and the made shifts.")] = 0,
    processes: Annotated[int, typer.Option(min=0, help="Detectors measured at a time; 0 = one a core.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The last line is JSON with all rows.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots and stories.")] = None,
) -> None:
    """What the shift alerts are worth: delay, misses and false alarms beside other detectors, at the same rate.

    Example: driftline evaluate-shifts events.csv.gz --map user=uid,interest=category,time=ts --arl0 200,500 --json
    """
    import msgspec
    from rich.console import Console

    from stream.config import plain_events

    config = plain_events(given.load().config)
    log_to(config.app, "evaluate-shifts")
    from stream import shift_evaluation as shifts
    from stream.shift_terminal import print_shifts
    from stream.terminal import evaluation_progress, file_form, open_source, say_counts

    wanted = shifts.asked(suites, detectors, arl0, test_users, window, seed, labels=labels is not None)
    blocks = None if labels is None else shifts.read_labels(labels)
    console = Console(stderr=True)
    source = open_source(console, file, columns, file_form(header, separator, time_unit, sort, encoding))
    with source:
        events = shifts.read_histories(source)
    say_counts(console, source)
    with evaluation_progress(console, "detectors") as show:
        rows = shifts.evaluate_shifts(events, blocks, config.shift, wanted, show, processes or os.cpu_count() or 1)
    print_shifts(Console(), rows, same_users=test_users >= 1)
    if html is not None:
        from stream.shift_report import write_shift_report

        write_shift_report(html, rows, events, config.shift, wanted)
    if as_json:
        print(msgspec.json.encode({"further": [shifts.further_row(row) for row in rows]}).decode())
        print(msgspec.json.encode({"rows": [shifts.json_row(row) for row in rows]}).decode())


# ---------------------------------------------------------------------------------------------------- what comes out


@command(app)
def tail(
    given: Given,
    topic: Annotated[
        str, typer.Argument(help="events, forecasts, alerts, dead-letters, metrics, state, ... or its name.")
    ],
    start: Annotated[str, typer.Option("--from", metavar="start|end|N", help="N newest of each partition.")] = "end",
    limit: Annotated[int | None, typer.Option(min=1, help="End after so many records.")] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Values as they are, one a line.")] = False,
    follow: Annotated[bool, typer.Option(help="Wait for new records.")] = True,
    user: Annotated[str | None, typer.Option(help="Only records with this key.")] = None,
) -> None:
    """Print the records of a topic as they come.

    Example: driftline tail alerts --from start --no-follow
    """
    from stream.tail import as_json, in_words, topic_of
    from stream.tail import follow as follow_records

    config = given.load().config
    log_to(config.app, "tail")
    role, name = topic_of(config, topic)
    stop = stop_on_signals()
    shown = 0
    with _opened(config, existing=True) as transport:
        partitions = _partitions_of(transport, name)
        for record in follow_records(transport, name, partitions, start=start, follow=follow, stopped=stop.is_set):
            if user is not None and record.key != user.encode():
                continue
            try:
                print(as_json(record) if json_lines else in_words(role, record), flush=True)
            except BrokenPipeError:  # `driftline tail ... | head` has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                break
            shown += 1
            if limit is not None and shown >= limit:
                break


def _print(told: Any, lines: Iterable[str], as_json: bool) -> None:
    """A struct as JSON on one line, or what a person reads."""
    import msgspec

    from stream.tail import printable

    if as_json:
        print(msgspec.json.encode(told).decode())
        return
    for line in lines:
        print(printable(line))


@command(app)
def user(
    given: Given,
    user_id: Annotated[str, typer.Argument(metavar="ID", help="The user id, as it stands in the events.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with the user's alerts and their plots.")] = None,
) -> None:
    """What is known of one user: recent and usual interests, evidence of a shift, newest forecast, alerts.

    Example: driftline user u000017
    """
    from stream.assembly import make_decoder
    from stream.explain import explanation, write_page
    from stream.portrait import in_lines, portrait

    config = given.load().config
    log_to(config.app, "user")
    with _opened(config, existing=True) as transport:
        decoder = make_decoder(config)
        told = portrait(transport, config, decoder, user_id)
        if html is not None:
            newest = [explanation(transport, config, decoder, a.alert_id) for a in told.alerts[-PAGE_ALERTS_MAX:]]
            write_page(html, newest, f"User {user_id}")
    _print(told, in_lines(told), as_json)


@command(app)
def explain(
    given: Given,
    alert_id: Annotated[str, typer.Argument(metavar="ALERT_ID", help="As it stands in the alert: topic/3/1381.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots that needs no network.")] = None,
) -> None:
    """Why an alert was raised: what came, what went, how sure that is, the events around it, and whether it held.

    Example: driftline explain events/3/1381 --html alert.html
    """
    from stream.assembly import make_decoder
    from stream.explain import explanation, in_lines, write_page

    config = given.load().config
    log_to(config.app, "explain")
    with _opened(config, existing=True) as transport:
        told = explanation(transport, config, make_decoder(config), alert_id)
    if html is not None:
        write_page(html, [told], f"Alert {alert_id}")
    _print(told, in_lines(told), as_json)


@command(app)
def forget(
    given: Given,
    user_id: Annotated[str, typer.Argument(metavar="ID", help="The user id, as it stands in the events.")],
) -> None:
    """Erase what is known of a user: workers and learner drop the record, histories and older state blocks.

    Example: driftline forget u000017
    """
    from stream.assembly import make_decoder
    from stream.orders import forget as order

    config = given.load().config
    log_to(config.app, "forget")
    make_decoder(config)  # its checks of state.hash_key
    with _opened(config, existing=True) as transport:
        told = order(transport, config, user_id, int(time.time() * 1_000))
    print(f"ordered in all {told} partitions; each worker erases when it has consumed what is there now")


# ---------------------------------------------------------------------------------------------------- around it


@command(topics_app, "create")
def topics_create(given: Given) -> None:
    """Make the topics that are missing, with the settings that they need.

    Example: driftline topics create --transport kafka --set topics.partitions=8
    """
    from stream.assembly import check_topics, topic_specs

    config = given.load().config
    log_to(config.app, "topics")
    with _opened(config) as transport:
        admin = transport.admin()
        try:
            created = admin.create(topic_specs(config))
        finally:
            admin.close()
        for name in created:
            print(f"{name}: created, {config.topics.partitions} partitions")
        print(f"{len(topic_specs(config)) - len(created)} were there before")
        check_topics(transport, config)


@command(topics_app, "list")
def topics_list(given: Given) -> None:
    """The application's topics: partitions, records, and what is wrong with them.

    Example: driftline topics list
    """
    from stream.assembly import topic_problems, topic_specs
    from stream.transport import TopicPartition

    config = given.load().config
    log_to(config.app, "topics")
    with _opened(config, existing=True) as transport:
        admin, reader = transport.admin(), transport.reader()
        try:
            for name, there in admin.describe([spec.name for spec in topic_specs(config)]).items():
                if there is None:
                    continue  # one of the problems below
                bounds = [reader.bounds(TopicPartition(name, p)) for p in range(there.partitions)]
                records = sum(end - first for first, end in bounds)
                print(f"{name}: {there.partitions} partitions, {records:,} offsets in use")
        finally:
            reader.close()
            admin.close()
        problems = topic_problems(transport, config)
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise typer.Exit(2)


@command(app, "config")
def config_(
    given: Given,
    template: Annotated[bool, typer.Option("--template", help="A commented config.toml with every default.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The reference as Markdown.")] = False,
    commands: Annotated[bool, typer.Option("--commands", help="The reference of the commands as Markdown.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="The reference of the metrics as Markdown.")] = False,
) -> None:
    """The settings in force and where each comes from. Secrets are never shown.

    Example: driftline config --set worker.slot=1
    """
    from stream import reference
    from stream.config import values

    if template:
        print(reference.template(), end="")
    elif markdown:
        print(reference.markdown(), end="")
    elif commands:
        print(reference.commands(typer.main.get_command(app)), end="")
    elif metrics:
        from stream.metrics import markdown as metrics_reference

        print(metrics_reference(), end="")
    else:
        loaded = given.load()
        rows = [(f"{key} = {reference.shown(key, value)}", loaded.origins[key]) for key, value in values(loaded.config)]
        width = min(60, max(len(setting) for setting, _ in rows))
        for setting, origin in rows:
            print(f"{setting:{width}}  # {origin}")


@command(app)
def doctor(given: Given) -> None:
    """Look at everything that a run needs (python, packages, log, topics, input, clock, disk, GPU) and say what to do.

    Example: driftline doctor --transport kafka
    """
    from stream.assembly import make_decoder
    from stream.doctor import examine

    config = given.load().config
    log_to(config.app, "doctor")
    failed = 0
    for finding in examine(config, lambda: _transport(config), lambda: make_decoder(config)):
        failed += finding.status == "fail"
        advice = f"\n      -> {finding.advice}" if finding.advice and finding.status != "ok" else ""
        print(f"{finding.status:4}  {finding.subject}: {finding.found}{advice}", flush=True)
    if failed:
        raise ConfigError(f"{failed} of these would stop a run")


# ---------------------------------------------------------------------------------------------------- assembling


def _transport(config: Config) -> Transport:
    """The log that the configuration names, opened."""
    if config.transport == "kafka":
        from stream.kafka import KafkaLog

        return KafkaLog(config.kafka, transaction_timeout_s=config.worker.transaction_timeout_s)
    from stream.embedded import EmbeddedLog

    embedded = config.embedded
    return EmbeddedLog(Path(embedded.path), lease_s=embedded.lease_s, lock_timeout_s=embedded.lock_timeout_s)


@contextmanager
def _opened(config: Config, *, existing: bool = False) -> Iterator[Transport]:
    """The log, closed at the end. `existing`: a command that only looks must not make a new file."""
    if existing and config.transport == "embedded" and not Path(config.embedded.path).exists():
        raise ConfigError(f"there is no log at {config.embedded.path} yet; driftline run, simulate or replay makes one")
    transport = _transport(config)
    try:
        yield transport
    finally:
        transport.close()


def _prepare_topics(transport: Transport, config: Config) -> None:
    """Check the topics; on the embedded log, which is this application's own, missing ones are made."""
    from stream.assembly import check_topics, topic_specs

    if config.transport == "embedded":
        admin = transport.admin()
        try:
            admin.create(topic_specs(config))
        finally:
            admin.close()
    check_topics(transport, config)


def _partitions_of(transport: Transport, topic: str) -> int:
    admin = transport.admin()
    try:
        there = admin.describe([topic])[topic]
    finally:
        admin.close()
    if there is None:
        raise ConfigError(f"topic {topic} is missing; `driftline topics create` makes it")
    return there.partitions


def _start(text: str) -> Start:
    from stream.start import parse_start

    return parse_start(text, int(time.time() * 1_000))


def _clocks() -> Clocks:
    from stream.replay import Clocks

    return Clocks(now_s=time.monotonic, wall_ms=lambda: int(time.time() * 1_000), sleep=time.sleep)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: errors of ours become one line and an exit code."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="driftline")
    except DriftlineError as error:
        log.debug("event=failed", exc_info=error)
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        print(f"driftline: {error}", file=sys.stderr)
        if logs_to_file():
            log.error("event=failed code=%d error=%r", code, str(error))
        sys.exit(code)
    except Exception:
        if logs_to_file():
            log.exception("event=crashed")
            print("driftline: crashed; the log says where", file=sys.stderr)
            sys.exit(1)
        raise


if __name__ == "__main__":
    main()
