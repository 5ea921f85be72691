from __future__ import annotations

from pathlib import Path

import grpc

from adaplex.v1.adapters_pb2 import LoadAdapterRequest
from server.adapter_uploads import write_adapter
from server.calls import status
from server.server_rig import rig


async def test_a_directory_under_a_root_is_loaded(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "root" / "my adapter")
    async with rig(tmp_path, adapter_roots=(tmp_path / "root",)) as toy:
        done = await toy.adapters.LoadAdapter(LoadAdapterRequest(name="a", uri=str(path)))
        again = await toy.adapters.LoadAdapter(LoadAdapterRequest(name="a", uri=path.as_uri()))
    assert (done.created, again.created) == (True, False)
    assert done.adapter.name == "a"


async def test_a_path_outside_the_roots_is_refused_however_it_is_written(tmp_path: Path) -> None:
    write_adapter(tmp_path / "outside")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root / "loop")
    (root / "file").write_text("x")
    uris = {
        str(tmp_path / "outside"): "--adapter-roots",
        f"{root}/../outside": "--adapter-roots",
        f"file://{root}/%2e%2e/outside": "--adapter-roots",
        str(root / "link"): "--adapter-roots",
        str(tmp_path / "rootless"): "--adapter-roots",
        "outside": "absolute",
        "https://example.org/a": "absolute",
        f"file://elsewhere{root}": "absolute",
        f"{root}/a\0b": "absolute",
        str(root / "absent"): "directory",
        str(root / "file"): "directory",
        "file://[x": "absolute",
        "http://[::1": "absolute",
        "file:///%00": "absolute",
        str(root / "loop"): "--adapter-roots",
        f"{root}/{'a' * 300}": "directory",
    }
    async with rig(tmp_path, adapter_roots=(root,)) as toy:
        for uri, reason in uris.items():
            call = toy.adapters.LoadAdapter(LoadAdapterRequest(name="a", uri=uri))
            code, details = await status(call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT, uri
            violation = details["BadRequest"].field_violations[0]
            assert violation.field == "uri"
            assert reason in violation.description, uri


async def test_without_roots_nothing_is_loaded(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "x")
    async with rig(tmp_path) as toy:
        call = toy.adapters.LoadAdapter(LoadAdapterRequest(name="a", uri=str(path)))
        code, details = await status(call)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "--adapter-roots" in details["BadRequest"].field_violations[0].description
