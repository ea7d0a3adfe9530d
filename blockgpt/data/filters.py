"""Document filters: which documents stay in a dataset.

To add one: a function of (text, value) that returns whether the text stays, and a line in `FILTERS`. The command line
flag --filter, its validation and the counts in meta.json read that table.
"""

import ast
import importlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from blockgpt.data.losses import library_errors
from blockgpt.errors import DataError, UserError, did_you_mean, short_repr
from blockgpt.files import is_file, sha256_of

CompiledFilter = tuple[str, Callable[[str, Any], bool], Any]  # (name, filter function, its value)

# The most common words make up about a third of running text, and few of them belong to another language too.
COMMON_WORDS = {language: frozenset(words.split()) for language, words in {
    "de": "der die das und ist nicht mit ein eine zu den von sich auf für dem im auch es wie werden bei",
    "en": "the of and to in is that it was for on with as be at by this are or from have not you which",
    "es": "el la los las de que y en un una es por con no para se del al lo como más pero su",
    "fr": "le la les des et est une un que dans pour qui ne pas sur au avec il du ce plus par sont",
    "it": "il di che è la per un una non con del della sono nel gli le da si come anche alla più",
    "nl": "de het een van en is dat niet op te zijn voor met die aan er ook als bij maar om",
    "pl": "i w na z się nie do to jest że o jak po od za przez ale był dla są tym",
    "pt": "o a os as de que e em um uma é não para com por se do da mais como mas dos",
}.items()}
WORD = re.compile(r"[^\W\d_]+")


def repeated_line_fraction(text: str) -> float:
    """The fraction of the characters that are in lines that occur earlier in the text."""
    seen, repeated, total = set(), 0, 0
    for line in filter(None, map(str.strip, text.splitlines())):
        total += len(line)
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / total if total else 0.0


def repeated_ngram_fraction(text: str, n: int = 5) -> float:
    """The fraction of the n-grams of words that occur earlier in the text."""
    words = text.split()
    n_grams = max(0, len(words) - n + 1)
    return 1 - len({tuple(words[i:i + n]) for i in range(n_grams)}) / n_grams if n_grams else 0.0


def character_fraction(text: str, predicate: Callable[[str], bool]) -> float:
    """The fraction of the characters, whitespace excluded, for which `predicate` is true."""
    characters = "".join(text.split())
    return sum(map(predicate, characters)) / len(characters) if characters else 0.0


def is_symbol(character: str) -> bool:
    return not character.isalnum()


def is_control(character: str) -> bool:
    return not character.isprintable()


def detect_language(text: str) -> str | None:
    """The language of `COMMON_WORDS` whose words are the most frequent; None if fewer than one word in twelve is."""
    words = [w.lower() for w in WORD.findall(text[:20_000])]
    hits = {language: sum(w in common for w in words) for language, common in COMMON_WORDS.items()}
    best = max(hits, key=hits.__getitem__)
    return best if words and hits[best] >= len(words) / 12 else None


FILTERS: dict[str, Callable[[str, Any], bool]] = {
    "min_chars": lambda text, n: len(text) >= n,
    "max_chars": lambda text, n: len(text) <= n,
    "max_repeated_lines": lambda text, most: repeated_line_fraction(text) <= most,
    "max_repeated_words": lambda text, most: repeated_ngram_fraction(text) <= most,
    "min_letters": lambda text, least: character_fraction(text, str.isalpha) >= least,
    "max_digits": lambda text, most: character_fraction(text, str.isdigit) <= most,
    "max_symbols": lambda text, most: character_fraction(text, is_symbol) <= most,
    "max_control": lambda text, most: character_fraction(text, is_control) <= most,
    "language": lambda text, language: detect_language(text) == language,
    "callable": lambda text, function: call_filter(function, text),
}


def call_filter(function: Callable[[str], Any], text: str) -> bool:
    """Whether a user's function keeps the text. `DataError` for whatever it raises."""
    with library_errors(f"the function {getattr(function, '__name__', function)} fails on it"):
        return bool(function(text))


def parse_filters(settings: Iterable[str] | None) -> dict[str, Any]:
    """Parse the values of --filter.

    Args:
        settings: "name=value" each, such as "min_chars=200", "language=en" or "callable=module:function".

    Returns:
        {name: value}; the value is a float, except for "language" and "callable".

    Raises:
        UserError: an unknown filter, a value of the wrong type, a function that cannot be imported.
    """
    filters: dict[str, Any] = {}
    for setting in settings or ():
        name, _, value = setting.partition("=")
        if name not in FILTERS:
            raise UserError(f"--filter {short_repr(setting)}: no such filter{did_you_mean(name, FILTERS)}")
        if name in filters:
            hint = "one function can call both" if name == "callable" else "both cannot hold; drop one"
            raise UserError(f"--filter {name}: is given twice, {filters[name]} and {short_repr(value)} ({hint})")
        if name == "language" and value not in COMMON_WORDS:
            raise UserError(f"--filter {setting}: {short_repr(value)} is unknown{did_you_mean(value, COMMON_WORDS)}")
        if name in ("language", "callable"):
            filters[name] = value
            continue
        try:
            filters[name] = float(value)
        except ValueError:
            raise UserError(f"--filter {short_repr(setting)}: {short_repr(value)} is not a number") from None
    compile_filters(filters)  # a function that cannot be imported is an error before any text is read
    return filters


def compile_filters(filters: dict[str, Any]) -> list[CompiledFilter]:
    """Look up the functions of {name: value}; the value of "callable" may be a function or "module:function"."""
    return [(name, FILTERS[name], import_function(value) if name == "callable" else value)
            for name, value in filters.items()]


def import_function(function: str | Callable[[str], Any]) -> Callable[[str], Any]:
    """Import the function named "module:function"; a function is returned as it is."""
    if callable(function):
        return function
    module, _, name = function.partition(":")
    try:
        with library_errors(f"{module} cannot be imported"):
            imported = getattr(importlib.import_module(module), name)
    except DataError as error:
        raise UserError(f"--filter callable={function}: {error} (module:function, importable from here)") from None
    if not callable(imported):
        raise UserError(f"--filter callable={function}: {short_repr(imported)} is no function")
    if inspect.iscoroutinefunction(imported) or inspect.isgeneratorfunction(imported):
        raise UserError(f"--filter callable={function}: what it returns is always true (a plain function, without "
                        "async and yield)")
    return imported


def source_digests(filters: dict[str, Any]) -> dict[str, str]:
    """{module or file: sha256} of the functions that filters name, and of what belongs to the user that these use.

    These are the modules that a module imports, at its top, in functions or by a name as text, those of the objects
    that it has, and the files whose names it contains, if it does not open them to write. An edited function or list
    of words then makes another dataset: nothing is continued from what the old one kept.
    """
    digests: dict[str, str] = {}
    queue: list[str] = []
    if "callable" in filters:
        queue = modules_of([import_function(filters["callable"])])
    if type(filters.get("callable")) is str:
        queue.append(filters["callable"].partition(":")[0])
    while queue:
        name = queue.pop()
        path = module_path(name)
        if path is None or name in digests or is_installed(path):
            continue
        queue += [name.rpartition(".")[0], *modules_of(vars(sys.modules.get(name, object)).values())]
        with library_errors(f"--filter callable={filters['callable']}: it uses {name}, which cannot be read"):
            digests[name] = sha256_of(path)
            if path.endswith(".py"):
                tree = ast.parse(Path(path).read_bytes())
                queue += imported_modules(tree, name if path.endswith("__init__.py") else name.rpartition(".")[0])
                digests |= {f"{name}: {text}": sha256_of(file) for text, file in named_files(tree, Path(path).parent)}
    return dict(sorted(digests.items()))


def modules_of(values: Iterable[Any]) -> list[str]:
    """The names of the modules among the values, and of those in which the others were defined."""
    modules = [inspect.getmodule(v) for v in values if inspect.ismodule(v) or hasattr(v, "__module__")]
    return [module.__name__ for module in modules if module is not None]


def module_path(name: str) -> str | None:
    """The file of a module, imported or not; None if there is none, as for a folder without an __init__.py."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):  # its package cannot be imported, or it is none
        return None
    return spec.origin if spec is not None and spec.has_location else None


def imported_modules(tree: ast.AST, package: str) -> list[str]:
    """What may be modules in the imports of a source, also in its functions; `package` is that of its file."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[:len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*parents, *filter(None, [node.module])])
            names += [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func)):
            names += [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and type(a.value) is str]
    return [name for name in names if name]


def named_files(tree: ast.AST, folder: Path) -> list[tuple[str, Path]]:
    """(text, file) of the texts in a source that name an existing file, from here or from the source's folder."""
    opened_to_write = {id(constant) for call in ast.walk(tree) if isinstance(call, ast.Call)
                       and re.search(r"\bopen\(.*'[rbt]*[wax+]+[bt+]*'", ast.unparse(call))
                       for constant in ast.walk(call)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str
             and id(node) not in opened_to_write and node.value.isprintable() and 0 < len(node.value) < 256}
    files = {text: next((p for p in (Path(text).expanduser(), folder / text) if is_file(p)), None)
             for text in sorted(texts)}
    return [(text, path) for text, path in files.items() if path is not None]


def is_installed(path: str) -> bool:
    """Whether a module belongs to Python or a package, whose versions are not part of a recipe."""
    folders = {os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(os.path.realpath(path).startswith(folder + os.sep) for folder in folders)


def first_failing_filter(filters: list[CompiledFilter], text: str) -> str | None:
    """The name of the first of the compiled filters that rejects the text, or None."""
    return next((name for name, keeps, value in filters if not keeps(text, value)), None)
