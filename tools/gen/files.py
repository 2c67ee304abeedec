"""Which files are derived, and from what."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from streamer.errors import ContractError
from streamer.kernel.btf import Btf
from streamer.kernel.contract import (
    Layout,
    contract_of,
    difference,
    dotted,
    kind_end,
    kind_names,
    summary_names,
)
from streamer.kernel.tags import SensorInfo
from tools.gen.documents import events_page, pretty, schemas
from tools.gen.helpers import helpers_module
from tools.gen.model import read_model
from tools.gen.modules import events_module, objects_module
from tools.gen.sensors import read_sensor

_SUFFIX = ".bpf.o"
_CORE = "core"


def outputs(objects: Path, root: Path) -> Iterator[tuple[Path, str]]:
    """Each generated file and its text, of the objects in a directory; the modules come first,
    since the others come from them.

    Raises:
        ContractError: objects that are missing or of different sources, or a definition that
            makes no sense.
    """
    found = _read(objects)
    model = read_model(found[_CORE])
    source = events_module(model)
    yield root / "streamer" / "events" / "kinds.py", source
    yield root / "streamer" / "kernel" / "objects.py", _objects_module(found)
    yield (
        root / "streamer" / "kernel" / "helper_names.py",
        helpers_module(objects.rglob(f"*{_SUFFIX}")),
    )
    events = _execute(source)
    kinds: dict[str, type] = {kind: info.struct for kind, info in events.KINDS.items()}
    # Imported only now: these import the modules, which may have been stale until this moment.
    from streamer.config import reference
    from streamer.events.catalogue import made_by_agent
    from streamer.events.schema import of_kind
    from streamer.events.stream import STREAM_KINDS
    from streamer.events.summaries import SUMMARIES
    from streamer.kernel.report import CheckReport
    from streamer.operation.look import Look
    from streamer.verify.report import VerifyReport

    numbered = {dotted(name) for name in summary_names(found[_CORE])}
    if numbered != SUMMARIES.keys():
        differ = numbered ^ SUMMARIES.keys()
        raise ContractError(f"enum summary_kind and SUMMARIES differ: {differ}")
    for name, text in schemas(kinds | SUMMARIES | STREAM_KINDS).items():
        yield root / "schemas" / name, text
    yield root / "schemas" / "config.schema.json", pretty(reference.schema())
    yield root / "schemas" / "check.schema.json", pretty(of_kind("check", CheckReport))
    yield root / "schemas" / "status.schema.json", pretty(of_kind("status", Look))
    yield root / "schemas" / "verify.schema.json", pretty(of_kind("verify", VerifyReport))
    yield (
        root / "docs" / "events.md",
        events_page(
            model,
            [made_by_agent(kind, struct) for kind, struct in SUMMARIES.items()],
            [made_by_agent(kind, struct) for kind, struct in STREAM_KINDS.items()],
        ),
    )
    yield root / "docs" / "configuration.md", reference.documentation()


def _read(directory: Path) -> dict[str, Btf]:
    """The BTF of every object by its name, `core` first; all hold the same contract."""
    paths = {path.name.removesuffix(_SUFFIX): path for path in directory.glob(f"*{_SUFFIX}")}
    core, contract = _read_one(paths.pop(_CORE, directory / f"{_CORE}{_SUFFIX}"))
    found = {_CORE: core}
    for name, path in sorted(paths.items()):
        found[name], own = _read_one(path)
        trouble = difference(own, contract, f"{_CORE}{_SUFFIX}")
        if trouble is not None:
            raise ContractError(f"{path} is of other sources than {_CORE}{_SUFFIX}: {trouble}")
    return found


def _read_one(path: Path) -> tuple[Btf, dict[str, Layout]]:
    btf = Btf.of_object(path)
    try:
        return btf, contract_of(btf)
    except ContractError as error:
        raise ContractError(f"{path}: {error}") from None


def _objects_module(found: dict[str, Btf]) -> str:
    core = found[_CORE]
    sensors: list[SensorInfo] = []
    for name, btf in found.items():
        sensors.append(read_sensor(name, btf, sensors[0] if sensors else None))
    names = kind_names(core) | summary_names(core)
    numbers = {dotted(name): number for name, number in names.items()}
    if len(set(numbers.values())) < len(numbers) or max(numbers.values()) >= kind_end(core):
        raise ContractError("enum event_kind, summary_kind: a number is there twice, or high")
    return objects_module(contract_of(core), numbers, kind_end(core), sensors)


def _execute(source: str) -> ModuleType:
    spec = importlib.util.spec_from_loader("streamer_events_generated", loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # The annotations of the Structs are looked up in their module.
    sys.modules[module.__name__] = module
    exec(compile(source, "kinds.py", "exec"), module.__dict__)
    return module
