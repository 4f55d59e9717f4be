"""The command line: `python -m codesign` or `jax-codesign`, with run, search, trace, cost, report, chips and export.

Heavy imports stand inside the functions that need them, so that --help and mistakes in arguments are answered at once.
"""

import contextlib
import gc
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from codesign import rundir
from codesign.cli_search import NetworkOptions, QuantisedNetworkOptions, SearchCommand
from codesign.columns import COLUMNS, METRICS, OPERATION_COLUMNS, Column, summary_rows
from codesign.config import (
    Between,
    ChipConfig,
    Config,
    Count,
    Positive,
    Supply,
    check_config,
    check_ranges,
    fingerprint,
    load_config,
)

PROGRAM = "jax-codesign"
TRACEBACK_VARIABLE = "JAX_CODESIGN_TRACEBACK"
# Tracing makes many small objects that stay: the garbage collector, which would walk them every 700, costs 0.4 s of a `cost`.
_NEW_OBJECTS = 20_000

Json = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="json")]


@dataclass(frozen=True)
class RunCommand:
    """Train a network and design its chip together, compare with baselines, write a report.

    Without any option this is the demo: a LeNet on the digits that come with scikit-learn. Settings come from --config,
    and every one of them can be given as an option, which wins.
    """

    config: Path | None = None
    """YAML file with settings; what it leaves out has the default shown below."""
    resume: Path | None = None
    """Run directory of an interrupted run, to go on from its last checkpoint with its own settings."""
    as_json: Json = False
    """Print one JSON object as the last line of the output; tables and progress go to the error stream."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class TraceCommand(NetworkOptions):
    """List the convolutions and matrix products of one training step of a network, pass by pass."""

    as_json: Json = False
    """Print one JSON object as the last line of the output; the table goes to the error stream."""


@dataclass(frozen=True)
class CostCommand(QuantisedNetworkOptions):
    """Energy, latency and area of a network on a chip: one training step, and one inference of a single sample.

    Numbers come with the interval that the doubt about the chip's technology leaves, and as multiples of a lower bound.
    """

    chip: str = "edge_trainer"
    """Name of a chip, such as `chips` lists; also a published one, or the file of a ZigZag accelerator (docs/exchange.md)."""
    mode: str | None = None
    """Mode of a published chip; by default the narrowest that holds the bits."""
    rows: Count | None = None
    """Rows of its MAC array instead of the chip's own."""
    columns: Count | None = None
    """Columns of its MAC array instead of the chip's own."""
    local_kib: Positive | None = None
    """Local SRAM in KiB instead of the chip's own."""
    shared_kib: Positive | None = None
    """Shared SRAM in KiB instead of the chip's own."""
    vdd: Supply | None = None
    """Supply voltage in volts instead of the chip's own."""
    node_nm: Positive | None = None
    """Technology node in nanometres instead of the chip's own."""
    evaluations: Count = 2000
    """Mappings tried per operation in each of six rounds; more take longer and may find cheaper ones."""
    skip_after_epochs: Annotated[int, Between(0, 100_000)] = 0
    """Train for so many epochs with these bits first; the chip skips the zeros of inputs, errors and masks that are
    measured then. 0: nothing is skipped."""
    as_json: Json = False
    """Print one JSON object as the last line of the output; the table goes to the error stream."""


@dataclass(frozen=True)
class ReportCommand:
    """Make report.html and the figures of a finished run again."""

    directory: tyro.conf.Positional[Path]
    """Run directory, such as runs/lenet-digits-001."""
    as_json: Json = False
    """Print one JSON object as the last line of the output; the table goes to the error stream."""


@dataclass(frozen=True)
class ChipsCommand:
    """List the chips that are known here, or explain one: each number with its source, what is assumed and how far."""

    name: tyro.conf.Positional[str | None] = None
    """Chip to explain; all are listed without it."""
    as_json: Json = False
    """Print one JSON object as the last line of the output; the table goes to the error stream."""


@dataclass(frozen=True)
class ExportCommand:
    """Write a finished run for other tools: its network, its chip and mappings, its layers, its metrics."""

    directory: tyro.conf.Positional[Path]
    """Run directory, such as runs/lenet-digits-001."""
    format: Literal["onnx", "timeloop", "tensorboard", "csv"] = "onnx"
    """onnx: the quantised network; timeloop: chip, problem and mapping of every operation; tensorboard: metrics; csv: layers."""
    out: Path | None = None
    """File (onnx, csv) or folder to write; None: one in the run directory."""
    samples: Count = 1
    """Images per call of the ONNX graph."""
    as_json: Json = False
    """Print one JSON object as the last line of the output."""


Command = RunCommand | SearchCommand | TraceCommand | CostCommand | ReportCommand | ChipsCommand | ExportCommand


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, see `exit_code`."""
    if "" not in sys.path:
        # A model of the user's own lies where the command is run; last, lest a folder `hw` there hide ours.
        sys.path.append("")
    gc.set_threshold(_NEW_OBJECTS)
    return exit_code(lambda: _do(_parse(list(sys.argv[1:] if argv is None else argv))))


def exit_code(action: Callable[[], int | None]) -> int:
    """Do what a command line asks for.

    Returns:
      The exit code: that of `action`, 0 for None; 2 after a mistake of the user, told in one line; 130 after Ctrl-C; 141
      where the output's reader has gone.
    """
    try:
        return action() or 0
    except SystemExit as finished:  # --help
        return int(finished.code or 0)
    except KeyboardInterrupt as interrupt:
        _complain(str(interrupt) or "interrupted")
        return 130
    except BrokenPipeError:  # whoever read the output has had enough, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        _complain(f"error: {error}")
        return 2


def _do(command: Command) -> None:
    match command:
        case RunCommand():
            _run(command)
        case SearchCommand():
            _search(command)
        case TraceCommand():
            _trace(command)
        case CostCommand():
            _cost(command)
        case ReportCommand():
            _report(command)
        case ChipsCommand():
            _chips(command)
        case ExportCommand():
            _export(command)


def _parse(argv: list[str]) -> Command:
    """The command of the arguments; settings of `run` are those of its file, changed by its options.

    Raises:
      ValueError: arguments that do not fit; one line.
      FileNotFoundError: no such config file or run directory.
      SystemExit: after --help.
    """
    command = _parse_with(argv, Config())
    if not isinstance(command, RunCommand):
        check_ranges(command, "the command line")
        return command
    if command.config and command.resume:
        raise ValueError("--config beside --resume: a run goes on with its own settings; give one of the two")
    path = command.resume / rundir.CONFIG if command.resume else command.config
    if path is None:
        check_config(command.settings, "the command line")
        return command
    if command.resume and not path.is_file():
        raise FileNotFoundError(f"no run to go on with: {path} is missing; check the directory after --resume")
    loaded = load_config(path)
    command = _parse_with(argv, loaded)
    assert isinstance(command, RunCommand)
    check_config(command.settings, f"{path} and the command line")
    if command.resume and fingerprint(command.settings) != fingerprint(loaded):
        raise ValueError(f"changed settings beside --resume {command.resume}: leave them out, or start a new run")
    return command


def _parse_with(argv: list[str], settings: Config) -> Command:
    """Parse once, `settings` being what the options of `run` start from."""
    default = RunCommand(settings=settings)
    commands = (
        Annotated[RunCommand, tyro.conf.subcommand("run", default=default)]
        | Annotated[SearchCommand, tyro.conf.subcommand("search")]
        | Annotated[TraceCommand, tyro.conf.subcommand("trace")]
        | Annotated[CostCommand, tyro.conf.subcommand("cost")]
        | Annotated[ReportCommand, tyro.conf.subcommand("report")]
        | Annotated[ChipsCommand, tyro.conf.subcommand("chips")]
        | Annotated[ExportCommand, tyro.conf.subcommand("export")]
    )
    description = (
        "Design a neural network's bit widths and the chip that trains it together. Start with 'run', which takes some "
        f"minutes, or 'cost', which takes seconds. A mistake is told in one line; with {TRACEBACK_VARIABLE}=1 in the "
        "environment, with its traceback."
    )
    return read_arguments(lambda: tyro.cli(commands, prog=PROGRAM, description=description, args=argv), PROGRAM)


def read_arguments[T](read: Callable[[], T], program: str) -> T:
    """What `read`, a call of `tyro.cli`, makes of the arguments of a program.

    Raises:
      ValueError: arguments that do not fit; one line in place of tyro's box.
      SystemExit: after --help.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return read()
    except SystemExit as finished:
        if finished.code in (None, 0):
            raise
        raise ValueError(_in_one_line(told.getvalue(), program)) from None


def _in_one_line(box: str, program: str) -> str:
    """The message inside one of tyro's boxes, with its first suggestion."""
    parts = re.split(r"[─-]{4,}", re.sub(r"[│╭╮╰╯]", " ", box))  # rules are hyphens where the terminal knows no more
    sections = [" ".join(part.split()) for part in parts]
    message, *hints = [section for section in sections if section][1:] or [box]
    option = next((re.search(r"--\S+", hint) for hint in hints if hint.startswith("Perhaps you meant")), None)
    choices = next((hint for hint in hints if hint.startswith("Available")), None)
    advice = f"did you mean {option[0]}?" if option else choices or f"see '{program} --help'"
    return f"arguments: {message.rstrip('.')}; {advice}"


def _run(command: RunCommand) -> None:
    from codesign.progress import TerminalProgress
    from codesign.runner import run

    settings = command.settings
    stem = f"{settings.model.name}-{Path(settings.data.name).name}".replace(":", ".")
    with contextlib.nullcontext(command.resume) if command.resume else rundir.new_run(settings.out, stem) as directory:
        progress = TerminalProgress()
        progress.message(f"run directory: {directory}")
        progress.message("tracing the network, searching first mappings")
        try:
            result = run(settings, directory, resume=command.resume is not None, progress=progress)
        except KeyboardInterrupt:
            begun = (directory / rundir.CONFIG).exists()
            raise KeyboardInterrupt(
                "interrupted"
                + (f"; go on with: {PROGRAM} run --resume {directory}" if begun else " before anything was done")
            ) from None
    _show_summary(result["summary"], directory, command.as_json)


def _search(command: SearchCommand) -> None:
    from codesign.cli_search import search

    _show(*search(command), command.as_json)


def _report(command: ReportCommand) -> None:
    from codesign.report import write_report

    if not command.directory.is_dir():
        raise FileNotFoundError(f"no such directory: {command.directory}; give a run directory, such as those in runs/")
    write_report(command.directory)
    _show_summary(rundir.read_result(command.directory).get("summary", []), command.directory, command.as_json)


def _export(command: ExportCommand) -> None:
    from codesign.run_export import export_run

    paths = export_run(command.directory, command.format, command.out, command.samples)
    told = str(paths[0]) if len(paths) == 1 else f"{len(paths)} in {paths[0].parent}"
    print(f"written: {told}", file=sys.stderr if command.as_json else sys.stdout)
    if command.as_json:
        print(json.dumps({"written": [str(path) for path in paths]}))


def _trace(command: TraceCommand) -> None:
    from codesign.inspection import trace_model

    traced = trace_model(command.model, command.data, command.batch_size)
    table = Table(title=f"One training step of {command.model}, batch {command.batch_size}")
    columns = {
        "layer": "layer",
        "pass": "pass",
        "loops": "loops",
        "effective_macs": "MACs",
        "macs": "MACs with padding",
        "weights": "weights",
        "inputs": "inputs",
        "outputs": "outputs",
    }
    for key, heading in columns.items():
        table.add_column(heading, justify="left" if key in ("layer", "pass", "loops") else "right")
    for row in traced["operations"]:
        table.add_row(*(f"{row[key]:,}" if isinstance(row[key], int) else row[key] for key in columns))
    table.add_section()
    table.add_row("total", "", "", f"{traced['effective_macs']:,}", f"{traced['macs']:,}")
    _show([table], traced, command.as_json)


def _chips(command: ChipsCommand) -> None:
    from codesign.chip_catalogue import explain_chip, list_chips

    if command.name is None:
        chips = list_chips()
        _show([_rows_table("Chips", chips)], {"chips": chips}, command.as_json)
        return
    told = explain_chip(command.name)
    headings = {"facts": "public facts", "chips": "as costed"}
    kinds = ("facts", "modes", "mechanisms", "assumptions", "chips")
    tables = [_rows_table(f"{told['title']}: {headings.get(kind, kind)}", told[kind]) for kind in kinds if told[kind]]
    _show(tables, told, command.as_json)


def _rows_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of plain values, a column for each key that any of them has."""
    table = Table(title=title)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    for key in keys:
        table.add_column(key.replace("_", " "))
    for row in rows:
        cells = (row.get(key, "") for key in keys)
        table.add_row(*map(_cell, cells))
    return table


def _cell(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, list | tuple):
        is_nested = any(isinstance(entry, list | tuple) for entry in value)
        return ("; " if is_nested else ", ").join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cost(command: CostCommand) -> None:
    from codesign.inspection import cost_model

    own = {name: getattr(command, name) for name in ("rows", "columns", "local_kib", "shared_kib", "vdd", "node_nm")}
    chip = ChipConfig(preset=command.chip, **own)
    with Console(stderr=True).status("searching mappings"):
        costs = cost_model(
            command.model,
            command.data,
            command.batch_size,
            command.bits,
            chip,
            command.evaluations,
            command.skip_after_epochs,
            command.mode,
        )
    title = f"{command.model} on {command.chip}, {command.bits} bit"
    steps = {
        f"training step, batch {command.batch_size}": costs["training_step"],
        "inference, batch 1": costs["inference"],
    }
    first = next(iter(steps))
    tables = [_step_table(title, steps), _operation_table(f"operations of the {first}", costs["training_step"])]
    _show(tables, costs, command.as_json)


def _step_table(title: str, steps: Mapping[str, Mapping[str, Any]]) -> Table:
    """Headline numbers and energies by component, a pair of columns for each step."""
    table = Table(title=title, caption=_interval_caption())
    table.add_column("")
    for name in steps:
        table.add_column(name, justify="right")
        table.add_column("× bound", justify="right")

    def add_row(column: Column, rows: Iterable[Mapping[str, Any]]) -> None:
        pairs = ((_with_interval(column, row), _multiple(row, METRICS.get(column.key, ""))) for row in rows)
        table.add_row(column.heading, *itertools.chain.from_iterable(pairs))

    for column in COLUMNS:
        if column.key in METRICS:
            add_row(column, steps.values())
    add_row(Column("energy_per_sample_uj", "energy per sample", "µJ", ""), steps.values())
    table.add_section()
    for name in next(iter(steps.values()))["energy_by_component_uj"]:
        by_component = [
            step["energy_by_component_uj"] | {"intervals": step["intervals"]["energy_by_component_uj"]}
            for step in steps.values()
        ]
        add_row(Column(name, f"energy of {name}", "µJ", ""), by_component)
    return table


def _operation_table(title: str, step: Mapping[str, Any]) -> Table:
    """Energy, latency and distance to the bound of every operation."""
    table = Table(title=title)
    table.add_column("operation")
    for column in OPERATION_COLUMNS:
        table.add_column(_broken(column.heading), justify="right")
    for row in step["operations"]:
        table.add_row(row["operation"], *(_with_interval(column, row) for column in OPERATION_COLUMNS))
    return table


def _show_summary(rows: Sequence[Mapping[str, Any]], directory: Path, as_json: bool) -> None:
    """The final table of a run, and where its report lies."""
    complete = summary_rows(rows)
    columns = [column for column in COLUMNS if any(row.get(column.key) is not None for row in complete)]
    told = f"report: {directory / rundir.REPORT}"
    drawn = any("intervals" in row for row in complete)
    table = Table(caption=f"{_interval_caption()}\n{told}" if drawn else told)
    table.add_column("method")
    for column in columns:
        table.add_column(_broken(column.heading), justify="right")
    for row in complete:
        table.add_row(str(row["method"]), *(_with_interval(column, row, "\n") for column in columns))
    _show([table], {"directory": str(directory), "summary": complete}, as_json)


def _interval_caption() -> str:
    from codesign.uncertainty import NUM_SAMPLES, QUANTILES

    low, high = (round(100 * share) for share in QUANTILES)
    return (
        f"ranges: {low}th to {high}th percentile of {NUM_SAMPLES} technologies, constants drawn between their low and high "
        "(hw/data)"
    )


def _with_interval(column: Column, row: Mapping[str, Any], between: str = "  ") -> str:
    """A number of a row and its interval."""
    interval = column.show_interval(row)
    return column.show(row) + (f"{between}[dim]{interval}[/dim]" if interval else "")


def _multiple(row: Mapping[str, Any], key: str) -> str:
    """A row's multiple of its bound, where it has one."""
    return f"{row[key]:.2f}" if key in row else ""


def _broken(heading: str) -> str:
    """A heading on several lines, its unit on the last."""
    return heading.replace(" to ", " to\n").replace(" (", "\n(")


def _show(tables: Sequence[Table], data: Mapping[str, Any], as_json: bool) -> None:
    """Tables for people; the same as one line of JSON on the output if asked."""
    console = Console(stderr=as_json)
    if not console.is_terminal:
        console.width = 160  # a pipe has no width to fold a table to
    for table in tables:
        console.print(table)
    if as_json:
        print(json.dumps(rundir.plain(data, finite=True), allow_nan=False))


def _complain(text: str) -> None:
    print(" ".join(text.split()), file=sys.stderr)
