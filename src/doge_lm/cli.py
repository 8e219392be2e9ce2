"""The command `doge-lm`: subcommands and nothing else.

Each subcommand is a module with `run(args) -> int`, which is imported when it is called for, so that data preparation
does not wait for torch. The flags of those that do take long to import are declared elsewhere: help is quick, as is the
answer to a wrong flag.
"""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from . import __version__
from .errors import UserError

# The system refuses to write: the user's to mend, wherever it happens.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_WRITING = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM)


_GOES_ON = "the same command goes on where it stopped"


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        name: as typed.
        module: holds `run`.
        summary: its line in the help.
        interrupted: what to do then.
        flags: the function that declares its flags, behind its module; `add_arguments` of `module` where there is none.
    """

    name: str
    module: str
    summary: str
    interrupted: str = ""
    flags: str = ""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its flags."""
        module, _, function = (self.flags or f"{self.module}.add_arguments").rpartition(".")
        getattr(import_module(module), function)(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Run it; returns the exit status."""
        return int(import_module(self.module).run(args))


COMMANDS = (
    Command("download_datasets", "doge_lm.data.download", "fetch the datasets, or take files of your own", _GOES_ON),
    Command("tokenizer", "doge_lm.data.tokenizer", "build the published tokenizer, or train a new one"),
    Command(
        "preprocess_datasets", "doge_lm.data.preprocess", "tokenize the datasets and pack them into samples", _GOES_ON
    ),
    Command("merge_datasets", "doge_lm.data.merge", "merge, shuffle and split the tokenized datasets", _GOES_ON),
    Command(
        "data near_duplicates",
        "doge_lm.data.near_duplicates",
        "keep one of documents that are nearly the same",
        _GOES_ON,
    ),
    Command("data inspect", "doge_lm.data.inspect", "show what lies in a tokenized source or a merged set"),
    Command(
        "train",
        "doge_lm.training.pretrain",
        "pre-train a model",
        "with --resume_from_checkpoint it goes on from the last checkpoint",
        flags="doge_lm.training.flags.add_pretrain_arguments",
    ),
    Command(
        "finetune",
        "doge_lm.training.finetune",
        "teach a model to answer, by conversations",
        "with --resume_from_checkpoint it goes on from the last checkpoint",
        flags="doge_lm.training.flags.add_finetune_arguments",
    ),
    Command(
        "dpo",
        "doge_lm.training.preference",
        "teach a model which of two answers is better",
        "with --resume_from_checkpoint it goes on from the last checkpoint",
        flags="doge_lm.training.flags.add_dpo_arguments",
    ),
    Command(
        "eval",
        "doge_lm.evaluation.command",
        "benchmarks and bits per byte of models, compared sample by sample",
        flags="doge_lm.evaluation.flags.add_eval_arguments",
    ),
    Command(
        "generate",
        "doge_lm.inference.generate",
        "continue a text with a trained model",
        flags="doge_lm.inference.flags.add_generate_arguments",
    ),
    Command(
        "chat",
        "doge_lm.inference.chat",
        "talk with a trained model in the terminal, or through a pipe",
        flags="doge_lm.inference.flags.add_chat_arguments",
    ),
    Command(
        "export",
        "doge_lm.inference.export",
        "a model for transformers, in few bits, or for onnxruntime",
        flags="doge_lm.inference.flags.add_export_arguments",
    ),
    Command(
        "serve",
        "doge_lm.inference.serve",
        "an HTTP server with OpenAI's API, and a chat page",
        flags="doge_lm.inference.flags.add_serve_arguments",
    ),
    Command("demo", "doge_lm.demo", "the whole path on a small embedded corpus, without a network"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status is 0, 1 for an error the user can mend, 2 for wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Where torchao (of the extra `export`) is installed, importing transformers imports it, and it complains of kernels
    # for machines that are not there, and of PyTorch.
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # The commands on data are named by two words.
    if len(arguments) > 1 and arguments[0] == "data" and not arguments[1].startswith("-"):
        arguments[:2] = [" ".join(arguments[:2])]
    # `doge-lm preprocess-datasets` is as good as `doge-lm preprocess_datasets`.
    if arguments and not arguments[0].startswith("-"):
        arguments[0] = arguments[0].replace("-", "_")
    command = next((command for command in COMMANDS if arguments and command.name == arguments[0]), None)
    group = "data" if arguments and f"{arguments[0]} ".startswith("data ") else ""
    named = [*arguments[0].split(" ")[1:], *arguments[1:]] if group else arguments
    if not named:
        _overview(group).print_help()
        return 2
    if command is None:
        _overview(group).parse_args(named)  # prints help or the version, or complains, and exits
        raise AssertionError("no command was named, yet the arguments were accepted")
    try:
        return _run(command, arguments[1:])
    except UserError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("doge_lm"):
            raise
        message = (
            f"doge-lm {command.name} needs the package {error.name!r}, which is not installed; "
            "install the extra that brings it: pip install 'doge-lm[all]'"
        )
    except BrokenPipeError:
        # The reader of a pipe has left (`… | head`): nothing is wrong. Keeps Python's own flush at exit quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _NO_WRITING:
            raise
        place = f" {error.filename}" if error.filename else ""
        way_out = "make room, or choose" if error.errno in _FULL else "choose"
        message = f"cannot write{place}: {error.strerror}; {way_out} another place"
    except KeyboardInterrupt:
        print("; ".join(filter(None, ["interrupted", command.interrupted])), file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 1


def _run(command: Command, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"doge-lm {command.name}", description=command.summary)
    command.add_arguments(parser)
    status = command.run(parser.parse_args(arguments))
    _leave_process_group()
    return status


def _leave_process_group() -> None:
    """End what a launcher of several processes has begun; NCCL warns of a process group that is left at the exit."""
    distributed = sys.modules.get("torch.distributed")  # most commands never import it
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _overview(group: str = "") -> argparse.ArgumentParser:
    """The help of all commands, or of those whose names begin with a word."""
    listed = {
        command.name.removeprefix(f"{group} "): command.summary
        for command in COMMANDS
        if not group or command.name.startswith(f"{group} ")
    }
    width = max(map(len, listed))
    lines = "\n".join(f"  {name:{width}}  {summary}" for name, summary in listed.items())
    parser = argparse.ArgumentParser(
        prog=f"doge-lm {group}".rstrip(),
        description="Train a small language model of the Doge architecture, from raw text to a chat model.",
        epilog=f"commands:\n{lines}\n\n`{f'doge-lm {group}'.rstrip()} COMMAND --help` lists a command's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"doge-lm {__version__}")
    parser.add_argument("command", choices=list(listed), metavar="COMMAND")
    return parser


if __name__ == "__main__":
    sys.exit(main())
