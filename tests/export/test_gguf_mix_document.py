"""docs/gguf-file-types.md says what the tables of gguf_mix_table.py say. After a change there, write its tables anew:

python tests/export/test_gguf_mix_document.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lowbit.formats.gguf.mix_table import (
    CONDITIONS,
    FALLBACKS,
    FILE_TYPES,
    IMAGE_MODELS,
    MODELS_70B,
    NEEDS_IMPORTANCE,
    NEVER_QUANTIZED,
    NEVER_QUANTIZED_IN,
    NEVER_QUANTIZED_NAMES,
    RULES,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "gguf-file-types.md"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cell or ' ' for cell in line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def file_types() -> str:
    rows = [
        (
            f"`{kind.name}`",
            kind.base,
            f"{kind.bits_per_weight:.2f}",
            "imatrix" if kind.needs_imatrix else "",
            kind.summary,
        )
        for kind in FILE_TYPES.values()
    ]
    return table(("file type", "base type", "bits per weight", "needs", "what it is"), rows)


def rules() -> str:
    rows = [
        (
            ", ".join(f"`{kind}`" for kind in rule.kinds) or "all",
            ", ".join(rule.file_types) or "all",
            rule.type_name,
            " and ".join(CONDITIONS[name] for name in rule.when) or "always",
        )
        for rule in RULES
    ]
    return table(("kind of tensor", "file type", "becomes", "where"), rows)


def models_70b() -> str:
    rows = [
        (f"`{arch}`", str(layers), "value heads are shared, and not 8 experts" if shared else "any")
        for arch, (layers, shared) in MODELS_70B.items()
    ]
    return table(("architecture", "layers", "heads"), rows)


def fallbacks() -> str:
    wanted: dict[str, list[str]] = {}
    for type_name, fallback in FALLBACKS.items():
        wanted.setdefault(fallback, []).append(type_name)
    return table(("instead of", "becomes"), [(", ".join(types), fallback) for fallback, types in wanted.items()])


def never() -> str:
    lines = [f"- {what}: {', '.join(f'`{part}`' for part in parts)}" for what, parts in NEVER_QUANTIZED]
    lines += [f"- {what}: `{name}`" for name, what in NEVER_QUANTIZED_NAMES.items()]
    lines += [
        f"- in {arch}: {', '.join(f'`{part}`' for part in parts)}"
        for arch, parts in (NEVER_QUANTIZED_IN | IMAGE_MODELS).items()
    ]
    return "\n".join(lines)


SECTIONS = {"file types": file_types, "rules": rules, "70B": models_70b, "fallbacks": fallbacks, "never": never}


def pattern(section: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- {section} -->\n).*?(?=<!-- end -->)", re.S)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_document_has_the_table(section):
    found = pattern(section).search(DOCUMENT.read_text(encoding="utf-8"))
    assert found, f"no section {section}"
    assert found[0].strip() == SECTIONS[section]()


def test_the_document_names_the_types_that_need_an_importance_matrix():
    sentence = re.search(r"\*Needs imatrix\*:.*?\((.*?);", DOCUMENT.read_text(encoding="utf-8"), re.S)
    assert sentence
    assert set(re.findall(r"IQ\w+", sentence[1])) == NEEDS_IMPORTANCE


def test_the_document_says_how_many_models_were_recorded():
    golden = Path(__file__).parents[1] / "data" / "gguf_mix" / "llama_quantize.json"
    models = json.loads(golden.read_text(encoding="utf-8"))["models"]
    assert f"chose for {len(models)} models" in DOCUMENT.read_text(encoding="utf-8").replace("\n", " ")


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for section, made in SECTIONS.items():
        text = pattern(section).sub(lambda _, made=made: f"\n{made()}\n\n", text, count=1)
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
