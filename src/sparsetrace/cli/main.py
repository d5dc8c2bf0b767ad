"""Entry of the `sparsetrace` command: the group of all commands, and how their errors are printed.

Each command is one step of the pipeline or a tool beside it. It imports what it runs inside its function, so that
`sparsetrace --help`, and steps that need no torch, start fast. Results go to standard output, progress and errors to
standard error.
"""

import errno
import os
import sys

import click

from sparsetrace import __version__
from sparsetrace.cli import calibration, generation, model, packing, tools, workload
from sparsetrace.cli.terminal import fail
from sparsetrace.core.files import InputError

# Exit status of a program that SIGINT ended, as shells have it.
INTERRUPTED = 130


COMMANDS: tuple[click.Command, ...] = (
    model.demo_checkpoint,
    model.convert,
    calibration.prune,
    calibration.calibrate,
    calibration.allocate,
    calibration.thresholds,
    calibration.quality_dense,
    calibration.quality,
    calibration.import_teal,
    generation.split,
    generation.dense_tokens,
    generation.generate,
    packing.pack,
    packing.index,
    workload.show,
    workload.verify,
    workload.stats,
    workload.export,
    tools.check_config,
    tools.estimate,
    tools.reproduce,
    tools.doctor,
    tools.unlock,
    tools.tune,
    tools.bench,
)


@click.group(commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="sparsetrace")
def cli() -> None:
    """Real sparse workloads of language models.

    Turns a checkpoint, a sparsity method and a prompt set into a data set of the exact operand of every matrix
    multiply, for every layer, matrix and token, in Parquet.

    The steps below are what `snakemake --cores all` runs, in this order; each may be run by hand:

    \b
      demo-checkpoint   train the embedded model (only where config says `embedded`)
      convert           Hugging Face checkpoint  ->  runtime model
      prune             model                    ->  model with masked weights (only where config says `prune`)
      calibrate         model, text              ->  exact activation histograms
      allocate          model, histograms, text  ->  search table of one layer (only for `allocation: greedy`)
      thresholds        histograms, a method     ->  threshold table
      quality-dense     model, text              ->  states of the dense model (where a text is named)
      quality           model, thresholds, text  ->  perplexity beside the dense model's (where a text is named)
      split             prompt set               ->  shards of groups of sequences
      dense-tokens      model, shard             ->  what the dense model writes (only for `tokens_from: dense`)
      generate          model, thresholds, shard ->  dump of every operand
      pack              dump                     ->  Parquet parts
      index             parts                    ->  workload
      show              workload                 ->  summary

    \b
    Beside them:
      doctor            this machine             ->  what is missing
      tune              GPU, models or shapes    ->  table of the fastest kernel configurations
      bench             GPU, a model             ->  speed of its kernels and of decoding
      reproduce         workload                 ->  the same again from its manifest, compared
      estimate          study file               ->  rows, bytes and time, before anything runs
      verify            workload                 ->  every fault, named
      stats             workload                 ->  tables of mask statistics, beside an i.i.d. twin's
      export            workload                 ->  files of other tools
    """


def main() -> None:
    """Run the command line; an error that a user can mend is printed as one line, without a traceback."""
    # OpenMP reads these when torch loads it. By default its idle threads spin: where jobs share cores, training the
    # embedded model took 88 CPU seconds instead of 51.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted: nothing half-written is left; run the same command again to resume", INTERRUPTED)
    except InputError as error:
        fail(str(error))
    except MemoryError as error:
        reason = f": {error}" if str(error) else ""
        fail(f"memory: must suffice for this step, got too little{reason}: give the job more, or lower batch sizes")
    except OSError as error:
        if error.errno is None:
            raise
        remedy = {
            errno.ENOSPC: ": free some space, then run the same command again",
            errno.EROFS: ": choose another folder",
            errno.EACCES: ": choose another folder or change its permissions",
        }.get(error.errno, "")
        fail(f"{error.filename or 'output'}: {error.strerror}{remedy}")
