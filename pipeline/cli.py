"""The `calig` command.

Nothing heavy is imported at the top: `calig --help` answers without torch.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from calig.pipeline.errors import InputError

DONE, FAILED, BAD_INPUT, PARTLY, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143

_EXAMPLES = """\
examples:
  calig run                                        the quickstart: embedded data, minutes on two cores
  calig run experiment=sst2 data.path=DIR          a real data set, read from a local folder
  calig run data=files data.path=reviews.csv model=distilbert trainer=gpu run.name=reviews
  calig run run.resume=runs/quickstart             continue where a run stopped
  calig explain runs/quickstart --text "not bad"   what decides, word by word
  calig compare runs/one runs/two                  what differs, and whether the explanations agree
  calig config experiment=hatexplain model.lr=3e-5 see the resolved configuration first
"""

_EXPLAIN_EXAMPLES = """\
examples:
  calig explain runs/quickstart --text "the plot was not bad"
  calig explain runs/quickstart --text "..." --target negative --method integrated_gradients --html page.html
  calig explain path/to/model --file reviews.csv --out explained
  calig explain path/to/gpt2 --next-token --text "The capital of France is" --target " Paris" --versus " London"
  calig explain path/to/image_model --file image.png --html page.html
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (ARCHITECTURE, Command line)."""
    options = _parser().parse_args(arguments)
    if options.command is None:
        _parser().print_help()
        return DONE
    # Parallel tokenizers warn about forks that Lightning's launchers make.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _on_sigterm) if in_main_thread else None
    try:
        code = options.action(options)
        sys.stdout.flush()  # here, and not at the end of the process, a broken pipe can still be met
        return code
    except InputError as error:
        return _stop(options, error, BAD_INPUT)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        return _broken_pipe(options)
    except SystemExit as error:
        # Lightning turns Ctrl+C into an exit of its own, and rich a pipe that nobody reads.
        causes = _causes(error)
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            return _interrupted()
        if any(isinstance(cause, BrokenPipeError) for cause in causes):
            return _broken_pipe(options)
        return int(error.code or 0) if not isinstance(error.code, str) else FAILED
    except Exception as error:
        return _stop(options, error, FAILED)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _causes(error: BaseException) -> list[BaseException]:
    """What was being handled when an error was raised, outwards."""
    found: list[BaseException] = []
    cause = error.__cause__ or error.__context__
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return INTERRUPTED


def _broken_pipe(options: argparse.Namespace) -> int:
    # The reader of a pipe has gone: nothing to say, and nobody to say it to. A run that lost its listener is not done.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED if options.command == "run" else DONE


def _stop(options: argparse.Namespace, error: Exception, code: int) -> int:
    if options.traceback:
        traceback.print_exception(error)
    elif code == BAD_INPUT:
        print(f"calig: {error}", file=sys.stderr)
    else:
        print(f"calig: {type(error).__name__}: {error}\n(--traceback shows where)", file=sys.stderr)
    return code


def _on_sigterm(*_: object) -> None:
    raise SystemExit(TERMINATED)


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser = argparse.ArgumentParser(
        prog="calig",
        description="Fine-tune a transformer, then explain it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    parser.set_defaults(command=None, traceback=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    run = commands.add_parser(
        "run",
        parents=[shared],
        help="train, test, calibrate where asked, explain, compare methods, report",
        description="Run the stages of an experiment. Without one: experiment=quickstart.",
        epilog=_Keys(),
        formatter_class=_HelpWithKeys,
    )
    _add_overrides(run)
    run.set_defaults(action=_run)
    _add_explain(commands, shared)
    config = commands.add_parser("config", parents=[shared], help="print the resolved configuration")
    _add_overrides(config)
    config.set_defaults(action=_config)
    report = commands.add_parser("report", parents=[shared], help="render report.html of a run again")
    report.add_argument("run", metavar="RUN_DIR")
    report.set_defaults(action=_report)
    compare = commands.add_parser(
        "compare",
        parents=[shared],
        help="two runs side by side: configurations, metrics, agreement of explanations",
    )
    compare.add_argument("runs", metavar="RUN_DIR", nargs=2)
    compare.add_argument("--all", action="store_true", help="every metric, with variants, intervals and controls")
    compare.set_defaults(action=_compare)
    methods = commands.add_parser("methods", parents=[shared], help="list the attribution methods and their options")
    methods.set_defaults(action=_methods)
    return parser


def _add_explain(commands: Any, shared: argparse.ArgumentParser) -> None:
    explain = commands.add_parser(
        "explain",
        parents=[shared],
        help="explain what a classifier decides about texts or images, or what a language model writes next",
        description="Explain texts or images with the model of a run, a Hugging Face folder or a checkpoint.",
        epilog=_EXPLAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = explain.add_argument
    add("source", metavar="SOURCE", help="run directory, Hugging Face folder, or .ckpt of a run")
    add("--text", action="append", metavar="TEXT", help="a text; may be repeated")
    add("--text-pair", action="append", metavar="TEXT", help="the second text of each --text, for a model of pairs")
    tables = (
        "texts from csv, tsv, json, jsonl, parquet, or txt (one a line), with --out; or an image, or a folder of them"
    )
    add("--file", metavar="FILE", help=tables)
    add("--text-column", metavar="NAME", help="column of the texts (default: found by name)")
    add("--pair-column", metavar="NAME", help="column of the second texts")
    add("--out", metavar="DIR", help="write explanations/part-*.parquet into this new or empty folder")
    add("--html", metavar="FILE", help="write a self-contained page of the explanations")
    add("--method", default="ca_lig", metavar="NAME", help="see `calig methods` (default: ca_lig)")
    add(
        "--target",
        default="predicted",
        metavar="CLASS",
        help="predicted (default), a class name or its index; see --next-token",
    )
    add("--steps", metavar="N|auto", help="nodes of the path (default: those of the run, else auto)")
    add("--option", action="append", default=[], metavar="key=value", help="option of the method; may be repeated")
    add("--batch-size", type=int, default=16, metavar="N", help="texts or images at a time (default: 16)")
    add = explain.add_argument_group(
        "next token",
        "What a causal language model (a Hugging Face folder) would write behind each text. Tokens are given by\n"
        "their text, which counts the blank in front (' Paris'), or by id:N; --target is the likeliest by default.",
    ).add_argument
    add("--next-token", action="store_true", help="explain the next token")
    add("--versus", metavar="TOKEN", help="the token that --target is set against: why this rather than that one")
    add("--top", type=int, metavar="K", help="explain the K most likely next tokens, which share their passes")
    add("--position", type=int, metavar="N", help="predict from the N-th token, from 0 or -1 (default), the last one")
    add("--log-prob", action="store_true", help="explain the log-probability instead of the logit")
    explain.set_defaults(action=_explain)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="experiment=NAME|FILE.yaml, group=option|FILE.yaml, debug=NAME, key.sub=value",
    )


def _run(options: argparse.Namespace) -> int:
    from calig.pipeline.compose import compose

    config = compose(options.overrides)
    from calig.pipeline.run import run

    return run(config)


def _config(options: argparse.Namespace) -> int:
    from calig.pipeline.compose import compose, to_yaml

    print(to_yaml(compose(options.overrides)), end="")
    return DONE


def _explain(options: argparse.Namespace) -> int:
    from calig.pipeline.explain_command import run_explain
    from calig.pipeline.explain_request import Request, parse_next_token, parse_options

    names = ("source", "file", "text_column", "pair_column", "method", "target", "batch_size", "out", "html")
    chosen = parse_options(options.option, options.steps)
    given = {name: getattr(options, name) for name in names}
    asked = parse_next_token(
        options.next_token, options.target, options.versus, options.top, options.position, options.log_prob
    )
    texts, pairs = options.text, options.text_pair
    return run_explain(Request(**given, texts=texts, text_pairs=pairs, options=chosen, next_token=asked))


def _compare(options: argparse.Namespace) -> int:
    from calig.pipeline.compare import compare_runs, print_comparison

    print_comparison(compare_runs(*options.runs), every_metric=options.all)
    return DONE


def _report(options: argparse.Namespace) -> int:
    from calig.pipeline.stages.report import write_report

    print(write_report(options.run))
    return DONE


def _methods(_: argparse.Namespace) -> int:
    import dataclasses
    import typing

    from calig.pipeline.attribution.methods import available_methods, method_class
    from calig.pipeline.config import show, type_name

    for name in available_methods():
        method = method_class(name)
        print(f"{name}\n    {method.summary} ({method.source})")
        hints = typing.get_type_hints(method.Options)
        for field in dataclasses.fields(method.Options):
            print(f"    {field.name}={show(field.default)}  ({type_name(hints[field.name])})")
    return DONE


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: object) -> None:
        super().__init__(option_strings, dest, nargs=0, help=str(kwargs.get("help")))

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from importlib.metadata import version

        print(f"calig {version('calig')}")
        parser.exit()


class _Keys(str):
    """Stands for the list of keys, which is only made when help is asked for."""

    __slots__ = ()

    def __new__(cls) -> _Keys:
        return super().__new__(cls, "keys")


class _HelpWithKeys(argparse.RawDescriptionHelpFormatter):
    def add_text(self, text: str | None) -> None:
        super().add_text(_key_list() if isinstance(text, _Keys) else text)


def _key_list() -> str:
    from calig.pipeline.compose import options
    from calig.pipeline.config import GROUPS, describe_schema

    lines = ["groups:"]
    lines += [f"  {group}={'|'.join(options(group))}" for group in (*GROUPS, "experiment", "debug")]
    lines += ["", "keys:"]
    lines += [f"  {key.key}={key.default}\n      {key.help} ({key.type})" for key in describe_schema()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
