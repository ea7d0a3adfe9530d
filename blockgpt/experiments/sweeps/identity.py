"""What decides a run of a study: its resolved configuration, its data, and the code that it executes. No torch."""

import ast
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from blockgpt.config_fields import Field, Types
from blockgpt.data.dataset import dataset_dir
from blockgpt.experiments.comparison import NOT_COMPARED
from blockgpt.files import exists, list_dir

NOT_EXECUTED = {  # {file or folder of the source: why a run does not depend on it}
    "compare_architectures.py": "reads runs", "sample.py": "reads runs",
    "blockgpt/experiments": "plans and reads runs; what a resume reads of a log is held by its own tests",
}


class Program(NamedTuple):
    """train.py as a study needs it; the root hands it in.

    load_config: words of a command line → the configuration (`configurator.load_config`).
    keys, types: {key: its field}, {key: the types that it accepts}.
    version: digest of the code, and versions of what it computes with (`code_version`).
    """

    load_config: Callable[[Sequence[str]], Any]
    keys: Mapping[str, Field]
    types: Mapping[str, Types]
    version: str


def code_version(root: Path, packages: Sequence[str] = ("torch", "numpy")) -> str:
    """Digest of the source that a run executes, without comments and formatting, and of the versions of packages.

    Not the commit: a commit that changes the documentation alone would run every run again.
    """
    digest = hashlib.sha256()
    for path in executed_files(root):
        digest.update(f"{path.relative_to(root)}\n{ast.dump(ast.parse(path.read_bytes()))}\n".encode())
    for package in packages:
        try:
            digest.update(f"{package} {version(package)}\n".encode())
        except PackageNotFoundError:
            digest.update(f"{package} none\n".encode())
    return digest.hexdigest()[:16]


def executed_files(root: Path) -> list[Path]:
    """The source files that a run executes, sorted."""
    paths = sorted([*list_dir(root, "*.py"), *source_files(root / "blockgpt")])
    names = {path: path.relative_to(root).as_posix() for path in paths}
    return [path for path, name in names.items()
            if not any(name == skipped or name.startswith(f"{skipped}/") for skipped in NOT_EXECUTED)]


def source_stamp(root: Path) -> list[tuple[str, int, int]]:
    """(path, time of modification, size) of the files of `code_version`: a quick way to see that nothing changed."""
    return [(str(path), (status := path.stat()).st_mtime_ns, status.st_size) for path in executed_files(root)]


def source_files(folder: Path) -> list[Path]:
    """The Python files below a folder."""
    return [found for path in list_dir(folder) for found in (
        [path] if path.suffix == ".py" else source_files(path) if "." not in path.name else [])]


def data_digest(config: Any) -> str:
    """Digest of what meta.json says of the datasets of a run; of the files' sizes and times where there is none."""
    found = {}
    for name in sorted({name for _, weights in config.phases() for name in weights}):
        directory = dataset_dir(name, config.data_dir)
        meta = directory / "meta.json"
        if exists(meta):
            content = json.loads(meta.read_bytes())
            found[name] = [content.get("dtype"), content.get("vocab_size"), content.get("splits")]
        else:
            statuses = [(path.name, path.stat()) for path in list_dir(directory, "*.bin")]
            found[name] = [[name, status.st_size, status.st_mtime_ns] for name, status in statuses]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def resolved_values(config: Any) -> dict[str, Any]:
    """{key: value} of a configuration, with derived keys of the model filled in; attention_backend stays as set."""
    values = {**config.flat(), **config.model.resolve().flat()}
    return values | {"attention_backend": config.model.attention_backend}


def run_id(config: Any, program: Program, environment: Mapping[str, Any], salt: str = "") -> str:
    """Digest of the resolved configuration, the data, the code, and what results depend on beside them.

    Args:
        config: of train.py.
        environment: {name: value}, such as the number of threads.
        salt: tells a renamed copy from its original.
    """
    values = {key: value for key, value in resolved_values(config).items() if key not in NOT_COMPARED}
    content = [values, data_digest(config), program.version, dict(environment), salt]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
