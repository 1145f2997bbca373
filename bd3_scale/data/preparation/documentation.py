"""English text that is already on the machine: the documentation of the installed Python packages.

Source files are read with `ast`; nothing is imported and nothing is executed. The standard library's language reference
(`pydoc_data.topics`) comes first, then the packages of `PACKAGES` in that order, then every other package installed beside
torch in sorted order, until `budget` tokens are met. Only files of which a fifth stands between triple quotes are parsed:
parsing is the cost, and those files hold most of the prose.

Invariants:
- the same installed files give the same documents, in the same order, on every machine; the order of the file system has no part;
- a document is one module, and a module is held out as a whole, by a hash of its name;
- no line of six words or more (a sentence, a whole paragraph, an item of a list) occurs twice in the corpus, compared by its plain words
  alone (case, digits, identifiers and punctuation aside), and no shorter paragraph either: nothing of the held-out text stands in the
  training text, though torch, matplotlib and transformers repeat their docstrings many times.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bd3_scale.data.preparation.packing import Document, held_out
from bd3_scale.data.tokenizer import Tokenizer
from bd3_scale.errors import DataError

PACKAGES = ("torch", "numpy", "networkx", "matplotlib", "sympy", "mpmath", "huggingface_hub", "transformers")
GENERATED = frozenset({"oci", "azure", "google", "botocore", "boto3", "identify", "googleapis_common_protos"})
"""Clients and tables written by programs: many megabytes, hardly a sentence that is said once."""
SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "_vendor", "vendored", "site-packages", "idlelib", "lib2to3", "__pycache__"})

_QUOTED = re.compile(r'("""|\'\'\')(.*?)\1', re.S)
_QUOTED_SHARE = 0.2
_SENTENCE = 6
"""Plain words that make a line text rather than a heading or a name."""
_SHORTEST = 200
"""Characters of the shortest document."""
_LARGEST_FILE = 2_000_000
_ROLE = re.compile(r":[a-zA-Z:+-]+:`~?\.?([^`<]*?)\s*(?:<[^`]*>)?`")
_LITERAL = re.compile(r"``([^`]+)``|`([^`<]+?)\s*(?:<[^`]*>)?`_{0,2}")
_EMPHASIS = re.compile(r"(?<!\w)\*{1,2}(\w[^*\n]*\w)\*{1,2}(?!\w)")
_PLACEHOLDER = re.compile(r"\{\w*\}|%\(\w+\)s")
_DIRECTIVE = re.compile(r"\s*\.\. ?[\w:-]*(?:::)?")
_SKIPPED_DIRECTIVES = re.compile(
    r"\s*\.\. (?:math|code|code-block|codeblock|sourcecode|plot|image|figure|table|autosummary|auto\w+|doctest|testcode|testsetup|"
    r"testoutput|index|list-table|csv-table|parsed-literal|raw|toctree|graphviz|productionlist|ipython|prompt|rubric|_\S+)\b"
)
_FENCE = re.compile(r"^[ \t]*```.*?^[ \t]*```[ \t]*$", re.S | re.M)
_RULE = re.compile(r"\s*([=\-~^\"#*+_|:`.\s])\1*[=\-~^\"#*+_|\s]*$")
_BULLET = re.compile(r"(?:[-*+•]|\d{1,2}[.)])\s+")
_FIELD = re.compile(r"(?::[\w ]+:|\*{0,2}[A-Za-z_][\w.,* ]{0,40}(?:\([^)]*\))?\s*:)(?:\s|$)")
_NO_LETTER = re.compile(r"[^a-zA-Z ]")
_WORD = re.compile(r"[A-Za-z][a-z']*")


@dataclass(frozen=True)
class Module:
    """One unit of the corpus before tokenization: a dotted name and its docstrings as they stand in the source."""

    name: str
    docstrings: list[str]


def source_files() -> Iterator[tuple[str, Path]]:
    """(dotted module name, path) of every source file that may be read, in the fixed order of the corpus."""
    standard = Path(sysconfig.get_path("stdlib"))
    yield from _files_below(standard, "")
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("data.source=documentation reads the packages beside torch, which is not installed; pip install torch")
    installed = Path(spec.submodule_search_locations[0]).parent
    folders = [path.name for path in installed.iterdir() if path.is_dir() and path.name.isidentifier() and path.name not in SKIPPED_FOLDERS]
    others = sorted(name for name in folders if not name.startswith("_"))
    for package in (*PACKAGES, *(name for name in others if name not in PACKAGES and name not in GENERATED)):
        if (installed / package).is_dir():
            yield from _files_below(installed / package, package)


def _files_below(folder: Path, package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).parts):
        parts = path.relative_to(folder).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts[:-1]) and not parts[-1].startswith("test_"):
            yield ".".join((package, *parts) if package else parts), path


def read_module(name: str, path: Path) -> list[Module]:
    """The docstrings of one source file; the language reference gives one module per topic. Files that do not parse give nothing."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            return []
        source = path.read_text("utf-8")
        if name == "pydoc_data.topics":
            return _topics(ast.parse(source))
        if sum(len(match[2]) for match in _QUOTED.finditer(source)) < _QUOTED_SHARE * len(source):
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [Module(name, list(_docstrings(ast.parse(source))))]
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return []


def _topics(tree: ast.Module) -> list[Module]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            table = ast.literal_eval(node.value)
            return [Module(f"pydoc_data.topics.{topic}", [text]) for topic, text in sorted(table.items())]
    return []


def _docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings proper, and the text that torch and numpy attach to compiled functions by statements like `add_docstr(function, text)`.

    Only statements are visited: expressions are most of a tree and hold no docstrings.
    """
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                yield text
        elif isinstance(node, ast.Expr | ast.Assign) and isinstance(node.value, ast.Call) and "doc" in _name(node.value.func):
            yield from _literals(node.value.args)
        for block in ("finalbody", "orelse", "handlers", "body"):  # the last one is read first
            statements = getattr(node, block, None)
            if isinstance(statements, list):
                waiting.extend(reversed(statements))


def _literals(arguments: list[ast.expr]) -> Iterator[str]:
    """The strings among the arguments of a call; of `text.format(...)`, the text."""
    for argument in arguments:
        if isinstance(argument, ast.Call) and isinstance(argument.func, ast.Attribute) and argument.func.attr == "format":
            argument = argument.func.value
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value


def _name(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""


def paragraphs(docstring: str) -> list[str]:
    """The prose of one docstring: paragraphs without code, doctests, tables, formulas and markup, whitespace normalised.

    Lines of a paragraph are joined; items of lists and named parameters keep a line of their own.
    """
    text = _FENCE.sub("", inspect.cleandoc(docstring.expandtabs(8)).replace("\r", ""))
    result: list[str] = []
    code_indent: int | None = None
    for block in re.split(r"\n\s*\n", text):
        lines = [line.rstrip() for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        indent = len(lines[0]) - len(lines[0].lstrip())
        if code_indent is not None and indent > code_indent:
            continue
        code_indent = indent if lines[-1].endswith("::") or _SKIPPED_DIRECTIVES.match(lines[0]) else None
        if _SKIPPED_DIRECTIVES.match(lines[0]):
            continue
        paragraph = _joined(lines)
        if _is_prose(paragraph):
            result.append(paragraph)
    return result


def _joined(lines: list[str]) -> str:
    """One paragraph from its source lines, reStructuredText and Markdown marks taken off."""
    joined: list[str] = []
    previous_indent, heading = 0, True
    for line in lines:
        if _RULE.match(line):
            heading = True
            continue
        line = _DIRECTIVE.sub("", line, count=1) if line.lstrip().startswith("..") else line
        line = _PLACEHOLDER.sub("", _EMPHASIS.sub(r"\1", _LITERAL.sub(lambda match: match[1] or match[2], _ROLE.sub(r"\1", line))))
        indent, words = len(line) - len(line.lstrip()), " ".join(line.split())
        if not words:
            continue
        if heading or indent < previous_indent or _BULLET.match(words) or _FIELD.match(words):
            joined.append(words)
        else:
            joined[-1] += " " + words
        previous_indent, heading = indent, False
    return "\n".join(joined).removesuffix("::").strip()


def _is_prose(paragraph: str) -> bool:
    """Sentences rather than code, a table, a formula or a heading: most of it is plain words."""
    if len(paragraph) < 40 or ">>>" in paragraph or "\\" in paragraph or paragraph.count("|") > 2:
        return False
    if paragraph.startswith(("$ ", "# ", "...")):
        return False
    tokens = paragraph.split()
    plain = sum(1 for token in tokens if _WORD.fullmatch(token.strip("\"'.,;:!?()[]")))
    return plain >= _SENTENCE and plain >= 0.7 * len(tokens) and len(_NO_LETTER.findall(paragraph)) <= 0.15 * len(paragraph)


def _words(text: str) -> list[str]:
    """The plain words of a text, lower-cased: what is left when identifiers, numbers and punctuation are taken away."""
    tokens = (token.strip("\"'.,;:!?()[]") for token in text.split())
    return [token.lower() for token in tokens if token.isalpha() and (token.islower() or token.istitle())]


def unseen(paragraph: str, seen: set[bytes]) -> str:
    """`paragraph` without the lines whose words are in `seen`, to which the others are added; "" where nothing worth reading is left.

    Lines of fewer than _SENTENCE words (headings, names) stay where a longer one does; a paragraph of such lines alone counts as one line.
    """
    lines = paragraph.split("\n")
    long = [len(_words(line)) >= _SENTENCE for line in lines]
    if not any(long):
        lines, long = [paragraph], [True]
    fresh = [not is_long or _first_time(line, seen) for line, is_long in zip(lines, long, strict=True)]
    if not any(is_fresh and is_long for is_fresh, is_long in zip(fresh, long, strict=True)):
        return ""
    text = "\n".join(line for line, is_fresh in zip(lines, fresh, strict=True) if is_fresh)
    return text if _is_prose(text) else ""


def _first_time(line: str, seen: set[bytes]) -> bool:
    key = hashlib.sha256(" ".join(_words(line)).encode()).digest()[:16]
    if key in seen:
        return False
    seen.add(key)
    return True


def documentation(tokenizer: Tokenizer, budget: int, *, progress: bool = True) -> list[Document]:
    """Documents of at most `budget` tokens together (end of text included), in an order that mixes the packages.

    Reading stops with the first document that would exceed the budget. Raises DataError where torch is not installed.
    """
    seen: set[bytes] = set()
    documents: list[Document] = []
    total = 0
    with tqdm(total=budget, unit=" tokens", unit_scale=True, desc="reading documentation", disable=None if progress else True) as bar:
        for module in (module for name, path in source_files() for module in read_module(name, path)):
            fresh = (unseen(paragraph, seen) for docstring in module.docstrings for paragraph in paragraphs(docstring))
            text = "\n\n".join(paragraph for paragraph in fresh if paragraph)
            if len(text) < _SHORTEST:
                continue
            tokens = np.array(tokenizer.encode(text), np.uint32)
            if total + len(tokens) + 1 > budget:
                break
            total += len(tokens) + 1
            bar.update(len(tokens) + 1)
            documents.append(Document(module.name, tokens, held_out(module.name)))
    documents.sort(key=lambda document: hashlib.sha256(document.name.encode()).digest())
    return documents
