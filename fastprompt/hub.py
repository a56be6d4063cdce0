"""Adapters on the Hugging Face Hub: fetch one, upload one, and write its model card.

A repository holds the two files of an adapter (`fastprompt.adapters`) and `README.md`, the card. `huggingface_hub` does
the transfer, caches what was fetched, and reads tokens, `HF_ENDPOINT` and `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

import fastprompt
from fastprompt.adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter, source_of
from fastprompt.arguments import ArgumentError, ArgumentPathError, ArgumentTypeError
from fastprompt.fetch import FetchError
from fastprompt.files import parse_json
from fastprompt.generators import config_from_dict, method_of
from fastprompt.intervals import wilson

CARD_FILE = "README.md"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_MOST_CLASSES = 200
"""Number of class names that a card lists."""


def is_repository(where: str | os.PathLike[str]) -> bool:
    """Whether `where` can only be a repository, "owner/name": a text of that form that is no path on this machine."""
    return isinstance(where, str) and _REPOSITORY.fullmatch(where) is not None and not os.path.lexists(where)


def read_pretrained(
    where: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the configuration and tensors of an adapter in a directory or in a repository of the Hub.

    What was fetched is checked against the adapter's own digest. If it is damaged, it is fetched once more.

    Args:
        where: a directory, or "owner/name".
        revision: branch, tag or commit of the repository; None: "main".
        token: for a private repository; None: the one that `hf auth login` saved.
        cache_dir: folder for fetched files; None: that of `huggingface_hub`.
        local_files_only: use only what was fetched before.

    Raises:
        FileNotFoundError: there is no such directory or repository, or it holds no adapter.
        PermissionError: the repository is not open to this token.
        FetchError: the Hub cannot be reached, and the adapter was not fetched before; the message says what to do.
        ValueError: a file is damaged, or an argument is invalid.
    """
    options = {"revision": revision, "token": token, "cache_dir": cache_dir}
    if not is_repository(where):
        for name, value in options.items():
            if value is not None:
                raise ArgumentError(name, f"must be None for an adapter in a directory, got {value!r}")
        return read_adapter(where)
    return _fetch_whole(str(where), local_files_only, **options)[1]


def fetch_adapter(repository: str) -> Path:
    """Fetch the adapter of a repository, unless it was fetched before; return the folder with its files.

    Raises what `read_pretrained` raises.
    """
    return _fetch_whole(repository)[0]


def _fetch_whole(
    repository: str, local_files_only: bool = False, **options: Any
) -> tuple[Path, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Fetch an adapter, and once more if it does not fit its own digest; return folder and content."""
    folder = _fetch(repository, local_files_only, **options)
    try:
        return folder, read_adapter(folder)
    except ValueError as error:
        if local_files_only:
            raise ValueError(f"{repository}, as it was fetched before, is damaged: {error}") from error
    folder = _fetch(repository, local_files_only, force_download=True, **options)
    try:
        return folder, read_adapter(folder)
    except ValueError as error:
        raise ValueError(f"{repository} was fetched twice and is damaged: {error}") from error


def _fetch(repository: str, local_files_only: bool, **options: Any) -> Path:
    """Download both files of one commit; return the folder with them."""
    from huggingface_hub import snapshot_download

    with _explained(repository, options.get("revision"), local_files_only):
        folder = Path(
            snapshot_download(
                repository,
                allow_patterns=[CONFIG_FILE, WEIGHTS_FILE],
                local_files_only=local_files_only,
                library_name="fastprompt",
                library_version=fastprompt.__version__,
                **options,
            )
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{repository} on the Hub is no adapter of fastprompt: {name} is missing")
    return folder


def push(folder: Path, repository: str, message: str, token: str | bool | None, private: bool | None, **to: Any) -> str:
    """Create the repository if it is missing, upload the files in `folder` as one commit, and return its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="fastprompt", library_version=fastprompt.__version__)
    with _explained(repository, to.get("revision"), upload=True):
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, **to)
    return str(commit.commit_url)


@contextlib.contextmanager
def _explained(
    repository: str, revision: str | None, local_files_only: bool = False, upload: bool = False
) -> Iterator[None]:
    """Turn errors of `huggingface_hub` into ours, which say what to do."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT
    log_in = "log in (`hf auth login`) or give token="
    try:
        yield
    except HFValidationError as error:
        raise ArgumentError(
            "repo_id", f"must be 'owner/name' as the Hub takes it, got {repository!r}: {error}"
        ) from error
    except GatedRepoError as error:
        raise PermissionError(f"{repository} is gated: ask for access at {hub}/{repository}, then {log_in}") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repository} is neither a directory here nor a repository of {hub} that this token may read; "
            f"if it is private, {log_in}"
        ) from error
    except RevisionNotFoundError as error:
        raise ArgumentError("revision", f"must be a branch, tag or commit of {repository}, got {revision!r}") from error
    except LocalEntryNotFoundError as error:
        if local_files_only:
            reason = "it was not fetched before, and local_files_only=True allows nothing else"
        elif constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set, and it was not fetched before"
        else:
            reason = f"{hub} cannot be reached ({_first_line(error.__cause__ or error)}), and it was not fetched before"
        raise FetchError(
            f"{repository} is no directory here and cannot be fetched: {reason}. On a machine with network run "
            f"`hf download {repository} --local-dir DIRECTORY`, copy the directory here and give its path"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{repository} on the Hub is no adapter of fastprompt: {_first_line(error)}") from error
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and library not in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise PermissionError(f"{hub} refuses this token for {repository}: {log_in}") from error
        if upload:
            raise FetchError(
                f"{repository} cannot be uploaded to {hub} ({_first_line(error)}). save_pretrained(DIRECTORY) writes "
                f"the adapter here; `hf upload {repository} DIRECTORY` uploads it later"
            ) from error
        raise FetchError(f"{repository} cannot be fetched from {hub} ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def run_facts(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a run directory records: `results.json`, or `recipe.json` and the last line of `log.jsonl`.

    Raises:
        FileNotFoundError: the directory holds no finished run. ValueError: a file is damaged.
    """
    run = Path(run_dir)
    if (run / "results.json").is_file():
        return dict(parse_json((run / "results.json").read_bytes(), run / "results.json"))
    facts: dict[str, Any] = {}
    for name in ("recipe.json", "log.jsonl"):
        if not (run / name).is_file():
            raise ArgumentPathError("run_dir", f"must be the directory of a finished run, got {run} without {name}")
    facts["recipe"] = parse_json((run / "recipe.json").read_bytes(), run / "recipe.json")
    events = [parse_json(line, run / "log.jsonl") for line in (run / "log.jsonl").read_bytes().splitlines()]
    start, end = events[0], events[-1]
    if end.get("event") != "end":
        raise ArgumentPathError("run_dir", f"must be the directory of a finished run, got {run}")
    facts["trained_parameters"] = {"total": start.get("trained_parameters")}
    facts["data"] = {"train": start.get("num_train"), "val": start.get("num_val")}
    facts["validation"] = {"accuracy": end["best_val_accuracy"], "num_images": start.get("num_val")}
    return facts


def model_card(
    config: Mapping[str, Any],
    repository: str,
    facts: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> str:
    """Write the model card of an adapter: metadata in YAML, then Markdown.

    Args:
        config: the adapter's configuration, as in `adapter_config.json`.
        repository: "owner/name".
        facts: what `run_facts` returns; None: the card has no data, recipe and metrics.
        license: identifier of the adapter's licence, such as "apache-2.0"; None: the card says that none is stated.
    """
    facts = facts or {}
    method = method_of(config_from_dict(config["method"]))
    stored, base = config["backbone"], _base_model(config)
    tags = ["fastprompt", "visual-prompt-tuning", config["method"]["kind"]]
    metadata: dict[str, Any] = {"library_name": "fastprompt", "pipeline_tag": "image-classification", "tags": tags}
    if license is not None:
        metadata["license"] = license
    if base is not None:
        metadata["base_model"], metadata["base_model_relation"] = base, "adapter"
    measured = [(split, facts[split]) for split in ("validation", "test") if facts.get(split)]
    if measured:
        metadata["model-index"] = [
            {"name": repository.partition("/")[2], "results": [_indexed(split, of, facts) for split, of in measured]}
        ]
    trains = method.config_class.trains_backbone or stored.get("optional", {}).get("train_backbone", False)
    frozen = "trained: its weights are part of the adapter" if trains else "frozen and not included"
    options = {key: value for key, value in config["method"].items() if key != "kind"}
    classes = "" if config["num_classes"] is None else f" with {config['num_classes']:,} classes"
    rows = {
        "Method": f"{method.title}{f' ({method.paper})' if method.paper else ''}",
        "Options": ", ".join(f"`{key}={value!r}`" for key, value in options.items()) or "none",
        "Backbone": f"{stored['name']}, {'x'.join(map(str, stored['image_size']))} px, {frozen}",
        "Fingerprint": f"`{stored['fingerprint']}`",
        "Head": f"{config['head']['kind'] if config['head'] else 'none'}{classes}, readout `{config['readout']}`",
    }
    if (facts.get("trained_parameters") or {}).get("total") is not None:
        rows["Trained parameters"] = f"{facts['trained_parameters']['total']:,}"
    if facts.get("data"):
        rows["Data"] = _described_data(facts["data"])
    if facts.get("recipe"):
        recipe = facts["recipe"]
        rows["Recipe"] = ", ".join(f"{key} {recipe[key]}" for key in _RECIPE if recipe.get(key) is not None)
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# {repository.partition('/')[2]}",
        f"{method.title} on {stored['name']}: an adapter of fastprompt "
        f"{config.get('fastprompt_version', fastprompt.__version__)}.",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())]),
    ]
    if measured:
        parts += ["## Results", _metrics(measured)]
    parts += ["## Use", _usage(repository, source_of(config) is not None)]
    names = config["class_names"]
    if names:
        shown = ", ".join(_cell(name) for name in names[:_MOST_CLASSES])
        parts += [
            "## Classes",
            shown + (f", and {len(names) - _MOST_CLASSES:,} more" if len(names) > _MOST_CLASSES else ""),
        ]
    stated = "no licence is stated for this adapter" if license is None else f"this adapter: {license}"
    parts += ["## Licence", f"{stated[0].upper()}{stated[1:]}. The backbone has a licence of its own."]
    return "\n\n".join(parts) + "\n"


_RECIPE = ("epochs", "batch_size", "optimizer", "lr", "head_lr", "weight_decay", "label_smoothing", "seed", "dtype")
_METRICS = (("macro F1", "macro_f1"), ("mean per class", "mean_per_class"), ("calibration error", "calibration_error"))


def _cell(value: Any) -> str:
    """Text for a cell of a Markdown table, without what would end the cell or become markup."""
    return re.sub(r"([|<>\[\]])", r"\\\1", " ".join(str(value).split()))


def _base_model(config: Mapping[str, Any]) -> str | None:
    """The backbone's own repository on the Hub, if the call that loaded it names one."""
    source = source_of(config)
    if source is None or not isinstance(source.name, str):
        return None
    for prefix in ("hf-hub:", "hf_hub:"):
        if source.name.startswith(prefix):
            return source.name.removeprefix(prefix)
    return source.name if source.loader == "transformers" and _REPOSITORY.fullmatch(source.name) else None


def _described_data(data: Mapping[str, Any]) -> str:
    """Name and sizes of a data set. A folder is named without its path, which says nothing to others."""
    sizes = [f"{data[split]:,} {split}" for split in ("train", "val", "test") if data.get(split)]
    return (f"{_data_name(data)}: " if data.get("name") else "") + ", ".join(sizes) + " images"


def _data_name(data: Mapping[str, Any]) -> str:
    return Path(str(data.get("name") or "images")).name


def _metrics(measured: list[tuple[str, Mapping[str, Any]]]) -> str:
    """A table of metrics; the accuracy has Wilson's 95 % interval over images."""
    header = ["split", "images", "accuracy", "95 % interval"]
    others = [(title, key) for title, key in _METRICS if all(key in of for _, of in measured)]
    lines = [header + [title for title, _ in others], ["---"] * (len(header) + len(others))]
    for split, of in measured:
        images, accuracy = of.get("num_images"), of["accuracy"]
        low_high = "" if not images else "{:.4f} to {:.4f}".format(*wilson(round(accuracy * images), images))
        numbers = [f"{of[key]:.4f}" for _, key in others]
        lines.append([split, "" if not images else f"{images:,}", f"{accuracy:.4f}", low_high, *numbers])
    note = "The interval is Wilson's, over images. The checkpoint was chosen on the validation images."
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}"


def _indexed(split: str, of: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of the Hub's `model-index`."""
    name = _data_name(facts.get("data") or {})
    return {
        "task": {"type": "image-classification"},
        "dataset": {"name": name, "type": name, "split": split},
        "metrics": [{"type": "accuracy", "value": round(float(of["accuracy"]), 6)}],
    }


def _usage(repository: str, stands_alone: bool) -> str:
    load = f'model = fp.PromptedViT.from_pretrained("{repository}")  # loads the backbone too'
    if not stands_alone:
        load = "backbone = ...  # the FrozenViT with the fingerprint above\n"
        load += f'model = fp.PromptedViT.from_pretrained(backbone, "{repository}")'
    images = "logits = model(images)  # uint8 pixels or normalised floats, (B, 3, H, W)"
    return f"```python\nimport fastprompt as fp\n\n{load}\n{images}\n```"


def check_push(repository: Any, license: Any, run_dir: Any) -> None:
    """Raise `ValueError` or `TypeError` for the arguments of an upload, before anything is written or sent."""
    if not isinstance(repository, str) or not _REPOSITORY.fullmatch(repository):
        raise ArgumentError("repo_id", f"must be 'owner/name', got {repository!r}")
    if license is not None and (not isinstance(license, str) or not re.fullmatch(r"[a-z0-9.-]+", license)):
        raise ArgumentError("license", f"must be an identifier of the Hub, such as 'apache-2.0', got {license!r}")
    if run_dir is not None and not isinstance(run_dir, (str, os.PathLike)):
        raise ArgumentTypeError("run_dir", f"must be the directory of a run, got {type(run_dir).__name__}")
