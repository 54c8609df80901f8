"""``secateur methods``: every pruning method and its options, read from the classes themselves."""

import click

from secateur.cli.options import debug_option, emit, json_option


@click.command("methods")
@json_option
@debug_option
def command(as_json: bool) -> None:
    """List the methods, what they need, and their options."""
    from secateur.report.methods import describe_methods, methods_tables

    described = describe_methods()
    emit(as_json, described, *methods_tables(described))
