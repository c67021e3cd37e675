"""`lowbit verify FOLDER`: would an engine load it, and is its content correct?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.console import echo
from lowbit.cli.options import of_trust
from lowbit.cli.plain import one_line
from lowbit.errors import UsageError
from lowbit.registry import ENGINES

if TYPE_CHECKING:
    from lowbit.verification import Rule, Verification


def verify(
    options: Annotated[Any, of_trust("trust_remote_code", adapter=True)],
    folder: Annotated[
        Path | None, typer.Argument(help="Model folder or .gguf file, written by lowbit or by others.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(ENGINES)}. [default: vllm, or one that loads the format; llama.cpp for .gguf]"),
    ] = None,
    reference: Annotated[str | None, typer.Option(help="The original model, to compare every weight with it.")] = None,
    rules: Annotated[bool, typer.Option("--rules", help="List the rules instead; no folder is needed.")] = False,
    format: Annotated[
        str | None, typer.Option(help="With --rules: only those of one format, such as gptq; plain: not quantized.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the checks, or the rules, as JSON.")] = False,
) -> None:
    """Check a folder against an engine's rules; exit with 1 if one of them fails."""
    if rules:
        if folder is not None or reference is not None:
            raise UsageError("--rules lists the rules and checks no model", "leave FOLDER out")
        _list_rules(engine, format, json)
        return
    if folder is None:
        raise UsageError("there is no FOLDER to verify", "give the folder of a model, or --rules to list the rules")
    if options.adapter is not None and reference is None:
        raise UsageError("--adapter is merged into the reference, and none was given", "add --reference MODEL")
    if format is not None:
        raise UsageError("--format goes with --rules only", "the format is read from the folder")
    _verify(folder, engine, reference, json, options)


def _verify(folder: Path, engine: str | None, reference: str | None, json: bool, options: Any) -> None:
    from lowbit.cli.console import byte_progress, print_json, say
    from lowbit.verification import default_engine, rules
    from lowbit.verification import verify as verify_folder
    from lowbit.verification.result import verdict

    engine = engine or default_engine(folder)
    rules(engine)
    with byte_progress(f"verify {folder}", quiet=json) as progress:
        verification = verify_folder(folder, reference=reference, engine=engine, options=options, progress=progress)
    if json:
        print_json(_as_json(verification))
    else:
        _print(verification)
    if not verification.ok:
        if not json:
            say(f"\n{verdict(verification)}")
        raise typer.Exit(1)


def _as_json(verification: Verification) -> dict[str, Any]:
    return {
        "folder": verification.folder,
        "engine": verification.engine,
        "format": verification.format,
        "ok": verification.ok,
        "checks": [
            {
                "rule": check.rule,
                "passed": check.passed,
                "limit": check.limit,
                "outcome": check.outcome,
                "detail": check.detail,
            }
            for check in verification.checks
        ],
        "unchecked": verification.unchecked,
    }


def _print(verification: Verification) -> None:
    """One rule a line; the word, not a colour, says how it went."""
    width = max(len(rule) for rule in [*(check.rule for check in verification.checks), *verification.unchecked])
    for check in verification.checks:
        echo(f"{'ok  ' if check.passed else 'FAIL'}  {check.rule:{width}}  {one_line(check.detail)}")
    for rule, reason in verification.unchecked.items():
        echo(f"--    {rule:{width}}  not checked: {one_line(reason)}")


def _list_rules(engine: str | None, format: str | None, json: bool) -> None:
    from lowbit.cli.console import print_json
    from lowbit.verification import rules

    found = rules(engine, format)
    if json:
        print_json([_rule_as_json(rule, engines) for rule, engines in found.items()])
        return
    for rule, engines in found.items():
        echo(f"{rule.name}: {rule.summary}")
        echo(f"    engines  {', '.join(engines)}")
        echo(f"    formats  {formats_said(rule.formats)}")
        echo(f"    checks   {_first_paragraph(rule)}")
        echo(f"    follows  {rule.follows}")


def _rule_as_json(rule: Rule, engines: tuple[str, ...]) -> dict[str, Any]:
    return {
        "name": rule.name,
        "engines": list(engines),
        "formats": list(rule.formats),
        "summary": rule.summary,
        "checks": _first_paragraph(rule),
        "follows": rule.follows,
        "gate": rule.gate,
        "limit": rule.limit,
        "needs_source": rule.needs_source,
        "needs_nearest": rule.needs_nearest,
    }


def _first_paragraph(rule: Rule) -> str:
    return " ".join((rule.check.__doc__ or "").split("\n\n")[0].split())


def formats_said(formats: tuple[str, ...]) -> str:
    """The formats of a rule in a few words."""
    from lowbit.verification.result import ALL, QUANTIZED

    return {ALL: "all", QUANTIZED: "all quantized ones"}.get(formats, ", ".join(formats))
