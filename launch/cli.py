"""The `ligature` command: finds the stage, reads its recipe, runs it; a mistake is one line and an exit code."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.errors import LigatureError, RecipeError
from runtime.interrupts import hold_interrupts

Command = Callable[[list[str]], None]


def shard(arguments: list[str]) -> None:
    from data_tools.making.writer import read_options
    from data_tools.making.writer import shard as write

    write(read_options(arguments))


def shapes(arguments: list[str]) -> None:
    from data_tools.shapes.scenes import SPLITS
    from data_tools.shapes.source import write_source
    from runtime.recipe import OptionParser

    parser = OptionParser(
        "ligature shapes", description="Draw captioned scenes of coloured shapes, as a source for `ligature shard`."
    )
    parser.add_argument("out", type=Path, help="folder to make")
    for split, count in zip(SPLITS, (1000, 200, 500), strict=True):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"images of the split (default {count})")
    parser.add_argument("--size", type=int, default=64, help="pixels a side (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--wrong",
        type=int,
        nargs="*",
        default=[],
        metavar="PERCENT",
        help="also captions_train_wrong<PERCENT>.json, in which so many images have another one's captions",
    )
    options = parser.parse_args(arguments)
    counts = {split: getattr(options, split) for split in SPLITS}
    for name, value, least in (*((split, count, 1) for split, count in counts.items()), ("size", options.size, 16)):
        if value < least:
            raise RecipeError(f"--{name} is {value}; it must be {least} or more")
    if bad := [percent for percent in options.wrong if not 0 < percent <= 100]:
        raise RecipeError(f"--wrong is {bad[0]}; it is a percentage above 0, 100 at most")
    write_source(options.out, counts, options.size, options.seed)
    for percent in options.wrong:
        from data_tools.shapes.wrong_captions import swap_captions

        out = options.out / f"captions_train_wrong{percent}.json"
        swap_captions(options.out / "captions_train.json", out, percent / 100, options.seed)
    print(f"{options.out}: {', '.join(f'{count:,} {split}' for split, count in counts.items())}; captions_<split>.json")


def inspect(arguments: list[str]) -> None:
    from runtime.recipe import OptionParser

    parser = OptionParser(
        "ligature inspect", description="Verify and describe a shard folder, or index one made elsewhere."
    )
    parser.add_argument("folder", type=Path)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="check names and sizes (the default)")
    how.add_argument("--full", action="store_true", help="check every file's hash, and every index")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write a page with histograms and a grid of samples")
    parser.add_argument(
        "--index", action="store_true", help="index tars made elsewhere (img2dataset, open_clip) in place"
    )
    parser.add_argument(
        "--slice", metavar="I/N", help="with --index: this part of the tars only, as one task of a job array"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one a core")
    options = parser.parse_args(arguments)
    from data_tools.making.inspection import inspect as look

    look(options.folder, options.full, options.html, options.index, options.slice, options.workers)


def pretrain(arguments: list[str]) -> None:
    recipe = read_stage("pretrain", arguments)
    from pretrain.train import pretrain as run

    run(recipe)


def finetune(arguments: list[str]) -> None:
    recipe = read_stage("finetune", arguments)
    from finetune.train import finetune as run

    run(recipe)


def evaluate(arguments: list[str]) -> None:
    recipe = read_stage("evaluate", arguments)
    from finetune.evaluate import evaluate as run

    run(recipe)


def compare(arguments: list[str]) -> None:
    from runtime.recipe import OptionParser

    parser = OptionParser(
        "ligature compare", description="Hold two score records against each other, query by query: a paired test."
    )
    parser.add_argument("first", type=Path, help="score record (JSON, its .ranks.npz beside it)")
    parser.add_argument("second", type=Path)
    parser.add_argument("--out", type=Path, help="also write the comparison as JSON")
    parser.add_argument("--page", type=Path, help="HTML page of captions that the first alone gets right; needs --data")
    parser.add_argument("--data", help="shard folder or caption file that both were scored on")
    parser.add_argument("--images", default="", help="folder or tar of a caption file's images")
    options = parser.parse_args(arguments)
    if bool(options.page) != bool(options.data):
        raise RecipeError("--page and --data go together: a page shows the pictures")
    from retrieval.compare import compare as run
    from retrieval.compare import describe
    from runtime.files import write_json

    found = run(options.first, options.second)
    if options.out:
        write_json(options.out, found)
    print(describe(found))
    if options.page:
        from finetune.report.flips_page import write_flips_page

        print(write_flips_page(options.first, options.second, options.data, options.images, options.page))


def import_weights(arguments: list[str]) -> None:
    from runtime.recipe import OptionParser

    parser = OptionParser(
        "ligature import",
        description="Turn a published checkpoint into one of ours, to pretrain, fine-tune or evaluate with --checkpoint. (Weights of BERT "
        "and timm are named in a recipe: model.text.weights, model.image.weights.)",
    )
    parser.add_argument("kind", choices=["albef"])
    parser.add_argument("checkpoint", type=Path, help="the published .pth file")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--tokenizer", default="bert-base-uncased", help="folder or name (default bert-base-uncased)")
    parser.add_argument(
        "--bert-config", type=Path, help="ALBEF's config_bert.json (default: the one beside CHECKPOINT)"
    )
    parser.add_argument("--image-size", type=int, help="pixels a side, to interpolate position embeddings to")
    parser.add_argument("--caption-tokens", type=int, default=30, help="longest caption (default 30)")
    parser.add_argument(
        "--image-heads", type=int, help="attention heads of the image encoder (default: as wide as the text's)"
    )
    parser.add_argument("--fine-tuned-on", metavar="DATASET", help="what a fine-tuned checkpoint was tuned on")
    options = parser.parse_args(arguments)
    from pretrain.weights.albef import import_albef

    training = f"fine-tuned-on {options.fine_tuned_on}" if options.fine_tuned_on else "pretrained"
    given = (options.tokenizer, options.bert_config, options.image_size, options.caption_tokens)
    print("\n".join(import_albef(options.checkpoint, options.out, *given, training, options.image_heads)))


def export(arguments: list[str]) -> None:
    from runtime.recipe import OptionParser

    parser = OptionParser("ligature export", description="Write a model alone, as a plain safetensors folder.")
    parser.add_argument("checkpoint", type=Path, help="a run's folder or a checkpoint's")
    parser.add_argument("out", type=Path, help="folder to make")
    options = parser.parse_args(arguments)
    from pretrain.weights.export import export as run

    print(run(options.checkpoint, options.out))


def heatmap(arguments: list[str]) -> None:
    from runtime.recipe import OptionParser

    parser = OptionParser(
        "ligature heatmap", description="Where in an image the words of a caption look, by a HAT checkpoint."
    )
    parser.add_argument("checkpoint", help="a HAT run's folder or a checkpoint's")
    parser.add_argument("image", type=Path)
    parser.add_argument("caption")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    options = parser.parse_args(arguments)
    from finetune.report.heat_maps import draw_heat_maps

    draw_heat_maps(options.checkpoint, options.image, options.caption, options.out)


def plot(arguments: list[str]) -> None:
    from runtime.recipe import OptionParser

    parser = OptionParser("ligature plot", description="Draw the curves of a run, or of several, as one picture.")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    options = parser.parse_args(arguments)
    from finetune.report.curves import plot_curves

    plot_curves(options.runs, options.out)


def report(arguments: list[str]) -> None:
    from runtime.recipe import OptionParser

    parser = OptionParser("ligature report", description="One HTML page of a run: curves, codebook, word maps.")
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--out", type=Path, help="HTML file to write (default RUN/report.html)")
    parser.add_argument("--data", help="shard folder for codewords and word maps (default: the run's validation data)")
    parser.add_argument("--limit", type=int, default=1000, help="images of it to look at (default 1000)")
    options = parser.parse_args(arguments)
    if options.limit < 1:
        raise RecipeError(f"--limit is {options.limit}; it must be 1 or more")
    from finetune.report.run_page import write_report as run

    print(run(options.run, options.out, options.data, options.limit))


def index(arguments: list[str]) -> None:
    recipe = read_stage("index", arguments)
    from finetune.search.indexing import build_index as run

    run(recipe)


def search(arguments: list[str]) -> None:
    from runtime.recipe import OptionParser

    parser = OptionParser(
        "ligature search", description="Ask an index for the images most like some words or an image."
    )
    parser.add_argument("query", nargs="*", help='words in quotes ("a dog on a beach"), or an image file')
    parser.add_argument(
        "--index", type=Path, default=Path("index"), help="folder made by `ligature index` (default index)"
    )
    parser.add_argument("--queries", type=Path, metavar="FILE", help="further queries, one a line; - is standard input")
    parser.add_argument("--top", type=int, default=10, help="images a query (default 10)")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="also write a page with the pictures")
    parser.add_argument("--json", action="store_true", help="print a line of JSON a query instead of a table")
    parser.add_argument(
        "--approximate", action="store_true", help="by the index's inverted lists instead of all its rows"
    )
    parser.add_argument("--checkpoint", help="where the index's checkpoint lies now (default: where it lay then)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu", help="for the query (default cpu)")
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise RecipeError(f"--top is {options.top}; it must be 1 or more")
    from finetune.search.query import command

    command(options)


def ablate(arguments: list[str]) -> None:
    recipe = read_stage("ablate", arguments)
    from launch.ablation.run import ablate as run

    print(run(recipe))


def launch(arguments: list[str]) -> None:
    if arguments[:1] == ["slurm"]:
        from launch.start.slurm import launch_slurm

        launch_slurm(arguments[1:])
    elif arguments[:1] == ["hosts"]:
        from launch.start.hosts import launch_hosts

        launch_hosts(arguments[1:])
    else:
        from launch.start.local import launch as run

        run(arguments)


def status(arguments: list[str]) -> None:
    from launch.commands.status import status as run

    run(arguments)


def doctor(arguments: list[str]) -> None:
    from launch.commands.doctor import doctor as run

    run(arguments)


def plan(arguments: list[str]) -> None:
    from launch.plan import plan as run

    run(arguments)


def demo(arguments: list[str]) -> None:
    from launch.commands.demo import demo as run

    run(arguments)


COMMANDS: dict[str, tuple[Command, str]] = {
    "demo": (demo, "the whole path on drawn shapes, on a CPU, in minutes; prints the table"),
    "shapes": (shapes, "OUT: draw captioned scenes of coloured shapes to try things on"),
    "shard": (shard, "SOURCE --out DIR: make WebDataset shards from captioned images"),
    "inspect": (inspect, "DIR: verify and describe a shard folder, or index tars made elsewhere"),
    "pretrain": (pretrain, "--config RECIPE: pretrain, or go on where it stopped"),
    "finetune": (finetune, "--config RECIPE: fine-tune a checkpoint for retrieval"),
    "evaluate": (evaluate, "--config RECIPE: score a checkpoint, with a table and a JSON record"),
    "compare": (compare, "A B: two score records held against each other, a paired test"),
    "import": (import_weights, "albef FILE OUT: a published checkpoint as one of ours"),
    "index": (index, "--checkpoint RUN --data IMAGES: embed shards or a folder of images, to be searched"),
    "search": (search, '"WORDS" or an image file: the images of an index most like it, as a table or a page'),
    "export": (export, "CHECKPOINT OUT: the model alone, as a plain safetensors folder"),
    "heatmap": (heatmap, "CHECKPOINT IMAGE CAPTION --out FILE: where HAT's words look"),
    "report": (report, "RUN: one HTML page of a run: curves, codebook, word maps"),
    "ablate": (ablate, "--config RECIPE: arms with the same seeds, compared in pairs"),
    "plot": (plot, "RUN… --out FILE: the curves of a run as a picture"),
    "launch": (
        launch,
        "slurm STAGE …, hosts --hostfile FILE STAGE … or local --nproc N STAGE …: run a stage there",
    ),
    "status": (status, "RUN…: job, step, rate, time left, last checkpoint, last error"),
    "doctor": (doctor, "check this node, or a job's nodes, before time is spent on them"),
    "plan": (plan, "--config RECIPE --nodes N --gpus-per-node G: memory, time and cost of a run before it is paid for"),
}


RECIPES = {
    "pretrain": ("pretrain.config", "PretrainRecipe"),
    "finetune": ("finetune.config", "FinetuneRecipe"),
    "evaluate": ("finetune.config", "EvaluateRecipe"),
    "index": ("finetune.search.config", "IndexRecipe"),
    "ablate": ("launch.ablation.config", "AblateRecipe"),
}


def read_stage(stage: str, arguments: list[str]) -> Any:
    """The recipe of a stage from its command line. Imports no torch, so mistakes are answered at once."""
    from runtime.recipe import read_recipe

    home, name = RECIPES[stage]
    return read_recipe(getattr(importlib.import_module(home), name), arguments, f"ligature {stage}")


def usage() -> str:
    lines = [f"  {name:10} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ligature COMMAND …",
            "",
            "Pretrain image-text models and turn them into image-text search.",
            "",
            *lines,
        ]
        + [
            "",
            "`ligature COMMAND --help` lists a command's options; `ligature --completion bash` completes them (zsh, fish).",
        ]
    )


OUR_PLACE = {
    errno.ENOSPC: "free some space and run it again",
    errno.EDQUOT: "free some space and run it again",
} | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR),
    "name a place where it can be read or written",
)
"""Errors of files that are the user's to mend, and how; any other is ours, with its traceback."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; -> exit code: 0, 1 for a failure, 2 for a mistake in what was asked, 75 for 'start me again'."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name, *rest = arguments or ["--help"]
    try:
        if name in ("--help", "-h", "help"):
            print(usage(), flush=True)
            return 0
        if name == "--completion":
            from launch.recover.completion import completion

            print(completion(rest), end="")
            return 0
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            raise RecipeError(
                f"no command `{name}`" + (f"; did you mean {close[0]}?" if close else "; `ligature --help` lists them")
            )
        COMMANDS[name][0](rest)
    except LigatureError as error:
        rank = os.environ.get("RANK", "0")
        message = " ".join(str(error).split())
        if message:  # without one, the first rank has told it
            print(f"ligature: {message}" if rank == "0" else f"ligature (rank {rank}): {message}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output (`| head`) has gone: nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in OUR_PLACE:
            raise
        print(f"ligature: {error.strerror} ({error.filename or 'a log'}); {OUR_PLACE[error.errno]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ligature: interrupted", file=sys.stderr)
        return 130
    return 0


def entry() -> None:
    """The console command. Standard output is flushed and the process left at once: loader threads of a failed run are not waited for."""
    if sys.argv[1:2] in (["pretrain"], ["finetune"]) and not {"-h", "--help"} & set(sys.argv):
        hold_interrupts()  # these stop by themselves, at a step boundary, and their exit code must get out
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A rank that stops on an error must not hang in a collective's destructor while the others wait for it.
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
