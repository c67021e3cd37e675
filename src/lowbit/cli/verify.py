"""`lowbit verify OUT`: would an engine load it, and is everything in it what it should be?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.options import TrustRemoteCode


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that lowbit quantize wrote.")],
    engine: Annotated[str, typer.Option(help="Whose rules: vllm or transformers.")] = "vllm",
    reference: Annotated[str | None, typer.Option(help="The original model, to compare every weight with.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check a quantized folder against an engine's rules; exit with 1 if one of them fails."""
    from lowbit.checkpoint import open_checkpoint
    from lowbit.checkpoint.base import OpenOptions
    from lowbit.cli.console import byte_progress, print_json, say
    from lowbit.verification import verify as verify_folder

    options = OpenOptions(trust_remote_code=trust_remote_code)
    source = None if reference is None else open_checkpoint(reference, options)
    with byte_progress(f"verify {folder}", quiet=json) as progress:
        verification = verify_folder(folder, source=source, engine=engine, options=options, progress=progress)
    if json:
        print_json(_as_json(verification))
    else:
        _print(verification)
    if not verification.ok:
        if not json:
            say(f"\n{engine} would refuse or misread it: {len(verification.failed)} rules fail")
        raise typer.Exit(1)


def _as_json(verification: Any) -> dict[str, Any]:
    return {
        "folder": verification.folder,
        "engine": verification.engine,
        "ok": verification.ok,
        "checks": [
            {"rule": check.rule, "passed": check.passed, "detail": check.detail} for check in verification.checks
        ],
        "unchecked": verification.unchecked,
    }


def _print(verification: Any) -> None:
    """One rule a line; the word, not a colour, says how it went."""
    width = max(len(rule) for rule in [*(check.rule for check in verification.checks), *verification.unchecked])
    for check in verification.checks:
        typer.echo(f"{'ok  ' if check.passed else 'FAIL'}  {check.rule:{width}}  {check.detail}")
    for rule, reason in verification.unchecked.items():
        typer.echo(f"--    {rule:{width}}  not checked: {reason}")
