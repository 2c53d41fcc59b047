"""The training text as five domains, each a list of units: paragraphs of prose or whole conversations."""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from demo_training.conversations import GREETINGS, chat, define
from demo_training.sources import r_character_vectors

END = "<|endoftext|>"
SPECIAL = re.compile(r"<\|\w+\|>")
BLOCK = 20  # units that are kept or held out together
# Senses and entries that say this of themselves, or are about it, are left out: a demonstration is no place for them.
UNWANTED = re.compile(
    r"offensive|disparag|derogat|obscen|vulgar|slur\b|ethnic|sexual|\bsex\b|genital|penis|vagina|coit|copulat|"
    r"prostitut|whore|nigg|fuck|shit|\bnude|negro|\bjew|\brape|homosex|pornogr",
    re.IGNORECASE,
)
DESCRIPTIONS = "function|class|method|attribute|data|exception|describe|option|staticmethod|classmethod"
MARKUP = tuple(
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r":[\w:+-]+:`[!~]?([^`<]*?)\s*(<[^`>]*>)?`", r"\1"),
        (r"`([^`<]+?)\s*<[^`>]*>`_+", r"\1"),
        (r"^\s*\.\. (?:_.*:|index::.*|module::.*|moduleauthor::.*|sectionauthor::.*|rubric::.*)\n", ""),
        (r"^\s+:(?:synopsis|noindex|platform|single|source|module|keyword)\b.*\n", ""),
        (r"^\s*\.\. (?:testcode|doctest|testsetup|testoutput|code-block|literalinclude|highlight)::.*\n", ""),
        (rf"\.\. (?:{DESCRIPTIONS})::\s*", ""),
    )
)
# The share of the sequences of a batch that each domain has.
SHARES = {"novels": 0.34, "conversations": 0.28, "glosses": 0.08, "python": 0.2, "humour": 0.1}


def novels(directory: Path) -> Iterator[str]:
    """Paragraphs of the novels, each book closed by the end-of-text token."""
    folder = directory / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data"
    for lines in r_character_vectors(folder / "Rdata.rdb"):
        for paragraph in "\n".join(lines).split("\n\n"):
            text = " ".join(paragraph.replace("_", "").split())
            if len(text) > 40:  # shorter ones are mostly headings
                yield text.replace("--", "—") + "\n\n"
        yield END


def lines_of(file: Path) -> list[str]:
    """A WordNet file's lines but for its licence, which is indented."""
    return [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith(" ")]


def senses(directory: Path) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """WordNet's words seen in texts, with part of speech and first gloss; words and glosses of the other senses."""
    folder = directory / "wordnet-base/usr/share/wordnet"
    common, rest = [], []
    for part in ("noun", "verb", "adj", "adv"):
        glosses = {}
        for line in lines_of(folder / f"data.{part}"):
            synset, _, gloss = line.partition(" | ")
            offset, _, _, _, word = synset.split(" ", 5)[:5]
            if not UNWANTED.search(line):
                glosses[offset] = (word.partition("(")[0].replace("_", " "), gloss.strip())
        taken = set()
        for line in lines_of(folder / f"index.{part}"):
            fields = line.split()
            num_senses = int(fields[2])
            num_seen, first = int(fields[-num_senses - 1]), fields[-num_senses]
            if num_seen and first in glosses and re.fullmatch(r"[a-z_]+", fields[0]):
                common.append((fields[0].replace("_", " "), part, glosses[first][1]))
                taken.add(first)
        rest += [pair for offset, pair in glosses.items() if offset not in taken]
    return common, rest


def conversations(directory: Path, rng: random.Random) -> Iterator[str]:
    """Questions and answers in the checkpoint's chat template, made by rule from the other domains."""
    common, _ = senses(directory)
    made = [define(word, part, gloss, rng) for word, part, gloss in common]
    for path in sorted(python_sources(directory)):
        for name, synopsis in re.findall(
            r"^\.\. module:: (\S+)\n\s+:synopsis: (.+)$", path.read_text(), re.M
        ):
            question = rng.choice(["What does the Python module {} do?", "What is Python's {} module for?"])
            made += [chat(question.format(name), f"The module {name}: {plain(synopsis).strip()}")] * 3
    stories = [text.strip() for text in novels(directory) if 200 < len(text) < 600]
    asks = ("Tell me a story.", "Write a paragraph.", "Write something in the manner of Jane Austen.")
    made += [chat(rng.choice(asks), text) for text in rng.sample(stories, 1500)]
    made += [chat(question, answer) for question, answer in GREETINGS] * 40
    rng.shuffle(made)
    yield from (text + END for text in made)


def glosses(directory: Path, rng: random.Random) -> Iterator[str]:
    """A line for each of WordNet's other senses."""
    lines = [f"{word}: {gloss}\n" for word, gloss in senses(directory)[1]]
    rng.shuffle(lines)
    yield from lines


def python_sources(directory: Path) -> list[Path]:
    """Sources of Python's documentation, without the C interface and the histories of releases."""
    folder = directory / "python3.11-doc/usr/share/doc/python3.11/html/_sources"
    wanted = ("library", "tutorial", "reference", "howto", "faq")
    return [
        folder / "glossary.rst.txt",
        *(p for name in wanted for p in sorted((folder / name).glob("*.txt"))),
    ]


def plain(text: str) -> str:
    """reStructuredText with the roles, targets and directives taken out, the prose and the code left."""
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return re.sub(r"\*\*?([\w ()=,.]+)\*\*?", r"\1", text.replace("``", "`"))


def python(directory: Path) -> Iterator[str]:
    """Paragraphs and code of Python's documentation, each page closed by the end-of-text token."""
    for path in python_sources(directory):
        for block in re.split(r"\n\s*\n", plain(path.read_text(encoding="utf-8"))):
            if len(block.strip()) > 20 and not re.search(r"={8}|-{8}|\+--|\^{8}|~{8}|\*{8}|\.\. ", block):
                yield block.rstrip().removeprefix("\n") + "\n\n"
        yield END


def humour(directory: Path, rng: random.Random) -> Iterator[str]:
    """Entries of the two satirical dictionaries."""
    for name in ("jargon", "devil"):
        file = directory / f"dict-{name}/usr/share/dictd/{name}.dict.dz"
        text = gzip.decompress(file.read_bytes()).decode("utf-8", "replace")
        text = (
            text.partition("PREFACE" if name == "devil" else "\n404\n")[2].replace("{", "").replace("}", "")
        )
        for block in re.split(r"\n\s*\n", text):
            if len(block.strip()) > 40 and not UNWANTED.search(block):
                yield " ".join(block.split()) + "\n\n"
        yield END


def domains(directory: Path, seed: int) -> dict[str, list[str]]:
    """The units of every domain, in an order that `seed` fixes."""
    return {
        "novels": list(novels(directory)),
        "conversations": list(conversations(directory, random.Random(seed))),
        "glosses": list(glosses(directory, random.Random(seed))),
        "python": list(python(directory)),
        "humour": list(humour(directory, random.Random(seed))),
    }


def split(units: list[str]) -> tuple[list[str], list[str]]:
    """Training and validation units: of every hundred blocks of BLOCK units the fiftieth is held out."""
    held_out = [units[i : i + BLOCK] for i in range(0, len(units), BLOCK) if i // BLOCK % 100 == 49]
    kept = [units[i : i + BLOCK] for i in range(0, len(units), BLOCK) if i // BLOCK % 100 != 49]
    return list(chain.from_iterable(kept)), list(chain.from_iterable(held_out))
