"""``secateur bench``: what the zeros are worth on this machine."""

from pathlib import Path

import click

from secateur.cli.options import debug_option, dtype_option, emit, json_option


def _numbers(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(word) for word in value.split(",")))
    except ValueError:
        raise click.BadParameter(f"{value!r}; wanted numbers with commas between them, such as 1,8") from None


@click.command("bench")
@click.argument("dense", metavar="DENSE")
@click.argument("pruned", metavar="PRUNED")
@click.option(
    "--runtime",
    type=click.Choice(["auto", "transformers", "openvino", "torch-2:4"]),
    default="auto",
    show_default=True,
    help="auto goes by what lies in each directory.",
)
@click.option(
    "--prompt",
    "prompts",
    default="128",
    show_default=True,
    callback=_numbers,
    help="Tokens of a prompt; several with commas.",
)
@click.option("--tokens", type=int, default=32, show_default=True, help="Tokens generated, after the first.")
@click.option(
    "--batch",
    "batches",
    default="1,8",
    show_default=True,
    callback=_numbers,
    help="Rows at once, with each prompt; commas.",
)
@click.option("--rounds", type=int, default=5, show_default=True, help="Rounds that count, after one that does not.")
@click.option("--threads", type=click.IntRange(min=1), help="Of each model; default OMP_NUM_THREADS, or all cores.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Of transformers' models."
)
@dtype_option
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Also draw it, to this .svg file.")
@json_option
@debug_option
def command(
    dense: str,
    pruned: str,
    runtime: str,
    prompts: tuple[int, ...],
    tokens: int,
    batches: tuple[int, ...],
    rounds: int,
    threads: int | None,
    device: str,
    dtype: str | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Run DENSE and PRUNED in turns and compare speed, memory and size.

    Both are models as `secateur eval` takes them, or directories that `secateur export` wrote.
    """
    from secateur.evaluation.bench import BenchOptions, bench
    from secateur.report.bench_page import bench_page, draw, refuse_no_plot
    from secateur.report.progress import on_stderr

    options = BenchOptions(runtime, prompts, tokens, batches, rounds, threads or 0, dtype or "auto", device)
    if plot:
        refuse_no_plot(plot)
    with on_stderr() as progress:
        progress.stage("measure")
        told = bench(dense, pruned, options, progress.update)
    emit(as_json, told, *bench_page(told))
    if plot:
        draw(told, plot)
