"""The keys that a run inherits from the run.json of another: resuming one, or `init_from` one. No torch.

A key that a resumed run does not inherit is a name in `NOT_INHERITED`. A key that makes the run another experiment is a
name in `EXPERIMENT_KEYS`, or is in one of `EXPERIMENT_GROUPS`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blockgpt.config_fields import Field, Types, coerce, located, with_location
from blockgpt.errors import ConfigError, UserError, did_you_mean, first_line
from blockgpt.files import exists, find, is_dir, list_dir, unreadable
from blockgpt.huggingface.hub import checkpoint_directory, is_checkpoint_name

NOT_INHERITED = ("run_name", "out_dir", "resume", "resume_force", "eval_only", "profile")  # and the group "dry run"
EXPERIMENT_GROUPS = ("architecture", "size")  # except attention_backend, which is the same function
EXPERIMENT_KEYS = ("objective", "init_from", "seed", "dataset", "dataset_schedule", "packing", "tokenizer")

FORMER_VALUES = {"wandb_log": {True: "wandb", False: "none"}}  # of renamed keys: {old name: {old value: new value}}
FORMER_INIT_FROM = ("scratch", "resume")  # values of init_from when it was the key that is now `resume`


def run_exists(run_dir: Path) -> bool:
    """Whether a run directory has something that a new run would replace; `UserError` if that cannot be told."""
    log = find(run_dir / "metrics.jsonl")  # an empty one is of a run that was killed as it began
    return (any(exists(run_dir / name) for name in ("run.json", "model.safetensors"))
            or bool(list_dir(run_dir / "checkpoints", "step_*")) or (log is not None and log.st_size > 0))


def last_recorded_save(run_dir: Path) -> int:
    """The step of the newest checkpoint that a run's run.json and metrics.jsonl say was saved; 0 if none was.

    Raises:
        UserError: they cannot be read.
    """
    steps, path = [0], run_dir / "run.json"
    try:
        if exists(path):
            record = json.loads(path.read_bytes())
            results = record.get("results") or {}
            # Both ends come after a save; runs of earlier versions record no saved_step.
            ended = results.get("step") if record.get("status") in ("finished", "interrupted") else None
            steps += [results.get("saved_step") or 0, ended or 0]
        path = run_dir / "metrics.jsonl"
        if exists(path):
            lines = [line for line in path.read_bytes().split(b"\n")[:-1] if line.startswith(b'{"kind": "save"')]
            steps += [json.loads(line)["step"] for line in lines]
        return max(steps)
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {first_line(error)})") from None


def recorded_data(run_dir: Path) -> str | None:
    """The fingerprint of the data that a run was last trained on, by its run.json; None if it has none."""
    try:
        return json.loads((run_dir / "run.json").read_bytes())["data"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):  # the checkpoint alone says it
        return None


def recorded_config(path: Path, location: str, keys: Mapping[str, Field], accepted: Mapping[str, Types],
                    renamed: Mapping[str, str]) -> dict[str, Any]:
    """{key: value} from the run.json of the run to resume, without the keys that a resumed run does not inherit.

    Args:
        path: the run.json.
        location: where run_name was set.
        keys: {key: its field}. A recorded key that is not among them is ignored.
        accepted: {key: the types that it accepts}.
        renamed: {key of an earlier version: its new name}.

    Raises:
        UserError: there is no such run, or its run.json cannot be used.
    """
    with located(location):
        try:
            recorded = json.loads(path.read_bytes())["config"].items()
        except FileNotFoundError:
            if run_exists(path.parent):
                raise ConfigError("run_name", f"{path} is missing, though the folder has checkpoints or a log: the run "
                                              "cannot be resumed without it (restore it, or start another)") from None
            existing = [p.name for p in list_dir(path.parent.parent) if p != path.parent]
            raise ConfigError("run_name", f"there is no run {path.parent} to resume"
                              + did_you_mean(path.parent.name, existing)) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError("run_name", f"{path} cannot be read ({type(error).__name__}): the run cannot be resumed "
                                          "(start another)") from None
    names = {name for name, f in keys.items() if name not in NOT_INHERITED and f.metadata["group"] != "dry run"}
    with located(path):
        return coerced(recorded, names, keys, accepted, renamed)


def coerced(recorded: Iterable[tuple[str, Any]], names: set[str], keys: Mapping[str, Field],
            accepted: Mapping[str, Types], renamed: Mapping[str, str]) -> dict[str, Any]:
    """{key: value} of the recorded keys in `names`; the other arguments are those of `recorded_config`."""
    return {name: coerce(keys[name], accepted[name], value)
            for name, value in ((renamed.get(k, k), present_value(k, v)) for k, v in recorded)
            if name in names and not (name == "init_from" and value in FORMER_INIT_FROM)}


def present_value(key: str, value: Any) -> Any:
    """What a value of an earlier version's key is now; a value that no version wrote stays, for `coerce` to refuse."""
    return FORMER_VALUES.get(key, {}).get(value, value) if isinstance(value, bool) else value


def split_init_from(value: str) -> tuple[Path, int | None]:
    """(run directory, step or None) of runs/NAME or runs/NAME@step."""
    match = re.fullmatch("(.+)@([0-9]{1,18})", value)
    return (Path(match[1]), int(match[2])) if match and not is_dir(value) else (Path(value), None)


def initial_architecture(init_from: str, location: str, given: Mapping[str, Any], keys: Mapping[str, Field],
                         accepted: Mapping[str, Types], renamed: Mapping[str, str]) -> dict[str, Any]:
    """{key: value} of the architecture and size of the run whose weights a new run starts from.

    The size alone if another arch_preset is given now.

    Of a checkpoint of transformers all keys of the architecture, from its config.json.

    Args:
        init_from: the key's value.
        location: where it was set.
        given: {key: value} of the keys that are set.
        keys, accepted, renamed: see `recorded_config`.

    Raises:
        UserError: there is no such run, or its record cannot be used.
    """
    if is_checkpoint_name(init_from):
        from blockgpt.huggingface.read import architecture  # the families take longer to import than all the rest

        with located(location):
            found, _ = architecture(checkpoint_directory(init_from))
            defaults = {name: f.default for name, f in keys.items()
                        if f.metadata["group"] in EXPERIMENT_GROUPS and name != "arch_preset"}
            return {name: coerce(keys[name], accepted[name], value) for name, value in (defaults | found).items()}
    run_dir, _ = split_init_from(init_from)
    path, section = run_dir / "run.json", "config"
    if not exists(path):  # an export alone
        path, section = run_dir / "config.json", "model"
    with located(location):
        try:
            recorded = dict(json.loads(path.read_bytes())[section].items())
        except FileNotFoundError:
            if run_exists(path.parent):
                raise ConfigError("run_name", f"{path} is missing, though the folder has checkpoints or a log: the run "
                                              "cannot be resumed without it (restore it, or start another)") from None
            existing = [p.name for p in list_dir(run_dir.parent) if p != run_dir]
            raise ConfigError("init_from", f"there is no run {run_dir}"
                              + did_you_mean(run_dir.name.partition("@")[0], existing)) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError("init_from", f"{path} cannot be read ({type(error).__name__})") from None
    other_preset = given.get("arch_preset", recorded.get("arch_preset")) != recorded.get("arch_preset")
    groups = ("size",) if other_preset else EXPERIMENT_GROUPS
    with located(path):
        return coerced(recorded.items(), {name for name, f in keys.items() if f.metadata["group"] in groups}, keys,
                       accepted, renamed)


def check_resumable(config: Any, given: Mapping[str, Any], recorded: Mapping[str, Any],
                    keys: Mapping[str, Field]) -> tuple[str, ...]:
    """Refuse changes that would make the rest of a resumed run another experiment than its beginning.

    Args:
        config: of the resumed run.
        given: {key: value} of the keys that are set now.
        recorded: {key: value} of the run to resume; empty for a new run.
        keys: {key: its field}.

    Returns:
        Under resume_force, the keys that would have been refused.

    Raises:
        UserError: the first key that is refused.
    """
    forced = []

    def refuse(name: str, message: str) -> None:
        if not config.resume_force:
            raise with_location(ConfigError(name, f"{message}, or --resume_force)"), config.explicit)
        forced.append(name)

    fixed = [name for name, f in keys.items() if f.metadata["group"] in EXPERIMENT_GROUPS]
    fixed.remove("attention_backend")
    for name in (*fixed, *EXPERIMENT_KEYS):
        if name in given and name in recorded and given[name] != recorded[name]:
            refuse(name, f"the run was made with {recorded[name]!r} and keeps it when resumed (drop the key, start a "
                         "new run")
    if recorded:
        sizes = ("batch_size", "gradient_accumulation_steps")
        now = config.batch_size * config.gradient_accumulation_steps
        batch_size, accumulation = (recorded.get(name, keys[name].default) for name in sizes)
        if now != batch_size * accumulation:
            refuse("batch_size" if "batch_size" in given else "gradient_accumulation_steps",
                   f"the run takes {batch_size * accumulation} sequences per step and keeps that when resumed, not "
                   f"{now} (batch_size * gradient_accumulation_steps")
    return tuple(forced)
